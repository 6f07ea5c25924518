// Vector types, their constructors, and the type traits and limits of metal_stdlib.

#pragma once

#define METAL_FUNC inline __attribute__((always_inline))

namespace metal {

#define METAL_EMULATOR_VECTORS(T)                                    \
  typedef T T##2 __attribute__((ext_vector_type(2)));                \
  typedef T T##3 __attribute__((ext_vector_type(3)));                \
  typedef T T##4 __attribute__((ext_vector_type(4)));
METAL_EMULATOR_VECTORS(int)
METAL_EMULATOR_VECTORS(uint)
METAL_EMULATOR_VECTORS(half)
METAL_EMULATOR_VECTORS(float)

template <typename T> struct vector_traits { typedef T element; static constexpr constant int n = 1; };
#define METAL_EMULATOR_TRAITS_N(T, N)                                                     \
  template <> struct vector_traits<T##N> { typedef T element; static constexpr constant int n = N; };
#define METAL_EMULATOR_TRAITS(T) \
  METAL_EMULATOR_TRAITS_N(T, 2) METAL_EMULATOR_TRAITS_N(T, 3) METAL_EMULATOR_TRAITS_N(T, 4)
METAL_EMULATOR_TRAITS(int)
METAL_EMULATOR_TRAITS(uint)
METAL_EMULATOR_TRAITS(half)
METAL_EMULATOR_TRAITS(float)

// float4(a, b, c, d), float4(x), float4(xy, zw), float4(other_vector): a macro, because the
// compiler's own vector types have no constructors of several arguments.
template <typename V, typename A>
METAL_FUNC void append(thread V& v, thread int& at, A a) {
  typedef typename vector_traits<V>::element element;
  if constexpr (vector_traits<A>::n == 1) {
    v[at++] = element(a);
  } else {
    for (int i = 0; i < vector_traits<A>::n; ++i) v[at++] = element(a[i]);
  }
}
template <typename V, typename... A>
METAL_FUNC V make_vector(A... a) {
  static_assert((vector_traits<A>::n + ... + 0) == vector_traits<V>::n,
                "a vector's constructor needs as many components as the vector has");
  V v;
  int at = 0;
  (append(v, at, a), ...);
  return v;
}
template <typename V, typename A>
METAL_FUNC V make_vector(A a) {
  typedef typename vector_traits<V>::element element;
  if constexpr (vector_traits<A>::n == 1) {
    return V(element(a));
  } else {
    static_assert(vector_traits<A>::n == vector_traits<V>::n, "vectors of different lengths");
    return __builtin_convertvector(a, V);
  }
}
template <typename V> METAL_FUNC V make_vector() { return V(0); }

template <typename T, T v> struct integral_constant { static constexpr constant T value = v; };
typedef integral_constant<bool, true> true_type;
typedef integral_constant<bool, false> false_type;
template <typename A, typename B> struct is_same : false_type {};
template <typename A> struct is_same<A, A> : true_type {};
template <typename A, typename B> inline constexpr constant bool is_same_v = is_same<A, B>::value;
template <typename T> struct type_identity { typedef T type; };

}  // namespace metal

#define METAL_EMULATOR_MAKE(V, ...) make_vector<metal::V>(__VA_ARGS__)
#define int2(...) METAL_EMULATOR_MAKE(int2, __VA_ARGS__)
#define int3(...) METAL_EMULATOR_MAKE(int3, __VA_ARGS__)
#define int4(...) METAL_EMULATOR_MAKE(int4, __VA_ARGS__)
#define uint2(...) METAL_EMULATOR_MAKE(uint2, __VA_ARGS__)
#define uint3(...) METAL_EMULATOR_MAKE(uint3, __VA_ARGS__)
#define uint4(...) METAL_EMULATOR_MAKE(uint4, __VA_ARGS__)
#define half2(...) METAL_EMULATOR_MAKE(half2, __VA_ARGS__)
#define half3(...) METAL_EMULATOR_MAKE(half3, __VA_ARGS__)
#define half4(...) METAL_EMULATOR_MAKE(half4, __VA_ARGS__)
#define float2(...) METAL_EMULATOR_MAKE(float2, __VA_ARGS__)
#define float3(...) METAL_EMULATOR_MAKE(float3, __VA_ARGS__)
#define float4(...) METAL_EMULATOR_MAKE(float4, __VA_ARGS__)
