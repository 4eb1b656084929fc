// A tile: whole rows of up to kTileClasses in a block's registers, so that the sums over each class come with them.
#pragma once
#include "row_terms.cuh"

namespace kdcore::cuda {

// What a row's factors take beside its sums, read while those are still being added up: the exponentials of its label.
template <class A>
struct Own {
  A s, t, beta, weight;
};

template <class T, class A = Acc<T>>
__device__ Own<A> own_of(const Problem& p, const Work<A>& w, const Row<A>& found, int64_t row) {
  Own<A> own{0, 0, 0, static_cast<A>(p.kd_weight * p.temperature)};  // weights of rows come with given statistics alone
  if (p.shape.index && found.label < 0) own.weight = NAN;            // no class: all of the row is NaN
  if (!p.decoupled || found.label < 0) return own;
  const int y = found.label;
  const A s = element<T>(p.student, row, y), t = element<T>(p.teacher, row, y);
  own.s = power2((s - w.of_s.mean[y]) * w.of_s.scale[y] + w.of_s.offset[y]);
  own.t = power2((t - w.of_t.mean[y]) * w.of_t.scale[y] + w.of_t.offset[y]);
  own.beta = p.row_beta ? static_cast<const A*>(p.row_beta)[row] : static_cast<A>(p.beta);
  if (p.shape.classes == 2) own.beta = 0;
  return own;
}

// The factors of a row whose exponentials need no shift, as finish_row has them in double precision.
template <class A>
struct Slopes {
  A student, teacher, at_label;
};

template <class A>
__device__ Slopes<A> slopes(const Problem& p, const Own<A>& own, A zs, A zt) {
  if (!p.decoupled) return {own.weight / zs, own.weight / zt, 0};
  const A all_s = zs + own.s, all_t = zt + own.t;
  // p_s - p_t from the smaller tails, where nothing cancels
  const bool sure = own.s > zs && own.t > zt;
  const A label = static_cast<A>(p.alpha) * (sure ? zt / all_t - zs / all_s : own.s / all_s - own.t / all_t);
  return {own.weight * (own.beta - label) / zs, own.weight * own.beta / zt, own.weight * label};
}

// A block's rows, one of each of its groups at a time.
template <class T, int V, bool WIDE, bool CE, class A = Acc<T>>
__global__ void __launch_bounds__(kThreads, V == kNarrowTile ? 2 : 1)
    tile_rows(const __grid_constant__ Problem p, const __grid_constant__ Plan plan, const __grid_constant__ Work<A> w) {
  constexpr bool kEarly = V < kWideTile;  // reads the next row, and the label's logits, ahead: registers are left
  __shared__ RowSum<A> slots[2][kRowLanes];
  __shared__ A merged[2][kThreads * V];
  const int group = threadIdx.x / plan.across, x = threadIdx.x % plan.across, warps = plan.across / kWarp;
  const int classes = static_cast<int>(p.shape.classes);
  const int64_t block = plan.row_chunks - 1 - blockIdx.x;  // the last rows are still in the cache
  const int64_t begin = block * plan.row_chunk;
  const int64_t end = begin + plan.row_chunk < p.shape.rows ? begin + plan.row_chunk : p.shape.rows;
  const Columns<V, WIDE> at = columns_of<V, WIDE>(0, x, plan.across);
  Affine<A, V> of_s, of_t;
  of_s.load(w.of_s, at, plan.padded);
  of_t.load(w.of_t, at, plan.padded);
  A sums[V] = {}, tilts[V] = {};
  Word<T, V> next_s, next_t;
  const auto read = [&](int64_t row, Word<T, V>& s, Word<T, V>& t) {
    if (row >= end) return;
    s = fetch<T, V, WIDE>(row_of<T>(p.student, row), at, classes);
    t = fetch<T, V, WIDE>(row_of<T>(p.teacher, row), at, classes);
  };
  if (kEarly) read(begin + group, next_s, next_t);
  int buffer = 0;
  for (int64_t from = begin; from < end; from += plan.groups, buffer ^= 1) {
    const int64_t row = from + group;
    Word<T, V> now_s = next_s, now_t = next_t;
    if (kEarly) read(row + plan.groups, next_s, next_t);
    const Row<A> found = row_at<T, CE>(p, row, end);
    RowSum<A> sum = no_sum<A>();
    Own<A> own;
    A u[V], e_u[V], e_v[V];
    if (found.counts) {
      if (kEarly) own = own_of<T>(p, w, found, row);
      if (!kEarly) read(row, now_s, now_t);
      A s[V], t[V], v[V];
      widen<T, V>(now_s, s);
      widen<T, V>(now_t, t);
#pragma unroll
      for (int k = 0; k < V; ++k) {
        u[k] = of_s(k, s[k]);
        v[k] = of_t(k, t[k]);
      }
      add<A, Kind::bounded, CE>(sum, found, at, classes, s, u, v, e_u, e_v);
    }
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
      merge_rows<A, Kind::bounded, CE>(sum, shuffled<A, Kind::bounded, CE>(sum, offset), 1, 1);
    }
    if (threadIdx.x % kWarp == 0) slots[buffer][threadIdx.x / kWarp] = sum;
    __syncthreads();  // the other buffer's readers are through: they have come here, too
    if (!found.counts) continue;
    const RowSum<A>* const of_warp = slots[buffer] + group * warps;
    A zs = of_warp[0].zs, zt = of_warp[0].zt;
    for (int k = 1; k < warps; ++k) zs += of_warp[k].zs, zt += of_warp[k].zt;
    if (x == 0) {
      RowSum<A> all = of_warp[0];
      for (int k = 1; k < warps; ++k) merge_rows<A, Kind::bounded, CE>(all, of_warp[k], 1, 1);
      w.row_sums[row] = all;
    }
    if (!kEarly) own = own_of<T>(p, w, found, row);
    const Slopes<A> of = slopes(p, own, zs, zt);
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const A g = at[k] == found.skip ? of.at_label : of.student * e_u[k] - of.teacher * e_v[k];
      sums[k] += g;
      tilts[k] += g * u[k];
    }
  }
  A* const out = w.partial + 2 * block * plan.padded;
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
  block_totals(totals, w.totals + block * kTotals);
}

}  // namespace kdcore::cuda
