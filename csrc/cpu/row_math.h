// Eight rows at once in double precision: the numbers that kd_math.h computes with on the CPU.
#pragma once

namespace kdcore::cpu::KD_ISA {

KD_INLINE d8 load8(const double* p) {
  d8 v;
  __builtin_memcpy(&v, p, 64);
  return v;
}
KD_INLINE void store8(double* p, d8 v) { __builtin_memcpy(p, &v, 64); }

// 0 below -708; no result above 708 is used.
KD_INLINE d8 exp8(d8 x) {
  constexpr double shift = 6755399441055744.0;  // 1.5 * 2^52: adding it rounds to whole numbers
  const d8 low = d8{} - 708.0, high = -low, above = x > low ? x : low, safe = above < high ? above : high;
  const d8 rounded = safe * kLog2e + shift, k = rounded - shift;
  const d8 f = fma8(k, d8{} - 1.90821492927058770002e-10, fma8(k, d8{} - 0.693147180369123816490, safe));
  // four short chains instead of a long one: eight rows wait for the result
  const d8 f2 = f * f, f4 = f2 * f2;
  auto pair = [&](int i) __attribute__((always_inline)) { return fma8(f2, d8{} + kExp[i], d8{} + kExp[i + 2]); };
  const d8 even = fma8(fma8(pair(1), f4, pair(5)), f4, pair(9)), odd = fma8(fma8(pair(0), f4, pair(4)), f4, pair(8));
  const d8 p = fma8(fma8(odd, f, even), f2, f + 1.0);
  const i8 whole = (i8)rounded - (i8)(d8{} + shift);
  const d8 value = p * (d8)((whole + 1023) << 52), zero = {};
  return x < low ? zero : x != x ? x : value;
}

// For x >= 0: -inf at 0, inf at inf.
KD_INLINE d8 log8(d8 x) {
  const i8 bits = (i8)x, over = bits - 0x3fe6a09e667f3bcd;  // of the square root of 1/2
  const i8 k = over >> 52;
  const d8 m = (d8)(bits - (k << 52)), f = (m - 1.0) / (m + 1.0), g = f * f;
  const d8 g2 = g * g;
  d8 even = d8{} + 1.0 / 23, odd = d8{} + 1.0 / 21;
  for (int i = 19; i >= 3; i -= 4) even = fma8(even, g2, d8{} + 1.0 / i);
  for (int i = 17; i >= 5; i -= 4) odd = fma8(odd, g2, d8{} + 1.0 / i);
  const d8 p = fma8(odd, g, even);
  const d8 e = __builtin_convertvector(k, d8), twice = f + f;
  const d8 value = e * 0.693147180369123816490 + (twice + (twice * g * p + e * 1.90821492927058770002e-10));
  const d8 infinity = d8{} + __builtin_inf(), least = d8{} + 2.2250738585072014e-308;
  return x != x || x == infinity ? x : x < least ? -infinity : value;
}

}  // namespace kdcore::cpu::KD_ISA

namespace kdcore {

template <>
struct Num<cpu::d8> {
  using d8 = cpu::d8;
  using i8 = cpu::i8;
  static KD_INLINE double of(double x) { return x; }
  static KD_INLINE d8 exp(d8 x) { return cpu::KD_ISA::exp8(x); }
  static KD_INLINE d8 log(d8 x) { return cpu::KD_ISA::log8(x); }
  static KD_INLINE d8 log1p(d8 x) {  // for x >= 0
    const d8 u = x + 1.0, infinity = d8{} + __builtin_inf();
    return u == infinity ? u : log(u) - ((u - 1.0) - x) / u;
  }
  static KD_INLINE d8 abs(d8 x) { return (d8)((i8)x & INT64_MAX); }
  static KD_INLINE d8 select(i8 condition, d8 yes, d8 no) { return condition ? yes : no; }
};

}  // namespace kdcore
