// What the methods of update_methods.h do to an element, and the random bits that it is rounded by,
// for every device. The including file defines EMBED_EXT_STEP, which its functions are declared
// with, and square_root() of what a step is made on: a number or a vector of them. It includes this
// in a namespace of its own, so that each device and instruction set compiles it with its own
// flags: CUDA's compiler may round a product and a sum at once, that of the CPU may not.

// One step of an element, or of a vector V of them. `spread` is what take_row() returned.
template <class Acc, class V>
EMBED_EXT_STEP void step(const Sgd<Acc>& method, V& weight, const V& grad, V* /*state*/,
                         Acc /*spread*/) {
  weight -= method.lr * grad;
}

template <class Acc, class V>
EMBED_EXT_STEP void step(const MomentumSgd<Acc>& method, V& weight, const V& grad, V* state,
                         Acc /*spread*/) {
  state[0] = method.momentum * state[0] + method.undamped * grad;
  weight -= method.lr * (method.nesterov ? grad + method.momentum * state[0] : state[0]);
}

template <class Acc, class V>
EMBED_EXT_STEP void step(const Adagrad<Acc>& method, V& weight, const V& grad, V* state,
                         Acc /*spread*/) {
  state[0] += grad * grad;
  weight -= method.lr * grad / (square_root(state[0]) + method.eps);
}

template <class Acc, class V>
EMBED_EXT_STEP void step(const RowwiseAdagrad<Acc>& method, V& weight, const V& grad, V* /*state*/,
                         Acc spread) {
  weight -= method.lr * grad / spread;
}

template <class Acc, class V>
EMBED_EXT_STEP void step(const Adam<Acc>& method, V& weight, const V& grad, V* state,
                         Acc /*spread*/) {
  const auto& rates = method.rates;
  state[0] += rates.beta1_left * (grad - state[0]);
  state[1] = rates.beta2 * state[1] + rates.beta2_left * (grad * grad);
  weight = weight * rates.kept -
           rates.step_size * state[0] / (square_root(state[1]) / rates.correction2 + rates.eps);
}

template <class Acc, class V>
EMBED_EXT_STEP void step(const RowwiseAdam<Acc>& method, V& weight, const V& grad, V* state,
                         Acc spread) {
  const auto& rates = method.rates;
  state[0] += rates.beta1_left * (grad - state[0]);
  weight = weight * rates.kept - rates.step_size * state[0] / spread;
}

// Adds a row's mean square to its number, and returns what its step is divided by.
template <class Acc>
EMBED_EXT_STEP Acc take_row(const RowwiseAdagrad<Acc>& method, Acc mean_square, Acc& number) {
  number += mean_square;
  return square_root(number) + method.eps;
}

template <class Acc>
EMBED_EXT_STEP Acc take_row(const RowwiseAdam<Acc>& method, Acc mean_square, Acc& number) {
  const auto& rates = method.rates;
  number = rates.beta2 * number + rates.beta2_left * mean_square;
  return square_root(number) / rates.correction2 + rates.eps;
}

// 32 random bits for each element, of the seed, the row and the column alone, so that the result
// does not depend on who computes it. Two rounds of multiplying and shifting (as integer hashes
// have them) spread a column over all bits.
struct Randomness {
  EMBED_EXT_STEP Randomness(uint64_t seed, int64_t row) {
    uint64_t key = seed + static_cast<uint64_t>(row) * 0x9E3779B97F4A7C15u;
    key = (key ^ (key >> 30)) * 0xBF58476D1CE4E5B9u;
    key = (key ^ (key >> 27)) * 0x94D049BB133111EBu;
    key ^= key >> 31;
    first = static_cast<uint32_t>(key);
    second = static_cast<uint32_t>(key >> 32);
  }

  // columns: their low 32 bits, of one of them or of a vector
  template <class U>
  EMBED_EXT_STEP U of_columns(const U& columns) const {
    U x = columns * 0x9E3779B9u + first;
    x = (x ^ (x >> 16)) * 0x7FEB352Du + second;
    x = (x ^ (x >> 15)) * 0x846CA68Bu;
    return x ^ (x >> 16);
  }

  uint32_t first, second;
};
