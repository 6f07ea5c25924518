// FlashHead's steps: from hidden states to full logits or to the greedy token.
//
//   hidden (R, D) -- route --> scores (R, C) -- select --> probes (R, S), words (R, C)
//                 -- score --> logits (R, S, n), best (R, S) -- expand --> (R, V)
//                                                            or -- token --> (R,)
//
// For samplers that stop at the logits of score, ids gives the tokens they belong to.
//
// R positions (B*L), D hidden size, C clusters of n rows each, V tokens, p clusters probed per
// position, S = max(p, 8) of them held. Below 8 the last probe is repeated. This changes no maximum
// and keeps every array at 8 elements or more (MLX passes smaller ones in another address space,
// with another kernel). A slot is c*n + i, row i of cluster c; a padded slot has the token id V. A
// cluster's word is its place among the probes, or the estimate of its tokens' logits.
//
// The text has three users. `mx.fast.metal_kernel` in Python and `MLXFast.metalKernel` in Swift take
// the sections that a kernel needs as its header, and the kernel calls one function below. A section
// begins under a line of slashes with its name. `metal -c` compiles the whole file with the [[kernel]] wrappers at its
// end, which also state the order of the arguments. D, C, n and V are template arguments. R and p
// are not, so another number of probes or positions compiles nothing.
//
// Compile it with -fno-fast-math: fast mathematics assumes that NaN and infinity do not occur and
// may delete the tests for them. MLX's own default is safe.
//
// Arguments are templates on the pointer instead of the element, because MLX passes an array of
// fewer than 8 elements in `constant` and any other in `device`. Sums are float32, in the order of
// MLX's own matrix-vector kernels. Every written value is finite: an overflow becomes the largest
// finite value. NaN stays NaN.
//
// kernel   grid (threads)                 threadgroup       barriers  distinct bytes read
// route    64*ceil(C/8) x ceil(R/H)       64                0         centroids ceil(R/H) times, hidden
// select   512 x R                        512               11        scores, tail_offset
// score    T*S x R, T = 32*ceil(n/4)      T, at most 256    1         S*n rows, hidden
// expand   256*ceil(V/1024) x R           256               1         slot_of, words, logits
// token    256 x R                        256               2         best, the winners' logits and ids
// ids      256*ceil(S*n/256) x R          256               0         ids of S clusters
//
// H is 1 or 4: the number of positions that share one reading of the centroids. Grids consist of
// whole threadgroups.

#ifndef FLASH_HEAD_JIT
#include <metal_stdlib>
using namespace metal;
typedef bfloat bfloat16_t;
#endif

///////////////////////////////////////////////////////////////////////////////
// constants
///////////////////////////////////////////////////////////////////////////////

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

///////////////////////////////////////////////////////////////////////////////
// values: finite ones, NaN, and their order
///////////////////////////////////////////////////////////////////////////////

namespace flash_head {

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
  const float highest = Finite<T>::highest();
  return T(isnan(value) ? value : clamp(value, -highest, highest));
}

// Unsigned keys in the order of the scores: -0 equals 0, and NaN is above every number, as it is
// for MLX's sort and argmax. No score has the key 0.
inline uint order_key(float score) {
  if (isnan(score)) {
    return 0xffffffffu;
  }
  const uint bits = score == 0.0f ? 0u : as_type<uint>(score);
  return bits ^ ((bits >> 31) ? 0xffffffffu : 0x80000000u);
}

inline float score_of(uint key) {
  return as_type<float>(key ^ ((key >> 31) ? 0x80000000u : 0xffffffffu));
}

// Largest key of the threadgroup, on every thread. `shared` holds one key per simdgroup.
template <int SIMDGROUPS>
inline uint threadgroup_max(uint key, threadgroup uint* shared, uint simdgroup, uint lane) {
  key = simd_max(key);
  if (lane == 0) {
    shared[simdgroup] = key;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  return simd_max(shared[min(lane, uint(SIMDGROUPS - 1))]);
}

}  // namespace flash_head

///////////////////////////////////////////////////////////////////////////////
// affine: MLX's affine form, 4 or 8 bits: value = scale * q + bias
//
// A row is cut into chunks of VALUES values, and lane l of a simdgroup takes the chunks l, l + 32,
// ...: one read of the simdgroup covers consecutive bytes. A chunk lies within one quantization
// group. Each format can
//   load      read a chunk of one row,
//   prepare   bring the hidden values that meet it into registers, and return their sum,
//   add       multiply the two, and add that to a lane's total,
//   reduce    add up the lanes' totals.
// Chunks, order and association of all sums are those of MLX's kernel, qmv_fast with 2 words to a
// chunk, qmv with 1 (of MLX 0.32.4; up to 0.32.2 it added four hidden values in their own dtype, not
// in float32). As there, a q is masked in place within its 16 bits. Instead of a shift, `prepare`
// divides its hidden value by 2^shift, exactly.
///////////////////////////////////////////////////////////////////////////////

