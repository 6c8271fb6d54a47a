// Vectors of elements, for the inner loops of row_kernels.inl and update_kernels.inl. As these it
// is included once for each instruction set, inside a namespace of its own.
namespace embed_ext::cpu::EMBED_EXT_CAPABILITY {
namespace {

// Rows fetched ahead of their use; table rows are scattered, so the hardware does not guess them.
constexpr int64_t kPrefetchRows = 16;
constexpr int64_t kPrefetchBytes = 256;  // of a row; the hardware streams in the rest
// A table of long rows: fewer of them, further in.
constexpr int64_t kPrefetchLongRows = 4;
constexpr int64_t kLongRowBytes = 1024;

// How far ahead rows of a table are fetched: those to be read, and those to be added to.
struct Ahead {
  explicit Ahead(int64_t row_bytes) {
    if (row_bytes >= kLongRowBytes) {
      rows = kPrefetchLongRows;
      bytes = kLongRowBytes;
    }
  }
  int64_t rows = kPrefetchRows;
  int64_t bytes = kPrefetchBytes;
};

inline void prefetch_row(const char* row, int64_t row_bytes, int64_t most = kPrefetchBytes) {
  const int64_t bytes = row_bytes < most ? row_bytes : most;
  for (int64_t offset = 0; offset < bytes; offset += 64) {
    __builtin_prefetch(row + offset);
  }
}

template <class T>
using Vec __attribute__((vector_size(EMBED_EXT_VECTOR_BYTES))) = T;
template <class T>
using HalfVec __attribute__((vector_size(EMBED_EXT_VECTOR_BYTES / 2))) = T;

template <class Acc>
constexpr int64_t kLanes = EMBED_EXT_VECTOR_BYTES / int64_t(sizeof(Acc));

template <class In>
using AccumulatorOf = std::conditional_t<std::is_same_v<In, double>, double, float>;

// The same bits as another type.
template <class To, class From>
inline To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// One vector of elements as accumulators, and back. Unaligned: a row may start anywhere.
inline void load(const float* from, Vec<float>& to) { std::memcpy(&to, from, sizeof(to)); }
inline void load(const double* from, Vec<double>& to) { std::memcpy(&to, from, sizeof(to)); }
inline void store(const Vec<float>& from, float* to) { std::memcpy(to, &from, sizeof(from)); }
inline void store(const Vec<double>& from, double* to) { std::memcpy(to, &from, sizeof(from)); }

inline void load(const c10::BFloat16* from, Vec<float>& to) {
  HalfVec<uint16_t> bits;
  std::memcpy(&bits, from, sizeof(bits));
  to = bits_as<Vec<float>>(__builtin_convertvector(bits, Vec<uint32_t>) << 16);
}

// Rounds to nearest, ties to even; a NaN stays one.
inline void store(const Vec<float>& from, c10::BFloat16* to) {
  const auto bits = bits_as<Vec<uint32_t>>(from);
  const Vec<uint32_t> rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  const auto nan_mask = bits_as<Vec<uint32_t>>(from != from);
  const auto chosen = (nan_mask & 0x7FC0u) | (~nan_mask & rounded);
  const auto narrow = __builtin_convertvector(chosen, HalfVec<uint16_t>);
  std::memcpy(to, &narrow, sizeof(narrow));
}

inline void load(const c10::Half* from, Vec<float>& to) {
#if EMBED_EXT_VECTOR_BYTES == 64
  const auto bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  // The plain form warns in GCC 12.
  to = bits_as<Vec<float>>(_mm512_maskz_cvtph_ps(0xFFFF, bits));
#elif EMBED_EXT_VECTOR_BYTES == 32
  const auto bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  to = bits_as<Vec<float>>(_mm256_cvtph_ps(bits));
#else
  for (int64_t lane = 0; lane < kLanes<float>; ++lane) {
    to[lane] = static_cast<float>(from[lane]);
  }
#endif
}

inline void store(const Vec<float>& from, c10::Half* to) {
#if EMBED_EXT_VECTOR_BYTES == 64
  const auto narrow =
      _mm512_maskz_cvtps_ph(0xFFFF, bits_as<__m512>(from), _MM_FROUND_TO_NEAREST_INT);
  std::memcpy(to, &narrow, sizeof(narrow));
#elif EMBED_EXT_VECTOR_BYTES == 32
  const auto narrow = _mm256_cvtps_ph(bits_as<__m256>(from), _MM_FROUND_TO_NEAREST_INT);
  std::memcpy(to, &narrow, sizeof(narrow));
#else
  for (int64_t lane = 0; lane < kLanes<float>; ++lane) {
    to[lane] = static_cast<c10::Half>(from[lane]);
  }
#endif
}

}  // namespace
}  // namespace embed_ext::cpu::EMBED_EXT_CAPABILITY
