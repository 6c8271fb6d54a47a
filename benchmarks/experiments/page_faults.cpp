// What fresh zeroed memory costs, by page size and by how many of its pages are written.
//
// Prints lines "PAGES SHARE MICROSECONDS": medians over rounds of mapping 256 MiB, writing one byte
// in a share of its 4 KiB pages at random, and unmapping. "asked" pages are small ones that
// madvise is asked for one by one before they are written, in place of a fault.
#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <random>
#include <vector>

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23  // Linux 5.14; older headers lack it
#endif

namespace {

constexpr size_t kBytes = size_t(256) << 20;
constexpr size_t kHuge = size_t(2) << 20;
constexpr size_t kPage = 4096;
constexpr int kRounds = 7;

double microseconds() {
  const auto now = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration<double, std::micro>(now).count();
}

struct Pages {
  const char* name;
  int advice;
  bool asked;
};

double map_write_unmap(const Pages& kind, const std::vector<uint32_t>& pages) {
  const double start = microseconds();
  void* mapped =
      mmap(nullptr, kBytes + kHuge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  auto* data =
      reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(mapped) + kHuge - 1) & ~(kHuge - 1));
  madvise(data, kBytes, kind.advice);
  for (const uint32_t page : pages) {
    if (kind.asked) {
      madvise(data + page * kPage, kPage, MADV_POPULATE_WRITE);
    }
    data[page * kPage] = 1;
  }
  munmap(mapped, kBytes + kHuge);
  return microseconds() - start;
}

}  // namespace

int main() {
  const uint32_t total = kBytes / kPage;
  std::vector<uint32_t> order(total);
  for (uint32_t i = 0; i < total; ++i) {
    order[i] = i;
  }
  std::shuffle(order.begin(), order.end(), std::mt19937(0));
  for (const double share : {0.01, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0}) {
    const std::vector<uint32_t> pages(order.begin(), order.begin() + uint32_t(share * total));
    for (const Pages& kind :
         {Pages{"small", MADV_NOHUGEPAGE, false}, Pages{"asked", MADV_NOHUGEPAGE, true},
          Pages{"huge", MADV_HUGEPAGE, false}}) {
      std::vector<double> times;
      for (int round = 0; round < kRounds; ++round) {
        times.push_back(map_write_unmap(kind, pages));
      }
      std::sort(times.begin(), times.end());
      std::printf("%s %.2f %.1f\n", kind.name, share, times[kRounds / 2]);
      std::fflush(stdout);
    }
  }
}
