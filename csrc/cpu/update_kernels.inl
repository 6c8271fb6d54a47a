// The bodies behind update_kernels.h, compiled as those of row_kernels.inl.
//
// A row is taken in blocks of 16 elements, whatever the vectors' length, and the last one is filled
// up with zeros: sums over a row are then the same 16 partial sums, folded in the same order,
// everywhere.
namespace embed_ext::cpu::EMBED_EXT_CAPABILITY {
namespace {

constexpr int64_t kBlock = 16;
template <class Acc>
constexpr int kParts = kBlock / kLanes<Acc>;

template <class Acc>
struct Block {
  Vec<Acc> part[kParts<Acc>];
};

// Whether a block is full and lies in memory without gaps.
inline bool is_whole(int64_t column_stride, int64_t count) {
  return count == kBlock && column_stride == 1;
}

template <class Acc, class T>
inline Block<Acc> load_whole(const T* from) {
  Block<Acc> to;
  for (int p = 0; p < kParts<Acc>; ++p) {
    load(from + p * kLanes<Acc>, to.part[p]);
  }
  return to;
}

// `count` elements, column_stride apart, and zeros.
template <class Acc, class T>
inline Block<Acc> load_block(const T* from, int64_t column_stride, int64_t count) {
  if (is_whole(column_stride, count)) {
    return load_whole<Acc>(from);
  }
  T filled[kBlock] = {};
  for (int64_t j = 0; j < count; ++j) {
    filled[j] = from[j * column_stride];
  }
  return load_whole<Acc>(filled);
}

template <class T, class Acc>
inline void store_block(const Block<Acc>& from, int64_t column_stride, int64_t count, T* to) {
  T filled[kBlock];
  T* const whole = is_whole(column_stride, count) ? to : filled;
  for (int p = 0; p < kParts<Acc>; ++p) {
    store(from.part[p], whole + p * kLanes<Acc>);
  }
  if (whole == filled) {
    for (int64_t j = 0; j < count; ++j) {
      to[j * column_stride] = filled[j];
    }
  }
}

inline Vec<float> square_root(const Vec<float>& x) {
#if EMBED_EXT_VECTOR_BYTES == 64
  // As in vectors.inl.
  return bits_as<Vec<float>>(_mm512_maskz_sqrt_ps(0xFFFF, bits_as<__m512>(x)));
#elif EMBED_EXT_VECTOR_BYTES == 32
  return bits_as<Vec<float>>(_mm256_sqrt_ps(bits_as<__m256>(x)));
#else
  Vec<float> root;
  for (int64_t lane = 0; lane < kLanes<float>; ++lane) {
    root[lane] = __builtin_sqrtf(x[lane]);
  }
  return root;
#endif
}

inline Vec<double> square_root(const Vec<double>& x) {
#if EMBED_EXT_VECTOR_BYTES == 64
  return bits_as<Vec<double>>(_mm512_maskz_sqrt_pd(0xFF, bits_as<__m512d>(x)));
#elif EMBED_EXT_VECTOR_BYTES == 32
  return bits_as<Vec<double>>(_mm256_sqrt_pd(bits_as<__m256d>(x)));
#else
  Vec<double> root;
  for (int64_t lane = 0; lane < kLanes<double>; ++lane) {
    root[lane] = __builtin_sqrt(x[lane]);
  }
  return root;
#endif
}

inline float square_root(float x) { return __builtin_sqrtf(x); }
inline double square_root(double x) { return __builtin_sqrt(x); }

#define EMBED_EXT_STEP inline
#include "../update_steps.inl"
#undef EMBED_EXT_STEP

// A vector of columns from this one on, as Randomness takes them.
inline Vec<uint32_t> columns_from(int64_t column) {
  Vec<uint32_t> columns;
  for (int64_t lane = 0; lane < kLanes<float>; ++lane) {
    columns[lane] = static_cast<uint32_t>(column + lane);
  }
  return columns;
}

inline Vec<float> select(const Vec<uint32_t>& mask, const Vec<float>& a, const Vec<float>& b) {
  const auto a_bits = bits_as<Vec<uint32_t>>(a), b_bits = bits_as<Vec<uint32_t>>(b);
  return bits_as<Vec<float>>((mask & a_bits) | (~mask & b_bits));
}

// x rounded down or up to a number that has `dropped` bits less, each as often as it is near; x
// itself beyond `largest`, which rounding up would overflow, for a NaN and for infinity.
inline Vec<float> dither(const Vec<float>& x, const Vec<uint32_t>& random, int dropped,
                         uint32_t largest) {
  const auto bits = bits_as<Vec<uint32_t>>(x);
  const uint32_t low = (1u << dropped) - 1;
  const auto dithered = bits_as<Vec<float>>((bits + (random & low)) & ~low);
  return select(Vec<uint32_t>((bits & 0x7FFFFFFFu) > largest), x, dithered);
}

inline Vec<float> dither_to(const c10::BFloat16* /*type*/, const Vec<float>& x,
                            const Vec<uint32_t>& random) {
  return dither(x, random, 16, 0x7F7F0000u);
}

inline Vec<float> dither_to(const c10::Half* /*type*/, const Vec<float>& x,
                            const Vec<uint32_t>& random) {
  const Vec<float> normal = dither(x, random, 13, 0x477FE000u);
  // Below 2^-14 the numbers of float16 are 2^-24 apart.
  const auto bits = bits_as<Vec<uint32_t>>(x);
  const auto is_small = Vec<uint32_t>((bits & 0x7FFFFFFFu) < 0x38800000u);
  const auto size = bits_as<Vec<float>>(bits & 0x7FFFFFFFu & is_small);
  const auto fraction = __builtin_convertvector(random >> 8, Vec<float>) * 0x1p-24f;
  const auto steps = __builtin_convertvector(size * 0x1p24f + fraction, Vec<int32_t>);
  const Vec<float> magnitude = __builtin_convertvector(steps, Vec<float>) * 0x1p-24f;
  const auto rounded = bits_as<Vec<uint32_t>>(magnitude) | (bits & 0x80000000u);
  return select(is_small, bits_as<Vec<float>>(rounded), normal);
}

template <class T, class Method>
struct RowUpdate {
  using Acc = typename Method::Acc;
  const UpdateTask& task;
  const Method& method;

