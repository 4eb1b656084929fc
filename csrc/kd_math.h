// The scalar maths of one row, shared by every kernel. V is double or float, on the host and on the device, or a vector
// of rows in the CPU kernels, which specialise Num for it. Formulas and their sources: docs/losses.md.
//
// Every function is always inlined: the same templates are compiled for several instruction sets, and none may leave an
// out-of-line copy that the linker could pick for another.
#pragma once
#include <cmath>

#if defined(__CUDACC__)
#define KD_INLINE __host__ __device__ __forceinline__
#else
#define KD_INLINE inline __attribute__((always_inline))
#endif

namespace kdcore {

template <class V>
struct Num;

template <>
struct Num<double> {
  static KD_INLINE double of(double x) { return x; }
  static KD_INLINE double exp(double x) { return ::exp(x); }
  static KD_INLINE double log(double x) { return ::log(x); }
  static KD_INLINE double log1p(double x) { return ::log1p(x); }
  static KD_INLINE double abs(double x) { return ::fabs(x); }
  static KD_INLINE double select(bool condition, double yes, double no) { return condition ? yes : no; }
};

template <>
struct Num<float> {
  static KD_INLINE float of(double x) { return static_cast<float>(x); }
  static KD_INLINE float exp(float x) { return ::expf(x); }
  static KD_INLINE float log(float x) { return ::logf(x); }
  static KD_INLINE float log1p(float x) { return ::log1pf(x); }
  static KD_INLINE float abs(float x) { return ::fabsf(x); }
  static KD_INLINE float select(bool condition, float yes, float no) { return condition ? yes : no; }
};

// Sums over the classes that are not the label (KD without a label: over all), u the student's and v the teacher's
// scaled logits, each side shifted by a row constant of its own, usually its maximum:
// zs = sum e^u, zt = sum e^v, gap = sum e^v (v - u).
template <class V>
struct RowSums {
  V zs, zt, gap;
};

// The divergences of a row, without T^2, and their gradient with respect to u: at a class j that is not the label it is
// student * e^u_j - teacher * e^v_j, at the label it is label.
template <class V>
struct RowTerms {
  V tckd, nckd, student, teacher, label;
};

// Two classes, label against rest: probabilities and their logarithms, from the logit d; nothing goes through 1 - p.
template <class V>
struct Binary {
  V p, rest, log_p, log_rest;
};

template <class V>
KD_INLINE Binary<V> kd_binary(V d) {
  using N = Num<V>;
  const V one = V{} + 1, a = N::abs(d), e = N::exp(-a), s = N::log1p(e);
  const V large = one / (one + e), small = e * large;
  const auto up = d > V{};
  return {N::select(up, large, small), N::select(up, small, large), N::select(up, -s, -s - a),
          N::select(up, -s - a, -s)};
}

// p (log p - log q), 0 where p is.
template <class V>
KD_INLINE V kd_part(V p, V log_p, V log_q) {
  return Num<V>::select(p == V{}, V{}, p * (log_p - log_q));
}

// a / z, 0 where the sum is empty: every class in it is masked.
template <class V>
KD_INLINE V kd_over(V a, V z) {
  return Num<V>::select(z == V{}, V{}, a / z);
}

// KD over the classes in the sums: KL(q_t || q_s), as nckd.
template <class V>
KD_INLINE RowTerms<V> kd_terms(const RowSums<V>& r) {
  using N = Num<V>;
  const V one = V{} + 1, divergence = kd_over(r.gap, r.zt) + (N::log(r.zs) - N::log(r.zt));
  const V student = N::select(r.zt == V{}, V{}, kd_over(one, r.zs));
  return {V{}, N::select(r.zt == V{}, V{}, divergence), student, kd_over(one, r.zt), V{}};
}

// DKD; label_s and label_t are the label's own u and v, shifted as the sums are.
template <class V>
KD_INLINE RowTerms<V> dkd_terms(const RowSums<V>& r, V label_s, V label_t, V alpha, V beta) {
  using N = Num<V>;
  const V log_zs = N::log(r.zs), log_zt = N::log(r.zt), d_s = label_s - log_zs, d_t = label_t - log_zt;
  const Binary<V> s = kd_binary(d_s), t = kd_binary(d_t);
  const V tckd = kd_part(t.p, t.log_p, s.log_p) + kd_part(t.rest, t.log_rest, s.log_rest);
  const V nckd = N::select(r.zt == V{}, V{}, kd_over(r.gap, r.zt) + (log_zs - log_zt));
  // p_s - p_t from the smaller tails, where nothing cancels
  const V upper = t.rest - s.rest, lower = s.p - t.p;
  const V label = alpha * N::select(d_s > V{}, N::select(d_t > V{}, upper, lower), lower);
  const V among = N::select(r.zt == V{}, V{}, beta);  // no NCKD where the teacher has nothing but the label
  return {tckd, nckd, kd_over(among - label, r.zs), kd_over(among, r.zt), label};
}

// Cross-entropy of the raw logits, shifted by their maximum m: rest = sum over the others of e^(s_j - m), label =
// s_y - m, mean = mean_j s_j - m (used with label smoothing alone). Its gradient at another class is
// other * e^(s_j - m) - uniform, at the label it is at_label.
template <class V>
struct CrossEntropy {
  V loss, other, at_label;
};

template <class V>
KD_INLINE CrossEntropy<V> cross_entropy_terms(V rest, V label, V mean, double smoothing, double classes) {
  using N = Num<V>;
  const V one = V{} + 1, inverse = one / (rest + N::exp(label));
  const V ahead = N::log1p(rest * N::exp(-label)), behind = -N::log(inverse) - label;
  V loss = N::select(label > V{} - 1, ahead, behind), at_label = -rest * inverse;
  if (smoothing != 0) {  // a masked class would make 0 * inf of it
    loss = loss + N::of(smoothing) * (label - mean);
    at_label = at_label + N::of(smoothing - smoothing / classes);
  }
  return {loss, inverse, at_label};
}

}  // namespace kdcore
