// sample: the token of each position from its scored tokens, drawn or greedy
//
//   token = argmax of x * inv_temperature + noise over the tokens that are kept, the lowest id of
//   equals; of x alone where inv_temperature is 0, or where an x is NaN, which counts as the highest
//
// x is a logit. The noise of a token follows from its id and the position's key, whoever else is
// looked at. A token is kept if all three hold, each decided at temperature 1:
//   top_p      the tokens of higher x have less than top_p of the mass exp(x), to which the clusters
//              that were not scored add exp(unscored[1]); 1 keeps all
//   log_min_p  x is at most that far below the highest
//   top_k      fewer than top_k tokens have a higher x; 0 keeps all
//
// risk: an estimate of the chance that all tokens give another one. Of a greedy token
// exp(a - b * (X - unscored[0])), where Map makes x of X, of a draw `scale` times the share of the mass that was not scored; at
// most 1; 2 where no scored token may be chosen, since a mask leaves none. fit holds a, b, scale, and
// what the mass that was not scored counts for the filters: nothing with a mask, of which it knows
// nothing.
//
// One threadgroup per position. The bests give the highest x, and the noise of its token a bound: a
// cluster whose best cannot reach it, or is not kept, is skipped without a look at its logits. For
// top_p and top_k a radix search over the distance to the highest x (fixed point, 64 nats in 32 bits)
// finds the last x that is kept: digits of 10, 11 and 11 bits (16-bit logits: the first two), two
// histograms, of masses and of counts. Tokens 64 nats below the highest are not kept there.
// It reads 4*S bytes, the logits and ids of the clusters that are looked at, for a draw all logits once
// and with top_p or top_k once more a digit.
// Threadgroup memory: 16,384 + 384 bytes. Barriers: 2, for a draw 3; with top_p or top_k 3 more a digit,
// with both 5.

namespace flash_head {

constant constexpr float STEPS_PER_NAT = 67108864.0f;  // 2^26
constant constexpr float FARTHEST = 4294967040.0f;     // the float below 2^32
constant constexpr float MASS_UNITS = 16384.0f;        // of a mass exp(0): 2^18 of them fit

inline uint distance_to(float highest, float x) {
  return uint(min((highest - x) * STEPS_PER_NAT, FARTHEST));
}

// Whether a token of the logit x can be the one: it is kept, and its noise may lift it to the bound.
struct Rule {
  float highest;
  float scale;
  float most_noise;
  float bound;
  float lowest;
  uint cut;