  template <class U>
  static U* row_of(const Rows& rows, int64_t row) {
    return static_cast<U*>(rows.data) + row * rows.row_stride;
  }

  Block<Acc> load_gradient(const T* values, const Block<Acc>& weight, int64_t first,
                           int64_t count) const {
    const int64_t stride = task.values.column_stride;
    auto grad = load_block<Acc>(values + first * stride, stride, count);
    const auto& seen = method.gradient;
    for (int p = 0; p < kParts<Acc>; ++p) {
      grad.part[p] *= seen.sign;
      if (seen.weight_decay != Acc(0)) {  // an infinite weight times 0 is no number
        grad.part[p] += seen.weight_decay * weight.part[p];
      }
    }
    return grad;
  }

  // Calls f(first, count) for each block of a row.
  template <class F>
  void for_each_block(const F& f) const {
    for (int64_t first = 0; first < task.width; first += kBlock) {
      f(first, task.width - first < kBlock ? task.width - first : kBlock);
    }
  }

  Acc mean_square(const T* weight, const T* values) const {
    Block<Acc> sum = {};
    const int64_t stride = task.weight.column_stride;
    for_each_block([&](int64_t first, int64_t count) {
      const auto row = load_block<Acc>(weight + first * stride, stride, count);
      const auto grad = load_gradient(values, row, first, count);
      for (int p = 0; p < kParts<Acc>; ++p) {
        sum.part[p] += grad.part[p] * grad.part[p];
      }
    });
    Acc partial[kBlock];
    std::memcpy(partial, &sum, sizeof(partial));
    for (int64_t half = kBlock / 2; half > 0; half /= 2) {
      for (int64_t j = 0; j < half; ++j) {
        partial[j] += partial[j + half];
      }
    }
    return partial[0] / static_cast<Acc>(task.width);
  }

  void store_weight(Block<Acc>& block, int64_t row, int64_t first, int64_t count, T* to) const {
    if constexpr (sizeof(T) == 2) {
      if (task.stochastic) {
        const Randomness random(task.seed, row);
        for (int p = 0; p < kParts<Acc>; ++p) {
          const auto bits = random.of_columns(columns_from(first + p * kLanes<Acc>));
          block.part[p] = dither_to(to, block.part[p], bits);
        }
      }
    }
    store_block(block, task.weight.column_stride, count, to + first * task.weight.column_stride);
  }

