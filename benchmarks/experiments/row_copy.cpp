// Ways to copy scattered rows into an output: prefetch distances, ordinary and streaming stores.
//
// usage: row_copy TABLE_ROWS ROW_BYTES TOKENS. Prints lines "WAY MICROSECONDS WITH_CONSUMER": the
// median of copying alone, and with a pass that then reads the whole output. The ways take turns.
#include <immintrin.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

namespace {

enum class Store { kMemcpy, kStreamed };

struct Way {
  const char* name;
  Store store;
  int64_t prefetch_rows;   // how many rows ahead
  int64_t prefetch_bytes;  // of each
};

constexpr Way kWays[] = {
    {"memcpy", Store::kMemcpy, 0, 0},
    {"memcpy, 16 rows ahead, 256 B", Store::kMemcpy, 16, 256},
    {"memcpy, 4 rows ahead, 1 KiB", Store::kMemcpy, 4, 1024},
    {"memcpy, 2 rows ahead, whole", Store::kMemcpy, 2, INT64_MAX},
    {"streamed", Store::kStreamed, 0, 0},
    {"streamed, 16 rows ahead, 256 B", Store::kStreamed, 16, 256},
    {"streamed, 4 rows ahead, 1 KiB", Store::kStreamed, 4, 1024},
};

double microseconds() {
  const auto now = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration<double, std::micro>(now).count();
}

__attribute__((target("avx2"))) void stream(char* to, const char* from, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 32) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to + at),
                        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + at)));
  }
}

void copy(const Way& way, char* out, const char* table, const std::vector<int64_t>& indices,
          int64_t row_bytes) {
  const auto count = static_cast<int64_t>(indices.size());
  for (int64_t i = 0; i < count; ++i) {
    if (way.prefetch_rows > 0 && i + way.prefetch_rows < count) {
      const char* row = table + indices[i + way.prefetch_rows] * row_bytes;
      for (int64_t at = 0; at < std::min(row_bytes, way.prefetch_bytes); at += 64) {
        __builtin_prefetch(row + at);
      }
    }
    const char* from = table + indices[i] * row_bytes;
    if (way.store == Store::kStreamed) {
      stream(out + i * row_bytes, from, row_bytes);
    } else {
      std::memcpy(out + i * row_bytes, from, row_bytes);
    }
  }
  _mm_sfence();
}

uint64_t read_all(const char* data, int64_t bytes) {
  const auto* words = reinterpret_cast<const uint64_t*>(data);
  uint64_t sum = 0;
  for (int64_t i = 0; i < bytes / 8; ++i) {
    sum += words[i];
  }
  return sum;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4 || !__builtin_cpu_supports("avx2")) {
    std::fprintf(stderr, "usage: row_copy TABLE_ROWS ROW_BYTES TOKENS, on a CPU with AVX2\n");
    return 2;
  }
  const int64_t rows = std::atoll(argv[1]), row_bytes = std::atoll(argv[2]);
  const int64_t tokens = std::atoll(argv[3]);
  auto* table = static_cast<char*>(std::aligned_alloc(4096, rows * row_bytes));
  auto* out = static_cast<char*>(std::aligned_alloc(4096, tokens * row_bytes));
  std::memset(table, 1, rows * row_bytes);
  std::memset(out, 1, tokens * row_bytes);
  std::mt19937_64 random(0);
  std::vector<std::vector<int64_t>> batches(4, std::vector<int64_t>(tokens));
  for (auto& batch : batches) {
    std::generate(batch.begin(), batch.end(), [&] { return int64_t(random() % rows); });
  }
  constexpr int kRounds = 21;
  std::vector<double> alone[std::size(kWays)], consumed[std::size(kWays)];
  volatile uint64_t sink = 0;
  for (int round = 0; round < kRounds; ++round) {
    for (size_t w = 0; w < std::size(kWays); ++w) {
      const double start = microseconds();
      copy(kWays[w], out, table, batches[round % batches.size()], row_bytes);
      const double copied = microseconds();
      sink = sink + read_all(out, tokens * row_bytes);
      alone[w].push_back(copied - start);
      consumed[w].push_back(microseconds() - start);
    }
  }
  for (size_t w = 0; w < std::size(kWays); ++w) {
    std::sort(alone[w].begin(), alone[w].end());
    std::sort(consumed[w].begin(), consumed[w].end());
    std::printf("%s;%.1f;%.1f\n", kWays[w].name, alone[w][kRounds / 2], consumed[w][kRounds / 2]);
  }
}
