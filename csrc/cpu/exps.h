// The pass over the exponentials: row sums, and the exponentials themselves where the gradient will want them.
#pragma once

namespace kdcore::cpu::KD_ISA {

// Where the scale of a logit comes from: its row (none, instance), its class, or its class less a maximum of the row.
enum class Affine { row, column, shifted };

// The exponentials of rows, [rows, stride] each; rest: of the raw logits, for cross-entropy.
template <class A>
struct Scratch {
  A *student, *teacher, *rest;
  int64_t stride;
  KD_INLINE Scratch at(int row, int64_t j) const {
    const int64_t o = row * stride + j;
    return {student + o, teacher + o, rest + o, stride};
  }
};

// What to prefetch while a vector is worked on: its like some rows below, and in a block some columns away.
struct Ahead {
  int64_t rows, block;
};

// Columns [first, first + n) of the pair's rows; the pointers are to the first of them.
template <class T>
struct Tile {
  using A = Accumulator<T>;
  const T *s, *t;
  int64_t lds, ldt, first, n;
  Columns<A> of_s, of_t;
};

// Calls step(j, whole) over the vectors of n columns, with whole = No at the vectors that hold a label and at the
// partial one at the end. labels: columns, any that is not in [0, n) is none of these.
template <int W, int R, class Step>
KD_INLINE void around_labels(int64_t n, const int64_t* labels, Step step) {
  int64_t stop[R + 1], whole = n / W;
  for (int r = 0; r < R; r++) stop[r] = labels[r] >= 0 && labels[r] < whole * W ? labels[r] / W : whole;
  if (R == 2 && stop[1] < stop[0]) {
    const int64_t swap = stop[0];
    stop[0] = stop[1], stop[1] = swap;
  }
  stop[R] = whole;
  int64_t v = 0;
  for (int r = 0; r <= R; r++) {
    for (; v < stop[r]; v++) step(v * W, Yes{});
    if (v < whole && r < R && v == stop[r]) step(v++ * W, No{});
  }
  if (whole * W < n) step(whole * W, No{});
}

// A row on its way through a tile. Plain members, not arrays over the rows: they stay in registers.
template <class T, class V = Vec<Accumulator<T>>>
struct Running {
  using X = typename V::R;
  using A = Accumulator<T>;
  const T *s, *t;
  A *student, *teacher, *others;  // where exponentials are kept
  int64_t skip, label;
  X zs = V::set(0), zt = zs, gap = zs, moment_s = zs, moment_t = zs, rest = zs;
  X ref_s, ref_t, scale_s, scale_t, top;

  KD_INLINE Running(const Tile<T>& x, const Rows<A>& rows, int k, int r, const int64_t* skips, const int64_t* labels,
                    Scratch<A> keep)
      : s(x.s + r * x.lds),
        t(x.t + r * x.ldt),
        student(keep.student + r * keep.stride),
        teacher(keep.teacher + r * keep.stride),
        others(keep.rest + r * keep.stride),
        skip(skips[r]),
        label(labels[r]),
        ref_s(V::set(rows.ref_s[k + r])),
        ref_t(V::set(rows.ref_t[k + r])),
        scale_s(V::set(rows.scale_s[k + r])),
        scale_t(V::set(rows.scale_t[k + r])),
        top(V::set(rows.top[k + r])) {}

