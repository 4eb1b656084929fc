// Vectors of 16 floats or 8 doubles. See vec_generic.h for what each function means.
#pragma once

namespace kdcore::cpu::KD_ISA {

KD_INLINE void end_streams() { _mm_sfence(); }
KD_INLINE d8 fma8(d8 a, d8 b, d8 c) { return _mm512_fmadd_pd(a, b, c); }

template <class A>
struct Vec;

template <>
struct Vec<float> {
  using R = __m512;
  static constexpr int W = 16;
  static KD_INLINE R set(float x) { return _mm512_set1_ps(x); }
  static KD_INLINE R load(const float* p) { return _mm512_loadu_ps(p); }
  static KD_INLINE void store(float* p, R v) { _mm512_storeu_ps(p, v); }
  static KD_INLINE R fma(R a, R b, R c) { return _mm512_fmadd_ps(a, b, c); }
  static KD_INLINE R fnma(R a, R b, R c) { return _mm512_fnmadd_ps(a, b, c); }
  static KD_INLINE R max(R a, R b) { return _mm512_max_ps(a, b); }
  static KD_INLINE R sqrt(R a) { return _mm512_sqrt_ps(a); }
  static KD_INLINE __mmask16 first(int n) { return n >= 16 ? (__mmask16)0xffff : (__mmask16)((1u << n) - 1); }
  static KD_INLINE R head(R v, int n) { return _mm512_maskz_mov_ps(first(n), v); }
  static KD_INLINE R head_or(R v, int n, float other) { return _mm512_mask_mov_ps(set(other), first(n), v); }
  static KD_INLINE R without(R v, int64_t lane, float other) {
    return (uint64_t)lane < 16 ? _mm512_mask_mov_ps(v, (__mmask16)(1u << lane), set(other)) : v;
  }
  static KD_INLINE R where_nonzero(R test, R v) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(test, _mm512_setzero_ps(), _CMP_NEQ_UQ), v);
  }
  static KD_INLINE float sum(R v) { return _mm512_reduce_add_ps(v); }
  static KD_INLINE float maximum(R v) { return _mm512_reduce_max_ps(v); }
  static KD_INLINE R exp2(R v) {
    const R k = _mm512_roundscale_ps(v, 8), f = v - k;
    R p = set(kExp2[0]);
    for (int i = 1; i < 6; i++) p = fma(p, f, set(kExp2[i]));
    return _mm512_scalef_ps(p, k);
  }

  static KD_INLINE R up(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }
  static KD_INLINE __m256i down(R v) {  // to nearest even; NaN stays NaN
    const __m512i x = _mm512_castps_si512(v), odd = _mm512_and_si512(_mm512_srli_epi32(x, 16), _mm512_set1_epi32(1));
    const __m512i r = _mm512_add_epi32(_mm512_add_epi32(x, _mm512_set1_epi32(0x7fff)), odd);
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(r, nan, _mm512_set1_epi32(0x7fc00000)), 16));
  }

  static KD_INLINE R in(const float* p) { return _mm512_loadu_ps(p); }
  static KD_INLINE R in(const float* p, int n) { return _mm512_maskz_loadu_ps(first(n), p); }
  static KD_INLINE void out(float* p, R v) { _mm512_storeu_ps(p, v); }
  static KD_INLINE void out(float* p, R v, int n) { _mm512_mask_storeu_ps(p, first(n), v); }
  static KD_INLINE void stream(float* p, R v) { _mm512_stream_ps(p, v); }

  static KD_INLINE R in(const bf16* p) { return up(_mm256_loadu_si256((const __m256i*)p)); }
  static KD_INLINE R in(const bf16* p, int n) { return up(_mm256_maskz_loadu_epi16(first(n), p)); }
  static KD_INLINE void out(bf16* p, R v) { _mm256_storeu_si256((__m256i*)p, down(v)); }
  static KD_INLINE void out(bf16* p, R v, int n) { _mm256_mask_storeu_epi16(p, first(n), down(v)); }
  static KD_INLINE void stream(bf16* p, R v) { _mm256_stream_si256((__m256i*)p, down(v)); }

  static KD_INLINE __m256i half(R v) { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static KD_INLINE R in(const f16* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
  static KD_INLINE R in(const f16* p, int n) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p)); }
  static KD_INLINE void out(f16* p, R v) { _mm256_storeu_si256((__m256i*)p, half(v)); }
  static KD_INLINE void out(f16* p, R v, int n) { _mm256_mask_storeu_epi16(p, first(n), half(v)); }
  static KD_INLINE void stream(f16* p, R v) { _mm256_stream_si256((__m256i*)p, half(v)); }

  // The sums of 8 vectors that lie one after the other, as 8 numbers.
  static KD_INLINE void sum8(const float* p, double* out) {
    R q[4];
    for (int i = 0; i < 4; i++) {
      const R a = load(p + 32 * i), b = load(p + 32 * i + 16);
      q[i] = _mm512_unpacklo_ps(a, b) + _mm512_unpackhi_ps(a, b);
    }
    R h[2];
    for (int i = 0; i < 2; i++) {
      const __m512d a = _mm512_castps_pd(q[2 * i]), b = _mm512_castps_pd(q[2 * i + 1]);
      h[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b)) + _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    }
    const R w = _mm512_shuffle_f32x4(h[0], h[1], 0x88) + _mm512_shuffle_f32x4(h[0], h[1], 0xdd);
    const __m512 z = w + _mm512_shuffle_f32x4(w, w, 0xb1);  // {rows 0-3, the same, rows 4-7, the same}
    const __m256 r = _mm256_set_m128(_mm512_extractf32x4_ps(z, 2), _mm512_castps512_ps128(z));
    _mm512_storeu_pd(out, _mm512_loadu_pd(out) + _mm512_cvtps_pd(r));
  }
};