  bool drops(float x) const {  // false for NaN
    return x * scale + most_noise < bound || x < lowest || distance_to(highest, x) > cut;
  }
};

// The greatest distance of a token that top_p and top_k keep.
template <typename T, typename Logits>
inline uint find_cut(
    Logits logits,                        // of this position
    uint n_logits,
    float highest,
    float top_p,
    float mass,                           // of all tokens, relative to the highest logit's
    uint n_top,                           // top_k
    threadgroup atomic<uint>* histogram,  // [2 * SAMPLE_BINS]
    threadgroup float* sums,              // [ROW_SUMS]
    threadgroup uint* bins,               // [ROW_SIMDGROUPS]
    uint thread_id,
    uint simdgroup,
    uint lane) {
  constexpr int LEVELS = sizeof(T) == 4 ? 3 : 2;
  const bool used[2] = {top_p < 1.0f, n_top > 0};
  uint cuts[2] = {0, 0};
  float limits[2] = {top_p * mass, float(n_top)};
  const float units = n_logits <= (1u << 18) ? MASS_UNITS : MASS_UNITS / 8.0f;
  float unit = 1.0f / units;
  for (int level = 0; level < LEVELS; level++) {
    const uint shift = 22 - 11 * level;
    const uint decided = level == 0 ? 0u : 0xffffffffu << (33 - 11 * level);
    for (uint i = thread_id; i < n_logits; i += ROW_THREADS) {
      const uint distance = distance_to(highest, float(logits[i]));
      if (distance < uint(FARTHEST)) {
        const uint digit = (distance >> shift) % SAMPLE_BINS;
        if (used[0] && ((distance ^ cuts[0]) & decided) == 0) {
          // relative to the bin of the first digit, whose own mass is a float
          const float share = fast::exp(-float(distance & 0x3fffffu) / STEPS_PER_NAT);
          atomic_fetch_add_explicit(
              &histogram[digit], uint(share * units + 0.5f), memory_order_relaxed);
        }
        if (used[1] && ((distance ^ cuts[1]) & decided) == 0) {
          atomic_fetch_add_explicit(&histogram[SAMPLE_BINS + digit], 1u, memory_order_relaxed);
        }
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    FLASH_HEAD_UNROLL
    for (int kind = 0; kind < 2; kind++) {
      if (used[kind]) {
        float before;
        const uint digit = find_bin<SAMPLE_BINS>(
            histogram + kind * SAMPLE_BINS, kind == 0 ? unit : 1.0f,
            kind == 0 && level == 0 ? 1.0f / 16.0f : 0.0f, limits[kind], before, sums, bins,
            thread_id, simdgroup, lane);
        cuts[kind] |= digit << shift;
        limits[kind] -= before;
      }
    }
    if (level == 0) {
      unit *= exp(-float(cuts[0] >> 22) / 16.0f);
    }
  }
  const uint below = LEVELS == 3 ? 0u : 0x7ffu;  // digits that were not searched
  return min(
      used[0] ? cuts[0] | below : 0xffffffffu, used[1] ? cuts[1] | below : 0xffffffffu);
}

template <
    int N,
    int V,
    typename Map,
    typename T,
    typename Probes,
    typename Ids,
    typename Logits,
    typename Best,
    typename Unscored,
    typename Settings,
    typename Counts,
    typename Keys,
    typename Fit>
inline void sample(
    Probes probes,                        // (R, S) uint
    Ids token_ids,                        // (slots,) uint, V for a padded slot
    Logits logits,                        // (R, S, N)
    Best best,                            // (R, S) float
    Unscored unscored,                    // (R, UNSCORED) float
    Settings settings,                    // (R, 3) float: inv_temperature, top_p, log_min_p
    Counts top_k,                         // (R,) uint
    Keys keys,                            // (R, 2) uint
    Fit fit,                              // (4,) float
    device uint* tokens,                  // (R,)
    device float* risk,                   // (R,)
    threadgroup atomic<uint>* histogram,  // [2 * SAMPLE_BINS]
    threadgroup uint* shared,             // [SAMPLE_SHARED]
    threadgroup float* sums,              // [ROW_SUMS]
    uint held,                            // S
    uint position,
    uint thread_id,
    uint simdgroup,
    uint lane) {
  const size_t first = size_t(position) * held;
  const float scale = settings[3 * position];
  const float top_p = settings[3 * position + 1];
  const uint n_top = top_k[position];
  const bool cuts = scale != 0.0f && (top_p < 1.0f || n_top > 0);
  if (cuts) {
    clear_bins<2 * SAMPLE_BINS>(histogram, thread_id);
  }
  uint key = 0;
  uint top = 0;  // the cluster of the highest logit
  for (uint i = thread_id; i < held; i += ROW_THREADS) {
    const uint of_cluster = order_key(best[first + i]);
    if (of_cluster > key) {
      key = of_cluster;
      top = i;
    }
  }
  threadgroup_best<ROW_SIMDGROUPS>(key, top, shared, simdgroup, lane);
  const float highest = score_of(key);
  const bool greedy = scale == 0.0f || !(highest > -Finite<T>::highest());
  const uint key_0 = keys[2 * position];
  const uint key_1 = keys[2 * position + 1];

  Rule rule = {
      highest, greedy ? 1.0f : scale, greedy ? 0.0f : MOST_NOISE, highest,
      -Finite<float>::highest(), 0xffffffffu};
  float mass = 0.0f;  // of the scored tokens
  if (!greedy) {
    uint token = 0xffffffffu;
    for (uint i = lane; i < uint(N); i += LANES) {
      if (order_key(float(logits[(first + top) * N + i])) == key) {
        token = min(token, uint(token_ids[size_t(probes[first + top]) * N + i]));
      }
    }
    rule.bound = highest * scale + noise_of(simd_min(token), key_0, key_1);
    rule.lowest = highest + settings[3 * position + 2];
    // where MLX scores the rows, the first 8 probes that repeat the one before have its logits
    const bool repeats =
        lane > 0 && lane < MIN_PROBES && probes[first + lane] == probes[first + lane - 1];
    const uint n_logits = simd_min(repeats ? lane : held) * N;
    for (uint i = thread_id; i < n_logits; i += ROW_THREADS) {
      mass += fast::exp(float(logits[first * N + i]) - highest);
    }
    mass = simd_sum(mass);
    if (lane == 0) {
      sums[ROW_SIMDGROUPS + simdgroup] = mass;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    mass = simd_sum(lane < uint(ROW_SIMDGROUPS) ? sums[ROW_SIMDGROUPS + lane] : 0.0f);
    if (cuts) {
      const float tail = fit[3] * exp(min(unscored[UNSCORED * position + 1] - highest, 80.0f));
      rule.cut = find_cut<T>(
          logits + first * N, n_logits, highest, top_p, mass + tail, n_top, histogram, sums, shared,
          thread_id, simdgroup, lane);
    }
  }

  key = 0;
  uint token = 0xffffffffu;
  for (uint i = thread_id; i < held * N; i += ROW_THREADS) {
    if (rule.drops(best[first + i / N])) {
      continue;
    }
    const float x = float(logits[first * N + i]);
    const uint id = token_ids[size_t(probes[first + i / N]) * N + i % N];
    if (rule.drops(x) || id == uint(V)) {
      continue;
    }
    const uint drawn = order_key(greedy ? x : x * scale + noise_of(id, key_0, key_1));
    if (drawn > key || (drawn == key && id < token)) {
      key = drawn;
      token = id;
    }
  }
  threadgroup_best<ROW_SIMDGROUPS>(key, token, shared + 2 * ROW_SIMDGROUPS, simdgroup, lane);
  if (thread_id == 0) {
    tokens[position] = token;
    const float gap = Map::inverse(highest) - unscored[UNSCORED * position];
    const float odds = exp(min(highest + log(mass) - unscored[UNSCORED * position + 1], 80.0f));
    const float of_draw = min(fit[2] / (1.0f + odds), 1.0f);
    const float of_best = exp(min(fit[0] - fit[1] * gap, 0.0f));
    const bool none = highest <= -Finite<T>::highest();
    risk[position] = none ? 2.0f : greedy ? of_best : of_draw;
  }
}

}  // namespace flash_head
