// What the kernels share: records in the workspace, where a thread works, and a reduction in a fixed order.
//
// Nothing is added up by atomics and no size depends on the device, so the same call gives the same bits. Barriers are
// reached by whole blocks: what a block returns early on is the same in all its threads.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>

#include "../kd_math.h"
#include "launch.h"

namespace kdcore::cuda {

constexpr int kThreads = 128;  // of every block, a power of two

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

// How logits are normalised: h = ((z - mean) - rest) * scale. The mean is in two parts, itself rounded and what
// rounding left: an offset common to a class or row costs no accuracy, and a constant one gives exactly 0.
template <class A>
struct Affine {
  A mean, rest, scale;

  __device__ A centred(A z) const { return (z - mean) - rest; }
  __device__ A operator()(A z) const { return centred(z) * scale; }
};

// The same for a mean of origin + shift, V at least as wide as A; the sum's rounding error is exact (Knuth's TwoSum).
template <class A, class V>
__device__ Affine<A> affine(V origin, V shift, V scale) {
  const V sum = origin + shift, part = sum - origin, error = (origin - (sum - part)) + (shift - part);
  const A mean = static_cast<A>(sum);
  return {mean, static_cast<A>((sum - mean) + error), static_cast<A>(scale)};
}

// Sums of deviations from a mean and of their squares. What the first is not 0 corrects the mean, which rounding moved.
template <class A>
struct Deviations {
  A sum, squares;

  __device__ void add(A d) {
    sum += d;
    squares += d * d;
  }
  __device__ A m2(A size) const {
    const A m2 = squares - sum * sum / size;
    return m2 < 0 ? A{0} : m2;
  }
  __device__ void merge(const Deviations& other) {
    sum += other.sum;
    squares += other.squares;
  }
};

// Rows that count, their mean in two parts and their squared deviations from it, of one class.
template <class A>
struct Moments {
  A count, mean, rest, m2;
};

// Largest elements of a row, each the shift of its exponentials: h without the label in DKD, and the raw logit.
template <class A>
struct Tops {
  A student, teacher, raw;

  __device__ void merge(const Tops& other) {
    student = larger(student, other.student);
    teacher = larger(teacher, other.teacher);
    raw = larger(raw, other.raw);
  }
  static __device__ A larger(A a, A b) { return b > a ? b : a; }
};

// Sums over a row: RowSums of kd_math.h, the same exponentials times the student's deviations from its mean, and
// cross-entropy's exponentials without the label and its logits.
template <class A>
struct Sums {
  A zs, zt, gap, tilt_s, tilt_t, ce_rest, ce_logits;

  __device__ void merge(const Sums& other) {
    zs += other.zs;
    zt += other.zt;
    gap += other.gap;
    tilt_s += other.tilt_s;
    tilt_t += other.tilt_t;
    ce_rest += other.ce_rest;
    ce_logits += other.ce_logits;
  }
};

template <class V>
struct Total {
  V value;

  __device__ void merge(const Total& other) { value += other.value; }
};

// What the pass over a row finds.
template <class A>
struct RowPass {
  Affine<A> student, teacher;  // not used by per_class, which has one of each class
  A deviation;                 // the student's, under instance
  Tops<A> tops;
  Sums<A> sums;
};

// What an element's gradient needs of its row; the row's weight is in it.
template <class A>
struct RowFactors {
  Affine<A> student, teacher;
  Tops<A> tops;
  A factor_s, factor_t, at_label;        // of RowTerms
  A spread;                              // instance: the way through the deviation
  A ce_factor, ce_uniform, ce_at_label;  // of CrossEntropy
  int64_t label;
  bool counts;
};

// Sums of the gradient over the rows of one class: of dL/dh, and of h dL/dh.
template <class A>
struct ColSums {
  A gradient, tilt;
};

// The workspace, and what is derived once from the problem.
template <class A>
struct Work {
  A inverse_temperature;
  int64_t chunk, chunks;            // rows in a chunk of the passes over columns, and how many chunks
  A* count;                         // rows that count
  Moments<A>* moments;              // [chunks, classes] of the side at hand
  Affine<A>*columns_s, *columns_t;  // [classes] each, under per_class; else null
  RowPass<A>* passes;               // [rows]
  RowFactors<A>* factors;           // [rows]
  A *row_losses, *row_parts;        // [rows], [4, rows]
  ColSums<A>* partial_sums;         // [chunks, classes]
  A* col_sums;                      // [2, classes]
};

template <class T>
__device__ Acc<T> load(const Logits& logits, int64_t row, int64_t column) {
  return Element<T>::widen(static_cast<const T*>(logits.data)[row * logits.stride + column]);
}

__device__ inline bool ignored(const Shape& shape, int64_t row) {
  return shape.index && shape.index[row] == shape.ignore_index;
}

// Blocks of a pass over columns: a thread has one class, a block some rows. Neighbours read neighbouring classes.
__host__ __device__ inline int64_t tiles(int64_t size) { return (size + kThreads - 1) / kThreads; }

struct Place {
  int64_t chunk, column;
};

__device__ inline Place place(int64_t classes) {
  const int64_t across = tiles(classes), block = blockIdx.x;
  return {block / across, block % across * kThreads + threadIdx.x};
}

__device__ inline int64_t thread_index() { return static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; }

// Merges the threads' values pairwise, in the same order in every run. All threads of the block get the result.
template <class S>
__device__ S block_reduce(const S& mine) {
  __shared__ S slots[kThreads];
  const int thread = threadIdx.x;
  slots[thread] = mine;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (thread < half) slots[thread].merge(slots[thread + half]);
  }
  __syncthreads();
  const S all = slots[0];
  __syncthreads();  // the next call may write again
  return all;
}

}  // namespace kdcore::cuda
