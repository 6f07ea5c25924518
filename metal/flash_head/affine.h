// affine: MLX's affine form, 4, 5, 6 or 8 bits: value = scale * q + bias
//
// A row is cut into chunks of VALUES values, and lane l of a simdgroup takes the chunks l, l + 32,
// ...: one read of the simdgroup covers consecutive bytes. A chunk lies within one quantization
// group. Each format can
//   load      read a chunk of one row,
//   prepare   bring the hidden values that meet it into registers, and return their sum,
//   add       multiply the two, and add that to a lane's total,
//   reduce    add up the lanes' totals.
// Chunks, order and association of all sums are those of MLX's kernel, qmv_fast with 2 packs to a
// chunk, qmv with 1. Sum is the type in which some hidden values are added up before they go on in
// float32: up to MLX 0.32.3 that of the product, from 0.32.4 on float32. So is the shape of each expression, since a compiler contracts a product and a sum
// within an expression: what is one expression there is one here, and what a function returns there
// is returned here. As there, a q is masked in place within its byte, of 4 bits within its 16 bits.
// Instead of a shift, `prepare` divides its hidden value by 2^shift, exactly.

namespace flash_head {

template <int D, int BITS, int GROUP, int WORDS, typename Sum, typename Words, typename Scales>
struct AffineRows {
  static constant constexpr const int PACK = BITS == 5 ? 8 : BITS == 6 ? 4 : 32 / BITS;
  static constant constexpr const int VALUES = WORDS * PACK;
  static constant constexpr const int CHUNKS = D / VALUES;
  static constant constexpr const int UNITS = VALUES * BITS / (BITS == 4 ? 16 : 8);

  struct Chunk {
    ushort q[UNITS];  // bytes; of 4 bits 16 bits each
    float scale;
    float bias;
  };

  Words weight;   // (rows, D*BITS/32) uint
  Scales scales;  // (rows, D/GROUP)
  Scales biases;

  Chunk load(size_t row, uint chunk) const {
    const size_t group = row * (D / GROUP) + chunk * VALUES / GROUP;
    Chunk loaded;
    if (BITS == 5 || BITS == 6) {  // packs of 5 or 3 bytes
      const device uchar* bytes = (const device uchar*)weight + row * (D * BITS / 8) + UNITS * chunk;
      FLASH_HEAD_UNROLL
      for (int i = 0; i < UNITS; i++) {
        loaded.q[i] = bytes[i];
      }
    } else {
      constexpr int PER_WORD = UNITS / WORDS;
      const size_t first = row * (D * BITS / 32) + WORDS * chunk;
      FLASH_HEAD_UNROLL
      for (int i = 0; i < UNITS; i++) {
        const uint word = weight[first + i / PER_WORD];
        loaded.q[i] = ushort(
            BITS == 4 ? (word >> (16 * (i % 2))) & 0xffffu : (word >> (8 * (i % 4))) & 0xffu);
      }
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
      x[i] = float(hidden[i]) * (1.0f / float(1u << (BITS * i % (BITS == 4 ? 16 : 8))));
      if (BITS == 8) {
        sum += float(hidden[i]);
      } else if (BITS == 5 && i % 8 == 7) {
        sum += float(
            Sum(hidden[i - 7]) + Sum(hidden[i - 6]) + Sum(hidden[i - 5]) + Sum(hidden[i - 4]) +
            Sum(hidden[i - 3]) + Sum(hidden[i - 2]) + Sum(hidden[i - 1]) + Sum(hidden[i]));
      } else if (BITS != 5 && i % 4 == 3) {
        sum += float(
            Sum(hidden[i - 3]) + Sum(hidden[i - 2]) + Sum(hidden[i - 1]) + Sum(hidden[i]));
      }
    }
    return sum;
  }

