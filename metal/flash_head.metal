// FlashHead's steps: from hidden states to full logits or to the greedy token.
//
//   hidden (R, D) ─ route ─▶ scores (R, C) ─ select ─▶ probes (R, p), ranks (R, C)
//                 ─ score ─▶ logits (R, p, n), best (R, p) ─ expand ─▶ (R, V)  or  ─ token ─▶ (R,)
//
// For samplers that stop at the logits of score, ids gives the tokens they belong to.
//
// R positions (B·L), D hidden size, C clusters of n rows each, V tokens, p clusters probed per
// position. A slot is c·n + i, row i of cluster c; a padded slot has the token id V.
//
// The text has three users. `mx.fast.metal_kernel` in Python and `MLXFast.metalKernel` in Swift take
// it as their header, without the parts that FLASH_HEAD_JIT hides, and each kernel calls one
// function below. `metal -c` compiles the whole file with the [[kernel]] wrappers at its end, which
// also state the order of the arguments. Every size is a template argument.
//
// Arguments are templates on the pointer instead of the element, because MLX passes an array of
// fewer than 8 elements in `constant` and any other in `device`. All sums are float32. Every written
// value is finite: an overflow becomes the largest finite value.
//
// kernel   grid (threads)                 threadgroup     barriers  distinct bytes read
// route    64·⌈C/8⌉ × ⌈R/H⌉               64              0         centroids ⌈R/H⌉ times, hidden
// select   512 × R                        512             17        scores
// score    32·⌈n/4⌉·p × R                 32·⌈n/4⌉        1         p·n rows, hidden
// expand   256·⌈V/1024⌉ × R               256             1         slot_of, scores, ranks, logits
// token    256 × R                        256             2         best, the winners' logits and ids
// ids      256·⌈p·n/256⌉ × R              256             0         ids of p clusters
//
// H is 1, 2 or 4: the number of positions that share one reading of the centroids. Grids consist of
// whole threadgroups.

#ifndef FLASH_HEAD_JIT
#include <metal_stdlib>
using namespace metal;
typedef bfloat bfloat16_t;
#endif

// An array stays in registers only where every loop over it is unrolled.
#define FLASH_HEAD_UNROLL _Pragma("clang loop unroll(full)")

namespace flash_head {

constant constexpr int LANES = 32;
constant constexpr int ROWS = 4;                // rows a simdgroup computes at once
constant constexpr int ROUTE_SIMDGROUPS = 2;    // 8 centroids per threadgroup
constant constexpr int SELECT_THREADS = 512;
constant constexpr int SELECT_SIMDGROUPS = SELECT_THREADS / LANES;
constant constexpr int DIGITS = 256;            // a radix pass looks at 8 bits
constant constexpr int COPIES = 8;              // of the histogram, against contention
constant constexpr int COPY_STRIDE = DIGITS + 1;  // puts a digit's copies into different banks
constant constexpr int WIDE_THREADS = 256;      // of expand, token and ids
constant constexpr int WIDE_SIMDGROUPS = WIDE_THREADS / LANES;
constant constexpr int EXPAND_TOKENS = 4;       // per thread
constant constexpr uint NOT_PROBED = 0xffffffffu;

///////////////////////////////////////////////////////////////////////////////
// Finite values
///////////////////////////////////////////////////////////////////////////////

template <typename T>
struct Finite;
template <>
struct Finite<float> {
  static float highest() { return as_type<float>(0x7f7fffffu); }
};
template <>
struct Finite<half> {
  static float highest() { return 65504.0f; }
};
template <>
struct Finite<bfloat16_t> {
  static float highest() { return as_type<float>(0x7f7f0000u); }
};

template <typename T>
inline T to_finite(float value) {
  return T(clamp(value, -Finite<T>::highest(), Finite<T>::highest()));
}

///////////////////////////////////////////////////////////////////////////////
// Rows as they are stored
//
// A row is cut into chunks of VALUES values, 8 bytes when quantized or 16-bit, and lane l of a
// simdgroup takes the chunks l, l + 32, …: one read of the simdgroup covers 256 consecutive bytes.
// A chunk lies within one quantization group. Each format can
//   load      read a chunk of one row,
//   prepare   bring the hidden values that meet it into registers, and return their sum,
//   dot       multiply the two.
///////////////////////////////////////////////////////////////////////////////

// MLX's affine form, 4 or 8 bits: value = scale · q + bias. As in MLX's qmv, a q is masked in place
// within its 16 bits. Instead of a shift, `prepare` divides its hidden value by 2^shift, exactly.
template <int D, int BITS, int GROUP, typename Words, typename Scales>
struct AffineRows {
  static constant constexpr const int VALUES = 64 / BITS;
  static constant constexpr const int CHUNKS = D / VALUES;
  static constant constexpr const int PER_HALF = 16 / BITS;
  static constant constexpr const uint MASK = (1u << BITS) - 1u;

