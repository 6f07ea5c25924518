// route: scores of all clusters, scores[r, c] = hidden[r] . centroid[c] + route_bias[c]
//
// MLX's qmv, but the sum stays float32 and the bias is added, which saves two or three kernels. A
// simdgroup computes 4 centroids for H positions, a threadgroup 8 centroids. There is neither
// threadgroup memory nor a barrier. Every centroid byte is read once for each H positions; the lanes
// that share a scale read it from cache.
// Edges: C not divisible by 8 repeats the last row and drops the result.

namespace flash_head {

template <int D, int C, int H, typename Rows, typename Hidden, typename Bias>
inline void route(
    Rows centroids,
    Hidden hidden,           // (R, D)
    Bias route_bias,         // (C,) float
    device float* scores,    // (R, C)
    uint n_hidden,           // R
    uint3 group,
    uint simdgroup,
    uint lane) {
  const uint cluster = (group.x * ROUTE_SIMDGROUPS + simdgroup) * ROWS;
  if (cluster >= uint(C)) {
    return;
  }
  const uint position = group.y * H;
  const int last_row = min(ROWS, int(C - cluster)) - 1;
  const int shared = min(H, int(n_hidden - position));
  float totals[H * ROWS];
  dot_rows<D, H, ROWS>(centroids, cluster, last_row, hidden, position, shared, lane, totals);
  FLASH_HEAD_UNROLL
  for (int h = 0; h < H; h++) {
    FLASH_HEAD_UNROLL
    for (int row = 0; row < ROWS; row++) {
      if (lane == 0 && h < shared && row <= last_row) {
        scores[size_t(position + h) * C + cluster + row] =
            to_finite<float>(totals[h * ROWS + row] + route_bias[cluster + row]);
      }
    }
  }
}

}  // namespace flash_head
