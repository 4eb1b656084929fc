// The sums over a row: how a thread adds its classes, and how threads' sums are merged.
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

}  // namespace kdcore::cuda
