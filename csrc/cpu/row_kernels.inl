// The bodies behind row_kernels.h. The including file defines EMBED_EXT_CAPABILITY (a namespace)
// and has already included every header, so that only what stands here is compiled for that
// instruction set: a standard-library inline built for AVX-512 could otherwise be the copy that
// the linker keeps for everybody.
namespace embed_ext::cpu::EMBED_EXT_CAPABILITY {
namespace {

// Whole cache lines past the caches: the line to be overwritten is then not read first, and what
// is in the caches stays there. to [bytes] aligned to a line, bytes a multiple of one.
inline void stream_lines(char* to, const char* from, int64_t bytes) {
#if defined(__x86_64__)
  for (int64_t at = 0; at < bytes; at += EMBED_EXT_VECTOR_BYTES) {
#if EMBED_EXT_VECTOR_BYTES == 64
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to + at), _mm512_loadu_si512(from + at));
#elif EMBED_EXT_VECTOR_BYTES == 32
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to + at),
                        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + at)));
#else
    _mm_stream_si128(reinterpret_cast<__m128i*>(to + at),
                     _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + at)));
#endif
  }
#else
  std::memcpy(to, from, bytes);
#endif
}

inline void stream_zeros(char* to, int64_t bytes) {
#if defined(__x86_64__)
  for (int64_t at = 0; at < bytes; at += EMBED_EXT_VECTOR_BYTES) {
#if EMBED_EXT_VECTOR_BYTES == 64
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to + at), _mm512_setzero_si512());
#elif EMBED_EXT_VECTOR_BYTES == 32
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to + at), _mm256_setzero_si256());
#else
    _mm_stream_si128(reinterpret_cast<__m128i*>(to + at), _mm_setzero_si128());
#endif
  }
#else
  std::memset(to, 0, bytes);
#endif
}

// Streamed stores are ordered with nothing: other threads may read what was copied after this.
inline void finish_streaming() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

enum class Store { kCached, kStreamed };

// Bytes is the row's size when it is one of the common small ones (the copy is then a few vector
// moves), and 0 when it is only known at run time.
template <int64_t Bytes, Store How, class Index>
void copy_rows(const GatherTask<Index>& task) {
  const int64_t row_bytes = Bytes > 0 ? Bytes : task.row_bytes;
  const Ahead ahead(row_bytes);
  const int64_t last = task.count > ahead.rows ? task.count - ahead.rows : 0;
  for (int64_t i = 0; i < task.count; ++i) {
    if (i < last) {
      prefetch_row(task.table + int64_t(task.indices[i + ahead.rows]) * task.table_stride,
                   row_bytes, ahead.bytes);
    }
    char* to = task.out + i * row_bytes;
    const char* from = task.table + int64_t(task.indices[i]) * task.table_stride;
    if constexpr (How == Store::kStreamed) {
      stream_lines(to, from, row_bytes);
    } else {
      std::memcpy(to, from, row_bytes);
    }
  }
  if constexpr (How == Store::kStreamed) {
    finish_streaming();
  }
}

// Accumulators of a token loop; they stay in registers, of which every instruction set has more.
constexpr int kMostVectors = 8;

// The tokens of one run, and what becomes of their sum.
template <class In, class Out, class TokenT>
struct RunSum {
  using Acc = AccumulatorOf<In>;
  const In* rows;
  int64_t row_stride;
  const TokenT* tokens;
  int64_t count;
  int64_t available;  // tokens from here on, those of the runs that follow included
  Acc divisor;
  bool add;
  Out* out;

  const In* row(int64_t k) const { return rows + int64_t(tokens[k].position) * row_stride; }

  // The rows of a run are scattered over grad_output. A first pass also fetches for the runs that
  // follow, most of which are short; a later one knows that its columns are not theirs.
  void prefetch(int64_t k, int64_t first, int64_t columns) const {
    const int64_t ahead = k + kPrefetchRows;
    if (ahead < (first == 0 ? available : count)) {
      prefetch_row(reinterpret_cast<const char*>(row(ahead) + first),
                   columns * int64_t(sizeof(In)));
    }
  }

  // `Vectors` vectors of columns: side by side from `first` on, except that the last one begins at
  // `last`, which lets it end with the row; what it shares with the one before is the same twice.
  template <int Vectors>
  void sum_vectors(int64_t first, int64_t last) const {
    Vec<Acc> acc[Vectors] = {};
    const auto column = [&](int v) { return v + 1 < Vectors ? first + v * kLanes<Acc> : last; };
    for (int64_t k = 0; k < count; ++k) {
      prefetch(k, first, last + kLanes<Acc> - first);
      const In* from = row(k);
      for (int v = 0; v < Vectors; ++v) {
        Vec<Acc> value;
        load(from + column(v), value);
        acc[v] += value;
      }
    }
    for (int v = 0; v < Vectors; ++v) {
      if (divisor != Acc(1)) {
        acc[v] /= divisor;
      }
      if (add) {
        Vec<Acc> old;
        load(out + column(v), old);
        acc[v] += old;
      }
    }
    for (int v = 0; v < Vectors; ++v) {
      store(acc[v], out + column(v));
    }
  }

