#include "recycled_memory.h"

#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <c10/core/Allocator.h>
#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <mutex>
#include <vector>

namespace embed_ext::cpu {
namespace {

constexpr int64_t kPage = 4096;
constexpr int64_t kHugePage = int64_t(2) << 20;

// Below this malloc's memory is as warm as a block would be.
constexpr int64_t kSmallestBlock = int64_t(1) << 20;

// From here on malloc gives memory back at once; what is smaller it keeps, as is done here.
constexpr int64_t kMallocMapsFrom = int64_t(32) << 20;

struct Block {
  void* data;
  int64_t bytes;  // a whole number of pages
  bool is_zero;   // as mapped, never handed out
};

// [data, data + bytes) fresh from the system, beginning with a huge page if there is room for one;
// null if the system has none to give.
Block* map_block(int64_t bytes) {
  const int64_t spare = bytes >= kHugePage ? kHugePage : 0;
  void* const mapped = mmap(nullptr, static_cast<size_t>(bytes + spare), PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) {
    return nullptr;
  }
  auto* const begin = static_cast<char*>(mapped);
  const int64_t before =
      spare == 0 ? 0 : static_cast<int64_t>(-reinterpret_cast<uintptr_t>(begin) % kHugePage);
  if (before > 0) {
    munmap(begin, static_cast<size_t>(before));
  }
  if (spare > before) {
    munmap(begin + before + bytes, static_cast<size_t>(spare - before));
  }
  auto* const data = begin + before;
#if defined(MADV_HUGEPAGE)
  madvise(data, static_cast<size_t>(bytes), MADV_HUGEPAGE);  // a hint
#endif
  return new Block{data, bytes, /*is_zero=*/true};
}

void unmap_block(const Block* block) {
  munmap(block->data, static_cast<size_t>(block->bytes));
  delete block;
}

void report_to_profiler(const Block& block, int64_t bytes) {
  c10::reportMemoryUsageToProfiler(block.data, bytes, 0, 0, c10::Device(c10::kCPU));
}

// What waits and what is in use are together never more than what was once in use.
class Pool {
 public:
  Block* take(int64_t bytes) {
    bytes = (bytes + kPage - 1) / kPage * kPage;
    Block* block = take_waiting(bytes);
    if (block == nullptr) {
      block = map_block(bytes);
    }
    if (block == nullptr && drop() > 0) {
      block = map_block(bytes);
    }
    TORCH_CHECK_WITH(OutOfMemoryError, block != nullptr, "embed_ext: could not map ", bytes,
                     " bytes of memory: ", std::strerror(errno));
    std::vector<Block*> too_many;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      in_use_ += block->bytes;
      most_in_use_ = std::max(most_in_use_, in_use_);
      while (!waiting_.empty() && in_use_ + waiting_bytes_ > most_in_use_) {
        too_many.push_back(waiting_.front());
        waiting_bytes_ -= waiting_.front()->bytes;
        waiting_.erase(waiting_.begin());
      }
    }
    std::for_each(too_many.begin(), too_many.end(), unmap_block);
    return block;
  }

  void give_back(Block* block) {
#if defined(MADV_FREE)
    if (block->bytes >= kMallocMapsFrom) {  // its pages are the system's as soon as it needs some
      madvise(block->data, static_cast<size_t>(block->bytes), MADV_FREE);
    }
#endif
    block->is_zero = false;
    const std::lock_guard<std::mutex> lock(mutex_);
    in_use_ -= block->bytes;
    waiting_bytes_ += block->bytes;
    waiting_.push_back(block);
  }

  int64_t drop() {
    std::vector<Block*> dropped;
    int64_t bytes = 0;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      dropped.swap(waiting_);
      bytes = std::exchange(waiting_bytes_, 0);
      most_in_use_ = in_use_;
    }
    std::for_each(dropped.begin(), dropped.end(), unmap_block);
    return bytes;
  }

