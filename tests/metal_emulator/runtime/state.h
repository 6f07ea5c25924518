// What Python hands to the runtime (mirrored by ctypes in run.py) and what its two halves share.

#pragma once

#define EXPORT extern "C" __attribute__((visibility("default")))

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long u64;
typedef int i32;

constexpr u32 kMaxThreads = 1024, kLanes = 32, kSimdgroups = kMaxThreads / kLanes;
constexpr u32 kMaxRegions = 96, kNowhere = ~0u;
constexpr u64 kThreadgroupBytes = 32 * 1024;

// Actors: the threads 0..1023 of a threadgroup, then "several threads of simdgroup s", and these.
constexpr u16 kSeveralInSimdgroup = kMaxThreads, kSeveral = 2000, kAtomic = 2001, kNobody = 2002;
// Stamps: 0 for memory never accessed, 1 for memory that the launch initialised.
constexpr u32 kInitialised = 1;

enum FaultKind : u32 {
  kNone,
  kOutOfBounds,
  kReadOnly,
  kMisaligned,
  kUninitialised,
  kRace,
  kDivergent,
  kInactiveLane,
  kThreadgroupMemory,
};
enum RegionKind : u32 { kInput, kOutput, kThreadgroup };
enum Order : u32 { kForward, kReverse, kShuffle };
constexpr u32 kSimdgroupBarrier = 1;  // a meeting of lanes; simd operations: 16 ...
enum MemFlags : u32 { kMemDevice = 1, kMemThreadgroup = 2 };

// Last accesses to one granule of memory.
struct Cell {
  u32 write_stamp, read_stamp;
  u16 writer, reader;
};

struct Region {
  u64 base, bytes;
  u32 kind, granule;
  Cell* cells;                   // null: races and uninitialised reads are not looked for
  u64 *read_bits, *write_bits;   // one bit for each byte; null: distinct bytes are not counted
  u64 n_read, n_written;         // bytes, repeats included
  u64 distinct_read, distinct_written, lines_read, lines_written;
  const char* name;
  u64 id;
};

struct Fault {
  u32 kind, region, thread, other, size, write;
  u64 offset;
  u32 group[3];
  u32 other_threadgroup;  // race: the other access was made by another threadgroup
  const char* name;
};

struct Indices {
  u32 position_in_grid[3], position_in_threadgroup[3], threadgroup_position[3];
  u32 threads_per_threadgroup[3];
  u32 threads_per_grid[3], threadgroups_per_grid[3];
  u32 index_in_threadgroup, index_in_simdgroup, simdgroup_index, simdgroups_per_threadgroup;
};

struct Launch {
  void (*kernel)(const u64* arguments, const Indices* indices);
  const u64* arguments;
  Region* regions;
  const u64* groups;  // flat indices of the threadgroups to run
  u64 n_groups;
  u64 image_start, image_end;  // the kernel's own code and constants
  u64 seed;
  u32 n_regions, order, check;
  u32 grid[3], threadgroup[3];
  u32 barriers;  // of the threadgroup that passed most
  u64 threadgroup_bytes;
  Fault fault;
};

// The exchange buffer of one simd operation, also seen by shim/emulator/simd.h.
struct Lanes {
  u64 values[kLanes][4];
  u64 result[4];
  u32 has_result, n_lanes, lane, unused;
};

struct Simdgroup {
  Lanes lanes[2];
  u32 n_lanes, n_arrived, meeting;
  u64 site;
  u32 ordered_since[2];  // the clock at its last barrier, by memory: threadgroup, device
};

constexpr u64 kStackBytes = 256 * 1024;

// What a kernel touches beside its buffers.
struct Arena {
  Simdgroup simdgroups[kSimdgroups];
  alignas(4096) char stacks[kMaxThreads][kStackBytes];
};

// One launch runs at a time, on one operating-system thread.
inline Arena* arena;
inline Launch* launch;
inline Region regions[kMaxRegions];
inline u32 n_regions, n_arrays;  // the threadgroup's arrays are the last regions
inline u32 current;              // the running thread's index in its threadgroup
inline u32 group_position[3];
// The clock ticks at each barrier, and every access is stamped with it. It is never set back: what
// an earlier launch left in the threadgroup's cells is then old.
inline u32 clock = kInitialised, group_start, ordered_since[2];

// Records the fault and abandons the launch: it does not return, so a faulty access is never made.
void fail(u32 kind, u32 region, u64 offset, u32 size, bool write, u32 other);
void begin_threadgroup_memory();
void count_distinct(Region& region);
