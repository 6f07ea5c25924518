// Relaxed atomics of integers in threadgroup memory.

#pragma once

namespace metal {

enum memory_order { memory_order_relaxed };

template <typename T> struct atomic {
  static_assert(is_same_v<T, int> || is_same_v<T, uint>, "atomics here are of int or uint");
  T value;
};
typedef atomic<uint> atomic_uint;

enum atomic_operation : uint { atomic_op_load, atomic_op_store, atomic_op_add, atomic_op_or };  // as in memory.cpp

template <typename T> METAL_FUNC T atomic_load_explicit(const volatile threadgroup atomic<T>* p, memory_order) {
  return as_type<T>(metal_emulator_atomic((ulong)p, atomic_op_load, 0));
}
template <typename T> METAL_FUNC void atomic_store_explicit(
    volatile threadgroup atomic<T>* p, typename type_identity<T>::type v, memory_order) {
  metal_emulator_atomic((ulong)p, atomic_op_store, as_type<uint>(v));
}
template <typename T> METAL_FUNC T atomic_fetch_add_explicit(
    volatile threadgroup atomic<T>* p, typename type_identity<T>::type v, memory_order) {
  return as_type<T>(metal_emulator_atomic((ulong)p, atomic_op_add, as_type<uint>(v)));
}
template <typename T> METAL_FUNC T atomic_fetch_or_explicit(
    volatile threadgroup atomic<T>* p, typename type_identity<T>::type v, memory_order) {
  return as_type<T>(metal_emulator_atomic((ulong)p, atomic_op_or, as_type<uint>(v)));
}

}  // namespace metal
