// mxfp4: MLX's mxfp4, e2m1 values and a power of two (e8m0) for each 32 of them; as MLX's fp_qmv

namespace flash_head {

template <int D, int WORDS, typename Words, typename Scales>
struct Mxfp4Rows {
  static constant constexpr const int VALUES = 8 * WORDS;
  static constant constexpr const int CHUNKS = D / VALUES;

  struct Chunk {
    uint words[WORDS];
    float scale;
  };

  Words weight;   // (rows, D/8) uint
  Scales scales;  // (rows, D/32) uchar

  Chunk load(size_t row, uint chunk) const {
    const size_t word = row * (D / 8) + WORDS * chunk;
    const uint exponent = uint(scales[row * (D / 32) + chunk * VALUES / 32]);
    Chunk loaded;
    FLASH_HEAD_UNROLL
    for (int i = 0; i < WORDS; i++) {
      loaded.words[i] = weight[word + i];
    }
    loaded.scale = as_type<float>(exponent == 0 ? 0x400000u : exponent << 23);
    return loaded;
  }

  template <typename Hidden>
  static float prepare(Hidden hidden, int, thread float* x) {
    FLASH_HEAD_UNROLL
    for (int i = 0; i < VALUES; i++) {
      x[i] = float(hidden[i]);
    }
    return 0.0f;
  }

  // The three low bits are the top of a half's magnitude without a factor of 2^14. A half, because
  // 0.5 needs its subnormal numbers, which are not flushed.
  static float product(Chunk chunk, const thread float* x, int i) {
    const uint q = chunk.words[i / 8] >> (4 * (i % 8));
    const float magnitude = float(as_type<half>(ushort((q & 7u) << 9))) * 16384.0f;
    return x[i] * ((q & 8u) ? -magnitude : magnitude);
  }

  static float add(Chunk chunk, const thread float* x, float, float total) {
    float accum = 0.0f;
    FLASH_HEAD_UNROLL
    for (int i = 0; i < VALUES; i += 4) {
      accum += product(chunk, x, i) + product(chunk, x, i + 1) + product(chunk, x, i + 2) +
          product(chunk, x, i + 3);
    }
    return total + chunk.scale * accum;
  }

  static float reduce(float total) { return simd_sum(total); }
};

template <int D, int WORDS, typename Words, typename Scales>
inline Mxfp4Rows<D, WORDS, Words, Scales> mxfp4_rows(Words weight, Scales scales) {
  return Mxfp4Rows<D, WORDS, Words, Scales>{weight, scales};
}

}  // namespace flash_head
