// Mathematics of metal_stdlib: one overload for each type, so that mixed types are ambiguous here
// as they are in Metal. Transcendental functions are the C library's, closer to exact than a GPU's.

#pragma once

extern "C" {
float expf(float);
float logf(float);
float log2f(float);
float ceilf(float);
float roundf(float);
float tanhf(float);
float sqrtf(float);
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

#define METAL_EMULATOR_UNARY(name, expression)                                       \
  METAL_FUNC float name(float x) { return expression; }                              \
  METAL_FUNC half name(half h) { float x = h; return half(expression); }             \
  METAL_FUNC bfloat_result name(bfloat b) { float x = b; return bfloat_result(expression); }

METAL_EMULATOR_UNARY(exp, expf(x))
METAL_EMULATOR_UNARY(log, logf(x))
METAL_EMULATOR_UNARY(ceil, ceilf(x))
METAL_EMULATOR_UNARY(log2, log2f(x))
METAL_EMULATOR_UNARY(round, roundf(x))
METAL_EMULATOR_UNARY(fabs, __builtin_fabsf(x))
METAL_EMULATOR_UNARY(abs, __builtin_fabsf(x))

METAL_FUNC bool isnan(float x) { return x != x; }
METAL_FUNC bool isfinite(float x) { return __builtin_fabsf(x) < __builtin_inff(); }
METAL_FUNC bool signbit(float x) { return as_type<uint>(x) >> 31; }

#define METAL_EMULATOR_BINARY(name, expression)                                            \
  METAL_FUNC float name(float x, float y) { return expression; }                           \
  METAL_FUNC half name(half a, half b) { float x = a, y = b; return half(expression); }    \
  METAL_FUNC bfloat_result name(bfloat a, bfloat b) {                                      \
    float x = a, y = b;                                                                    \
    return bfloat_result(expression);                                                      \
  }

// With a NaN the other argument wins.
METAL_EMULATOR_BINARY(min, x != x || y < x ? y : x)
METAL_EMULATOR_BINARY(max, x != x || y > x ? y : x)

#define METAL_EMULATOR_INTEGER(T)                                          \
  METAL_FUNC T min(T x, T y) { return y < x ? y : x; }                     \
  METAL_FUNC T max(T x, T y) { return x < y ? y : x; }                     \
  METAL_FUNC T popcount(T x) {                                             \
    return T(__builtin_popcountl(ulong(x) & (~0ul >> (64 - 8 * sizeof(T))))); \
  }
METAL_EMULATOR_PER_TYPE(METAL_EMULATOR_INTEGER)

#define METAL_EMULATOR_CLAMP(T) \
  METAL_FUNC T clamp(T x, T low, T high) { return min(max(x, low), high); }
METAL_EMULATOR_PER_TYPE(METAL_EMULATOR_CLAMP)
METAL_EMULATOR_CLAMP(float)
METAL_EMULATOR_CLAMP(half)

template <typename T>
METAL_FUNC T select(T if_false, T if_true, bool condition) {
  return condition ? if_true : if_false;
}

METAL_EMULATOR_UNARY(tanh, tanhf(x))
METAL_EMULATOR_UNARY(sqrt, sqrtf(x))

namespace fast {
using metal::exp;
}

namespace precise {
using metal::tanh;
}

}  // namespace metal
