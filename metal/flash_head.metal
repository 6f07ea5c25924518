// FlashHead's operations: from hidden states to full logits, or to a token, greedy or drawn.
//
//   hidden (R, D) -- route --> scores (R, C) -- select --> probes (R, S), unscored (R, 2)
//                 -- score --> logits (R, S, n), best (R, S) -- sample --> (R,)
//                                                            or -- expand --> (R, V)
//
// For expand, select writes words (R, C) too. To verify k proposals, join brings their states together,
// and screen and certain judge them by the logits (k, C, n) of one product.
//
// R positions (B*L), D hidden size, C clusters of n rows each, V tokens, p clusters probed per
// position, S = max(p, 8) of them held. Where select finds fewer than S worth reading, it repeats the last
// probe. This changes no maximum, and arrays of S values have 8 elements or more (MLX passes smaller
// ones in another address space, with another kernel). A slot is c*n + i, row i of cluster c; a padded slot has the token id V. A
// cluster's word is its place among the probes, or the estimate of its tokens' logits.
//
// The functions of each operation are in flash_head/, and this file has the kernels that call them, for
// an application that compiles them itself; they also show the order of the arguments.
// `mx.fast.metal_kernel` takes the same files as its header instead, those that a kernel needs one
// after the other, and its source is one call. So they include nothing. D, C, n and V are template
// arguments. R and p are not: another number of probes or positions compiles nothing.
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
// select   512 x R                        512               6         scores, with words tail_offset
// score    T*S x R, T = 32*ceil(n/4)      T, at most 256    1         S*n rows, hidden
// expand   256*ceil(V/1024) x R           256               1         slot_of, words, logits
// sample   512 x R                        512               2 to 18   best, logits and ids that can win
// screen   256*ceil(C/1024) x k           256               3         logits of all slots, probes
// certain  512 x k                        512               1 or 2    the scored logits once or twice
// join     2048 x k                       256               0         what it copies, from 8 sources
// adjust   256*ceil(S/256) x R            256               0         the scored logits, ids, words
// tolerance 256 x k                       256               1         hidden
// map      256*ceil(n/256)                256               0         values
// row_products 64*ceil(N/2A)              64                0         N rows, H states
//
// H is 1 or 4: the number of positions that share one reading of the centroids. Grids consist of
// whole threadgroups.
//
// row_products belongs to no head: it multiplies 2 to 8 states by the N rows of any layer, A = 2 or 4
// of them at once, each state as MLX multiplies it alone.

#include <metal_stdlib>
using namespace metal;
typedef bfloat bfloat16_t;

#include "flash_head/constants.h"
#include "flash_head/values.h"
#include "flash_head/logit_map.h"
#include "flash_head/affine.h"
#include "flash_head/fp.h"
#include "flash_head/dense.h"
#include "flash_head/dot.h"
#include "flash_head/route.h"
#include "flash_head/histogram.h"
#include "flash_head/select.h"
#include "flash_head/score.h"
#include "flash_head/expand.h"
#include "flash_head/noise.h"
#include "flash_head/sample.h"
#include "flash_head/tally.h"
#include "flash_head/screen.h"
#include "flash_head/certain.h"
#include "flash_head/join.h"
#include "flash_head/adjust.h"
#include "flash_head/tolerance.h"
#include "flash_head/rows.h"

// 4-bit rows and centroids of group 64, one position at a time (H = 1), whose model gives its head's
// logits as they are. Any other head is one more line at the end.

template <typename T>
using NoMap = flash_head::LogitMap<T, 0, 0, 0>;

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
      flash_head::affine_rows<D, 4, 64, WORDS, float>(weight, scales, biases),
      hidden, route_bias, scores, n_hidden, group, simdgroup, lane);
}

