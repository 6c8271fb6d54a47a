#include "fresh_memory.h"

#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <c10/core/Allocator.h>
#include <sys/mman.h>

#include <cmath>
#include <cstring>
#include <memory>

namespace embed_ext::cpu {
namespace {

constexpr int64_t kPage = 4096;
constexpr int64_t kHugePage = int64_t(2) << 20;

// A fault of a small page costs about a fifth of what its share of a huge page's fault would cost
// if all of that were used.
constexpr int64_t kPagesPerUsedPage = 5;

// Below this a memset is quicker than a system call and its page faults.
constexpr int64_t kSmallestMapping = int64_t(1) << 20;

// From here on malloc maps fresh memory as well, so that its pages would be faulted in any case.
constexpr int64_t kMallocMapsFrom = int64_t(32) << 20;

struct Mapping {
  void* data;
  size_t bytes;
};

void unmap(void* context) {
  const std::unique_ptr<Mapping> mapping(static_cast<Mapping*>(context));
  c10::reportMemoryUsageToProfiler(mapping->data, -static_cast<int64_t>(mapping->bytes), 0, 0,
                                   c10::Device(c10::kCPU));
  munmap(mapping->data, mapping->bytes);
}

// A real allocator, not a borrowed pointer, so that the storage can be resized like any other.
class MappedAllocator final : public c10::Allocator {
 public:
  explicit MappedAllocator(bool huge_pages) : huge_pages_(huge_pages) {}

  c10::DataPtr allocate(size_t bytes) override {
    if (bytes == 0) {
      return {nullptr, c10::Device(c10::kCPU)};
    }
    void* data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    TORCH_CHECK_WITH(OutOfMemoryError, data != MAP_FAILED,
                     "embedding_dense_backward: could not map ", bytes,
                     " bytes for the gradient: ", std::strerror(errno));
#if defined(MADV_HUGEPAGE)
    // A hint. For few scattered rows small pages are asked for, as the system's default may be
    // huge.
    madvise(data, bytes, huge_pages_ ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
#endif
    c10::reportMemoryUsageToProfiler(data, static_cast<int64_t>(bytes), 0, 0,
                                     c10::Device(c10::kCPU));
    return {data, new Mapping{data, bytes}, &unmap, c10::Device(c10::kCPU)};
  }

  void copy_data(void* dest, const void* src, size_t bytes) const override {
    default_copy_data(dest, src, bytes);
  }

 private:
  bool huge_pages_;
};

// Lives as long as the process: tensors may outlive every static object.
MappedAllocator* mapped_allocator(bool huge_pages) {
  static auto* small = new MappedAllocator(false);
  static auto* huge = new MappedAllocator(true);
  return huge_pages ? huge : small;
}

void fill_with_zero(void* data, int64_t bytes) {
  constexpr int64_t kGrain = int64_t(1) << 18;
  at::parallel_for(0, bytes, kGrain, [&](int64_t begin, int64_t end) {
    std::memset(static_cast<char*>(data) + begin, 0, end - begin);
  });
}

}  // namespace

at::Tensor zero_rows(int64_t num_rows, int64_t width, int64_t used_rows,
                     const at::TensorOptions& options) {
  const auto dtype = c10::typeMetaToScalarType(options.dtype());
  const int64_t row_bytes = width * static_cast<int64_t>(c10::elementSize(dtype));
  const int64_t bytes = num_rows * row_bytes;
  const int64_t pages = bytes / kPage + 1;
  const auto touches = static_cast<double>(used_rows * (row_bytes / kPage + 1));
  // Touches that fall on pages at random hit this many different ones.
  const double used_pages = pages * -std::expm1(-touches / static_cast<double>(pages));
  const bool few_used = used_pages * kPagesPerUsedPage < static_cast<double>(pages);
  if (bytes >= kMallocMapsFrom || (bytes >= kSmallestMapping && few_used)) {
    return at::detail::empty_generic({num_rows, width}, mapped_allocator(!few_used),
                                     c10::DispatchKeySet(c10::DispatchKey::CPU), dtype,
                                     std::nullopt);
  }
  at::Tensor out = at::detail::empty_cpu({num_rows, width}, options);
  fill_with_zero(out.mutable_data_ptr(), bytes);
  return out;
}

void advise_written_whole(void* data, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  if (bytes < kMallocMapsFrom) {
    return;
  }
  const auto begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) / kHugePage * kHugePage;
  const auto end = (reinterpret_cast<uintptr_t>(data) + bytes) / kHugePage * kHugePage;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // a hint, as above
#endif
}

}  // namespace embed_ext::cpu
