// fp: MLX's mxfp4, nvfp4 and mxfp8, as its fp_qmv: values of 4 bits (e2m1) or 8 (e4m3), and a scale
// of 8 bits for each GROUP of them: e4m3 where these are 16, else a power of two (e8m0)

namespace flash_head {

// As a half, because its subnormal numbers are not flushed.
inline float e4m3(uint bits) {
  const uint magnitude = bits & 127u;
  const uint half_bits =
      (magnitude << 7) | (((magnitude + 1u) >> 7) << 14) | ((bits & 128u) << 8);
  return float(as_type<half>(ushort(half_bits)) * half(256.0f));
}

// The three low bits are the top of a half's magnitude without a factor of 2^14.
inline float e2m1(uint bits) {
  const float magnitude = float(as_type<half>(ushort((bits & 7u) << 9)) * half(16384.0f));
  return (bits & 8u) ? -magnitude : magnitude;
}

inline float e8m0(uint bits) { return as_type<float>(bits == 0 ? 0x400000u : bits << 23); }

template <int D, int BITS, int GROUP, int WORDS, typename Words, typename Scales>
struct FpRows {
  static constant constexpr const int PER_WORD = 32 / BITS;
  static constant constexpr const int VALUES = PER_WORD * WORDS;
  static constant constexpr const int CHUNKS = D / VALUES;

  struct Chunk {
    uint words[WORDS];
    float scale;
  };

  Words weight;   // (rows, D*BITS/32) uint
  Scales scales;  // (rows, D/GROUP) uchar

  Chunk load(size_t row, uint chunk) const {
    const size_t word = row * (D / PER_WORD) + WORDS * chunk;
    const uint bits = uint(scales[row * (D / GROUP) + chunk * VALUES / GROUP]);
    Chunk loaded;
    FLASH_HEAD_UNROLL
    for (int i = 0; i < WORDS; i++) {
      loaded.words[i] = weight[word + i];
    }
    loaded.scale = GROUP == 16 ? e4m3(bits) : e8m0(bits);
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

  // Expressions of the shape of MLX's; see affine.h.
  static float dot(Chunk chunk, const thread float* x) {
    float accum = 0.0f;
    FLASH_HEAD_UNROLL
    for (int i = 0; i < VALUES; i += 4) {
      const uint q = chunk.words[i / PER_WORD] >> (BITS * (i % PER_WORD));
      if (BITS == 4) {
        accum +=
            (x[i] * e2m1(q) + x[i + 1] * e2m1(q >> 4) + x[i + 2] * e2m1(q >> 8) +
             x[i + 3] * e2m1(q >> 12));
      } else {
        accum += x[i] * e4m3(q & 0xffu);
        accum += x[i + 1] * e4m3((q >> 8) & 0xffu);
        accum += x[i + 2] * e4m3((q >> 16) & 0xffu);
        accum += x[i + 3] * e4m3(q >> 24);
      }
    }
    return chunk.scale * accum;
  }

  static float add(Chunk chunk, const thread float* x, float, float total) {
    return total + dot(chunk, x);
  }

  static float reduce(float total) { return simd_sum(total); }
};

template <int D, int BITS, int GROUP, int WORDS, typename Words, typename Scales>
inline FpRows<D, BITS, GROUP, WORDS, Words, Scales> fp_rows(Words weight, Scales scales) {
  return FpRows<D, BITS, GROUP, WORDS, Words, Scales>{weight, scales};
}

}  // namespace flash_head
