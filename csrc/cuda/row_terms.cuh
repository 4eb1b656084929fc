// What follows from a row's sums, in double precision: its loss, and what its gradient needs.
#pragma once
#include "row_sum.cuh"

namespace kdcore::cuda {

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

}  // namespace kdcore::cuda
