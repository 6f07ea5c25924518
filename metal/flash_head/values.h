// values: finite ones, NaN, and their order

namespace flash_head {

template <typename T>
struct Finite;
template <>
struct Finite<float> {
  static float highest() { return as_type<float>(0x7f7fffffu); }
};
template <>
struct Finite<half> {
  static float highest() { return 65504.0f; }
};
template <>
struct Finite<bfloat16_t> {
  static float highest() { return as_type<float>(0x7f7f0000u); }
};

template <typename T>
inline T to_finite(float value) {
  const float highest = Finite<T>::highest();
  return T(isnan(value) ? value : clamp(value, -highest, highest));
}

// Unsigned keys in the order of the scores: -0 equals 0, and NaN is above every number, as it is
// for MLX's sort and argmax. No score has the key 0.
inline uint order_key(float score) {
  if (isnan(score)) {
    return 0xffffffffu;
  }
  const uint bits = score == 0.0f ? 0u : as_type<uint>(score);
  return bits ^ ((bits >> 31) ? 0xffffffffu : 0x80000000u);
}

inline float score_of(uint key) {
  return as_type<float>(key ^ ((key >> 31) ? 0x80000000u : 0xffffffffu));
}

// Largest key of the threadgroup, on every thread. `shared` holds one key per simdgroup.
template <int SIMDGROUPS>
inline uint threadgroup_max(uint key, threadgroup uint* shared, uint simdgroup, uint lane) {
  key = simd_max(key);
  if (lane == 0) {
    shared[simdgroup] = key;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  return simd_max(shared[min(lane, uint(SIMDGROUPS - 1))]);
}

// Largest key of the threadgroup and the lowest id that has it, on every thread. `shared` holds two
// values per simdgroup.
template <int SIMDGROUPS>
inline void threadgroup_best(
    thread uint& key, thread uint& id, threadgroup uint* shared, uint simdgroup, uint lane) {
  const uint highest = simd_max(key);
  const uint lowest = simd_min(key == highest ? id : 0xffffffffu);
  if (lane == 0) {
    shared[simdgroup] = highest;
    shared[SIMDGROUPS + simdgroup] = lowest;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  const uint other = min(lane, uint(SIMDGROUPS - 1));
  key = simd_max(shared[other]);
  id = simd_min(shared[other] == key ? shared[SIMDGROUPS + other] : 0xffffffffu);
}

}  // namespace flash_head