namespace flash_head {

template <int D, int BITS, int GROUP, int WORDS, typename Words, typename Scales>
struct AffineRows {
  static constant constexpr const int VALUES = WORDS * 32 / BITS;
  static constant constexpr const int CHUNKS = D / VALUES;
  static constant constexpr const int PER_HALF = 16 / BITS;
  static constant constexpr const uint MASK = (1u << BITS) - 1u;

  struct Chunk {
    uint words[WORDS];
    float scale;
    float bias;
  };

  Words weight;   // (rows, D*BITS/32) uint
  Scales scales;  // (rows, D/GROUP)
  Scales biases;

  Chunk load(size_t row, uint chunk) const {
    const size_t word = row * (D * BITS / 32) + WORDS * chunk;
    const size_t group = row * (D / GROUP) + chunk * VALUES / GROUP;
    Chunk loaded;
    FLASH_HEAD_UNROLL
    for (int i = 0; i < WORDS; i++) {
      loaded.words[i] = weight[word + i];
    }
    loaded.scale = float(scales[group]);
    loaded.bias = float(biases[group]);
    return loaded;
  }

  template <typename Hidden>
  static float prepare(Hidden hidden, int, thread float* x) {
    float sum = 0.0f;
    FLASH_HEAD_UNROLL
    for (int i = 0; i < VALUES; i++) {
      x[i] = float(hidden[i]) * (1.0f / float(1u << (BITS * (i % PER_HALF))));
      if (BITS == 8) {
        sum += float(hidden[i]);
      } else if (i % 4 == 3) {
        sum += float(hidden[i - 3]) + float(hidden[i - 2]) + float(hidden[i - 1]) +
            float(hidden[i]);
      }
    }
    return sum;
  }

  static float product(Chunk chunk, const thread float* x, int i) {
    const uint half_word = chunk.words[i / (32 / BITS)] >> (16 * (i / PER_HALF % 2));
    return x[i] * float(half_word & (MASK << (BITS * (i % PER_HALF))));
  }

  static float add(Chunk chunk, const thread float* x, float sum, float total) {
    float accum = 0.0f;
    FLASH_HEAD_UNROLL
    for (int i = 0; i < VALUES; i += 4) {
      if (BITS == 8) {
        accum += product(chunk, x, i);
        accum += product(chunk, x, i + 1);
        accum += product(chunk, x, i + 2);
        accum += product(chunk, x, i + 3);
      } else {
        accum += product(chunk, x, i) + product(chunk, x, i + 1) + product(chunk, x, i + 2) +
            product(chunk, x, i + 3);
      }
    }
    return total + (chunk.scale * accum + sum * chunk.bias);
  }

  static float reduce(float total) { return simd_sum(total); }
};

template <int D, int BITS, int GROUP, int WORDS, typename Words, typename Scales>
inline AffineRows<D, BITS, GROUP, WORDS, Words, Scales> affine_rows(
    Words weight, Scales scales, Scales biases) {
  return AffineRows<D, BITS, GROUP, WORDS, Words, Scales>{weight, scales, biases};
}

}  // namespace flash_head

///////////////////////////////////////////////////////////////////////////////
// mxfp4: MLX's mxfp4, e2m1 values and a power of two (e8m0) for each 32 of them; as MLX's fp_qmv
///////////////////////////////////////////////////////////////////////////////

namespace flash_head {

template <int D, int WORDS, typename Words, typename Scales>
struct Mxfp4Rows {
  static constant constexpr const int VALUES = 8 * WORDS;
  static constant constexpr const int CHUNKS = D / VALUES;

  struct Chunk {
    uint words[WORDS];
    float scale;
  };

  Words weight;   // (rows, D/8) uint
  Scales scales;  // (rows, D/32) uchar

  Chunk load(size_t row, uint chunk) const {
    const size_t word = row * (D / 8) + WORDS * chunk;
    const uint exponent = uint(scales[row * (D / 32) + chunk * VALUES / 32]);
    Chunk loaded;
    FLASH_HEAD_UNROLL
    for (int i = 0; i < WORDS; i++) {
      loaded.words[i] = weight[word + i];
    }
    loaded.scale = as_type<float>(exponent == 0 ? 0x400000u : exponent << 23);
    return loaded;
  }

  template <typename Hidden>
  static float prepare(Hidden hidden, int, thread float* x) {
    FLASH_HEAD_UNROLL
    for (int i = 0; i < VALUES; i++) {
      x[i] = float(hidden[i]);
    }
    return 0.0f;
  }

