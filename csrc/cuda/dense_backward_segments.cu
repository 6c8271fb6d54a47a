// Dense gradient by segments: tokens are sorted by row, and every row of the table is written once,
// as the sum of its tokens or as zeros, so that nothing has to be filled with zeros before. Where
// the table is zero already or is to be added to, only the rows in use are read and written.
//
// A row used very often would keep one warp busy while all others have finished. So it is not the
// rows that are shared out but the sorted tokens, the same number to each block. With tiles of 4:
//
//   sorted rows   2 2 2 5 | 5 5 5 5 | 5 5 7 7 | 8 9
//   tile 0        writes row 2          tail: token 3
//   tile 1        all of it is a head
//   tile 2        head: tokens 8 and 9  writes row 7
//   tile 3        writes rows 8 and 9
//   then          row 5 = tail of tile 0 + heads of tiles 1 and 2; zeros in rows 0, 1, 3, 4, 6
//
// sum_tokens.cuh is what tiles do, finish_rows.cuh what is done then. The cuts depend on the number
// of tokens and on the width and alignment of the rows, and the sort is stable, so that every run
// adds the same numbers in the same order.
#include <c10/cuda/CUDAException.h>

#include <algorithm>

#include "dense_backward.cuh"
#include "dispatch.cuh"
#include "finish_rows.cuh"
#include "group_by_row.cuh"
#include "launch_math.h"
#include "sum_tokens.cuh"
#include "uninitialized.h"
#include "vector.cuh"

namespace embed_ext::cuda {
namespace {

template <class Tag, class In, class Out>
void launch_sums(const SegmentTask<In, Out>& task, const TokenTiles& tiles, int64_t num_tiles,
                 int64_t chunks, cudaStream_t stream) {
  sum_tokens<Tag><<<grid_blocks(num_tiles * chunks, 1), tiles.threads, 0, stream>>>(
      task, tiles, Divider(chunks));
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  const FinishPlan plan{(num_tiles - 1) * chunks, Divider(chunks),
                        Divider(std::max<int64_t>(task.width, 1))};
  const int64_t vectors =
      task.notes.used == nullptr
          ? 0
          : ceil_div(task.num_rows * task.width * static_cast<int64_t>(sizeof(Out)),
                     kMaxVectorBytes);
  const int64_t blocks = plan.join_blocks + ceil_div(vectors, kVectorsOfBlock);
  if (blocks > 0) {
    finish_rows<Tag><<<grid_blocks(blocks, 1), kFinishThreads, 0, stream>>>(task, tiles, plan);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
}

template <class In, class Out>
void sum_segments(const DenseBackwardTask& task, const RowGroups& groups, const RowNotes& notes,
                  cudaStream_t stream) {
  using Acc = Accumulator<In>;
  SegmentTask<In, Out> raw{static_cast<const In*>(task.grad.const_data_ptr()),
                           task.grad.stride(0),
                           as_uint32(groups.row),
                           as_uint32(groups.position),
                           notes,
                           nullptr,
                           nullptr,
                           static_cast<Out*>(task.out.mutable_data_ptr()),
                           task.out.stride(0),
                           task.grad.size(0),
                           task.out.size(0),
                           task.out.size(1),
                           task.rows == RowsOfOut::kAdded,
                           task.scale_grad_by_freq};
  // No more than one vector of either type: wider sums would not fit the registers.
  constexpr int kMost = kMaxVectorBytes / static_cast<int>(std::max(sizeof(In), sizeof(Out)));
  const int elements = vector_elements({sizeof(In), address(raw.grad), raw.grad_stride},
                                       {sizeof(Out), address(raw.out), raw.out_stride}, raw.width);
  with_lane_columns<kMost>(elements, raw.width, [&](auto tag, const RowLanes& share) {
    const auto tiles = token_tiles(raw.num_tokens, share);
    const int64_t num_tiles = ceil_div(raw.num_tokens, tiles.tokens());
    const int64_t of_heads = num_tiles * share.chunks * share.lanes * tag.kWidth * tag.kVectors;
    const auto partial_sums = uninitialized(
        {2, of_heads}, task.grad.options().dtype(c10::CppTypeToScalarType<Acc>::value));
    raw.heads = static_cast<Acc*>(partial_sums.mutable_data_ptr());
    raw.tails = raw.heads + of_heads;
    launch_sums<decltype(tag)>(raw, tiles, num_tiles, share.chunks, stream);
  });
}

}  // namespace

void add_segments(const DenseBackwardTask& task, const IndexErrors& errors, cudaStream_t stream) {
  at::Tensor used;  // undefined: rows that are not in use are left alone
  if (task.rows == RowsOfOut::kAllWritten) {
    used = uninitialized({ceil_div(task.out.size(0), kMaxVectorBytes) * kMaxVectorBytes},
                         task.indices.options().dtype(at::kByte));
  }
  const auto groups = group_by_row(task.indices, task.padding_idx, errors, stream, used);
  add_segments(
      task, groups,
      {used.defined() ? static_cast<uint8_t*>(used.mutable_data_ptr()) : nullptr, nullptr, nullptr},
      stream);
}

void add_segments(const DenseBackwardTask& task, const RowGroups& groups, const RowNotes& notes,
                  cudaStream_t stream) {
  with_gradient_types(task.grad.scalar_type(), task.out.scalar_type(), [&](auto in, auto out) {
    sum_segments<typename decltype(in)::type, typename decltype(out)::type>(task, groups, notes,
                                                                            stream);
  });
}

}  // namespace embed_ext::cuda
