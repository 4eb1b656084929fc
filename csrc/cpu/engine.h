// From a call to the algorithm and instantiation that serve it.
#pragma once

namespace kdcore::cpu::KD_ISA {

constexpr int64_t kColumnsFrom = 8192;  // classes above which the exponentials of eight rows outgrow the cache

// Whether no shift is needed before the exponentials: n values of mean 0 and variance at most 1 are at most sqrt(n - 1)
// (Samuelson), so that with sqrt(n - 1) / T <= 40 neither a sum nor a term can leave float's range.
template <class T>
KD_INLINE bool bounded(const Context<T>& c) {
  return c.batch && (double)(c.B - 1) <= 1600 * c.p.temperature * c.p.temperature;
}

template <class T, bool CE>
void run_typed(const Context<T>& c) {
  if (c.p.normalize == Normalize::none) return run_rows<T, Affine::row, false, CE>(c);
  if (c.p.normalize == Normalize::instance) return run_rows<T, Affine::row, true, CE>(c);
  if (!bounded(c)) return run_rows<T, Affine::shifted, false, CE>(c);
  if (c.C > kColumnsFrom && c.through && !c.p.sums && !c.p.sums_out) return run_columns<T, CE>(c);
  run_rows<T, Affine::column, false, CE>(c);
}

template <class T>
void run_dtype(const Problem& p) {
  const Context<T> c(p);
  if (p.cross_entropy) {
    run_typed<T, true>(c);
  } else {
    run_typed<T, false>(c);
  }
}

void run(const Problem& p) {
  switch (p.dtype) {
    case Dtype::f32:
      return run_dtype<float>(p);
    case Dtype::f64:
      return run_dtype<double>(p);
    case Dtype::f16:
      return run_dtype<f16>(p);
    case Dtype::bf16:
      return run_dtype<bf16>(p);
  }
}

template <class T, class A = Accumulator<T>>
void col_stats_typed(const void* z, int64_t rows, int64_t classes, int64_t stride, double* mean, double* m2,
                     int threads) {
  using V = Vec<A>;
  constexpr int64_t wide = 64 * V::W, own = 5 * wide;
  const int64_t blocks = ceil_div(classes, wide);
  Arena arena = workspace(threads * own * sizeof(A) + 4096);
  A* each = arena.take<A>(threads * own);
  team(threads, [&](const Member& me) {
    A *ref = each + me.id * own, *sum = ref + wide, *square = sum + wide;
    const Range mine = share(blocks, me.id, me.size);
    for (int64_t j = mine.begin * wide; j < smaller(classes, mine.end * wide); j += wide) {
      const int64_t n = smaller(wide, classes - j);
      total_rows((const T*)z + j, rows, stride, n, ref, sum, square, square + wide, 8 * stride);
      for (int64_t k = 0; k < n; k++) {
        const double shift = (double)sum[k] / (double)rows, rest = (double)square[k] - shift * (double)sum[k];
        mean[j + k] = (double)ref[k] + shift;
        m2[j + k] = rest > 0 ? rest : 0;
      }
    }
  });
}

void col_stats(const void* z, int64_t rows, int64_t classes, int64_t stride, Dtype dtype, double* mean, double* m2,
               int threads) {
  switch (dtype) {
    case Dtype::f32:
      return col_stats_typed<float>(z, rows, classes, stride, mean, m2, threads);
    case Dtype::f64:
      return col_stats_typed<double>(z, rows, classes, stride, mean, m2, threads);
    case Dtype::f16:
      return col_stats_typed<f16>(z, rows, classes, stride, mean, m2, threads);
    case Dtype::bf16:
      return col_stats_typed<bf16>(z, rows, classes, stride, mean, m2, threads);
  }
}

}  // namespace kdcore::cpu::KD_ISA
