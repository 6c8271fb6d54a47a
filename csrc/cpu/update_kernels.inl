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

// `count` elements, column_stride apart, and zeros.
template <class Acc, class T>
inline Block<Acc> load_block(const T* from, int64_t column_stride, int64_t count) {
  T filled[kBlock] = {};
  if (count < kBlock || column_stride != 1) {
    for (int64_t j = 0; j < count; ++j) {
      filled[j] = from[j * column_stride];
    }
    from = filled;
  }
  Block<Acc> to = {};
  for (int p = 0; p < kParts<Acc>; ++p) {
    load(from + p * kLanes<Acc>, to.part[p]);
  }
  return to;
}

template <class T, class Acc>
inline void store_block(const Block<Acc>& from, int64_t column_stride, int64_t count, T* to) {
  T filled[kBlock];
  T* const whole = count < kBlock || column_stride != 1 ? filled : to;
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
  Vec<float> root;
#if EMBED_EXT_VECTOR_BYTES == 64
  const __m512 value = _mm512_maskz_sqrt_ps(0xFFFF, _mm512_loadu_ps(&x));  // as in vectors.inl
  std::memcpy(&root, &value, sizeof(root));
#elif EMBED_EXT_VECTOR_BYTES == 32
  const __m256 value = _mm256_sqrt_ps(_mm256_loadu_ps(reinterpret_cast<const float*>(&x)));
  std::memcpy(&root, &value, sizeof(root));
#else
  for (int64_t lane = 0; lane < kLanes<float>; ++lane) {
    root[lane] = __builtin_sqrtf(x[lane]);
  }
#endif
  return root;
}

inline Vec<double> square_root(const Vec<double>& x) {
  Vec<double> root;
#if EMBED_EXT_VECTOR_BYTES == 64
  const __m512d value = _mm512_maskz_sqrt_pd(0xFF, _mm512_loadu_pd(&x));
  std::memcpy(&root, &value, sizeof(root));
#elif EMBED_EXT_VECTOR_BYTES == 32
  const __m256d value = _mm256_sqrt_pd(_mm256_loadu_pd(reinterpret_cast<const double*>(&x)));
  std::memcpy(&root, &value, sizeof(root));
#else
  for (int64_t lane = 0; lane < kLanes<double>; ++lane) {
    root[lane] = __builtin_sqrt(x[lane]);
  }
#endif
  return root;
}

inline float square_root(float x) { return __builtin_sqrtf(x); }
inline double square_root(double x) { return __builtin_sqrt(x); }

// 32 random bits for each element, of the seed, the row and the column alone, so that the result
// does not depend on who computes it. Two rounds of multiplying and shifting (as integer hashes
// have them) spread a column over all bits.
struct Randomness {
  Randomness(uint64_t seed, int64_t row) {
    uint64_t key = seed + static_cast<uint64_t>(row) * 0x9E3779B97F4A7C15u;
    key = (key ^ (key >> 30)) * 0xBF58476D1CE4E5B9u;
    key = (key ^ (key >> 27)) * 0x94D049BB133111EBu;
    key ^= key >> 31;
    first = static_cast<uint32_t>(key);
    second = static_cast<uint32_t>(key >> 32);
  }

  Vec<uint32_t> of_columns(int64_t column) const {
    Vec<uint32_t> x;
    for (int64_t lane = 0; lane < kLanes<float>; ++lane) {
      x[lane] = static_cast<uint32_t>(column + lane);
    }
    x = x * 0x9E3779B9u + first;
    x = (x ^ (x >> 16)) * 0x7FEB352Du + second;
    x = (x ^ (x >> 15)) * 0x846CA68Bu;
    return x ^ (x >> 16);
  }

  uint32_t first, second;
};

inline Vec<float> select(const Vec<uint32_t>& mask, const Vec<float>& a, const Vec<float>& b) {
  Vec<uint32_t> a_bits, b_bits;
  std::memcpy(&a_bits, &a, sizeof(a));
  std::memcpy(&b_bits, &b, sizeof(b));
  const Vec<uint32_t> bits = (mask & a_bits) | (~mask & b_bits);
  Vec<float> chosen;
  std::memcpy(&chosen, &bits, sizeof(bits));
  return chosen;
}

