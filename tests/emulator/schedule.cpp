// Who runs when.
//
// A GPU promises nothing about the order in which threads run, except where they wait for each
// other. Here every thread is a fiber, and one fiber runs at a time, until it waits in a collective
// (collectives.cpp), ends, or is made to give way at an access. Who goes on is drawn by lot. Blocks
// start in an order drawn by lot too, up to four side by side. All lots come from one seed, so that
// a schedule that shows a mistake can be run again. Seed 0: in order, one block at a time.
#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <mutex>
#include <numeric>
#include <utility>
#include <vector>

#include "emulator.h"

// Saves the registers that a function keeps, on the stack that it leaves, and takes those of the
// stack that it goes to.
asm(R"(
.text
.type emulator_switch,@function
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulator_switch,.-emulator_switch
)");
extern "C" void emulator_switch(void** saved, void* next);

namespace emulator {

__thread Indices* current __attribute__((tls_model("initial-exec"))) = nullptr;
const char* running_kernel = "";

void end_thread();  // collectives.cpp

namespace {

constexpr size_t kStackBytes = size_t{64} << 10;

std::mutex launch_mutex;
uint64_t seed = 0, launches_of_seed = 0, schedule_digest = 0;
uint64_t lot = 0;             // the state of the random numbers
unsigned preempt_one_in = 0;  // accesses; 0: never
uint32_t launches = 0;

Thread threads[kMaxResident * kMaxThreads];
Block blocks[kMaxResident];
char* stacks = nullptr;
std::vector<Thread*> ready;
size_t first_ready = 0;     // in order, the front of the queue
void* scheduler = nullptr;  // its stack pointer, while a thread runs

void (*body)(const void*) = nullptr;
const void* parameters = nullptr;
std::string error;

void fiber_main() {
  body(parameters);
  end_thread();
  self().state = State::kEnded;
  give_way();
  __builtin_trap();  // nobody makes an ended thread ready
}

void start_thread(Thread& thread, size_t place) {
  // What emulator_switch takes from the stack: six registers and where to return to. A function
  // begins with its stack pointer 8 bytes off a multiple of 16.
  auto* top = reinterpret_cast<uintptr_t*>(stacks + (place + 1) * kStackBytes) - 1;
  *--top = reinterpret_cast<uintptr_t>(&fiber_main);
  top -= 6;
  std::fill(top, top + 6, uintptr_t{0});
  thread.stack_pointer = top;
  make_ready(thread);
}

void start_block(unsigned place, unsigned index, unsigned grid, unsigned num_threads) {
  if (counting) {
    begin_counted_block();
  }
  Block& block = blocks[place];
  block = Block{};
  block.place = place;
  block.index = index;
  block.running = num_threads;
  clear_shared(place);
  for (unsigned t = 0; t < num_threads; ++t) {
    Thread& thread = threads[place * kMaxThreads + t];
    static_cast<Indices&>(thread) = {{t, 0, 0}, {index, 0, 0}, dim3(num_threads), dim3(grid)};
    thread.block_of = &block;
    thread.mask = 0;
    thread.has_looked = false;
    thread.warp().lanes |= 1u << thread.lane();
    start_thread(thread, place * kMaxThreads + t);
  }
}

Thread& take_ready() {
  Thread* taken;
  if (seed == 0) {
    taken = ready[first_ready++];
    if (first_ready == ready.size()) {
      ready.clear();
      first_ready = 0;
    }
  } else {
    std::swap(ready[random_below(ready.size())], ready.back());
    taken = ready.back();
    ready.pop_back();
  }
  schedule_digest = (schedule_digest ^ (taken->block.x << 10 | taken->thread.x)) * 0x100000001b3;
  return *taken;
}

void run(Thread& thread) {
  current = &thread;
  emulator_switch(&scheduler, thread.stack_pointer);
  current = nullptr;
}

// Nobody can go on: whom does everybody wait for?
std::string describe_waiting() {
  std::string text = "unfinished (deadlock): nobody can go on;";
  for (const Thread& thread : threads) {
    if (thread.block_of == nullptr || thread.block_of->running == 0 ||
        thread.thread.x >= thread.block_dim.x || text.size() > 300) {
      continue;
    }
    if (thread.state == State::kAtBarrier) {
      text +=
          format(" thread %u of block %u is in __syncthreads;", thread.thread.x, thread.block.x);
    } else if (thread.state == State::kInCollective) {
      text += format(" thread %u of block %u waits for lanes %x;", thread.thread.x, thread.block.x,
                     thread.mask & ~thread.warp().waiting);
    }
  }
  return text;
}

void prepare() {
  if (stacks == nullptr) {
    constexpr size_t kBytes = kStackBytes * kMaxResident * kMaxThreads;
    stacks = static_cast<char*>(mmap(nullptr, kBytes, PROT_READ | PROT_WRITE,
                                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    set_untracked(stacks, kBytes, threads, sizeof(threads));
  }
  ++launches;
  ++launches_of_seed;
  lot = seed * 0x2545f4914f6cdd1d + launches_of_seed * 0x9e3779b97f4a7c15;
  static constexpr unsigned kPreempt[] = {0, 0, 20, 200};
  preempt_one_in = seed == 0 ? 0 : kPreempt[random_below(std::size(kPreempt))];
  ready.clear();
  first_ready = 0;
  error.clear();
  for (Thread& thread : threads) {
    thread.block_of = nullptr;
  }
  for (Block& block : blocks) {
    block.running = 0;
  }
  forget_shared_variables();
}

std::vector<unsigned> order_of_blocks(unsigned grid) {
  std::vector<unsigned> order(grid);
  std::iota(order.begin(), order.end(), 0u);
  for (unsigned i = grid; seed != 0 && i > 1; --i) {
    std::swap(order[i - 1], order[random_below(i)]);
  }
  return order;
}

// Until all have ended, or there is an error.
void run_blocks(unsigned grid, unsigned num_threads) {
  const unsigned resident = seed == 0 ? 1 : 1 + random_below(kMaxResident);
  const auto order = order_of_blocks(grid);
  size_t next = 0;
  while (error.empty()) {
    for (unsigned place = 0; place < resident && next < order.size(); ++place) {
      if (blocks[place].running == 0) {
        start_block(place, order[next++], grid, num_threads);
      }
    }
    if (!ready.empty()) {
      run(take_ready());
    } else if (std::all_of(blocks, blocks + kMaxResident,
                           [](const Block& block) { return block.running == 0; })) {
      return;
    } else {
      error = describe_waiting() + " in " + running_kernel;
      report(error, nullptr);
    }
  }
}

}  // namespace

uint64_t random_below(uint64_t bound) {  // splitmix64
  lot += 0x9e3779b97f4a7c15;
  uint64_t z = lot;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
  z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
  z ^= z >> 31;
  return static_cast<uint64_t>((static_cast<unsigned __int128>(z) * bound) >> 64);
}

uint32_t launch_number() { return launches; }

void make_ready(Thread& thread) {
  thread.state = State::kReady;
  ready.push_back(&thread);
}

void give_way() { emulator_switch(&self().stack_pointer, scheduler); }

void maybe_preempt(Kind kind) {
  // Who looks at a volatile variable is about to act on what it saw: the best moment for another.
  const bool acts = std::exchange(self().has_looked, kind == Kind::kVolatileRead);
  const unsigned one_in = acts && seed != 0 ? 2 : preempt_one_in;
  if (one_in != 0 && random_below(one_in) == 0) {
    make_ready(self());
    give_way();
  }
}

void stop(const std::string& what, const void* code) {
  report(what, code);
  error = format("%s: %s, block %u, thread %u", what.c_str(), running_kernel, current->block.x,
                 current->thread.x);
  self().state = State::kEnded;
  give_way();
  __builtin_unreachable();
}

const char* launch_error() { return error.empty() ? nullptr : error.c_str(); }

void launch(const char* kernel, unsigned grid, unsigned num_threads, size_t dynamic_shared,
            void (*thread_body)(const void*), const void* thread_parameters,
            size_t parameter_bytes) {
  const std::lock_guard<std::mutex> lock(launch_mutex);
  prepare();
  running_kernel = kernel;
  body = thread_body;
  parameters = thread_parameters;
  set_parameters(parameters, parameter_bytes);
  if (grid == 0 || grid > INT32_MAX || num_threads == 0 || num_threads > kMaxThreads ||
      dynamic_shared != 0 || parameter_bytes > 4096) {
    error = format("invalid launch (%u blocks of %u threads) of %s", grid, num_threads, kernel);
  } else if (counting && seed != 0) {
    error = format("invalid launch of %s: only what runs in order (seed 0) is counted", kernel);
  }
  if (!error.empty()) {
    return report(error, nullptr);
  }
  if (counting) {
    begin_counted_launch(kernel, grid, num_threads);
  }
  run_blocks(grid, num_threads);
  if (counting) {
    end_counted_launch();
  }
}

}  // namespace emulator

// From now on schedules follow from this seed.
extern "C" void emulator_set_seed(uint64_t seed) {
  const std::lock_guard<std::mutex> lock(emulator::launch_mutex);
  emulator::seed = seed;
  emulator::launches_of_seed = 0;
  emulator::schedule_digest = 0;
}

// A number that differs between two orders of threads since emulator_set_seed().
extern "C" uint64_t emulator_schedule_digest() { return emulator::schedule_digest; }

extern "C" uint32_t emulator_launches() { return emulator::launches; }
