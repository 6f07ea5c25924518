// logit_map: what a model does to each of its head's logits
//
//   y = CAP * tanh(x * MULTIPLIER / DIVISOR / CAP), each operation rounded to W as MLX rounds it
//
// The numbers are the bits of floats, 0 where an operation is left out. A map rises: in 16 bits all values
// were tried, and in float32 it may fail to rise by MAP_SLACK.

namespace flash_head {

constant constexpr float MAP_SLACK = 9.5367431640625e-7f;  // 8 spacings of float32, relative
constant constexpr float NEAR_CAP = 0.999999f;             // of a cap: its inverse ends there

template <typename W>
struct Spacing;
template <>
struct Spacing<float> {
  static float one() { return as_type<float>(0x34000000u); }
};
template <>
struct Spacing<half> {
  static float one() { return as_type<float>(0x3a800000u); }
};
template <>
struct Spacing<bfloat16_t> {
  static float one() { return as_type<float>(0x3c000000u); }
};

template <typename W, uint MULTIPLIER, uint DIVISOR, uint CAP>
struct LogitMap {
  typedef W Value;

  static bool identity() { return MULTIPLIER == 0 && DIVISOR == 0 && CAP == 0; }

  static float of(float x) {
    W y = to_finite<W>(x);
    if (MULTIPLIER != 0) {
      y = to_finite<W>(float(y) * as_type<float>(MULTIPLIER));
    }
    if (DIVISOR != 0) {
      y = to_finite<W>(float(y) / as_type<float>(DIVISOR));
    }
    if (CAP != 0) {
      y = to_finite<W>(float(y) / as_type<float>(CAP));
      y = W(precise::tanh(float(y)));
      y = W(float(y) * as_type<float>(CAP));
    }
    return float(y);
  }

  // The most that it stretches a distance.
  static float slope() {
    const float multiplier = MULTIPLIER != 0 ? as_type<float>(MULTIPLIER) : 1.0f;
    return DIVISOR != 0 ? multiplier / as_type<float>(DIVISOR) : multiplier;
  }

  // By how much the roundings of two values may move them apart, relative.
  static float rounding() {
    const int n = (MULTIPLIER != 0) + (DIVISOR != 0) + 3 * (CAP != 0);
    return float(n) * Spacing<W>::one();
  }

  static float slack() { return sizeof(W) == 4 && !identity() ? MAP_SLACK : 0.0f; }

  // An estimate of x.
  static float inverse(float y) {
    if (CAP != 0) {
      const float share = clamp(y / as_type<float>(CAP), -NEAR_CAP, NEAR_CAP);
      y = 0.5f * log((1.0f + share) / (1.0f - share)) * as_type<float>(CAP);
    }
    return y / slope();
  }
};

// Each of n values mapped, to compare with MLX's own operations.
template <typename Map, typename Values>
inline void map_values(Values values, device typename Map::Value* mapped, uint n, uint i) {
  if (i < n) {
    mapped[i] = typename Map::Value(Map::of(float(values[i])));
  }
}

}  // namespace flash_head
