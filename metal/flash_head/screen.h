// screen and certain: which of k proposed tokens are sure to be the dense choice, by the logits of all
// slots that one product gave for the k states
//
// A slot's logit x may lie room + relative * |x| away from what a state alone has. The model's logit
// is Map::of(x), which rises. A scored logit is the model's already and may lie as far off, if its
// scored_room is above 0; else it is exact. Within these tolerances, certain says whether no other
// token can be the choice:
//   greedy  the token's logit is above every other's, by what a log-probability may be rounded too
//   drawn   the token is kept, and each token that may have a higher noisy logit is not
// A token is surely kept if top_p holds with the most mass above it and the least in all, top_k with
// the most tokens above it, and min_p with the highest logit. One is surely left out if the opposite
// holds for it. It is enough to look at the highest such rival. Unscored mass above it counts down to
// a cut, which few rivals exceed: LIKELY_NOISE says how much noise it takes to be one below it.
// With a mask (MASKED), a token whose bit of `allowed` is 0 does not exist. It is looked up for tokens
// within NEGLIGIBLE nats of the proposed one alone: all others together have less than MASS_MARGIN of it.
//
// screen reads the slots once: one threadgroup takes SCREEN_CLUSTERS clusters of a state, marks those
// that were scored by a bit each, and writes what certain adds up (TALLIED values):
//   largest |x|; of the others the best x, the highest rival, their mass and how far it may be off, the
//   mass and the number of those above the token, the mass above the cut; the token's logit and place
//   among the scored ones.
// Masses are relative to the token's logit. Noise is computed where it may matter alone.
// Threadgroup memory: 132 + 256 bytes. Barriers: 2, then 1.
// certain: one threadgroup a state, over the scored logits; once more if top_p or top_k must leave a
// rival out. Threadgroup memory: 640 bytes. Barriers: 1 or 2.

