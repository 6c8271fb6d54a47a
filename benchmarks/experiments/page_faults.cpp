// What zeroed memory costs, by where it comes from and by how many of its 4 KiB pages are written,
// to who writes them and to who passes over all of it next.
//
// Prints lines "MEMORY SHARE WRITER BOTH": medians in microseconds over rounds of getting 256 MiB
// of zeros, writing one byte in a share of its pages at random, and giving it back; and of the same
// with a pass in between that writes one byte in every page, as clipping writes a gradient.
//   small, huge   fresh pages of 4 KiB or 2 MiB, faulted in where something is written
//   filled        fresh small pages and a memset, as malloc and zero_() do it
//   waiting       huge pages of an earlier round, MADV_FREE while nobody used them, and a memset
#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

namespace {

constexpr size_t kBytes = size_t(256) << 20;
constexpr size_t kHuge = size_t(2) << 20;
constexpr size_t kPage = 4096;
constexpr int kRounds = 7;

double microseconds() {
  const auto now = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration<double, std::micro>(now).count();
}

struct Source {
  const char* name;
  int advice;
  bool filled;
  bool waits;
};

struct Mapping {
  void* whole;
  char* data;  // aligned to a huge page
};

Mapping map(int advice) {
  void* const whole =
      mmap(nullptr, kBytes + kHuge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  auto* const data =
      reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(whole) + kHuge - 1) & ~(kHuge - 1));
  madvise(data, kBytes, advice);
  return {whole, data};
}

double one_round(const Source& source, const std::vector<uint32_t>& pages, bool passed_over) {
  static const Mapping waiting = map(MADV_HUGEPAGE);
  const double start = microseconds();
  const Mapping memory = source.waits ? waiting : map(source.advice);
  if (source.filled) {
    std::memset(memory.data, 0, kBytes);
  }
  for (const uint32_t page : pages) {
    memory.data[page * kPage] = 1;
  }
  if (passed_over) {
    for (size_t at = 0; at < kBytes; at += kPage) {
      memory.data[at] = static_cast<char>(memory.data[at] + 1);
    }
  }
  if (source.waits) {
    madvise(memory.data, kBytes, MADV_FREE);
  } else {
    munmap(memory.whole, kBytes + kHuge);
  }
  return microseconds() - start;
}

double median(const Source& source, const std::vector<uint32_t>& pages, bool passed_over) {
  std::vector<double> times;
  for (int round = 0; round < kRounds; ++round) {
    times.push_back(one_round(source, pages, passed_over));
  }
  std::sort(times.begin(), times.end());
  return times[kRounds / 2];
}

}  // namespace

int main() {
  const uint32_t total = kBytes / kPage;
  std::vector<uint32_t> order(total);
  for (uint32_t i = 0; i < total; ++i) {
    order[i] = i;
  }
  std::shuffle(order.begin(), order.end(), std::mt19937(0));
  for (const double share : {0.01, 0.05, 0.2, 0.5, 1.0}) {
    const std::vector<uint32_t> pages(order.begin(), order.begin() + uint32_t(share * total));
    for (const Source& source : {Source{"small", MADV_NOHUGEPAGE, false, false},
                                 Source{"huge", MADV_HUGEPAGE, false, false},
                                 Source{"filled", MADV_NOHUGEPAGE, true, false},
                                 Source{"waiting", MADV_HUGEPAGE, true, true}}) {
      std::printf("%s %.2f %.1f %.1f\n", source.name, share, median(source, pages, false),
                  median(source, pages, true));
      std::fflush(stdout);
    }
  }
}
