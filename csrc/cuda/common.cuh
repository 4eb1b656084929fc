// What the kernels share: element types, how a thread reads its classes, records in memory, and reductions in a fixed
// order.
//
// Nothing is added up by atomics and no size depends on the device, so the same call gives the same bits. Barriers are
// reached by whole blocks, shuffles by whole warps.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>

#include "../kd_math.h"
#include "launch.h"

namespace kdcore::cuda {

constexpr double kLog2e = 1.4426950408889634074, kLn2 = 0.69314718055994530942;

// A logit's accumulator, and the ways there and back; torch's build flags leave half types no conversions of their own.
template <class T>
struct Element;

template <>
struct Element<float> {
  using Acc = float;
  static __device__ float widen(float x) { return x; }
  static __device__ float narrow(float x) { return x; }
};
template <>
struct Element<double> {
  using Acc = double;
  static __device__ double widen(double x) { return x; }
  static __device__ double narrow(double x) { return x; }
};
template <>
struct Element<__half> {
  using Acc = float;
  static __device__ float widen(__half x) { return __half2float(x); }
  static __device__ __half narrow(float x) { return __float2half_rn(x); }
};
template <>
struct Element<__nv_bfloat16> {
  using Acc = float;
  static __device__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
  static __device__ __nv_bfloat16 narrow(float x) { return __float2bfloat16_rn(x); }
};

template <class T>
using Acc = typename Element<T>::Acc;

// Blocks that a processor is to hold at once, which limits registers: half as many in double precision.
template <class A>
constexpr int kBlocks = sizeof(A) == 8 ? 1 : 2;

// Powers of 2. float: 2 units in the last place, results below 2^-126 are 0.
__device__ inline double power2(double x) { return exp2(x); }
__device__ inline float power2(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}

// The finite number that no maximum is below.
template <class A>
__device__ constexpr A lowest() {
  return sizeof(A) == 8 ? static_cast<A>(-1.7e308) : static_cast<A>(-3.4e38);
}

template <class A>
__device__ A larger(A a, A b) {
  return b > a ? b : a;  // a NaN on the right is passed over: it is found in the sums
}

// -- a thread's classes: there are fewer than 2^31, but rows are further apart than that

// V of them from `first`, `step` apart where they are not neighbours.
template <int V, bool WIDE>
struct Columns {
  int first, step;

  __device__ int operator[](int k) const { return first + (WIDE ? k : k * step); }
};

template <int V, bool WIDE>
__device__ Columns<V, WIDE> columns_of(int begin, int lane, int lanes) {
  return {begin + (WIDE ? lane * V : lane), lanes};
}

template <class T, int V>
struct alignas(V * sizeof(T) < 16 ? V * sizeof(T) : 16) Word {
  T item[V];
};

// The classes as they lie in memory, to be widened when they are used: several reads go out before the first comes
// back. What is beyond the classes may be anything. A word that begins among them is aligned, so it lies in the same
// piece of memory.
template <class T, int V, bool WIDE>
__device__ Word<T, V> fetch(const T* row, const Columns<V, WIDE>& at, int classes) {
  Word<T, V> word{};
  if constexpr (WIDE) {
    if (at.first < classes) word = *reinterpret_cast<const Word<T, V>*>(row + at.first);
  } else {
#pragma unroll
    for (int k = 0; k < V; ++k) {
      if (at[k] < classes) word.item[k] = row[at[k]];
    }
  }
  return word;
}

template <class T, int V>
__device__ void widen(const Word<T, V>& word, Acc<T> (&out)[V]) {
#pragma unroll
  for (int k = 0; k < V; ++k) out[k] = Element<T>::widen(word.item[k]);
}

// 0 beyond the classes.
template <class T, int V, bool WIDE>
__device__ void load(const T* row, const Columns<V, WIDE>& at, int classes, Acc<T> (&out)[V]) {
  if (WIDE && at.first + V <= classes) {
    const Word<T, V> word = *reinterpret_cast<const Word<T, V>*>(row + at.first);
#pragma unroll
    for (int k = 0; k < V; ++k) out[k] = Element<T>::widen(word.item[k]);
    return;
  }
#pragma unroll
  for (int k = 0; k < V; ++k) out[k] = at[k] < classes ? Element<T>::widen(row[at[k]]) : Acc<T>{0};
}

template <class T, int V, bool WIDE>
__device__ void store(T* row, const Columns<V, WIDE>& at, int classes, const Acc<T> (&values)[V]) {
  if (WIDE && at.first + V <= classes) {
    Word<T, V> word;
#pragma unroll
    for (int k = 0; k < V; ++k) word.item[k] = Element<T>::narrow(values[k]);
    *reinterpret_cast<Word<T, V>*>(row + at.first) = word;
    return;
  }
#pragma unroll
  for (int k = 0; k < V; ++k) {
    if (at[k] < classes) row[at[k]] = Element<T>::narrow(values[k]);
  }
}

template <class T>
__device__ const T* row_of(const Logits& logits, int64_t row) {
  return static_cast<const T*>(logits.data) + row * logits.stride;
}

template <class T>
__device__ Acc<T> element(const Logits& logits, int64_t row, int64_t column) {
  return Element<T>::widen(row_of<T>(logits, row)[column]);
}

// Both sides of N rows, `step` apart, as far as `end`: read before the first is used, also where a row does not count.
template <class T, int V, bool WIDE, int N>
__device__ void fetch_rows(const Logits& student, const Logits& teacher, int64_t first, int64_t step, int64_t end,
                           const Columns<V, WIDE>& at, int classes, Word<T, V> (&s)[N], Word<T, V> (&t)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const int64_t row = first + i * step;
    if (row >= end) break;
    s[i] = fetch<T, V, WIDE>(row_of<T>(student, row), at, classes);
    t[i] = fetch<T, V, WIDE>(row_of<T>(teacher, row), at, classes);
  }
}

