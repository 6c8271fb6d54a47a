#include "kept_gradient.h"

#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/ops/zeros.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/csrc/autograd/variable.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <random>

#include "cpu/recycled_memory.h"
#include "cpu/row_kernels.h"

#include "cuda/dense_gradient.h"

namespace embed_ext {
namespace {

constexpr int64_t kGrainBytes = int64_t(1) << 17;

// Gradients that are searched whole before samples are trusted, and rows in a sample.
constexpr int64_t kSearchedWhole = 4;
constexpr int64_t kSampledRows = 64;

// On a GPU a look has to wait for it: there, one in so many is searched whole in place of samples.
constexpr int64_t kSearchedOnDevice = 64;

bool verify_from_environment() {
  const char* value = std::getenv("EMBED_EXT_VERIFY_KEPT_GRADIENTS");
  return value != nullptr && *value != '\0' && *value != '0';
}

std::atomic<bool>& verify_flag() {
  static std::atomic<bool> flag{verify_from_environment()};
  return flag;
}

std::shared_ptr<KeptGradient>& current() {
  static thread_local std::shared_ptr<KeptGradient> kept;
  return kept;
}

std::optional<c10::Stream> current_stream(c10::Device device) {
  if (device.is_cpu()) {
    return std::nullopt;
  }
  return c10::impl::VirtualGuardImpl(device.type()).getStream(device);
}

// The first row of [data, data + bytes) with a byte that is not zero, or -1.
int64_t first_nonzero_row(const char* data, int64_t bytes, int64_t row_bytes) {
  constexpr int64_t kBlock = 4096;
  static const char zeros[kBlock] = {};
  int64_t at = 0;
  while (at < bytes && std::memcmp(data + at, zeros, std::min(kBlock, bytes - at)) == 0) {
    at += kBlock;
  }
  while (at < bytes && data[at] == 0) {
    ++at;
  }
  return at < bytes ? at / row_bytes : -1;
}

int64_t row_bytes_of(const at::Tensor& grad) {
  return grad.size(1) * static_cast<int64_t>(grad.element_size());
}

int64_t first_nonzero_row(const at::Tensor& grad) {
  if (grad.is_cpu()) {
    const auto* data = static_cast<const char*>(grad.const_data_ptr());
    const int64_t row_bytes = row_bytes_of(grad);
    std::atomic<int64_t> first{grad.size(0)};
    at::parallel_for(0, grad.size(0), kGrainBytes / row_bytes + 1, [&](int64_t begin, int64_t end) {
      const int64_t row =
          first_nonzero_row(data + begin * row_bytes, (end - begin) * row_bytes, row_bytes);
      int64_t known = first;
      while (row >= 0 && begin + row < known && !first.compare_exchange_weak(known, begin + row)) {
      }
    });
    return first < grad.size(0) ? first.load() : -1;
  }
  const auto rows = grad.ne(0).any(1).nonzero();
  return rows.numel() > 0 ? rows.select(0, 0).item<int64_t>() : -1;
}

// As above, of some rows alone: one from each of kSampledRows stretches of the table, another one
// for each `turn`.
int64_t first_nonzero_row_of_sample(const at::Tensor& grad, int64_t turn) {
  const auto* data = static_cast<const char*>(grad.const_data_ptr());
  const int64_t row_bytes = row_bytes_of(grad);
  const int64_t stretch = (grad.size(0) + kSampledRows - 1) / kSampledRows;
  std::minstd_rand random(static_cast<uint32_t>(turn));
  for (int64_t begin = 0; begin < grad.size(0); begin += stretch) {
    const int64_t row = begin + static_cast<int64_t>(random()) % stretch;
    if (row < grad.size(0) &&
        first_nonzero_row(data + row * row_bytes, row_bytes, row_bytes) == 0) {
      return row;
    }
  }
  return -1;
}

void clear_rows_on_cpu(const at::Tensor& grad, const std::vector<int64_t>& rows) {
  auto* data = static_cast<char*>(grad.mutable_data_ptr());
  const auto bytes = static_cast<int64_t>(grad.nbytes());
  const int64_t row_bytes = row_bytes_of(grad);
  const bool streamed = cpu::worth_streaming(data, bytes, row_bytes);
  const auto count = static_cast<int64_t>(rows.size());
  at::parallel_for(0, count, kGrainBytes / row_bytes + 1, [&](int64_t begin, int64_t end) {
    cpu::clear_rows(cpu::ClearTask{data, rows.data() + begin, end - begin, row_bytes, streamed});
  });
}

void clear_whole(const at::Tensor& grad) {
  if (!grad.is_cpu()) {
    grad.zero_();
    return;
  }
  cpu::fill_with_zero(grad.mutable_data_ptr(), static_cast<int64_t>(grad.nbytes()));
}

}  // namespace

int64_t UsedRows::count() const {
  auto count = static_cast<int64_t>(on_host.size());
  for (const auto& rows : on_device) {
    count += rows.numel();
  }
  return count;
}

void UsedRows::append(UsedRows&& more) {
  on_host.insert(on_host.end(), more.on_host.begin(), more.on_host.end());
  std::move(more.on_device.begin(), more.on_device.end(), std::back_inserter(on_device));
}

bool KeptGradient::reusable(int64_t num_rows, int64_t row_bytes, c10::Device device) const {
  return storage_ && storage_.use_count() == 1 && storage_.data() != nullptr && row_bytes > 0 &&
         storage_.device() == device && static_cast<int64_t>(storage_.nbytes()) % row_bytes == 0 &&
         static_cast<int64_t>(storage_.nbytes()) / row_bytes == num_rows &&
         row_bytes_ == row_bytes && stream_ == current_stream(device);
}

at::Tensor KeptGradient::tensor_of_memory(int64_t num_rows, int64_t width,
                                          const at::TensorOptions& options) const {
  const auto key = storage_.device().is_cpu() ? c10::DispatchKey::CPU : c10::DispatchKey::CUDA;
  auto grad = at::detail::make_tensor<c10::TensorImpl>(c10::Storage(storage_),
                                                       c10::DispatchKeySet(key), options.dtype());
  grad.unsafeGetTensorImpl()->set_sizes_contiguous({num_rows, width});
  return grad;
}

void KeptGradient::clear(const at::Tensor& grad) const {
  if (!trusted_ || !rows_are_known_ || version_.current_version() != expected_version_) {
    return clear_whole(grad);
  }
  clear_rows_on_cpu(grad, rows_.on_host);
  for (const auto& rows : rows_.on_device) {
    cuda::clear_rows(grad, rows);
  }
}

// grad [V, D], just cleared.
void KeptGradient::check_cleared(const at::Tensor& grad) {
  if (!trusted_ || !rows_are_known_ || version_.current_version() != expected_version_) {
    return;  // all of it was cleared
  }
  const int64_t turn = reuses_++;
  int64_t row = -1;
  if (verify_kept_gradients() || turn < kSearchedWhole ||
      (!grad.is_cpu() && turn % kSearchedOnDevice == 0)) {
    row = first_nonzero_row(grad);
  } else if (grad.is_cpu()) {
    row = first_nonzero_row_of_sample(grad, turn);
  }
  if (row < 0) {
    return;
  }
  constexpr const char* kFound =
      " of the kept gradient was written by something that neither changed its version nor still "
      "holds it, such as an optimizer that writes through weight.grad.data, or a collective; ";
  if (verify_kept_gradients()) {
    rows_are_known_ = false;  // reported once: all of it is cleared next time
    TORCH_CHECK(false, "keep_grad_buffer: row ", row, kFound,
                "use keep_grad_buffer=False, or torch.autograd.graph.increment_version on .grad "
                "after such a write");
  }
  trusted_ = false;
  clear_whole(grad);
  TORCH_WARN("keep_grad_buffer: row ", row, kFound,
             "from now on all of it is cleared before each use. keep_grad_buffer=False does the "
             "same without this warning");
}

at::Tensor KeptGradient::zeros(int64_t num_rows, int64_t width, UsedRows&& used_rows,
                               const at::TensorOptions& options) {
  // Let go of after the lock: memory that Python has seen takes the interpreter's lock to go, and
  // whoever has that one may be waiting for ours.
  c10::Storage old;
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto dtype = c10::typeMetaToScalarType(options.dtype());
  const int64_t row_bytes = width * static_cast<int64_t>(c10::elementSize(dtype));
  at::Tensor grad;
  if (reusable(num_rows, row_bytes, options.device())) {
    grad = tensor_of_memory(num_rows, width, options);
    clear(grad);
    check_cleared(grad);
  } else {
    grad = options.device().is_cpu() ? cpu::zero_rows(num_rows, width, options)
                                     : at::zeros({num_rows, width}, options);
    old = std::exchange(storage_, grad.storage());
  }
  version_ = torch::autograd::impl::version_counter(grad);
  expected_version_ = version_.current_version();
  stream_ = current_stream(options.device());
  rows_ = {};
  rows_are_known_ = true;
  row_bytes_ = row_bytes;
  remember(std::move(used_rows), num_rows);
  return grad;
}

void KeptGradient::bump_version(const at::Tensor& grad, UsedRows&& rows) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const bool ours = storage_ && grad.storage().is_alias_of(storage_);
  const bool handed_out =
      ours && grad.is_contiguous() && grad.const_data_ptr() == storage_.data() &&
      grad.size(1) * static_cast<int64_t>(grad.element_size()) == row_bytes_ &&
      stream_ == current_stream(grad.device()) && version_.current_version() == expected_version_;
  torch::autograd::impl::bump_version(grad);
  if (handed_out) {
    remember(std::move(rows), grad.size(0));
    expected_version_ = version_.current_version();
  } else if (ours) {  // `grad` may have a version of its own, as .data has
    rows_are_known_ = false;
  }
}

void KeptGradient::remember(UsedRows&& rows, int64_t num_rows) {
  rows_are_known_ = rows_are_known_ && rows_.count() + rows.count() <= num_rows;
  if (rows_are_known_) {
    rows_.append(std::move(rows));
  } else {  // clearing all of it is cheaper
    rows_ = {};
  }
}

bool KeptGradient::keeps(const at::Tensor& grad) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return storage_ && grad.storage().is_alias_of(storage_);
}

void KeptGradient::drop() {
  c10::Storage old;
  const std::lock_guard<std::mutex> lock(mutex_);
  old = std::exchange(storage_, c10::Storage());
  rows_ = {};
}

int64_t KeptGradient::bytes() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return storage_ ? static_cast<int64_t>(storage_.nbytes()) : 0;
}

KeptGradientScope::KeptGradientScope(std::shared_ptr<KeptGradient> kept) {
  current() = std::move(kept);
}

KeptGradientScope::~KeptGradientScope() { current().reset(); }

std::shared_ptr<KeptGradient> KeptGradientScope::take() { return std::exchange(current(), {}); }

void set_verify_kept_gradients(bool on) { verify_flag() = on; }
bool verify_kept_gradients() { return verify_flag(); }

}  // namespace embed_ext
