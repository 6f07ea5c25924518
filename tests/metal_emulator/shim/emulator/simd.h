// Barriers and the operations of a simdgroup: each lane hands in its value, waits for the others,
// and reads theirs. A reduction is a butterfly, so that it does not depend on the threads' order.

#pragma once

namespace metal {

enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_device_and_threadgroup = 3 };
constexpr mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags(uint(a) | uint(b)); }

METAL_FUNC void threadgroup_barrier(mem_flags flags) {
  metal_emulator_threadgroup_barrier(uint(flags));
}
METAL_FUNC void simdgroup_barrier(mem_flags flags) { metal_emulator_simdgroup_barrier(uint(flags)); }

// The numbers by which the runtime tells operations apart.
enum simd_operation : uint {
  simd_op_sum = 16, simd_op_min, simd_op_max, simd_op_prefix, simd_op_shuffle, simd_op_ballot
};

template <typename T>
METAL_FUNC thread metal_emulator_lanes* exchange(uint operation, T value) {
  typedef typename vector_traits<T>::element element;
  static_assert(sizeof(element) <= 4 && !is_same_v<element, bool>,
                "simd operations take half, float, bfloat and integers of up to 32 bits");
  return metal_emulator_exchange(operation, &value, sizeof(T));
}
template <typename T>
METAL_FUNC T value_of(const thread metal_emulator_lanes* lanes, uint lane) {
  return *(const thread T*)lanes->values[lane];
}
template <typename T>
METAL_FUNC T active_value_of(const thread metal_emulator_lanes* lanes, uint lane) {
  if (lane >= lanes->n_lanes) metal_emulator_inactive_lane(lane);
  return value_of<T>(lanes, lane);
}

struct simd_add { template <typename T> static METAL_FUNC T of(T a, T b) { return T(a + b); } };
struct simd_lesser { template <typename T> static METAL_FUNC T of(T a, T b) { return T(min(a, b)); } };
struct simd_greater { template <typename T> static METAL_FUNC T of(T a, T b) { return T(max(a, b)); } };

template <typename Operation, typename T>
METAL_FUNC T reduce(uint operation, T value) {
  thread metal_emulator_lanes* lanes = exchange(operation, value);
  if (!lanes->has_result) {
    T partial[32];
    uint n = lanes->n_lanes;
    for (uint i = 0; i < n; ++i) partial[i] = value_of<T>(lanes, i);
    for (uint distance = 16; distance > 0; distance /= 2) {
      for (uint i = 0; i < distance; ++i) {
        if (i + distance < n) partial[i] = Operation::template of<T>(partial[i], partial[i + distance]);
      }
    }
    *(thread T*)lanes->result = partial[0];
    lanes->has_result = 1;
  }
  return *(const thread T*)lanes->result;
}
template <typename T> METAL_FUNC T simd_sum(T x) { return reduce<simd_add>(simd_op_sum, x); }
template <typename T> METAL_FUNC T simd_min(T x) { return reduce<simd_lesser>(simd_op_min, x); }
template <typename T> METAL_FUNC T simd_max(T x) { return reduce<simd_greater>(simd_op_max, x); }

template <typename T> METAL_FUNC T prefix_sum(T value, bool inclusive) {
  thread metal_emulator_lanes* lanes = exchange(simd_op_prefix, value);
  uint n = lanes->lane + (inclusive ? 1 : 0);
  T result = 0;
  for (uint i = 0; i < n; ++i) result = T(result + value_of<T>(lanes, i));
  return result;
}
template <typename T> METAL_FUNC T simd_prefix_inclusive_sum(T x) { return prefix_sum(x, true); }
template <typename T> METAL_FUNC T simd_prefix_exclusive_sum(T x) { return prefix_sum(x, false); }

template <typename T> METAL_FUNC T simd_shuffle(T x, ushort lane) {
  return active_value_of<T>(exchange(simd_op_shuffle, x), lane);
}
template <typename T> METAL_FUNC T simd_shuffle_xor(T x, ushort mask) {
  thread metal_emulator_lanes* lanes = exchange(simd_op_shuffle, x);
  return active_value_of<T>(lanes, lanes->lane ^ mask);
}
// A lane whose source lies outside the simdgroup keeps its own value.
template <typename T> METAL_FUNC T simd_shuffle_down(T x, ushort delta) {
  thread metal_emulator_lanes* lanes = exchange(simd_op_shuffle, x);
  uint from = lanes->lane + delta;
  return from < 32 ? active_value_of<T>(lanes, from) : x;
}

struct simd_vote {
  typedef ulong vote_t;
  vote_t bits;
  explicit constexpr operator vote_t() const { return bits; }
};
METAL_FUNC simd_vote simd_ballot(bool predicate) {
  thread metal_emulator_lanes* lanes = exchange(simd_op_ballot, uint(predicate));
  simd_vote vote = {0};
  for (uint i = 0; i < lanes->n_lanes; ++i) vote.bits |= ulong(value_of<uint>(lanes, i)) << i;
  return vote;
}

}  // namespace metal