  int64_t waiting_bytes() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return waiting_bytes_;
  }

 private:
  // The smallest that is large enough and wastes no more than a quarter, the latest of these; or
  // null.
  Block* take_waiting(int64_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    auto best = waiting_.end();
    for (auto it = waiting_.begin(); it != waiting_.end(); ++it) {
      const int64_t size = (*it)->bytes;
      if (size >= bytes && size <= bytes + bytes / 4 &&
          (best == waiting_.end() || size <= (*best)->bytes)) {
        best = it;
      }
    }
    if (best == waiting_.end()) {
      return nullptr;
    }
    Block* const block = *best;
    waiting_.erase(best);
    waiting_bytes_ -= block->bytes;
    return block;
  }

  std::mutex mutex_;
  std::vector<Block*> waiting_;  // the one that has waited longest first
  int64_t waiting_bytes_ = 0;
  int64_t in_use_ = 0;
  int64_t most_in_use_ = 0;
};

// Lives as long as the process: tensors may outlive every static object.
Pool& pool() {
  static auto* const pool = new Pool();
  return *pool;
}

void give_back(void* context) {
  auto* const block = static_cast<Block*>(context);
  report_to_profiler(*block, -block->bytes);
  pool().give_back(block);
}

c10::DataPtr data_of(Block* block) {
  report_to_profiler(*block, block->bytes);
  return {block->data, block, &give_back, c10::Device(c10::kCPU)};
}

// A real allocator, not a borrowed pointer, so that the storage can be resized like any other.
class RecyclingAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes == 0) {
      return {nullptr, c10::Device(c10::kCPU)};
    }
    return data_of(pool().take(static_cast<int64_t>(bytes)));
  }

  void copy_data(void* dest, const void* src, size_t bytes) const override {
    default_copy_data(dest, src, bytes);
  }
};

RecyclingAllocator* allocator() {
  static auto* const allocator = new RecyclingAllocator();
  return allocator;
}

at::Tensor tensor_in(Block* block, int64_t bytes, at::IntArrayRef sizes,
                     const at::TensorOptions& options) {
  auto storage = c10::make_intrusive<c10::StorageImpl>(
      c10::StorageImpl::use_byte_size_t(), bytes, data_of(block), allocator(), /*resizable=*/true);
  auto out = at::detail::make_tensor<c10::TensorImpl>(
      std::move(storage), c10::DispatchKeySet(c10::DispatchKey::CPU), options.dtype());
  out.unsafeGetTensorImpl()->set_sizes_contiguous(sizes);
  return out;
}

void fill_with_zero(void* data, int64_t bytes) {
  constexpr int64_t kGrain = int64_t(1) << 18;
  at::parallel_for(0, bytes, kGrain, [&](int64_t begin, int64_t end) {
    std::memset(static_cast<char*>(data) + begin, 0, end - begin);
  });
}

int64_t bytes_of(at::IntArrayRef sizes, const at::TensorOptions& options) {
  const auto dtype = c10::typeMetaToScalarType(options.dtype());
  return c10::multiply_integers(sizes) * static_cast<int64_t>(c10::elementSize(dtype));
}

}  // namespace

at::Tensor zero_rows(int64_t num_rows, int64_t width, const at::TensorOptions& options) {
  const std::array<int64_t, 2> sizes{num_rows, width};
  const int64_t bytes = bytes_of(sizes, options);
  if (bytes < kSmallestBlock) {
    at::Tensor out = at::detail::empty_cpu(sizes, options);
    fill_with_zero(out.mutable_data_ptr(), bytes);
    return out;
  }
  Block* const block = pool().take(bytes);
  const bool is_zero = block->is_zero;
  at::Tensor out = tensor_in(block, bytes, sizes, options);
  if (!is_zero) {
    fill_with_zero(out.mutable_data_ptr(), bytes);
  }
  return out;
}

at::Tensor empty_output(at::IntArrayRef sizes, const at::TensorOptions& options) {
  const int64_t bytes = bytes_of(sizes, options);
  return bytes < kMallocMapsFrom ? at::detail::empty_cpu(sizes, options)
                                 : tensor_in(pool().take(bytes), bytes, sizes, options);
}

int64_t recycled_memory_bytes() { return pool().waiting_bytes(); }
int64_t drop_recycled_memory() { return pool().drop(); }

}  // namespace embed_ext::cpu