  // The states of a block, as one vector for each of them.
  void step_block(Block<Acc>& weight, const Block<Acc>& grad, Block<Acc>* state, Acc spread) const {
    for (int p = 0; p < kParts<Acc>; ++p) {
      Vec<Acc> parts[Method::kStates + 1];
      for (int s = 0; s < Method::kStates; ++s) {
        parts[s] = state[s].part[p];
      }
      step(method, weight.part[p], grad.part[p], parts, spread);
      for (int s = 0; s < Method::kStates; ++s) {
        state[s].part[p] = parts[s];
      }
    }
  }

  // Calls f(state, its rows, where its elements from `first` on are) for each state of a row.
  template <class F>
  void for_each_state(int64_t row, int64_t first, Block<Acc>* state, const F& f) const {
    if constexpr (Method::kStates > 0) {
      for (const Rows& rows : method.state) {
        f(*state++, rows, row_of<Acc>(rows, row) + first * rows.column_stride);
      }
    }
  }

  void update(int64_t i) const {
    const int64_t row = task.indices[i], stride = task.weight.column_stride;
    T* weight = row_of<T>(task.weight, row);
    const T* values = row_of<const T>(task.values, i);
    Acc spread{};
    if constexpr (Method::kPerRow) {
      Acc* number = row_of<Acc>(method.per_row, row);
      spread = take_row(method, mean_square(weight, values), *number);
    }
    for_each_block([&](int64_t first, int64_t count) {
      auto block = load_block<Acc>(weight + first * stride, stride, count);
      const auto grad = load_gradient(values, block, first, count);
      Block<Acc> state[Method::kStates + 1];
      for_each_state(row, first, state, [&](Block<Acc>& loaded, const Rows& rows, const Acc* at) {
        loaded = load_block<Acc>(at, rows.column_stride, count);
      });
      step_block(block, grad, state, spread);
      for_each_state(row, first, state, [&](const Block<Acc>& changed, const Rows& rows, Acc* at) {
        store_block(changed, rows.column_stride, count, at);
      });
      store_weight(block, row, first, count, weight);
    });
  }

  // What the row of entry i has in memory, of which the hardware guesses nothing.
  void prefetch(int64_t i, int64_t most) const {
    const int64_t row = task.indices[i];
    prefetch_row(reinterpret_cast<const char*>(row_of<T>(task.weight, row)),
                 task.width * int64_t(sizeof(T)), most);
    if constexpr (Method::kStates > 0) {
      for (const auto& state : method.state) {
        prefetch_row(reinterpret_cast<const char*>(row_of<Acc>(state, row)),
                     task.width * int64_t(sizeof(Acc)), most);
      }
    }
    if constexpr (Method::kPerRow) {
      __builtin_prefetch(row_of<Acc>(method.per_row, row));
    }
  }
};

}  // namespace

template <class T, class Method>
void update_rows(const UpdateTask& task, const Method& method, int64_t begin, int64_t end) {
  const RowUpdate<T, Method> update{task, method};
  const Ahead ahead(task.width * int64_t(sizeof(T)));
  for (int64_t i = begin; i < end; ++i) {
    if (i + ahead.rows < task.count) {
      update.prefetch(i + ahead.rows, ahead.bytes);
    }
    update.update(i);
  }
}

#define EMBED_EXT_INSTANTIATE_UPDATE(T, Method) \
  template void update_rows<T>(const UpdateTask&, const Method&, int64_t, int64_t);
#define EMBED_EXT_INSTANTIATE_UPDATES(Method)                \
  EMBED_EXT_INSTANTIATE_UPDATE(float, Method<float>)         \
  EMBED_EXT_INSTANTIATE_UPDATE(double, Method<double>)       \
  EMBED_EXT_INSTANTIATE_UPDATE(c10::BFloat16, Method<float>) \
  EMBED_EXT_INSTANTIATE_UPDATE(c10::Half, Method<float>)
EMBED_EXT_INSTANTIATE_UPDATES(Sgd)
EMBED_EXT_INSTANTIATE_UPDATES(MomentumSgd)
EMBED_EXT_INSTANTIATE_UPDATES(Adagrad)
EMBED_EXT_INSTANTIATE_UPDATES(RowwiseAdagrad)
EMBED_EXT_INSTANTIATE_UPDATES(Adam)
EMBED_EXT_INSTANTIATE_UPDATES(RowwiseAdam)
#undef EMBED_EXT_INSTANTIATE_UPDATES
#undef EMBED_EXT_INSTANTIATE_UPDATE

}  // namespace embed_ext::cpu::EMBED_EXT_CAPABILITY
