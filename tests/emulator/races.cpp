// Whether two accesses of one byte could come in the other order on a GPU, and be seen to.
//
// Two accesses of a launch are in order if one thread makes both, if a __syncthreads of their block
// lies between, or a __syncwarp of their warp. Each unit of memory (the smallest access that there
// was) remembers its last write and how widely it was read since. A race is an access that is not
// in order with an earlier one, if either writes, unless both are atomic or volatile, or the second
// writes what is there already: two threads may leave the same bytes at one address (as those do
// that clear a row which is named twice).
#include <algorithm>
#include <cstring>

#include "emulator.h"

namespace emulator {
namespace {

Stamp stamp_of(const Thread& thread) {
  return {thread.block.x, thread.block_of->epoch, static_cast<uint16_t>(thread.thread.x),
          thread.warp().epoch};
}

bool same_warp(const Stamp& a, const Stamp& b) {
  return a.block == b.block && a.thread / kLanes == b.thread / kLanes;
}

// Whether what all of `who` did up to `before` comes before what the thread of `now` does.
bool in_order(const Stamp& before, Readers who, const Stamp& now) {
  if (who == Readers::kNone) {
    return true;
  }
  if (who == Readers::kGrid || before.block != now.block) {
    return false;
  }
  return (who == Readers::kThread && before.thread == now.thread) ||
         before.block_epoch < now.block_epoch ||
         (who != Readers::kBlock && same_warp(before, now) && before.warp_epoch < now.warp_epoch);
}

Readers joined(const History& unit, const Stamp& now) {
  if (unit.readers == Readers::kNone) {
    return Readers::kThread;
  }
  if (unit.read.block != now.block || unit.readers == Readers::kGrid) {
    return Readers::kGrid;
  }
  if (!same_warp(unit.read, now) || unit.readers == Readers::kBlock) {
    return Readers::kBlock;
  }
  return unit.read.thread == now.thread ? unit.readers : Readers::kWarp;
}

// A write over another that is not in order with it, which is a race if it changes what is there.
struct Doubtful {
  const void* address = nullptr;
  size_t bytes = 0;
  char before[64];
  std::string text;
  const void* code = nullptr;
} doubtful;

void doubt(const Access& access, const std::string& text) {
  if (access.bytes_written != nullptr &&
      std::memcmp(access.address, access.bytes_written, access.bytes) == 0) {
    return;
  }
  if (access.bytes_written != nullptr || access.bytes > sizeof(doubtful.before)) {
    return report(text, access.code);
  }
  doubtful.address = access.address;
  doubtful.bytes = access.bytes;
  std::memcpy(doubtful.before, access.address, access.bytes);
  doubtful.text = text;
  doubtful.code = access.code;
}

std::string describe(const Access& access, const char* earlier, const Stamp& stamp) {
  return format("race in %s memory (%s, after a %s of block %u, thread %u that is not in order)",
                access.space, writes(access.kind) ? "write" : "read", earlier, stamp.block,
                stamp.thread);
}

// What is known of a unit at least as large as the access is known of each of its parts.
void divide_units(Histories& all, size_t unit) {
  for (size_t whole = 0; whole < all.bytes; whole += all.unit) {
    if (all.of_bytes[whole].launch == launch_number()) {
      for (size_t part = whole + unit; part < std::min(whole + all.unit, all.bytes); part += unit) {
        all.of_bytes[part] = all.of_bytes[whole];
      }
    }
  }
  all.unit = unit;
}

// Shared memory may hold what an earlier block left.
bool is_stale(const History& unit, const Access& access, const Stamp& now) {
  return unit.launch != launch_number() ||
         (*access.space == 's' &&
          ((unit.written && unit.write.block != now.block) ||
           (unit.readers != Readers::kNone && unit.read.block != now.block)));
}

// Whether the access is in order with what came before; if not, says so unless `told`.
bool check_unit(const History& unit, const Access& access, const Stamp& now, bool told) {
  const bool plain = access.kind == Kind::kRead || access.kind == Kind::kWrite;
  const bool over_write =
      unit.written && (plain || !unit.atomically) && !in_order(unit.write, Readers::kThread, now);
  const bool over_read = writes(access.kind) && !in_order(unit.read, unit.readers, now);
  if (!told && over_write && writes(access.kind)) {
    doubt(access, describe(access, "write", unit.write));
  } else if (!told && over_write) {
    report(describe(access, "write", unit.write), access.code);
  } else if (!told && over_read) {
    report(describe(access, "read", unit.read), access.code);
  }
  return !over_write && !over_read;
}

}  // namespace

void settle_write() {
  if (doubtful.address != nullptr) {
    if (std::memcmp(doubtful.address, doubtful.before, doubtful.bytes) != 0) {
      report(doubtful.text, doubtful.code);
    }
    doubtful.address = nullptr;
  }
}

void check_race(Histories& all, size_t offset, const Access& access) {
  const Stamp now = stamp_of(self());
  const bool plain = access.kind == Kind::kRead || access.kind == Kind::kWrite;
  const size_t alignment = (offset | access.bytes) & (~(offset | access.bytes) + 1);
  if (alignment < all.unit) {
    divide_units(all, alignment);
  }
  bool told = false;
  for (size_t at = offset; at < offset + access.bytes; at += all.unit) {
    History& unit = all.of_bytes[at];
    if (is_stale(unit, access, now)) {
      unit = History{launch_number(), false, false, Readers::kNone, {}, {}};
    }
    told = !check_unit(unit, access, now, told) || told;
    if (writes(access.kind)) {
      unit.written = true;
      unit.atomically = !plain;
      unit.write = now;
      unit.readers = Readers::kNone;
    } else if (plain) {  // what is volatile may come in any order with what is atomic
      unit.readers = joined(unit, now);
      unit.read = now;
    }
  }
}

}  // namespace emulator
