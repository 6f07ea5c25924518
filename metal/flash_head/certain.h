// certain: which of k proposed tokens are sure to be the dense choice
//
// Within the tolerances of tally.h no other token can be the choice:
//   greedy  the token's logit is above every other's, by what a log-probability may be rounded too
//   drawn   the token is kept, and each token that may have a higher noisy logit is not
// A token is surely kept if top_p holds with the most mass above it and the least in all, top_k with
// the most tokens above it, and min_p with the highest logit. One is surely left out if the opposite
// holds for it. It is enough to look at the highest such rival. Unscored mass above it counts down to
// a cut, which few rivals exceed: LIKELY_NOISE says how much noise it takes to be one below it.
//
// One threadgroup a state, over the scored logits; once more if top_p or top_k must leave a rival out.
// Threadgroup memory: 640 bytes. Barriers: 1 or 2.

namespace flash_head {

constant constexpr float MASS_MARGIN = 1e-4f;  // the sums of many exponentials differ

template <
    int N,
    int V,
    typename Map,
    typename T,
    typename Parts,
    typename Probes,
    typename Ids,
    typename Logits,
    typename Tokens,
    typename Settings,
    typename Counts,
    typename Keys,
    typename Tolerances>
inline void certain(
    Parts parts,                    // (k, parts, TALLIED) float
    Probes probes,                  // (k, S) uint
    Ids token_ids,                  // (slots,) uint
    Logits logits,                  // (k, S, N) of T
    Tokens tokens,                  // (k,) uint
    Settings settings,              // (k, 3) float
    Counts top_k,                   // (k,) uint; 0 keeps all
    Keys keys,                      // (k, 2) uint
    Tolerances product_tolerances,  // (k,) float
    Tolerances scored_tolerances,   // (k,) float
    float relative,
    float epsilon,                  // the spacing of log-probabilities, relative
    device bool* sure,              // (k,)
    device float* known,            // (k, 3): largest |logit|, best unscored, log of their mass
    threadgroup float* shared,      // [(TALLY + 2) * ROW_SIMDGROUPS]
    uint held,                      // S
    uint n_parts,
    uint state,
    uint thread_id,
    uint simdgroup,
    uint lane) {
  const Tolerance tolerance = {product_tolerances[state], relative};
  const Tolerance off = scored_tolerance<Map>(scored_tolerances[state], relative);
  const size_t first_part = size_t(state) * n_parts;
  const uint proposed_index = uint(parts[first_part * TALLIED + 9]);
  const Proposed proposed =
      make_proposed(parts[first_part * TALLIED + 8], off, tokens[state], settings, keys, state);

  Tally others = empty_tally();  // not scored; each simdgroup adds up all parts
  for (uint i = lane; i < n_parts; i += LANES) {
    const size_t at = (first_part + i) * TALLIED;
    others.largest = max(others.largest, float(parts[at]));
    others.best = higher(others.best, parts[at + 1]);
    others.rival = max(others.rival, float(parts[at + 2]));
    others.mass += parts[at + 3];
    others.doubt += parts[at + 4];
    others.mass_above += parts[at + 5];
    others.n_above += parts[at + 6];
    others.mass_over += parts[at + 7];
  }
  others = reduce_lanes(others);

  Tally scored = empty_tally();  // but the token
  const size_t first = size_t(state) * held;
  for (uint i = thread_id; i < held * N; i += ROW_THREADS) {
    const float x = float(logits[first * N + i]);
    if (i != proposed_index && x > -Finite<T>::highest()) {  // neither padded nor masked
      const size_t slot = size_t(N) * probes[first + i / N] + i % N;
      scored.best = higher(scored.best, x);
      take_in(scored, proposed, Known{x, off.of(x)}, IdOf<Ids>{token_ids, slot});
    } else if (isnan(x)) {
      scored.best = x;
    }
  }
  scored = reduce_tally<ROW_SIMDGROUPS>(scored, shared, simdgroup, lane);

  const float own_off = off.of(proposed.logit);
  const float scored_mass = scored.mass + 1.0f;
  const float scored_best = scored.best > LOWEST ? scored.best + off.of(scored.best) : scored.best;
  const float others_best =
      others.best > LOWEST ? mapped_token<Map>(others.best, tolerance).highest() : others.best;
  bool yes = false;
  if (proposed.scale == 0.0f) {
    const float total = proposed.logit + log(scored_mass + others.mass + others.doubt);
    const float merged = (total - scored.best + 0.5f) * epsilon;
    const float merged_others = (total - others_best + 0.5f) * epsilon;
    yes = proposed.lowest - scored_best > merged && proposed.lowest - others_best > merged_others;
  } else {
    const float top_p = settings[3 * state + 1];
    const float log_min_p = settings[3 * state + 2];
    const float n_top = float(top_k[state]);
    const float doubt = scored.doubt + share_off(own_off) + others.doubt;
    const float least =
        top_p * (1.0f - MASS_MARGIN) * max(scored_mass + others.mass - doubt, 0.0f);
    const float most = top_p * (1.0f + MASS_MARGIN) * (scored_mass + others.mass + doubt);
    yes = (top_p >= 1.0f || scored.mass_above + others.mass_above < least) &&
        (n_top == 0.0f || scored.n_above + others.n_above < n_top) &&
        proposed.lowest >= max(scored_best, others_best) + log_min_p &&
        !isnan(scored.best) && !isnan(others.best);
    const float rival = max(scored.rival, others.rival);
    if (rival > LOWEST) {  // of all threads alike
      const float best = max(proposed.lowest, scored.best - off.of(scored.best));
      float mass = 0.0f;
      float number = 0.0f;
      for (uint i = thread_id; i < held * N; i += ROW_THREADS) {
        const float x = float(logits[first * N + i]);
        const float lowest = x - off.of(x);
        if (lowest > rival) {
          mass += fast::exp(min(lowest - proposed.logit, MOST_NATS));
          number += 1.0f;
        }
      }
      mass = simd_sum(mass);
      number = simd_sum(number);
      threadgroup float* again = shared + TALLY * ROW_SIMDGROUPS;
      if (lane == 0) {
        again[simdgroup] = mass;
        again[ROW_SIMDGROUPS + simdgroup] = number;
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
      const bool within = lane < uint(ROW_SIMDGROUPS);
      mass = simd_sum(within ? again[lane] : 0.0f) + (rival <= proposed.cut ? others.mass_over : 0.0f);
      number = simd_sum(within ? again[ROW_SIMDGROUPS + lane] : 0.0f);
      yes = yes &&
          ((top_p < 1.0f && mass >= most) || (n_top > 0.0f && number >= n_top) ||
           rival < best + log_min_p);
    }
  }
  if (thread_id == 0) {
    sure[state] = yes && others.largest <= Finite<float>::highest();  // float16 may overflow
    known[3 * state] = others.largest;
    known[3 * state + 1] = others.best;
    known[3 * state + 2] = others.mass > 0.0f ? proposed.logit + log(others.mass) : others.best;
  }
}

}  // namespace flash_head
