// score: logits of the probed clusters' rows, and the best of each cluster
//
// One threadgroup per probe; a simdgroup takes 4 rows of its cluster, each as in route, and with more
// than 32 rows every 8th block of 4. A cluster is one block of rows, so the threadgroup reads
// consecutive memory: at n = 16, D = 2048 and 4 bits 16 KB, then 2 KB of scales and biases. Every
// weight byte is read once. The simdgroups' maxima meet in threadgroup memory: expand and sample
// then reduce S values instead of S*n.
// Edges: n not divisible by 4 repeats the last row and drops the result. A padded slot gets the
// lowest finite value. So do the slots of a probe that repeats the one before: its rows are not read.
// Head bias: a pointer (slots,), added to the product rounded to Product, as MLX does; or NoBias.
// A logit is rounded to Raw, the head's dtype, and then mapped.

namespace flash_head {

struct NoBias {};

template <typename Product>
inline float with_bias(float total, NoBias, uint) {
  return total;
}

template <typename Product, typename Bias>
inline float with_bias(float total, Bias bias, uint slot) {
  return float(to_finite<Product>(total)) + float(bias[slot]);
}

template <
    int D,
    int N,
    int V,
    bool PADDED,
    typename Product,
    typename Raw,
    typename Map,
    typename T,
    typename Rows,
    typename Hidden,
    typename Probes,
    typename Ids,
    typename Bias>
inline void score(
    Rows rows,                  // slots
    Hidden hidden,              // (R, D)
    Probes probes,              // (R, S) uint
    Ids token_ids,              // (slots,) uint
    Bias bias,
    device T* logits,           // (R, S, N)
    device float* best,         // (R, S)
    threadgroup uint* shared,   // [SCORE_SIMDGROUPS]
    uint held,                  // S
    uint3 group,
    uint simdgroup,
    uint lane) {
  constexpr int BLOCK = N < ROWS ? N : ROWS;
  constexpr int BLOCKS = (N + BLOCK - 1) / BLOCK;
  constexpr int SIMDGROUPS = BLOCKS < SCORE_SIMDGROUPS ? BLOCKS : SCORE_SIMDGROUPS;
  const size_t probe = size_t(group.y) * held + group.x;
  const uint cluster = probes[probe];
  if (group.x > 0 && cluster == probes[probe - 1]) {
    for (uint i = simdgroup * LANES + lane; i < uint(N); i += SIMDGROUPS * LANES) {
      logits[probe * N + i] = T(-Finite<T>::highest());
    }
    if (simdgroup == 0 && lane == 0) {
      best[probe] = -Finite<T>::highest();
    }
    return;  // the whole threadgroup
  }
  uint highest = 0;
  for (int first = simdgroup * BLOCK; first < N; first += SIMDGROUPS * BLOCK) {
    const int last_row = min(BLOCK, N - first) - 1;
    const size_t slot = size_t(cluster) * N + first;
    float totals[BLOCK];
    dot_rows<D, 1, BLOCK>(rows, slot, last_row, hidden, group.y, 1, lane, totals);
    FLASH_HEAD_UNROLL
    for (int row = 0; row < BLOCK; row++) {
      if (row <= last_row) {
        const Raw raw = to_finite<Raw>(with_bias<Product>(totals[row], bias, slot + row));
        T stored = T(Map::of(float(raw)));
        if (PADDED && token_ids[slot + row] == uint(V)) {
          stored = T(-Finite<T>::highest());
        }
        highest = max(highest, order_key(float(stored)));
        if (lane == 0) {
          logits[probe * N + first + row] = stored;
        }
      }
    }
  }
  highest = threadgroup_max<SIMDGROUPS>(highest, shared, simdgroup, lane);
  if (simdgroup == 0 && lane == 0) {
    best[probe] = score_of(highest);
  }
}

}  // namespace flash_head
