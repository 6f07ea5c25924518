// What screen and certain know of a set of tokens, beside a proposed one
//
// The logit x of a slot may lie tolerance + relative * |x| away from what the state alone gives. The
// model's logit is Map::of(x), which rises. A scored logit is already the model's. It may be off by as
// much if its own tolerance is above 0, and is exact otherwise.
// Masses are relative to the proposed token's logit. Noise is computed where it may matter alone.

namespace flash_head {

constant constexpr float LOWEST = -3.4028235e38f;
constant constexpr float NOISE_MARGIN = 1e-5f;  // two implementations of a logarithm differ
constant constexpr float MOST_NATS = 80.0f;     // exp() of more is infinite
constant constexpr float LIKELY_NOISE = 11.0f;  // one in e^11 tokens has more
constant constexpr int TALLY = 8;              // values of a Tally

// What is known of a set of tokens.
struct Tally {
  float largest;
  float best;
  float rival;
  float mass;
  float doubt;      // how much the mass may be off
  float mass_above;
  float n_above;
  float mass_over;  // of those above the cut
};

inline Tally empty_tally() { return Tally{0.0f, LOWEST, LOWEST, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f}; }

// How far the logit of one token may be off.
struct Tolerance {
  float absolute;
  float relative;

  float of(float x) const { return absolute + relative * fabs(x); }
};

// Of a scored logit: it is the model's, and exact where `tolerance` is 0 but for a map that fails to rise.
template <typename Map>
inline Tolerance scored_tolerance(float tolerance, float relative) {
  const bool exact = tolerance == 0.0f;
  return Tolerance{
      Map::slope() * tolerance, Map::slack() + (exact ? 0.0f : relative + Map::rounding())};
}

// A token whose logit is known, within a tolerance.
struct Known {
  float logit;
  float reach;  // how far it may be off, at most

  float highest() const { return logit + reach; }
};

// A token whose logit before the map is known: its highest one is closer than the reach says, and
// costs more.
template <typename Map>
struct Mapped {
  float x;
  float tolerance;
  float logit;
  float reach;

  float highest() const {
    if (Map::identity()) {
      return logit + reach;
    }
    const float most = Map::of(x + tolerance);
    return most + Map::slack() * fabs(most);
  }
};

template <typename Map>
inline Mapped<Map> mapped_token(float x, Tolerance tolerance) {
  const float off = tolerance.of(x);
  const float logit = Map::of(x);
  const float reach = Map::identity()
      ? off
      : Map::slope() * off + (Map::rounding() + Map::slack()) * fabs(logit);
  return Mapped<Map>{x, off, logit, reach};
}

// The proposed token of a state, and the lowest that its values may be.
struct Proposed {
  float logit;
  float lowest;      // within the tolerance
  float scale;       // 1 / temperature; 0: greedy
  float worst;       // the lowest noisy logit
  float cut;         // logits above which another's noise is likely to reach it
  uint key_0;
  uint key_1;
};

template <typename Settings, typename Keys>
inline Proposed make_proposed(
    float logit, Tolerance scored, uint token, Settings settings, Keys keys, uint state) {
  Proposed proposed = {
      logit, logit - scored.of(logit), settings[3 * state], 0.0f, -LOWEST, keys[2 * state],
      keys[2 * state + 1]};
  if (proposed.scale != 0.0f) {
    const float noise = noise_of(token, proposed.key_0, proposed.key_1);
    const float noisy = proposed.lowest * proposed.scale + noise;
    proposed.worst = noisy - NOISE_MARGIN * max(1.0f, fabs(noisy));
    proposed.cut = (proposed.worst - LIKELY_NOISE) / proposed.scale;
  }
  return proposed;
}

// How much more or less of a mass there may be if its logit is off by `reach`: at least exp(reach) - 1.
inline float share_off(float reach) {
  return reach < 1.0f ? reach + reach * reach : exp(min(reach, MOST_NATS));
}

// Takes in a token, but for the best, which the caller knows in its own way.
template <typename Token, typename Id>
inline void take_in(thread Tally& tally, Proposed proposed, Token token, Id id) {
  const float most = token.logit + token.reach;
  const float share = fast::exp(min(token.logit - proposed.logit, MOST_NATS));
  tally.mass += share;
  tally.doubt += share * share_off(token.reach);
  const float least = token.logit - token.reach;
  if (least > proposed.cut) {
    tally.mass_over += fast::exp(min(least - proposed.logit, MOST_NATS));
  }
  const bool above = most > proposed.lowest;
  const bool rivals = proposed.scale != 0.0f && most > tally.rival &&
      most * proposed.scale + MOST_NOISE >= proposed.worst;
  if (!above && !rivals) {
    return;
  }
  const float highest = token.highest();
  if (highest > proposed.lowest) {
    tally.mass_above += fast::exp(min(highest - proposed.logit, MOST_NATS));
    tally.n_above += 1.0f;
  }
  const float scaled = highest * proposed.scale;
  if (rivals && highest > tally.rival && scaled + MOST_NOISE >= proposed.worst &&
      scaled + noise_of(id(), proposed.key_0, proposed.key_1) >= proposed.worst) {
    tally.rival = highest;
  }
}

inline float higher(float best, float logit) {
  return isnan(logit) || logit > best ? logit : best;
}

inline float max_of(float a) {
  return score_of(simd_max(order_key(a)));  // NaN is the highest
}

inline Tally reduce_lanes(Tally tally) {
  return Tally{
      max_of(tally.largest), max_of(tally.best), max_of(tally.rival), simd_sum(tally.mass),
      simd_sum(tally.doubt), simd_sum(tally.mass_above), simd_sum(tally.n_above),
      simd_sum(tally.mass_over)};
}

// What all simdgroups have, on every thread. `shared` holds TALLY values a simdgroup.
template <int SIMDGROUPS>
inline Tally reduce_tally(
    Tally tally, threadgroup float* shared, uint simdgroup, uint lane) {
  tally = reduce_lanes(tally);
  if (lane == 0) {
    threadgroup float* mine = shared + TALLY * simdgroup;
    mine[0] = tally.largest;
    mine[1] = tally.best;
    mine[2] = tally.rival;
    mine[3] = tally.mass;
    mine[4] = tally.doubt;
    mine[5] = tally.mass_above;
    mine[6] = tally.n_above;
    mine[7] = tally.mass_over;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  tally = empty_tally();
  if (lane < uint(SIMDGROUPS)) {
    const threadgroup float* other = shared + TALLY * lane;
    tally = Tally{
        other[0], other[1], other[2], other[3], other[4], other[5], other[6], other[7]};
  }
  return reduce_lanes(tally);
}

template <typename Ids>
struct IdOf {
  Ids token_ids;
  size_t slot;
  uint operator()() const { return token_ids[slot]; }
};

}  // namespace flash_head
