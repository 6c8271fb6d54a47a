#include "update.h"

#include "indices.h"

namespace embed_ext::cpu {

void check_ascending(const char* op, const at::Tensor& indices, int64_t num_rows) {
  constexpr int64_t kGrain = 1 << 16;
  const int64_t count = indices.numel(), stride = indices.stride(0);
  if (count == 0) {
    return;
  }
  const auto* data = indices.const_data_ptr<int64_t>();
  const auto index = [&](int64_t i) { return data[i * stride]; };
  BadIndex bad;
  at::parallel_for(1, count, kGrain, [&](int64_t begin, int64_t end) {
    bool any = false;  // no early exit, so that the loop vectorises
    for (int64_t i = begin; i < end; ++i) {
      any |= index(i) <= index(i - 1);
    }
    for (int64_t i = begin; any && i < end; ++i) {
      if (index(i) <= index(i - 1)) {
        return bad.report(i);
      }
    }
  });
  if (const auto position = bad.position()) {
    raise_not_ascending(op, index(*position), index(*position - 1), *position);
  }
  if (index(0) < 0) {
    raise_index_error(op, index(0), 0, indices.sizes(), num_rows);
  }
  if (index(count - 1) >= num_rows) {
    int64_t position = count - 1;
    while (position > 0 && index(position - 1) >= num_rows) {
      --position;
    }
    raise_index_error(op, index(position), position, indices.sizes(), num_rows);
  }
}

}  // namespace embed_ext::cpu