  template <bool MOMENTS, bool CE>
  KD_INLINE void store(A* out) const {
    constexpr int next = kRows * V::W;
    V::store(out, zs), V::store(out + next, zt), V::store(out + 2 * next, gap);
    if constexpr (MOMENTS) V::store(out + 3 * next, moment_s), V::store(out + 4 * next, moment_t);
    if constexpr (CE) V::store(out + 5 * next, rest);
  }
};

// Sums of R rows, 1 or 2, over a tile, as vectors, one after the other, in partial[sum][row]; with KEEP also the
// exponentials. Labels are columns of the tile (skips: left out of u and v; labels: left out of the cross-entropy's
// sum).
template <class T, Affine F, bool MOMENTS, bool CE, bool KEEP, int R, class A = Accumulator<T>>
KD_NOINLINE void exp_rows(const Tile<T>& x, const Rows<A>& rows, int k, const int64_t* skips, const int64_t* labels,
                          Scratch<A> keep, A* partial, Ahead ahead) {
  using V = Vec<A>;
  using X = typename V::R;
  constexpr bool select = F != Affine::column && !MOMENTS;  // a masked class: 0 * inf is not added
  Running<T> first(x, rows, k, 0, skips, labels, keep), second(x, rows, k, R - 1, skips, labels, keep);
  const X log2e = V::set((A)kLog2e);
  const int64_t n = x.n, rows_ahead = ahead.rows * x.lds;
  const Columns<A> of_s = x.of_s, of_t = x.of_t;
  around_labels<V::W, R>(n, CE ? labels : skips, [&](int64_t j, auto whole) __attribute__((always_inline)) {
    constexpr bool kWhole = decltype(whole)::value;
    const int left = (int)smaller(V::W, n - j);
    X cs, as, bs, ct, at, bt;
    if constexpr (F != Affine::row) {
      cs = V::load(of_s.ref + j), as = V::load(of_s.scale + j), bs = V::load(of_s.offset + j);
      ct = V::load(of_t.ref + j), at = V::load(of_t.scale + j), bt = V::load(of_t.offset + j);
    }
    auto row = [&](Running<T>& q) __attribute__((always_inline)) {
      const X s = kWhole ? V::in(q.s + j) : V::in(q.s + j, left), t = kWhole ? V::in(q.t + j) : V::in(q.t + j, left);
      if (kWhole && rows_ahead)
        __builtin_prefetch(q.s + j + rows_ahead, 0, KEEP ? 2 : 3),
            __builtin_prefetch(q.t + j + rows_ahead, 0, KEEP ? 2 : 3);
      if constexpr (kWhole && !KEEP) {
        __builtin_prefetch(q.s + j + ahead.block, 0, 2), __builtin_prefetch(q.t + j + ahead.block, 0, 2);
      }
      X ds, u, v;
      if constexpr (F == Affine::row) {
        ds = s - q.ref_s;
        u = ds * q.scale_s, v = (t - q.ref_t) * q.scale_t;
      } else {
        u = V::fma(s - cs, as, bs), v = V::fma(t - ct, at, bt);
        if constexpr (F == Affine::shifted) u = u - q.ref_s, v = v - q.ref_t;
      }
      X eu = V::exp2(u), ev = V::exp2(v), d = v - u, ec;
      if constexpr (CE) ec = V::exp2((s - q.top) * log2e);
      if constexpr (!kWhole) {
        eu = V::head(V::without(eu, q.skip - j, 0), left), ev = V::head(V::without(ev, q.skip - j, 0), left);
        d = V::head(V::without(d, q.skip - j, 0), left);
        if constexpr (MOMENTS) ds = V::head(ds, left);
        if constexpr (CE) ec = V::head(V::without(ec, q.label - j, 0), left);
      }
      if constexpr (select) d = V::where_nonzero(ev, d);
      if constexpr (KEEP) {
        V::store(q.student + j, eu), V::store(q.teacher + j, ev);
        if constexpr (CE) V::store(q.others + j, ec);
      }
      q.zs = q.zs + eu, q.zt = q.zt + ev, q.gap = V::fma(ev, d, q.gap);
      if constexpr (MOMENTS) q.moment_s = V::fma(eu, ds, q.moment_s), q.moment_t = V::fma(ev, ds, q.moment_t);
      if constexpr (CE) q.rest = q.rest + ec;
    };
    row(first);
    if constexpr (R == 2) row(second);
  });
  first.template store<MOMENTS, CE>(partial + k * V::W);
  if constexpr (R == 2) second.template store<MOMENTS, CE>(partial + (k + 1) * V::W);
}

// n <= 8 rows of a tile, two at a time, added to rows.sum. x.s and x.t are those of the first row; skip and label hold
// columns of the whole row, -1 for none.
template <class T, Affine F, bool MOMENTS, bool CE, bool KEEP, class A = Accumulator<T>>
void exp_tile(Tile<T> x, Rows<A>& rows, int n, const int64_t* skip, const int64_t* label, Scratch<A> keep,
              Ahead ahead) {
  using V = Vec<A>;
  alignas(64) A partial[kSums * kRows * V::W];
  if (n < kRows) __builtin_memset(partial, 0, sizeof partial);
  int64_t at[2], of[2];
  for (int k = 0; k < n; k += 2) {
    for (int r = 0; r < 2; r++) {
      const int row = k + r < n ? k + r : k;
      at[r] = skip[row] < 0 ? -1 : skip[row] - x.first, of[r] = label[row] < 0 ? -1 : label[row] - x.first;
    }
    const Scratch<A> to = KEEP ? keep.at(k, 0) : keep;
    if (k + 1 < n) {
      exp_rows<T, F, MOMENTS, CE, KEEP, 2>(x, rows, k, at, of, to, partial, ahead);
    } else {
      exp_rows<T, F, MOMENTS, CE, KEEP, 1>(x, rows, k, at, of, to, partial, ahead);
    }
    x.s += 2 * x.lds, x.t += 2 * x.ldt;
  }
  for (int q = 0; q < kSums; q++) {
    if ((q == kMomentS || q == kMomentT) && !MOMENTS) continue;
    if (q == kRest && !CE) continue;
    V::sum8(partial + q * kRows * V::W, rows.sum[q]);
  }
}

// The largest logit of a row but the skipped one; scaled by its class where a class is given.
template <class T, bool COLUMNS, class A = Accumulator<T>>
KD_NOINLINE A row_maximum(const T* z, int64_t n, int64_t skip, Columns<A> c) {
  using V = Vec<A>;
  using X = typename V::R;
  const X least = V::set(-(A)__builtin_inf());
  X most[4] = {least, least, least, least};
  auto value = [&](int64_t j, X x) __attribute__((always_inline)) {
    return COLUMNS ? V::fma(x - V::load(c.ref + j), V::load(c.scale + j), V::load(c.offset + j)) : x;
  };
  auto plain = [&](int64_t from, int64_t to) __attribute__((always_inline)) {
    int64_t j = from;
    for (; j + 4 * V::W <= to; j += 4 * V::W)
      for (int k = 0; k < 4; k++) most[k] = V::max(most[k], value(j + k * V::W, V::in(z + j + k * V::W)));
    for (; j < to; j += V::W) most[0] = V::max(most[0], value(j, V::in(z + j)));
  };
  auto masked = [&](int64_t j) __attribute__((always_inline)) {
    const int left = (int)smaller(V::W, n - j);
    const X x = V::without(value(j, V::in(z + j, left)), skip - j, -(A)__builtin_inf());
    most[0] = V::max(most[0], V::head_or(x, left, -(A)__builtin_inf()));
  };
  const int64_t whole = n / V::W * V::W, at = skip >= 0 && skip < whole ? skip / V::W * V::W : whole;
  plain(0, at);
  if (at < whole) masked(at), plain(at + V::W, whole);
  if (whole < n) masked(whole);
  return V::maximum(V::max(V::max(most[0], most[1]), V::max(most[2], most[3])));
}

// The mean of a row less a constant.
template <class T, class A = Accumulator<T>>
double mean_above(const T* z, int64_t n, A constant) {
  using V = Vec<A>;
  double total = 0;
  for (int64_t from = 0; from < n; from += 64 * V::W) {
    const int64_t to = smaller(n, from + 64 * V::W);
    auto sum = V::set(0);
    for (int64_t j = from; j < to; j += V::W)
      sum = sum + V::head(V::in(z + j, (int)smaller(V::W, to - j)) - V::set(constant), (int)smaller(V::W, to - j));
    total += (double)V::sum(sum);
  }
  return total / (double)n;
}

// Mean and unbiased deviation of a row, around a reference; around the mean itself if the reference was an outlier.
template <class T, class A = Accumulator<T>>
KD_NOINLINE void row_moments(const T* z, int64_t n, double* mean, double* deviation) {
  using V = Vec<A>;
  using X = typename V::R;
  double ref = (double)V::in(z, 1)[0], sum = 0, square = 0;
  for (int attempt = 0;; attempt++) {
    const X r = V::set((A)ref);
    sum = square = 0;
    for (int64_t from = 0; from < n; from += 64 * V::W) {
      const int64_t to = smaller(n, from + 64 * V::W);
      X a = V::set(0), q = a;
      int64_t j = from;
      for (; j + V::W <= to; j += V::W) {
        const X d = V::in(z + j) - r;
        a = a + d, q = V::fma(d, d, q);
      }
      if (j < to) {
        const X d = V::head(V::in(z + j, (int)(to - j)) - r, (int)(to - j));
        a = a + d, q = V::fma(d, d, q);
      }
      sum += V::sum(a), square += V::sum(q);
    }
    sum /= n, square = square / n - sum * sum;
    *mean = ref + sum;
    if (attempt || !(sum * sum > 64 * square)) break;
    ref = (double)(A)*mean;
  }
  *deviation = __builtin_sqrt((square > 0 ? square : 0) * n / (n - 1));
}

}  // namespace kdcore::cpu::KD_ISA
