// tolerance: how far a state's logits may be off, by its length
//
//   product = shares[0] * (|h| + 1) * shares[2], scored = shares[1] * (|h| + 1) * shares[2]
//
// where shares[2] is the length of the longest row, with its bias. One threadgroup a state, which
// reads it once. Threadgroup memory: 32 bytes. Barriers: 1.

namespace flash_head {

template <int D, typename Hidden, typename Shares>
inline void tolerance(
    Hidden hidden,              // (k, D)
    Shares shares,              // (3,) float
    device float* product,      // (k,)
    device float* scored,       // (k,)
    threadgroup float* shared,  // [WIDE_SIMDGROUPS]
    uint state,
    uint thread_id,
    uint simdgroup,
    uint lane) {
  float sum = 0.0f;
  for (uint i = thread_id; i < uint(D); i += WIDE_THREADS) {
    const float x = float(hidden[size_t(state) * D + i]);
    sum += x * x;
  }
  sum = simd_sum(sum);
  if (lane == 0) {
    shared[simdgroup] = sum;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  sum = simd_sum(lane < uint(WIDE_SIMDGROUPS) ? shared[lane] : 0.0f);
  if (thread_id == 0) {
    const float lengths = (sqrt(sum) + 1.0f) * shares[2];
    product[state] = shares[0] * lengths;
    scored[state] = shares[1] * lengths;
  }
}

}  // namespace flash_head
