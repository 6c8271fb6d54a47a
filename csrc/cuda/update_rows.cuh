// An optimizer's update of the rows that a gradient names: one kernel, for each method and type.
//
// A team of lanes has a row, each lane a vector of it, and of rows longer than a block a vector
// more each turn. What a vector's elements become depends on the row beyond it by one number at
// most, that of a row-wise state, for which the team adds up the squared gradient first.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>
#include <optional>

#include "../update_arguments.h"
#include "dispatch.cuh"
#include "index_check.cuh"
#include "launch_math.h"
#include "update_steps.cuh"
#include "vector.cuh"

namespace embed_ext::cuda {

// What a lane has of a row: neighbouring elements, their gradient, and their states.
template <class T, int kWidth, class Method>
struct RowPiece {
  using Acc = typename Method::Acc;

  Packed<T, kWidth> weight;
  Packed<T, kWidth> value;
  Packed<Acc, kWidth> state[Method::kStates + 1];  // the last one is not used
};

// Entry `entry` of a gradient, which is for row `row`. Vectors are of kWidth elements; where that
// is one, the elements of a row may be apart.
template <class T, int kWidth, class Method>
struct RowUpdate {
  using Acc = typename Method::Acc;
  using Piece = RowPiece<T, kWidth, Method>;

  const UpdateTask& task;
  const Method& method;
  int64_t entry;
  int64_t row;

  template <class U>
  static __device__ U* place(const Rows& rows, int64_t row, int64_t column) {
    const int64_t step = kWidth == 1 ? rows.column_stride : 1;
    return static_cast<U*>(rows.data) + row * rows.row_stride + column * step;
  }

  // Calls f(state's number, its elements from `column` on) for each state that is as the row is.
  template <class F>
  __device__ void for_each_state(int64_t column, const F& f) const {
    if constexpr (Method::kStates > 0) {
#pragma unroll
      for (int s = 0; s < Method::kStates; ++s) {
        f(s, place<Acc>(method.state[s], row, column));
      }
    }
  }

  __device__ Piece load_piece(int64_t column) const {
    Piece piece{};
    piece.value = load<T, kWidth>(place<const T>(task.values, entry, column));
    piece.weight = load_written<T, kWidth>(place<const T>(task.weight, row, column));
    for_each_state(
        column, [&](int s, const Acc* from) { piece.state[s] = load_written<Acc, kWidth>(from); });
    return piece;
  }

  __device__ Acc gradient(T value, T weight) const {
    const auto& seen = method.gradient;
    const Acc grad = seen.sign * widen(value);
    // An infinite weight times 0 is no number.
    return seen.weight_decay == Acc(0) ? grad : grad + seen.weight_decay * widen(weight);
  }

  __device__ Acc squares(const Packed<T, kWidth>& value, const Packed<T, kWidth>& weight) const {
    Acc sum = 0;
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      const Acc grad = gradient(value.values[j], weight.values[j]);
      sum += grad * grad;
    }
    return sum;
  }

  __device__ Acc squares(int64_t column) const {
    const auto value = load<T, kWidth>(place<const T>(task.values, entry, column));
    Packed<T, kWidth> weight{};
    if (method.gradient.weight_decay != Acc(0)) {
      weight = load_written<T, kWidth>(place<const T>(task.weight, row, column));
    }
    return squares(value, weight);
  }

  __device__ T rounded(Acc value, const Randomness& random, int64_t column) const {
    if constexpr (sizeof(T) == 2) {
      if (task.stochastic) {
        value = dither_to<T>(value, random.of_columns(static_cast<uint32_t>(column)));
      }
    }
    return narrow<T>(value);
  }

  __device__ void update_piece(Piece& piece, int64_t column, Acc spread) const {
    const Randomness random(task.seed, row);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      Acc state[Method::kStates + 1];
#pragma unroll
      for (int s = 0; s < Method::kStates; ++s) {
        state[s] = piece.state[s].values[j];
      }
      Acc weight = widen(piece.weight.values[j]);
      step(method, weight, gradient(piece.value.values[j], piece.weight.values[j]), state, spread);
      piece.weight.values[j] = rounded(weight, random, column + j);
#pragma unroll
      for (int s = 0; s < Method::kStates; ++s) {
        piece.state[s].values[j] = state[s];
      }
    }
    store(place<T>(task.weight, row, column), piece.weight);
    for_each_state(column, [&](int s, Acc* to) { store(to, piece.state[s]); });
  }
};

// A team's sum of its lanes' own, in one order for every schedule. All threads of the block. What
// was read before, whoever reads it, may be written afterwards.
template <class Acc>
__device__ Acc sum_of_team(Acc sum, int team) {
  __shared__ Acc of_warp[kBlockWarps];
  for (int distance = min(team, kWarpSize) / 2; distance > 0; distance /= 2) {
    sum += __shfl_xor_sync(kFullWarp, sum, distance);
  }
  if (team <= kWarpSize) {
    __syncwarp();
    return sum;
  }
  of_warp[threadIdx.x / kWarpSize] = sum;
  __syncthreads();
  const int warps = team / kWarpSize;
  const int first = threadIdx.x / team * warps;
  sum = of_warp[first];
  for (int warp = 1; warp < warps; ++warp) {
    sum += of_warp[first + warp];
  }
  return sum;
}

