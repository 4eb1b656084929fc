// The sums of rows that their own or given statistics normalise, or with more classes than a tile holds.
#pragma once
#include "row_terms.cuh"

namespace kdcore::cuda {

// What threads of a group have found, merged pairwise in a warp and then in the order of the warps; right in thread 0
// of the group. All threads of the block call it.
template <class A, Kind K, bool CE, int R>
__device__ void reduce_rows(RowSum<A> (&sum)[R], int across, A scale_s, A scale_t) {
  __shared__ RowSum<A> slots[kRowLanes][R];
#pragma unroll
  for (int i = 0; i < R; ++i) {
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
      merge_rows<A, K, CE>(sum[i], shuffled<A, K, CE>(sum[i], offset), scale_s, scale_t);
    }
  }
  const int warp = threadIdx.x / kWarp;
  if (across == kWarp) return;
  if (threadIdx.x % kWarp == 0) {
    for (int i = 0; i < R; ++i) slots[warp][i] = sum[i];
  }
  __syncthreads();
  if (threadIdx.x % across != 0) return;
  for (int k = 1; k < across / kWarp; ++k) {
    for (int i = 0; i < R; ++i) merge_rows<A, K, CE>(sum[i], slots[warp + k][i], scale_s, scale_t);
  }
}

// The sum over the threads of a group, in all of them; tops alike.
template <class A>
struct Side {
  A top, sum, square;
};

template <class A>
__device__ Side<A> group_sum(Side<A> mine, int across) {
  __shared__ Side<A> slots[kRowLanes];
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    mine.top = larger(mine.top, __shfl_xor_sync(kAll, mine.top, offset));
    mine.sum += __shfl_xor_sync(kAll, mine.sum, offset);
    mine.square += __shfl_xor_sync(kAll, mine.square, offset);
  }
  const int warp = threadIdx.x / kWarp, warps = across / kWarp, first = warp / warps * warps;
  __syncthreads();  // the last call's slots have been read
  if (threadIdx.x % kWarp == 0) slots[warp] = mine;
  __syncthreads();
  Side<A> all = slots[first];
  for (int k = 1; k < warps; ++k) {
    all.top = larger(all.top, slots[first + k].top);
    all.sum += slots[first + k].sum;
    all.square += slots[first + k].square;
  }
  return all;
}

// One side of a row under instance: its statistics, and its maximum but for the skipped class.
template <class A>
struct Standard {
  A mean, rest, deviation, top;
};

template <class T, int V, bool WIDE, class A = Acc<T>>
__device__ Standard<A> standardise(const Logits& z, int64_t row, const Row<A>& found, const Plan& plan, int classes) {
  const int x = threadIdx.x % plan.across;
  const A first = found.counts ? element<T>(z, row, 0) : A{0}, size = static_cast<A>(classes);
  A mean = first, rest = 0;
  Side<A> all{};
  for (int pass = 0; pass < 2; ++pass) {  // the second time around the mean: deviations from it are exact
    Side<A> mine{lowest<A>(), 0, 0};
    for (int begin = 0; found.counts && begin < classes; begin += plan.across * V) {
      const Columns<V, WIDE> at = columns_of<V, WIDE>(begin, x, plan.across);
      A values[V];
      load<T, V, WIDE>(row_of<T>(z, row), at, classes, values);
#pragma unroll
      for (int k = 0; k < V; ++k) {
        if (at[k] >= classes) continue;
        const A d = (values[k] - mean) - rest;
        mine.sum += d;
        mine.square += d * d;
        if (at[k] != found.skip) mine.top = larger(mine.top, values[k]);
      }
    }
    all = group_sum(mine, plan.across);
    const A shift = all.sum / size, moved = mean + shift, part = moved - mean;
    if (pass == 0) {
      rest = (mean - (moved - part)) + (shift - part);
      mean = moved;
    } else {
      rest += shift;
    }
  }
  const A m2 = all.square - all.sum * all.sum / size;
  return {mean, rest, static_cast<A>(sqrt((m2 < 0 ? A{0} : m2) / (size - 1))), all.top};
}

