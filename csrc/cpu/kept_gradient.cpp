#include "kept_gradient.h"

#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <torch/csrc/autograd/variable.h>

#include <atomic>
#include <cstdlib>
#include <cstring>

#include "fresh_memory.h"
#include "row_kernels.h"

namespace embed_ext::cpu {
namespace {

constexpr int64_t kGrainBytes = int64_t(1) << 17;

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

// The first nonzero byte of [data, data + bytes), or bytes.
int64_t first_nonzero(const char* data, int64_t bytes) {
  constexpr int64_t kBlock = 4096;
  static const char zeros[kBlock] = {};
  int64_t at = 0;
  while (at < bytes && std::memcmp(data + at, zeros, std::min(kBlock, bytes - at)) == 0) {
    at += kBlock;
  }
  while (at < bytes && data[at] == 0) {
    ++at;
  }
  return std::min(at, bytes);
}

}  // namespace

bool KeptGradient::reusable(int64_t bytes, int64_t row_bytes) const {
  return storage_ && storage_.use_count() == 1 && storage_.data() != nullptr &&
         static_cast<int64_t>(storage_.nbytes()) == bytes && row_bytes_ == row_bytes;
}

void KeptGradient::clear() {
  auto* data = static_cast<char*>(storage_.mutable_data());
  const auto bytes = static_cast<int64_t>(storage_.nbytes());
  if (version_.current_version() != expected_version_) {
    at::parallel_for(0, bytes, kGrainBytes, [&](int64_t begin, int64_t end) {
      std::memset(data + begin, 0, end - begin);
    });
    return;
  }
  const auto count = static_cast<int64_t>(rows_.size());
  const bool streamed = worth_streaming(data, bytes, row_bytes_);
  at::parallel_for(0, count, kGrainBytes / row_bytes_ + 1, [&](int64_t begin, int64_t end) {
    clear_rows(ClearTask{data, rows_.data() + begin, end - begin, row_bytes_, streamed});
  });
}

void KeptGradient::verify() {
  const auto bytes = static_cast<int64_t>(storage_.nbytes());
  const int64_t at = first_nonzero(static_cast<const char*>(storage_.data()), bytes);
  if (at < bytes) {
    ++expected_version_;  // reported once: all of it is cleared next time
    TORCH_CHECK(false, "keep_grad_buffer: row ", at / row_bytes_,
                " of the kept gradient was written by something that neither changed its version "
                "nor still holds it, such as .data or a collective; use keep_grad_buffer=False, or "
                "torch.autograd.graph.increment_version on .grad after such a write");
  }
}

at::Tensor KeptGradient::zeros(int64_t num_rows, int64_t width, std::vector<int64_t>&& used_rows,
                               const at::TensorOptions& options) {
  // Let go of after the lock: memory that Python has seen takes the interpreter's lock to go, and
  // whoever has that one may be waiting for ours.
  c10::Storage old;
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto dtype = c10::typeMetaToScalarType(options.dtype());
  const int64_t row_bytes = width * static_cast<int64_t>(c10::elementSize(dtype));
  at::Tensor grad;
  if (reusable(num_rows * row_bytes, row_bytes)) {
    clear();
    if (verify_kept_gradients()) {
      verify();
    }
    grad = at::detail::make_tensor<c10::TensorImpl>(
        c10::Storage(storage_), c10::DispatchKeySet(c10::DispatchKey::CPU), options.dtype());
    grad.unsafeGetTensorImpl()->set_sizes_contiguous({num_rows, width});
  } else {
    // Sooner or later most pages are in use, and large ones are found faster.
    grad = zero_rows(num_rows, width, /*used_rows=*/num_rows, options);
    old = std::exchange(storage_, grad.storage());
  }
  version_ = torch::autograd::impl::version_counter(grad);
  expected_version_ = version_.current_version();
  rows_ = std::move(used_rows);
  row_bytes_ = row_bytes;
  return grad;
}

void KeptGradient::bump_version(const at::Tensor& grad, std::vector<int64_t>&& rows) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const bool handed_out = storage_ && grad.storage().is_alias_of(storage_) &&
                          grad.is_contiguous() && grad.const_data_ptr() == storage_.data() &&
                          grad.size(1) * static_cast<int64_t>(grad.element_size()) == row_bytes_ &&
                          version_.current_version() == expected_version_;
  torch::autograd::impl::bump_version(grad);
  // Beyond as many rows as the table has, clearing all of it is cheaper.
  if (handed_out && rows_.size() + rows.size() <= static_cast<size_t>(grad.size(0))) {
    rows_.insert(rows_.end(), rows.begin(), rows.end());
    expected_version_ = version_.current_version();
  }
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

}  // namespace embed_ext::cpu
