// Vectors in the compiler's own terms, for any machine: 4 floats or 2 doubles. The other vec_*.h offer the same names.
#pragma once

namespace kdcore::cpu::KD_ISA {

KD_INLINE void end_streams() {}                            // what was streamed is seen by other threads
KD_INLINE d8 fma8(d8 a, d8 b, d8 c) { return a * b + c; }  // may round twice

KD_INLINE float from_bits(uint32_t x) {
  float y;
  __builtin_memcpy(&y, &x, 4);
  return y;
}
KD_INLINE uint32_t to_bits(float x) {
  uint32_t y;
  __builtin_memcpy(&y, &x, 4);
  return y;
}

KD_INLINE double widen(double x) { return x; }
KD_INLINE float widen(float x) { return x; }
KD_INLINE float widen(bf16 x) { return from_bits((uint32_t)x.bits << 16); }
KD_INLINE float widen(f16 x) {
  const uint32_t sign = (uint32_t)(x.bits & 0x8000) << 16, rest = x.bits & 0x7fff;
  if (rest >= 0x7c00) return from_bits(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  const float magnitude = from_bits(rest << 13) * from_bits(0x77800000);  // 2^112 mends the exponent, subnormals too
  return from_bits(to_bits(magnitude) | sign);
}
template <class T>
KD_INLINE T narrow(double x) {
  return (T)x;
}
template <>
KD_INLINE bf16 narrow<bf16>(double x) {  // to nearest even; NaN stays NaN
  const uint32_t b = to_bits((float)x);
  if (x != x) return {0x7fc0};
  return {(uint16_t)((b + 0x7fff + (b >> 16 & 1)) >> 16)};
}
template <>
KD_INLINE f16 narrow<f16>(double x) {  // to nearest even; beyond 65504 inf
  const uint32_t b = to_bits((float)x), sign = b >> 16 & 0x8000, a = b & 0x7fffffff;
  if (a > 0x7f800000) return {0x7e00};
  if (a >= 0x477ff000) return {(uint16_t)(sign | 0x7c00)};
  if (a < 0x38800000) {  // subnormal: the addition rounds at the right bit
    return {(uint16_t)(sign | (to_bits(from_bits(a) + 0.5f) - 0x3f000000))};
  }
  return {(uint16_t)(sign | (a - 0x38000000 + 0xfff + (a >> 13 & 1)) >> 13)};
}

template <class A>
struct Wide;
template <>
struct Wide<float> {
  typedef float R __attribute__((vector_size(16)));
  typedef int32_t I __attribute__((vector_size(16)));
  static constexpr float kRound = 12582912.0f, kLeast = -127.0f;  // 1.5 * 2^23: adding it rounds to whole numbers
  static constexpr int32_t kBias = 127, kShift = 23;
  static KD_INLINE R power_series(R f) {
    R p = f * kExp2[0] + kExp2[1];
    for (int i = 2; i < 6; i++) p = p * f + kExp2[i];
    return p;
  }
};
template <>
struct Wide<double> {
  typedef double R __attribute__((vector_size(16)));
  typedef int64_t I __attribute__((vector_size(16)));
  static constexpr double kRound = 6755399441055744.0, kLeast = -1023.0;
  static constexpr int64_t kBias = 1023, kShift = 52;
  static KD_INLINE R power_series(R f) {
    f = f * kLn2;
    R p = f * kExp[0] + kExp[1];
    for (int i = 2; i < kExpTerms; i++) p = p * f + kExp[i];
    return p;
  }
};

template <class A>
struct Vec {
  using R = typename Wide<A>::R;
  using I = typename Wide<A>::I;
  static constexpr int W = 16 / sizeof(A);
  static KD_INLINE R set(A x) { return R{} + x; }
  static KD_INLINE R load(const A* p) {
    R v;
    __builtin_memcpy(&v, p, 16);
    return v;
  }
  static KD_INLINE void store(A* p, R v) { __builtin_memcpy(p, &v, 16); }
  static KD_INLINE R fma(R a, R b, R c) { return a * b + c; }  // may round twice
  static KD_INLINE R fnma(R a, R b, R c) { return c - a * b; }
  static KD_INLINE R max(R a, R b) { return a > b ? a : b; }  // b where one is NaN
  static KD_INLINE R sqrt(R a) {
    for (int i = 0; i < W; i++) a[i] = __builtin_sqrt(a[i]);
    return a;
  }
  static KD_INLINE R head(R v, int n) { return head_or(v, n, 0); }  // lanes below n, the others 0
  static KD_INLINE R head_or(R v, int n, A other) {
    for (int i = n; i < W; i++) v[i] = other;
    return v;
  }
  static KD_INLINE R without(R v, int64_t lane, A other) {  // one lane replaced, if there is such a lane
    if ((uint64_t)lane < W) v[lane] = other;
    return v;
  }
  static KD_INLINE R where_nonzero(R test, R v) { return test != R{} ? v : R{}; }
  static KD_INLINE A sum(R v) {
    A total = v[0];
    for (int i = 1; i < W; i++) total += v[i];
    return total;
  }
  static KD_INLINE A maximum(R v) {
    A most = v[0];
    for (int i = 1; i < W; i++) most = v[i] > most || v[i] != v[i] ? v[i] : most;
    return most;
  }
  // 2^v to the last digits of A, for v up to 127 (1023); 0 far below.
  static KD_INLINE R exp2(R v) {
    v = max(set(Wide<A>::kLeast), v);
    const R shifted = v + Wide<A>::kRound, p = Wide<A>::power_series(v - (shifted - Wide<A>::kRound));
    const I whole = (I)shifted - (I)set(Wide<A>::kRound);
    return p * (R)((whole + Wide<A>::kBias) << Wide<A>::kShift);
  }

  // Logits of type T to and from registers; n: the first n alone, the other lanes 0.
  template <class T>
  static KD_INLINE R in(const T* p, int n = W) {
    R v = {};
    for (int i = 0; i < n; i++) v[i] = widen(p[i]);
    return v;
  }
  template <class T>
  static KD_INLINE void out(T* p, R v, int n = W) {
    for (int i = 0; i < n; i++) p[i] = narrow<T>(v[i]);
  }
  template <class T>
  static KD_INLINE void stream(T* p, R v) {  // past the caches, where the machine can; p is aligned
    out(p, v);
  }
  // Adds the sums of 8 vectors that lie one after the other to 8 numbers.
  static KD_INLINE void sum8(const A* p, double* out) {
    for (int i = 0; i < 8; i++) out[i] += sum(load(p + W * i));
  }
};

}  // namespace kdcore::cpu::KD_ISA