  // The three low bits are the top of a half's magnitude without a factor of 2^14. A half, because
  // 0.5 needs its subnormal numbers, which are not flushed.
  static float product(Chunk chunk, const thread float* x, int i) {
    const uint q = chunk.words[i / 8] >> (4 * (i % 8));
    const float magnitude = float(as_type<half>(ushort((q & 7u) << 9))) * 16384.0f;
    return x[i] * ((q & 8u) ? -magnitude : magnitude);
  }

  static float add(Chunk chunk, const thread float* x, float, float total) {
    float accum = 0.0f;
    FLASH_HEAD_UNROLL
    for (int i = 0; i < VALUES; i += 4) {
      accum += product(chunk, x, i) + product(chunk, x, i + 1) + product(chunk, x, i + 2) +
          product(chunk, x, i + 3);
    }
    return total + chunk.scale * accum;
  }

  static float reduce(float total) { return simd_sum(total); }
};

template <int D, int WORDS, typename Words, typename Scales>
inline Mxfp4Rows<D, WORDS, Words, Scales> mxfp4_rows(Words weight, Scales scales) {
  return Mxfp4Rows<D, WORDS, Words, Scales>{weight, scales};
}

}  // namespace flash_head

///////////////////////////////////////////////////////////////////////////////
// dense: floats, 4 values to a chunk; the order of sums is that of MLX's gemv
///////////////////////////////////////////////////////////////////////////////

namespace flash_head {

template <int D, typename Values>
struct DenseRows {
  static constant constexpr const int VALUES = 4;
  static constant constexpr const int CHUNKS = (D + VALUES - 1) / VALUES;

  struct Chunk {
    float values[4];
  };

  Values weight;  // (rows, D)

  Chunk load(size_t row, uint chunk) const {
    const size_t first = row * D + chunk * VALUES;
    Chunk loaded;
    FLASH_HEAD_UNROLL
    for (int i = 0; i < VALUES; i++) {
      const bool within = D % VALUES == 0 || chunk * VALUES + i < D;
      loaded.values[i] = within ? float(weight[first + i]) : 0.0f;
    }
    return loaded;
  }

  template <typename Hidden>
  static float prepare(Hidden hidden, int left, thread float* x) {
    FLASH_HEAD_UNROLL
    for (int i = 0; i < VALUES; i++) {
      x[i] = D % VALUES == 0 || i < left ? float(hidden[i]) : 0.0f;
    }
    return 0.0f;
  }

  static float add(Chunk chunk, const thread float* x, float, float total) {
    FLASH_HEAD_UNROLL
    for (int i = 0; i < VALUES; i++) {
      total += chunk.values[i] * x[i];
    }
    return total;
  }

  // gemv's ladder of shuffles, with the result on every lane
  static float reduce(float total) {
    FLASH_HEAD_UNROLL
    for (ushort distance = LANES / 2; distance >= 1; distance /= 2) {
      total += simd_shuffle_xor(total, distance);
    }
    return total;
  }
};

template <int D, typename Values>
inline DenseRows<D, Values> dense_rows(Values weight) {
  return DenseRows<D, Values>{weight};
}

}  // namespace flash_head

///////////////////////////////////////////////////////////////////////////////
// dot: products of N consecutive rows with H hidden rows, by one simdgroup
//
// totals[h*N + row] on every lane. A chunk of each row is read once for all H. Rows past the last
// one repeat it, which saves a check in the loop; the caller drops them. All lanes skip positions
// past the last one. One reduction per total at the end.
///////////////////////////////////////////////////////////////////////////////

namespace flash_head {

template <int D, int H, int N, typename Rows, typename Hidden>
inline void dot_rows(
    Rows rows,
    size_t first_row,
    int last_row,
    Hidden hidden,
    uint first_hidden,
    int n_hidden,
    uint lane,
    thread float* totals) {
  FLASH_HEAD_UNROLL
  for (int i = 0; i < H * N; i++) {
    totals[i] = 0.0f;
  }
  for (uint chunk = lane; chunk < uint(Rows::CHUNKS); chunk += LANES) {
    typename Rows::Chunk loaded[N];
    FLASH_HEAD_UNROLL
    for (int row = 0; row < N; row++) {
      loaded[row] = rows.load(first_row + min(row, last_row), chunk);
    }
    FLASH_HEAD_UNROLL
    for (int h = 0; h < H; h++) {
      if (h < n_hidden) {
        float x[Rows::VALUES];
        const size_t start = size_t(first_hidden + h) * D + chunk * Rows::VALUES;
        const float sum = Rows::prepare(hidden + start, D - int(chunk) * Rows::VALUES, x);
        FLASH_HEAD_UNROLL
        for (int row = 0; row < N; row++) {
          totals[h * N + row] = Rows::add(loaded[row], x, sum, totals[h * N + row]);
        }
      }
    }
  }
  FLASH_HEAD_UNROLL
  for (int i = 0; i < H * N; i++) {
    if (i < n_hidden * N) {
      totals[i] = Rows::reduce(totals[i]);
    }
  }
}

}  // namespace flash_head

