// Vectors of 8 floats or 4 doubles. See vec_generic.h for what each function means.
#pragma once

namespace kdcore::cpu::KD_ISA {

KD_INLINE void end_streams() { _mm_sfence(); }
KD_INLINE d8 fma8(d8 a, d8 b, d8 c) {
  __m256d x[2], y[2], z[2];
  __builtin_memcpy(x, &a, 64), __builtin_memcpy(y, &b, 64), __builtin_memcpy(z, &c, 64);
  for (int i = 0; i < 2; i++) z[i] = _mm256_fmadd_pd(x[i], y[i], z[i]);
  __builtin_memcpy(&c, z, 64);
  return c;
}

template <class A>
struct Vec;

// Lanes below n, all ones.
KD_INLINE __m256i lanes32(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
KD_INLINE __m256i lanes64(int n) { return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3)); }

template <>
struct Vec<float> {
  using R = __m256;
  static constexpr int W = 8;
  static KD_INLINE R set(float x) { return _mm256_set1_ps(x); }
  static KD_INLINE R load(const float* p) { return _mm256_loadu_ps(p); }
  static KD_INLINE void store(float* p, R v) { _mm256_storeu_ps(p, v); }
  static KD_INLINE R fma(R a, R b, R c) { return _mm256_fmadd_ps(a, b, c); }
  static KD_INLINE R fnma(R a, R b, R c) { return _mm256_fnmadd_ps(a, b, c); }
  static KD_INLINE R max(R a, R b) { return _mm256_max_ps(a, b); }
  static KD_INLINE R sqrt(R a) { return _mm256_sqrt_ps(a); }
  static KD_INLINE R head(R v, int n) { return _mm256_and_ps(v, _mm256_castsi256_ps(lanes32(n))); }
  static KD_INLINE R head_or(R v, int n, float other) {
    return _mm256_blendv_ps(set(other), v, _mm256_castsi256_ps(lanes32(n)));
  }
  static KD_INLINE R without(R v, int64_t lane, float other) {
    if ((uint64_t)lane >= 8) return v;
    const __m256i at = _mm256_cmpeq_epi32(_mm256_set1_epi32((int)lane), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    return _mm256_blendv_ps(v, set(other), _mm256_castsi256_ps(at));
  }
  static KD_INLINE R where_nonzero(R test, R v) {
    return _mm256_and_ps(v, _mm256_cmp_ps(test, _mm256_setzero_ps(), _CMP_NEQ_UQ));
  }
  static KD_INLINE float sum(R v) {
    __m128 h = _mm256_castps256_ps128(v) + _mm256_extractf128_ps(v, 1);
    h = h + _mm_movehl_ps(h, h);
    return _mm_cvtss_f32(_mm_add_ss(h, _mm_movehdup_ps(h)));
  }
  static KD_INLINE float maximum(R v) {
    __m128 h = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    h = _mm_max_ps(h, _mm_movehl_ps(h, h));
    return _mm_cvtss_f32(_mm_max_ss(h, _mm_movehdup_ps(h)));
  }
  static KD_INLINE R exp2(R v) {
    v = max(set(-127.0f), v);  // where the power becomes 0; second operand: NaN stays
    const R k = _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), f = v - k;
    R p = set(kExp2[0]);
    for (int i = 1; i < 6; i++) p = fma(p, f, set(kExp2[i]));
    const __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(k), _mm256_set1_epi32(127)), 23);
    return p * _mm256_castsi256_ps(power);
  }

  static KD_INLINE R up(__m128i x) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16)); }
  static KD_INLINE __m128i down(R v) {  // to nearest even; NaN stays NaN
    const __m256i x = _mm256_castps_si256(v), odd = _mm256_and_si256(_mm256_srli_epi32(x, 16), _mm256_set1_epi32(1));
    __m256i r = _mm256_add_epi32(_mm256_add_epi32(x, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    r = _mm256_srli_epi32(_mm256_blendv_epi8(r, _mm256_set1_epi32(0x7fc00000), nan), 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1));
  }
  static KD_INLINE __m128i in16(const uint16_t* p, int n) {
    alignas(16) uint16_t few[8] = {};
    for (int i = 0; i < n; i++) few[i] = p[i];
    return _mm_load_si128((const __m128i*)few);
  }
  static KD_INLINE void out16(uint16_t* p, __m128i v, int n) {
    alignas(16) uint16_t few[8];
    _mm_store_si128((__m128i*)few, v);
    for (int i = 0; i < n; i++) p[i] = few[i];
  }

  static KD_INLINE R in(const float* p) { return _mm256_loadu_ps(p); }
  static KD_INLINE R in(const float* p, int n) { return _mm256_maskload_ps(p, lanes32(n)); }
  static KD_INLINE void out(float* p, R v) { _mm256_storeu_ps(p, v); }
  static KD_INLINE void out(float* p, R v, int n) { _mm256_maskstore_ps(p, lanes32(n), v); }
  static KD_INLINE void stream(float* p, R v) { _mm256_stream_ps(p, v); }

  static KD_INLINE R in(const bf16* p) { return up(_mm_loadu_si128((const __m128i*)p)); }
  static KD_INLINE R in(const bf16* p, int n) { return up(in16((const uint16_t*)p, n)); }
  static KD_INLINE void out(bf16* p, R v) { _mm_storeu_si128((__m128i*)p, down(v)); }
  static KD_INLINE void out(bf16* p, R v, int n) { out16((uint16_t*)p, down(v), n); }
  static KD_INLINE void stream(bf16* p, R v) { _mm_stream_si128((__m128i*)p, down(v)); }

  static KD_INLINE __m128i half(R v) { return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static KD_INLINE R in(const f16* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
  static KD_INLINE R in(const f16* p, int n) { return _mm256_cvtph_ps(in16((const uint16_t*)p, n)); }
  static KD_INLINE void out(f16* p, R v) { _mm_storeu_si128((__m128i*)p, half(v)); }
  static KD_INLINE void out(f16* p, R v, int n) { out16((uint16_t*)p, half(v), n); }
  static KD_INLINE void stream(f16* p, R v) { _mm_stream_si128((__m128i*)p, half(v)); }

  // The sums of 8 vectors that lie one after the other, as 8 numbers.
  static KD_INLINE void sum8(const float* p, double* out) {
    R q[4];
    for (int i = 0; i < 4; i++) q[i] = _mm256_hadd_ps(load(p + 16 * i), load(p + 16 * i + 8));
    const R a = _mm256_hadd_ps(q[0], q[1]), b = _mm256_hadd_ps(q[2], q[3]);
    const __m128 low = _mm256_castps256_ps128(a) + _mm256_extractf128_ps(a, 1);
    const __m128 high = _mm256_castps256_ps128(b) + _mm256_extractf128_ps(b, 1);
    _mm256_storeu_pd(out, _mm256_loadu_pd(out) + _mm256_cvtps_pd(low));
    _mm256_storeu_pd(out + 4, _mm256_loadu_pd(out + 4) + _mm256_cvtps_pd(high));
  }
};

template <>
struct Vec<double> {
  using R = __m256d;
  static constexpr int W = 4;
  static KD_INLINE R set(double x) { return _mm256_set1_pd(x); }
  static KD_INLINE R load(const double* p) { return _mm256_loadu_pd(p); }
  static KD_INLINE void store(double* p, R v) { _mm256_storeu_pd(p, v); }
  static KD_INLINE R fma(R a, R b, R c) { return _mm256_fmadd_pd(a, b, c); }
  static KD_INLINE R fnma(R a, R b, R c) { return _mm256_fnmadd_pd(a, b, c); }
  static KD_INLINE R max(R a, R b) { return _mm256_max_pd(a, b); }
  static KD_INLINE R sqrt(R a) { return _mm256_sqrt_pd(a); }
  static KD_INLINE R head(R v, int n) { return _mm256_and_pd(v, _mm256_castsi256_pd(lanes64(n))); }
  static KD_INLINE R head_or(R v, int n, double other) {
    return _mm256_blendv_pd(set(other), v, _mm256_castsi256_pd(lanes64(n)));
  }
  static KD_INLINE R without(R v, int64_t lane, double other) {
    if ((uint64_t)lane >= 4) return v;
    const __m256i at = _mm256_cmpeq_epi64(_mm256_set1_epi64x(lane), _mm256_setr_epi64x(0, 1, 2, 3));
    return _mm256_blendv_pd(v, set(other), _mm256_castsi256_pd(at));
  }
  static KD_INLINE R where_nonzero(R test, R v) {
    return _mm256_and_pd(v, _mm256_cmp_pd(test, _mm256_setzero_pd(), _CMP_NEQ_UQ));
  }
  static KD_INLINE double sum(R v) {
    const __m128d h = _mm256_castpd256_pd128(v) + _mm256_extractf128_pd(v, 1);
    return _mm_cvtsd_f64(_mm_add_sd(h, _mm_unpackhi_pd(h, h)));
  }
  static KD_INLINE double maximum(R v) {
    const __m128d h = _mm_max_pd(_mm256_castpd256_pd128(v), _mm256_extractf128_pd(v, 1));
    return _mm_cvtsd_f64(_mm_max_sd(h, _mm_unpackhi_pd(h, h)));
  }
  static KD_INLINE R exp2(R v) {
    v = max(set(-1023.0), v);  // where the power becomes 0; second operand: NaN stays
    const R k = _mm256_round_pd(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), f = (v - k) * set(kLn2);
    R p = set(kExp[0]);
    for (int i = 1; i < kExpTerms; i++) p = fma(p, f, set(kExp[i]));
    const __m256i whole = _mm256_cvtepi32_epi64(_mm256_cvtpd_epi32(k));
    return p * _mm256_castsi256_pd(_mm256_slli_epi64(_mm256_add_epi64(whole, _mm256_set1_epi64x(1023)), 52));
  }
  static KD_INLINE R in(const double* p) { return _mm256_loadu_pd(p); }
  static KD_INLINE R in(const double* p, int n) { return _mm256_maskload_pd(p, lanes64(n)); }
  static KD_INLINE void out(double* p, R v) { _mm256_storeu_pd(p, v); }
  static KD_INLINE void out(double* p, R v, int n) { _mm256_maskstore_pd(p, lanes64(n), v); }
  static KD_INLINE void stream(double* p, R v) { _mm256_stream_pd(p, v); }
  static KD_INLINE void sum8(const double* p, double* out) {
    for (int i = 0; i < 8; i++) out[i] += sum(load(p + 4 * i));
  }
};

}  // namespace kdcore::cpu::KD_ISA
