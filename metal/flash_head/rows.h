// rows: products of H states with N rows of a layer, each as MLX multiplies one state alone
//
// products[h, n] = T(Product(hidden[h] . row[n]) + bias[n])
//
// What MLX does with several states adds in another order; here each has the sums of its own
// product, in the order that the rows' chunks say, and only the reading is shared: every weight byte
// is read once for all H. A simdgroup computes AT_ONCE rows, a threadgroup two times as many. Each
// state's values are loaded where they meet a chunk: to hold them for all H would take H times the
// registers. The totals take H*AT_ONCE registers and the unpacked weights, which the states share,
// AT_ONCE*VALUES, of 4 affine bits the half of that.
// Edges: rows past the last one repeat it, and are dropped. Nothing is made finite: MLX does not.

namespace flash_head {

template <
    int D,
    int H,
    int AT_ONCE,
    bool BIASED,
    typename Product,
    typename T,
    typename Rows,
    typename Hidden,
    typename Bias>
inline void row_products(
    Rows rows,              // N rows
    Hidden hidden,          // (H, D)
    Bias bias,              // (N,) where BIASED, else not read
    device T* products,     // (H, N)
    uint n_rows,            // N
    uint3 group,
    uint simdgroup,
    uint lane) {
  const uint first = (group.x * ROUTE_SIMDGROUPS + simdgroup) * AT_ONCE;
  if (first >= n_rows) {
    return;
  }
  const int last_row = min(AT_ONCE, int(n_rows - first)) - 1;
  float totals[H * AT_ONCE];
  dot_rows<D, H, AT_ONCE>(rows, first, last_row, hidden, 0, H, lane, totals);
  FLASH_HEAD_UNROLL
  for (int h = 0; h < H; h++) {
    FLASH_HEAD_UNROLL
    for (int row = 0; row < AT_ONCE; row++) {
      if (lane == 0 && row <= last_row) {
        const Product product = Product(totals[h * AT_ONCE + row]);
        products[size_t(h) * n_rows + first + row] =
            BIASED ? T(float(product) + float(bias[first + row])) : T(product);
      }
    }
  }
}

}  // namespace flash_head