  static float dot(Chunk chunk, const thread float* x, float sum) {
    const thread ushort* q = chunk.q;
    float accum = 0.0f;
    if (BITS == 4) {
      FLASH_HEAD_UNROLL
      for (int i = 0; i < UNITS; i++) {
        accum +=
            (x[4 * i] * float(q[i] & 0x000fu) + x[4 * i + 1] * float(q[i] & 0x00f0u) +
             x[4 * i + 2] * float(q[i] & 0x0f00u) + x[4 * i + 3] * float(q[i] & 0xf000u));
      }
    } else if (BITS == 5) {
      FLASH_HEAD_UNROLL
      for (int pack = 0; pack < WORDS; pack++) {
        accum += float(q[0] & 0x1fu) * x[0];
        accum += float(q[0] & 0xe0u) * x[1];
        accum += float(q[1] & 0x03u) * (x[1] * 256.0f);
        accum += float(q[1] & 0x7cu) * x[2];
        accum += float(q[1] & 0x80u) * x[3];
        accum += float(q[2] & 0x0fu) * (x[3] * 256.0f);
        accum += float(q[2] & 0xf0u) * x[4];
        accum += float(q[3] & 0x01u) * (x[4] * 256.0f);
        accum += float(q[3] & 0x3eu) * x[5];
        accum += float(q[3] & 0xc0u) * x[6];
        accum += float(q[4] & 0x07u) * (x[6] * 256.0f);
        accum += float(q[4] & 0xf8u) * x[7];
        q += 5;
        x += 8;
      }
    } else if (BITS == 6) {
      FLASH_HEAD_UNROLL
      for (int pack = 0; pack < WORDS; pack++) {
        accum += float(q[0] & 0x3fu) * x[0];
        accum += float(q[0] & 0xc0u) * x[1];
        accum += float(q[1] & 0x0fu) * (x[1] * 256.0f);
        accum += float(q[1] & 0xf0u) * x[2];
        accum += float(q[2] & 0x03u) * (x[2] * 256.0f);
        accum += float(q[2] & 0xfcu) * x[3];
        q += 3;
        x += 4;
      }
    } else {
      FLASH_HEAD_UNROLL
      for (int i = 0; i < VALUES; i++) {
        accum += x[i] * float(q[i]);
      }
    }
    return chunk.scale * accum + sum * chunk.bias;
  }

  static float add(Chunk chunk, const thread float* x, float sum, float total) {
    return total + dot(chunk, x, sum);
  }

  static float reduce(float total) { return simd_sum(total); }
};

template <
    int D,
    int BITS,
    int GROUP,
    int WORDS,
    typename Sum,
    typename Words,
    typename Scales>
inline AffineRows<D, BITS, GROUP, WORDS, Sum, Words, Scales> affine_rows(
    Words weight, Scales scales, Scales biases) {
  return AffineRows<D, BITS, GROUP, WORDS, Sum, Words, Scales>{weight, scales, biases};
}

// Rows of 4 bits that meet several states: what is masked waits as half, in half of the registers of
// floats. It has 4 significant bits and is below 2^16, so that it is exact.
template <typename Rows>
struct HalfRows {
  static constant constexpr const int VALUES = Rows::VALUES;
  static constant constexpr const int CHUNKS = Rows::CHUNKS;

  struct Chunk {
    half q[VALUES];
    float scale;
    float bias;
  };

  Rows rows;

  Chunk load(size_t row, uint chunk) const {
    const typename Rows::Chunk packed = rows.load(row, chunk);
    Chunk loaded;
    FLASH_HEAD_UNROLL
    for (int i = 0; i < VALUES; i++) {
      loaded.q[i] = half(ushort(packed.q[i / 4] & (0xfu << (4 * (i % 4)))));
    }
    loaded.scale = packed.scale;
    loaded.bias = packed.bias;
    return loaded;
  }

  template <typename Hidden>
  static float prepare(Hidden hidden, int n, thread float* x) {
    return Rows::prepare(hidden, n, x);
  }

  static float dot(Chunk chunk, const thread float* x, float sum) {
    float accum = 0.0f;
    FLASH_HEAD_UNROLL
    for (int i = 0; i < VALUES; i += 4) {
      accum +=
          (x[i] * float(chunk.q[i]) + x[i + 1] * float(chunk.q[i + 1]) +
           x[i + 2] * float(chunk.q[i + 2]) + x[i + 3] * float(chunk.q[i + 3]));
    }
    return chunk.scale * accum + sum * chunk.bias;
  }

  static float add(Chunk halves, const thread float* x, float sum, float total) {
    return total + dot(halves, x, sum);
  }

  static float reduce(float total) { return Rows::reduce(total); }
};

template <typename Rows>
inline HalfRows<Rows> half_rows(Rows rows) {
  return HalfRows<Rows>{rows};
}

}  // namespace flash_head