///////////////////////////////////////////////////////////////////////////////
// route: scores of all clusters, scores[r, c] = hidden[r] . centroid[c] + route_bias[c]
//
// MLX's qmv, but the sum stays float32 and the bias is added, which saves two or three kernels. A
// simdgroup computes 4 centroids for H positions, a threadgroup 8 centroids. There is neither
// threadgroup memory nor a barrier. Every centroid byte is read once for each H positions; the lanes
// that share a scale read it from cache.
// Edges: C not divisible by 8 repeats the last row and drops the result.
///////////////////////////////////////////////////////////////////////////////

namespace flash_head {

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
  const int shared = min(H, int(n_hidden - position));
  float totals[H * ROWS];
  dot_rows<D, H, ROWS>(centroids, cluster, last_row, hidden, position, shared, lane, totals);
  FLASH_HEAD_UNROLL
  for (int h = 0; h < H; h++) {
    FLASH_HEAD_UNROLL
    for (int row = 0; row < ROWS; row++) {
      if (lane == 0 && h < shared && row <= last_row) {
        scores[size_t(position + h) * C + cluster + row] =
            to_finite<float>(totals[h * ROWS + row] + route_bias[cluster + row]);
      }
    }
  }
}

}  // namespace flash_head

///////////////////////////////////////////////////////////////////////////////
// select: the p best clusters of each position, without a sort
//
// One threadgroup per position. Each score becomes an unsigned key of the same order. Thread
// (simdgroup s, lane l) holds ids s*32*K + 32*i + l, K = ceil(C/512). Up to 16 keys stay in registers
// (C = 8,192). More are read again, 16 at a time, in each of the five rounds (C = 262,144: 1 MB a
// round). 512 threads instead of 1,024 leave enough registers.
// Three radix passes over 10, 11 and 11 bits from the top find the p-th largest key, the threshold:
// count digits of the keys that match so far, in 4, 2 and 2 copies of the histogram, since close
// scores share their top bits; sum the copies; a prefix sum from the highest digit finds the one in
// which the count reaches what remains. Keys above the threshold are probed, and of the keys equal to
// it the first `remaining` by id. Ballots over ids give every probed cluster its place. So probes
// ascend, ties go to the lowest id, and the order of the atomics does not matter.
// Edges: an id past C has key 0, below that of any score, and is never reached since p <= C.
// Threadgroup memory: 16,384 + 136 bytes. Barriers: 1, 3 per pass, and 1.
///////////////////////////////////////////////////////////////////////////////