// A team an entry. An entry that is not above the one before it or names no row is reported and
// left alone, so that a row that comes twice in a run is updated once. Beyond that, as in [1, 5, 2,
// 5], a row may be updated by either or by parts of both: the call is reported then, too.
template <class T, int kWidth, class Method>
__global__ void __launch_bounds__(kBlockThreads)
    update_rows(UpdateTask task, Method method, int team, IndexErrors errors) {
  using Acc = typename Method::Acc;
  const int64_t entry = int64_t{blockIdx.x} * (blockDim.x / team) + threadIdx.x / team;
  const int lane = threadIdx.x % team;
  int64_t row = 0;
  bool good = false;
  if (entry < task.count) {
    const int64_t index = __ldg(task.indices + entry);
    const int64_t before = entry == 0 ? IndexErrorSlot::kNone : __ldg(task.indices + entry - 1);
    good = errors.is_good_after(before, index);
    if (good) {
      row = index;
    } else if (lane == 0) {
      errors.report_after(before, index, entry);
    }
  }
  const RowUpdate<T, kWidth, Method> update{task, method, entry, row};
  const int64_t turn = int64_t{team} * kWidth;
  const int64_t end = good ? task.width : 0;
  int64_t column = int64_t{lane} * kWidth;
  RowPiece<T, kWidth, Method> piece{};
  if (column < end) {
    piece = update.load_piece(column);
  }
  Acc spread{};
  if constexpr (Method::kPerRow) {
    Acc* const place = update.template place<Acc>(method.per_row, row, 0);
    Acc number = good ? *place : Acc(0);
    Acc sum = column < end ? update.squares(piece.value, piece.weight) : Acc(0);
    for (int64_t next = column + turn; next < end; next += turn) {
      sum += update.squares(next);
    }
    sum = sum_of_team(sum, team);
    spread = take_row(method, sum / static_cast<Acc>(task.width), number);
    if (good && lane == 0) {
      *place = number;
    }
  }
  while (column < end) {
    update.update_piece(piece, column, spread);
    column += turn;
    if (column < end) {
      piece = update.load_piece(column);
    }
  }
}

// How many neighbouring elements of a row can be moved at once, of all that an update moves.
template <class T, class Method>
int vector_elements_of(const UpdateTask& task, const Method& method) {
  int elements = kMaxVectorBytes;
  const auto allow = [&](const Rows& rows, uint64_t element_bytes) {
    const RowsInMemory memory{element_bytes, address(rows.data), rows.row_stride};
    const bool side_by_side = rows.column_stride == 1 || task.width == 1;
    elements = std::min(elements, side_by_side ? vector_elements(memory, task.width) : 1);
  };
  allow(task.weight, sizeof(T));
  allow(task.values, sizeof(T));
  if constexpr (Method::kStates > 0) {
    for (const Rows& rows : method.state) {
      allow(rows, sizeof(typename Method::Acc));
    }
  }
  return elements;
}

template <class T, int kWidth, class Method>
void launch_update(const UpdateTask& task, const Method& method, int elements,
                   const IndexErrors& errors, cudaStream_t stream) {
  if constexpr (kWidth > 1) {
    if (elements < kWidth) {
      return launch_update<T, kWidth / 2>(task, method, elements, errors, stream);
    }
  }
  const auto cut = update_cut(task.width / kWidth, task.count);
  const auto blocks = grid_blocks(task.count, cut.threads / cut.team);
  update_rows<T, kWidth><<<blocks, cut.threads, 0, stream>>>(task, method, cut.team, errors);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

// values [N, D], indices [N] -> sparse [num_rows, D] with one entry a row
inline at::Tensor sum_entries(const RowGradient& grad, int64_t num_rows) {
  using Signature =
      at::Tensor(const at::Tensor&, const at::Tensor&, c10::SymInt, c10::SymInt, bool, bool);
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("embed_ext::embedding_sparse_backward", "")
                             .typed<Signature>();
  return op.call(grad.values, grad.indices, num_rows, /*padding_idx=*/-1,
                 /*scale_grad_by_freq=*/false, /*coalesced=*/true);
}

// weight [V, D] and a gradient, checked by check_update(). Calls with_method(TypeTag<Acc>, f),
// which calls f(method) with the method that the other arguments make.
template <class F>
void update(const char* op, const at::Tensor& weight, const RowGradient& grad,
            const std::optional<int64_t>& seed, const F& with_method) {
  const c10::cuda::CUDAGuard device_guard(weight.device());
  if (!grad.coalesced) {
    const auto sums = sum_entries(grad, weight.size(0));
    const auto rows = sums._indices().select(0, 0), values = sums._values();
    return update(op, weight, {rows, values, /*coalesced=*/true}, seed, with_method);
  }
  const auto& [indices, values, coalesced] = grad;
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const auto errors = open_index_check(op, indices, weight.size(0));
  const auto index = indices.contiguous();
  check_ascending_first(index, errors, stream);
  if (weight.size(1) == 0) {
    launch_ascending_check(index, errors, stream);
  } else if (index.numel() > 0) {
    const auto task = update_task(weight, index, values, seed);
    with_float_type(weight.scalar_type(), [&](auto element) {
      using T = typename decltype(element)::type;
      with_method(TypeTag<Accumulator<T>>{}, [&](const auto& method) {
        using Method = std::decay_t<decltype(method)>;
        // The widest of one access of each: a lane's states lie side by side with its neighbours'.
        using Widest = std::conditional_t<(Method::kStates > 0), typename Method::Acc, T>;
        launch_update<T, kMaxVectorBytes / static_cast<int>(sizeof(Widest))>(
            task, method, vector_elements_of<T>(task, method), errors, stream);
      });
    });
  }
  close_index_check(indices, stream);
}

}  // namespace embed_ext::cuda
