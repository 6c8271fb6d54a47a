// Clearing a gradient through the caches (memset) and past them (streamed), with one thread.
//
// usage: clearing MIB. Prints lines "WHAT;MEMSET;STREAMED", microseconds: medians of clearing
// alone, with the pass of SGD over gradient and weight, and with clipping's two passes before that.
// The two ways take turns.
#include <immintrin.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

namespace {

constexpr int kRounds = 15;
constexpr const char* kSteps[] = {"clearing", "clearing, SGD", "clearing, clipping, SGD"};

double microseconds() {
  const auto now = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration<double, std::micro>(now).count();
}

void stream_zeros(float* to, int64_t count) {
  for (int64_t i = 0; i < count; i += 4) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(to + i), _mm_setzero_si128());
  }
  _mm_sfence();
}

float norm(const float* grad, int64_t count) {
  float sums[32] = {};
  for (int64_t i = 0; i < count; i += 32) {
    for (int64_t j = 0; j < 32; ++j) {
      sums[j] += grad[i + j] * grad[i + j];
    }
  }
  return *std::max_element(sums, sums + 32);
}

double one(bool streamed, int step, float* grad, float* weight, int64_t count) {
  const double start = microseconds();
  if (streamed) {
    stream_zeros(grad, count);
  } else {
    std::memset(grad, 0, count * sizeof(float));
  }
  if (step == 2) {
    const float scale = 1 / (norm(grad, count) + 1);
    for (int64_t i = 0; i < count; ++i) {
      grad[i] *= scale;
    }
  }
  if (step >= 1) {
    for (int64_t i = 0; i < count; ++i) {
      weight[i] -= 1e-6F * grad[i];
    }
  }
  return microseconds() - start;
}

float* floats(int64_t bytes) {
  auto* memory = static_cast<float*>(std::aligned_alloc(4096, bytes));
  std::memset(memory, 0, bytes);
  return memory;
}

double median(std::vector<double>& values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fprintf(stderr, "usage: clearing MIB\n");
    return 2;
  }
  const int64_t bytes = std::atoll(argv[1]) << 20;
  float* const grad = floats(bytes);
  float* const weight = floats(bytes);
  for (int step = 0; step < 3; ++step) {
    std::vector<double> times[2];
    for (int round = 0; round < kRounds; ++round) {
      for (const bool streamed : {false, true}) {
        times[streamed].push_back(
            one(streamed, step, grad, weight, bytes / static_cast<int64_t>(sizeof(float))));
      }
    }
    std::printf("%s;%.0f;%.0f\n", kSteps[step], median(times[0]), median(times[1]));
  }
  return 0;
}