__device__ inline bool ignored(const Shape& shape, int64_t row) {
  return shape.index && shape.index[row] == shape.ignore_index;
}

// -- records

// Rows that count, their mean in two parts (rounding an offset common to a class costs no accuracy) and their squared
// deviations from it, of one class.
template <class A>
struct Moments {
  A count, mean, rest, m2;
};

// How logits become exponents of 2: (z - mean) * scale + offset, where offset is what rounding left of the mean,
// scaled. A class's own under per_class: arrays of [padded] in memory.
template <class A>
struct Coefficients {
  A *mean, *scale, *offset;
};

template <class A, int V>
struct Affine {
  A mean[V], scale[V], offset[V];

  template <bool WIDE>
  __device__ void load(const Coefficients<A>& of, const Columns<V, WIDE>& at, int padded) {
    cuda::load<A, V, WIDE>(of.mean, at, padded, mean);
    cuda::load<A, V, WIDE>(of.scale, at, padded, scale);
    cuda::load<A, V, WIDE>(of.offset, at, padded, offset);
  }
  __device__ A operator()(int k, A z) const { return (z - mean[k]) * scale[k] + offset[k]; }
};

// Of a row, under instance: statistics of both sides, and what its gradient needs beside RowFactors.
template <class A>
struct RowAffine {
  A scale_s, scale_t;             // of exponents of 2
  A mean, rest, gain, deviation;  // the student's: mean in two parts, 1 / (deviation + eps)
  A spread;                       // the way through the deviation
};

// Sums over a row, each side's exponentials shifted by its top. Tops are exponents of 2 under per_class, else logits.
template <class A>
struct RowSum {
  A top_s, top_t, zs, zt, gap;
  A tilt_s, tilt_t;         // instance: exponentials times (s - top_s)
  A top_raw, rest, logits;  // cross-entropy: the largest logit, exponentials without the label, logits less the first
};

// What an element's gradient needs of its row; weights are in it. label: -1 where there is none.
template <class A>
struct alignas(16) RowFactors {
  A student, teacher, at_label;
  A top_s, top_t;
  A entropy, top_raw, entropy_at_label, uniform;
  int label;
  bool counts;
};

static_assert(sizeof(RowFactors<float>) == 48 && sizeof(RowFactors<double>) == 80, "as in losses/_ops.py");
static_assert(sizeof(RowAffine<float>) == 28 && sizeof(RowAffine<double>) == 56, "as in losses/_ops.py");

constexpr int kTotals = 6;  // loss, kd, tckd, nckd, ce, rows that count

// The workspace and the record, and what is derived once from the problem.
template <class A>
struct Work {
  A exponent;  // log2(e) / T
  Coefficients<A> of_s, of_t;
  A* count;                // rows that count, and the exponent
  RowFactors<A>* factors;  // [rows]
  RowAffine<A>* affines;   // [rows], under instance
  A* sums;                 // [2, padded], of the gradient, h in exponents of 2
  Moments<A>* moments;     // [2, chunks, classes]
  RowSum<A>* row_sums;     // [rows, splits]
  A* partial;              // [chunks or row_chunks, 2, padded]
  double* totals;          // [blocks, kTotals]
  int64_t partials, total_blocks;
};

// -- reductions

constexpr unsigned kAll = 0xffffffffu;

template <class V>
__device__ V warp_sum(V value) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(kAll, value, offset);
  return value;
}

// Adds a block's totals in the order of its warps; thread 0 writes them.
__device__ inline void block_totals(const double (&mine)[kTotals], double* out) {
  __shared__ double slots[kRowLanes][kTotals];
  const int warp = threadIdx.x / kWarp, warps = (blockDim.x + kWarp - 1) / kWarp;
  for (int q = 0; q < kTotals; ++q) {
    const double sum = warp_sum(mine[q]);
    if (threadIdx.x % kWarp == 0) slots[warp][q] = sum;
  }
  __syncthreads();
  if (threadIdx.x >= kTotals) return;
  double all = 0;
  for (int k = 0; k < warps; ++k) all += slots[k][threadIdx.x];
  out[threadIdx.x] = all;
}

}  // namespace kdcore::cuda
