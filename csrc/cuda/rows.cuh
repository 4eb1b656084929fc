// Passes over rows: each row's sums, by a few threads or by a block, and what follows from them.
#pragma once
#include "columns.cuh"

namespace kdcore::cuda {

// How a row's logits become exponents of 2.
enum class Kind {
  bounded,   // per_class: the class's coefficients, and no maximum is needed
  shifted,   // per_class, less the row's maximum
  plain,     // none: logits less the row's maximum
  instance,  // logits less the row's maximum, by the row's own deviation; both are known before the sums
};

template <Kind K>
constexpr bool kByClass = K == Kind::bounded || K == Kind::shifted;
template <Kind K>
constexpr bool kOnline = K == Kind::shifted || K == Kind::plain;  // the maximum is found with the sums

template <class A>
__device__ RowSum<A> no_sum() {
  return {lowest<A>(), lowest<A>(), 0, 0, 0, 0, 0, lowest<A>(), 0, 0};
}

// Moves the shifts of the exponentials up; scales are those of the tops to exponents of 2.
template <class A>
__device__ void raise(RowSum<A>& x, A top_s, A top_t, A scale_s, A scale_t) {
  const A down_s = (x.top_s - top_s) * scale_s, down_t = (x.top_t - top_t) * scale_t;
  const A factor_s = power2(down_s), factor_t = power2(down_t);
  // nothing in it yet, or nothing left of it: 0 * inf is not meant
  x.gap = x.zt == 0 || factor_t == 0 ? A{0} : factor_t * (x.gap + x.zt * (down_t - down_s));
  x.zs *= factor_s;
  x.zt *= factor_t;
  x.top_s = top_s;
  x.top_t = top_t;
}

template <class A>
__device__ void raise_raw(RowSum<A>& x, A top) {
  x.rest *= power2((x.top_raw - top) * static_cast<A>(kLog2e));
  x.top_raw = top;
}

template <class A, Kind K, bool CE>
__device__ void merge_rows(RowSum<A>& x, RowSum<A> next, A scale_s, A scale_t) {
  if constexpr (kOnline<K>) {
    const A top_s = larger(x.top_s, next.top_s), top_t = larger(x.top_t, next.top_t);
    raise(x, top_s, top_t, scale_s, scale_t);
    raise(next, top_s, top_t, scale_s, scale_t);
  }
  x.zs += next.zs;
  x.zt += next.zt;
  x.gap += next.gap;
  if constexpr (K == Kind::instance) x.tilt_s += next.tilt_s, x.tilt_t += next.tilt_t;
  if constexpr (CE) {
    const A top = larger(x.top_raw, next.top_raw);
    raise_raw(x, top);
    raise_raw(next, top);
    x.rest += next.rest;
    x.logits += next.logits;
  }
}

template <class A, Kind K, bool CE>
__device__ RowSum<A> shuffled(const RowSum<A>& x, int offset) {
  RowSum<A> y = x;
  auto take = [&](A& value) { value = __shfl_xor_sync(kAll, value, offset); };
  if constexpr (kOnline<K>) take(y.top_s), take(y.top_t);
  take(y.zs), take(y.zt), take(y.gap);
  if constexpr (K == Kind::instance) take(y.tilt_s), take(y.tilt_t);
  if constexpr (CE) take(y.top_raw), take(y.rest), take(y.logits);
  return y;
}

// A row as its threads see it.
template <class A>
struct Row {
  bool counts;
  int label;  // -1 without labels, or where it is no class
  int skip;   // the label where it is left out of the sums, else -1
  A first;    // its first logit: what cross-entropy's sum of logits is relative to
};

template <class T, bool CE, class A = Acc<T>>
__device__ Row<A> row_at(const Problem& p, int64_t row, int64_t end) {
  Row<A> found{row < end && !ignored(p.shape, row), -1, -1, 0};
  if (!found.counts) return found;
  const int64_t label = p.shape.index ? p.shape.index[row] : -1;
  if (label >= 0 && label < p.shape.classes) found.label = static_cast<int>(label);
  if (p.decoupled) found.skip = found.label;
  if constexpr (CE) {
    found.first = element<T>(p.student, row, 0);
    if (!(fabs(found.first) < INFINITY)) found.first = 0;
  }
  return found;
}

// Adds V classes of a row, whose exponents of 2 are u and v.
template <class A, Kind K, bool CE, int V, bool WIDE>
__device__ void add(RowSum<A>& sum, const Row<A>& row, const Columns<V, WIDE>& at, int end, const A (&s)[V],
                    const A (&u)[V], const A (&v)[V], A (&e_u)[V], A (&e_v)[V]) {
#pragma unroll
  for (int k = 0; k < V; ++k) {
    const bool out = at[k] >= end || at[k] == row.skip;
    e_u[k] = out ? A{0} : power2(u[k]);
    e_v[k] = out ? A{0} : power2(v[k]);
    sum.zs += e_u[k];
    sum.zt += e_v[k];
    if (K == Kind::bounded ? !out : e_v[k] != 0) sum.gap += e_v[k] * (v[k] - u[k]);  // a masked class: not 0 * inf
    if constexpr (K == Kind::instance) {
      const A d = out ? A{0} : s[k] - sum.top_s;
      sum.tilt_s += e_u[k] * d;
      sum.tilt_t += e_v[k] * d;
    }
  }
  if constexpr (CE) {
    A top = sum.top_raw;
#pragma unroll
    for (int k = 0; k < V; ++k) {
      if (at[k] < end) top = larger(top, s[k]);
    }
    if (top != sum.top_raw) raise_raw(sum, top);
#pragma unroll
    for (int k = 0; k < V; ++k) {
      if (at[k] >= end) continue;
      if (at[k] != row.label) sum.rest += power2((s[k] - top) * static_cast<A>(kLog2e));
      sum.logits += s[k] - row.first;
    }
  }
}

// -- what follows from a row's sums, in double precision

template <class A>
struct Label {
  double u, v;  // its own shifted exponents, of e
  double raw, centred;
};

template <class T, class A = Acc<T>>
__device__ Label<A> label_of(const Problem& p, const Work<A>& w, const RowSum<A>& sum, int64_t row, int64_t label) {
  const A s = element<T>(p.student, row, label), t = element<T>(p.teacher, row, label);
  const double centred = static_cast<double>(s) - sum.top_s;
  if (p.normalize == Normalize::per_class) {
    const A u = (s - w.of_s.mean[label]) * w.of_s.scale[label] + w.of_s.offset[label];
    const A v = (t - w.of_t.mean[label]) * w.of_t.scale[label] + w.of_t.offset[label];
    return {(u - sum.top_s) * kLn2, (v - sum.top_t) * kLn2, s, centred};
  }
  const bool instance = p.normalize == Normalize::instance;
  const double scale_s = instance ? w.affines[row].scale_s : w.exponent;
  const double scale_t = instance ? w.affines[row].scale_t : w.exponent;
  return {centred * scale_s * kLn2, (static_cast<double>(t) - sum.top_t) * scale_t * kLn2, s, centred};
}

template <class A>
__device__ void skip_row(const Problem& p, const Work<A>& w, int64_t row) {
  w.factors[row].counts = false;
  w.factors[row].label = -1;
  if (!p.row_losses) return;
  static_cast<A*>(p.row_losses)[row] = 0;
  for (int q = 0; q < 4; ++q) static_cast<A*>(p.row_parts)[q * p.shape.rows + row] = 0;
}

// A row's factors, its loss and parts, which are added to the totals. All of a row with a label that is no class is
// NaN, and the label is never used as an index.
template <class T, class A = Acc<T>>
__device__ __noinline__ void finish_row(const Problem& p, const Work<A>& w, int64_t row, RowSum<A> sum,
                                        double (&totals)[kTotals]) {
  if (ignored(p.shape, row)) return skip_row(p, w, row);
  const int64_t classes = p.shape.classes, label = p.shape.index ? p.shape.index[row] : -1;
  const bool lost = p.shape.index && (label < 0 || label >= classes), needed = p.decoupled || p.cross_entropy;
  const bool pair = p.decoupled && classes == 2;  // one class left: nothing to compare, whatever it holds
  const double beta = pair ? 0 : p.row_beta ? static_cast<const A*>(p.row_beta)[row] : p.beta;
  const bool bounded = p.normalize == Normalize::per_class && sum.top_s == lowest<A>() && sum.top_t == lowest<A>();
  if (bounded || sum.top_s == lowest<A>()) sum.top_s = 0;  // nothing was shifted, or every class is masked
  if (bounded || sum.top_t == lowest<A>()) sum.top_t = 0;

  RowTerms<double> terms{NAN, NAN, NAN, NAN, NAN};
  CrossEntropy<double> ce{NAN, NAN, NAN};
  Label<A> own{0, 0, 0, 0};
  if (!lost) {
    if (needed && label >= 0) own = label_of<T>(p, w, sum, row, label);
    const RowSums<double> sums{sum.zs, sum.zt, sum.gap * kLn2};
    terms = p.decoupled ? dkd_terms(sums, own.u, own.v, p.alpha, beta) : kd_terms(sums);
    if (pair) terms.nckd = 0;
    ce = {0, 0, 0};
    if (p.cross_entropy) {
      const double size = static_cast<double>(classes);
      A first = element<T>(p.student, row, 0);
      if (!(fabs(first) < INFINITY)) first = 0;
      const double mean = (static_cast<double>(first) - sum.top_raw) + sum.logits / size;
      ce = cross_entropy_terms<double>(sum.rest, own.raw - sum.top_raw, mean, p.label_smoothing, size);
    }
  }

  const double square = p.temperature * p.temperature;
  const double tckd = p.decoupled ? square * terms.tckd : 0, nckd = square * terms.nckd;
  const double kd = p.decoupled ? p.alpha * tckd + (pair ? 0 : beta * nckd) : nckd;
  const double entropy = p.cross_entropy ? ce.loss : 0;
  const double loss = p.kd_weight * kd + (p.ce_weight != 0 ? p.ce_weight * entropy : 0);
  const double parts[kTotals] = {loss, kd, tckd, p.decoupled ? nckd : 0, entropy, 1};
  for (int q = 0; q < kTotals; ++q) totals[q] += parts[q];
  if (p.row_losses) {
    static_cast<A*>(p.row_losses)[row] = static_cast<A>(loss);
    for (int q = 0; q < 4; ++q) static_cast<A*>(p.row_parts)[q * p.shape.rows + row] = static_cast<A>(parts[1 + q]);
  }

  const double weight = p.row_weight ? static_cast<const A*>(p.row_weight)[row] : 1;
  const double of_kd = weight * p.kd_weight * p.temperature, of_ce = weight * p.ce_weight;
  RowFactors<A> f;
  f.student = static_cast<A>(of_kd * terms.student);
  f.teacher = static_cast<A>(of_kd * terms.teacher);
  f.at_label = static_cast<A>(of_kd * terms.label);
  f.top_s = sum.top_s;
  f.top_t = sum.top_t;
  f.entropy = static_cast<A>(of_ce * ce.other);
  f.top_raw = sum.top_raw;
  f.entropy_at_label = static_cast<A>(of_ce * ce.at_label);
  f.uniform = static_cast<A>(of_ce * p.label_smoothing / static_cast<double>(classes));
  f.label = lost ? -1 : static_cast<int>(label);
  f.counts = true;
  w.factors[row] = f;
  if (p.normalize != Normalize::instance) return;
  RowAffine<A>& affine = w.affines[row];
  double q = of_kd * (terms.student * sum.tilt_s - terms.teacher * sum.tilt_t);
  if (p.decoupled && !lost) q += of_kd * terms.label * own.centred;
  const double freedom = static_cast<double>(classes - 1), gain = affine.gain;
  affine.spread = affine.deviation == 0 ? A{0} : static_cast<A>(gain * gain * q / (freedom * affine.deviation));
}

// -- the sums of rows that their own or given statistics normalise, or with more classes than a tile holds

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
__global__ void __launch_bounds__(kThreads, 1) row_sums(Problem p, Plan plan, Work<A> w) {
  const int64_t split = blockIdx.x % plan.splits, block = blockIdx.x / plan.splits;
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
#pragma unroll
    for (int i = 0; i < R; ++i) {
      if (!rows[i].counts) continue;
      A s[V], t[V], u[V], v[V], e_u[V], e_v[V];
      load<T, V, WIDE>(row_of<T>(p.student, first + i), at, end, s);
      load<T, V, WIDE>(row_of<T>(p.teacher, first + i), at, end, t);
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

// -- a tile: whole rows of up to kTileClasses in a block's registers, so that the sums over each class come with them

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
