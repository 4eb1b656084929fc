// The scalars of up to eight rows: from their sums to their losses and to the factors of their gradients.
#pragma once

namespace kdcore::cpu::KD_ISA {

enum Sum { kZs, kZt, kGap, kMomentS, kMomentT, kRest, kSums };  // kMoment: sum e (s - ref), for instance alone

// What is known of eight rows before their gradient.
template <class A>
struct Rows {
  alignas(64) double sum[kSums][kRows];
  alignas(64) double label_s[kRows], label_t[kRows];     // the label's own scaled and shifted logit, in powers of 2
  alignas(64) double label_top[kRows], mean_top[kRows];  // for cross-entropy: s_y and mean s, less the maximum
  A ref_s[kRows], ref_t[kRows], scale_s[kRows], scale_t[kRows];  // of a row: u = (z - ref) * scale
  A top[kRows];                                                  // the largest raw logit
  double mean[kRows], deviation[kRows], label_gap[kRows];        // instance: of the row, and s_y - ref_s
};

// Gradient of row k: student e^u - teacher e^v (+ (s - ref) slope + level) + other e^(s - top) - uniform, and at the
// label: label (+ ...) + at_label.
template <class A>
struct RowFactors {
  alignas(64) A student[kRows], teacher[kRows], label[kRows], other[kRows], uniform[kRows], at_label[kRows];
  A slope[kRows], level[kRows], center[kRows];
};

template <class A>
KD_INLINE void store_factor(A* out, d8 value) {
  typedef A a8 __attribute__((vector_size(kRows * sizeof(A))));
  const a8 narrow = __builtin_convertvector(value, a8);
  __builtin_memcpy(out, &narrow, sizeof narrow);
}

// Loss terms and factors of rows [first, first + n); the other lanes compute on ones.
template <class T, class A = Accumulator<T>>
void finish_rows(const Context<T>& c, int64_t first, int n, Rows<A>& rows, RowFactors<A>& f) {
  const Problem& p = c.p;
  alignas(64) double weight[kRows] = {}, beta[kRows] = {};
  for (int k = 0; k < n; k++) weight[k] = c.weight(first + k), beta[k] = c.beta(first + k);
  for (int k = n; k < kRows; k++) {
    for (int q = 0; q < kSums; q++) rows.sum[q][k] = 1;
    rows.label_s[k] = rows.label_t[k] = rows.label_top[k] = rows.mean_top[k] = 0;
  }
  const d8 w = load8(weight), square = d8{} + p.temperature * p.temperature, b = load8(beta);
  const RowSums<d8> sums = {load8(rows.sum[kZs]), load8(rows.sum[kZt]), load8(rows.sum[kGap]) * kLn2};
  const d8 label_s = load8(rows.label_s) * kLn2, label_t = load8(rows.label_t) * kLn2;
  const RowTerms<d8> t = p.decoupled ? dkd_terms(sums, label_s, label_t, d8{} + p.alpha, b) : kd_terms(sums);
  const d8 kd = p.decoupled ? p.alpha * t.tckd + b * t.nckd : t.nckd, scale = w * c.gradient;
  store_factor(f.student, t.student * scale);
  store_factor(f.teacher, t.teacher * scale);
  store_factor(f.label, t.label * scale);
  d8 ce = {};
  if (p.cross_entropy) {
    const auto x = cross_entropy_terms(load8(rows.sum[kRest]), load8(rows.label_top), load8(rows.mean_top),
                                       p.label_smoothing, (double)c.C);
    const d8 wc = w * p.ce_weight;
    ce = x.loss;
    store_factor(f.other, x.other * wc);
    store_factor(f.at_label, x.at_label * wc);
    store_factor(f.uniform, wc * (p.label_smoothing / c.C));
  }
  if (!p.terms) return;
  const d8 out[4] = {kd * square, p.decoupled ? t.tckd * square : d8{}, p.decoupled ? t.nckd * square : d8{}, ce};
  for (int q = 0; q < 4; q++) __builtin_memcpy(p.terms + q * c.B + first, &out[q], n * sizeof(double));
}

// Instance normalisation: the factors of the row's gradient in z, from those in h. The sum of the gradient in h over
// the classes is 0, so that its mean vanishes and any reference serves in the sum of h times it.
template <class A>
KD_INLINE void through_instance(const Rows<A>& rows, RowFactors<A>& f, int n, int64_t classes, double eps) {
  for (int k = 0; k < n; k++) {
    const double dev = rows.deviation[k], gain = 1 / (dev + eps);
    const double moment = (double)f.student[k] * rows.sum[kMomentS][k] - (double)f.teacher[k] * rows.sum[kMomentT][k] +
                          (double)f.label[k] * rows.label_gap[k];
    const double slope = dev == 0 ? 0 : -gain * gain * moment / ((double)(classes - 1) * dev);
    f.student[k] = (A)(f.student[k] * gain);
    f.teacher[k] = (A)(f.teacher[k] * gain);
    f.label[k] = (A)(f.label[k] * gain);
    f.slope[k] = (A)slope;
    f.center[k] = (A)rows.mean[k];
    f.level[k] = (A)(slope * ((double)f.center[k] - rows.mean[k]));
  }
}

}  // namespace kdcore::cpu::KD_ISA
