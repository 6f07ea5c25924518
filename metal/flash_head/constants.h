// Constants of all kernels.

// An array stays in registers only where every loop over it is unrolled.
#define FLASH_HEAD_UNROLL _Pragma("clang loop unroll(full)")

// Threads of the kernels with one threadgroup a position: 512, or 256 where a pipeline allows no more.
#ifndef FLASH_HEAD_ROW_THREADS
#define FLASH_HEAD_ROW_THREADS 512
#endif

namespace flash_head {

constant constexpr int LANES = 32;
constant constexpr int ROWS = 4;                // rows a simdgroup computes at once
constant constexpr int ROUTE_SIMDGROUPS = 2;    // 8 centroids per threadgroup
constant constexpr int SCORE_SIMDGROUPS = 8;    // at most
constant constexpr int ROW_THREADS = FLASH_HEAD_ROW_THREADS;
constant constexpr int ROW_SIMDGROUPS = ROW_THREADS / LANES;
constant constexpr int SELECT_SCORES = 36;      // that a thread keeps in registers, at most
constant constexpr int SELECT_BINS = 4096;      // the last 4,095 of 1/64 nat each
constant constexpr float BINS_PER_NAT = 64.0f;
constant constexpr float CERTAIN = 1e29f;       // scores of clusters that are always probed are above
constant constexpr float FORCED_SCORE = 1e30f;  // theirs
constant constexpr uint ADJUST_HEAD = 3;        // words of an adjustment's row before its tokens'
constant constexpr uint ADJUST_TOKEN = 3;       // words of a token
constant constexpr int SELECT_SHARED = 4 * ROW_SIMDGROUPS + 1;
constant constexpr int SAMPLE_BINS = 2048;      // of each of two histograms
constant constexpr int SAMPLE_SHARED = 4 * ROW_SIMDGROUPS;
constant constexpr int ROW_SUMS = 2 * ROW_SIMDGROUPS;
constant constexpr int WIDE_THREADS = 256;      // of expand
constant constexpr int WIDE_SIMDGROUPS = WIDE_THREADS / LANES;
constant constexpr int EXPAND_TOKENS = 4;       // per thread
constant constexpr int SCREEN_CLUSTERS = 1024;  // that a threadgroup of screen takes
constant constexpr int TALLIED = 10;            // values that it writes
constant constexpr uint MIN_PROBES = 8;         // held per position
constant constexpr int UNSCORED = 8;            // values of a position that select writes, 2 of use

// A word at or above PROBED is a place among the probes: no estimate has such bits, since a NaN is
// written as NOT_A_NUMBER.
constant constexpr uint PROBED = 0xffc00000u;
constant constexpr uint PLACE = 0x003fffffu;
constant constexpr uint NOT_A_NUMBER = 0x7fc00000u;

}  // namespace flash_head
