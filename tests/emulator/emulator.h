// What the parts of the emulator share.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "interface.h"

namespace emulator {

constexpr unsigned kLanes = 32;                    // of a warp
constexpr unsigned kMaxThreads = 1024;             // of a block
constexpr unsigned kMaxResident = 4;               // blocks that run side by side
constexpr size_t kSharedBytes = size_t{48} << 10;  // of a block

struct Warp {
  unsigned lanes = 0;    // that there are
  unsigned waiting = 0;  // in a collective
  unsigned ended = 0;    // those whose kernel has returned
  uint16_t epoch = 0;    // __syncwarps and __syncthreads that are done
};

struct Block {
  unsigned place = 0;  // among the resident
  unsigned index = 0;
  unsigned running = 0;     // threads that have not ended
  unsigned at_barrier = 0;  // threads in __syncthreads
  uint32_t epoch = 0;       // __syncthreads that are done
  Warp warps[kMaxThreads / kLanes];
};

// Of an access. A reduction is an atomic that returns nothing.
enum class Kind { kRead, kWrite, kAtomic, kReduction, kVolatileRead, kVolatileWrite };
constexpr bool writes(Kind kind) { return kind != Kind::kRead && kind != Kind::kVolatileRead; }

enum class State : uint8_t { kReady, kInCollective, kAtBarrier, kEnded };

// One GPU thread: a fiber, with a stack of its own.
struct Thread : Indices {
  void* stack_pointer;
  Block* block_of;
  State state;
  // What it waits for, and what the others see of it.
  Collective kind;
  unsigned mask;
  int argument;
  uint64_t value, result;
  bool has_looked;  // its last access was a volatile read

  unsigned number() const { return thread.x; }
  unsigned lane() const { return thread.x % kLanes; }
  Warp& warp() const { return block_of->warps[thread.x / kLanes]; }
  Thread* lanes() { return this - lane(); }  // those of its warp lie side by side
};

inline Thread& self() { return *static_cast<Thread*>(current); }

// schedule.cpp
extern const char* running_kernel;
void give_way();  // lets others run until somebody calls make_ready(self)
void make_ready(Thread& thread);
void maybe_preempt(Kind kind);  // at an access: now and then lets others run
uint32_t launch_number();
[[noreturn]] void stop(const std::string& what, const void* code);  // reports, and ends the launch
uint64_t random_below(uint64_t bound);

// reports.cpp; `code` is the address of the instruction, for the message alone
void report(const std::string& what, const void* code);
std::string format(const char* text, ...) __attribute__((format(printf, 1, 2)));

// memory.cpp
// Checks an access of the running thread before it is made. `bytes_written`, where they are known.
void check_access(const void* address, size_t bytes, Kind kind, bool aligned, const void* code,
                  const void* bytes_written = nullptr);
enum class MemoryOf { kDevice, kHost };
void register_memory(void* begin, size_t bytes, MemoryOf owner);
bool is_allocated(const void* begin, size_t bytes);
// Not the kernel's memory: the threads' stacks, and what they know of themselves.
void set_untracked(const void* stack_memory, size_t stack_bytes, const void* all_threads,
                   size_t thread_bytes);
void set_parameters(const void* begin, size_t bytes);
void clear_shared(unsigned place);  // when a block takes the place of another
void forget_shared_variables();     // when a launch begins
void fill_never_written(void* begin, size_t bytes);

// races.cpp
struct Stamp {  // of an access
  uint32_t block, block_epoch;
  uint16_t thread, warp_epoch;
};
enum class Readers : uint8_t { kNone, kThread, kWarp, kBlock, kGrid };
struct History {    // of a unit of memory
  uint32_t launch;  // of another launch: nothing is known
  bool written, atomically;
  Readers readers;
  Stamp write, read;  // the last of each
};
struct Histories {
  History* of_bytes = nullptr;  // that of a unit is its first byte's
  size_t bytes = 0;
  size_t unit = 16;  // the smallest access so far: few kernels access single bytes
};
struct Access {
  const void* address;
  size_t bytes;
  Kind kind;
  const char* space;          // "shared" or "global"
  const void* code;           // the instruction
  const void* bytes_written;  // null where they are not known before
};
void check_race(Histories& histories, size_t offset, const Access& access);
void settle_write();  // before a thread's next access: was its last write a race?

// counts.cpp; nothing of it is called unless `counting`
extern bool counting;
void begin_counted_launch(const char* kernel, unsigned blocks, unsigned num_threads);
void begin_counted_block();
void end_counted_launch();
void count_access(uintptr_t at, size_t bytes, Kind kind, const void* code);  // of global memory
void count_fill(const void* begin, size_t bytes);
// Notes a call of a library's: how often, and nothing of what it asks of the memory.
void count_library(const char* name);

}  // namespace emulator