// Rows of a block, plan.batch of each of its groups at once, over the classes of its segment.
template <class T, int V, bool WIDE, Kind K, bool CE, int R, class A = Acc<T>>
__global__ void __launch_bounds__(kThreads, kBlocks<A>) row_sums(Problem p, Plan plan, Work<A> w) {
  // from the last rows to the first: those are still in the cache
  const int64_t split = blockIdx.x % plan.splits, block = plan.row_chunks - 1 - blockIdx.x / plan.splits;
  const int group = threadIdx.x / plan.across, x = threadIdx.x % plan.across;
  const int64_t first = block * plan.row_chunk + group * R;
  const int classes = static_cast<int>(p.shape.classes), begin = static_cast<int>(split * plan.segment);
  const int end = plan.segment < classes - begin ? begin + static_cast<int>(plan.segment) : classes;
  Row<A> rows[R];
  RowSum<A> sum[R];
  for (int i = 0; i < R; ++i) rows[i] = row_at<T, CE>(p, first + i, p.shape.rows), sum[i] = no_sum<A>();
  A scale_s = kByClass<K> ? A{1} : w.exponent, scale_t = scale_s;
  if constexpr (K == Kind::instance) {
    const Standard<A> s = standardise<T, V, WIDE>(p.student, first, rows[0], plan, classes);
    const Standard<A> t = standardise<T, V, WIDE>(p.teacher, first, rows[0], plan, classes);
    const A eps = static_cast<A>(p.eps), gain = 1 / (s.deviation + eps);
    scale_s = w.exponent * gain;
    scale_t = w.exponent / (t.deviation + eps);
    sum[0].top_s = s.top;
    sum[0].top_t = t.top;
    if (x == 0 && rows[0].counts) w.affines[first] = {scale_s, scale_t, s.mean, s.rest, gain, s.deviation, 0};
  }
  for (int from = begin; from < end; from += plan.across * V) {
    const Columns<V, WIDE> at = columns_of<V, WIDE>(from, x, plan.across);
    Affine<A, V> of_s, of_t;
    if constexpr (kByClass<K>) {
      of_s.load(w.of_s, at, plan.padded);
      of_t.load(w.of_t, at, plan.padded);
    }
    Word<T, V> next_s[R], next_t[R];
    fetch_rows<T, V, WIDE>(p.student, p.teacher, first, 1, p.shape.rows, at, end, next_s, next_t);
#pragma unroll
    for (int i = 0; i < R; ++i) {
      if (!rows[i].counts) continue;
      A s[V], t[V], u[V], v[V], e_u[V], e_v[V];
      widen<T, V>(next_s[i], s);
      widen<T, V>(next_t[i], t);
      if constexpr (kOnline<K>) {
        A top_s = sum[i].top_s, top_t = sum[i].top_t;
#pragma unroll
        for (int k = 0; k < V; ++k) {
          u[k] = kByClass<K> ? of_s(k, s[k]) : s[k];
          v[k] = kByClass<K> ? of_t(k, t[k]) : t[k];
          if (at[k] >= end || at[k] == rows[i].skip) continue;
          top_s = larger(top_s, u[k]);
          top_t = larger(top_t, v[k]);
        }
        if (top_s != sum[i].top_s || top_t != sum[i].top_t) raise(sum[i], top_s, top_t, scale_s, scale_t);
      }
#pragma unroll
      for (int k = 0; k < V; ++k) {
        if constexpr (K == Kind::bounded) {
          u[k] = of_s(k, s[k]);
          v[k] = of_t(k, t[k]);
        } else if constexpr (K == Kind::shifted) {
          u[k] -= sum[i].top_s;
          v[k] -= sum[i].top_t;
        } else {
          u[k] = (s[k] - sum[i].top_s) * scale_s;
          v[k] = (t[k] - sum[i].top_t) * scale_t;
        }
      }
      add<A, K, CE>(sum[i], rows[i], at, end, s, u, v, e_u, e_v);
    }
  }
  reduce_rows<A, K, CE, R>(sum, plan.across, scale_s, scale_t);
  if (x != 0) return;
  for (int i = 0; i < R; ++i) {
    if (rows[i].counts) w.row_sums[(first + i) * plan.splits + split] = sum[i];
  }
}

// One thread per row: its splits, in order, and what follows from them.
template <class T, Kind K, bool CE, class A = Acc<T>>
__global__ void __launch_bounds__(kThreads, 1)
    finish_rows(const __grid_constant__ Problem p, const __grid_constant__ Plan plan,
                const __grid_constant__ Work<A> w) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  double totals[kTotals] = {};
  if (row < p.shape.rows) {
    RowSum<A> sum = no_sum<A>();
    if (!ignored(p.shape, row)) {
      const A scale = kByClass<K> ? A{1} : w.exponent;
      sum = w.row_sums[row * plan.splits];
      for (int64_t k = 1; k < plan.splits; ++k) {
        merge_rows<A, K, CE>(sum, w.row_sums[row * plan.splits + k], scale, scale);
      }
    }
    finish_row<T>(p, w, row, sum, totals);
  }
  block_totals(totals, w.totals + blockIdx.x * int64_t{kTotals});
}

}  // namespace kdcore::cuda