  // Picks the template for a number of vectors from 1 to Most.
  template <int Most>
  void sum_vectors(int vectors, int64_t first, int64_t last) const {
    if constexpr (Most > 1) {
      if (vectors < Most) {
        return sum_vectors<Most - 1>(vectors, first, last);
      }
    }
    sum_vectors<Most>(first, last);
  }

  // A row shorter than a vector.
  void sum_short(int64_t width) const {
    Acc acc[kLanes<Acc>] = {};
    for (int64_t k = 0; k < count; ++k) {
      prefetch(k, 0, width);
      const In* from = row(k);
      for (int64_t j = 0; j < width; ++j) {
        acc[j] += static_cast<Acc>(from[j]);
      }
    }
    for (int64_t j = 0; j < width; ++j) {
      const Acc sum = divisor == Acc(1) ? acc[j] : acc[j] / divisor;
      out[j] = static_cast<Out>(add ? sum + static_cast<Acc>(out[j]) : sum);
    }
  }

  void sum(int64_t width) const {
    constexpr int64_t lanes = kLanes<Acc>;
    if (width < lanes) {
      return sum_short(width);
    }
    int64_t first = 0;
    for (int64_t left = width; left > 0; left = width - first) {
      int64_t vectors = (left + lanes - 1) / lanes;
      if (vectors > kMostVectors) {
        // Two are left at least, so that the overlap stays inside one call: a column that is
        // added to `out` twice would be wrong.
        vectors = vectors == kMostVectors + 1 ? kMostVectors - 1 : kMostVectors;
      }
      const int64_t full = first + vectors * lanes;
      const int64_t end = full < width ? full : width;
      sum_vectors<kMostVectors>(static_cast<int>(vectors), first, end - lanes);
      first = end;
    }
  }
};

template <class In, class Out, class TokenT>
void sum_run(const Run& run, const SumTask<TokenT>& task) {
  using Acc = AccumulatorOf<In>;
  const RunSum<In, Out, TokenT> sum{static_cast<const In*>(task.rows),
                                    task.row_stride,
                                    task.tokens + run.begin,
                                    run.count,
                                    task.token_count - run.begin,
                                    static_cast<Acc>(run.divisor),
                                    task.add,
                                    static_cast<Out*>(run.out)};
  if constexpr (std::is_same_v<In, Out>) {
    if (run.count == 1 && run.divisor == 1 && !task.add) {
      sum.prefetch(0, 0, task.width);
      const auto* from = reinterpret_cast<const char*>(sum.row(0));
      const auto bytes = task.width * int64_t(sizeof(In));
      if (task.streamed) {
        stream_lines(static_cast<char*>(run.out), from, bytes);
      } else {
        std::memcpy(run.out, from, bytes);
      }
      return;
    }
  }
  sum.sum(task.width);
}

}  // namespace

template <class Index>
void gather_rows(const GatherTask<Index>& task) {
  if (task.streamed) {
    return copy_rows<0, Store::kStreamed>(task);
  }
  switch (task.row_bytes) {
    case 16:
      return copy_rows<16, Store::kCached>(task);
    case 32:
      return copy_rows<32, Store::kCached>(task);
    case 64:
      return copy_rows<64, Store::kCached>(task);
    case 128:
      return copy_rows<128, Store::kCached>(task);
    case 256:
      return copy_rows<256, Store::kCached>(task);
    default:
      return copy_rows<0, Store::kCached>(task);
  }
}

template <class In, class Out, class TokenT>
void sum_runs(const SumTask<TokenT>& task) {
  const int64_t row_bytes = task.width * int64_t(sizeof(Out));
  const Ahead ahead(row_bytes);
  for (int64_t r = 0; r < task.run_count; ++r) {
    if (task.add && r + ahead.rows < task.run_count) {
      prefetch_row(static_cast<const char*>(task.runs[r + ahead.rows].out), row_bytes, ahead.bytes);
    }
    sum_run<In, Out>(task.runs[r], task);
  }
  if (task.streamed) {
    finish_streaming();
  }
}

void clear_rows(const ClearTask& task) {
  for (int64_t i = 0; i < task.count; ++i) {
    char* row = task.table + task.rows[i] * task.row_bytes;
    if (task.streamed) {
      stream_zeros(row, task.row_bytes);
    } else {
      std::memset(row, 0, task.row_bytes);
    }
  }
  if (task.streamed) {
    finish_streaming();
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
