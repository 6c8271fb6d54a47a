#include "checks.h"

#include <ATen/MemoryOverlap.h>
#include <c10/util/Exception.h>

#include <cmath>
#include <sstream>

namespace embed_ext {
namespace {

void check_indices(const char* op, const at::Tensor& indices) {
  TORCH_CHECK(is_index_type(indices.scalar_type()), op,
              ": expected indices of dtype int64, int32, int16, int8, uint8, uint16 or uint32, but "
              "got ",
              indices.scalar_type());
}

void check_same_device(const char* op, const char* name, const at::Tensor& tensor,
                       const at::Tensor& indices) {
  TORCH_CHECK(tensor.device() == indices.device(), op, ": expected ", name,
              " and indices to be on the same device, but ", name, " is on ", tensor.device(),
              " and indices is on ", indices.device());
}

bool has_gradient(at::ScalarType type) {
  switch (type) {
    case at::kFloat:
    case at::kDouble:
    case at::kHalf:
    case at::kBFloat16:
    case at::kComplexFloat:
    case at::kComplexDouble:
      return true;
    default:
      return false;
  }
}

// [2, 5] for flat position 11 of shape (3, 3 + ...), as a reader would index the tensor.
std::string coordinates(int64_t position, at::IntArrayRef sizes) {
  std::vector<int64_t> at_dim(sizes.size());
  for (auto dim = static_cast<int64_t>(sizes.size()) - 1; dim >= 0; --dim) {
    at_dim[dim] = position % sizes[dim];
    position /= sizes[dim];
  }
  std::ostringstream out;
  out << at::IntArrayRef(at_dim);
  return out.str();
}

}  // namespace

void check_own_memory(const char* op, const char* name, const at::Tensor& tensor) {
  TORCH_CHECK(at::has_internal_overlap(tensor) != at::MemOverlap::Yes, op, ": expected a ", name,
              " whose elements each have a memory location of their own, since it is written in "
              "place, but its strides are ",
              tensor.strides(), "; clone() it first");
}

bool share_memory(const at::Tensor& a, const at::Tensor& b) {
  const auto known = [](const at::Tensor& tensor) {  // a compiler's stand-ins have no memory yet
    return !tensor.is_meta() && !tensor.unsafeGetTensorImpl()->has_symbolic_sizes_strides();
  };
  if (!known(a) || !known(b) || a.numel() == 0 || b.numel() == 0) {
    return false;
  }
  const auto begin = [](const at::Tensor& tensor) {
    return reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
  };
  const auto end = [&](const at::Tensor& tensor) {
    int64_t last = 0;
    for (int64_t dim = 0; dim < tensor.dim(); ++dim) {
      last += (tensor.size(dim) - 1) * tensor.stride(dim);
    }
    return begin(tensor) + (last + 1) * tensor.element_size();
  };
  return begin(a) < end(b) && begin(b) < end(a);
}

bool is_index_type(at::ScalarType type) {
  switch (type) {
    case at::kLong:
    case at::kInt:
    case at::kShort:
    case at::kChar:
    case at::kByte:
    case at::kUInt16:
    case at::kUInt32:
      return true;
    default:
      return false;
  }
}

void check_lookup(const char* op, const at::Tensor& weight, const at::Tensor& indices) {
  TORCH_CHECK(weight.dim() == 2, op, ": 'weight' must be 2-D, but it is ", weight.dim(), "-D");
  check_indices(op, indices);
  check_same_device(op, "weight", weight, indices);
}

void check_grad(const char* op, const at::Tensor& grad_output, const at::Tensor& indices,
                const c10::SymInt& num_weights) {
  TORCH_CHECK(has_gradient(grad_output.scalar_type()), op,
              ": expected grad_output of a floating or complex dtype (float32, float64, bfloat16, "
              "float16, complex64, complex128), but got ",
              grad_output.scalar_type());
  check_indices(op, indices);
  check_same_device(op, "grad_output", grad_output, indices);
  const auto grad_sizes = grad_output.sym_sizes();
  const auto index_sizes = indices.sym_sizes();
  const auto rule = [&] {
    std::ostringstream out;
    out << op
        << ": expected grad_output of shape indices.shape + (embedding_dim,), but grad_output is "
        << grad_sizes << " and indices is " << index_sizes;
    return out.str();
  };
  TORCH_CHECK(grad_sizes.size() == index_sizes.size() + 1, rule());
  for (size_t dim = 0; dim < index_sizes.size(); ++dim) {
    TORCH_SYM_CHECK(grad_sizes[dim].sym_eq(index_sizes[dim]), rule());
  }
  TORCH_SYM_CHECK(num_weights.sym_ge(0), op, ": expected num_weights >= 0, but got ", num_weights);
}

void check_grad_add(const char* op, const at::Tensor& grad_weight, const at::Tensor& grad_output,
                    const at::Tensor& indices) {
  TORCH_CHECK(grad_weight.dim() == 2, op, ": 'grad_weight' must be 2-D, but it is ",
              grad_weight.dim(), "-D");
  check_grad(op, grad_output, indices, grad_weight.sym_size(0));
  check_same_device(op, "grad_weight", grad_weight, indices);
  const auto type = grad_output.scalar_type();
  const bool widened =
      grad_weight.scalar_type() == at::kFloat && (type == at::kBFloat16 || type == at::kHalf);
  TORCH_CHECK(grad_weight.scalar_type() == type || widened, op,
              ": expected grad_weight of grad_output's dtype, ", type,
              ", or of float32 for one of bfloat16 or float16, but got ",
              grad_weight.scalar_type());
  TORCH_SYM_CHECK(grad_weight.sym_size(1).sym_eq(grad_output.sym_size(-1)), op,
                  ": expected as many columns in grad_weight as in grad_output, ",
                  grad_output.sym_size(-1), ", but got ", grad_weight.sym_size(1));
  TORCH_CHECK(grad_weight.sym_stride(1) == 1 || grad_weight.sym_size(1) == 1, op,
              ": expected grad_weight to hold a row's elements side by side, but its strides are ",
              grad_weight.sym_strides());
  check_own_memory(op, "grad_weight", grad_weight);
  TORCH_SYM_CHECK(grad_weight.sym_size(0).sym_le(1).sym_or(
                      grad_weight.sym_stride(0).sym_ge(grad_weight.sym_size(1))),
                  op, ": expected grad_weight whose rows do not overlap, but its strides are ",
                  grad_weight.sym_strides());
  for (const auto* other : {&grad_output, &indices}) {
    TORCH_CHECK(
        !share_memory(grad_weight, *other), op, ": expected grad_weight to share no memory with ",
        other == &indices ? "indices" : "grad_output", " ", other->sym_sizes(), ", but it does");
  }
}

void check_renorm(const char* op, const at::Tensor& weight, const at::Tensor& indices,
                  double max_norm, double norm_type) {
  check_lookup(op, weight, indices);
  TORCH_CHECK(has_gradient(weight.scalar_type()), op,
              ": expected weight of a floating or complex dtype, but got ", weight.scalar_type());
  TORCH_CHECK(!std::isnan(max_norm), op, ": expected max_norm to be a number, but got ", max_norm);
  TORCH_CHECK(!std::isnan(norm_type), op, ": expected norm_type to be a number, but got ",
              norm_type);
  check_own_memory(op, "weight", weight);
}

void raise_index_error(const char* op, int64_t index, int64_t position,
                       at::OptionalIntArrayRef indices_sizes, int64_t num_rows) {
  const auto where = indices_sizes.has_value() ? coordinates(position, *indices_sizes)
                                               : "[" + std::to_string(position) + "]";
  TORCH_CHECK_INDEX(false, op, ": index out of range: indices", where, " is ", index,
                    ", but weight has ", num_rows, " rows", num_rows > 0 ? " (0 to " : "",
                    num_rows > 0 ? std::to_string(num_rows - 1) + ")" : "");
}

}  // namespace embed_ext