namespace flash_head {

// The keys of ids first_id, first_id + 32, ...
template <int C, int N, typename Scores>
inline void load_keys(Scores scores, uint first_id, thread uint* keys) {
  FLASH_HEAD_UNROLL
  for (int i = 0; i < N; i++) {
    const uint id = first_id + i * LANES;
    keys[i] = id < uint(C) ? order_key(scores[id]) : 0u;
  }
}

// One radix pass: the digit of the threshold at SHIFT, and the number of keys needed with it.
template <int C, int BLOCKS, int N, int SHIFT, int BITS, typename Scores>
inline void find_digit(
    Scores scores,
    uint first_id,
    thread uint* keys,
    thread uint& threshold,
    thread uint& remaining,
    threadgroup atomic<uint>* histogram,
    threadgroup uint* totals,
    threadgroup uint* chosen,
    uint thread_id,
    uint simdgroup,
    uint lane) {
  constexpr int DIGITS = 1 << BITS;
  constexpr int COPIES = HISTOGRAM / DIGITS;
  constexpr int OWN = DIGITS / SELECT_THREADS;  // digits that a thread adds up
  constexpr uint DECIDED = SHIFT + BITS < 32 ? 0xffffffffu << ((SHIFT + BITS) % 32) : 0u;
  for (int block = 0; block < BLOCKS; block++) {
    if (BLOCKS > 1) {
      load_keys<C, N>(scores, first_id + block * (N * LANES), keys);
    }
    FLASH_HEAD_UNROLL
    for (int i = 0; i < N; i++) {
      if (((keys[i] ^ threshold) & DECIDED) == 0) {
        const uint bin = ((keys[i] >> SHIFT) & (DIGITS - 1)) * COPIES + lane % COPIES;
        atomic_fetch_add_explicit(&histogram[bin], 1u, memory_order_relaxed);
      }
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  uint counts[OWN];
  uint own = 0;
  const uint highest = DIGITS - 1 - thread_id * OWN;
  FLASH_HEAD_UNROLL
  for (int digit = 0; digit < OWN; digit++) {
    counts[digit] = 0;
    FLASH_HEAD_UNROLL
    for (int copy = 0; copy < COPIES; copy++) {
      const uint bin = (highest - digit) * COPIES + copy;
      counts[digit] += atomic_load_explicit(&histogram[bin], memory_order_relaxed);
      atomic_store_explicit(&histogram[bin], 0u, memory_order_relaxed);  // for the next pass
    }
    own += counts[digit];
  }
  uint before = simd_prefix_exclusive_sum(own);  // keys with a higher digit
  if (lane == LANES - 1) {
    totals[simdgroup] = before + own;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  before += simd_sum(lane < simdgroup ? totals[lane] : 0u);
  FLASH_HEAD_UNROLL
  for (int digit = 0; digit < OWN; digit++) {
    if (before < remaining && before + counts[digit] >= remaining) {  // true once
      chosen[0] = highest - digit;
      chosen[1] = remaining - before;
    }
    before += counts[digit];
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  threshold |= chosen[0] << SHIFT;
  remaining = chosen[1];
}

// The lanes of the simdgroup for which it is true, a bit each.
inline uint ballot(bool yes) {
  return uint(simd_vote::vote_t(simd_ballot(yes)));
}

template <int C, typename Scores, typename Offsets>
inline void select_probes(
    Scores scores,                        // (R, C) float
    Offsets tail_offset,                  // (C,) float
    uint n_probes,                        // p
    device uint* probes,                  // (R, S)
    device uint* words,                   // (R, C)
    threadgroup atomic<uint>* histogram,  // [HISTOGRAM]
    threadgroup uint* totals,             // [2 * SELECT_SIMDGROUPS]
    threadgroup uint* chosen,             // [2]
    uint position,
    uint thread_id,
    uint simdgroup,
    uint lane) {
  constexpr int K = (C + SELECT_THREADS - 1) / SELECT_THREADS;
  constexpr int BLOCKS = (K + SELECT_KEYS - 1) / SELECT_KEYS;
  constexpr int N = BLOCKS > 1 ? SELECT_KEYS : K;
  const uint first_id = simdgroup * (LANES * N * BLOCKS) + lane;
  const size_t row = size_t(position) * C;
  uint keys[N];
  load_keys<C, N>(scores + row, first_id, keys);

  for (uint i = thread_id; i < uint(HISTOGRAM); i += SELECT_THREADS) {
    atomic_store_explicit(&histogram[i], 0u, memory_order_relaxed);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  uint threshold = 0;
  uint remaining = n_probes;
  find_digit<C, BLOCKS, N, 22, 10>(
      scores + row, first_id, keys, threshold, remaining, histogram, totals, chosen, thread_id,
      simdgroup, lane);
  find_digit<C, BLOCKS, N, 11, 11>(
      scores + row, first_id, keys, threshold, remaining, histogram, totals, chosen, thread_id,
      simdgroup, lane);
  find_digit<C, BLOCKS, N, 0, 11>(
      scores + row, first_id, keys, threshold, remaining, histogram, totals, chosen, thread_id,
      simdgroup, lane);

  uint above = 0;
  uint equal = 0;
  for (int block = 0; block < BLOCKS; block++) {
    if (BLOCKS > 1) {
      load_keys<C, N>(scores + row, first_id + block * (N * LANES), keys);
    }
    FLASH_HEAD_UNROLL
    for (int i = 0; i < N; i++) {
      above += popcount(ballot(keys[i] > threshold));
      equal += popcount(ballot(keys[i] == threshold));
    }
  }
  if (lane == 0) {
    totals[simdgroup] = above;
    totals[SELECT_SIMDGROUPS + simdgroup] = equal;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  above = simd_sum(lane < simdgroup ? totals[lane] : 0u);
  equal = simd_sum(lane < simdgroup ? totals[SELECT_SIMDGROUPS + lane] : 0u);
  const uint held = max(n_probes, MIN_PROBES);
  const uint lower_lanes = (1u << lane) - 1u;
  for (int block = 0; block < BLOCKS; block++) {
    const uint block_id = first_id + block * (N * LANES);
    if (BLOCKS > 1) {
      load_keys<C, N>(scores + row, block_id, keys);
    }
    FLASH_HEAD_UNROLL
    for (int i = 0; i < N; i++) {
      const uint are_above = ballot(keys[i] > threshold);
      const uint are_equal = ballot(keys[i] == threshold);
      const uint equal_before = equal + popcount(are_equal & lower_lanes);
      const uint place = above + popcount(are_above & lower_lanes) + min(equal_before, remaining);
      const bool probed =
          keys[i] > threshold || (keys[i] == threshold && equal_before < remaining);
      const uint id = block_id + i * LANES;
      if (id < uint(C)) {
        const float estimate = to_finite<float>(score_of(keys[i]) + tail_offset[id]);
        const uint bits = isnan(estimate) ? NOT_A_NUMBER : as_type<uint>(estimate);
        words[row + id] = probed ? PROBED | place : bits;
      }
      if (probed) {
        probes[position * held + place] = id;
        if (place == n_probes - 1) {
          for (uint i = n_probes; i < held; i++) {
            probes[position * held + i] = id;
          }
        }
      }
      above += popcount(are_above);
      equal += popcount(are_equal);
    }
  }
}

}  // namespace flash_head

///////////////////////////////////////////////////////////////////////////////
// score: logits of the probed clusters' rows, and the best of each cluster
//
// One threadgroup per probe; a simdgroup takes 4 rows of its cluster, each as in route, and with more
// than 32 rows every 8th block of 4. A cluster is one block of rows, so the threadgroup reads
// consecutive memory: at n = 16, D = 2048 and 4 bits 16 KB, then 2 KB of scales and biases. Every
// weight byte is read once. The simdgroups' maxima meet in threadgroup memory: expand and token then
// reduce S values instead of S*n.
// Edges: n not divisible by 4 repeats the last row and drops the result. A padded slot gets the
// lowest finite value. Head bias: a pointer (slots,), added to the product rounded to Product, as
// MLX does; or NoBias.
///////////////////////////////////////////////////////////////////////////////

namespace flash_head {

struct NoBias {};

template <typename Product>
inline float with_bias(float total, NoBias, uint) {
  return total;
}

template <typename Product, typename Bias>
inline float with_bias(float total, Bias bias, uint slot) {
  return float(to_finite<Product>(total)) + float(bias[slot]);
}

template <
    int D,
    int N,
    int V,
    bool PADDED,
    typename Product,
    typename T,
    typename Rows,
    typename Hidden,
    typename Probes,
    typename Ids,
    typename Bias>
inline void score(
    Rows rows,                  // slots
    Hidden hidden,              // (R, D)
    Probes probes,              // (R, S) uint
    Ids token_ids,              // (slots,) uint
    Bias bias,
    device T* logits,           // (R, S, N)
    device float* best,         // (R, S)
    threadgroup uint* shared,   // [SCORE_SIMDGROUPS]
    uint held,                  // S
    uint3 group,
    uint simdgroup,
    uint lane) {
  constexpr int BLOCK = N < ROWS ? N : ROWS;
  constexpr int BLOCKS = (N + BLOCK - 1) / BLOCK;
  constexpr int SIMDGROUPS = BLOCKS < SCORE_SIMDGROUPS ? BLOCKS : SCORE_SIMDGROUPS;
  const size_t probe = size_t(group.y) * held + group.x;
  const uint cluster = probes[probe];
  uint highest = 0;
  for (int first = simdgroup * BLOCK; first < N; first += SIMDGROUPS * BLOCK) {
    const int last_row = min(BLOCK, N - first) - 1;
    const size_t slot = size_t(cluster) * N + first;
    float totals[BLOCK];
    dot_rows<D, 1, BLOCK>(rows, slot, last_row, hidden, group.y, 1, lane, totals);
    FLASH_HEAD_UNROLL
    for (int row = 0; row < BLOCK; row++) {
      if (row <= last_row) {
        float logit = with_bias<Product>(totals[row], bias, slot + row);
        if (PADDED && token_ids[slot + row] == uint(V)) {
          logit = -Finite<T>::highest();
        }
        const T stored = to_finite<T>(logit);
        highest = max(highest, order_key(float(stored)));
        if (lane == 0) {
          logits[probe * N + first + row] = stored;
        }
      }
    }
  }
  highest = threadgroup_max<SIMDGROUPS>(highest, shared, simdgroup, lane);
  if (simdgroup == 0 && lane == 0) {
    best[probe] = score_of(highest);
  }
}

}  // namespace flash_head

///////////////////////////////////////////////////////////////////////////////
// expand: full logits. A probed token keeps its own; every other gets its cluster's estimate
//   min(scores[c] + tail_offset[c], m - max(1, |m|/64)),  m the best candidate of the position.
//
// 256 threads, 4 tokens each, 256 apart: slot_of and the output are accessed in order. A token needs
// one gather of its cluster's word (4*C bytes in all), and another one if the word shows that the
// cluster was probed. Each threadgroup finds m by itself from the S bests (1 barrier), which costs
// less than another kernel.
///////////////////////////////////////////////////////////////////////////////

namespace flash_head {

template <
    int V,
    int C,
    int N,
    typename T,
    typename Words,
    typename Slots,
    typename Logits,
    typename Best>
inline void expand(
    Words words,                // (R, C) uint
    Slots slot_of,              // (V,) uint
    Logits logits,              // (R, S, N)
    Best best,                  // (R, S) float
    device T* expanded,         // (R, V)
    threadgroup uint* shared,   // [WIDE_SIMDGROUPS]
    uint held,                  // S
    uint3 group,
    uint thread_id,
    uint simdgroup,
    uint lane) {
  const size_t position = group.y;
  uint key = 0;
  for (uint i = thread_id; i < held; i += WIDE_THREADS) {
    key = max(key, order_key(best[position * held + i]));
  }
  const float highest = score_of(threadgroup_max<WIDE_SIMDGROUPS>(key, shared, simdgroup, lane));
  const float cap = highest - max(1.0f, fabs(highest) / 64.0f);  // NaN if that is
  const uint first = group.x * (WIDE_THREADS * EXPAND_TOKENS) + thread_id;
  FLASH_HEAD_UNROLL
  for (int i = 0; i < EXPAND_TOKENS; i++) {
    const uint token = first + i * WIDE_THREADS;
    if (token < uint(V)) {
      const uint slot = slot_of[token];
      const uint word = words[position * C + slot / N];
      if (word >= PROBED) {
        const size_t probe = position * held + (word & PLACE);
        expanded[position * V + token] = logits[probe * N + slot % N];
      } else {
        const float estimate = as_type<float>(word);
        const float tail = isnan(estimate) || estimate < cap ? estimate : cap;
        expanded[position * V + token] = to_finite<T>(tail);
      }
    }
  }
}

}  // namespace flash_head

///////////////////////////////////////////////////////////////////////////////
// token: the greedy token, the lowest id among the highest candidate logits, of NaN if there is any
//
// One threadgroup per position finds m from the S bests, then reads the clusters whose best is m. It
// reads little more than 4*S bytes; 2 barriers.
///////////////////////////////////////////////////////////////////////////////

namespace flash_head {

template <int N, typename Probes, typename Ids, typename Logits, typename Best>
inline void greedy_token(
    Probes probes,              // (R, S) uint
    Ids token_ids,              // (slots,) uint, V for a padded slot
    Logits logits,              // (R, S, N)
    Best best,                  // (R, S) float
    device uint* tokens,        // (R,)
    threadgroup uint* shared,   // [WIDE_SIMDGROUPS]
    threadgroup uint* lowest,   // [WIDE_SIMDGROUPS]
    uint held,                  // S
    uint position,
    uint thread_id,
    uint simdgroup,
    uint lane) {
  const size_t first = size_t(position) * held;
  uint highest = 0;
  for (uint i = thread_id; i < held; i += WIDE_THREADS) {
    highest = max(highest, order_key(best[first + i]));
  }
  highest = threadgroup_max<WIDE_SIMDGROUPS>(highest, shared, simdgroup, lane);
  uint token = 0xffffffffu;
  for (uint i = thread_id; i < held; i += WIDE_THREADS) {
    if (order_key(best[first + i]) == highest) {
      for (int slot = 0; slot < N; slot++) {
        if (order_key(float(logits[(first + i) * N + slot])) == highest) {
          token = min(token, uint(token_ids[size_t(probes[first + i]) * N + slot]));
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

}  // namespace flash_head

///////////////////////////////////////////////////////////////////////////////
// ids: the token ids of the probed clusters, in the order of their logits. One thread per slot.
///////////////////////////////////////////////////////////////////////////////

namespace flash_head {

template <int N, typename Probes, typename Ids>
inline void candidate_ids(
    Probes probes,     // (R, S) uint
    Ids token_ids,     // (slots,) uint, V for a padded slot
    device uint* ids,  // (R, S, N)
    uint held,         // S
    uint3 grid_position) {
  if (grid_position.x < held * N) {
    const size_t position = grid_position.y;
    const size_t cluster = probes[position * held + grid_position.x / N];
    ids[position * held * N + grid_position.x] = token_ids[cluster * N + grid_position.x % N];
  }
}

}  // namespace flash_head

///////////////////////////////////////////////////////////////////////////////
// wrappers: kernels for an application that compiles this file itself
//
// 4-bit rows and centroids of group 64, one position at a time (H = 1). Any other head is one more
// line at the end.
///////////////////////////////////////////////////////////////////////////////
#ifndef FLASH_HEAD_JIT

template <typename T, int D, int C, int WORDS>
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
  flash_head::route<D, C, 1>(
      flash_head::affine_rows<D, 4, 64, WORDS>(weight, scales, biases),
      hidden, route_bias, scores, n_hidden, group, simdgroup, lane);
}

template <int C>
[[kernel]] void flash_head_select(
    const device float* scores [[buffer(0)]],
    const device float* tail_offset [[buffer(1)]],
    constant uint& n_probes [[buffer(2)]],
    device uint* probes [[buffer(3)]],
    device uint* words [[buffer(4)]],
    uint3 group [[threadgroup_position_in_grid]],
    uint thread_id [[thread_index_in_threadgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  threadgroup atomic<uint> histogram[flash_head::HISTOGRAM];
  threadgroup uint totals[2 * flash_head::SELECT_SIMDGROUPS];
  threadgroup uint chosen[2];
  flash_head::select_probes<C>(
      scores, tail_offset, n_probes, probes, words, histogram, totals, chosen, group.y, thread_id,
      simdgroup, lane);
}

template <typename T, int D, int N, int V, bool PADDED, int WORDS>
[[kernel]] void flash_head_score(
    const device T* hidden [[buffer(0)]],
    const device uint* probes [[buffer(1)]],
    const device uint* token_ids [[buffer(2)]],
    const device uint* weight [[buffer(3)]],
    const device T* scales [[buffer(4)]],
    const device T* biases [[buffer(5)]],
    device T* logits [[buffer(6)]],
    device float* best [[buffer(7)]],
    uint3 groups [[threadgroups_per_grid]],
    uint3 group [[threadgroup_position_in_grid]],
    uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  threadgroup uint shared[flash_head::SCORE_SIMDGROUPS];
  flash_head::score<D, N, V, PADDED, T>(
      flash_head::affine_rows<D, 4, 64, WORDS>(weight, scales, biases),
      hidden, probes, token_ids, flash_head::NoBias{}, logits, best, shared,
      groups.x, group, simdgroup, lane);
}

template <typename T, int V, int C, int N>
[[kernel]] void flash_head_expand(
    const device uint* words [[buffer(0)]],
    const device uint* slot_of [[buffer(1)]],
    const device T* logits [[buffer(2)]],
    const device float* best [[buffer(3)]],
    device T* expanded [[buffer(4)]],
    constant uint& held [[buffer(5)]],
    uint3 group [[threadgroup_position_in_grid]],
    uint thread_id [[thread_index_in_threadgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  threadgroup uint shared[flash_head::WIDE_SIMDGROUPS];
  flash_head::expand<V, C, N>(
      words, slot_of, logits, best, expanded, shared, held, group, thread_id, simdgroup, lane);
}

template <typename T, int N>
[[kernel]] void flash_head_token(
    const device uint* probes [[buffer(0)]],
    const device uint* token_ids [[buffer(1)]],
    const device T* logits [[buffer(2)]],
    const device float* best [[buffer(3)]],
    device uint* tokens [[buffer(4)]],
    constant uint& held [[buffer(5)]],
    uint3 group [[threadgroup_position_in_grid]],
    uint thread_id [[thread_index_in_threadgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  threadgroup uint shared[flash_head::WIDE_SIMDGROUPS];
  threadgroup uint lowest[flash_head::WIDE_SIMDGROUPS];
  flash_head::greedy_token<N>(
      probes, token_ids, logits, best, tokens, shared, lowest, held, group.y, thread_id, simdgroup,
      lane);
}

template <int N>
[[kernel]] void flash_head_ids(
    const device uint* probes [[buffer(0)]],
    const device uint* token_ids [[buffer(1)]],
    device uint* ids [[buffer(2)]],
    constant uint& held [[buffer(3)]],
    uint3 grid_position [[thread_position_in_grid]]) {
  flash_head::candidate_ids<N>(probes, token_ids, ids, held, grid_position);
}

#define FLASH_HEAD_KERNEL(name, kernel_name, ...)    \
  template [[host_name(kernel_name "_" name)]] [[kernel]] \
  decltype(__VA_ARGS__) __VA_ARGS__;

// A head of clusters of 16 rows, none padded (V = 16*C). WORDS is 2 where 512 divides D, else 1.
#define FLASH_HEAD_KERNELS(name, T, V, D, WORDS)                                              \
  FLASH_HEAD_KERNEL(name, "flash_head_route", flash_head_route<T, D, V / 16, WORDS>)          \
  FLASH_HEAD_KERNEL(name, "flash_head_select", flash_head_select<V / 16>)                     \
  FLASH_HEAD_KERNEL(name, "flash_head_score", flash_head_score<T, D, 16, V, false, WORDS>)    \
  FLASH_HEAD_KERNEL(name, "flash_head_expand", flash_head_expand<T, V, V / 16, 16>)

FLASH_HEAD_KERNELS("llama_3_2_1b", bfloat16_t, 128256, 2048, 2)
FLASH_HEAD_KERNELS("qwen3_0_6b", bfloat16_t, 151936, 1024, 2)
FLASH_HEAD_KERNELS("gemma_3_270m", bfloat16_t, 262144, 640, 1)
FLASH_HEAD_KERNELS("smollm2_135m", bfloat16_t, 49152, 576, 1)
FLASH_HEAD_KERNEL("16", "flash_head_token", flash_head_token<bfloat16_t, 16>)
FLASH_HEAD_KERNEL("16", "flash_head_ids", flash_head_ids<16>)

#endif  // FLASH_HEAD_JIT
