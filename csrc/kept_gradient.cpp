#include "kept_gradient.h"

#include <ATen/EmptyTensor.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/csrc/autograd/variable.h>

#include <array>
#include <atomic>
#include <cstdlib>
#include <iterator>
#include <utility>

namespace embed_ext {
namespace {

// Gradients that are searched whole before samples are trusted.
constexpr int64_t kSearchedWhole = 4;

// Where a look at a few rows waits as long as one at all: one in so many is searched whole.
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

std::array<const KeptMemory*, c10::COMPILE_TIME_MAX_DEVICE_TYPES>& memories() {
  static std::array<const KeptMemory*, c10::COMPILE_TIME_MAX_DEVICE_TYPES> registered{};
  return registered;
}

const KeptMemory& memory_on(c10::Device device) {
  const auto* const memory = memories().at(static_cast<size_t>(device.type()));
  TORCH_CHECK(memory != nullptr, "keep_grad_buffer: this build of embed_ext keeps no memory on ",
              device, "; use keep_grad_buffer=False");
  return *memory;
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
  return storage_ && storage_.use_count() == 1 && storage_.data() != nullptr &&
         storage_.data() == data_ && row_bytes > 0 && storage_.device() == device &&
         static_cast<int64_t>(storage_.nbytes()) % row_bytes == 0 &&
         static_cast<int64_t>(storage_.nbytes()) / row_bytes == num_rows &&
         row_bytes_ == row_bytes && stream_ == current_stream(device);
}

at::Tensor KeptGradient::tensor_of_memory(int64_t num_rows, int64_t width,
                                          const at::TensorOptions& options) const {
  auto grad = at::detail::make_tensor<c10::TensorImpl>(
      c10::Storage(storage_), c10::DispatchKeySet(options.computeDispatchKey()), options.dtype());
  grad.unsafeGetTensorImpl()->set_sizes_contiguous({num_rows, width});
  return grad;
}

void KeptGradient::clear(const at::Tensor& grad) const {
  if (!trusted_ || !rows_are_known_ || version_.current_version() != expected_version_) {
    memory_on(grad.device()).clear_all(grad);
  } else {
    memory_on(grad.device()).clear_rows(grad, rows_);
  }
}

// grad [V, D], just cleared.
void KeptGradient::check_cleared(const at::Tensor& grad) {
  if (!trusted_ || !rows_are_known_ || version_.current_version() != expected_version_) {
    return;  // all of it was cleared
  }
  const auto& memory = memory_on(grad.device());
  const int64_t turn = reuses_++;
  int64_t row = -1;
  if (verify_kept_gradients() || turn < kSearchedWhole ||
      (memory.first_nonzero_row_of_sample == nullptr && turn % kSearchedOnDevice == 0)) {
    row = memory.first_nonzero_row(grad);
  } else if (memory.first_nonzero_row_of_sample != nullptr) {
    row = memory.first_nonzero_row_of_sample(grad, turn);
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
  memory.clear_all(grad);
  TORCH_WARN("keep_grad_buffer: row ", row, kFound,
             "from now on all of it is cleared before each use. keep_grad_buffer=False does the "
             "same without this warning");
}

at::Tensor KeptGradient::zeros(int64_t num_rows, int64_t width, UsedRows&& used_rows,
                               const at::TensorOptions& options) {
  // Let go of after the lock: where Python has seen the memory, code of Python's may run when it
  // goes, such as the callback of a weak reference, and that code may ask for something of ours.
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
    grad = memory_on(options.device()).zeros(num_rows, width, options);
    old = std::exchange(storage_, grad.storage());
  }
  version_ = torch::autograd::impl::version_counter(grad);
  expected_version_ = version_.current_version();
  data_ = storage_.data();
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
  const bool handed_out = ours && grad.is_contiguous() && grad.const_data_ptr() == data_ &&
                          grad.size(1) * static_cast<int64_t>(grad.element_size()) == row_bytes_ &&
                          stream_ == current_stream(grad.device()) &&
                          version_.current_version() == expected_version_;
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

bool register_kept_memory(c10::DeviceType type, const KeptMemory& memory) {
  memories().at(static_cast<size_t>(type)) = &memory;
  return true;
}

KeptGradientScope::KeptGradientScope(std::shared_ptr<KeptGradient> kept) {
  current() = std::move(kept);
}

KeptGradientScope::~KeptGradientScope() { current().reset(); }

std::shared_ptr<KeptGradient> KeptGradientScope::take() { return std::exchange(current(), {}); }

void set_verify_kept_gradients(bool on) { verify_flag() = on; }
bool verify_kept_gradients() { return verify_flag(); }

}  // namespace embed_ext
