// screen and certain: which of k proposed tokens are sure to be the dense choice, by the logits of all
// slots that one product gave for the k states
//
// A slot's logit may lie `room` away from what a state alone has, a scored logit `scored_room`. Within
// these, certain says whether no other token can be the choice:
//   greedy  the token's logit is above every other's, by what a log-probability may be rounded too
//   drawn   the token is kept, and each token that may have a higher noisy logit is not
// A token is surely kept if top_p holds with the most mass above it and the least in all, top_k with
// the most tokens above it, and min_p with the highest logit. One is surely left out if the opposite
// holds for it. It is enough to look at the highest such rival. Unscored mass above it counts down to
// a cut, which few rivals exceed: LIKELY_NOISE says how much noise it takes to be one below it.
//
// screen reads the slots once: one threadgroup takes SCREEN_CLUSTERS clusters of a state, marks those
// that were scored by a bit each, and writes what certain adds up (TALLIED values):
//   largest |logit|; of the others the best, the highest rival, their mass, the mass and the number of
//   those above the token, the mass above the cut; the token's logit and place among the scored ones.
// Masses are relative to the token's logit. Noise is computed where it may matter alone.
// Threadgroup memory: 132 + 224 bytes. Barriers: 2, then 1.
// certain: one threadgroup a state, over the scored logits; once more if top_p or top_k must leave a
// rival out. Threadgroup memory: 576 bytes. Barriers: 1 or 2.

