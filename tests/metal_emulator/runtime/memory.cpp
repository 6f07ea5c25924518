// Watches memory: bounds, alignment, uninitialised reads, races, and the bytes that are moved.
//
// The kernel is compiled with the compiler's outlined address checks: each load and store first
// calls __asan_loadN or __asan_storeN, defined here. Nothing of AddressSanitizer itself is used.

#include "state.h"

extern "C" void* memset(void*, int, u64);
extern "C" void* memcpy(void*, const void*, u64);

namespace {

constexpr u64 kArrayGap = 4096;  // keeps an index past one threadgroup array out of the next one

alignas(256) char threadgroup_memory[2 * kThreadgroupBytes + kMaxRegions * 2 * kArrayGap];
Cell threadgroup_cells[kThreadgroupBytes];
u64 threadgroup_used, cells_used;
u32 region_cache[4096];  // by the address of the instruction, which mostly stays in one buffer

u32 simdgroup_of(u32 actor) {
  return actor < kMaxThreads ? actor / kLanes : actor - kSeveralInSimdgroup;
}

// Is an earlier access by `actor`, stamped `stamp`, ordered before one by `actor_now`?
bool ordered(u32 stamp, u32 actor, u32 actor_now, bool device) {
  if (stamp <= kInitialised || (actor == kAtomic && actor_now == kAtomic)) return true;
  if (stamp < group_start) return !device;  // nothing orders device memory between threadgroups
  if (actor == actor_now || stamp < ordered_since[device]) return true;
  u32 mine = current / kLanes;
  return simdgroup_of(actor) == mine && stamp < arena->simdgroups[mine].ordered_since[device];
}

u16 merged_reader(const Cell& cell, u16 reader, bool device) {
  bool forgotten = cell.read_stamp < group_start || cell.read_stamp < ordered_since[device];
  if (forgotten || cell.reader == reader) return reader;
  if (cell.reader == kAtomic || reader == kAtomic) return kSeveral;
  u32 mine = reader / kLanes;
  return simdgroup_of(cell.reader) == mine ? kSeveralInSimdgroup + mine : kSeveral;
}

void race(u32 index, u64 offset, u32 size, bool write, u32 stamp, u32 other) {
  launch->fault.other_threadgroup = stamp < group_start;
  fail(kRace, index, offset, size, write, other);
}

void check_cells(u32 index, u64 offset, u32 size, bool read, bool write, u16 actor) {
  const Region& region = regions[index];
  bool device = region.kind != kThreadgroup;
  u64 first = offset / region.granule, last = (offset + size - 1) / region.granule;
  for (u64 i = first; i <= last; ++i) {
    Cell& cell = region.cells[i];
    u64 at = i * region.granule;
    bool written = cell.write_stamp >= (device ? kInitialised : group_start);
    if (read && !written) fail(kUninitialised, index, at, size, write, kNobody);
    if (!ordered(cell.write_stamp, cell.writer, actor, device)) {
      race(index, at, size, write, cell.write_stamp, cell.writer);
    }
    if (write && !ordered(cell.read_stamp, cell.reader, actor, device)) {
      race(index, at, size, write, cell.read_stamp, cell.reader);
    }
    if (read) {
      cell.reader = merged_reader(cell, actor, device);
      cell.read_stamp = clock;
    }
    if (write) {
      cell.writer = actor;
      cell.write_stamp = clock;
    }
  }
}

void mark(u64* bits, u64 offset, u32 size) {
  for (u32 done = 0; done < size;) {
    u64 at = offset + done;
    u32 bit = at & 63;
    u32 n = size - done < 64 - bit ? size - done : 64 - bit;
    bits[at >> 6] |= (~0ull >> (64 - n)) << bit;
    done += n;
  }
}

u32 region_of(u64 address, u64 pc) {
  u32& cached = region_cache[(pc ^ (pc >> 12)) & 4095];
  if (cached < n_regions && address - regions[cached].base < regions[cached].bytes) return cached;
  for (u32 i = 0; i < n_regions; ++i) {
    if (address - regions[i].base < regions[i].bytes) return cached = i;
  }
  return kNowhere;
}

void out_of_bounds(u64 address, u32 size, bool write) {
  u32 nearest = kNowhere;
  u64 distance = 1ull << 30;  // farther away the address does not tell which buffer was meant
  for (u32 i = 0; i < n_regions; ++i) {
    u64 end = regions[i].base + regions[i].bytes;
    u64 away = address < regions[i].base ? regions[i].base - address : address - end;
    if (address >= regions[i].base && address < end) away = 0;
    if (away < distance) distance = away, nearest = i;
  }
  u64 offset = nearest == kNowhere ? address : address - regions[nearest].base;
  fail(kOutOfBounds, nearest, offset, size, write, kNobody);
}

inline void access(u64 address, u32 size, bool read, bool write, u64 pc, u16 actor) {
  if (address - reinterpret_cast<u64>(arena) < sizeof(Arena)) return;
  if (address - launch->image_start < launch->image_end - launch->image_start) return;
  u32 index = region_of(address, pc);
  if (index == kNowhere) return out_of_bounds(address, size, write);
  Region& region = regions[index];
  u64 offset = address - region.base;
  if (offset + size > region.bytes) return out_of_bounds(address, size, write);
  if (write && region.kind == kInput) fail(kReadOnly, index, offset, size, write, kNobody);
  if (region.cells) check_cells(index, offset, size, read, write, actor);
  if (read) {
    region.n_read += size;
    if (region.read_bits) mark(region.read_bits, offset, size);
  }
  if (write) {
    region.n_written += size;
    if (region.write_bits) mark(region.write_bits, offset, size);
  }
}

inline void aligned_access(u64 address, u32 size, bool write, u64 pc) {
  if (address & (size - 1)) {
    u32 index = region_of(address, pc);
    u64 offset = index == kNowhere ? address : address - regions[index].base;
    if (index != kNowhere) fail(kMisaligned, index, offset, size, write, kNobody);
  }
  access(address, size, !write, write, pc, static_cast<u16>(current));
}

}  // namespace

