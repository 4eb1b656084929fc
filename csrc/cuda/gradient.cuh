// The gradient with respect to the student's logits: element by element, from the record and the logits.
#pragma once
#include "row_sum.cuh"

namespace kdcore::cuda {

// Kind::shifted stands for both kinds of class coefficients: a bounded row's tops are 0.
template <class T, int V, bool WIDE, Kind K, bool CE, class A = Acc<T>>
__global__ void __launch_bounds__(kThreads, kBlocks<A>) gradient(Problem p, Plan plan, Work<A> w) {
  constexpr int kAhead = 4;
  // the other way than the pass before it: what that one read last is still in the cache
  const Place at = place(plan, kByClass<K> && p.shape.classes > kTileClasses);
  const Columns<V, WIDE> columns = columns_at<V, WIDE>(at);
  const int64_t begin = at.chunk * plan.chunk;
  const int classes = static_cast<int>(p.shape.classes);
  const int64_t end = begin + plan.chunk < p.shape.rows ? begin + plan.chunk : p.shape.rows;
  const A count = larger<A>(p.count ? *static_cast<const A*>(p.count) : *w.count, 1);
  const A exponent = w.count[1], rate = 1 / exponent;
  A factor = p.grad_loss ? *static_cast<const A*>(p.grad_loss) : A{1};
  if (p.mean && !p.row_weight) factor /= count;
  Affine<A, V> of_s, of_t;
  A level[V] = {}, tilt[V] = {};
  if constexpr (kByClass<K>) {
    of_s.load(w.of_s, columns, plan.padded);
    of_t.load(w.of_t, columns, plan.padded);
    if (p.through) {
      const A* const sums = p.sums ? static_cast<const A*>(p.sums) : w.sums;
      const int64_t size = p.sums ? classes : plan.padded;
      load<A, V, false>(sums, {columns[0], WIDE ? 1 : kWarp}, classes, level);
      load<A, V, false>(sums + size, {columns[0], WIDE ? 1 : kWarp}, classes, tilt);
    }
#pragma unroll
    for (int k = 0; k < V; ++k) {
      level[k] /= count;
      // h is an exponent times rate, here and in the sums, but for given ones
      tilt[k] *= rate * (p.sums ? A{1} : rate) / count;
    }
  }
  for (int64_t from = begin + at.row; from < end; from += kAhead * kRowLanes) {
    Word<T, V> next_s[kAhead], next_t[kAhead];
    fetch_rows<T, V, WIDE>(p.student, p.teacher, from, kRowLanes, end, columns, classes, next_s, next_t);
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int64_t row = from + i * kRowLanes;
      if (row >= end) break;
      const RowFactors<A> f = w.factors[row];
      RowAffine<A> own{exponent, exponent, 0, 0, 1, 0, 0};
      if constexpr (K == Kind::instance) own = w.affines[row];
      A dz[V] = {}, s[V], t[V];
      widen<T, V>(next_s[i], s);
      widen<T, V>(next_t[i], t);
#pragma unroll
      for (int k = 0; f.counts && k < V; ++k) {
        const bool at_label = columns[k] == f.label;
        const A u = kByClass<K> ? of_s(k, s[k]) - f.top_s : (s[k] - f.top_s) * own.scale_s;
        const A v = kByClass<K> ? of_t(k, t[k]) - f.top_t : (t[k] - f.top_t) * own.scale_t;
        A g = p.decoupled && at_label ? f.at_label : f.student * power2(u) - f.teacher * power2(v);
        if constexpr (kByClass<K>) g = (g - level[k] - (u + f.top_s) * tilt[k]) * (of_s.scale[k] * rate);
        if constexpr (K == Kind::instance) g = g * own.gain - ((s[k] - own.mean) - own.rest) * own.spread;
        if constexpr (CE) {
          const A e = power2((s[k] - f.top_raw) * static_cast<A>(kLog2e));
          g += at_label ? f.entropy_at_label : f.entropy * e - f.uniform;
        }
        dz[k] = g * factor;
      }
      store<T, V, WIDE>(static_cast<T*>(p.grad) + row * classes, columns, classes, dz);
    }
  }
}

}  // namespace kdcore::cuda