template <int C, int N>
[[kernel, max_total_threads_per_threadgroup(512)]] void flash_head_select(
    const device float* scores [[buffer(0)]],
    constant uint& n_probes [[buffer(1)]],
    constant float& depth [[buffer(2)]],
    device uint* probes [[buffer(3)]],
    device float* unscored [[buffer(4)]],
    uint3 group [[threadgroup_position_in_grid]],
    uint thread_id [[thread_index_in_threadgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  threadgroup atomic<uint> histogram[flash_head::SELECT_BINS];
  threadgroup uint shared[flash_head::SELECT_SHARED];
  threadgroup float sums[flash_head::ROW_SUMS];
  flash_head::select_probes<C, N, NoMap<float>>(
      scores, flash_head::NoWords{}, flash_head::NotForced{}, n_probes, depth, probes, unscored, histogram, shared, sums,
      group.y, thread_id, simdgroup, lane);
}

template <int C, int N>
[[kernel, max_total_threads_per_threadgroup(512)]] void flash_head_select_words(
    const device float* scores [[buffer(0)]],
    const device float* tail_offset [[buffer(1)]],
    constant uint& n_probes [[buffer(2)]],
    constant float& depth [[buffer(3)]],
    device uint* probes [[buffer(4)]],
    device float* unscored [[buffer(5)]],
    device uint* words [[buffer(6)]],
    uint3 group [[threadgroup_position_in_grid]],
    uint thread_id [[thread_index_in_threadgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  threadgroup atomic<uint> histogram[flash_head::SELECT_BINS];
  threadgroup uint shared[flash_head::SELECT_SHARED];
  threadgroup float sums[flash_head::ROW_SUMS];
  flash_head::select_probes<C, N, NoMap<float>>(
      scores, flash_head::cluster_words(words, tail_offset), flash_head::NotForced{}, n_probes,
      depth, probes, unscored, histogram, shared, sums, group.y, thread_id, simdgroup, lane);
}

// select for texts with biases and penalties, whose tokens' clusters are probed in any case.
template <int C, int N, int V>
[[kernel, max_total_threads_per_threadgroup(512)]] void flash_head_select_forced(
    const device float* scores [[buffer(0)]],
    const device uint* adjustment [[buffer(1)]],
    const device uint* latest [[buffer(2)]],
    const device uint* slot_of [[buffer(3)]],
    constant uint& n_probes [[buffer(4)]],
    constant float& depth [[buffer(5)]],
    device uint* probes [[buffer(6)]],
    device float* unscored [[buffer(7)]],
    constant uint& n_words [[buffer(8)]],
    uint3 group [[threadgroup_position_in_grid]],
    uint thread_id [[thread_index_in_threadgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  threadgroup atomic<uint> marks[(C + 31) / 32];
  threadgroup atomic<uint> histogram[flash_head::SELECT_BINS];
  threadgroup uint shared[flash_head::SELECT_SHARED];
  threadgroup float sums[flash_head::ROW_SUMS];
  flash_head::select_probes<C, N, NoMap<float>>(
      scores, flash_head::NoWords{},
      flash_head::mark_clusters<C, N>(
          adjustment, latest, slot_of, marks, n_words, V, group.y, thread_id),
      n_probes, depth, probes, unscored, histogram, shared, sums, group.y, thread_id, simdgroup,
      lane);
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
  flash_head::score<D, N, V, PADDED, T, T, NoMap<T>>(
      flash_head::affine_rows<D, 4, 64, WORDS, float>(weight, scales, biases),
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

template <typename T, int N, int V>
[[kernel, max_total_threads_per_threadgroup(512)]] void flash_head_sample(
    const device uint* probes [[buffer(0)]],
    const device uint* token_ids [[buffer(1)]],
    const device T* logits [[buffer(2)]],
    const device float* best [[buffer(3)]],
    const device float* unscored [[buffer(4)]],
    const device float* settings [[buffer(5)]],
    const device uint* top_k [[buffer(6)]],
    const device uint* keys [[buffer(7)]],
    constant float* fit [[buffer(8)]],
    device uint* tokens [[buffer(9)]],
    device float* risk [[buffer(10)]],
    constant uint& held [[buffer(11)]],
    uint3 group [[threadgroup_position_in_grid]],
    uint thread_id [[thread_index_in_threadgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  threadgroup atomic<uint> histogram[2 * flash_head::SAMPLE_BINS];
  threadgroup uint shared[flash_head::SAMPLE_SHARED];
  threadgroup float sums[flash_head::ROW_SUMS];
  flash_head::sample<N, V, NoMap<T>, T>(
      probes, token_ids, logits, best, unscored, settings, top_k, keys, fit, tokens, risk, histogram,
      shared, sums, held, group.y, thread_id, simdgroup, lane);
}

// The scored logits after biases and penalties, and a mask.
template <typename T, int N, int V>
[[kernel]] void flash_head_adjust(
    const device uint* probes [[buffer(0)]],
    const device uint* token_ids [[buffer(1)]],
    const device T* logits [[buffer(2)]],
    const device uint* adjustment [[buffer(3)]],
    const device uint* latest [[buffer(4)]],
    const device uint* allowed [[buffer(5)]],
    device T* changed [[buffer(6)]],
    device float* best [[buffer(7)]],
    constant uint& held [[buffer(8)]],
    constant uint& n_words [[buffer(9)]],
    constant uint& n_mask_words [[buffer(10)]],
    uint3 group [[threadgroup_position_in_grid]],
    uint3 thread_position [[thread_position_in_grid]]) {
  flash_head::adjust<N, V, T>(
      probes, token_ids, logits, adjustment, latest, allowed, changed, best, held, n_words,
      n_mask_words, group.y, thread_position.x);
}

// What a model makes of each logit: here a softcap of 30.
template <typename T>
[[kernel]] void flash_head_map(
    const device T* values [[buffer(0)]],
    device T* mapped [[buffer(1)]],
    constant uint& n [[buffer(2)]],
    uint3 thread_position [[thread_position_in_grid]]) {
  flash_head::map_values<flash_head::LogitMap<T, 0, 0, 0x41f00000>>(
      values, mapped, n, thread_position.x);
}

// A layer of D columns, without a bias: another one is read where BIASED is true.
template <typename T, int D, int H, int WORDS>
[[kernel]] void flash_head_row_products(
    const device T* hidden [[buffer(0)]],
    const device uint* weight [[buffer(1)]],
    const device T* scales [[buffer(2)]],
    const device T* biases [[buffer(3)]],
    const device T* bias [[buffer(4)]],
    device T* products [[buffer(5)]],
    constant uint& n_rows [[buffer(6)]],
    uint3 group [[threadgroup_position_in_grid]],
    uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  flash_head::row_products<D, H, 4, false, T>(
      flash_head::half_rows(flash_head::affine_rows<D, 4, 64, WORDS, float>(weight, scales, biases)),
      hidden, bias, products, n_rows, group, simdgroup, lane);
}

// The verification of k proposals, by the logits of all slots: their states side by side, how far
// their logits may be off, and two kernels that judge them.

#define FLASH_HEAD_SOURCE(i, a, b, c)             \
  const device T* hidden_##i [[buffer(a)]],       \
  const device uint* probes_##i [[buffer(b)]],    \
  const device T* logits_##i [[buffer(c)]],

#define FLASH_HEAD_COPY(i)                                                               \
  case i:                                                                                \
    flash_head::copy_row(hidden_##i, from, hidden, row, D, first, step);                 \
    flash_head::copy_row(probes_##i, from, probes, row, held, first, step);              \
    flash_head::copy_row(logits_##i, from, logits, row, held * N, first, step);          \
    break;

template <typename T, int D, int N>
[[kernel]] void flash_head_join(
    FLASH_HEAD_SOURCE(0, 0, 1, 2) FLASH_HEAD_SOURCE(1, 3, 4, 5)
    FLASH_HEAD_SOURCE(2, 6, 7, 8) FLASH_HEAD_SOURCE(3, 9, 10, 11)
    FLASH_HEAD_SOURCE(4, 12, 13, 14) FLASH_HEAD_SOURCE(5, 15, 16, 17)
    FLASH_HEAD_SOURCE(6, 18, 19, 20) FLASH_HEAD_SOURCE(7, 21, 22, 23)
    const device uint* rows [[buffer(24)]],
    device T* hidden [[buffer(25)]],
    device uint* probes [[buffer(26)]],
    device T* logits [[buffer(27)]],
    constant uint& held [[buffer(28)]],
    uint3 group [[threadgroup_position_in_grid]],
    uint3 thread_position [[thread_position_in_grid]],
    uint3 threads [[threads_per_grid]]) {
  const uint row = group.y;
  const uint from = rows[2 * row + 1];
  const uint first = thread_position.x;
  const uint step = threads.x;
  switch (rows[2 * row]) {
    FLASH_HEAD_COPY(0) FLASH_HEAD_COPY(1) FLASH_HEAD_COPY(2) FLASH_HEAD_COPY(3)
    FLASH_HEAD_COPY(4) FLASH_HEAD_COPY(5) FLASH_HEAD_COPY(6) FLASH_HEAD_COPY(7)
  }
}

template <typename T, int D>
[[kernel]] void flash_head_tolerance(
    const device T* hidden [[buffer(0)]],
    constant float* shares [[buffer(1)]],
    device float* product [[buffer(2)]],
    device float* scored [[buffer(3)]],
    uint3 group [[threadgroup_position_in_grid]],
    uint thread_id [[thread_index_in_threadgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  threadgroup float shared[flash_head::WIDE_SIMDGROUPS];
  flash_head::tolerance<D>(
      hidden, shares, product, scored, shared, group.y, thread_id, simdgroup, lane);
}

template <typename T, int V, int C, int N, bool MASKED>
[[kernel]] void flash_head_screen(
    const device T* slots [[buffer(0)]],
    const device uint* probes [[buffer(1)]],
    const device uint* token_ids [[buffer(2)]],
    const device uint* slot_of [[buffer(3)]],
    const device T* logits [[buffer(4)]],
    const device uint* tokens [[buffer(5)]],
    const device float* settings [[buffer(6)]],
    const device uint* keys [[buffer(7)]],
    const device float* product_tolerance [[buffer(8)]],
    const device float* scored_tolerance [[buffer(9)]],
    constant float& relative [[buffer(10)]],
    const device uint* allowed [[buffer(11)]],
    device float* parts [[buffer(12)]],
    constant uint& held [[buffer(13)]],
    uint3 groups [[threadgroups_per_grid]],
    uint3 group [[threadgroup_position_in_grid]],
    uint thread_id [[thread_index_in_threadgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  threadgroup atomic<uint> marks[flash_head::SCREEN_CLUSTERS / 32];
  threadgroup uint place[1];
  threadgroup float shared[flash_head::TALLY * flash_head::WIDE_SIMDGROUPS];
  flash_head::screen<C, N, V, false, MASKED, NoMap<T>>(
      slots, probes, token_ids, slot_of, logits, tokens, settings, keys, product_tolerance,
      scored_tolerance, relative, allowed, parts, marks, place, shared, held, groups.x, group,
      thread_id, simdgroup, lane);
}

template <typename T, int V, int N>
[[kernel, max_total_threads_per_threadgroup(512)]] void flash_head_certain(
    const device float* parts [[buffer(0)]],
    const device uint* probes [[buffer(1)]],
    const device uint* token_ids [[buffer(2)]],
    const device T* logits [[buffer(3)]],
    const device uint* tokens [[buffer(4)]],
    const device float* settings [[buffer(5)]],
    const device uint* top_k [[buffer(6)]],
    const device uint* keys [[buffer(7)]],
    const device float* product_tolerance [[buffer(8)]],
    const device float* scored_tolerance [[buffer(9)]],
    constant float& relative [[buffer(10)]],
    constant float& epsilon [[buffer(11)]],
    device bool* sure [[buffer(12)]],
    device float* known [[buffer(13)]],
    constant uint& held [[buffer(14)]],
    constant uint& n_parts [[buffer(15)]],
    uint3 group [[threadgroup_position_in_grid]],
    uint thread_id [[thread_index_in_threadgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  threadgroup float shared[(flash_head::TALLY + 2) * flash_head::ROW_SIMDGROUPS];
  flash_head::certain<N, V, NoMap<T>, T>(
      parts, probes, token_ids, logits, tokens, settings, top_k, keys, product_tolerance,
      scored_tolerance, relative, epsilon, sure, known, shared, held, n_parts, group.y, thread_id,
      simdgroup, lane);
}

#define FLASH_HEAD_KERNEL(name, kernel_name, ...)    \
  template [[host_name(kernel_name "_" name)]] [[kernel]] \
  decltype(__VA_ARGS__) __VA_ARGS__;

// A head of clusters of 16 rows, none padded (V = 16*C). WORDS is 2 where 512 divides D, else 1.
#define FLASH_HEAD_KERNELS(name, T, V, D, WORDS)                                              \
  FLASH_HEAD_KERNEL(name, "flash_head_route", flash_head_route<T, D, V / 16, WORDS>)          \
  FLASH_HEAD_KERNEL(name, "flash_head_select", flash_head_select<V / 16, 16>)                   \
  FLASH_HEAD_KERNEL(name, "flash_head_select_words", flash_head_select_words<V / 16, 16>)       \
  FLASH_HEAD_KERNEL(name, "flash_head_score", flash_head_score<T, D, 16, V, false, WORDS>)    \
  FLASH_HEAD_KERNEL(name, "flash_head_sample", flash_head_sample<T, 16, V>)                   \
  FLASH_HEAD_KERNEL(name, "flash_head_select_forced", flash_head_select_forced<V / 16, 16, V>)  \
  FLASH_HEAD_KERNEL(name, "flash_head_adjust", flash_head_adjust<T, 16, V>)                   \
  FLASH_HEAD_KERNEL(name, "flash_head_join", flash_head_join<T, D, 16>)                       \
  FLASH_HEAD_KERNEL(name, "flash_head_tolerance", flash_head_tolerance<T, D>)                 \
  FLASH_HEAD_KERNEL(name, "flash_head_screen", flash_head_screen<T, V, V / 16, 16, false>)    \
  FLASH_HEAD_KERNEL(name, "flash_head_screen_masked", flash_head_screen<T, V, V / 16, 16, true>) \
  FLASH_HEAD_KERNEL(name, "flash_head_certain", flash_head_certain<T, V, 16>)                 \
  FLASH_HEAD_KERNEL(name, "flash_head_expand", flash_head_expand<T, V, V / 16, 16>)           \
  FLASH_HEAD_KERNEL(name, "flash_head_row_products", flash_head_row_products<T, D, 4, WORDS>) \
  FLASH_HEAD_KERNEL(name "_8", "flash_head_row_products", flash_head_row_products<T, D, 8, WORDS>)

FLASH_HEAD_KERNELS("llama_3_2_1b", bfloat16_t, 128256, 2048, 2)
FLASH_HEAD_KERNELS("qwen3_0_6b", bfloat16_t, 151936, 1024, 2)
FLASH_HEAD_KERNELS("gemma_3_270m", bfloat16_t, 262144, 640, 1)
FLASH_HEAD_KERNELS("smollm2_135m", bfloat16_t, 49152, 576, 1)

FLASH_HEAD_KERNEL("softcap_30", "flash_head_map", flash_head_map<bfloat16_t>)
