// The memory of a table's dense gradient, kept from one backward to the next.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Stream.h>

#include <memory>
#include <mutex>
#include <optional>
#include <vector>

namespace embed_ext {

// Which rows of a gradient were written. On the CPU each row once; on CUDA, where nobody waits for
// what a kernel finds out, the indices of each backward as they came, bad ones and all.
struct UsedRows {
  std::vector<int64_t> on_host;
  std::vector<at::Tensor> on_device;  // each [N] int64, written to by nobody else

  int64_t count() const;
  void append(UsedRows&& more);
};

// What a device does for the memory that is kept on it. grad [V, D] is contiguous.
struct KeptMemory {
  at::Tensor (*zeros)(int64_t num_rows, int64_t width, const at::TensorOptions& options);
  void (*clear_all)(const at::Tensor& grad);
  void (*clear_rows)(const at::Tensor& grad, const UsedRows& rows);
  // The first row with a byte that is not zero, or -1.
  int64_t (*first_nonzero_row)(const at::Tensor& grad);
  // As above, of a sample of rows, another one for each `turn`; null where it would cost as much.
  int64_t (*first_nonzero_row_of_sample)(const at::Tensor& grad, int64_t turn);
};

// Each device brings its own when the library is loaded; `memory` lives as long as the process.
bool register_kept_memory(c10::DeviceType type, const KeptMemory& memory);

// Keeps the memory of the last gradient that it handed out, and the rows that were written in it:
// the next gradient then clears these rows and not a whole table.
//
// That is right only if nobody else wrote anything else there. Before memory is used again,
//   - nobody else may hold it (the count of the storage's owners): else new memory is taken;
//   - its storage may not have been given other memory, as by resize_: else new memory is taken;
//   - no in-place operation may have changed it (the version counter): else all of it is cleared;
//   - on CUDA, the current stream must be the one it was handed out on: else new memory is taken.
// What goes past these, such as a write through .data that was let go of again, is searched for:
// the first gradients whole, as an optimizer that does such a thing does it at every step, and a
// sample of rows of each that follows. If anything is found, all is cleared then and ever after,
// with one warning. With set_verify(true) each gradient is searched whole, and a find is an error.
class KeptGradient {
 public:
  // A [num_rows, width] tensor that is zero in every row, of which `used_rows` are about to be
  // written.
  at::Tensor zeros(int64_t num_rows, int64_t width, UsedRows&& used_rows,
                   const at::TensorOptions& options);

  // Bumps the version of `grad`, of which `rows` were written, and keeps track of them if it is the
  // gradient handed out last.
  void bump_version(const at::Tensor& grad, UsedRows&& rows);

  bool keeps(const at::Tensor& grad) const;  // whether its memory is the one that is kept
  void drop();
  int64_t bytes() const;  // of the memory kept

 private:
  bool reusable(int64_t num_rows, int64_t row_bytes, c10::Device device) const;
  at::Tensor tensor_of_memory(int64_t num_rows, int64_t width,
                              const at::TensorOptions& options) const;
  void clear(const at::Tensor& grad) const;
  void check_cleared(const at::Tensor& grad);
  void remember(UsedRows&& rows, int64_t num_rows);

  mutable std::mutex mutex_;
  c10::Storage storage_;
  c10::VariableVersion version_;  // shared with the gradient handed out, without owning it
  uint32_t expected_version_ = 0;
  const void* data_ = nullptr;         // where the gradient handed out was
  std::optional<c10::Stream> stream_;  // on CUDA
  bool rows_are_known_ = false;        // if not, all of the memory is cleared
  UsedRows rows_;
  int64_t row_bytes_ = 0;
  bool trusted_ = true;  // nothing has been found so far
  int64_t reuses_ = 0;   // of memory that was cleared row by row
};

// The one that the lookup now being recorded is to use, if any. It is handed over beside the
// operator's arguments, because it is no part of what the operator computes.
class KeptGradientScope {
 public:
  explicit KeptGradientScope(std::shared_ptr<KeptGradient> kept);
  ~KeptGradientScope();
  KeptGradientScope(const KeptGradientScope&) = delete;
  KeptGradientScope& operator=(const KeptGradientScope&) = delete;

  static std::shared_ptr<KeptGradient> take();
};

void set_verify_kept_gradients(bool on);
bool verify_kept_gradients();

}  // namespace embed_ext
