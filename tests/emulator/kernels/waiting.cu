// Collectives that not all of the lanes come to, or that come in different ones.
#include "mistakes.h"

namespace {

constexpr unsigned kFullWarp = 0xffffffffu;

// The sum of a warp's numbers. Lanes without a number have to take part all the same.
__global__ void sum_warp(int* out, const int* in, int count, bool wrong) {
  const int lane = static_cast<int>(threadIdx.x);
  if (wrong && lane >= count) {
    return;
  }
  int sum = lane < count ? in[lane] : 0;
  for (int distance = 16; distance > 0; distance /= 2) {
    sum += __shfl_xor_sync(kFullWarp, sum, distance);
  }
  if (lane == 0) {
    *out = sum;
  }
}

// How many lanes are odd. All have to be in the same vote.
__global__ void count_odd(int* out, bool wrong) {
  const bool odd = threadIdx.x % 2 != 0;
  unsigned votes;
  if (wrong && odd) {
    votes = __match_any_sync(kFullWarp, 1);
  } else {
    votes = __ballot_sync(kFullWarp, odd);
  }
  if (threadIdx.x == 0) {
    *out = __popc(votes);
  }
}

// The lower half of a warp votes. The mask has to name those who are there.
__global__ void vote_of_half(unsigned* out, bool wrong) {
  if (threadIdx.x < 16) {
    const unsigned votes = __ballot_sync(wrong ? 0xffff0000u : 0x0000ffffu, 1);
    if (threadIdx.x == 0) {
      *out = votes;
    }
  }
}

// One half of a block waits at a barrier, the other in a warp collective that needs the first.
__global__ void wait_for_each_other(int* out, bool wrong) {
  if (wrong && threadIdx.x == 0) {
    __syncthreads();
  } else {
    __syncwarp();
  }
  if (wrong || threadIdx.x == 0) {
    *out = 1;
  }
}

}  // namespace

CALLED_FROM_TESTS void launch_sum_warp(int* out, const int* in, int count, bool wrong) {
  sum_warp<<<1, 32, 0, nullptr>>>(out, in, count, wrong);
}

CALLED_FROM_TESTS void launch_count_odd(int* out, bool wrong) {
  count_odd<<<1, 32, 0, nullptr>>>(out, wrong);
}

CALLED_FROM_TESTS void launch_vote_of_half(unsigned* out, bool wrong) {
  vote_of_half<<<1, 32, 0, nullptr>>>(out, wrong);
}

CALLED_FROM_TESTS void launch_wait_for_each_other(int* out, bool wrong) {
  wait_for_each_other<<<1, 32, 0, nullptr>>>(out, wrong);
}
