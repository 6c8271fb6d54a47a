// The bodies behind row_kernels.h. The including file defines EMBED_EXT_CAPABILITY (a namespace)
// and has already included every header, so that only what stands here is compiled for that
// instruction set: a standard-library inline built for AVX-512 could otherwise be the copy that
// the linker keeps for everybody.
namespace embed_ext::cpu::EMBED_EXT_CAPABILITY {
namespace {

// Elements summed at a time: 512 float32 accumulators are 2 KiB, which stay in the first-level
// cache while the rows stream past.
constexpr int64_t kBlock = 512;

// Rows fetched ahead of their use; table rows are scattered, so the hardware does not guess them.
constexpr int64_t kPrefetchRows = 16;
constexpr int64_t kPrefetchBytes = 256;  // of a row; the hardware streams in the rest

inline void prefetch_row(const char* row, int64_t row_bytes) {
  const int64_t bytes = row_bytes < kPrefetchBytes ? row_bytes : kPrefetchBytes;
  for (int64_t offset = 0; offset < bytes; offset += 64) {
    __builtin_prefetch(row + offset);
  }
}

// Bytes is the row's size when it is one of the common small ones (the copy is then a few vector
// moves), and 0 when it is only known at run time.
template <int64_t Bytes, class Index>
void copy_rows(const GatherTask<Index>& task) {
  const int64_t row_bytes = Bytes > 0 ? Bytes : task.row_bytes;
  const int64_t ahead = task.count > kPrefetchRows ? task.count - kPrefetchRows : 0;
  for (int64_t i = 0; i < task.count; ++i) {
    if (i < ahead) {
      prefetch_row(task.table + int64_t(task.indices[i + kPrefetchRows]) * task.table_stride,
                   row_bytes);
    }
    std::memcpy(task.out + i * row_bytes, task.table + int64_t(task.indices[i]) * task.table_stride,
                row_bytes);
  }
}

template <class In>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};

inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

inline float widen(float value) { return value; }
inline double widen(double value) { return value; }
inline float widen(c10::BFloat16 value) { return bits_to_float(uint32_t(value.x) << 16); }
inline float widen(c10::Half value) { return static_cast<float>(value); }

inline void narrow(float value, float* out) { *out = value; }
inline void narrow(double value, double* out) { *out = value; }
inline void narrow(float value, c10::Half* out) { *out = static_cast<c10::Half>(value); }

// Round to nearest, ties to even; a NaN stays one. Branch-free, so that the loop vectorises.
inline void narrow(float value, c10::BFloat16* out) {
  const uint32_t bits = float_to_bits(value);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  out->x = static_cast<uint16_t>(value != value ? 0x7FC0u : rounded);
}

template <class In, class Acc>
void add_row(Acc* __restrict acc, const In* __restrict row, int64_t width) {
  int64_t j = 0;
#if defined(EMBED_EXT_HAS_F16C)
  if constexpr (std::is_same_v<In, c10::Half>) {
    for (; j + 8 <= width; j += 8) {
      const auto half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + j));
      _mm256_storeu_ps(acc + j, _mm256_add_ps(_mm256_loadu_ps(acc + j), _mm256_cvtph_ps(half)));
    }
  }
#endif
  for (; j < width; ++j) {
    acc[j] += widen(row[j]);
  }
}

template <class Out, class Acc>
void store_row(Out* __restrict out, const Acc* __restrict acc, int64_t width) {
  int64_t j = 0;
#if defined(EMBED_EXT_HAS_F16C)
  if constexpr (std::is_same_v<Out, c10::Half>) {
    for (; j + 8 <= width; j += 8) {
      const auto half =
          _mm256_cvtps_ph(_mm256_loadu_ps(acc + j), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + j), half);
    }
  }
#endif
  for (; j < width; ++j) {
    narrow(acc[j], out + j);
  }
}

template <class In, class Out, class TokenT>
void sum_run(const Run& run, const SumTask<TokenT>& task) {
  using Acc = typename AccumulatorOf<In>::type;
  const auto* rows = static_cast<const In*>(task.rows);
  auto* out = static_cast<Out*>(run.out);
  const TokenT* tokens = task.tokens + run.begin;
  if constexpr (std::is_same_v<In, Out>) {
    if (run.count == 1 && run.divisor == 1) {
      std::memcpy(out, rows + int64_t(tokens[0].position) * task.row_stride,
                  task.width * sizeof(In));
      return;
    }
  }
  Acc acc[kBlock];
  for (int64_t first = 0; first < task.width; first += kBlock) {
    const int64_t width = task.width - first < kBlock ? task.width - first : kBlock;
    for (int64_t j = 0; j < width; ++j) {
      acc[j] = Acc(0);
    }
    for (int64_t k = 0; k < run.count; ++k) {
      add_row(acc, rows + int64_t(tokens[k].position) * task.row_stride + first, width);
    }
    if (run.divisor != 1) {
      for (int64_t j = 0; j < width; ++j) {
        acc[j] /= static_cast<Acc>(run.divisor);
      }
    }
    store_row(out + first, acc, width);
  }
}

}  // namespace

template <class Index>
void gather_rows(const GatherTask<Index>& task) {
  switch (task.row_bytes) {
    case 16:
      return copy_rows<16>(task);
    case 32:
      return copy_rows<32>(task);
    case 64:
      return copy_rows<64>(task);
    case 128:
      return copy_rows<128>(task);
    case 256:
      return copy_rows<256>(task);
    default:
      return copy_rows<0>(task);
  }
}

template <class In, class Out, class TokenT>
void sum_runs(const SumTask<TokenT>& task) {
  const auto* rows = static_cast<const char*>(task.rows);
  const int64_t stride = task.row_stride * int64_t(sizeof(In));
  const int64_t row_bytes = task.width * int64_t(sizeof(In));
  for (int64_t r = 0; r < task.run_count; ++r) {
    if (r + kPrefetchRows < task.run_count) {
      const int64_t token = task.runs[r + kPrefetchRows].begin;
      prefetch_row(rows + int64_t(task.tokens[token].position) * stride, row_bytes);
    }
    sum_run<In, Out>(task.runs[r], task);
  }
}

template void gather_rows(const GatherTask<int32_t>&);
template void gather_rows(const GatherTask<int64_t>&);

#define EMBED_EXT_INSTANTIATE_SUM(In, Out)                \
  template void sum_runs<In, Out>(const SumTask<Token>&); \
  template void sum_runs<In, Out>(const SumTask<WideToken>&);
EMBED_EXT_INSTANTIATE_SUM(float, float)
EMBED_EXT_INSTANTIATE_SUM(double, double)
EMBED_EXT_INSTANTIATE_SUM(c10::BFloat16, c10::BFloat16)
EMBED_EXT_INSTANTIATE_SUM(c10::BFloat16, float)
EMBED_EXT_INSTANTIATE_SUM(float, c10::BFloat16)
EMBED_EXT_INSTANTIATE_SUM(c10::Half, c10::Half)
EMBED_EXT_INSTANTIATE_SUM(c10::Half, float)
EMBED_EXT_INSTANTIATE_SUM(float, c10::Half)
#undef EMBED_EXT_INSTANTIATE_SUM

}  // namespace embed_ext::cpu::EMBED_EXT_CAPABILITY
