#include "recycled_memory.h"

#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <c10/core/Allocator.h>
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <limits>
#include <list>
#include <mutex>
#include <unordered_map>

#include "row_kernels.h"

namespace embed_ext::cpu {
namespace {

constexpr int64_t kHugePage = int64_t(2) << 20;

// Below this malloc's memory is as warm as a block would be.
constexpr int64_t kSmallestBlock = int64_t(1) << 20;

// From here on malloc gives memory back at once. What is smaller it keeps in part, and so the pages
// of smaller blocks are spared MADV_FREE, up to a sum that is no burden; it costs them as much as
// clearing them does.
constexpr int64_t kMallocMapsFrom = int64_t(32) << 20;
constexpr int64_t kMostHeldBack = int64_t(64) << 20;

struct Block {
  void* data;
  int64_t bytes;  // a whole number of pages
  bool is_zero;   // as mapped, never handed out
  bool held_back;
};

int64_t whole_pages(int64_t bytes) {
  static const int64_t page = sysconf(_SC_PAGESIZE);
  TORCH_CHECK_WITH(OutOfMemoryError,
                   bytes <= std::numeric_limits<int64_t>::max() - kHugePage - page,
                   "embed_ext: could not map ", bytes, " bytes of memory");
  return (bytes + page - 1) / page * page;
}

// `bytes` fresh from the system, beginning with a huge page if there is room for one; null if the
// system has none to give.
void* map_memory(int64_t bytes) {
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
  return data;
}

void report_to_profiler(const Block& block, int64_t bytes) {
  c10::reportMemoryUsageToProfiler(block.data, bytes, 0, 0, c10::Device(c10::kCPU));
}

// What waits and what is in use are together never more than what was lately in use at once.
// Lately: in as many calls as several training steps make, however many tables they have.
class Pool {
 public:
  // A block that its taker has to himself until he gives its `data` back.
  Block take(int64_t bytes) {
    bytes = whole_pages(bytes);
    std::list<Block> taken = take_waiting(bytes);
    if (taken.empty()) {
      taken.push_back({nullptr, bytes, /*is_zero=*/true, /*held_back=*/false});
      void*& data = taken.front().data;
      data = map_memory(bytes);
      if (data == nullptr && drop() > 0) {
        data = map_memory(bytes);
      }
      TORCH_CHECK_WITH(OutOfMemoryError, data != nullptr, "embed_ext: could not map ", bytes,
                       " bytes of memory: ", std::strerror(errno));
    }
    const Block block = taken.front();
    std::list<Block> too_many;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      where_[block.data] = taken.begin();  // the last thing that can fail
      in_use_.splice(in_use_.end(), taken);
      bytes_in_use_ += block.bytes;
      most_lately_ = std::max(most_lately_, bytes_in_use_);
      most_in_use_ = std::max(most_in_use_, bytes_in_use_);
      if (--takes_until_later_ <= 0) {
        most_in_use_ = std::exchange(most_lately_, bytes_in_use_);
        takes_until_later_ = 64 + 4 * static_cast<int64_t>(where_.size());
      }
      while (!waiting_.empty() && bytes_in_use_ + bytes_waiting_ > most_in_use_) {
        too_many.splice(too_many.end(), waiting_, leave_waiting(waiting_.begin()));
      }
    }
    unmap(too_many);
    return block;
  }

  // Returns the block that it was.
  Block give_back(void* data) noexcept {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto place = where_.find(data)->second;
    Block& block = *place;
    block.is_zero = false;
    block.held_back =
        block.bytes < kMallocMapsFrom && bytes_held_back_ + block.bytes <= kMostHeldBack;
#if defined(MADV_FREE)
    if (!block.held_back) {  // its pages are the system's as soon as it needs some
      madvise(block.data, static_cast<size_t>(block.bytes), MADV_FREE);
    }
#endif
    bytes_in_use_ -= block.bytes;
    bytes_waiting_ += block.bytes;
    bytes_held_back_ += block.held_back ? block.bytes : 0;
    waiting_.splice(waiting_.end(), in_use_, place);
    return block;
  }

  int64_t drop() {
    std::list<Block> dropped;
    int64_t bytes = 0;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      bytes = bytes_waiting_;
      while (!waiting_.empty()) {
        dropped.splice(dropped.end(), waiting_, leave_waiting(waiting_.begin()));
      }
      most_in_use_ = most_lately_ = bytes_in_use_;
    }
    unmap(dropped);
    return bytes;
  }

