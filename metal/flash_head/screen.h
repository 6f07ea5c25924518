// screen: what the logits of all slots, which one product gave for k states, say of the proposed tokens
//
// It reads the slots once. One threadgroup takes SCREEN_CLUSTERS clusters of a state and marks those
// that were scored by a bit each. It writes what certain adds up (TALLIED values):
//   largest |x|; of the others the best x, the highest rival, their mass and how far it may be off, the
//   mass and the number of those above the token, the mass above the cut; the token's logit and place
//   among the scored ones.
// With a mask (MASKED), a token whose bit of `allowed` is 0 does not exist. It is looked up for tokens
// within NEGLIGIBLE nats of the proposed one alone: all others together have less than MASS_MARGIN of it.
// Threadgroup memory: 132 + 256 bytes. Barriers: 2, then 1.

namespace flash_head {

constant constexpr float NEGLIGIBLE = 30.0f;  // nats: a million tokens have e^-16 of the mass

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
    typename Tolerances,
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
    Tolerances product_tolerances,    // (k,) float
    Tolerances scored_tolerances,     // (k,) float
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
  const Tolerance scored = scored_tolerance<Map>(scored_tolerances[state], relative);
  const Proposed proposed = make_proposed(logit, scored, token, settings, keys, state);
  const Tolerance tolerance = {product_tolerances[state], relative};
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

}  // namespace flash_head
