// dot: products of N consecutive rows with H hidden rows, by one simdgroup
//
// totals[h*N + row] on every lane. A chunk of each row is read once for all H. Rows past the last
// one repeat it, which saves a check in the loop; the caller drops them. All lanes skip positions
// past the last one. One reduction per total at the end.

namespace flash_head {

template <int D, int H, int N, typename Rows, typename Hidden>
inline void dot_rows(
    Rows rows,
    size_t first_row,
    int last_row,
    Hidden hidden,
    uint first_hidden,
    int n_hidden,
    uint lane,
    thread float* totals) {
  FLASH_HEAD_UNROLL
  for (int i = 0; i < H * N; i++) {
    totals[i] = 0.0f;
  }
  for (uint chunk = lane; chunk < uint(Rows::CHUNKS); chunk += LANES) {
    typename Rows::Chunk loaded[N];
    FLASH_HEAD_UNROLL
    for (int row = 0; row < N; row++) {
      loaded[row] = rows.load(first_row + min(row, last_row), chunk);
    }
    FLASH_HEAD_UNROLL
    for (int h = 0; h < H; h++) {
      if (h < n_hidden) {
        float x[Rows::VALUES];
        const size_t start = size_t(first_hidden + h) * D + chunk * Rows::VALUES;
        const float sum = Rows::prepare(hidden + start, D - int(chunk) * Rows::VALUES, x);
        FLASH_HEAD_UNROLL
        for (int row = 0; row < N; row++) {
          totals[h * N + row] = Rows::add(loaded[row], x, sum, totals[h * N + row]);
        }
      }
    }
  }
  FLASH_HEAD_UNROLL
  for (int i = 0; i < H * N; i++) {
    if (i < n_hidden * N) {
      totals[i] = Rows::reduce(totals[i]);
    }
  }
}

}  // namespace flash_head
