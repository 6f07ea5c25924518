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

// The numbers by which the runtime tells operations apart; run.py names them in its messages.
enum simd_operation : uint {
  simd_op_sum = 16, simd_op_product, simd_op_min, simd_op_max, simd_op_and, simd_op_or, simd_op_xor,
  simd_op_prefix, simd_op_shuffle, simd_op_broadcast, simd_op_ballot, simd_op_quad
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
struct simd_mul { template <typename T> static METAL_FUNC T of(T a, T b) { return T(a * b); } };
struct simd_lesser { template <typename T> static METAL_FUNC T of(T a, T b) { return T(min(a, b)); } };
struct simd_greater { template <typename T> static METAL_FUNC T of(T a, T b) { return T(max(a, b)); } };
struct simd_bit_and { template <typename T> static METAL_FUNC T of(T a, T b) { return T(a & b); } };
struct simd_bit_or { template <typename T> static METAL_FUNC T of(T a, T b) { return T(a | b); } };
struct simd_bit_xor { template <typename T> static METAL_FUNC T of(T a, T b) { return T(a ^ b); } };

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
template <typename T> METAL_FUNC T simd_product(T x) { return reduce<simd_mul>(simd_op_product, x); }
template <typename T> METAL_FUNC T simd_min(T x) { return reduce<simd_lesser>(simd_op_min, x); }
template <typename T> METAL_FUNC T simd_max(T x) { return reduce<simd_greater>(simd_op_max, x); }
template <typename T> METAL_FUNC T simd_and(T x) { return reduce<simd_bit_and>(simd_op_and, x); }
template <typename T> METAL_FUNC T simd_or(T x) { return reduce<simd_bit_or>(simd_op_or, x); }
template <typename T> METAL_FUNC T simd_xor(T x) { return reduce<simd_bit_xor>(simd_op_xor, x); }

template <typename Operation, typename T>
METAL_FUNC T prefix(T value, T identity, bool inclusive) {
  thread metal_emulator_lanes* lanes = exchange(simd_op_prefix, value);
  uint n = lanes->lane + (inclusive ? 1 : 0);
  T result = identity;
  for (uint i = 0; i < n; ++i) result = Operation::template of<T>(result, value_of<T>(lanes, i));
  return result;
}
template <typename T> METAL_FUNC T simd_prefix_inclusive_sum(T x) { return prefix<simd_add>(x, T(0), true); }
template <typename T> METAL_FUNC T simd_prefix_exclusive_sum(T x) { return prefix<simd_add>(x, T(0), false); }
template <typename T> METAL_FUNC T simd_prefix_inclusive_product(T x) { return prefix<simd_mul>(x, T(1), true); }
template <typename T> METAL_FUNC T simd_prefix_exclusive_product(T x) { return prefix<simd_mul>(x, T(1), false); }

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
template <typename T> METAL_FUNC T simd_shuffle_up(T x, ushort delta) {
  thread metal_emulator_lanes* lanes = exchange(simd_op_shuffle, x);
  return lanes->lane >= delta ? value_of<T>(lanes, lanes->lane - delta) : x;
}
template <typename T> METAL_FUNC T simd_shuffle_rotate_down(T x, ushort delta) {
  thread metal_emulator_lanes* lanes = exchange(simd_op_shuffle, x);
  return active_value_of<T>(lanes, (lanes->lane + delta) % 32);
}
template <typename T> METAL_FUNC T simd_shuffle_rotate_up(T x, ushort delta) {
  thread metal_emulator_lanes* lanes = exchange(simd_op_shuffle, x);
  return active_value_of<T>(lanes, (lanes->lane + 32 - delta % 32) % 32);
}
template <typename T> METAL_FUNC T simd_broadcast(T x, ushort lane) {
  return active_value_of<T>(exchange(simd_op_broadcast, x), lane);
}
template <typename T> METAL_FUNC T simd_broadcast_first(T x) {
  return value_of<T>(exchange(simd_op_broadcast, x), 0);
}

struct simd_vote {
  typedef ulong vote_t;
  vote_t bits;
  uint n_lanes;
  explicit constexpr operator vote_t() const { return bits; }
  bool any() const { return bits != 0; }
  bool all() const { return bits == (1ul << n_lanes) - 1; }
};
METAL_FUNC simd_vote simd_ballot(bool predicate) {
  thread metal_emulator_lanes* lanes = exchange(simd_op_ballot, uint(predicate));
  simd_vote vote = {0, lanes->n_lanes};
  for (uint i = 0; i < vote.n_lanes; ++i) vote.bits |= ulong(value_of<uint>(lanes, i)) << i;
  return vote;
}
METAL_FUNC bool simd_any(bool predicate) { return simd_ballot(predicate).any(); }
METAL_FUNC bool simd_all(bool predicate) { return simd_ballot(predicate).all(); }
METAL_FUNC simd_vote simd_active_threads_mask() { return simd_ballot(true); }
METAL_FUNC bool simd_is_first() { return exchange(simd_op_ballot, 0u)->lane == 0; }

// Quads of four lanes. All lanes of the simdgroup must come, which is stricter than Metal.
template <typename Operation, typename T>
METAL_FUNC T quad_reduce(T x) {
  thread metal_emulator_lanes* lanes = exchange(simd_op_quad, x);
  uint first = lanes->lane & ~3u;
  T low = Operation::template of<T>(active_value_of<T>(lanes, first), active_value_of<T>(lanes, first + 2));
  T high = Operation::template of<T>(active_value_of<T>(lanes, first + 1), active_value_of<T>(lanes, first + 3));
  return Operation::template of<T>(low, high);
}
template <typename T> METAL_FUNC T quad_sum(T x) { return quad_reduce<simd_add>(x); }
template <typename T> METAL_FUNC T quad_min(T x) { return quad_reduce<simd_lesser>(x); }
template <typename T> METAL_FUNC T quad_max(T x) { return quad_reduce<simd_greater>(x); }
template <typename T> METAL_FUNC T quad_broadcast(T x, ushort lane) {
  thread metal_emulator_lanes* lanes = exchange(simd_op_quad, x);
  return active_value_of<T>(lanes, (lanes->lane & ~3u) + lane);
}
template <typename T> METAL_FUNC T quad_shuffle_xor(T x, ushort mask) {
  thread metal_emulator_lanes* lanes = exchange(simd_op_quad, x);
  return active_value_of<T>(lanes, lanes->lane ^ (mask & 3));
}

}  // namespace metal
