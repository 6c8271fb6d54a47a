#include "update_checks.h"

#include <ATen/MemoryOverlap.h>
#include <c10/util/Exception.h>

#include <utility>
#include <vector>

#include "checks.h"

namespace embed_ext {
namespace {

bool is_low_precision(at::ScalarType type) { return type == at::kBFloat16 || type == at::kHalf; }

void check_types(const char* op, const at::Tensor& weight, const at::Tensor& indices,
                 const at::Tensor& values) {
  const auto type = weight.scalar_type();
  TORCH_CHECK(type == at::kFloat || type == at::kDouble || is_low_precision(type), op,
              ": expected weight of dtype float32, float64, bfloat16 or float16, but got ", type);
  TORCH_CHECK(indices.scalar_type() == at::kLong, op, ": expected indices of dtype int64, but got ",
              indices.scalar_type());
  TORCH_CHECK(values.scalar_type() == type, op, ": expected values of weight's dtype, ", type,
              ", but got ", values.scalar_type());
}

void check_shapes(const char* op, const at::Tensor& weight, const at::Tensor& indices,
                  const at::Tensor& values) {
  TORCH_CHECK(weight.dim() == 2, op, ": 'weight' must be 2-D, but it is ", weight.dim(), "-D");
  TORCH_CHECK(indices.dim() == 1, op, ": 'indices' must be 1-D, but it is ", indices.dim(), "-D");
  TORCH_CHECK(values.dim() == 2, op, ": 'values' must be 2-D, but it is ", values.dim(), "-D");
  TORCH_SYM_CHECK(values.sym_size(0)
                      .sym_eq(indices.sym_size(0))
                      .sym_and(values.sym_size(1).sym_eq(weight.sym_size(1))),
                  op, ": expected values of shape (len(indices), embedding_dim), ",
                  indices.sym_size(0), " x ", weight.sym_size(1), ", but got ", values.sym_sizes());
}

void check_state(const char* op, const at::Tensor& weight, const UpdateState& state) {
  const auto& tensor = state.tensor;
  const auto type = weight.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  TORCH_CHECK(tensor.scalar_type() == type, op, ": expected ", state.name, " of dtype ", type,
              " beside a weight of ", weight.scalar_type(), ", but got ", tensor.scalar_type());
  const bool per_row = state.may_be_per_row && tensor.dim() == 1;
  TORCH_CHECK(per_row || tensor.dim() == 2, op, ": expected ", state.name,
              " to be 2-D, as weight is", state.may_be_per_row ? ", or 1-D" : "", ", but it is ",
              tensor.dim(), "-D");
  TORCH_SYM_CHECK(tensor.sym_size(0).sym_eq(weight.sym_size(0)), op, ": expected ", state.name,
                  " to have weight's ", weight.sym_size(0), " rows, but got ", tensor.sym_size(0));
  if (!per_row) {
    TORCH_SYM_CHECK(tensor.sym_size(1).sym_eq(weight.sym_size(1)), op, ": expected ", state.name,
                    " to have weight's ", weight.sym_size(1), " columns, but got ",
                    tensor.sym_size(1));
  }
}

}  // namespace

void check_update(const char* op, const at::Tensor& weight, const at::Tensor& indices,
                  const at::Tensor& values, std::initializer_list<UpdateState> states,
                  const std::optional<int64_t>& seed) {
  check_types(op, weight, indices, values);
  check_shapes(op, weight, indices, values);
  std::vector<std::pair<const char*, const at::Tensor*>> written = {{"weight", &weight}};
  for (const auto& state : states) {
    if (state.tensor.defined()) {
      check_state(op, weight, state);
      written.emplace_back(state.name, &state.tensor);
    }
  }
  auto all = written;
  all.emplace_back("indices", &indices);
  all.emplace_back("values", &values);
  for (const auto& [name, tensor] : all) {
    TORCH_CHECK(tensor->device() == weight.device(), op, ": expected ", name,
                " and weight to be on the same device, but ", name, " is on ", tensor->device(),
                " and weight is on ", weight.device());
  }
  for (size_t i = 0; i < written.size(); ++i) {
    check_own_memory(op, written[i].first, *written[i].second);
    for (size_t j = i + 1; j < all.size(); ++j) {
      TORCH_CHECK(!share_memory(*written[i].second, *all[j].second), op, ": expected ",
                  written[i].first, " to share no memory with ", all[j].first, ", but it does");
    }
  }
  TORCH_CHECK(!seed.has_value() || is_low_precision(weight.scalar_type()), op,
              ": a seed is for stochastic rounding to bfloat16 or float16, but weight is of ",
              weight.scalar_type());
}

void check_momentum(const char* op, const at::Tensor& buffer, double momentum) {
  TORCH_CHECK(buffer.defined() || momentum == 0, op,
              ": expected momentum 0 without a momentum_buffer, but got ", momentum);
}

void check_step(const char* op, int64_t step) {
  TORCH_CHECK(step >= 1, op, ": expected step >= 1, but got ", step);
}

void raise_not_ascending(const char* op, int64_t index, int64_t before, int64_t position) {
  TORCH_CHECK_INDEX(false, op, ": expected indices in strictly ascending order, but indices[",
                    position, "] is ", index, " and the one before it ", before,
                    "; coalesce() the gradient first");
}

}  // namespace embed_ext
