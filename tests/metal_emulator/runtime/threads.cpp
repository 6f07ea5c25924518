// Runs the threads of each threadgroup as fibers that meet at barriers and simd operations.
//
// Threads run one at a time, each until it has to wait. All threads of a simdgroup run until they
// wait at a threadgroup barrier or have returned, then the next simdgroup runs. Whoever waits when
// nobody can run any more waits for a thread that never comes: a divergent barrier.

#include "state.h"

extern "C" void* mmap(void*, u64, int, int, int, long);
extern "C" void* memcpy(void*, const void*, u64);
extern "C" void* memset(void*, int, u64);
extern "C" __attribute__((visibility("hidden"))) void metal_emulator_switch(void** save, void* load);

// Saves the registers that a call preserves, and the stack; then loads another fiber's.
#if defined(__x86_64__)
constexpr u32 kFrameBytes = 56, kReturnAddress = 48;
constexpr u32 kCallBytes = 8;  // a function starts with its return address on an aligned stack
asm(R"(
.text
.globl metal_emulator_switch
.hidden metal_emulator_switch
metal_emulator_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
)");
#elif defined(__aarch64__)
constexpr u32 kFrameBytes = 160, kReturnAddress = 88, kCallBytes = 0;
asm(R"(
.text
.globl metal_emulator_switch
.hidden metal_emulator_switch
metal_emulator_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]; stp x21, x22, [sp, #16]; stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]; stp x27, x28, [sp, #64]; stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]; stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]; stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]; ldp x21, x22, [sp, #16]; ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]; ldp x27, x28, [sp, #64]; ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]; ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]; ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
)");
#else
#error "The Metal emulator runs on x86-64 and arm64."
#endif

