// A tile: whole rows of up to kTileClasses in a block's registers, so that the sums over each class come with them.
#pragma once
#include "row_terms.cuh"

namespace kdcore::cuda {

// The factors of a row whose exponentials need no shift, as finish_row has them in double precision.
template <class A>
struct Slopes {
  A student, teacher, at_label;
};

template <class T, class A = Acc<T>>
__device__ Slopes<A> slopes(const Problem& p, const Work<A>& w, const Row<A>& found, int64_t row, A zs, A zt) {
  const A weight = static_cast<A>((p.row_weight ? static_cast<const A*>(p.row_weight)[row] : A{1}) *
                                  static_cast<A>(p.kd_weight * p.temperature));
  if (!p.decoupled) return {weight / zs, weight / zt, 0};
  if (found.label < 0) return {NAN, NAN, NAN};
  const A s = element<T>(p.student, row, found.label), t = element<T>(p.teacher, row, found.label);
  const int y = found.label;
  const A own_s = power2((s - w.of_s.mean[y]) * w.of_s.scale[y] + w.of_s.offset[y]);
  const A own_t = power2((t - w.of_t.mean[y]) * w.of_t.scale[y] + w.of_t.offset[y]);
  const A all_s = zs + own_s, all_t = zt + own_t;
  // p_s - p_t from the smaller tails, where nothing cancels
  const bool sure = own_s > zs && own_t > zt;
  const A label = static_cast<A>(p.alpha) * (sure ? zt / all_t - zs / all_s : own_s / all_s - own_t / all_t);
  A beta = p.row_beta ? static_cast<const A*>(p.row_beta)[row] : static_cast<A>(p.beta);
  if (p.shape.classes == 2) beta = 0;
  return {weight * (beta - label) / zs, weight * beta / zt, weight * label};
}

template <class T, class S, bool WIDE, bool CE, class A = Acc<T>>
__global__ void __launch_bounds__(S::threads, 1)
    tile_rows(const __grid_constant__ Problem p, const __grid_constant__ Plan plan, const __grid_constant__ Work<A> w) {
  constexpr int V = S::vector, R = S::batch, kWarps = S::threads / kWarp;
  __shared__ RowSum<A> slots[2][kWarps][R];
  __shared__ A merged[2][kThreads * V];  // where groups share a block, it has no more threads
  const int group = threadIdx.x / plan.across, x = threadIdx.x % plan.across, warps = plan.across / kWarp;
  const int classes = static_cast<int>(p.shape.classes);
  const int64_t begin = blockIdx.x * plan.row_chunk;
  const int64_t end = begin + plan.row_chunk < p.shape.rows ? begin + plan.row_chunk : p.shape.rows;
  const Columns<V, WIDE> at = columns_of<V, WIDE>(0, x, plan.across);
  Affine<A, V> of_s, of_t;
  of_s.load(w.of_s, at, plan.padded);
  of_t.load(w.of_t, at, plan.padded);
  A sums[V] = {}, tilts[V] = {};
  int buffer = 0;
  for (int64_t from = begin; from < end; from += plan.groups * R, buffer ^= 1) {
    const int64_t first = from + group * R;
    Row<A> rows[R];
    RowSum<A> sum[R];
    A u[R][V], e_u[R][V], e_v[R][V];
#pragma unroll
    for (int i = 0; i < R; ++i) {
      rows[i] = row_at<T, CE>(p, first + i, end);
      sum[i] = no_sum<A>();
      if (!rows[i].counts) continue;
      A s[V], t[V], v[V];
      load<T, V, WIDE>(row_of<T>(p.student, first + i), at, classes, s);
      load<T, V, WIDE>(row_of<T>(p.teacher, first + i), at, classes, t);
#pragma unroll
      for (int k = 0; k < V; ++k) {
        u[i][k] = of_s(k, s[k]);
        v[k] = of_t(k, t[k]);
      }
      add<A, Kind::bounded, CE>(sum[i], rows[i], at, classes, s, u[i], v, e_u[i], e_v[i]);
    }
#pragma unroll
    for (int i = 0; i < R; ++i) {
      for (int offset = kWarp / 2; offset > 0; offset /= 2) {
        merge_rows<A, Kind::bounded, CE>(sum[i], shuffled<A, Kind::bounded, CE>(sum[i], offset), 1, 1);
      }
      if (threadIdx.x % kWarp == 0) slots[buffer][threadIdx.x / kWarp][i] = sum[i];
    }
    __syncthreads();  // the other buffer's readers are through: they have come here, too
#pragma unroll
    for (int i = 0; i < R; ++i) {
      if (!rows[i].counts) continue;
      RowSum<A> all = slots[buffer][group * warps][i];
      if (x == 0) {
        for (int k = 1; k < warps; ++k)
          merge_rows<A, Kind::bounded, CE>(all, slots[buffer][group * warps + k][i], 1, 1);
        w.row_sums[first + i] = all;
      } else {
        for (int k = 1; k < warps; ++k) {
          all.zs += slots[buffer][group * warps + k][i].zs;
          all.zt += slots[buffer][group * warps + k][i].zt;
        }
      }
      const Slopes<A> of = slopes<T>(p, w, rows[i], first + i, all.zs, all.zt);
#pragma unroll
      for (int k = 0; k < V; ++k) {
        const A g = at[k] == rows[i].skip ? of.at_label : of.student * e_u[i][k] - of.teacher * e_v[i][k];
        sums[k] += g;
        tilts[k] += g * u[i][k];
      }
    }
  }
  A* const out = w.partial + 2 * blockIdx.x * plan.padded;
  if (plan.groups > 1) {
    const int wide = plan.across * V;
#pragma unroll
    for (int k = 0; k < V; ++k) {
      merged[0][group * wide + at[k]] = sums[k];
      merged[1][group * wide + at[k]] = tilts[k];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < 2 * wide; i += blockDim.x) {
      const int which = i / wide, column = i % wide;
      if (column >= classes) continue;
      A all = 0;
      for (int g = 0; g < plan.groups; ++g) all += merged[which][g * wide + column];
      out[which * plan.padded + column] = all;
    }
  } else {
#pragma unroll
    for (int k = 0; k < V; ++k) {
      if (at[k] < classes) out[at[k]] = sums[k], out[plan.padded + at[k]] = tilts[k];
    }
    __syncthreads();
  }
  double totals[kTotals] = {};
  for (int64_t row = begin + threadIdx.x; row < end; row += blockDim.x) {
    finish_row<T>(p, w, row, ignored(p.shape, row) ? no_sum<A>() : w.row_sums[row], totals);
  }
  block_totals(totals, w.totals + blockIdx.x * int64_t{kTotals});
}

}  // namespace kdcore::cuda
