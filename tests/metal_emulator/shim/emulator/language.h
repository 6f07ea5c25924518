// What the Metal compiler knows without any header: address spaces, scalar types, as_type.
// Included before every kernel. The compiler reads C++ for OpenCL, whose address spaces are Metal's.

#pragma once
#pragma OPENCL EXTENSION cl_khr_fp16 : enable

#define __METAL__ 1
#define __METAL_VERSION__ 310

#define device __global
#define threadgroup __local
#define constant __constant
#define thread __private
#define kernel  // an ordinary function here: a kernel of OpenCL cannot be a template

// Keywords and types of OpenCL that are ordinary names in Metal.
#define global metal_name_global
#define local metal_name_local
#define generic metal_name_generic
#define read_only metal_name_read_only
#define write_only metal_name_write_only
#define read_write metal_name_read_write
#define atomic_uint metal_name_atomic_uint

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef __bf16 bfloat;
typedef signed char int8_t;
typedef short int16_t;
typedef int int32_t;
typedef long int64_t;
typedef uchar uint8_t;
typedef ushort uint16_t;
typedef uint uint32_t;
typedef ulong uint64_t;
typedef ulong size_t;
typedef long ptrdiff_t;

#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")

template <typename To, typename From>
inline __attribute__((always_inline)) To as_type(From value) {
  static_assert(sizeof(To) == sizeof(From), "as_type needs two types of one size");
  return __builtin_bit_cast(To, value);
}

// The runtime, see ../../runtime.
struct metal_emulator_lanes {
  ulong values[32][4];
  ulong result[4];
  uint has_result, n_lanes, lane, unused;
};
extern "C" {
ulong metal_emulator_threadgroup(const constant char* name, uint id, ulong bytes);
thread metal_emulator_lanes* metal_emulator_exchange(uint operation, const thread void* value,
                                                     uint size);
void metal_emulator_inactive_lane(uint lane);
void metal_emulator_threadgroup_barrier(uint flags);
void metal_emulator_simdgroup_barrier(uint flags);
uint metal_emulator_atomic(ulong address, uint operation, uint operand);
}