namespace {

enum State : u8 { kReady, kAtSimd, kAtBarrier, kDone };

struct Fiber {
  void* stack_pointer;
  State state;
  u32 parity;  // which of the two exchange buffers its next simd operation uses
};

Fiber fibers[kMaxThreads];
void* scheduler_stack_pointer;
u32 group_size[3], n_groups[3], n_threads, n_simdgroups;
u32 n_at_barrier, n_barriers, barrier_flags;
u64 barrier_site, random_state;

void to_scheduler() {
  metal_emulator_switch(&fibers[current].stack_pointer, scheduler_stack_pointer);
}

void permutation(u32* order, u32 n) {
  for (u32 i = 0; i < n; ++i) order[i] = launch->order == kReverse ? n - 1 - i : i;
  if (launch->order != kShuffle) return;
  for (u32 i = n; i > 1; --i) {
    random_state = random_state * 6364136223846793005ull + 1442695040888963407ull;
    u32 j = static_cast<u32>(random_state >> 33) % i, last = order[i - 1];
    order[i - 1] = order[j];
    order[j] = last;
  }
}

void run_thread() {
  u32 x = current % group_size[0], y = current / group_size[0] % group_size[1];
  u32 z = current / (group_size[0] * group_size[1]);
  u32 position[3] = {x, y, z};
  Indices indices;
  for (u32 d = 0; d < 3; ++d) {
    indices.position_in_threadgroup[d] = position[d];
    indices.threadgroup_position[d] = group_position[d];
    indices.position_in_grid[d] = group_position[d] * launch->threadgroup[d] + position[d];
    indices.threads_per_threadgroup[d] = group_size[d];
    indices.threads_per_grid[d] = launch->grid[d];
    indices.threadgroups_per_grid[d] = n_groups[d];
  }
  indices.index_in_threadgroup = current;
  indices.index_in_simdgroup = current % kLanes;
  indices.simdgroup_index = current / kLanes;
  indices.simdgroups_per_threadgroup = n_simdgroups;
  launch->kernel(launch->arguments, &indices);
  fibers[current].state = kDone;
  to_scheduler();
}

void start_fiber(u32 thread) {
  Fiber& fiber = fibers[thread];
  fiber.state = kReady;
  fiber.parity = 0;
  char* frame = arena->stacks[thread] + kStackBytes - 64 - kCallBytes - kFrameBytes;
  memset(frame, 0, kFrameBytes);
  void (*entry)() = run_thread;
  memcpy(frame + kReturnAddress, &entry, sizeof entry);
  fiber.stack_pointer = frame;
}

// Runs one simdgroup until each of its threads waits at a threadgroup barrier or has returned.
void run_simdgroup(u32 index) {
  u32 first = index * kLanes, order[kLanes];
  Simdgroup& simdgroup = arena->simdgroups[index];
  for (bool ran = true; ran && !launch->fault.kind;) {
    ran = false;
    permutation(order, simdgroup.n_lanes);
    for (u32 i = 0; i < simdgroup.n_lanes && !launch->fault.kind; ++i) {
      current = first + order[i];
      if (fibers[current].state != kReady) continue;
      ran = true;
      metal_emulator_switch(&scheduler_stack_pointer, fibers[current].stack_pointer);
    }
  }
}

void record(u32 kind, u32 region, u64 offset, u32 size, bool write, u32 other) {
  Fault& fault = launch->fault;
  fault.kind = kind;
  fault.region = region;
  fault.thread = current;
  fault.other = other;
  fault.size = size;
  fault.write = write;
  fault.offset = offset;
  for (u32 d = 0; d < 3; ++d) fault.group[d] = group_position[d];
  if (region != kNowhere) fault.name = regions[region].name;
}

// All threads wait or have returned. Opens the barrier if all wait at it; finds the divergence.
bool open_barrier() {
  u32 n_done = 0, waiting = kNowhere, gone = kNowhere;
  for (u32 i = 0; i < n_threads; ++i) {
    bool done = fibers[i].state == kDone;
    n_done += done;
    if (fibers[i].state == kAtSimd) waiting = i;
    if (!done && waiting == kNowhere) waiting = i;
    if (done) gone = i;
  }
  if (n_done == n_threads) return false;
  if (n_at_barrier < n_threads) {
    current = waiting;
    if (fibers[waiting].state == kAtSimd) {  // who of its simdgroup did not come?
      for (u32 i = waiting / kLanes * kLanes; i < n_threads && i / kLanes == waiting / kLanes; ++i) {
        if (fibers[i].state != kAtSimd) gone = i;
      }
    }
    record(kDivergent, kNowhere, 0, 0, false, gone);
    return false;
  }
  ++clock;
  if (barrier_flags & kMemThreadgroup) ordered_since[0] = clock;
  if (barrier_flags & kMemDevice) ordered_since[1] = clock;
  n_at_barrier = 0;
  ++n_barriers;
  for (u32 i = 0; i < n_threads; ++i) fibers[i].state = kReady;
  return true;
}

void run_threadgroup(u64 flat) {
  group_position[0] = flat % n_groups[0];
  group_position[1] = flat / n_groups[0] % n_groups[1];
  group_position[2] = flat / n_groups[0] / n_groups[1];
  n_threads = 1;
  for (u32 d = 0; d < 3; ++d) {
    u32 left = launch->grid[d] - group_position[d] * launch->threadgroup[d];
    group_size[d] = left < launch->threadgroup[d] ? left : launch->threadgroup[d];
    n_threads *= group_size[d];
  }
  n_simdgroups = (n_threads + kLanes - 1) / kLanes;
  group_start = ordered_since[0] = ordered_since[1] = ++clock;
  n_at_barrier = n_barriers = 0;
  begin_threadgroup_memory();
  for (u32 i = 0; i < n_simdgroups; ++i) {
    Simdgroup& simdgroup = arena->simdgroups[i];
    u32 left = n_threads - i * kLanes;
    simdgroup.n_lanes = left < kLanes ? left : kLanes;
    simdgroup.n_arrived = 0;
    simdgroup.ordered_since[0] = simdgroup.ordered_since[1] = group_start;
  }
  for (u32 i = 0; i < n_threads; ++i) start_fiber(i);
  u32 order[kSimdgroups];
  do {
    permutation(order, n_simdgroups);
    for (u32 i = 0; i < n_simdgroups && !launch->fault.kind; ++i) run_simdgroup(order[i]);
  } while (!launch->fault.kind && open_barrier());
  if (n_barriers > launch->barriers) launch->barriers = n_barriers;
}

// Waits until all lanes of the simdgroup have come to the same operation. True for the last lane,
// which goes on at once.
bool meet(Simdgroup& simdgroup, u32 meeting, u64 site) {
  if (simdgroup.n_arrived && (simdgroup.meeting != meeting || simdgroup.site != site)) {
    u32 other = current / kLanes * kLanes;
    while (fibers[other].state != kAtSimd) ++other;
    fail(kDivergent, kNowhere, 0, 0, false, other);
  }
  simdgroup.meeting = meeting;
  simdgroup.site = site;
  if (++simdgroup.n_arrived < simdgroup.n_lanes) {
    fibers[current].state = kAtSimd;
    to_scheduler();
    return false;
  }
  simdgroup.n_arrived = 0;
  u32 first = current / kLanes * kLanes;
  for (u32 i = first; i < first + simdgroup.n_lanes; ++i) fibers[i].state = kReady;
  return true;
}

}  // namespace

