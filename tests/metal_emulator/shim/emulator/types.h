// Vector types, their constructors, and the type traits and limits of metal_stdlib.

#pragma once

#define METAL_FUNC inline __attribute__((always_inline))

namespace metal {

#define METAL_EMULATOR_VECTORS(T)                                    \
  typedef T T##2 __attribute__((ext_vector_type(2)));                \
  typedef T T##3 __attribute__((ext_vector_type(3)));                \
  typedef T T##4 __attribute__((ext_vector_type(4)));                \
  typedef T packed_##T##2 __attribute__((ext_vector_type(2), aligned(sizeof(T)))); \
  typedef T packed_##T##4 __attribute__((ext_vector_type(4), aligned(sizeof(T))));
METAL_EMULATOR_VECTORS(char)
METAL_EMULATOR_VECTORS(uchar)
METAL_EMULATOR_VECTORS(short)
METAL_EMULATOR_VECTORS(ushort)
METAL_EMULATOR_VECTORS(int)
METAL_EMULATOR_VECTORS(uint)
METAL_EMULATOR_VECTORS(long)
METAL_EMULATOR_VECTORS(ulong)
METAL_EMULATOR_VECTORS(half)
METAL_EMULATOR_VECTORS(float)
METAL_EMULATOR_VECTORS(bfloat)

template <typename T> struct vector_traits { typedef T element; static constexpr constant int n = 1; };
template <typename T, int N> struct vec_type;
#define METAL_EMULATOR_TRAITS_N(T, N)                                                     \
  template <> struct vector_traits<T##N> { typedef T element; static constexpr constant int n = N; }; \
  template <> struct vec_type<T, N> { typedef T##N type; };
#define METAL_EMULATOR_TRAITS(T) \
  METAL_EMULATOR_TRAITS_N(T, 2) METAL_EMULATOR_TRAITS_N(T, 3) METAL_EMULATOR_TRAITS_N(T, 4)
METAL_EMULATOR_TRAITS(char)
METAL_EMULATOR_TRAITS(uchar)
METAL_EMULATOR_TRAITS(short)
METAL_EMULATOR_TRAITS(ushort)
METAL_EMULATOR_TRAITS(int)
METAL_EMULATOR_TRAITS(uint)
METAL_EMULATOR_TRAITS(long)
METAL_EMULATOR_TRAITS(ulong)
METAL_EMULATOR_TRAITS(half)
METAL_EMULATOR_TRAITS(float)
METAL_EMULATOR_TRAITS(bfloat)
template <typename T, int N> using vec = typename vec_type<T, N>::type;

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
template <bool C, typename A, typename B> struct conditional { typedef A type; };
template <typename A, typename B> struct conditional<false, A, B> { typedef B type; };
template <bool C, typename A, typename B> using conditional_t = typename conditional<C, A, B>::type;
template <bool C, typename T = void> struct enable_if {};
template <typename T> struct enable_if<true, T> { typedef T type; };
template <bool C, typename T = void> using enable_if_t = typename enable_if<C, T>::type;
template <typename T> struct type_identity { typedef T type; };
template <typename T> inline constexpr constant bool is_floating_point_v =
    is_same_v<T, float> || is_same_v<T, half> || is_same_v<T, bfloat>;

template <typename T> struct numeric_limits {  // integers
  static constexpr bool is_signed() { return T(-1) < T(0); }
  static constexpr T max() {
    return is_signed() ? T((1ul << (8 * sizeof(T) - 1)) - 1) : T(~0ul);
  }
  static constexpr T min() { return is_signed() ? T(-max() - 1) : T(0); }
  static constexpr T lowest() { return min(); }
};
#define METAL_EMULATOR_LIMITS(T, bits, largest, smallest, eps)                           \
  template <> struct numeric_limits<T> {                                                 \
    static constexpr T max() { return __builtin_bit_cast(T, bits(largest)); }            \
    static constexpr T lowest() { return -max(); }                                       \
    static constexpr T min() { return __builtin_bit_cast(T, bits(smallest)); }           \
    static constexpr T epsilon() { return __builtin_bit_cast(T, bits(eps)); }            \
    static constexpr T infinity() { return T(__builtin_inff()); }                        \
    static constexpr T quiet_NaN() { return T(__builtin_nanf("")); }                     \
  };
METAL_EMULATOR_LIMITS(float, uint, 0x7f7fffff, 0x00800000, 0x34000000)
METAL_EMULATOR_LIMITS(half, ushort, 0x7bff, 0x0400, 0x1400)
METAL_EMULATOR_LIMITS(bfloat, ushort, 0x7f7f, 0x0080, 0x3c00)

}  // namespace metal

#define METAL_EMULATOR_MAKE(V, ...) make_vector<metal::V>(__VA_ARGS__)
#define char2(...) METAL_EMULATOR_MAKE(char2, __VA_ARGS__)
#define char4(...) METAL_EMULATOR_MAKE(char4, __VA_ARGS__)
#define uchar2(...) METAL_EMULATOR_MAKE(uchar2, __VA_ARGS__)
#define uchar4(...) METAL_EMULATOR_MAKE(uchar4, __VA_ARGS__)
#define short2(...) METAL_EMULATOR_MAKE(short2, __VA_ARGS__)
#define short4(...) METAL_EMULATOR_MAKE(short4, __VA_ARGS__)
#define ushort2(...) METAL_EMULATOR_MAKE(ushort2, __VA_ARGS__)
#define ushort4(...) METAL_EMULATOR_MAKE(ushort4, __VA_ARGS__)
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
#define bfloat2(...) METAL_EMULATOR_MAKE(bfloat2, __VA_ARGS__)
#define bfloat4(...) METAL_EMULATOR_MAKE(bfloat4, __VA_ARGS__)
