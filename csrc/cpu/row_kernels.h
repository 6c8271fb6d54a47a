// The inner loops of the CPU kernels, compiled once for each CPU capability and picked at run time.
//
// row_kernels.inl holds the only source. row_kernels_{portable,avx2,avx512}.cpp compile it under
// different instruction sets, each in a namespace of its own, so one binary runs everywhere.
#pragma once

#include <cstdint>

namespace embed_ext::cpu {

// The best instruction set of this machine that the binary has code for.
enum class Capability { kPortable, kAvx2, kAvx512 };
Capability capability();
// Whether its cores clear large memory faster by streamed stores than by memset.
bool streams_zeros_faster();
const char* capability_name(Capability value);

// A lookup: out row i is table row indices[i].
template <class Index>
struct GatherTask {
  char* out;             // [count, row_bytes]
  const char* table;     // [V, row_bytes], rows table_stride bytes apart
  const Index* indices;  // [count], all inside the table
  int64_t count;
  int64_t row_bytes;
  int64_t table_stride;
  bool streamed;  // past the caches; row_bytes is then a multiple of 64, and out aligned to that
};

// One token of a batch: the table row that it names and where it stands in the batch.
template <class Id>
struct TokenOf {
  Id row;
  Id position;
};
using Token = TokenOf<uint32_t>;
using WideToken = TokenOf<int64_t>;  // for 2^32 rows or tokens and more

// Tokens [begin, begin + count) all name one row; their summed gradient over divisor goes to out.
struct Run {
  void* out;  // [D]
  int64_t begin;
  int64_t count;
  int64_t divisor;
};

// out of each run = (sum of its tokens' rows) / divisor, or if `add` is set what out held plus
// that. Added in token order, in float32 or for double in double, and rounded once.
template <class TokenT>
struct SumTask {
  const Run* runs;
  int64_t run_count;
  const TokenT* tokens;
  int64_t token_count;  // those of runs that are not in `runs` included: what may be fetched ahead
  const void* rows;     // [N, D] of In, rows row_stride elements apart
  int64_t row_stride;
  int64_t width;  // D
  bool add;
  bool streamed;  // rows that are only copied go past the caches; as in GatherTask
};

// Rows of a table to be set to zero.
struct ClearTask {
  char* table;          // [V, row_bytes]
  const int64_t* rows;  // [count]
  int64_t count;
  int64_t row_bytes;
  bool streamed;  // as in GatherTask
};

#define EMBED_EXT_DECLARE_ROW_KERNELS(ns)      \
  namespace ns {                               \
  template <class Index>                       \
  void gather_rows(const GatherTask<Index>&);  \
  template <class In, class Out, class TokenT> \
  void sum_runs(const SumTask<TokenT>&);       \
  void clear_rows(const ClearTask&);           \
  }
EMBED_EXT_DECLARE_ROW_KERNELS(portable)
#if defined(__x86_64__)
EMBED_EXT_DECLARE_ROW_KERNELS(avx2)
EMBED_EXT_DECLARE_ROW_KERNELS(avx512)
#endif
#undef EMBED_EXT_DECLARE_ROW_KERNELS

template <class Index>
void gather_rows(const GatherTask<Index>& task) {
  switch (capability()) {
#if defined(__x86_64__)
    case Capability::kAvx512:
      return avx512::gather_rows(task);
    case Capability::kAvx2:
      return avx2::gather_rows(task);
#endif
    default:
      return portable::gather_rows(task);
  }
}

template <class In, class Out, class TokenT>
void sum_runs(const SumTask<TokenT>& task) {
  switch (capability()) {
#if defined(__x86_64__)
    case Capability::kAvx512:
      return avx512::sum_runs<In, Out>(task);
    case Capability::kAvx2:
      return avx2::sum_runs<In, Out>(task);
#endif
    default:
      return portable::sum_runs<In, Out>(task);
  }
}

inline void clear_rows(const ClearTask& task) {
  switch (capability()) {
#if defined(__x86_64__)
    case Capability::kAvx512:
      return avx512::clear_rows(task);
    case Capability::kAvx2:
      return avx2::clear_rows(task);
#endif
    default:
      return portable::clear_rows(task);
  }
}

// From here on, what is written displaces most of what the caches hold long before anybody reads
// it, so that it better goes past them. Measured with a consumer that reads all of it.
constexpr int64_t kStreamBytes = int64_t(16) << 20;
// The same for zeros: of less, whoever passes over the gradient next finds more in the caches than
// streaming saves.
constexpr int64_t kStreamZerosBytes = int64_t(32) << 20;

constexpr int64_t kCacheLine = 64;

inline bool begins_a_cache_line(const void* data) {
  return reinterpret_cast<uintptr_t>(data) % kCacheLine == 0;
}

// Whether rows [..., row_bytes] at `out`, `bytes` in all, can and should be streamed.
inline bool worth_streaming(const void* out, int64_t bytes, int64_t row_bytes) {
  return bytes >= kStreamBytes && row_bytes % kCacheLine == 0 && begins_a_cache_line(out);
}

// Whether memory of `bytes` from `data` on can and should be cleared past the caches.
inline bool worth_streaming_zeros(const void* data, int64_t bytes) {
  return bytes >= kStreamZerosBytes && streams_zeros_faster() && begins_a_cache_line(data);
}

}  // namespace embed_ext::cpu
