// What a launch asks of the memory: counted once emulator_count(true) has been called.
//
// A GPU serves together what the lanes of a warp access by one instruction, in sectors of 32 bytes.
// Lanes run one after the other here, so what belongs together is told by the instruction's address
// and by how often the lane has executed it: the third time round a loop of one lane belongs to the
// third time round of the others. Each access is noted down, and what is noted of a block is
// counted once it is through. This takes blocks that run one after the other, as they do with
// seed 0.
//
// Global memory alone counts. Shared memory, registers and parameters cost no traffic; nor does
// host memory, where kernels report bad indices.
#include <algorithm>
#include <compare>
#include <cstring>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "emulator.h"

namespace emulator {

bool counting = false;

namespace {

constexpr uintptr_t kSectorBytes = 32;

struct Launch {
  std::string name;
  uint64_t blocks, threads;
  // Sectors, of each instruction of a warp anew.
  uint64_t read = 0, written = 0, added = 0;
  uint64_t read_by_block = 0;                    // of each block anew
  uint64_t unique_read = 0, unique_written = 0;  // of the launch
  uint64_t adds = 0;                             // atomics and reductions, of each lane
  uint64_t longest = 0, longest_waiting = 0;     // of one thread: accesses, and those that return
};

struct Touched {  // by the lanes of one warp together
  uint32_t instruction, time;
  uintptr_t sector;

  auto operator<=>(const Touched&) const = default;
};

struct WarpNotes {
  std::vector<Touched> read, written, added;
};

struct ThreadNotes {
  std::vector<uint32_t> times;  // that it has executed each instruction
  uint64_t accesses = 0, waits = 0;
};

std::mutex mutex;
std::vector<Launch> launches;

// Of the launch that runs.
std::unordered_map<const void*, uint32_t> instructions;
std::vector<uintptr_t> sectors_read, sectors_written;
// Of the block that runs.
WarpNotes warps[kMaxThreads / kLanes];
ThreadNotes threads[kMaxThreads];

template <class T>
void make_unique(std::vector<T>& all) {
  std::sort(all.begin(), all.end());
  all.erase(std::unique(all.begin(), all.end()), all.end());
}

// How many of them there are, each once; their sectors go to `sectors`.
uint64_t take_sectors(std::vector<Touched>& touched, std::vector<uintptr_t>& sectors) {
  make_unique(touched);
  const uint64_t count = touched.size();
  for (const Touched& one : touched) {
    sectors.push_back(one.sector);
  }
  touched.clear();
  return count;
}

void append(std::vector<uintptr_t>& to, std::vector<uintptr_t>& from) {
  make_unique(from);
  to.insert(to.end(), from.begin(), from.end());
}

void count_block(Launch& launch) {
  std::vector<uintptr_t> read, written;
  for (WarpNotes& warp : warps) {
    launch.read += take_sectors(warp.read, read);
    launch.written += take_sectors(warp.written, written);
    launch.added += take_sectors(warp.added, written);
  }
  append(sectors_read, read);
  append(sectors_written, written);
  launch.read_by_block += read.size();
  for (ThreadNotes& thread : threads) {
    launch.longest = std::max(launch.longest, thread.accesses);
    launch.longest_waiting = std::max(launch.longest_waiting, thread.waits);
    thread.times.clear();
    thread.accesses = thread.waits = 0;
  }
}

uint32_t number_of(const void* instruction) {
  return instructions.try_emplace(instruction, static_cast<uint32_t>(instructions.size()))
      .first->second;
}

std::string line_of(const Launch& launch) {
  std::string line = launch.name;
  for (const uint64_t figure :
       {launch.blocks, launch.threads, launch.read, launch.written, launch.added,
        launch.read_by_block, launch.unique_read, launch.unique_written, launch.adds,
        launch.longest, launch.longest_waiting}) {
    line += format("\t%llu", static_cast<unsigned long long>(figure));
  }
  return line + "\n";
}

}  // namespace

void begin_counted_launch(const char* kernel, unsigned blocks, unsigned num_threads) {
  const std::lock_guard<std::mutex> lock(mutex);
  launches.push_back({kernel, blocks, num_threads});
  instructions.clear();
}

void begin_counted_block() {
  const std::lock_guard<std::mutex> lock(mutex);
  count_block(launches.back());  // the one before, if there is one
}

void end_counted_launch() {
  const std::lock_guard<std::mutex> lock(mutex);
  Launch& launch = launches.back();
  count_block(launch);
  make_unique(sectors_read);
  make_unique(sectors_written);
  launch.unique_read = sectors_read.size();
  launch.unique_written = sectors_written.size();
  sectors_read.clear();
  sectors_written.clear();
}

void count_access(uintptr_t at, size_t bytes, Kind kind, const void* code) {
  const unsigned number = self().number();
  ThreadNotes& thread = threads[number];
  WarpNotes& warp = warps[number / kLanes];
  const uint32_t instruction = number_of(code);
  if (thread.times.size() <= instruction) {
    thread.times.resize(instruction + 1);
  }
  const uint32_t time = thread.times[instruction]++;
  const bool adds = kind == Kind::kAtomic || kind == Kind::kReduction;
  auto& touched = adds ? warp.added : writes(kind) ? warp.written : warp.read;
  for (uintptr_t sector = at / kSectorBytes; sector <= (at + bytes - 1) / kSectorBytes; ++sector) {
    touched.push_back({instruction, time, sector});
  }
  ++thread.accesses;
  thread.waits += !writes(kind) || kind == Kind::kAtomic;
  launches.back().adds += adds;
}

void count_fill(const void* begin, size_t bytes) {
  const std::lock_guard<std::mutex> lock(mutex);
  const auto at = reinterpret_cast<uintptr_t>(begin);
  const uint64_t sectors = (at + bytes - 1) / kSectorBytes - at / kSectorBytes + 1;
  Launch& fill = launches.emplace_back(Launch{"memset", 0, 0});
  fill.written = fill.unique_written = sectors;
}

void count_library(const char* name) {
  if (counting) {
    const std::lock_guard<std::mutex> lock(mutex);
    launches.push_back({std::string("cub ") + name, 0, 0});
  }
}

}  // namespace emulator

// From now on launches are counted, or no longer; those that were counted before are forgotten.
extern "C" void emulator_count(bool on) {
  const std::lock_guard<std::mutex> lock(emulator::mutex);
  emulator::counting = on;
  emulator::launches.clear();
}

// Writes a line of each launch counted so far, in tabs, to `to`; how much room all of them take.
extern "C" size_t emulator_counts(char* to, size_t room) {
  const std::lock_guard<std::mutex> lock(emulator::mutex);
  std::string all;
  for (const auto& launch : emulator::launches) {
    all += emulator::line_of(launch);
  }
  if (all.size() < room) {
    std::memcpy(to, all.c_str(), all.size() + 1);
  }
  return all.size() + 1;
}
