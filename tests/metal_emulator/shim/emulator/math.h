// Mathematics of metal_stdlib: one overload for each type, so that mixed types are ambiguous here
// as they are in Metal. Transcendental functions are the C library's, closer to exact than a GPU's.

#pragma once

extern "C" {
float expf(float);
float exp2f(float);
float exp10f(float);
float logf(float);
float log2f(float);
float log10f(float);
float sinf(float);
float cosf(float);
float tanf(float);
float tanhf(float);
float erff(float);
float powf(float, float);
float fmodf(float, float);
float fmaf(float, float, float);
float floorf(float);
float ceilf(float);
float roundf(float);
float rintf(float);
float truncf(float);
}

namespace metal {

// MLX's prelude adds functions of bfloat that return bfloat; without it they return float.
#ifdef METAL_EMULATOR_MLX
typedef bfloat bfloat_result;
#else
typedef float bfloat_result;
#endif

#define METAL_EMULATOR_PER_TYPE(MACRO) \
  MACRO(char) MACRO(uchar) MACRO(short) MACRO(ushort) MACRO(int) MACRO(uint) MACRO(long) MACRO(ulong)
#define METAL_EMULATOR_PER_VECTOR(MACRO, T) MACRO(T, 2) MACRO(T, 3) MACRO(T, 4)

#define METAL_EMULATOR_UNARY_VECTOR(name, V, N) \
  METAL_FUNC V name(V x) {                      \
    V y;                                        \
    for (int i = 0; i < N; ++i) y[i] = name(x[i]); \
    return y;                                   \
  }
#define METAL_EMULATOR_UNARY(name, expression)                                       \
  METAL_FUNC float name(float x) { return expression; }                              \
  METAL_FUNC half name(half h) { float x = h; return half(expression); }             \
  METAL_FUNC bfloat_result name(bfloat b) { float x = b; return bfloat_result(expression); } \
  METAL_EMULATOR_UNARY_VECTOR(name, float2, 2)                                       \
  METAL_EMULATOR_UNARY_VECTOR(name, float3, 3)                                       \
  METAL_EMULATOR_UNARY_VECTOR(name, float4, 4)                                       \
  METAL_EMULATOR_UNARY_VECTOR(name, half2, 2)                                        \
  METAL_EMULATOR_UNARY_VECTOR(name, half3, 3)                                        \
  METAL_EMULATOR_UNARY_VECTOR(name, half4, 4)

METAL_EMULATOR_UNARY(exp, expf(x))
METAL_EMULATOR_UNARY(exp2, exp2f(x))
METAL_EMULATOR_UNARY(log, logf(x))
METAL_EMULATOR_UNARY(log2, log2f(x))
METAL_EMULATOR_UNARY(log10, log10f(x))
METAL_EMULATOR_UNARY(sin, sinf(x))
METAL_EMULATOR_UNARY(cos, cosf(x))
METAL_EMULATOR_UNARY(tan, tanf(x))
METAL_EMULATOR_UNARY(tanh, tanhf(x))
METAL_EMULATOR_UNARY(sqrt, __builtin_sqrtf(x))
METAL_EMULATOR_UNARY(rsqrt, 1.0f / __builtin_sqrtf(x))
METAL_EMULATOR_UNARY(floor, floorf(x))
METAL_EMULATOR_UNARY(ceil, ceilf(x))
METAL_EMULATOR_UNARY(round, roundf(x))
METAL_EMULATOR_UNARY(rint, rintf(x))
METAL_EMULATOR_UNARY(trunc, truncf(x))
METAL_EMULATOR_UNARY(fabs, __builtin_fabsf(x))
METAL_EMULATOR_UNARY(abs, __builtin_fabsf(x))
METAL_EMULATOR_UNARY(sign, x > 0 ? 1.0f : x < 0 ? -1.0f : x == x ? x : 0.0f)
METAL_EMULATOR_UNARY(saturate, x > 0 ? (x < 1 ? x : 1.0f) : 0.0f)

#define METAL_EMULATOR_CLASSIFY(name, expression)                       \
  METAL_FUNC bool name(float x) { return expression; }                  \
  METAL_FUNC bool name(half h) { float x = h; return expression; }      \
  METAL_FUNC bool name(bfloat b) { float x = b; return expression; }
METAL_EMULATOR_CLASSIFY(isnan, x != x)
METAL_EMULATOR_CLASSIFY(isinf, __builtin_fabsf(x) == __builtin_inff())
METAL_EMULATOR_CLASSIFY(isfinite, __builtin_fabsf(x) < __builtin_inff())
METAL_EMULATOR_CLASSIFY(signbit, (as_type<uint>(x) >> 31) != 0)

#define METAL_EMULATOR_BINARY(name, expression)                                            \
  METAL_FUNC float name(float x, float y) { return expression; }                           \
  METAL_FUNC half name(half a, half b) { float x = a, y = b; return half(expression); }    \
  METAL_FUNC bfloat_result name(bfloat a, bfloat b) {                                      \
    float x = a, y = b;                                                                    \
    return bfloat_result(expression);                                                      \
  }
METAL_EMULATOR_BINARY(pow, powf(x, y))
METAL_EMULATOR_BINARY(powr, powf(x, y))
METAL_EMULATOR_BINARY(fmod, fmodf(x, y))
METAL_EMULATOR_BINARY(divide, x / y)
METAL_EMULATOR_BINARY(copysign, __builtin_copysignf(x, y))

// With a NaN the other argument wins, as in fmin and fmax.
METAL_EMULATOR_BINARY(fmin, x != x || y < x ? y : x)
METAL_EMULATOR_BINARY(fmax, x != x || y > x ? y : x)
METAL_EMULATOR_BINARY(min, x != x || y < x ? y : x)
METAL_EMULATOR_BINARY(max, x != x || y > x ? y : x)

METAL_FUNC float fma(float x, float y, float z) { return fmaf(x, y, z); }
METAL_FUNC half fma(half x, half y, half z) { return half(fmaf(x, y, z)); }
METAL_FUNC bfloat_result fma(bfloat x, bfloat y, bfloat z) {
  return bfloat_result(fmaf(float(x), float(y), float(z)));
}

#define METAL_EMULATOR_INTEGER(T)                                          \
  METAL_FUNC T min(T x, T y) { return y < x ? y : x; }                     \
  METAL_FUNC T max(T x, T y) { return x < y ? y : x; }                     \
  METAL_FUNC T abs(T x) { return x < 0 ? T(-x) : x; }                      \
  METAL_FUNC T popcount(T x) {                                             \
    return T(__builtin_popcountl(ulong(x) & (~0ul >> (64 - 8 * sizeof(T))))); \
  }                                                                        \
  METAL_FUNC T clz(T x) {                                                  \
    ulong bits = ulong(x) & (~0ul >> (64 - 8 * sizeof(T)));                \
    return T(bits ? __builtin_clzl(bits) - (64 - 8 * int(sizeof(T))) : 8 * int(sizeof(T))); \
  }                                                                        \
  METAL_FUNC T ctz(T x) { return T(x ? __builtin_ctzl(ulong(x)) : 8 * int(sizeof(T))); } \
  METAL_FUNC T rotate(T x, T n) {                                          \
    constexpr uint bits = 8 * sizeof(T);                                   \
    ulong u = ulong(x) & (~0ul >> (64 - bits));                            \
    uint by = uint(n) % bits;                                              \
    return by ? T(u << by | u >> (bits - by)) : x;                         \
  }
METAL_EMULATOR_PER_TYPE(METAL_EMULATOR_INTEGER)
METAL_FUNC uint reverse_bits(uint x) { return __builtin_bitreverse32(x); }
METAL_FUNC int mulhi(int x, int y) { return int((long(x) * long(y)) >> 32); }
METAL_FUNC uint mulhi(uint x, uint y) { return uint((ulong(x) * ulong(y)) >> 32); }

#define METAL_EMULATOR_CLAMP(T) \
  METAL_FUNC T clamp(T x, T low, T high) { return min(max(x, low), high); }
METAL_EMULATOR_PER_TYPE(METAL_EMULATOR_CLAMP)
METAL_EMULATOR_CLAMP(float)
METAL_EMULATOR_CLAMP(half)

#define METAL_EMULATOR_VECTOR_N(T, N)                                      \
  METAL_FUNC T##N min(T##N x, T##N y) {                                    \
    for (int i = 0; i < N; ++i) x[i] = min(x[i], y[i]);                    \
    return x;                                                              \
  }                                                                        \
  METAL_FUNC T##N max(T##N x, T##N y) {                                    \
    for (int i = 0; i < N; ++i) x[i] = max(x[i], y[i]);                    \
    return x;                                                              \
  }                                                                        \
  METAL_FUNC T##N clamp(T##N x, T##N low, T##N high) { return min(max(x, low), high); }