#define PC reinterpret_cast<u64>(__builtin_return_address(0))

void fail(u32 kind, u32 region, u64 offset, u32 size, bool write, u32 other) {
  record(kind, region, offset, size, write, other);
  to_scheduler();
}

EXPORT Lanes* metal_emulator_exchange(u32 operation, const void* value, u32 size) {
  Simdgroup& simdgroup = arena->simdgroups[current / kLanes];
  // No lane can be two operations ahead of another, so two buffers suffice.
  Lanes& lanes = simdgroup.lanes[fibers[current].parity];
  fibers[current].parity ^= 1;
  memcpy(lanes.values[current % kLanes], value, size);
  lanes.has_result = 0;
  lanes.n_lanes = simdgroup.n_lanes;
  meet(simdgroup, operation, PC);
  lanes.lane = current % kLanes;  // read at once: no other lane runs before
  return &lanes;
}

EXPORT void metal_emulator_inactive_lane(u32 lane) {
  fail(kInactiveLane, kNowhere, lane, 0, false, kNobody);
}

EXPORT void metal_emulator_simdgroup_barrier(u32 flags) {
  Simdgroup& simdgroup = arena->simdgroups[current / kLanes];
  if (!meet(simdgroup, kSimdgroupBarrier, PC)) return;
  ++clock;
  if (flags & kMemThreadgroup) simdgroup.ordered_since[0] = clock;
  if (flags & kMemDevice) simdgroup.ordered_since[1] = clock;
}

EXPORT void metal_emulator_threadgroup_barrier(u32 flags) {
  if (n_at_barrier && (barrier_site != PC || barrier_flags != flags)) {
    u32 other = 0;
    while (fibers[other].state != kAtBarrier) ++other;
    fail(kDivergent, kNowhere, 0, 0, false, other);
  }
  barrier_site = PC;
  barrier_flags = flags;
  ++n_at_barrier;
  fibers[current].state = kAtBarrier;
  to_scheduler();
}

// Returns 0 where the fibers' stacks cannot be had; a fault stands in launch->fault.
EXPORT int metal_emulator_launch(Launch* requested) {
  if (!arena) {
    constexpr int kReadWrite = 3, kPrivateAnonymousNoReserve = 0x4022;
    void* memory = mmap(nullptr, sizeof(Arena), kReadWrite, kPrivateAnonymousNoReserve, -1, 0);
    if (memory == reinterpret_cast<void*>(-1)) return 0;
    arena = static_cast<Arena*>(memory);
  }
  launch = requested;
  random_state = launch->seed * 2 + 1;
  n_arrays = 0;
  n_regions = launch->n_regions;
  memcpy(regions, launch->regions, n_regions * sizeof(Region));
  for (u32 d = 0; d < 3; ++d) {
    n_groups[d] = (launch->grid[d] + launch->threadgroup[d] - 1) / launch->threadgroup[d];
  }
  for (u64 i = 0; i < launch->n_groups && !launch->fault.kind; ++i) {
    run_threadgroup(launch->groups[i]);
  }
  for (u32 i = 0; i < launch->n_regions; ++i) {
    count_distinct(regions[i]);
    launch->regions[i] = regions[i];
  }
  return 1;
}
