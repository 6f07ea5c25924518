// expand: full logits. A probed token keeps its own; every other gets its cluster's estimate
//   min(scores[c] + tail_offset[c], m - max(1, |m|/64)),  m the best candidate of the position.
//
// 256 threads, 4 tokens each, 256 apart: slot_of and the output are accessed in order. A token needs
// one gather of its cluster's word (4*C bytes in all), and another one if the word shows that the
// cluster was probed. Each threadgroup finds m by itself from the S bests (1 barrier), which costs
// less than another kernel.

namespace flash_head {

template <
    int V,
    int C,
    int N,
    typename T,
    typename Words,
    typename Slots,
    typename Logits,
    typename Best>
inline void expand(
    Words words,                // (R, C) uint
    Slots slot_of,              // (V,) uint
    Logits logits,              // (R, S, N)
    Best best,                  // (R, S) float
    device T* expanded,         // (R, V)
    threadgroup uint* shared,   // [WIDE_SIMDGROUPS]
    uint held,                  // S
    uint3 group,
    uint thread_id,
    uint simdgroup,
    uint lane) {
  const size_t position = group.y;
  uint key = 0;
  for (uint i = thread_id; i < held; i += WIDE_THREADS) {
    key = max(key, order_key(best[position * held + i]));
  }
  const float highest = score_of(threadgroup_max<WIDE_SIMDGROUPS>(key, shared, simdgroup, lane));
  const float cap = highest - max(1.0f, fabs(highest) / 64.0f);  // NaN if that is
  const uint first = group.x * (WIDE_THREADS * EXPAND_TOKENS) + thread_id;
  FLASH_HEAD_UNROLL
  for (int i = 0; i < EXPAND_TOKENS; i++) {
    const uint token = first + i * WIDE_THREADS;
    if (token < uint(V)) {
      const uint slot = slot_of[token];
      const uint word = words[position * C + slot / N];
      if (word >= PROBED) {
        const size_t probe = position * held + (word & PLACE);
        expanded[position * V + token] = logits[probe * N + slot % N];
      } else {
        const float estimate = as_type<float>(word);
        const float tail = isnan(estimate) || estimate < cap ? estimate : cap;
        expanded[position * V + token] = to_finite<T>(tail);
      }
    }
  }
}

}  // namespace flash_head
