// affine: MLX's affine form, 4 or 8 bits: value = scale * q + bias
//
// A row is cut into chunks of VALUES values, and lane l of a simdgroup takes the chunks l, l + 32,
// ...: one read of the simdgroup covers consecutive bytes. A chunk lies within one quantization
// group. Each format can
//   load      read a chunk of one row,
//   prepare   bring the hidden values that meet it into registers, and return their sum,
//   add       multiply the two, and add that to a lane's total,
//   reduce    add up the lanes' totals.
// Chunks, order and association of all sums are those of MLX's kernel, qmv_fast with 2 words to a
// chunk, qmv with 1 (of MLX 0.32.4; up to 0.32.2 it added four hidden values in their own dtype, not
// in float32). As there, a q is masked in place within its 16 bits. Instead of a shift, `prepare`
// divides its hidden value by 2^shift, exactly.

namespace flash_head {

template <int D, int BITS, int GROUP, int WORDS, typename Words, typename Scales>
struct AffineRows {
  static constant constexpr const int VALUES = WORDS * 32 / BITS;
  static constant constexpr const int CHUNKS = D / VALUES;
  static constant constexpr const int PER_HALF = 16 / BITS;
  static constant constexpr const uint MASK = (1u << BITS) - 1u;

  struct Chunk {
    uint words[WORDS];
    float scale;
    float bias;
  };

  Words weight;   // (rows, D*BITS/32) uint
  Scales scales;  // (rows, D/GROUP)
  Scales biases;

  Chunk load(size_t row, uint chunk) const {
    const size_t word = row * (D * BITS / 32) + WORDS * chunk;
    const size_t group = row * (D / GROUP) + chunk * VALUES / GROUP;
    Chunk loaded;
    FLASH_HEAD_UNROLL
    for (int i = 0; i < WORDS; i++) {
      loaded.words[i] = weight[word + i];
    }
    loaded.scale = float(scales[group]);
    loaded.bias = float(biases[group]);
    return loaded;
  }

  template <typename Hidden>
  static float prepare(Hidden hidden, int, thread float* x) {
    float sum = 0.0f;
    FLASH_HEAD_UNROLL
    for (int i = 0; i < VALUES; i++) {
      x[i] = float(hidden[i]) * (1.0f / float(1u << (BITS * (i % PER_HALF))));
      if (BITS == 8) {
        sum += float(hidden[i]);
      } else if (i % 4 == 3) {
        sum += float(hidden[i - 3]) + float(hidden[i - 2]) + float(hidden[i - 1]) +
            float(hidden[i]);
      }
    }
    return sum;
  }

  static float product(Chunk chunk, const thread float* x, int i) {
    const uint half_word = chunk.words[i / (32 / BITS)] >> (16 * (i / PER_HALF % 2));
    return x[i] * float(half_word & (MASK << (BITS * (i % PER_HALF))));
  }

  static float add(Chunk chunk, const thread float* x, float sum, float total) {
    float accum = 0.0f;
    FLASH_HEAD_UNROLL
    for (int i = 0; i < VALUES; i += 4) {
      if (BITS == 8) {
        accum += product(chunk, x, i);
        accum += product(chunk, x, i + 1);
        accum += product(chunk, x, i + 2);
        accum += product(chunk, x, i + 3);
      } else {
        accum += product(chunk, x, i) + product(chunk, x, i + 1) + product(chunk, x, i + 2) +
            product(chunk, x, i + 3);
      }
    }
    return total + (chunk.scale * accum + sum * chunk.bias);
  }

  static float reduce(float total) { return simd_sum(total); }
};

template <int D, int BITS, int GROUP, int WORDS, typename Words, typename Scales>
inline AffineRows<D, BITS, GROUP, WORDS, Words, Scales> affine_rows(
    Words weight, Scales scales, Scales biases) {
  return AffineRows<D, BITS, GROUP, WORDS, Words, Scales>{weight, scales, biases};
}

}  // namespace flash_head
