// Constants of all kernels.

// An array stays in registers only where every loop over it is unrolled.
#define FLASH_HEAD_UNROLL _Pragma("clang loop unroll(full)")

namespace flash_head {

constant constexpr int LANES = 32;
constant constexpr int ROWS = 4;                // rows a simdgroup computes at once
constant constexpr int ROUTE_SIMDGROUPS = 2;    // 8 centroids per threadgroup
constant constexpr int SCORE_SIMDGROUPS = 8;    // at most
constant constexpr int SELECT_THREADS = 512;
constant constexpr int SELECT_SIMDGROUPS = SELECT_THREADS / LANES;
constant constexpr int SELECT_KEYS = 16;        // that a thread keeps in registers, at most
constant constexpr int HISTOGRAM = 4096;        // counters: a digit's copies lie side by side
constant constexpr int WIDE_THREADS = 256;      // of expand, token and ids
constant constexpr int WIDE_SIMDGROUPS = WIDE_THREADS / LANES;
constant constexpr int EXPAND_TOKENS = 4;       // per thread
constant constexpr uint MIN_PROBES = 8;         // held per position

// A word at or above PROBED is a place among the probes: no estimate has such bits, since a NaN is
// written as NOT_A_NUMBER.
constant constexpr uint PROBED = 0xffc00000u;
constant constexpr uint PLACE = 0x003fffffu;
constant constexpr uint NOT_A_NUMBER = 0x7fc00000u;

}  // namespace flash_head
