// select: the p best clusters of each position, without a sort, and what the others hold
//
// One threadgroup per position. Thread (simdgroup s, lane l) holds the scores of ids s*32*K + 32*i + l,
// K = ceil(C/512). Up to 36 scores stay in registers (C = 18,432); more are read again in each of the
// four rounds, in equal blocks.
//   1  the best score
//   2  a histogram of the distances to it, in bins of 1/64 nat, and the bin of the p-th cluster
//   3  how many clusters of each simdgroup lie in better bins, and how many in this one
//   4  places: ballots over ids give every probed cluster its own, and the others are added up
// So probes ascend, and of the clusters in the last bin the lowest ids are probed. Bin 0 holds NaN and
// the clusters that are always probed, the last bin all from 64 nats on.
// `depth` limits the bins: a cluster more than `depth` nats below the log-sum-exp of all (without those
// that are always probed) is not probed. Places without a cluster repeat the last one.
// unscored: the best score of the clusters that are not probed, and the log-sum-exp of their scores,
// each as high as Map makes it if all its N tokens have the same logit; the lowest finite value where
// none is left.
// Clusters that an adjustment needs are probed too, which takes C/8 bytes and two barriers more.
// Threadgroup memory: 16,384 + 388 bytes. Barriers: 6.

namespace flash_head {

// What expand needs of a cluster: its place among the probes, or the estimate of its logits.
template <typename Offsets>
struct Words {
  device uint* words;   // (R, C)
  Offsets tail_offset;  // (C,) float

  void write(size_t row, uint id, float score, bool probed, uint place) const {
    const float estimate = to_finite<float>(score + tail_offset[id]);
    const uint bits = isnan(estimate) ? NOT_A_NUMBER : as_type<uint>(estimate);
    words[row + id] = probed ? PROBED | place : bits;
  }
};

template <typename Offsets>
inline Words<Offsets> cluster_words(device uint* words, Offsets tail_offset) {
  return Words<Offsets>{words, tail_offset};
}

// For tokens, which need none.
struct NoWords {
  void write(size_t, uint, float, bool, uint) const {}
};

// Clusters that hold a token that an adjustment changes: they are always probed. A bit each.
struct Forced {
  threadgroup atomic<uint>* marks;  // [ceil(C/32)]

  bool has(uint id) const {
    return (atomic_load_explicit(&marks[id / 32], memory_order_relaxed) >> (id % 32) & 1u) != 0;
  }