namespace flash_head {

constant constexpr float LOWEST = -3.4028235e38f;
constant constexpr float NOISE_MARGIN = 1e-5f;   // two implementations of a logarithm differ
constant constexpr float MASS_MARGIN = 1e-4f;    // and the sums of many exponentials
constant constexpr float MOST_NATS = 80.0f;    // exp() of more is infinite
constant constexpr float LIKELY_NOISE = 11.0f;  // one in e^11 tokens has more
constant constexpr float NEGLIGIBLE = 30.0f;    // nats: a million tokens have e^-16 of the mass
constant constexpr int TALLY = 8;               // values of a Tally

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

// Of a scored logit: it is the model's, and exact where `room` is 0 but for a map that fails to rise.
template <typename Map>
inline Tolerance scored_tolerance(float room, float relative) {
  const bool exact = room == 0.0f;
  return Tolerance{
      Map::slope() * room, Map::slack() + (exact ? 0.0f : relative + Map::rounding())};
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

template <
    int C,
    int N,
    int V,
    bool PADDED,
    bool MASKED,
    typename Map,
    typename Slots,
    typename Probes,
    typename Ids,
    typename Places,
    typename Logits,
    typename Tokens,
    typename Settings,
    typename Keys,
    typename Room,
    typename Allowed>
inline void screen(
    Slots slots,                      // (k, C, N)
    Probes probes,                    // (k, S) uint
    Ids token_ids,                    // (slots,) uint, V for a padded slot
    Places slot_of,                   // (V,) uint
    Logits logits,                    // (k, S, N)
    Tokens tokens,                    // (k,) uint
    Settings settings,                // (k, 3) float: inv_temperature, top_p, log_min_p
    Keys keys,                        // (k, 2) uint
    Room rooms,                       // (k,) float
    Room scored_rooms,                // (k,) float
    float relative,
    Allowed allowed,                  // (k, ceil(V/32)) uint, read where MASKED
    device float* parts,              // (k, parts, TALLIED)
    threadgroup atomic<uint>* marks,  // [SCREEN_CLUSTERS / 32]
    threadgroup uint* place,          // [1]
    threadgroup float* shared,        // [TALLY * WIDE_SIMDGROUPS]
    uint held,                        // S
    uint n_parts,
    uint3 group,
    uint thread_id,
    uint simdgroup,
    uint lane) {
  const uint state = group.y;
  const uint first = group.x * SCREEN_CLUSTERS;
  const uint n_clusters = min(uint(SCREEN_CLUSTERS), uint(C) - first);
  const uint token = tokens[state];
  const uint proposed_slot = slot_of[token];
  if (thread_id < uint(SCREEN_CLUSTERS / 32)) {
    atomic_store_explicit(&marks[thread_id], 0u, memory_order_relaxed);
  }
  if (thread_id == 0) {
    place[0] = held;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint i = thread_id; i < held; i += WIDE_THREADS) {
    const uint cluster = probes[size_t(state) * held + i];
    if (i > 0 && cluster == probes[size_t(state) * held + i - 1]) {
      continue;  // repeated, which stands side by side
    }
    if (cluster >= first && cluster - first < n_clusters) {
      atomic_fetch_add_explicit(
          &marks[(cluster - first) / 32], 1u << ((cluster - first) % 32), memory_order_relaxed);
    }
    if (cluster == proposed_slot / N) {
      place[0] = i;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  const uint index = min(place[0], held - 1) * N + proposed_slot % N;
  const float logit =
      place[0] < held ? float(logits[size_t(state) * held * N + index]) : as_type<float>(NOT_A_NUMBER);
  const Tolerance scored = scored_tolerance<Map>(scored_rooms[state], relative);
  const Proposed proposed = make_proposed(logit, scored, token, settings, keys, state);
  const Tolerance tolerance = {rooms[state], relative};
  const size_t words = size_t(state) * ((V + 31) / 32);

  Tally tally = empty_tally();
  for (uint i = thread_id; i < n_clusters * N; i += WIDE_THREADS) {
    const size_t slot = size_t(first) * N + i;
    const float x = float(slots[size_t(state) * (size_t(C) * N) + slot]);
    tally.largest = max(tally.largest, fabs(x));
    const uint cluster = i / N;
    const uint mark = atomic_load_explicit(&marks[cluster / 32], memory_order_relaxed);
    if ((mark >> (cluster % 32) & 1u) != 0 || (PADDED && token_ids[slot] == uint(V))) {
      continue;
    }
    const Mapped<Map> other = mapped_token<Map>(x, tolerance);
    if (MASKED && !(other.logit + other.reach < proposed.lowest - NEGLIGIBLE)) {
      const uint id = token_ids[slot];
      if ((allowed[words + id / 32] >> (id % 32) & 1u) == 0) {
        continue;
      }
    }
    tally.best = higher(tally.best, x);
    take_in(tally, proposed, other, IdOf<Ids>{token_ids, slot});
  }
  tally = reduce_tally<WIDE_SIMDGROUPS>(tally, shared, simdgroup, lane);
  if (thread_id == 0) {
    device float* part = parts + (size_t(state) * n_parts + group.x) * TALLIED;
    part[0] = tally.largest;
    part[1] = tally.best;
    part[2] = tally.rival;
    part[3] = tally.mass;
    part[4] = tally.doubt;
    part[5] = tally.mass_above;
    part[6] = tally.n_above;
    part[7] = tally.mass_over;
    part[8] = logit;
    part[9] = float(index);
  }
}

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
    typename Room>
inline void certain(
    Parts parts,                // (k, parts, TALLIED) float
    Probes probes,              // (k, S) uint
    Ids token_ids,              // (slots,) uint
    Logits logits,              // (k, S, N) of T
    Tokens tokens,              // (k,) uint
    Settings settings,          // (k, 3) float
    Counts top_k,               // (k,) uint; 0 keeps all
    Keys keys,                  // (k, 2) uint
    Room rooms,                 // (k,) float
    Room scored_rooms,          // (k,) float
    float relative,
    float epsilon,              // the spacing of log-probabilities, relative
    device bool* sure,          // (k,)
    device float* known,        // (k, 3): largest |logit|, best unscored, log of their mass
    threadgroup float* shared,  // [(TALLY + 2) * ROW_SIMDGROUPS]
    uint held,                  // S
    uint n_parts,
    uint state,
    uint thread_id,
    uint simdgroup,
    uint lane) {
  const Tolerance tolerance = {rooms[state], relative};
  const Tolerance off = scored_tolerance<Map>(scored_rooms[state], relative);
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
