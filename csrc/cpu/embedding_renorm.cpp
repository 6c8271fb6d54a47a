// max_norm on the CPU: shrinks, in place, each row that `indices` names and whose norm is too long.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <cmath>
#include <complex>

#include "../checks.h"
#include "group_by_row.h"
#include "indices.h"

namespace embed_ext::cpu {
namespace {

constexpr const char* kOp = "embedding_renorm_";

// Keeps the scale finite for a norm of zero; nn.Embedding's value.
constexpr double kEpsilon = 1e-7;

inline double magnitude(double value) { return std::abs(value); }
template <class T>
double magnitude(c10::complex<T> value) {
  return std::hypot(static_cast<double>(value.real()), static_cast<double>(value.imag()));
}

template <class T>
double row_norm(const T* row, int64_t width, int64_t stride, double p) {
  const auto at_column = [&](int64_t j) { return magnitude(row[j * stride]); };
  double sum = 0;
  if (p == 2) {
    for (int64_t j = 0; j < width; ++j) {
      sum += at_column(j) * at_column(j);
    }
    return std::sqrt(sum);
  }
  if (std::isinf(p)) {
    double extreme = width > 0 ? at_column(0) : 0;
    for (int64_t j = 1; j < width; ++j) {
      const double value = at_column(j);
      const bool replaces = p > 0 ? value > extreme : value < extreme;
      extreme = replaces || std::isnan(value) ? value : extreme;
    }
    return extreme;
  }
  if (p == 0) {
    for (int64_t j = 0; j < width; ++j) {
      sum += at_column(j) != 0;
    }
    return sum;
  }
  for (int64_t j = 0; j < width; ++j) {
    sum += p == 1 ? at_column(j) : std::pow(at_column(j), p);
  }
  return p == 1 ? sum : std::pow(sum, 1 / p);
}

template <class T>
void shrink_row(T* row, int64_t width, int64_t stride, double max_norm, double p) {
  const double norm = row_norm(row, width, stride, p);
  if (!(norm > max_norm)) {
    return;
  }
  const double scale = max_norm / (norm + kEpsilon);
  using Factor = std::conditional_t<std::is_same_v<T, double>, double, float>;
  for (int64_t j = 0; j < width; ++j) {
    if constexpr (c10::is_complex<T>::value) {
      row[j * stride] *= static_cast<typename T::value_type>(scale);
    } else {
      row[j * stride] =
          static_cast<T>(static_cast<Factor>(row[j * stride]) * static_cast<Factor>(scale));
    }
  }
}

// weight [V, D] any strides, index [N] in range. Each named row is scaled once, however often it
// is named, since a second pass over an already shrunk row could shrink it again by rounding.
template <class T, class Index>
void renorm_rows(const at::Tensor& weight, const Index* index, int64_t count, double max_norm,
                 double norm_type) {
  T* table = weight.mutable_data_ptr<T>();
  const int64_t width = weight.size(1);
  const RowGroups<WideToken> groups(index, count, weight.size(0), /*padding_idx=*/-1);
  const int64_t grain = std::max<int64_t>(1, (1 << 13) / (width + 1));
  at::parallel_for(0, groups.size(), grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      shrink_row(table + groups.row(i) * weight.stride(0), width, weight.stride(1), max_norm,
                 norm_type);
    }
  });
}

template <class Index>
void dispatch_dtype(const at::Tensor& weight, const Index* index, int64_t count, double max_norm,
                    double norm_type) {
  switch (weight.scalar_type()) {
    case at::kDouble:
      return renorm_rows<double>(weight, index, count, max_norm, norm_type);
    case at::kBFloat16:
      return renorm_rows<c10::BFloat16>(weight, index, count, max_norm, norm_type);
    case at::kHalf:
      return renorm_rows<c10::Half>(weight, index, count, max_norm, norm_type);
    case at::kComplexFloat:
      return renorm_rows<c10::complex<float>>(weight, index, count, max_norm, norm_type);
    case at::kComplexDouble:
      return renorm_rows<c10::complex<double>>(weight, index, count, max_norm, norm_type);
    default:
      return renorm_rows<float>(weight, index, count, max_norm, norm_type);
  }
}

// weight [V, D], indices [...]
void embedding_renorm_(const at::Tensor& weight, const at::Tensor& indices, double max_norm,
                       double norm_type) {
  check_renorm(kOp, weight, indices, max_norm, norm_type);
  const auto index_tensor = kernel_indices(indices);
  with_index_pointer(index_tensor, [&](const auto* index) {
    check_index_range(kOp, index, indices.numel(), indices.sizes(), weight.size(0));
    dispatch_dtype(weight, index, indices.numel(), max_norm, norm_type);
  });
}

}  // namespace
}  // namespace embed_ext::cpu

TORCH_LIBRARY_IMPL(embed_ext, CPU, m) {
  m.impl("embedding_renorm_", TORCH_FN(embed_ext::cpu::embedding_renorm_));
}
