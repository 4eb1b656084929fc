// The algorithm that goes through memory by blocks of columns, for class statistics of the batch and many classes: a
// block stays in the cache between its statistics and its exponentials, and again between its gradient in h and the one
// in z. It computes each exponential twice but reads s and t only twice and writes the gradient once.
//
// Columns are cut into shards by the shape alone; their row sums are added in order: threads change no bit.
#pragma once

namespace kdcore::cpu::KD_ISA {

template <class T>
struct ColumnsPlan {
  static constexpr int W = Vec<Accumulator<T>>::W;
  int64_t shards, block, widest, ahead;  // block: columns, about; widest: at most
  bool stream;

  explicit ColumnsPlan(const Context<T>& c) {
    shards = larger(1, smaller(32, c.vectors / 64));
    block = W * larger(16, smaller(64, c.B / 8));
    widest = block + block / 2 + 2 * W;
    stream = c.B * c.C * (int64_t)sizeof(T) * 3 > (20 << 20);
    ahead = c.B * c.C * (int64_t)sizeof(T) > (2 << 20) ? 4 : 0;
  }
  // Columns of shard k, block b of it; both cut evenly, at whole vectors.
  KD_INLINE Range shard(const Context<T>& c, int64_t k) const { return share(c.vectors, (int)k, (int)shards); }
  KD_INLINE int64_t blocks(Range v) const { return larger(1, ((v.end - v.begin) * W + block / 2) / block); }
  KD_INLINE Range columns(const Context<T>& c, Range v, int64_t b, int64_t of) const {
    const Range part = share(v.end - v.begin, (int)b, (int)of);
    return {(v.begin + part.begin) * W, smaller(c.C, (v.begin + part.end) * W)};
  }
};

template <class T>
struct ColumnsWork {
  using A = Accumulator<T>;
  Columns<A> of_s, of_t;
  double* sums;  // [shards][4][rows]: Zs, Zt, gap, cross-entropy's rest
  A* tops;       // [shards][rows]: the maximum that its rest is relative to
  int64_t rows;  // padded
  A *student, *teacher, *label, *other, *uniform, *at_label, *top;  // [rows] factors
};

// The cross-entropy's part of a block: a running maximum and the sum relative to it, for rows [i, i + n).
template <class T, class A = Accumulator<T>>
void rest_of_block(const Context<T>& c, Range j, int64_t i, int n, A* top, double* rest) {
  using V = Vec<A>;
  for (int k = 0; k < n; k++) {
    const T* s = c.s + (i + k) * c.lds + j.begin;
    const int64_t columns = j.end - j.begin, label = c.p.index[i + k] - j.begin;
    const A most = row_maximum<T, false>(s, columns, -1, Columns<A>{});
    if (most > top[k]) {
      rest[k] *= (double)V::exp2(V::set((A)((top[k] - most) * kLog2e)))[0];
      top[k] = most;
    }
    const auto shift = V::set(top[k]), log2e = V::set((A)kLog2e);
    auto sum = V::set(0);
    around_labels<V::W, 1>(columns, &label, [&](int64_t x, auto whole) __attribute__((always_inline)) {
      const int left = (int)smaller(V::W, columns - x);
      auto e = V::exp2(((decltype(whole)::value ? V::in(s + x) : V::in(s + x, left)) - shift) * log2e);
      if constexpr (!decltype(whole)::value) e = V::head(V::without(e, label - x, 0), left);
      sum = sum + e;
    });
    rest[k] += (double)V::sum(sum);
  }
}

// Statistics and row sums of one shard.
template <class T, bool CE, class A = Accumulator<T>>
void sum_shard(const Context<T>& c, const ColumnsPlan<T>& plan, const ColumnsWork<T>& w, int64_t shard, A* spare) {
  double* sums = w.sums + shard * 4 * w.rows;
  A* top = w.tops + shard * w.rows;
  __builtin_memset(sums, 0, 4 * w.rows * sizeof(double));
  for (int64_t i = 0; i < w.rows; i++) top[i] = -(A)__builtin_inf();
  const Range v = plan.shard(c, shard);
  Rows<A> rows = {};
  int64_t skip[kRows], none[kRows];
  for (int64_t b = 0, of = plan.blocks(v); b < of; b++) {
    const Range j = plan.columns(c, v, b, of);
    const int64_t n = j.end - j.begin, next = j.end < c.C ? n : 0;
    batch_columns(c.s + j.begin, c.B, c.lds, n, w.of_s.at(j.begin), c.kappa, (A)c.p.eps, spare, plan.ahead * 2 * c.lds);
    batch_columns(c.t + j.begin, c.B, c.ldt, n, w.of_t.at(j.begin), c.kappa, (A)c.p.eps, spare, plan.ahead * 2 * c.ldt);
    for (int64_t i = 0; i < c.B; i += kRows) {
      const int m = (int)smaller(kRows, c.B - i);
      for (int k = 0; k < kRows; k++) none[k] = -1, skip[k] = c.p.decoupled && k < m ? c.p.index[i + k] : -1;
      const Tile<T> x = {c.s + i * c.lds + j.begin, c.t + i * c.ldt + j.begin, c.lds, c.ldt, j.begin, n,
                         w.of_s.at(j.begin),        w.of_t.at(j.begin)};
      __builtin_memset(rows.sum, 0, sizeof rows.sum);
      exp_tile<T, Affine::column, false, false, false>(x, rows, m, skip, none, Scratch<A>{},
                                                       {i + plan.ahead + kRows <= c.B ? plan.ahead : 0, next});
      for (int q = 0; q < 3; q++)
        for (int k = 0; k < kRows; k++) sums[q * w.rows + i + k] += rows.sum[q][k];
      if constexpr (CE) rest_of_block(c, j, i, m, top + i, sums + 3 * w.rows + i);
    }
  }
}

// Row sums of all shards, in order, and the factors of rows [i, i + n).
template <class T, class A = Accumulator<T>>
void finish_block(const Context<T>& c, const ColumnsPlan<T>& plan, const ColumnsWork<T>& w, int64_t i, int n) {
  Rows<A> rows = {};
  RowFactors<A> f = {};
  for (int k = 0; k < kRows; k++) {
    A top = -(A)__builtin_inf();
    for (int64_t h = 0; h < plan.shards; h++) {
      const double* sums = w.sums + h * 4 * w.rows + i + k;
      const A own = w.tops[h * w.rows + i + k];
      rows.sum[kZs][k] += sums[0], rows.sum[kZt][k] += sums[w.rows], rows.sum[kGap][k] += sums[2 * w.rows];
      top = own > top ? own : top;
    }
    if (!c.p.cross_entropy || k >= n) continue;
    for (int64_t h = 0; h < plan.shards; h++)
      rows.sum[kRest][k] += w.sums[h * 4 * w.rows + 3 * w.rows + i + k] *
                            (double)Vec<A>::exp2(Vec<A>::set((A)((w.tops[h * w.rows + i + k] - top) * kLog2e)))[0];
    rows.top[k] = top;
    if (c.p.label_smoothing != 0) rows.mean_top[k] = mean_above<T>(c.s + (i + k) * c.lds, c.C, top);
  }
  read_labels<T, Affine::column>(c, w.of_s, w.of_t, i, n, rows);
  finish_rows(c, i, n, rows, f);
  for (int k = 0; k < kRows; k++) {
    w.student[i + k] = f.student[k], w.teacher[i + k] = f.teacher[k], w.label[i + k] = f.label[k];
    w.other[i + k] = f.other[k], w.uniform[i + k] = f.uniform[k], w.at_label[i + k] = f.at_label[k];
    w.top[i + k] = rows.top[k];
  }
}

// dL/dh of R rows of a block into scratch, and its column sums.
template <class T, bool CE, int R, class A = Accumulator<T>>
KD_NOINLINE void block_gradients(const Context<T>& c, const ColumnsWork<T>& w, const Tile<T>& x, int64_t i,
                                 const int64_t* skip, const int64_t* label, const A* inverse_gain, A* g, int64_t ldg,
                                 A* sum, A* moment, Ahead ahead, const T* write) {
  using V = Vec<A>;
  using X = typename V::R;
  X a[R], b[R], other[R], uniform[R], top[R];
  for (int r = 0; r < R; r++) {
    a[r] = V::set(w.student[i + r]), b[r] = V::set(w.teacher[i + r]);
    other[r] = V::set(w.other[i + r]), uniform[r] = V::set(w.uniform[i + r]), top[r] = V::set(w.top[i + r]);
  }
  const X log2e = V::set((A)kLog2e);
  // the stores below could alias what x and c point from: copies spare reloading it at every vector
  const T *s0 = x.s, *t0 = x.t;
  const int64_t n = x.n, lds = x.lds, ldt = x.ldt, ldo = c.C;
  const Columns<A> of_s = x.of_s, of_t = x.of_t;
  around_labels<V::W, R>(n, CE ? label : skip, [&](int64_t j, auto whole) __attribute__((always_inline)) {
    constexpr bool kWhole = decltype(whole)::value;
    const int left = (int)smaller(V::W, n - j);
    const X cs = V::load(of_s.ref + j), as = V::load(of_s.scale + j), bs = V::load(of_s.offset + j);
    const X ct = V::load(of_t.ref + j), at = V::load(of_t.scale + j), bt = V::load(of_t.offset + j);
    X total = V::load(sum + j), weighted = V::load(moment + j);
#pragma GCC unroll 2
    for (int r = 0; r < R; r++) {
      const T *ps = s0 + r * lds + j, *pt = t0 + r * ldt + j;
      const X s = kWhole ? V::in(ps) : V::in(ps, left), t = kWhole ? V::in(pt) : V::in(pt, left);
      if constexpr (kWhole) {
        __builtin_prefetch(ps + ahead.rows * lds), __builtin_prefetch(pt + ahead.rows * ldt);
        __builtin_prefetch(ps + ahead.block, 0, 2), __builtin_prefetch(pt + ahead.block, 0, 2);
        if (write) __builtin_prefetch(write + r * ldo + j, 1, 2);
      }
      const X d = s - cs;
      X eu = V::exp2(V::fma(d, as, bs)), ev = V::exp2(V::fma(t - ct, at, bt));
      if constexpr (!kWhole) eu = V::without(eu, skip[r] - j, 0), ev = V::without(ev, skip[r] - j, 0);
      const X y = V::fnma(ev, b[r], eu * a[r]);
      total = total + y, weighted = V::fma(y, d, weighted);
      X kept = y;
      if constexpr (CE) {
        X ec = V::exp2((s - top[r]) * log2e);
        if constexpr (!kWhole) ec = V::without(ec, label[r] - j, 0);
        kept = V::fma(V::fma(ec, other[r], V::set(0) - uniform[r]), V::load(inverse_gain + j), y);
      }
      V::store(g + r * ldg + j, kept);
    }
    V::store(sum + j, total), V::store(moment + j, weighted);
  });
}

// Adds what the passes over a block left out at its labels.
template <class T, bool CE, class A = Accumulator<T>>
void block_labels(const Context<T>& c, const ColumnsWork<T>& w, Range j, const A* inverse_gain, A* g, int64_t ldg,
                  A* sum, A* moment) {
  for (int64_t i = 0; i < c.B; i++) {
    const int64_t y = c.p.index[i], at = y - j.begin;
    if (at < 0 || y >= j.end) continue;
    A* own = g + i * ldg + at;
    if (c.p.decoupled) {
      const A x = w.label[i];
      sum[at] += x;
      moment[at] += x * (Vec<A>::in(c.s + i * c.lds + y, 1)[0] - w.of_s.ref[y]);
      *own += x;
    }
    if (CE) *own += (w.at_label[i] + w.uniform[i]) * inverse_gain[at];
  }
}

// The gradient of one shard, its blocks backwards, as the shards are: the last of them are still in the cache.
template <class T, bool CE, class A = Accumulator<T>>
void gradient_shard(const Context<T>& c, const ColumnsPlan<T>& plan, const ColumnsWork<T>& w, int64_t shard, A* mine) {
  using V = Vec<A>;
  const int64_t wide = plan.widest;
  A *sum = mine, *moment = sum + wide, *inverse = moment + wide, *g = inverse + 4 * wide;
  const Final<A> f = {inverse + wide, inverse + 2 * wide, inverse + 3 * wide};
  const Range v = plan.shard(c, shard);
  for (int64_t of = plan.blocks(v), b = of - 1; b >= 0; b--) {
    const Range j = plan.columns(c, v, b, of);
    const int64_t n = j.end - j.begin, padded = round_up(n, V::W), next = j.begin > 0 && plan.stream ? -padded : 0;
    const Columns<A> of_s = w.of_s.at(j.begin);
    clear(sum, padded), clear(moment, padded);
    if (CE)
      for (int64_t k = 0; k < padded; k += V::W) V::store(inverse + k, V::set(c.kappa) / V::load(of_s.scale + k));
    for (int64_t i = 0; i < c.B; i += 2) {
      const Tile<T> x = {c.s + i * c.lds + j.begin, c.t + i * c.ldt + j.begin, c.lds, c.ldt, j.begin, n, of_s,
                         w.of_t.at(j.begin)};
      const int pair = i + 1 < c.B;
      int64_t skip[2], label[2];
      for (int r = 0; r < 2; r++) {
        skip[r] = c.p.decoupled ? c.p.index[i + r * pair] - j.begin : -1;
        label[r] = CE ? c.p.index[i + r * pair] - j.begin : -1;
      }
      const T* write = plan.stream ? nullptr : c.grad + i * c.C + j.begin;
      const int64_t ahead = i + plan.ahead + 2 <= c.B ? plan.ahead : 0;
      if (pair) {
        block_gradients<T, CE, 2>(c, w, x, i, skip, label, inverse, g + i * padded, padded, sum, moment, {ahead, next},
                                  write);
      } else {
        block_gradients<T, CE, 1>(c, w, x, i, skip, label, inverse, g + i * padded, padded, sum, moment, {}, write);
      }
    }
    if (c.labels()) block_labels<T, CE>(c, w, j, inverse, g, padded, sum, moment);
    finish_final(c, j.begin, n, of_s, sum, moment, f);
    for (int64_t i = 0; i < c.B;) {
      const T* s = c.s + i * c.lds + j.begin;
      T* out = c.grad + i * c.C + j.begin;
      if (plan.stream) {
        stream_final(s, n, of_s.ref, f, g + i * padded, out);
        i++;
      } else if (i + 4 <= c.B) {
        write_final<T, 4>(s, c.lds, n, of_s.ref, f, g + i * padded, padded, out, c.C);
        i += 4;
      } else {
        write_final<T, 1>(s, c.lds, n, of_s.ref, f, g + i * padded, padded, out, c.C);
        i++;
      }
    }
  }
}

template <class T, bool CE>
void run_columns(const Context<T>& c) {
  using A = Accumulator<T>;
  const ColumnsPlan<T> plan(c);
  const int64_t P = c.padded, rows = round_up(c.B, kRows), own = round_up((8 + c.B) * plan.widest, 16);
  const int threads = c.p.threads;
  Arena arena = workspace((6 * P + plan.shards * rows + 7 * rows + threads * own) * sizeof(A) +
                          plan.shards * 4 * rows * sizeof(double) + 4096);
  ColumnsWork<T> w;
  w.rows = rows;
  A** const columns[] = {&w.of_s.ref, &w.of_s.scale, &w.of_s.offset, &w.of_t.ref, &w.of_t.scale, &w.of_t.offset};
  A** const factors[] = {&w.student, &w.teacher, &w.label, &w.other, &w.uniform, &w.at_label, &w.top};
  for (A** p : columns) *p = arena.take<A>(P);
  for (A** p : factors) *p = arena.take<A>(rows);
  w.tops = arena.take<A>(plan.shards * rows);
  w.sums = arena.take<double>(plan.shards * 4 * rows);
  A* each = arena.take<A>(threads * own);
  team(threads, [&](const Member& me) {
    A* mine = each + me.id * own;
    const Range shards = share(plan.shards, me.id, me.size), blocks = share(rows / kRows, me.id, me.size);
    for (int64_t k = shards.begin; k < shards.end; k++) sum_shard<T, CE>(c, plan, w, k, mine);
    me.wait();
    for (int64_t k = blocks.begin; k < blocks.end; k++)
      finish_block(c, plan, w, k * kRows, (int)smaller(kRows, c.B - k * kRows));
    if (!c.grad) return;
    me.wait();
    for (int64_t k = shards.end - 1; k >= shards.begin; k--) gradient_shard<T, CE>(c, plan, w, k, mine);
    end_streams();
  });
}

}  // namespace kdcore::cpu::KD_ISA