template <>
struct Vec<double> {
  using R = __m512d;
  static constexpr int W = 8;
  static KD_INLINE R set(double x) { return _mm512_set1_pd(x); }
  static KD_INLINE R load(const double* p) { return _mm512_loadu_pd(p); }
  static KD_INLINE void store(double* p, R v) { _mm512_storeu_pd(p, v); }
  static KD_INLINE R fma(R a, R b, R c) { return _mm512_fmadd_pd(a, b, c); }
  static KD_INLINE R fnma(R a, R b, R c) { return _mm512_fnmadd_pd(a, b, c); }
  static KD_INLINE R max(R a, R b) { return _mm512_max_pd(a, b); }
  static KD_INLINE R sqrt(R a) { return _mm512_sqrt_pd(a); }
  static KD_INLINE __mmask8 first(int n) { return n >= 8 ? (__mmask8)0xff : (__mmask8)((1u << n) - 1); }
  static KD_INLINE R head(R v, int n) { return _mm512_maskz_mov_pd(first(n), v); }
  static KD_INLINE R head_or(R v, int n, double other) { return _mm512_mask_mov_pd(set(other), first(n), v); }
  static KD_INLINE R without(R v, int64_t lane, double other) {
    return (uint64_t)lane < 8 ? _mm512_mask_mov_pd(v, (__mmask8)(1u << lane), set(other)) : v;
  }
  static KD_INLINE R where_nonzero(R test, R v) {
    return _mm512_maskz_mov_pd(_mm512_cmp_pd_mask(test, _mm512_setzero_pd(), _CMP_NEQ_UQ), v);
  }
  static KD_INLINE double sum(R v) { return _mm512_reduce_add_pd(v); }
  static KD_INLINE double maximum(R v) { return _mm512_reduce_max_pd(v); }
  static KD_INLINE R exp2(R v) {
    const R k = _mm512_roundscale_pd(v, 8), f = (v - k) * set(kLn2);
    R p = set(kExp[0]);
    for (int i = 1; i < kExpTerms; i++) p = fma(p, f, set(kExp[i]));
    return _mm512_scalef_pd(p, k);
  }
  static KD_INLINE R in(const double* p) { return _mm512_loadu_pd(p); }
  static KD_INLINE R in(const double* p, int n) { return _mm512_maskz_loadu_pd(first(n), p); }
  static KD_INLINE void out(double* p, R v) { _mm512_storeu_pd(p, v); }
  static KD_INLINE void out(double* p, R v, int n) { _mm512_mask_storeu_pd(p, first(n), v); }
  static KD_INLINE void stream(double* p, R v) { _mm512_stream_pd(p, v); }
  static KD_INLINE void sum8(const double* p, double* out) {
    for (int i = 0; i < 8; i++) out[i] += sum(load(p + 8 * i));
  }
};

}  // namespace kdcore::cpu::KD_ISA
