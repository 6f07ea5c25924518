// select: the p best clusters of each position, without a sort
//
// One threadgroup per position. Each score becomes an unsigned key of the same order. Thread
// (simdgroup s, lane l) holds ids s*32*K + 32*i + l, K = ceil(C/512). Up to 16 keys stay in registers
// (C = 8,192). More are read again, 16 at a time, in each of the five rounds (C = 262,144: 1 MB a
// round). 512 threads instead of 1,024 leave enough registers.
// Three radix passes over 10, 11 and 11 bits from the top find the p-th largest key, the threshold:
// count digits of the keys that match so far, in 4, 2 and 2 copies of the histogram, since close
// scores share their top bits; sum the copies; a prefix sum from the highest digit finds the one in
// which the count reaches what remains. Keys above the threshold are probed, and of the keys equal to
// it the first `remaining` by id. Ballots over ids give every probed cluster its place. So probes
// ascend, ties go to the lowest id, and the order of the atomics does not matter.
// Edges: an id past C has key 0, below that of any score, and is never reached since p <= C.
// Threadgroup memory: 16,384 + 136 bytes. Barriers: 1, 3 per pass, and 1.

namespace flash_head {

// The keys of ids first_id, first_id + 32, ...
template <int C, int N, typename Scores>
inline void load_keys(Scores scores, uint first_id, thread uint* keys) {
  FLASH_HEAD_UNROLL
  for (int i = 0; i < N; i++) {
    const uint id = first_id + i * LANES;
    keys[i] = id < uint(C) ? order_key(scores[id]) : 0u;
  }
}

// One radix pass: the digit of the threshold at SHIFT, and the number of keys needed with it.
template <int C, int BLOCKS, int N, int SHIFT, int BITS, typename Scores>
inline void find_digit(
    Scores scores,
    uint first_id,
    thread uint* keys,
    thread uint& threshold,
    thread uint& remaining,
    threadgroup atomic<uint>* histogram,
    threadgroup uint* totals,
    threadgroup uint* chosen,
    uint thread_id,
    uint simdgroup,
    uint lane) {
  constexpr int DIGITS = 1 << BITS;
  constexpr int COPIES = HISTOGRAM / DIGITS;
  constexpr int OWN = DIGITS / SELECT_THREADS;  // digits that a thread adds up
  constexpr uint DECIDED = SHIFT + BITS < 32 ? 0xffffffffu << ((SHIFT + BITS) % 32) : 0u;
  for (int block = 0; block < BLOCKS; block++) {
    if (BLOCKS > 1) {
      load_keys<C, N>(scores, first_id + block * (N * LANES), keys);
    }
    FLASH_HEAD_UNROLL
    for (int i = 0; i < N; i++) {
      if (((keys[i] ^ threshold) & DECIDED) == 0) {
        const uint bin = ((keys[i] >> SHIFT) & (DIGITS - 1)) * COPIES + lane % COPIES;
        atomic_fetch_add_explicit(&histogram[bin], 1u, memory_order_relaxed);
      }
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  uint counts[OWN];
  uint own = 0;
  const uint highest = DIGITS - 1 - thread_id * OWN;
  FLASH_HEAD_UNROLL
  for (int digit = 0; digit < OWN; digit++) {
    counts[digit] = 0;
    FLASH_HEAD_UNROLL
    for (int copy = 0; copy < COPIES; copy++) {
      const uint bin = (highest - digit) * COPIES + copy;
      counts[digit] += atomic_load_explicit(&histogram[bin], memory_order_relaxed);
      atomic_store_explicit(&histogram[bin], 0u, memory_order_relaxed);  // for the next pass
    }
    own += counts[digit];
  }
  uint before = simd_prefix_exclusive_sum(own);  // keys with a higher digit
  if (lane == LANES - 1) {
    totals[simdgroup] = before + own;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  before += simd_sum(lane < simdgroup ? totals[lane] : 0u);
  FLASH_HEAD_UNROLL
  for (int digit = 0; digit < OWN; digit++) {
    if (before < remaining && before + counts[digit] >= remaining) {  // true once
      chosen[0] = highest - digit;
      chosen[1] = remaining - before;
    }
    before += counts[digit];
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  threshold |= chosen[0] << SHIFT;
  remaining = chosen[1];
}

// The lanes of the simdgroup for which it is true, a bit each.
inline uint ballot(bool yes) {
  return uint(simd_vote::vote_t(simd_ballot(yes)));
}

template <int C, typename Scores, typename Offsets>
inline void select_probes(
    Scores scores,                        // (R, C) float
    Offsets tail_offset,                  // (C,) float
    uint n_probes,                        // p
    device uint* probes,                  // (R, S)
    device uint* words,                   // (R, C)
    threadgroup atomic<uint>* histogram,  // [HISTOGRAM]
    threadgroup uint* totals,             // [2 * SELECT_SIMDGROUPS]
    threadgroup uint* chosen,             // [2]
    uint position,
    uint thread_id,
    uint simdgroup,
    uint lane) {
  constexpr int K = (C + SELECT_THREADS - 1) / SELECT_THREADS;
  constexpr int BLOCKS = (K + SELECT_KEYS - 1) / SELECT_KEYS;
  constexpr int N = BLOCKS > 1 ? SELECT_KEYS : K;
  const uint first_id = simdgroup * (LANES * N * BLOCKS) + lane;
  const size_t row = size_t(position) * C;
  uint keys[N];
  load_keys<C, N>(scores + row, first_id, keys);

  for (uint i = thread_id; i < uint(HISTOGRAM); i += SELECT_THREADS) {
    atomic_store_explicit(&histogram[i], 0u, memory_order_relaxed);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  uint threshold = 0;
  uint remaining = n_probes;
  find_digit<C, BLOCKS, N, 22, 10>(
      scores + row, first_id, keys, threshold, remaining, histogram, totals, chosen, thread_id,
      simdgroup, lane);
  find_digit<C, BLOCKS, N, 11, 11>(
      scores + row, first_id, keys, threshold, remaining, histogram, totals, chosen, thread_id,
      simdgroup, lane);
  find_digit<C, BLOCKS, N, 0, 11>(
      scores + row, first_id, keys, threshold, remaining, histogram, totals, chosen, thread_id,
      simdgroup, lane);

  uint above = 0;
  uint equal = 0;
  for (int block = 0; block < BLOCKS; block++) {
    if (BLOCKS > 1) {
      load_keys<C, N>(scores + row, first_id + block * (N * LANES), keys);
    }
    FLASH_HEAD_UNROLL
    for (int i = 0; i < N; i++) {
      above += popcount(ballot(keys[i] > threshold));
      equal += popcount(ballot(keys[i] == threshold));
    }
  }
  if (lane == 0) {
    totals[simdgroup] = above;
    totals[SELECT_SIMDGROUPS + simdgroup] = equal;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  above = simd_sum(lane < simdgroup ? totals[lane] : 0u);
  equal = simd_sum(lane < simdgroup ? totals[SELECT_SIMDGROUPS + lane] : 0u);
  const uint held = max(n_probes, MIN_PROBES);
  const uint lower_lanes = (1u << lane) - 1u;
  for (int block = 0; block < BLOCKS; block++) {
    const uint block_id = first_id + block * (N * LANES);
    if (BLOCKS > 1) {
      load_keys<C, N>(scores + row, block_id, keys);
    }
    FLASH_HEAD_UNROLL
    for (int i = 0; i < N; i++) {
      const uint are_above = ballot(keys[i] > threshold);
      const uint are_equal = ballot(keys[i] == threshold);
      const uint equal_before = equal + popcount(are_equal & lower_lanes);
      const uint place = above + popcount(are_above & lower_lanes) + min(equal_before, remaining);
      const bool probed =
          keys[i] > threshold || (keys[i] == threshold && equal_before < remaining);
      const uint id = block_id + i * LANES;
      if (id < uint(C)) {
        const float estimate = to_finite<float>(score_of(keys[i]) + tail_offset[id]);
        const uint bits = isnan(estimate) ? NOT_A_NUMBER : as_type<uint>(estimate);
        words[row + id] = probed ? PROBED | place : bits;
      }
      if (probed) {
        probes[position * held + place] = id;
        if (place == n_probes - 1) {
          for (uint i = n_probes; i < held; i++) {
            probes[position * held + i] = id;
          }
        }
      }
      above += popcount(are_above);
      equal += popcount(are_equal);
    }
  }
}

}  // namespace flash_head
