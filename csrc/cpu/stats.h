// Mean and variance of each class, from sums of deviations from a reference close to the mean, so that little cancels;
// a constant class has deviations of exactly 0.
#pragma once

namespace kdcore::cpu::KD_ISA {

constexpr int64_t kRowBlock = 256;  // rows summed before the sum joins the total, which keeps rounding short

// The mean of a few rows from all over the batch, which may be sorted, or begin with something special.
template <class T, class V = Vec<Accumulator<T>>>
KD_INLINE typename V::R reference(const T* z, int64_t rows, int64_t ld, int n) {
  const int k = rows < kRows ? (int)rows : kRows;
  const int64_t step = rows / k * ld;
  const auto first = V::in(z, n);
  auto d = V::set(0);
  for (int i = 1; i < k; i++) d = d + (V::in(z + i * step, n) - first);
  return V::fma(d, V::set(1.0f / k), first);
}

// Adds the deviations of R rows, and their squares, for n columns. ahead: prefetch distance in elements.
template <class T, int R, class A = Accumulator<T>>
KD_INLINE void deviations(const T* z, int64_t ld, int64_t n, const A* ref, A* sum, A* square, int64_t ahead) {
  using V = Vec<A>;
  auto step = [&](int64_t j, auto whole) __attribute__((always_inline)) {
    const auto r = V::load(ref + j);
    typename V::R d[R];
#pragma GCC unroll 8
    for (int k = 0; k < R; k++) {
      if constexpr (decltype(whole)::value) {
        d[k] = V::in(z + k * ld + j) - r;
        if (ahead) __builtin_prefetch(z + k * ld + j + ahead);
      } else {
        d[k] = V::head(V::in(z + k * ld + j, (int)(n - j)) - r, (int)(n - j));
      }
    }
    auto a = d[0], q = d[0] * d[0];
    if constexpr (R == 8) {
      auto q1 = d[1] * d[1];
      for (int k = 2; k < 8; k += 2) q = V::fma(d[k], d[k], q), q1 = V::fma(d[k + 1], d[k + 1], q1);
      a = ((d[0] + d[1]) + (d[2] + d[3])) + ((d[4] + d[5]) + (d[6] + d[7]));
      q = q + q1;
    }
    V::store(sum + j, V::load(sum + j) + a);
    V::store(square + j, V::load(square + j) + q);
  };
  int64_t j = 0;
  for (; j + V::W <= n; j += V::W) step(j, Yes{});
  if (j < n) step(j, No{});
}

template <class T, class A = Accumulator<T>>
void add_rows(const T* z, int64_t rows, int64_t ld, int64_t n, const A* ref, A* sum, A* square, int64_t ahead) {
  int64_t i = 0;
  for (; i + 8 <= rows; i += 8) deviations<T, 8>(z + i * ld, ld, n, ref, sum, square, i + 16 <= rows ? ahead : 0);
  for (; i < rows; i++) deviations<T, 1>(z + i * ld, ld, n, ref, sum, square, 0);
}

template <class A>
KD_INLINE void clear(A* p, int64_t n) {
  __builtin_memset(p, 0, n * sizeof(A));
}

// Sums of deviations from ref over all rows, for n columns; spare holds 2 * n_padded.
template <class T, class A = Accumulator<T>>
void total_rows(const T* z, int64_t rows, int64_t ld, int64_t n, A* ref, A* sum, A* square, A* spare, int64_t ahead) {
  using V = Vec<A>;
  const int64_t padded = round_up(n, V::W);
  for (int64_t j = 0; j < n; j += V::W) V::store(ref + j, reference(z + j, rows, ld, (int)smaller(V::W, n - j)));
  clear(sum, padded), clear(square, padded);
  for (int64_t i = 0; i < rows; i += kRowBlock) {
    const int64_t count = smaller(kRowBlock, rows - i);
    if (rows <= kRowBlock) {
      add_rows(z, rows, ld, n, ref, sum, square, ahead);
      break;
    }
    clear(spare, 2 * padded);
    add_rows(z + i * ld, count, ld, n, ref, spare, spare + padded, ahead);
    for (int64_t j = 0; j < padded; j += V::W) {
      V::store(sum + j, V::load(sum + j) + V::load(spare + j));
      V::store(square + j, V::load(square + j) + V::load(spare + padded + j));
    }
  }
}

// From sums to the columns' constants. The mean is ref + c in one number and its rounding, which offset takes.
template <class A>
KD_INLINE void finish_columns(Columns<A> c, const A* sum, const A* square, int64_t padded, int64_t rows, A kappa,
                              A eps) {
  using V = Vec<A>;
  const auto share_of = V::set((A)1 / (A)rows);
  for (int64_t j = 0; j < padded; j += V::W) {
    const auto ref = V::load(c.ref + j), shift = V::load(sum + j) * share_of;
    const auto var = V::max(V::set(0), V::fnma(shift, shift, V::load(square + j) * share_of));
    const auto scale = V::set(kappa) / V::sqrt(var + V::set(eps));
    const auto mean = ref + shift, part = mean - ref, rest = (ref - (mean - part)) + (shift - part);
    V::store(c.ref + j, mean);
    V::store(c.scale + j, scale);
    V::store(c.offset + j, V::set(0) - rest * scale);
  }
}

// Columns [j, j + n) of one side, finished.
template <class T, class A = Accumulator<T>>
void batch_columns(const T* z, int64_t rows, int64_t ld, int64_t n, Columns<A> c, A kappa, A eps, A* spare,
                   int64_t ahead) {
  const int64_t padded = round_up(n, Vec<A>::W);
  total_rows(z, rows, ld, n, c.ref, spare, spare + padded, spare + 2 * padded, ahead);
  finish_columns(c, spare, spare + padded, padded, rows, kappa, eps);
}

// Statistics that the caller gives; padding is never read as a result but must be finite.
template <class A>
void given_columns(const double* mean, const double* var, int64_t n, int64_t padded, Columns<A> c, A kappa,
                   double eps) {
  for (int64_t j = 0; j < padded; j++) {
    const double m = j < n ? mean[j] : 0, scale = j < n ? kappa / __builtin_sqrt(var[j] + eps) : 0;
    c.ref[j] = (A)m;
    c.scale[j] = (A)scale;
    c.offset[j] = (A)(((double)c.ref[j] - m) * scale);
  }
}

}  // namespace kdcore::cpu::KD_ISA