  int64_t bytes_waiting() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return bytes_waiting_;
  }

  std::mutex& mutex() { return mutex_; }

 private:
  using Place = std::list<Block>::iterator;

  // The smallest that is large enough and wastes no more than a quarter, the latest of these; or
  // none.
  std::list<Block> take_waiting(int64_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    auto best = waiting_.end();
    for (auto it = waiting_.begin(); it != waiting_.end(); ++it) {
      if (it->bytes >= bytes && it->bytes - bytes <= bytes / 4 &&
          (best == waiting_.end() || it->bytes <= best->bytes)) {
        best = it;
      }
    }
    std::list<Block> taken;
    if (best != waiting_.end()) {
      taken.splice(taken.end(), waiting_, leave_waiting(best));
    }
    return taken;
  }

  Place leave_waiting(Place place) {
    bytes_waiting_ -= place->bytes;
    bytes_held_back_ -= place->held_back ? place->bytes : 0;
    where_.erase(place->data);
    return place;
  }

  static void unmap(const std::list<Block>& blocks) {
    for (const Block& block : blocks) {
      munmap(block.data, static_cast<size_t>(block.bytes));
    }
  }

  std::mutex mutex_;
  std::list<Block> in_use_, waiting_;  // the one that has waited longest first
  std::unordered_map<void*, Place> where_;
  int64_t bytes_in_use_ = 0, bytes_waiting_ = 0;
  int64_t bytes_held_back_ = 0;  // of those that wait
  int64_t most_in_use_ = 0, most_lately_ = 0;
  int64_t takes_until_later_ = 64;
};

// Lives as long as the process: tensors may outlive every static object. A process that forks while
// another of its threads is in here must not leave a locked door to its child.
Pool& pool() {
  static auto* const pool = [] {
    static auto* const made = new Pool();
    pthread_atfork([] { made->mutex().lock(); }, [] { made->mutex().unlock(); },
                   [] { made->mutex().unlock(); });
    return made;
  }();
  return *pool;
}

void give_back(void* data) {
  const Block block = pool().give_back(data);
  report_to_profiler(block, -block.bytes);
}

// The data is its own context, which makes it a simple pointer to whoever wants to copy on write.
c10::DataPtr data_of(const Block& block) {
  report_to_profiler(block, block.bytes);
  return {block.data, block.data, &give_back, c10::Device(c10::kCPU)};
}

// A real allocator, not a borrowed pointer, so that the storage can be resized like any other.
class RecyclingAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes == 0) {
      return {nullptr, c10::Device(c10::kCPU)};
    }
    return data_of(pool().take(
        static_cast<int64_t>(std::min<size_t>(bytes, std::numeric_limits<int64_t>::max()))));
  }

  void copy_data(void* dest, const void* src, size_t bytes) const override {
    default_copy_data(dest, src, bytes);
  }
};

RecyclingAllocator* allocator() {
  static auto* const allocator = new RecyclingAllocator();
  return allocator;
}

at::Tensor tensor_in(const Block& block, int64_t bytes, at::IntArrayRef sizes,
                     const at::TensorOptions& options) {
  auto storage = c10::make_intrusive<c10::StorageImpl>(
      c10::StorageImpl::use_byte_size_t(), bytes, data_of(block), allocator(), /*resizable=*/true);
  auto out = at::detail::make_tensor<c10::TensorImpl>(
      std::move(storage), c10::DispatchKeySet(c10::DispatchKey::CPU), options.dtype());
  out.unsafeGetTensorImpl()->set_sizes_contiguous(sizes);
  return out;
}

int64_t bytes_of(at::IntArrayRef sizes, const at::TensorOptions& options) {
  // Raises if they are more than there are numbers for.
  const auto bytes = at::detail::computeStorageNbytesContiguous(sizes, options.dtype().itemsize());
  return static_cast<int64_t>(std::min<size_t>(bytes, std::numeric_limits<int64_t>::max()));
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
  const Block block = pool().take(bytes);
  at::Tensor out = tensor_in(block, bytes, sizes, options);
  if (!block.is_zero) {
    fill_with_zero(out.mutable_data_ptr(), bytes);
  }
  return out;
}

at::Tensor empty_output(at::IntArrayRef sizes, const at::TensorOptions& options) {
  const int64_t bytes = bytes_of(sizes, options);
  return bytes < kMallocMapsFrom ? at::detail::empty_cpu(sizes, options)
                                 : tensor_in(pool().take(bytes), bytes, sizes, options);
}

void fill_with_zero(void* data, int64_t bytes) {
  constexpr int64_t kGrain = (int64_t(1) << 18) / kCacheLine;
  const bool streamed = worth_streaming_zeros(data, bytes);
  auto* const begin = static_cast<char*>(data);
  const int64_t lines = bytes / kCacheLine;
  at::parallel_for(0, lines, kGrain, [&](int64_t first, int64_t last) {
    const int64_t row = 0;
    clear_rows(ClearTask{begin + first * kCacheLine, &row, /*count=*/1, (last - first) * kCacheLine,
                         streamed});
  });
  const auto rest = static_cast<size_t>(bytes - lines * kCacheLine);
  if (rest > 0) {  // memory of no bytes may be null
    std::memset(begin + lines * kCacheLine, 0, rest);
  }
}

int64_t recycled_memory_bytes() { return pool().bytes_waiting(); }
int64_t drop_recycled_memory() { return pool().drop(); }

}  // namespace embed_ext::cpu
