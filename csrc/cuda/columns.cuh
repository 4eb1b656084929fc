// Passes over columns: a thread keeps its classes and walks down some rows of its chunk, so that a warp reads
// neighbours; the rows of a block are merged in order at its end.
#pragma once
#include "common.cuh"

namespace kdcore::cuda {

// Where a block of a pass over columns works.
struct Place {
  int tile;
  int64_t chunk;
  int lane, row;  // of the thread
};

__device__ inline Place place_of(const Plan& plan, int64_t block) {
  const int lane = threadIdx.x % kWarp, row = threadIdx.x / kWarp;
  return {static_cast<int>(block % plan.tiles), block / plan.tiles, lane, row};
}

// From the first chunk to the last, or down.
__device__ inline Place place(const Plan& plan, bool down) {
  return place_of(plan, down ? plan.tiles * plan.chunks - 1 - blockIdx.x : blockIdx.x);
}

template <int V, bool WIDE>
__device__ Columns<V, WIDE> columns_at(const Place& at) {
  return columns_of<V, WIDE>(at.tile * kWarp * V, at.lane, kWarp);
}

// Where the thread's k-th class stands among those of its block.
template <int V, bool WIDE>
__device__ int slot_of(int lane, int k) {
  return WIDE ? lane * V + k : k * kWarp + lane;
}

// Chan's merge, in double precision. The mean is that of the first, the rest what all are away from it.
template <class A>
__device__ void merge(Moments<double>& all, const Moments<A>& next) {
  if (next.count == 0) return;
  if (all.count == 0) all.mean = next.mean;
  const double delta = ((next.mean - all.mean) + next.rest) - all.rest;
  const double share = next.count / (all.count + next.count);
  all.m2 += next.m2 + delta * delta * all.count * share;
  all.rest += delta * share;
  all.count += next.count;
}

// Moments of each class over a chunk, of the student in the first blocks and of the teacher in the others. A thread's
// sums are shifted by its first row: squares taken around anything far lose what they are away from it.
template <class T, int V, bool WIDE, class A = Acc<T>>
__global__ void __launch_bounds__(kThreads, 1)
    col_moments(Shape shape, Logits s, Logits t, int sides, Plan plan, Moments<A>* out) {
  constexpr int kAhead = 4;  // rows that are read before they are used
  __shared__ Moments<A> slots[kRowLanes][kWarp * V];
  const int64_t block = blockIdx.x / sides, side = blockIdx.x % sides;
  const Place at = place_of(plan, block);
  const int64_t begin = at.chunk * plan.chunk;
  const int64_t end = begin + plan.chunk < shape.rows ? begin + plan.chunk : shape.rows;
  const Logits z{side ? t.data : s.data, side ? t.stride : s.stride};
  const Columns<V, WIDE> columns = columns_at<V, WIDE>(at);
  const int classes = static_cast<int>(shape.classes);
  A count = 0, first[V] = {}, sum[V] = {}, square[V] = {};
  for (int64_t row = begin + at.row; row < end; row += kAhead * kRowLanes) {
    Word<T, V> next[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {  // read before it is used, also where the row does not count
      if (row + i * kRowLanes < end) {
        next[i] = fetch<T, V, WIDE>(row_of<T>(z, row + i * kRowLanes), columns, classes);
      }
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int64_t r = row + i * kRowLanes;
      if (r >= end || ignored(shape, r)) continue;
      A x[V];
      widen<T, V>(next[i], x);
      if (count == 0) {
#pragma unroll
        for (int k = 0; k < V; ++k) first[k] = x[k];
      }
      count += 1;
#pragma unroll
      for (int k = 0; k < V; ++k) {
        const A d = x[k] - first[k];
        sum[k] += d;
        square[k] += d * d;
      }
    }
  }
  const A size = larger<A>(count, 1);
#pragma unroll
  for (int k = 0; k < V; ++k) {
    const A m2 = square[k] - sum[k] * sum[k] / size;
    slots[at.row][slot_of<V, WIDE>(at.lane, k)] = {count, first[k], sum[k] / size, m2 < 0 ? A{0} : m2};
  }
  __syncthreads();
  for (int slot = threadIdx.x; slot < kWarp * V; slot += kThreads) {
    const int column = at.tile * kWarp * V + slot;
    if (column >= classes) continue;
    Moments<double> all{0, 0, 0, 0};
    for (int row = 0; row < kRowLanes; ++row) merge(all, slots[row][slot]);
    const A mean = static_cast<A>(all.mean);
    out[(side * plan.chunks + at.chunk) * classes + column] = {static_cast<A>(all.count), mean,
                                                               static_cast<A>(all.rest), static_cast<A>(all.m2)};
  }
}

// A warp's classes, merged over chunks by kRowLanes threads each, which are merged in turn; the first has the result.
template <class A>
__device__ Moments<double> merged_moments(const Moments<A>* moments, int64_t chunks, int64_t classes, int64_t column,
                                          int row) {
  __shared__ Moments<double> slots[kRowLanes][kWarp];
  const int lane = threadIdx.x % kWarp;
  const int64_t each = (chunks + kRowLanes - 1) / kRowLanes, begin = row * each;
  const int64_t end = begin + each < chunks ? begin + each : chunks;
  Moments<double> all{0, 0, 0, 0};
  if (column < classes) {
    for (int64_t chunk = begin; chunk < end; ++chunk) merge(all, moments[chunk * classes + column]);
  }
  slots[row][lane] = all;
  __syncthreads();
  if (row == 0) {
    for (int k = 1; k < kRowLanes; ++k) merge(all, slots[k][lane]);
  }
  return all;
}

template <class A>
__device__ void set_class(const Coefficients<A>& of, int64_t column, double mean, double rest, double variance,
                          double eps, A exponent) {
  const double all = mean + rest, scale = exponent / sqrt(variance + eps);
  const A rounded = static_cast<A>(all);
  // what adding left off comes back in the offset
  const double lost = (mean - rounded) + rest;
  of.mean[column] = rounded;
  of.scale[column] = static_cast<A>(scale);
  of.offset[column] = static_cast<A>(-lost * scale);
}

// The coefficients of a warp's classes of one side, by the batch's moments.
template <class A>
__global__ void __launch_bounds__(kThreads, 1) merge_moments(Plan plan, int64_t classes, double eps, Work<A> w) {
  const int64_t tiles = plan.padded / kWarp, tile = blockIdx.x % tiles, side = blockIdx.x / tiles;
  const int row = threadIdx.x / kWarp;
  const int64_t column = tile * kWarp + threadIdx.x % kWarp;
  const Moments<double> all =
      merged_moments(w.moments + side * plan.chunks * classes, plan.chunks, classes, column, row);
  if (row != 0) return;
  const double size = all.count > 1 ? all.count : 1;
  set_class(side ? w.of_t : w.of_s, column, all.mean, all.rest, all.m2 / size, eps, w.exponent);
}

// The same by given statistics, [4, classes].
template <class A>
__global__ void __launch_bounds__(kThreads, 1)
    use_stats(const double* stats, Plan plan, int64_t classes, double eps, Work<A> w) {
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (column >= plan.padded) return;
  const bool there = column < classes;
  for (int side = 0; side < 2; ++side) {
    const double* const of = stats + 2 * side * classes + column;
    set_class(side ? w.of_t : w.of_s, column, there ? of[0] : 0, 0, there ? of[classes] : 0, eps, w.exponent);
  }
}

// The results of col_stats.
template <class A>
__global__ void __launch_bounds__(kThreads, 1) write_moments(Plan plan, Moments<A>* moments, ColStats out) {
  const int row = threadIdx.x / kWarp;
  const int64_t classes = out.shape.classes, column = blockIdx.x * int64_t{kWarp} + threadIdx.x % kWarp;
  const Moments<double> all = merged_moments(moments, plan.chunks, classes, column, row);
  if (row != 0 || column >= classes) return;
  out.mean[column] = all.mean + all.rest;
  out.m2[column] = all.m2;
  if (column == 0) *out.count = all.count;
}

// dL/dh of an element by its exponents of 2, which the tops shift.
template <class A>
__device__ A slope(const RowFactors<A>& row, A u, A v) {
  return row.student * power2(u - row.top_s) - row.teacher * power2(v - row.top_t);
}

// The gradient's sums over a chunk, of each class: of dL/dh, and of it times the exponent.
template <class T, int V, bool WIDE, class A = Acc<T>>
__global__ void __launch_bounds__(kThreads, kBlocks<A>) col_sums(Problem p, Plan plan, Work<A> w) {
  constexpr int kAhead = 4;
  __shared__ A slots[2][kRowLanes][kWarp * V];
  const Place at = place(plan, false);
  const Columns<V, WIDE> columns = columns_at<V, WIDE>(at);
  const int64_t begin = at.chunk * plan.chunk;
  const int classes = static_cast<int>(p.shape.classes);
  const int64_t end = begin + plan.chunk < p.shape.rows ? begin + plan.chunk : p.shape.rows;
  Affine<A, V> of_s, of_t;
  of_s.load(w.of_s, columns, plan.padded);
  of_t.load(w.of_t, columns, plan.padded);
  A sum[V] = {}, tilt[V] = {};
  for (int64_t from = begin + at.row; from < end; from += kAhead * kRowLanes) {
    Word<T, V> next_s[kAhead], next_t[kAhead];
    fetch_rows<T, V, WIDE>(p.student, p.teacher, from, kRowLanes, end, columns, classes, next_s, next_t);
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int64_t row = from + i * kRowLanes;
      if (row >= end) break;
      const RowFactors<A> f = w.factors[row];
      if (!f.counts) continue;
      A s[V], t[V];
      widen<T, V>(next_s[i], s);
      widen<T, V>(next_t[i], t);
#pragma unroll
      for (int k = 0; k < V; ++k) {
        const A u = of_s(k, s[k]);
        const A g = p.decoupled && columns[k] == f.label ? f.at_label : slope(f, u, of_t(k, t[k]));
        sum[k] += g;
        tilt[k] += g * u;
      }
    }
  }
#pragma unroll
  for (int k = 0; k < V; ++k) {
    const int slot = slot_of<V, WIDE>(at.lane, k);
    slots[0][at.row][slot] = sum[k];
    slots[1][at.row][slot] = tilt[k];
  }
  __syncthreads();
  for (int i = threadIdx.x; i < 2 * kWarp * V; i += kThreads) {
    const int which = i / (kWarp * V), slot = i % (kWarp * V);
    const int column = at.tile * kWarp * V + slot;
    if (column >= classes) continue;
    A all = 0;
    for (int row = 0; row < kRowLanes; ++row) all += slots[which][row][slot];
    w.partial[(2 * at.chunk + which) * plan.padded + column] = all;
  }
}

// The last step: sums of each class over the chunks, a block to kWarp of them, and in one more block the loss, its
// parts and how many rows count.
template <class A>
__global__ void __launch_bounds__(kThreads, 1) finish(Problem p, Plan plan, Work<A> w, int64_t tiles) {
  if (blockIdx.x == tiles) {
    double mine[kTotals] = {}, all[kTotals];
    __shared__ double sum[kTotals];
    for (int64_t block = threadIdx.x; block < w.total_blocks; block += kThreads) {
      for (int q = 0; q < kTotals; ++q) mine[q] += w.totals[block * kTotals + q];
    }
    block_totals(mine, sum);
    __syncthreads();
    if (threadIdx.x != 0) return;
    for (int q = 0; q < kTotals; ++q) all[q] = sum[q];
    const double count = all[5] > 1 ? all[5] : 1;
    w.count[0] = static_cast<A>(all[5]);
    w.count[1] = w.exponent;
    if (!p.loss) return;
    *static_cast<A*>(p.loss) = static_cast<A>(p.mean ? all[0] / count : all[0]);
    for (int q = 0; q < 4; ++q) static_cast<A*>(p.part_means)[q] = static_cast<A>(all[1 + q] / count);
    return;
  }
  __shared__ double slots[2][kRowLanes][kWarp];
  const int lane = threadIdx.x % kWarp, row = threadIdx.x / kWarp;
  const int64_t column = blockIdx.x * int64_t{kWarp} + lane;
  const int64_t each = (w.partials + kRowLanes - 1) / kRowLanes, begin = row * each;
  const int64_t end = begin + each < w.partials ? begin + each : w.partials;
  double sum = 0, tilt = 0;
  if (column < p.shape.classes) {
#pragma unroll 8
    for (int64_t k = begin; k < end; ++k) {
      sum += w.partial[2 * k * plan.padded + column];
      tilt += w.partial[(2 * k + 1) * plan.padded + column];
    }
  }
  slots[0][row][lane] = sum;
  slots[1][row][lane] = tilt;
  __syncthreads();
  if (row != 0 || column >= p.shape.classes) return;
  for (int k = 1; k < kRowLanes; ++k) sum += slots[0][k][lane], tilt += slots[1][k][lane];
  w.sums[column] = static_cast<A>(sum);
  w.sums[plan.padded + column] = static_cast<A>(tilt);
  if (!p.col_sums) return;
  static_cast<A*>(p.col_sums)[column] = static_cast<A>(sum);
  static_cast<A*>(p.col_sums)[p.shape.classes + column] = static_cast<A>(tilt / w.exponent);
}

}  // namespace kdcore::cuda