#define METAL_EMULATOR_VECTOR(T) METAL_EMULATOR_PER_VECTOR(METAL_EMULATOR_VECTOR_N, T)
METAL_EMULATOR_PER_TYPE(METAL_EMULATOR_VECTOR)
METAL_EMULATOR_VECTOR(float)
METAL_EMULATOR_VECTOR(half)

#define METAL_EMULATOR_FLOAT_VECTOR_N(T, N)                  \
  METAL_FUNC T##N fma(T##N x, T##N y, T##N z) {              \
    for (int i = 0; i < N; ++i) z[i] = fma(x[i], y[i], z[i]); \
    return z;                                                \
  }                                                          \
  METAL_FUNC T dot(T##N x, T##N y) {                         \
    T sum = x[0] * y[0];                                     \
    for (int i = 1; i < N; ++i) sum += x[i] * y[i];          \
    return sum;                                              \
  }
METAL_EMULATOR_PER_VECTOR(METAL_EMULATOR_FLOAT_VECTOR_N, float)
METAL_EMULATOR_PER_VECTOR(METAL_EMULATOR_FLOAT_VECTOR_N, half)

template <typename T>
METAL_FUNC T select(T if_false, T if_true, bool condition) {
  return condition ? if_true : if_false;
}
// A comparison of vectors gives integers, all bits set where true.
template <typename V, typename C>
METAL_FUNC enable_if_t<vector_traits<V>::n != 1 && vector_traits<C>::n != 1, V> select(V f, V t, C c) {
  for (int i = 0; i < vector_traits<V>::n; ++i) f[i] = c[i] ? t[i] : f[i];
  return f;
}
template <typename C> METAL_FUNC bool any(C c) {
  bool result = false;
  for (int i = 0; i < vector_traits<C>::n; ++i) result = result || c[i];
  return result;
}
template <typename C> METAL_FUNC bool all(C c) {
  bool result = true;
  for (int i = 0; i < vector_traits<C>::n; ++i) result = result && c[i];
  return result;
}

#define METAL_EMULATOR_VARIANT(name)                                                       \
  namespace name {                                                                         \
  using metal::exp; using metal::exp2; using metal::log; using metal::log2; using metal::log10; \
  using metal::sin; using metal::cos; using metal::tan; using metal::tanh; using metal::sqrt;   \
  using metal::rsqrt; using metal::pow; using metal::powr; using metal::divide; using metal::fmod; \
  using metal::fma; using metal::fmin; using metal::fmax; using metal::fabs; using metal::abs;  \
  using metal::min; using metal::max; using metal::clamp; using metal::floor; using metal::ceil; \
  using metal::round; using metal::rint; using metal::trunc;                               \
  }
METAL_EMULATOR_VARIANT(precise)
METAL_EMULATOR_VARIANT(fast)

}  // namespace metal