// x rounded down or up to a number that has `dropped` bits less, each as often as it is near; x
// itself beyond `largest`, which rounding up would overflow, for a NaN and for infinity.
inline Vec<float> dither(const Vec<float>& x, const Vec<uint32_t>& random, int dropped,
                         uint32_t largest) {
  Vec<uint32_t> bits;
  std::memcpy(&bits, &x, sizeof(x));
  const uint32_t low = (1u << dropped) - 1;
  const Vec<uint32_t> moved = (bits + (random & low)) & ~low;
  Vec<float> dithered;
  std::memcpy(&dithered, &moved, sizeof(moved));
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
  Vec<uint32_t> bits;
  std::memcpy(&bits, &x, sizeof(x));
  const auto is_small = Vec<uint32_t>((bits & 0x7FFFFFFFu) < 0x38800000u);
  const Vec<uint32_t> size = bits & 0x7FFFFFFFu & is_small;
  Vec<float> scaled;
  std::memcpy(&scaled, &size, sizeof(size));
  const auto fraction = __builtin_convertvector(random >> 8, Vec<float>) * 0x1p-24f;
  const auto steps = __builtin_convertvector(scaled * 0x1p24f + fraction, Vec<int32_t>);
  const Vec<float> magnitude = __builtin_convertvector(steps, Vec<float>) * 0x1p-24f;
  Vec<uint32_t> rounded;
  std::memcpy(&rounded, &magnitude, sizeof(magnitude));
  rounded |= bits & 0x80000000u;
  Vec<float> small;
  std::memcpy(&small, &rounded, sizeof(rounded));
  return select(is_small, small, normal);
}

// One vector of a row, its gradient and its states, by each method.
template <class Acc, class V>
void step(const Sgd<Acc>& method, V& weight, const V& grad, V* /*state*/, Acc /*spread*/) {
  weight -= method.lr * grad;
}

template <class Acc, class V>
void step(const MomentumSgd<Acc>& method, V& weight, const V& grad, V* state, Acc /*spread*/) {
  state[0] = method.momentum * state[0] + method.undamped * grad;
  weight -= method.lr * (method.nesterov ? grad + method.momentum * state[0] : state[0]);
}

template <class Acc, class V>
void step(const Adagrad<Acc>& method, V& weight, const V& grad, V* state, Acc /*spread*/) {
  state[0] += grad * grad;
  weight -= method.lr * grad / (square_root(state[0]) + method.eps);
}

template <class Acc, class V>
void step(const RowwiseAdagrad<Acc>& method, V& weight, const V& grad, V* /*state*/, Acc spread) {
  weight -= method.lr * grad / spread;
}

template <class Acc, class V>
void step(const Adam<Acc>& method, V& weight, const V& grad, V* state, Acc /*spread*/) {
  const auto& rates = method.rates;
  state[0] += rates.beta1_left * (grad - state[0]);
  state[1] = rates.beta2 * state[1] + rates.beta2_left * (grad * grad);
  weight = weight * rates.kept -
           rates.step_size * state[0] / (square_root(state[1]) / rates.correction2 + rates.eps);
}

template <class Acc, class V>
void step(const RowwiseAdam<Acc>& method, V& weight, const V& grad, V* state, Acc spread) {
  const auto& rates = method.rates;
  state[0] += rates.beta1_left * (grad - state[0]);
  weight = weight * rates.kept - rates.step_size * state[0] / spread;
}

// Adds a row's mean square to its number, and returns what its step is divided by.
template <class Acc>
Acc take_row(const RowwiseAdagrad<Acc>& method, Acc mean_square, Acc& number) {
  number += mean_square;
  return square_root(number) + method.eps;
}

template <class Acc>
Acc take_row(const RowwiseAdam<Acc>& method, Acc mean_square, Acc& number) {
  const auto& rates = method.rates;
  number = rates.beta2 * number + rates.beta2_left * mean_square;
  return square_root(number) / rates.correction2 + rates.eps;
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
          const auto bits = random.of_columns(first + p * kLanes<Acc>);
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
