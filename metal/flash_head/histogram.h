// histogram: the bin in which a running sum reaches a limit
//
// The last bin that is not empty and before which less than `limit` lies; 0 if there is none. A bin
// holds its counter times unit * exp(-decay * bin). Each thread adds up the bins that lie side by
// side; `before` becomes what lies before the bin found. The counters are 0 afterwards.
// A barrier must separate this from the counting. It has 2 of its own.

namespace flash_head {

template <int BINS>
inline uint find_bin(
    threadgroup atomic<uint>* histogram,  // [BINS]
    float unit,
    float decay,
    float limit,
    thread float& before,
    threadgroup float* sums,              // [ROW_SUMS]
    threadgroup uint* bins,               // [ROW_SIMDGROUPS]
    uint thread_id,
    uint simdgroup,
    uint lane) {
  constexpr int OWN = BINS / ROW_THREADS;
  float values[OWN];
  float own = 0.0f;
  FLASH_HEAD_UNROLL
  for (int i = 0; i < OWN; i++) {
    const uint bin = thread_id * OWN + i;
    const uint counter = atomic_load_explicit(&histogram[bin], memory_order_relaxed);
    atomic_store_explicit(&histogram[bin], 0u, memory_order_relaxed);
    const float share = decay == 0.0f ? 1.0f : fast::exp(-decay * float(bin));  // counts stay exact
    values[i] = float(counter) * (unit * share);
    own += values[i];
  }
  float sum = simd_prefix_exclusive_sum(own);
  if (lane == LANES - 1) {
    sums[simdgroup] = sum + own;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  sum += simd_sum(lane < simdgroup ? sums[lane] : 0.0f);
  uint found = 0;  // the bin, counted from 1
  float before_found = 0.0f;
  FLASH_HEAD_UNROLL
  for (int i = 0; i < OWN; i++) {
    if (values[i] > 0.0f && sum < limit) {
      found = thread_id * OWN + i + 1;
      before_found = sum;
    }
    sum += values[i];
  }
  const uint last = simd_max(found);
  if (found == last && (last > 0 || lane == 0)) {
    bins[simdgroup] = found;
    sums[ROW_SIMDGROUPS + simdgroup] = before_found;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  const uint of_other = lane < uint(ROW_SIMDGROUPS) ? bins[lane] : 0u;
  found = simd_max(of_other);
  before = simd_sum(of_other == found && found > 0 ? sums[ROW_SIMDGROUPS + lane] : 0.0f);
  return max(found, 1u) - 1u;
}

// All counters become 0. A barrier must separate this from the counting.
template <int BINS>
inline void clear_bins(threadgroup atomic<uint>* histogram, uint thread_id) {
  for (uint i = thread_id; i < uint(BINS); i += ROW_THREADS) {
    atomic_store_explicit(&histogram[i], 0u, memory_order_relaxed);
  }
}

}  // namespace flash_head