  struct Chunk {
    uint2 words;
    float scale;
    float bias;
  };

  Words weight;   // (rows, D·BITS/32) uint
  Scales scales;  // (rows, D/GROUP)
  Scales biases;

  Chunk load(size_t row, uint chunk) const {
    const size_t word = row * (D * BITS / 32) + 2 * chunk;
    const size_t group = row * (D / GROUP) + chunk * VALUES / GROUP;
    Chunk loaded;
    loaded.words = uint2(weight[word], weight[word + 1]);
    loaded.scale = float(scales[group]);
    loaded.bias = float(biases[group]);
    return loaded;
  }

  template <typename Hidden>
  static float prepare(Hidden hidden, thread float* x) {
    float sum = 0.0f;
    FLASH_HEAD_UNROLL
    for (int i = 0; i < VALUES; i++) {
      const float value = float(hidden[i]);
      sum += value;
      x[i] = value * (1.0f / float(1u << (BITS * (i % PER_HALF))));
    }
    return sum;
  }

  static float dot(Chunk chunk, const thread float* x, float sum) {
    float total = 0.0f;
    FLASH_HEAD_UNROLL
    for (int i = 0; i < VALUES; i++) {
      const uint word = i < VALUES / 2 ? chunk.words.x : chunk.words.y;
      const uint bits = word >> (16 * (i / PER_HALF % 2));
      total += x[i] * float(bits & (MASK << (BITS * (i % PER_HALF))));
    }
    return chunk.scale * total + chunk.bias * sum;
  }
};

// MLX's mxfp4: e2m1 values, and a power of two (e8m0) for each 32 of them.
template <int D, typename Words, typename Scales>
struct Mxfp4Rows {
  static constant constexpr const int VALUES = 16;
  static constant constexpr const int CHUNKS = D / VALUES;

  struct Chunk {
    uint2 words;
    float scale;
  };

  Words weight;   // (rows, D/8) uint
  Scales scales;  // (rows, D/32) uchar

  Chunk load(size_t row, uint chunk) const {
    const size_t word = row * (D / 8) + 2 * chunk;
    const uint exponent = uint(scales[row * (D / 32) + chunk / 2]);
    Chunk loaded;
    loaded.words = uint2(weight[word], weight[word + 1]);
    loaded.scale = as_type<float>(exponent == 0 ? 0x400000u : exponent << 23);
    return loaded;
  }

  template <typename Hidden>
  static float prepare(Hidden hidden, thread float* x) {
    FLASH_HEAD_UNROLL
    for (int i = 0; i < VALUES; i++) {
      x[i] = float(hidden[i]);
    }
    return 0.0f;
  }

  // The three low bits are the top of a half's magnitude without a factor of 2^14. A half, because
  // 0.5 needs its subnormal numbers, which are not flushed.
  static float decode(uint q) {
    const float magnitude = float(as_type<half>(ushort((q & 7u) << 9))) * 16384.0f;
    return (q & 8u) ? -magnitude : magnitude;
  }

  static float dot(Chunk chunk, const thread float* x, float) {
    float total = 0.0f;
    FLASH_HEAD_UNROLL
    for (int i = 0; i < VALUES; i++) {
      const uint word = i < VALUES / 2 ? chunk.words.x : chunk.words.y;
      total += x[i] * decode(word >> (4 * (i % 8)));
    }
    return chunk.scale * total;
  }
};

// Floats: 4 values to a chunk, as in MLX's gemv.
template <int D, typename Values>
struct DenseRows {
  static constant constexpr const int VALUES = 4;
  static constant constexpr const int CHUNKS = D / VALUES;