  void add(uint id) const {
    atomic_fetch_or_explicit(&marks[id / 32], 1u << (id % 32), memory_order_relaxed);
  }
};

// For positions without one.
struct NotForced {
  bool has(uint) const { return false; }
};

// Marks the clusters of a position's tokens, as adjust.h has them, and of the latest one.
template <int C, int Size, typename Words, typename Latest, typename Places>
inline Forced mark_clusters(
    Words words,                      // (R, W) uint
    Latest latest,                    // (R,) uint
    Places slot_of,                   // (V,) uint
    threadgroup atomic<uint>* marks,  // [ceil(C/32)]
    uint n_words,                     // W
    uint vocab_size,                  // V
    uint row,
    uint thread_id) {
  const Forced forced = {marks};
  for (uint i = thread_id; i < uint((C + 31) / 32); i += ROW_THREADS) {
    atomic_store_explicit(&marks[i], 0u, memory_order_relaxed);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  const uint n_tokens = (n_words - ADJUST_HEAD) / ADJUST_TOKEN;
  for (uint i = thread_id; i <= n_tokens; i += ROW_THREADS) {
    const size_t at = size_t(row) * n_words + ADJUST_HEAD + i * ADJUST_TOKEN;
    const uint token = i < n_tokens ? uint(words[at]) : uint(latest[row]);
    if (token < vocab_size) {
      forced.add(slot_of[token] / Size);
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  return forced;
}

// The scores of ids first_id, first_id + 32, ...
template <int C, int N, typename Scores, typename Always>
inline void load_scores(Scores scores, Always forced, uint first_id, thread float* loaded) {
  FLASH_HEAD_UNROLL
  for (int i = 0; i < N; i++) {
    const uint id = first_id + i * LANES;
    loaded[i] = id < uint(C) ? to_finite<float>(scores[id]) : 0.0f;
    if (id < uint(C) && forced.has(id)) {
      loaded[i] = FORCED_SCORE;
    }
  }
}

// SELECT_BINS for an id past the last cluster.
template <int C>
inline uint bin_of(uint id, float score, float best) {
  if (id >= uint(C)) {
    return SELECT_BINS;
  }
  if (!(score < CERTAIN)) {
    return 0;
  }
  return 1u + uint(min((best - score) * BINS_PER_NAT, float(SELECT_BINS - 2)));
}

// The score of a cluster of `Size` tokens of the same logit, which is mapped.
template <int Size, typename Map>
inline float mapped_score(float score) {
  if (Map::identity()) {
    return score;
  }
  const float tokens = log(float(Size));
  return Map::of(score - tokens) + tokens;
}

// The lanes of the simdgroup for which it is true, a bit each.
inline uint ballot(bool yes) {
  return uint(simd_vote::vote_t(simd_ballot(yes)));
}

template <
    int C,
    int Size,
    typename Map,
    typename Scores,
    typename WordsOrNot,
    typename Always>
inline void select_probes(
    Scores scores,                        // (R, C) float
    WordsOrNot words,
    Always forced,
    uint n_probes,                        // p
    float depth,
    device uint* probes,                  // (R, S)
    device float* unscored,               // (R, UNSCORED)
    threadgroup atomic<uint>* histogram,  // [SELECT_BINS]
    threadgroup uint* shared,             // [SELECT_SHARED]
    threadgroup float* sums,              // [ROW_SUMS]
    uint position,
    uint thread_id,
    uint simdgroup,
    uint lane) {
  constexpr int K = (C + ROW_THREADS - 1) / ROW_THREADS;
  constexpr int BLOCKS = (K + SELECT_SCORES - 1) / SELECT_SCORES;
  constexpr int N = (K + BLOCKS - 1) / BLOCKS;
  const uint first_id = simdgroup * (LANES * N * BLOCKS) + lane;
  const size_t row = size_t(position) * C;
  float loaded[N];
  load_scores<C, N>(scores + row, forced, first_id, loaded);

  uint highest = 0;
  for (int block = 0; block < BLOCKS; block++) {
    const uint block_id = first_id + block * (N * LANES);
    if (BLOCKS > 1) {
      load_scores<C, N>(scores + row, forced, block_id, loaded);
    }
    FLASH_HEAD_UNROLL
    for (int i = 0; i < N; i++) {
      const bool counts = block_id + i * LANES < uint(C) && loaded[i] < CERTAIN;
      highest = max(highest, counts ? order_key(loaded[i]) : 0u);
    }
  }
  clear_bins<SELECT_BINS>(histogram, thread_id);
  highest = threadgroup_max<ROW_SIMDGROUPS>(highest, shared, simdgroup, lane);
  const float best = highest == 0 ? 0.0f : score_of(highest);

  float mass = 0.0f;
  for (int block = 0; block < BLOCKS; block++) {
    const uint block_id = first_id + block * (N * LANES);
    if (BLOCKS > 1) {
      load_scores<C, N>(scores + row, forced, block_id, loaded);
    }
    FLASH_HEAD_UNROLL
    for (int i = 0; i < N; i++) {
      const uint bin = bin_of<C>(block_id + i * LANES, loaded[i], best);
      if (bin < uint(SELECT_BINS)) {
        atomic_fetch_add_explicit(&histogram[bin], 1u, memory_order_relaxed);
        mass += bin > 0 ? fast::exp(loaded[i] - best) : 0.0f;
      }
    }
  }
  mass = simd_sum(mass);
  if (lane == 0) {
    sums[ROW_SIMDGROUPS + simdgroup] = mass;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  mass = simd_sum(lane < uint(ROW_SIMDGROUPS) ? sums[ROW_SIMDGROUPS + lane] : 0.0f);
  const float nats = depth - log(max(mass, 1.0f));
  const uint deepest = 1u + uint(clamp(nats * BINS_PER_NAT, 0.0f, float(SELECT_BINS)));
  float before;
  uint last = find_bin<SELECT_BINS>(
      histogram, 1.0f, 0.0f, float(n_probes), before, sums, shared, thread_id, simdgroup, lane);
  uint remaining = n_probes - uint(before);
  if (last > deepest) {
    last = deepest;
    remaining = n_probes;
  }

  uint better = 0;
  uint equal = 0;
  for (int block = 0; block < BLOCKS; block++) {
    const uint block_id = first_id + block * (N * LANES);
    if (BLOCKS > 1) {
      load_scores<C, N>(scores + row, forced, block_id, loaded);
    }
    FLASH_HEAD_UNROLL
    for (int i = 0; i < N; i++) {
      const uint bin = bin_of<C>(block_id + i * LANES, loaded[i], best);
      better += bin < last;
      equal += bin == last;
    }
  }
  better = simd_sum(better);
  equal = simd_sum(equal);
  if (lane == 0) {
    shared[ROW_SIMDGROUPS + simdgroup] = better;
    shared[2 * ROW_SIMDGROUPS + simdgroup] = equal;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  const uint every_better = lane < uint(ROW_SIMDGROUPS) ? shared[ROW_SIMDGROUPS + lane] : 0u;
  const uint every_equal = lane < uint(ROW_SIMDGROUPS) ? shared[2 * ROW_SIMDGROUPS + lane] : 0u;
  const uint n_read = simd_sum(every_better) + min(simd_sum(every_equal), remaining);
  better = simd_sum(lane < simdgroup ? every_better : 0u);
  equal = simd_sum(lane < simdgroup ? every_equal : 0u);

  const uint held = max(n_probes, MIN_PROBES);
  const uint lower_lanes = (1u << lane) - 1u;
  // no score left is higher
  const float edge =
      mapped_score<Size, Map>(best - float(max(last, 1u) - 1u) / BINS_PER_NAT);
  uint left = 0;
  mass = 0.0f;
  for (int block = 0; block < BLOCKS; block++) {
    const uint block_id = first_id + block * (N * LANES);
    if (BLOCKS > 1) {
      load_scores<C, N>(scores + row, forced, block_id, loaded);
    }
    FLASH_HEAD_UNROLL
    for (int i = 0; i < N; i++) {
      const uint id = block_id + i * LANES;
      const uint bin = bin_of<C>(id, loaded[i], best);
      const uint are_better = ballot(bin < last);
      const uint are_equal = ballot(bin == last);
      const uint equal_before = equal + popcount(are_equal & lower_lanes);
      const uint place = better + popcount(are_better & lower_lanes) + min(equal_before, remaining);
      const bool probed = bin < last || (bin == last && equal_before < remaining);
      if (id < uint(C)) {
        words.write(row, id, loaded[i], probed, place);
        if (!probed) {
          left = max(left, order_key(loaded[i]));
          mass += fast::exp(min(mapped_score<Size, Map>(loaded[i]) - edge, 1.0f));
        }
      }
      if (probed) {
        probes[position * held + place] = id;
        if (place == n_read - 1) {
          shared[4 * ROW_SIMDGROUPS] = id;
        }
      }
      better += popcount(are_better);
      equal += popcount(are_equal);
    }
  }
  mass = simd_sum(mass);
  if (lane == 0) {
    sums[simdgroup] = mass;
  }
  left = threadgroup_max<ROW_SIMDGROUPS>(left, shared + 3 * ROW_SIMDGROUPS, simdgroup, lane);
  for (uint i = n_read + thread_id; i < held; i += ROW_THREADS) {
    probes[position * held + i] = shared[4 * ROW_SIMDGROUPS];
  }
  mass = simd_sum(lane < uint(ROW_SIMDGROUPS) ? sums[lane] : 0.0f);
  if (thread_id == 0) {
    const float lowest = -Finite<float>::highest();
    const float highest_left = left == 0 ? lowest : score_of(left);
    unscored[UNSCORED * position] = highest_left;
    // the mass is 0 where all scores left are far below the edge
    const float least = left == 0 ? lowest : mapped_score<Size, Map>(highest_left);
    unscored[UNSCORED * position + 1] = mass > 0.0f ? max(least, edge + log(mass)) : least;
    for (int i = 2; i < UNSCORED; i++) {
      unscored[UNSCORED * position + i] = 0.0f;
    }
  }
}

}  // namespace flash_head