namespace flash_head {

constant constexpr float LOWEST = -3.4028235e38f;
constant constexpr float NOISE_ROOM = 1e-5f;   // two implementations of a logarithm differ
constant constexpr float MASS_ROOM = 1e-4f;    // and the sums of many exponentials
constant constexpr float MOST_NATS = 80.0f;    // exp() of more is infinite
constant constexpr float LIKELY_NOISE = 11.0f;  // one in e^11 tokens has more

// What is known of a set of tokens.
struct Tally {
  float largest;
  float best;
  float rival;
  float mass;
  float mass_above;
  float n_above;
  float mass_over;  // of those above the cut
};

inline Tally empty_tally() { return Tally{0.0f, LOWEST, LOWEST, 0.0f, 0.0f, 0.0f, 0.0f}; }

// The proposed token of a state, and the lowest that its values may be.
struct Proposed {
  float logit;
  float lowest;      // within the room
  float scale;       // 1 / temperature; 0: greedy
  float worst;       // the lowest noisy logit
  float cut;         // logits above which another's noise is likely to reach it
  uint key_0;
  uint key_1;
};

template <typename Settings, typename Keys>
inline Proposed make_proposed(
    float logit, float scored_room, uint token, Settings settings, Keys keys, uint state) {
  Proposed proposed = {
      logit, logit - scored_room, settings[3 * state], 0.0f, -LOWEST, keys[2 * state],
      keys[2 * state + 1]};
  if (proposed.scale != 0.0f) {
    const float noise = noise_of(token, proposed.key_0, proposed.key_1);
    const float noisy = proposed.lowest * proposed.scale + noise;
    proposed.worst = noisy - NOISE_ROOM * max(1.0f, fabs(noisy));
    proposed.cut = (proposed.worst - LIKELY_NOISE) / proposed.scale;
  }
  return proposed;
}

// Takes in a token whose logit lies within `room`.
template <typename Id>
inline void take_in(thread Tally& tally, Proposed proposed, float logit, float room, Id id) {
  const float highest = logit + room;
  tally.best = isnan(logit) || logit > tally.best ? logit : tally.best;
  tally.mass += fast::exp(min(logit - proposed.logit, MOST_NATS));
  if (highest > proposed.lowest) {
    tally.mass_above += fast::exp(min(highest - proposed.logit, MOST_NATS));
    tally.n_above += 1.0f;
  }
  if (logit - room > proposed.cut) {
    tally.mass_over += fast::exp(min(logit - room - proposed.logit, MOST_NATS));
  }
  const float scaled = highest * proposed.scale;
  if (proposed.scale != 0.0f && highest > tally.rival && scaled + MOST_NOISE >= proposed.worst &&
      scaled + noise_of(id(), proposed.key_0, proposed.key_1) >= proposed.worst) {
    tally.rival = highest;
  }
}

inline float max_of(float a) {
  return score_of(simd_max(order_key(a)));  // NaN is the highest
}

inline Tally reduce_lanes(Tally tally) {
  return Tally{
      max_of(tally.largest), max_of(tally.best), max_of(tally.rival), simd_sum(tally.mass),
      simd_sum(tally.mass_above), simd_sum(tally.n_above), simd_sum(tally.mass_over)};
}

// What all simdgroups have, on every thread. `shared` holds 7 values a simdgroup.
template <int SIMDGROUPS>
inline Tally reduce_tally(
    Tally tally, threadgroup float* shared, uint simdgroup, uint lane) {
  tally = reduce_lanes(tally);
  if (lane == 0) {
    threadgroup float* mine = shared + 7 * simdgroup;
    mine[0] = tally.largest;
    mine[1] = tally.best;
    mine[2] = tally.rival;
    mine[3] = tally.mass;
    mine[4] = tally.mass_above;
    mine[5] = tally.n_above;
    mine[6] = tally.mass_over;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  tally = empty_tally();
  if (lane < uint(SIMDGROUPS)) {
    const threadgroup float* other = shared + 7 * lane;
    tally = Tally{other[0], other[1], other[2], other[3], other[4], other[5], other[6]};
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
    typename Slots,
    typename Probes,
    typename Ids,
    typename Places,
    typename Logits,
    typename Tokens,
    typename Settings,
    typename Keys,
    typename Room>
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
    device float* parts,              // (k, parts, TALLIED)
    threadgroup atomic<uint>* marks,  // [SCREEN_CLUSTERS / 32]
    threadgroup uint* place,          // [1]
    threadgroup float* shared,        // [7 * WIDE_SIMDGROUPS]
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
  const Proposed proposed = make_proposed(logit, scored_rooms[state], token, settings, keys, state);
  const float room = rooms[state];

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
    take_in(tally, proposed, x, room, IdOf<Ids>{token_ids, slot});
  }
  tally = reduce_tally<WIDE_SIMDGROUPS>(tally, shared, simdgroup, lane);
  if (thread_id == 0) {
    device float* part = parts + (size_t(state) * n_parts + group.x) * TALLIED;
    part[0] = tally.largest;
    part[1] = tally.best;
    part[2] = tally.rival;
    part[3] = tally.mass;
    part[4] = tally.mass_above;
    part[5] = tally.n_above;
    part[6] = tally.mass_over;
    part[7] = logit;
    part[8] = float(index);
  }
}

template <
    int N,
    int V,
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
    Logits logits,              // (k, S, N)
    Tokens tokens,              // (k,) uint
    Settings settings,          // (k, 3) float
    Counts top_k,               // (k,) uint; 0 keeps all
    Keys keys,                  // (k, 2) uint
    Room rooms,                 // (k,) float
    Room scored_rooms,          // (k,) float
    float epsilon,              // the spacing of log-probabilities, relative
    device bool* sure,          // (k,)
    device float* known,        // (k, 3): largest |logit|, best unscored, log of their mass
    threadgroup float* shared,  // [9 * ROW_SIMDGROUPS]
    uint held,                  // S
    uint n_parts,
    uint state,
    uint thread_id,
    uint simdgroup,
    uint lane) {
  const float room = rooms[state];
  const float scored_room = scored_rooms[state];
  const size_t first_part = size_t(state) * n_parts;
  const uint proposed_index = uint(parts[first_part * TALLIED + 8]);
  const Proposed proposed =
      make_proposed(parts[first_part * TALLIED + 7], scored_room, tokens[state], settings, keys, state);

  Tally others = empty_tally();  // not scored; each simdgroup adds up all parts
  for (uint i = lane; i < n_parts; i += LANES) {
    const size_t at = (first_part + i) * TALLIED;
    others.largest = max(others.largest, float(parts[at]));
    const float best = parts[at + 1];
    others.best = isnan(best) || best > others.best ? best : others.best;
    others.rival = max(others.rival, float(parts[at + 2]));
    others.mass += parts[at + 3];
    others.mass_above += parts[at + 4];
    others.n_above += parts[at + 5];
    others.mass_over += parts[at + 6];
  }
  others = reduce_lanes(others);

  Tally scored = empty_tally();  // but the token
  const size_t first = size_t(state) * held;
  for (uint i = thread_id; i < held * N; i += ROW_THREADS) {
    const float x = float(logits[first * N + i]);
    if (i != proposed_index && x > -Finite<float>::highest()) {
      const size_t first_slot = size_t(probes[first + i / N]) * N;
      take_in(scored, proposed, x, scored_room, IdOf<Ids>{token_ids, first_slot + i % N});
    } else if (isnan(x)) {
      scored.best = x;
    }
  }
  scored = reduce_tally<ROW_SIMDGROUPS>(scored, shared, simdgroup, lane);

  const float scored_mass = scored.mass + 1.0f;
  const float others_best = others.best + room;
  bool yes = false;
  if (proposed.scale == 0.0f) {
    const float total = proposed.logit + log(scored_mass + others.mass * exp(min(room, MOST_NATS)));
    const float merged = (total - scored.best + 0.5f) * epsilon;
    const float merged_others = (total - others.best + 0.5f) * epsilon;
    yes = proposed.logit - scored.best > 2.0f * scored_room + merged &&
        proposed.logit - others.best > room + scored_room + merged_others;
  } else {
    const float top_p = settings[3 * state + 1];
    const float log_min_p = settings[3 * state + 2];
    const float n_top = float(top_k[state]);
    const float least =
        top_p * (1.0f - MASS_ROOM) * (scored_mass * exp(-scored_room) + others.mass * exp(-room));
    const float most = top_p * (1.0f + MASS_ROOM) *
        (scored_mass * exp(min(scored_room, MOST_NATS)) + others.mass * exp(min(room, MOST_NATS)));
    yes = (top_p >= 1.0f || scored.mass_above + others.mass_above < least) &&
        (n_top == 0.0f || scored.n_above + others.n_above < n_top) &&
        proposed.lowest >= max(scored.best + scored_room, others_best) + log_min_p &&
        !isnan(scored.best) && !isnan(others.best);
    const float rival = max(scored.rival, others.rival);
    if (rival > LOWEST) {  // of all threads alike
      const float best = max(proposed.lowest, scored.best - scored_room);
      float mass = 0.0f;
      float number = 0.0f;
      for (uint i = thread_id; i < held * N; i += ROW_THREADS) {
        const float x = float(logits[first * N + i]);
        if (x - scored_room > rival) {
          mass += fast::exp(min(x - scored_room - proposed.logit, MOST_NATS));
          number += 1.0f;
        }
      }
      mass = simd_sum(mass);
      number = simd_sum(number);
      threadgroup float* again = shared + 7 * ROW_SIMDGROUPS;
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
