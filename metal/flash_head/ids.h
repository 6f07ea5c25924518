// ids: the token ids of the probed clusters, in the order of their logits. One thread per slot.

namespace flash_head {

template <int N, typename Probes, typename Ids>
inline void candidate_ids(
    Probes probes,     // (R, S) uint
    Ids token_ids,     // (slots,) uint, V for a padded slot
    device uint* ids,  // (R, S, N)
    uint held,         // S
    uint3 grid_position) {
  if (grid_position.x < held * N) {
    const size_t position = grid_position.y;
    const size_t cluster = probes[position * held + grid_position.x / N];
    ids[position * held * N + grid_position.x] = token_ids[cluster * N + grid_position.x % N];
  }
}

}  // namespace flash_head