#define PC reinterpret_cast<u64>(__builtin_return_address(0))
#define DEFINE_CHECKS(n)                                                             \
  EXPORT void __asan_load##n(u64 address) { aligned_access(address, n, false, PC); } \
  EXPORT void __asan_store##n(u64 address) { aligned_access(address, n, true, PC); }
DEFINE_CHECKS(1)
DEFINE_CHECKS(2)
DEFINE_CHECKS(4)
DEFINE_CHECKS(8)
DEFINE_CHECKS(16)

EXPORT void __asan_loadN(u64 address, u64 size) {
  access(address, static_cast<u32>(size), true, false, PC, static_cast<u16>(current));
}
EXPORT void __asan_storeN(u64 address, u64 size) {
  access(address, static_cast<u32>(size), false, true, PC, static_cast<u16>(current));
}
EXPORT void* __asan_memcpy(void* to, const void* from, u64 size) {
  __asan_loadN(reinterpret_cast<u64>(from), size);
  __asan_storeN(reinterpret_cast<u64>(to), size);
  return memcpy(to, from, size);
}
EXPORT void* __asan_memset(void* to, int value, u64 size) {
  __asan_storeN(reinterpret_cast<u64>(to), size);
  return memset(to, value, size);
}

void begin_threadgroup_memory() {
  n_regions -= n_arrays;
  n_arrays = 0;
  threadgroup_used = cells_used = 0;
}

// A threadgroup variable of the kernel: the first thread of the group to declare it makes it.
EXPORT u64 metal_emulator_threadgroup(const char* name, u32 id, u64 bytes) {
  u64 total = 0;
  for (u32 i = n_regions - n_arrays; i < n_regions; ++i) {
    if (regions[i].id == id) return regions[i].base;
    total += (regions[i].bytes + 15) / 16 * 16;
  }
  total += bytes;
  if (total > launch->threadgroup_bytes) launch->threadgroup_bytes = total;
  if (total > kThreadgroupBytes || n_regions == kMaxRegions) {
    launch->fault.name = name;
    fail(kThreadgroupMemory, kNowhere, total, 0, false, kNobody);
  }
  u64 at = (threadgroup_used + kArrayGap + 15) / 16 * 16;
  Region& region = regions[n_regions];
  region = Region{};
  region.base = reinterpret_cast<u64>(threadgroup_memory) + at;
  region.bytes = bytes;
  region.kind = kThreadgroup;
  region.granule = 1;
  region.name = name;
  region.id = id;
  if (launch->check) region.cells = threadgroup_cells + cells_used;
  cells_used += bytes;
  threadgroup_used = at + bytes;
  memset(reinterpret_cast<void*>(region.base), 0xff, bytes);
  ++n_arrays;
  ++n_regions;
  return region.base;
}

// The operations of shim/emulator/atomic.h, in its order.
EXPORT u32 metal_emulator_atomic(u64 address, u32 operation, u32 operand) {
  enum { kLoad, kStore, kAdd, kOr };
  if (launch->check) {
    access(address, 4, operation != kStore, operation != kLoad, PC, kAtomic);
  }
  u32& cell = *reinterpret_cast<u32*>(address);
  u32 old = cell;
  if (operation == kStore) cell = operand;
  if (operation == kAdd) cell = old + operand;
  if (operation == kOr) cell = old | operand;
  return old;
}

void count_distinct(Region& region) {
  u64 n_words = (region.bytes + 63) / 64;
  for (u32 write = 0; write < 2; ++write) {
    const u64* bits = write ? region.write_bits : region.read_bits;
    u64 n_bytes = 0, n_lines = 0;
    for (u64 i = 0; bits && i < n_words; i += 2) {  // two words are a line of 128 bytes
      u64 next = i + 1 < n_words ? bits[i + 1] : 0;
      n_bytes += __builtin_popcountll(bits[i]) + __builtin_popcountll(next);
      n_lines += (bits[i] | next) != 0;
    }
    (write ? region.distinct_written : region.distinct_read) = n_bytes;
    (write ? region.lines_written : region.lines_read) = n_lines;
  }
}
