// Relaxed atomics on device and threadgroup memory, 32 bits wide.

#pragma once

namespace metal {

enum memory_order { memory_order_relaxed };

template <typename T> struct atomic {
  static_assert(is_same_v<T, int> || is_same_v<T, uint> || is_same_v<T, float>,
                "atomics here are of int, uint or float");
  T value;
};
typedef atomic<int> atomic_int;
typedef atomic<uint> atomic_uint;
typedef atomic<float> atomic_float;

enum atomic_operation : uint {  // as in ../../runtime/memory.cpp
  atomic_op_load, atomic_op_store, atomic_op_exchange, atomic_op_compare, atomic_op_add, atomic_op_sub,
  atomic_op_and, atomic_op_or, atomic_op_xor, atomic_op_min_unsigned, atomic_op_max_unsigned,
  atomic_op_min_signed, atomic_op_max_signed, atomic_op_add_float
};

#define METAL_EMULATOR_ATOMIC(space)                                                             \
  template <typename T> METAL_FUNC T atomic_load_explicit(const volatile space atomic<T>* p,      \
                                                          memory_order) {                        \
    return as_type<T>(metal_emulator_atomic((ulong)p, atomic_op_load, 0, 0));                    \
  }                                                                                              \
  template <typename T> METAL_FUNC void atomic_store_explicit(                                   \
      volatile space atomic<T>* p, typename type_identity<T>::type v, memory_order) {            \
    metal_emulator_atomic((ulong)p, atomic_op_store, as_type<uint>(v), 0);                       \
  }                                                                                              \
  template <typename T> METAL_FUNC T atomic_exchange_explicit(                                   \
      volatile space atomic<T>* p, typename type_identity<T>::type v, memory_order) {            \
    return as_type<T>(metal_emulator_atomic((ulong)p, atomic_op_exchange, as_type<uint>(v), 0)); \
  }                                                                                              \
  template <typename T> METAL_FUNC bool atomic_compare_exchange_weak_explicit(                   \
      volatile space atomic<T>* p, thread T* expected, typename type_identity<T>::type v,        \
      memory_order, memory_order) {                                                              \
    uint wanted = as_type<uint>(*expected);                                                      \
    uint old = metal_emulator_atomic((ulong)p, atomic_op_compare, as_type<uint>(v), wanted);     \
    *expected = as_type<T>(old);                                                                 \
    return old == wanted;                                                                        \
  }                                                                                              \
  METAL_EMULATOR_FETCH(space, add, uint, atomic_op_add)                                          \
  METAL_EMULATOR_FETCH(space, add, int, atomic_op_add)                                           \
  METAL_EMULATOR_FETCH(space, add, float, atomic_op_add_float)                                   \
  METAL_EMULATOR_FETCH(space, sub, uint, atomic_op_sub)                                          \
  METAL_EMULATOR_FETCH(space, sub, int, atomic_op_sub)                                           \
  METAL_EMULATOR_FETCH(space, and, uint, atomic_op_and)                                          \
  METAL_EMULATOR_FETCH(space, and, int, atomic_op_and)                                           \
  METAL_EMULATOR_FETCH(space, or, uint, atomic_op_or)                                            \
  METAL_EMULATOR_FETCH(space, or, int, atomic_op_or)                                             \
  METAL_EMULATOR_FETCH(space, xor, uint, atomic_op_xor)                                          \
  METAL_EMULATOR_FETCH(space, xor, int, atomic_op_xor)                                           \
  METAL_EMULATOR_FETCH(space, min, uint, atomic_op_min_unsigned)                                 \
  METAL_EMULATOR_FETCH(space, min, int, atomic_op_min_signed)                                    \
  METAL_EMULATOR_FETCH(space, max, uint, atomic_op_max_unsigned)                                 \
  METAL_EMULATOR_FETCH(space, max, int, atomic_op_max_signed)

#define METAL_EMULATOR_FETCH(space, name, T, operation)                                         \
  METAL_FUNC T atomic_fetch_##name##_explicit(volatile space atomic<T>* p, T v, memory_order) { \
    return as_type<T>(metal_emulator_atomic((ulong)p, operation, as_type<uint>(v), 0));         \
  }

METAL_EMULATOR_ATOMIC(device)
METAL_EMULATOR_ATOMIC(threadgroup)

}  // namespace metal
