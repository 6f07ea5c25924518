// adjust: the scored logits after biases and penalties, and a mask
//
// A row of `words` holds what a text's biases and penalties change: the bits of the repetition,
// presence and frequency penalties, then for each of K tokens its id, the bits of its bias, and
// whether it is repeated (bit 0), present (bit 1) and how often it occurs (from bit 2 on). `latest` is
// the latest token, which may not be known on the host yet: it is repeated and present, and occurs
// once more. All of them were probed. The operations and their rounding to T are mlx-lm's, in its order:
//   x + bias;  x < 0 ? x * repetition : x / repetition;  x - presence;  x - frequency, once each time
// A token whose bit of `allowed` is 0 gets the lowest finite value. Words of another number than
// ceil(V/32) are no mask, and a row of no tokens whose latest one is V changes nothing.
//
// One thread a probe, which takes the cluster's N tokens one after the other. It reads and writes all
// scored logits once. No threadgroup memory, no barrier.

namespace flash_head {

template <typename T>
inline T rounded_of_bits(uint bits) {
  return T(as_type<float>(bits));
}

template <typename T, typename Words>
inline T adjusted(T x, uint id, uint latest, Words words, size_t row, uint n_tokens) {
  uint bias = 0;
  uint counts = 0;
  bool changes = id == latest;
  for (uint i = 0; i < n_tokens; i++) {
    const size_t at = row + ADJUST_HEAD + i * ADJUST_TOKEN;
    if (words[at] == id) {
      changes = true;
      bias = words[at + 1];
      counts = words[at + 2];
    }
  }
  if (!changes) {
    return x;
  }
  if (id == latest) {
    counts = (counts | 3u) + 4u;
  }
  x = T(float(x) + float(rounded_of_bits<T>(bias)));
  const float repetition = float(rounded_of_bits<T>(words[row]));
  if ((counts & 1u) != 0) {
    x = float(x) < 0.0f ? T(float(x) * repetition) : T(float(x) / repetition);
  }
  if ((counts & 2u) != 0) {
    x = T(float(x) - float(rounded_of_bits<T>(words[row + 1])));
  }
  const float frequency = float(rounded_of_bits<T>(words[row + 2]));
  if (frequency != 0.0f) {
    for (uint i = 0; i < counts >> 2; i++) {
      x = T(float(x) - frequency);
    }
  }
  return x;
}

template <
    int N,
    int V,
    typename T,
    typename Probes,
    typename Ids,
    typename Logits,
    typename Words,
    typename Latest,
    typename Allowed>
inline void adjust(
    Probes probes,          // (R, S) uint
    Ids token_ids,          // (slots,) uint, V for a padded slot
    Logits logits,          // (R, S, N)
    Words words,            // (R, W) uint
    Latest latest,          // (R,) uint, V for none
    Allowed allowed,        // (R, M) uint
    device T* changed,      // (R, S, N)
    device float* best,     // (R, S)
    uint held,              // S
    uint n_words,           // W
    uint n_mask_words,      // M
    uint row,
    uint place) {
  if (place >= held) {
    return;
  }
  const size_t probe = size_t(row) * held + place;
  const bool repeats = place > 0 && probes[probe] == probes[probe - 1];
  uint highest = order_key(-Finite<T>::highest());
  for (uint i = 0; i < uint(N); i++) {
    T x = logits[probe * N + i];
    const uint id = token_ids[size_t(probes[probe]) * N + i];
    if (id != uint(V) && !repeats) {
      const T y = adjusted<T>(
          x, id, latest[row], words, size_t(row) * n_words,
          (n_words - ADJUST_HEAD) / ADJUST_TOKEN);
      x = to_finite<T>(float(y));
      const size_t word = size_t(row) * n_mask_words + id / 32;
      if (n_mask_words == uint((V + 31) / 32) && (allowed[word] >> (id % 32) & 1u) == 0) {
        x = T(-Finite<T>::highest());
      }
    }
    changed[probe * N + i] = x;
    highest = max(highest, order_key(float(x)));
  }
  best[probe] = float(score_of(highest));
}

}  // namespace flash_head
