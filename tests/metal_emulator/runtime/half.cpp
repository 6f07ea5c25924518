// Conversions that the compiler calls where the processor has no instruction for them.

#include "state.h"

EXPORT float __extendhfsf2(_Float16 value) {
  u32 bits = __builtin_bit_cast(u16, value);
  u32 sign = (bits & 0x8000) << 16, exponent = bits >> 10 & 31, fraction = bits & 1023;
  if (exponent == 31) return __builtin_bit_cast(float, sign | 0x7f800000 | fraction << 13);
  if (exponent) return __builtin_bit_cast(float, sign | (exponent + 112) << 23 | fraction << 13);
  float magnitude = static_cast<float>(fraction) * 0x1p-24f;
  return sign ? -magnitude : magnitude;
}

EXPORT _Float16 __truncsfhf2(float value) {
  u32 bits = __builtin_bit_cast(u32, value), magnitude = bits & 0x7fffffff;
  u32 sign = bits >> 16 & 0x8000, half;
  if (magnitude > 0x7f800000) {
    half = 0x7e00;
  } else if (magnitude >= 0x477ff000) {  // 65520 and more round to infinity
    half = 0x7c00;
  } else if (magnitude < 0x38800000) {  // subnormal: let the adder round to a multiple of 2^-24
    float sum = __builtin_bit_cast(float, magnitude) + 0.5f;
    half = __builtin_bit_cast(u32, sum) - 0x3f000000;
  } else {
    half = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
  }
  return __builtin_bit_cast(_Float16, static_cast<u16>(sign | half));
}

EXPORT __bf16 __truncsfbf2(float value) {
  u32 bits = __builtin_bit_cast(u32, value);
  bool is_nan = (bits & 0x7fffffff) > 0x7f800000;
  u32 rounded = is_nan ? bits >> 16 | 0x40 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return __builtin_bit_cast(__bf16, static_cast<u16>(rounded));
}
