// dense: floats, 4 values to a chunk; the order of sums is that of MLX's gemv

namespace flash_head {

template <int D, typename Values>
struct DenseRows {
  static constant constexpr const int VALUES = 4;
  static constant constexpr const int CHUNKS = (D + VALUES - 1) / VALUES;

  struct Chunk {
    float values[4];
  };

  Values weight;  // (rows, D)

  Chunk load(size_t row, uint chunk) const {
    const size_t first = row * D + chunk * VALUES;
    Chunk loaded;
    read(weight + first, D - int(chunk) * VALUES, loaded.values);
    return loaded;
  }

  template <typename Hidden>
  static float prepare(Hidden hidden, int left, thread float* x) {
    read(hidden, left, x);
    return 0.0f;
  }

  // As gemv's load_safe: one branch, so that products and sums stay side by side.
  template <typename Pointer>
  static void read(Pointer from, int left, thread float* x) {
    if (D % VALUES == 0 || left >= VALUES) {
      FLASH_HEAD_UNROLL
      for (int i = 0; i < VALUES; i++) {
        x[i] = float(from[i]);
      }
    } else {
      FLASH_HEAD_UNROLL
      for (int i = 0; i < VALUES; i++) {
        x[i] = i < left ? float(from[i]) : 0.0f;
      }
    }
  }

  static float add(Chunk chunk, const thread float* x, float, float total) {
    FLASH_HEAD_UNROLL
    for (int i = 0; i < VALUES; i++) {
      total += chunk.values[i] * x[i];
    }
    return total;
  }

  // gemv's ladder of shuffles, with the result on every lane
  static float reduce(float total) {
    FLASH_HEAD_UNROLL
    for (ushort distance = LANES / 2; distance >= 1; distance /= 2) {
      total += simd_shuffle_xor(total, distance);
    }
    return total;
  }
};

template <int D, typename Values>
inline DenseRows<D, Values> dense_rows(Values weight) {
  return DenseRows<D, Values>{weight};
}

}  // namespace flash_head