  struct Chunk {
    float values[4];
  };

  Values weight;  // (rows, D)

  Chunk load(size_t row, uint chunk) const {
    const size_t first = row * D + chunk * VALUES;
    Chunk loaded;
    FLASH_HEAD_UNROLL
    for (int i = 0; i < VALUES; i++) {
      loaded.values[i] = float(weight[first + i]);
    }
    return loaded;
  }

  template <typename Hidden>
  static float prepare(Hidden hidden, thread float* x) {
    FLASH_HEAD_UNROLL
    for (int i = 0; i < VALUES; i++) {
      x[i] = float(hidden[i]);
    }
    return 0.0f;
  }

  static float dot(Chunk chunk, const thread float* x, float) {
    float total = 0.0f;
    FLASH_HEAD_UNROLL
    for (int i = 0; i < VALUES; i++) {
      total += x[i] * chunk.values[i];
    }
    return total;
  }
};

template <int D, int BITS, int GROUP, typename Words, typename Scales>
inline AffineRows<D, BITS, GROUP, Words, Scales> affine_rows(
    Words weight, Scales scales, Scales biases) {
  return AffineRows<D, BITS, GROUP, Words, Scales>{weight, scales, biases};
}

template <int D, typename Words, typename Scales>
inline Mxfp4Rows<D, Words, Scales> mxfp4_rows(Words weight, Scales scales) {
  return Mxfp4Rows<D, Words, Scales>{weight, scales};
}

template <int D, typename Values>
inline DenseRows<D, Values> dense_rows(Values weight) {
  return DenseRows<D, Values>{weight};
}

// Products of ROWS consecutive rows with H hidden rows, by one simdgroup: totals[h·ROWS + row] on
// every lane. A chunk of each row is read once for all H. Rows past the last one repeat it, which
// saves a check in the loop; the caller drops them. One simd_sum per total at the end.
template <int D, int H, typename Rows, typename Hidden>
inline void dot_rows(
    Rows rows,
    size_t first_row,
    int last_row,
    Hidden hidden,
    uint first_hidden,
    int last_hidden,
    uint lane,
    thread float* totals) {
  FLASH_HEAD_UNROLL
  for (int i = 0; i < H * ROWS; i++) {
    totals[i] = 0.0f;
  }
  for (uint chunk = lane; chunk < uint(Rows::CHUNKS); chunk += LANES) {
    typename Rows::Chunk loaded[ROWS];
    FLASH_HEAD_UNROLL
    for (int row = 0; row < ROWS; row++) {
      loaded[row] = rows.load(first_row + min(row, last_row), chunk);
    }
    FLASH_HEAD_UNROLL
    for (int h = 0; h < H; h++) {
      float x[Rows::VALUES];
      const size_t start = size_t(first_hidden + min(h, last_hidden)) * D;
      const float sum = Rows::prepare(hidden + (start + chunk * Rows::VALUES), x);
      FLASH_HEAD_UNROLL
      for (int row = 0; row < ROWS; row++) {
        totals[h * ROWS + row] += Rows::dot(loaded[row], x, sum);
      }
    }
  }
  FLASH_HEAD_UNROLL
  for (int i = 0; i < H * ROWS; i++) {
    totals[i] = simd_sum(totals[i]);
  }
}

///////////////////////////////////////////////////////////////////////////////
// route: scores of all clusters, scores[r, c] = hidden[r] · centroid[c] + route_bias[c]
//
// MLX's qmv_fast, but the sum stays float32 and the bias is added, which saves two or three kernels.
// A simdgroup computes 4 centroids for H positions, a threadgroup 8 centroids. There is neither
// threadgroup memory nor a barrier. Every centroid byte is read once for each H positions; the lanes
// that share a scale read it from cache.
// Edges: C not divisible by 8 and R not by H repeat the last row and drop the result.
///////////////////////////////////////////////////////////////////////////////
template <int D, int C, int H, typename Rows, typename Hidden, typename Bias>
inline void route(
    Rows centroids,
    Hidden hidden,           // (R, D)
    Bias route_bias,         // (C,) float
    device float* scores,    // (R, C)
    uint n_hidden,           // R
    uint3 group,
    uint simdgroup,
    uint lane) {
  const uint cluster = (group.x * ROUTE_SIMDGROUPS + simdgroup) * ROWS;
  if (cluster >= uint(C)) {
    return;
  }
  const uint position = group.y * H;
  const int last_row = min(ROWS, int(C - cluster)) - 1;
  const int last_hidden = min(H, int(n_hidden - position)) - 1;
  float totals[H * ROWS];
  dot_rows<D, H>(centroids, cluster, last_row, hidden, position, last_hidden, lane, totals);
  FLASH_HEAD_UNROLL
  for (int h = 0; h < H; h++) {
    FLASH_HEAD_UNROLL
    for (int row = 0; row < ROWS; row++) {
      if (lane == 0 && h <= last_hidden && row <= last_row) {
        scores[size_t(position + h) * C + cluster + row] =
            to_finite<float>(totals[h * ROWS + row] + route_bias[cluster + row]);
      }
    }
  }
}

///////////////////////////////////////////////////////////////////////////////
// select: the P best clusters of each position, without a sort
//
// One threadgroup per position. Each score becomes an unsigned key of the same order, kept in
// registers: thread (simdgroup s, lane l) holds ids s·32·KEYS + 32·i + l, KEYS = ⌈C/512⌉ (16 for
// 8,016 clusters; 512 threads leave registers for 32 or 64 keys).
// Four radix passes from the top 8 bits down find the P-th largest key, the threshold: count digits
// of the keys that match so far, in 8 copies of the histogram, since close scores share their top
// bits; sum the copies; a prefix sum from the highest digit finds the one in which the count
// reaches what remains. Keys above the threshold are probed, and of the keys equal to it the first
// `remaining` by id. An exclusive prefix sum over ids gives every probed cluster its rank. So
// probes ascend, ties go to the lowest id, and the order of the atomics does not matter.
// Edges: an id past C has key 0, below that of any number, and is never reached since P ≤ C.
// Threadgroup memory: 8,224 + 136 bytes. Barriers: 4 per pass and 1.
///////////////////////////////////////////////////////////////////////////////
inline uint order_key(float score) {
  const uint bits = score == 0.0f ? 0u : as_type<uint>(score);  // −0 equals 0
  return bits ^ ((bits >> 31) ? 0xffffffffu : 0x80000000u);
}

template <int C, int P, typename Scores>
inline void select_probes(
    Scores scores,                       // (R, C) float
    device uint* probes,                 // (R, P)
    device uint* ranks,                  // (R, C)
    threadgroup atomic<uint>* histogram,  // [COPIES · COPY_STRIDE]
    threadgroup uint* totals,            // [2 · SELECT_SIMDGROUPS]
    threadgroup uint* chosen,            // [2]
    uint position,
    uint thread_id,
    uint simdgroup,
    uint lane) {
  constexpr int KEYS = (C + SELECT_THREADS - 1) / SELECT_THREADS;
  const uint first_id = simdgroup * (LANES * KEYS) + lane;
  const size_t row = size_t(position) * C;
  uint keys[KEYS];
  FLASH_HEAD_UNROLL
  for (int i = 0; i < KEYS; i++) {
    const uint id = first_id + i * LANES;
    keys[i] = id < uint(C) ? order_key(scores[row + id]) : 0u;
  }

  uint threshold = 0;  // its bits under `decided` are final
  uint decided = 0;
  uint remaining = P;
  const uint copy = lane % COPIES * COPY_STRIDE;
  const uint digit = DIGITS - 1 - thread_id;  // for the threads that add up, thread_id < DIGITS
  for (int shift = 24; shift >= 0; shift -= 8) {
    for (uint i = thread_id; i < uint(COPIES * COPY_STRIDE); i += SELECT_THREADS) {
      atomic_store_explicit(&histogram[i], 0u, memory_order_relaxed);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    FLASH_HEAD_UNROLL
    for (int i = 0; i < KEYS; i++) {
      if ((keys[i] & decided) == threshold) {
        const uint bin = copy + ((keys[i] >> shift) & (DIGITS - 1));
        atomic_fetch_add_explicit(&histogram[bin], 1u, memory_order_relaxed);
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    uint count = 0;
    uint reached = 0;  // keys with this digit or a higher one
    if (thread_id < uint(DIGITS)) {
      for (int i = 0; i < COPIES; i++) {
        count += atomic_load_explicit(&histogram[i * COPY_STRIDE + digit], memory_order_relaxed);
      }
      reached = simd_prefix_inclusive_sum(count);
      if (lane == LANES - 1) {
        totals[simdgroup] = reached;
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (thread_id < uint(DIGITS)) {
      for (uint i = 0; i < simdgroup; i++) {
        reached += totals[i];
      }
      if (reached >= remaining && reached - count < remaining) {  // true for one thread
        chosen[0] = digit;
        chosen[1] = remaining - (reached - count);
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    threshold |= chosen[0] << shift;
    decided |= uint(DIGITS - 1) << shift;
    remaining = chosen[1];
  }

  uint above = 0;
  uint equal = 0;
  FLASH_HEAD_UNROLL
  for (int i = 0; i < KEYS; i++) {
    above += keys[i] > threshold ? 1u : 0u;
    equal += keys[i] == threshold ? 1u : 0u;
  }
  above = simd_sum(above);
  equal = simd_sum(equal);
  if (lane == 0) {
    totals[simdgroup] = above;
    totals[SELECT_SIMDGROUPS + simdgroup] = equal;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  above = simd_sum(lane < simdgroup ? totals[lane] : 0u);
  equal = simd_sum(lane < simdgroup ? totals[SELECT_SIMDGROUPS + lane] : 0u);
  FLASH_HEAD_UNROLL
  for (int i = 0; i < KEYS; i++) {
    const uint is_above = keys[i] > threshold ? 1u : 0u;
    const uint is_equal = keys[i] == threshold ? 1u : 0u;
    const uint equal_before = equal + simd_prefix_exclusive_sum(is_equal);
    const uint rank = above + simd_prefix_exclusive_sum(is_above) + min(equal_before, remaining);
    const bool probed = is_above != 0u || (is_equal != 0u && equal_before < remaining);
    const uint id = first_id + i * LANES;
    if (id < uint(C)) {
      ranks[row + id] = probed ? rank : NOT_PROBED;
    }
    if (probed) {
      probes[size_t(position) * P + rank] = id;
    }
    above += simd_sum(is_above);
    equal += simd_sum(is_equal);
  }
}

///////////////////////////////////////////////////////////////////////////////
// Largest `value` of the threadgroup, on every thread. `shared` holds one float per simdgroup.
///////////////////////////////////////////////////////////////////////////////
template <int SIMDGROUPS>
inline float threadgroup_max(
    float value, threadgroup float* shared, uint simdgroup, uint lane) {
  value = simd_max(value);
  if (lane == 0) {
    shared[simdgroup] = value;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  return simd_max(shared[min(lane, uint(SIMDGROUPS - 1))]);
}

///////////////////////////////////////////////////////////////////////////////
// score: logits of the probed clusters' rows, and the best of each cluster
//
// One threadgroup per probe, one simdgroup per 4 rows of its cluster (16 rows: 128 threads), each
// as in route. A cluster is one block of rows, so the threadgroup reads consecutive memory: at
// n = 16, D = 2048 and 4 bits 16 KB, then 2 KB of scales and biases. Every weight byte is read once.
// The simdgroups' maxima meet in threadgroup memory (n bytes): expand and token
// then reduce p values instead of p·n.
// Edges: n not divisible by 4 repeats the last row and drops the result. A padded slot gets the
// lowest finite value. Head bias: a pointer (slots,) or NoBias.
///////////////////////////////////////////////////////////////////////////////
struct NoBias {};

inline float bias_at(NoBias, uint) {
  return 0.0f;
}

template <typename Bias>
inline float bias_at(Bias bias, uint slot) {
  return float(bias[slot]);
}

template <
    int D,
    int N,
    int P,
    int V,
    bool PADDED,
    typename T,
    typename Rows,
    typename Hidden,
    typename Probes,
    typename Ids,
    typename Bias>
inline void score(
    Rows rows,                   // slots
    Hidden hidden,               // (R, D)
    Probes probes,               // (R, P) uint
    Ids token_ids,               // (slots,) uint
    Bias bias,
    device T* logits,            // (R, P, N)
    device float* best,          // (R, P)
    threadgroup float* shared,   // [⌈N/4⌉]
    uint3 group,
    uint simdgroup,
    uint lane) {
  const size_t probe = size_t(group.y) * P + group.x;
  const uint first = simdgroup * ROWS;
  const int last_row = min(ROWS, N - int(first)) - 1;
  const uint slot = probes[probe] * N + first;
  float totals[ROWS];
  dot_rows<D, 1>(rows, slot, last_row, hidden, group.y, 0, lane, totals);
  float highest = -Finite<T>::highest();
  FLASH_HEAD_UNROLL
  for (int row = 0; row < ROWS; row++) {
    if (row <= last_row) {
      float logit = totals[row] + bias_at(bias, slot + row);
      if (PADDED && token_ids[slot + row] == uint(V)) {
        logit = -Finite<T>::highest();
      }
      const T stored = to_finite<T>(logit);
      highest = max(highest, float(stored));
      if (lane == 0) {
        logits[probe * N + first + row] = stored;
      }
    }
  }
  highest = threadgroup_max<(N + ROWS - 1) / ROWS>(highest, shared, simdgroup, lane);
  if (simdgroup == 0 && lane == 0) {
    best[probe] = highest;
  }
}

///////////////////////////////////////////////////////////////////////////////
// expand: full logits. A probed token keeps its own; every other gets its cluster's estimate
//   min(scores[c] + tail_offset[c], m − max(1, |m|/64)),  m the best candidate of the position.
//
// 256 threads, 4 tokens each, 256 apart: slot_of and the output are accessed in order. The clusters'
// values (4·C bytes each) and the candidates come from cache. Each threadgroup finds m by itself
// from the P bests (1 barrier), which costs less than another kernel.
///////////////////////////////////////////////////////////////////////////////
template <
    int V,
    int C,
    int N,
    int P,
    typename T,
    typename Scores,
    typename Offsets,
    typename Slots,
    typename Ranks,
    typename Logits,
    typename Best>
inline void expand(
    Scores scores,              // (R, C) float
    Offsets tail_offset,        // (C,) float
    Slots slot_of,              // (V,) uint
    Ranks ranks,                // (R, C) uint
    Logits logits,              // (R, P, N)
    Best best,                  // (R, P) float
    device T* expanded,         // (R, V)
    threadgroup float* shared,  // [WIDE_SIMDGROUPS]
    uint3 group,
    uint thread_id,
    uint simdgroup,
    uint lane) {
  const size_t position = group.y;
  float highest = -Finite<float>::highest();
  for (uint i = thread_id; i < uint(P); i += WIDE_THREADS) {
    highest = max(highest, best[position * P + i]);
  }
  highest = threadgroup_max<WIDE_SIMDGROUPS>(highest, shared, simdgroup, lane);
  const float cap = highest - max(1.0f, fabs(highest) / 64.0f);
  const uint first = group.x * (WIDE_THREADS * EXPAND_TOKENS) + thread_id;
  FLASH_HEAD_UNROLL
  for (int i = 0; i < EXPAND_TOKENS; i++) {
    const uint token = first + i * WIDE_THREADS;
    if (token < uint(V)) {
      const uint slot = slot_of[token];
      const uint cluster = slot / N;
      const uint rank = ranks[position * C + cluster];
      expanded[position * V + token] = rank < uint(P)
          ? T(logits[(position * P + rank) * N + slot % N])
          : to_finite<T>(min(scores[position * C + cluster] + tail_offset[cluster], cap));
    }
  }
}

///////////////////////////////////////////////////////////////////////////////
// token: the greedy token, the lowest id among the highest candidate logits
//
// One threadgroup per position finds m from the P bests, then reads the clusters whose best is m.
// It reads little more than 4·P bytes; 2 barriers.
///////////////////////////////////////////////////////////////////////////////
template <int N, int P, typename Probes, typename Ids, typename Logits, typename Best>
inline void greedy_token(
    Probes probes,              // (R, P) uint
    Ids token_ids,              // (slots,) uint, V for a padded slot
    Logits logits,              // (R, P, N)
    Best best,                  // (R, P) float
    device uint* tokens,        // (R,)
    threadgroup float* shared,  // [WIDE_SIMDGROUPS]
    threadgroup uint* lowest,   // [WIDE_SIMDGROUPS]
    uint position,
    uint thread_id,
    uint simdgroup,
    uint lane) {
  const size_t first = size_t(position) * P;
  float highest = -Finite<float>::highest();
  for (uint i = thread_id; i < uint(P); i += WIDE_THREADS) {
    highest = max(highest, best[first + i]);
  }
  highest = threadgroup_max<WIDE_SIMDGROUPS>(highest, shared, simdgroup, lane);
  uint token = 0xffffffffu;
  for (uint i = thread_id; i < uint(P); i += WIDE_THREADS) {
    if (best[first + i] == highest) {
      for (int slot = 0; slot < N; slot++) {
        if (float(logits[(first + i) * N + slot]) == highest) {
          token = min(token, uint(token_ids[probes[first + i] * N + slot]));
        }
      }
    }
  }
  token = simd_min(token);
  if (lane == 0) {
    lowest[simdgroup] = token;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  token = simd_min(lowest[min(lane, uint(WIDE_SIMDGROUPS - 1))]);
  if (thread_id == 0) {
    tokens[position] = token;
  }
}

///////////////////////////////////////////////////////////////////////////////
// ids: the token ids of the probed clusters, in the order of their logits. One thread per slot.
///////////////////////////////////////////////////////////////////////////////
template <int N, int P, typename Probes, typename Ids>
inline void candidate_ids(
    Probes probes,     // (R, P) uint
    Ids token_ids,     // (slots,) uint, V for a padded slot
    device uint* ids,  // (R, P, N)
    uint3 grid_position) {
  if (grid_position.x < uint(P * N)) {
    const size_t position = grid_position.y;
    const uint cluster = probes[position * P + grid_position.x / N];
    ids[position * (P * N) + grid_position.x] = token_ids[cluster * N + grid_position.x % N];
  }
}

}  // namespace flash_head

///////////////////////////////////////////////////////////////////////////////
// Kernels for an application that compiles this file itself: 4-bit rows and centroids of group 64.
// Any other head is one more line at the end.
///////////////////////////////////////////////////////////////////////////////
#ifndef FLASH_HEAD_JIT

template <typename T, int D, int C, int H>
[[kernel]] void flash_head_route(
    const device T* hidden [[buffer(0)]],
    const device uint* weight [[buffer(1)]],
    const device T* scales [[buffer(2)]],
    const device T* biases [[buffer(3)]],
    const device float* route_bias [[buffer(4)]],
    device float* scores [[buffer(5)]],
    constant uint& n_hidden [[buffer(6)]],
    uint3 group [[threadgroup_position_in_grid]],
    uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  flash_head::route<D, C, H>(
      flash_head::affine_rows<D, 4, 64>(weight, scales, biases),
      hidden, route_bias, scores, n_hidden, group, simdgroup, lane);
}

template <int C, int P>
[[kernel]] void flash_head_select(
    const device float* scores [[buffer(0)]],
    device uint* probes [[buffer(1)]],
    device uint* ranks [[buffer(2)]],
    uint3 group [[threadgroup_position_in_grid]],
    uint thread_id [[thread_index_in_threadgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  threadgroup atomic<uint> histogram[flash_head::COPIES * flash_head::COPY_STRIDE];
  threadgroup uint totals[2 * flash_head::SELECT_SIMDGROUPS];
  threadgroup uint chosen[2];
  flash_head::select_probes<C, P>(
      scores, probes, ranks, histogram, totals, chosen, group.y, thread_id, simdgroup, lane);
}

template <typename T, int D, int N, int P, int V, bool PADDED>
[[kernel]] void flash_head_score(
    const device T* hidden [[buffer(0)]],
    const device uint* probes [[buffer(1)]],
    const device uint* token_ids [[buffer(2)]],
    const device uint* weight [[buffer(3)]],
    const device T* scales [[buffer(4)]],
    const device T* biases [[buffer(5)]],
    device T* logits [[buffer(6)]],
    device float* best [[buffer(7)]],
    uint3 group [[threadgroup_position_in_grid]],
    uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  threadgroup float shared[flash_head::LANES];
  flash_head::score<D, N, P, V, PADDED>(
      flash_head::affine_rows<D, 4, 64>(weight, scales, biases),
      hidden, probes, token_ids, flash_head::NoBias{}, logits, best, shared,
      group, simdgroup, lane);
}

template <typename T, int V, int C, int N, int P>
[[kernel]] void flash_head_expand(
    const device float* scores [[buffer(0)]],
    const device float* tail_offset [[buffer(1)]],
    const device uint* slot_of [[buffer(2)]],
    const device uint* ranks [[buffer(3)]],
    const device T* logits [[buffer(4)]],
    const device float* best [[buffer(5)]],
    device T* expanded [[buffer(6)]],
    uint3 group [[threadgroup_position_in_grid]],
    uint thread_id [[thread_index_in_threadgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  threadgroup float shared[flash_head::WIDE_SIMDGROUPS];
  flash_head::expand<V, C, N, P>(
      scores, tail_offset, slot_of, ranks, logits, best, expanded, shared,
      group, thread_id, simdgroup, lane);
}

template <typename T, int N, int P>
[[kernel]] void flash_head_token(
    const device uint* probes [[buffer(0)]],
    const device uint* token_ids [[buffer(1)]],
    const device T* logits [[buffer(2)]],
    const device float* best [[buffer(3)]],
    device uint* tokens [[buffer(4)]],
    uint3 group [[threadgroup_position_in_grid]],
    uint thread_id [[thread_index_in_threadgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  threadgroup float shared[flash_head::WIDE_SIMDGROUPS];
  threadgroup uint lowest[flash_head::WIDE_SIMDGROUPS];
  flash_head::greedy_token<N, P>(
      probes, token_ids, logits, best, tokens, shared, lowest,
      group.y, thread_id, simdgroup, lane);
}

template <int N, int P>
[[kernel]] void flash_head_ids(
    const device uint* probes [[buffer(0)]],
    const device uint* token_ids [[buffer(1)]],
    device uint* ids [[buffer(2)]],
    uint3 grid_position [[thread_position_in_grid]]) {
  flash_head::candidate_ids<N, P>(probes, token_ids, ids, grid_position);
}

#define FLASH_HEAD_KERNEL(name, kernel_name, ...)    \
  template [[host_name(kernel_name "_" name)]] [[kernel]] \
  decltype(__VA_ARGS__) __VA_ARGS__;

// A head of clusters of 16 rows, none padded (V = 16·C), decoding one position, p = 256.
#define FLASH_HEAD_KERNELS(name, T, V, D)                                                     \
  FLASH_HEAD_KERNEL(name, "flash_head_route", flash_head_route<T, D, V / 16, 1>)              \
  FLASH_HEAD_KERNEL(name, "flash_head_select", flash_head_select<V / 16, 256>)                \
  FLASH_HEAD_KERNEL(name, "flash_head_score", flash_head_score<T, D, 16, 256, V, false>)      \
  FLASH_HEAD_KERNEL(name, "flash_head_expand", flash_head_expand<T, V, V / 16, 16, 256>)

FLASH_HEAD_KERNELS("llama_3_2_1b", bfloat16_t, 128256, 2048)
FLASH_HEAD_KERNELS("qwen3_0_6b", bfloat16_t, 151936, 1024)
FLASH_HEAD_KERNELS("gemma_3_270m", bfloat16_t, 262144, 640)
FLASH_HEAD_KERNELS("smollm2_135m", bfloat16_t, 49152, 576)
FLASH_HEAD_KERNEL("16_256", "flash_head_token", flash_head_token<bfloat16_t, 16, 256>)
FLASH_HEAD_KERNEL("16_256", "flash_head_ids", flash_head_ids<16, 256>)

#endif  // FLASH_HEAD_JIT
