// What a thread waits for.
//
// A warp collective names its lanes in a mask. A lane that comes to one waits until all lanes of
// the mask have come to one of the same kind and mask; then all get their results and go on. It is
// a mistake (divergence) to call one
//   - that leaves the caller out, or names lanes that the warp does not have;
//   - that names a lane which has ended, or ends while the others wait for it;
//   - while a lane of the mask waits in another one.
// Shuffles and votes pass values in registers and order no memory. __syncwarp does: what its lanes
// accessed before comes before what they access after. So does __syncthreads, for the whole block.
// It waits for all threads that have not ended. Where somebody waits for ever, the launch ends once
// nobody can go on (schedule.cpp).
#include "emulator.h"

namespace emulator {
namespace {

const char* name_of(Collective kind) {
  switch (kind) {
    case Collective::kBallot:
      return "a ballot";
    case Collective::kMatch:
      return "a match";
    case Collective::kSync:
      return "a __syncwarp";
    default:
      return "a shuffle";
  }
}

void check_mask(const Thread& thread, const void* code) {
  const Warp& warp = thread.warp();
  const unsigned mask = thread.mask;
  if ((mask >> thread.lane() & 1) == 0) {
    stop(format("divergence (mask %x): a lane calls a collective that leaves it out", mask), code);
  }
  if (const unsigned missing = mask & (~warp.lanes | warp.ended)) {
    stop(format("divergence (mask %x): lanes %x, which %s waits for, have ended", mask, missing,
                name_of(thread.kind)),
         code);
  }
}

// Whether those of its lanes that wait are in the same collective.
void check_others(Thread& thread, const void* code) {
  for (unsigned lane = 0; lane < kLanes; ++lane) {
    const Thread& other = thread.lanes()[lane];
    if ((thread.mask & thread.warp().waiting) >> lane & 1 &&
        (other.kind != thread.kind || other.mask != thread.mask)) {
      stop(format("divergence (masks %x and %x): a lane is in %s, lane %u in %s", thread.mask,
                  other.mask, name_of(thread.kind), lane, name_of(other.kind)),
           code);
    }
  }
}

// The lanes of `mask` of whom `is_one` is true.
template <class F>
unsigned lanes_that(unsigned mask, const F& is_one) {
  unsigned bits = 0;
  for (unsigned lane = 0; lane < kLanes; ++lane) {
    bits |= mask >> lane & 1 && is_one(lane) ? 1u << lane : 0;
  }
  return bits;
}

// The value of the lane `from`, or the thread's own where there is no such lane.
uint64_t shuffled(Thread& thread, int from, const void* code) {
  if (from < 0 || from >= static_cast<int>(kLanes)) {
    return thread.value;
  }
  if ((thread.mask >> from & 1) == 0) {
    stop(format("divergence (mask %x): a shuffle takes from lane %d, which plays no part",
                thread.mask, from),
         code);
  }
  return thread.lanes()[from].value;
}

uint64_t result_of(Thread& thread, const void* code) {
  const Thread* const lanes = thread.lanes();
  const int lane = static_cast<int>(thread.lane());
  switch (thread.kind) {
    case Collective::kShuffle:
      return shuffled(thread, thread.argument & (kLanes - 1), code);
    case Collective::kShuffleUp:
      return shuffled(thread, lane - thread.argument, code);
    case Collective::kShuffleDown:
      return shuffled(thread, lane + thread.argument, code);
    case Collective::kShuffleXor:
      return shuffled(thread, lane ^ thread.argument, code);
    case Collective::kBallot:
      return lanes_that(thread.mask, [&](unsigned other) { return lanes[other].value != 0; });
    case Collective::kMatch:
      return lanes_that(thread.mask,
                        [&](unsigned other) { return lanes[other].value == thread.value; });
    default:
      return 0;
  }
}

void release_barrier_if_all_are_there(Block& block, Thread* threads) {
  if (block.running == 0 || block.at_barrier != block.running) {
    return;
  }
  block.at_barrier = 0;
  ++block.epoch;
  for (Warp& warp : block.warps) {
    ++warp.epoch;
  }
  for (unsigned t = 0; t < threads->block_dim.x; ++t) {
    if (threads[t].state == State::kAtBarrier) {
      make_ready(threads[t]);
    }
  }
}

}  // namespace

uint64_t collective(Collective kind, unsigned mask, uint64_t value, int argument) {
  settle_write();
  const void* const code = __builtin_return_address(0);
  Thread& thread = self();
  Warp& warp = thread.warp();
  thread.kind = kind;
  thread.mask = mask;
  thread.value = value;
  thread.argument = argument;
  check_mask(thread, code);
  check_others(thread, code);
  warp.waiting |= 1u << thread.lane();
  if ((warp.waiting & mask) != mask) {
    thread.state = State::kInCollective;
    give_way();
    return thread.result;
  }
  if (kind == Collective::kSync) {
    if (mask != warp.lanes) {
      stop(format("not emulated: a __syncwarp of some lanes (mask %x)", mask), code);
    }
    ++warp.epoch;
  }
  warp.waiting &= ~mask;
  for (unsigned lane = 0; lane < kLanes; ++lane) {
    if (mask >> lane & 1) {
      Thread& other = thread.lanes()[lane];
      other.result = result_of(other, code);
      make_ready(other);
    }
  }
  give_way();  // with all the others: the last to come need not be the first to go on
  return thread.result;
}

void sync_threads() {
  settle_write();
  Thread& thread = self();
  thread.state = State::kAtBarrier;
  ++thread.block_of->at_barrier;
  release_barrier_if_all_are_there(*thread.block_of, &thread - thread.number());
  give_way();
}

// What the others must know when a thread's kernel returns.
void end_thread() {
  settle_write();
  Thread& thread = self();
  const unsigned own = 1u << thread.lane();
  for (unsigned lane = 0; lane < kLanes; ++lane) {
    const Thread& other = thread.lanes()[lane];
    if (thread.warp().waiting >> lane & 1 && other.mask & own) {
      stop(format("divergence (mask %x): a lane ends while lane %u waits for it in %s", other.mask,
                  lane, name_of(other.kind)),
           nullptr);
    }
  }
  thread.warp().ended |= own;
  thread.state = State::kEnded;
  --thread.block_of->running;
  release_barrier_if_all_are_there(*thread.block_of, &thread - thread.number());
}

}  // namespace emulator
