// token: the greedy token, the lowest id among the highest candidate logits, of NaN if there is any
//
// One threadgroup per position finds m from the S bests, then reads the clusters whose best is m. It
// reads little more than 4*S bytes; 2 barriers.

namespace flash_head {

template <int N, typename Probes, typename Ids, typename Logits, typename Best>
inline void greedy_token(
    Probes probes,              // (R, S) uint
    Ids token_ids,              // (slots,) uint, V for a padded slot
    Logits logits,              // (R, S, N)
    Best best,                  // (R, S) float
    device uint* tokens,        // (R,)
    threadgroup uint* shared,   // [WIDE_SIMDGROUPS]
    threadgroup uint* lowest,   // [WIDE_SIMDGROUPS]
    uint held,                  // S
    uint position,
    uint thread_id,
    uint simdgroup,
    uint lane) {
  const size_t first = size_t(position) * held;
  uint highest = 0;
  for (uint i = thread_id; i < held; i += WIDE_THREADS) {
    highest = max(highest, order_key(best[first + i]));
  }
  highest = threadgroup_max<WIDE_SIMDGROUPS>(highest, shared, simdgroup, lane);
  uint token = 0xffffffffu;
  for (uint i = thread_id; i < held; i += WIDE_THREADS) {
    if (order_key(best[first + i]) == highest) {
      for (int slot = 0; slot < N; slot++) {
        if (order_key(float(logits[(first + i) * N + slot])) == highest) {
          token = min(token, uint(token_ids[size_t(probes[first + i]) * N + slot]));
        }
      }
    }
  }
  token = simd_min(token);
  if (lane == 0) {
    lowest[simdgroup] = token;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  token = simd_min(lowest[min(lane, uint(WIDE_SIMDGROUPS - 1))]);
  if (thread_id == 0) {
    tokens[position] = token;
  }
}

}  // namespace flash_head
