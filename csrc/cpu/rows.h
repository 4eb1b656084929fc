// The algorithm that goes through memory by rows: any normalisation, any number of classes. The exponentials of a few
// rows stay in the cache between their sums and their gradient, so that each is computed once. Where the gradient flows
// through class statistics, dL/dh waits in memory for the column sums, and a last pass turns it into dL/dz.
//
// Work is cut by the shape alone, into shards whose partial sums are added in order: threads change no bit.
#pragma once

namespace kdcore::cpu::KD_ISA {

template <class T>
struct RowsPlan {
  using A = Accumulator<T>;
  int64_t chunk, shard_rows, shards;
  bool wait;      // dL/dh waits for the column sums
  bool in_place;  // it does so in the gradient's own memory
  bool stream;
  int64_t stat_rows, stat_shards;  // 0 shards: the statistics go down the columns

  explicit RowsPlan(const Context<T>& c) {
    const int64_t arrays = c.p.cross_entropy ? 3 : 2, row = c.padded * arrays * (int64_t)sizeof(A);
    chunk = smaller(kRows, larger(1, (500 << 10) / row));
    if (chunk > 1) chunk = chunk / 2 * 2;
    wait = c.through && (c.grad || c.p.sums_out);
    shard_rows = wait ? larger(32, round_up(ceil_div(c.B, 32), kRows)) : chunk;
    shards = ceil_div(c.B, shard_rows);
    in_place = c.grad && sizeof(T) == sizeof(A);
    stream = c.B * c.C * (int64_t)sizeof(T) * 3 > (20 << 20);
    // from memory whole rows come faster; from the cache columns need no second step
    stat_rows = larger(64, round_up(ceil_div(c.B, 16), kRows));
    stat_shards = c.batch && c.B * c.C * (int64_t)sizeof(T) > (8 << 20) ? ceil_div(c.B, stat_rows) : 0;
  }
};

template <class T>
struct RowsWork {
  using A = Accumulator<T>;
  Columns<A> of_s, of_t;
  Final<A> final;
  A *inverse_gain, *partial, *stats, *g;
  int64_t ldg;

  KD_INLINE A* sum(const Context<T>& c, int64_t shard) const { return partial + shard * 2 * c.padded; }
};

// Sums of deviations of the rows of shard k: [4, padded], student's sums and squares, teacher's.
template <class T, class A = Accumulator<T>>
void sum_deviations(const Context<T>& c, const RowsWork<T>& w, const RowsPlan<T>& plan, int64_t k) {
  const int64_t first = k * plan.stat_rows, rows = smaller(plan.stat_rows, c.B - first);
  A* sums = w.stats + k * 4 * c.padded;
  clear(sums, 4 * c.padded);
  for (int64_t i = first; i < first + rows; i += kRows) {
    const int64_t n = smaller(kRows, first + rows - i);
    add_rows(c.s + i * c.lds, n, c.lds, c.C, w.of_s.ref, sums, sums + c.padded,
             i + 2 * kRows <= c.B ? kRows * c.lds : 0);
    add_rows(c.t + i * c.ldt, n, c.ldt, c.C, w.of_t.ref, sums + 2 * c.padded, sums + 3 * c.padded,
             i + 2 * kRows <= c.B ? kRows * c.ldt : 0);
  }
}

// The columns' constants from the batch, [first, end), along the rows.
template <class T, class A = Accumulator<T>>
void statistics_by_rows(const Context<T>& c, const RowsWork<T>& w, const RowsPlan<T>& plan, const Member& me, Range v) {
  using V = Vec<A>;
  const int64_t first = v.begin * V::W, end = v.end * V::W;
  for (int64_t j = first; j < end; j += V::W) {
    V::store(w.of_s.ref + j, reference(c.s + j, c.B, c.lds, (int)smaller(V::W, c.C - j)));
    V::store(w.of_t.ref + j, reference(c.t + j, c.B, c.ldt, (int)smaller(V::W, c.C - j)));
  }
  me.wait();
  const Range mine = share(plan.stat_shards, me.id, me.size);
  for (int64_t k = mine.begin; k < mine.end; k++) sum_deviations(c, w, plan, k);
  me.wait();
  for (int64_t q = 0; q < 4; q++)
    for (int64_t j = q * c.padded + first; j < q * c.padded + end; j += V::W) {
      auto x = V::load(w.stats + j);
      for (int64_t k = 1; k < plan.stat_shards; k++) x = x + V::load(w.stats + k * 4 * c.padded + j);
      V::store(w.stats + j, x);
    }
  const A *s = w.stats + first, *t = s + 2 * c.padded;
  finish_columns(w.of_s.at(first), s, s + c.padded, end - first, c.B, c.kappa, (A)c.p.eps);
  finish_columns(w.of_t.at(first), t, t + c.padded, end - first, c.B, c.kappa, (A)c.p.eps);
}

// The same, down the columns.
template <class T, class A = Accumulator<T>>
void statistics_by_columns(const Context<T>& c, const RowsWork<T>& w, Range v, A* spare) {
  using V = Vec<A>;
  const int64_t end = smaller(v.end * V::W, c.C), ahead = c.B * c.C * (int64_t)sizeof(T) > (2 << 20) ? kRows : 0;
  for (int64_t j = v.begin * V::W; j < end; j += 64 * V::W) {
    const int64_t n = smaller(64 * V::W, end - j);
    batch_columns(c.s + j, c.B, c.lds, n, w.of_s.at(j), c.kappa, (A)c.p.eps, spare, ahead * c.lds);
    batch_columns(c.t + j, c.B, c.ldt, n, w.of_t.at(j), c.kappa, (A)c.p.eps, spare, ahead * c.ldt);
  }
}

// Per class constants of the columns whose vectors are [v.begin, v.end).
template <class T, class A = Accumulator<T>>
void rows_columns(const Context<T>& c, const RowsWork<T>& w, const RowsPlan<T>& plan, const Member& me, Range v,
                  A* spare) {
  using V = Vec<A>;
  const int64_t first = v.begin * V::W, padded = (v.end - v.begin) * V::W;
  if (plan.stat_shards) {
    statistics_by_rows(c, w, plan, me, v);
  } else if (c.batch) {
    statistics_by_columns(c, w, v, spare);
  } else {
    const double* given = c.p.stats + first;
    const int64_t n = smaller(padded, c.C - first);
    given_columns(given, given + c.C, n, padded, w.of_s.at(first), c.kappa, c.p.eps);
    given_columns(given + 2 * c.C, given + 3 * c.C, n, padded, w.of_t.at(first), c.kappa, c.p.eps);
  }
  for (int64_t j = first; j < first + padded; j += V::W) {
    const auto gain = V::load(w.of_s.scale + j) / V::set(c.kappa);
    V::store(w.final.gain + j, gain);
    V::store(w.inverse_gain + j, V::set(1) / gain);
  }
}

// What a row's exponentials need to know of it first, for rows [i, i + n).
template <class T, Affine F, bool MOMENTS, class A = Accumulator<T>>
void measure_rows(const Context<T>& c, const RowsWork<T>& w, int64_t i, int n, const int64_t* skip, Rows<A>& rows) {
  for (int k = 0; k < n; k++) {
    const T *s = c.s + (i + k) * c.lds, *t = c.t + (i + k) * c.ldt;
    rows.scale_s[k] = rows.scale_t[k] = c.kappa;
    if constexpr (F != Affine::column) {
      constexpr bool columns = F == Affine::shifted;
      const A top_s = row_maximum<T, columns>(s, c.C, skip[k], w.of_s),
              top_t = row_maximum<T, columns>(t, c.C, skip[k], w.of_t);
      const A least = -(A)__builtin_inf();
      rows.ref_s[k] = top_s == least ? 0 : top_s, rows.ref_t[k] = top_t == least ? 0 : top_t;  // all masked: no shift
    }
    if constexpr (MOMENTS) {
      double mean, deviation;
      row_moments(t, c.C, &mean, &deviation);
      rows.scale_t[k] = (A)(c.kappa / (deviation + c.p.eps));
      row_moments(s, c.C, &rows.mean[k], &rows.deviation[k]);
      rows.scale_s[k] = (A)(c.kappa / (rows.deviation[k] + c.p.eps));
    }
    if (c.p.cross_entropy) rows.top[k] = row_maximum<T, false>(s, c.C, -1, w.of_s);
    if (c.p.cross_entropy && c.p.label_smoothing != 0) {
      rows.mean_top[k] = mean_above<T>(s, c.C, rows.top[k]);
    } else {
      rows.mean_top[k] = 0;
    }
  }
}

// The labels' own logits, as their row's maths wants them.
template <class T, Affine F, class A = Accumulator<T>>
KD_INLINE void read_labels(const Context<T>& c, const Columns<A> of_s, const Columns<A> of_t, int64_t i, int n,
                           Rows<A>& rows) {
  for (int k = 0; k < n; k++) {
    rows.label_s[k] = rows.label_t[k] = rows.label_top[k] = rows.label_gap[k] = 0;
    if (!c.labels()) continue;
    const int64_t y = c.p.index[i + k];
    const A s = Vec<A>::in(c.s + (i + k) * c.lds + y, 1)[0], t = Vec<A>::in(c.t + (i + k) * c.ldt + y, 1)[0];
    if constexpr (F == Affine::row) {
      rows.label_s[k] = ((double)s - rows.ref_s[k]) * rows.scale_s[k];
      rows.label_t[k] = ((double)t - rows.ref_t[k]) * rows.scale_t[k];
    } else {
      rows.label_s[k] = ((double)s - of_s.ref[y]) * of_s.scale[y] + of_s.offset[y];
      rows.label_t[k] = ((double)t - of_t.ref[y]) * of_t.scale[y] + of_t.offset[y];
      if constexpr (F == Affine::shifted) rows.label_s[k] -= rows.ref_s[k], rows.label_t[k] -= rows.ref_t[k];
    }
    rows.label_top[k] = (double)s - rows.top[k];
    rows.label_gap[k] = (double)s - rows.ref_s[k];
  }
}

// dL/dh at the label of row k: left out of the sums by DKD, in them for KD. Its exponentials there are in e.
template <class T, class A = Accumulator<T>>
KD_INLINE A label_gradient(const Context<T>& c, Scratch<A> e, const RowFactors<A>& f, int k, int64_t y) {
  return c.p.decoupled ? f.label[k] : f.student[k] * e.student[y] - f.teacher[k] * e.teacher[y];
}

// Gradient of rows [i, i + n) that needs nothing from the others.
template <class T, Affine F, bool MOMENTS, bool CE, class A = Accumulator<T>>
void write_rows(const Context<T>& c, const RowsWork<T>& w, const RowsPlan<T>& plan, int64_t i, int n, Scratch<A> e,
                RowFactors<A>& f) {
  for (int k = 0; k < n; k++) {
    const T* s = c.s + (i + k) * c.lds;
    T* out = c.grad + (i + k) * c.C;
    const Scratch<A> own = e.at(k, 0);
    write_local<T, F != Affine::row, MOMENTS, CE>(s, out, c.C, own, f, k, w.final.gain, plan.stream);
    if (!c.labels()) continue;
    const int64_t y = c.p.index[i + k];
    A g = label_gradient(c, own, f, k, y);
    if constexpr (F != Affine::row) g *= w.final.gain[y];
    if constexpr (MOMENTS) g += (Vec<A>::in(s + y, 1)[0] - f.center[k]) * f.slope[k] + f.level[k];
    if constexpr (CE) g += f.at_label[k];
    Vec<A>::out(out + y, Vec<A>::set(g), 1);
  }
}

// dL/dh of rows [i, i + n), kept, and its column sums.
template <class T, bool CE, class A = Accumulator<T>>
void keep_rows(const Context<T>& c, const RowsWork<T>& w, int64_t i, int n, Scratch<A> e, const RowFactors<A>& f,
               A* sum, bool padded_g) {
  A *g = w.g + i * w.ldg, *moment = sum + c.padded;
  int k = 0;
  for (; k + 4 <= n; k += 4)
    sum_gradients<T, CE, 4>(c.s + (i + k) * c.lds, c.lds, c.C, e.at(k, 0), f, k, w.of_s.ref, w.inverse_gain,
                            g + k * w.ldg, w.ldg, padded_g, sum, moment);
  for (; k < n; k++)
    sum_gradients<T, CE, 1>(c.s + (i + k) * c.lds, c.lds, c.C, e.at(k, 0), f, k, w.of_s.ref, w.inverse_gain,
                            g + k * w.ldg, w.ldg, padded_g, sum, moment);
  if (!c.labels()) return;
  for (k = 0; k < n; k++) {
    const int64_t y = c.p.index[i + k];
    const A x = label_gradient(c, e.at(k, 0), f, k, y);
    if (c.p.decoupled) {
      sum[y] += x;
      moment[y] += x * (Vec<A>::in(c.s + (i + k) * c.lds + y, 1)[0] - w.of_s.ref[y]);
    }
    g[k * w.ldg + y] = CE ? x + f.at_label[k] * w.inverse_gain[y] : x;
  }
}

// Rows [begin, end) of one shard, a few at a time.
template <class T, Affine F, bool MOMENTS, bool CE, class A = Accumulator<T>>
KD_NOINLINE void rows_shard(const Context<T>& c, const RowsWork<T>& w, const RowsPlan<T>& plan, Range r, Scratch<A> e,
                            A* sum) {
  using V = Vec<A>;
  const bool keep = c.grad || c.p.sums_out, far = c.B * c.C * (int64_t)sizeof(T) > (1 << 19);
  int64_t skip[kRows], label[kRows];
  Rows<A> rows = {};
  RowFactors<A> f = {};
  for (int64_t i = r.begin; i < r.end; i += plan.chunk) {
    const int n = (int)smaller(plan.chunk, r.end - i);
    for (int k = 0; k < kRows; k++) {
      skip[k] = c.p.decoupled && k < n ? c.p.index[i + k] : -1;
      label[k] = CE && k < n ? c.p.index[i + k] : -1;
    }
    measure_rows<T, F, MOMENTS>(c, w, i, n, skip, rows);
    __builtin_memset(rows.sum, 0, sizeof rows.sum);
    for (int64_t j = 0; j < c.C; j += 64 * V::W) {
      const Tile<T> x = {c.s + i * c.lds + j,         c.t + i * c.ldt + j, c.lds,       c.ldt, j,
                         smaller(64 * V::W, c.C - j), w.of_s.at(j),        w.of_t.at(j)};
      exp_tile<T, F, MOMENTS, CE, true>(x, rows, n, skip, label, e.at(0, j), {far && i + 8 + n <= c.B ? 8 : 0, 0});
    }
    read_labels<T, F>(c, w.of_s, w.of_t, i, n, rows);
    finish_rows(c, i, n, rows, f);
    if (!keep) continue;
    if (plan.wait) {
      keep_rows<T, CE>(c, w, i, n, e, f, sum, !plan.in_place);
    } else {
      if constexpr (MOMENTS) through_instance(rows, f, n, c.C, c.p.eps);
      write_rows<T, F, MOMENTS, CE>(c, w, plan, i, n, e, f);
    }
  }
}

// Column sums of all shards, in order, and the constants of the last pass.
template <class T, class A = Accumulator<T>>
void rows_combine(const Context<T>& c, const RowsWork<T>& w, const RowsPlan<T>& plan, Range v) {
  using V = Vec<A>;
  const int64_t first = v.begin * V::W, end = v.end * V::W;
  A* total = w.partial;
  for (int64_t q = 0; q < 2; q++)
    for (int64_t j = q * c.padded + first; j < q * c.padded + end; j += V::W) {
      auto x = V::load(total + j);
      for (int64_t k = 1; k < plan.shards; k++) x = x + V::load(w.sum(c, k) + j);
      V::store(total + j, x);
    }
  if (first < end)
    finish_final(c, first, smaller(end, c.C) - first, w.of_s.at(first), total + first, total + c.padded + first,
                 w.final.at(first));
}

template <class T, class A = Accumulator<T>>
void rows_final(const Context<T>& c, const RowsWork<T>& w, Range r) {
  const T* s = c.s;
  int64_t i = r.end;  // backwards: the last rows are still in the cache
  for (; i - 4 >= r.begin; i -= 4)
    write_final<T, 4>(s + (i - 4) * c.lds, c.lds, c.C, w.of_s.ref, w.final, w.g + (i - 4) * w.ldg, w.ldg,
                      c.grad + (i - 4) * c.C, c.C);
  for (; i > r.begin; i--)
    write_final<T, 1>(s + (i - 1) * c.lds, c.lds, c.C, w.of_s.ref, w.final, w.g + (i - 1) * w.ldg, w.ldg,
                      c.grad + (i - 1) * c.C, c.C);
}

template <class T, Affine F, bool MOMENTS, bool CE>
void run_rows(const Context<T>& c) {
  using A = Accumulator<T>;
  const RowsPlan<T> plan(c);
  const int64_t P = c.padded, wide = 64 * Vec<A>::W, arrays = CE ? 3 : 2;
  const int64_t own = round_up(arrays * plan.chunk * P + 4 * wide, 16);
  const int threads = c.B * P < 9600 ? 1 : c.p.threads;
  const int64_t kept = !plan.wait || plan.in_place ? 0 : c.grad ? c.B * P : threads * P;
  Arena arena = workspace(
      (10 * P + (plan.wait ? plan.shards * 2 * P : 0) + plan.stat_shards * 4 * P + kept + threads * own) * sizeof(A) +
      4096);
  RowsWork<T> w;
  A** const columns[] = {&w.of_s.ref,    &w.of_s.scale, &w.of_s.offset, &w.of_t.ref,    &w.of_t.scale,
                         &w.of_t.offset, &w.final.gain, &w.final.slope, &w.final.level, &w.inverse_gain};
  for (A** p : columns) *p = arena.take<A>(P);
  w.partial = plan.wait ? arena.take<A>(plan.shards * 2 * P) : nullptr;
  w.stats = arena.take<A>(plan.stat_shards * 4 * P);
  w.g = kept ? arena.take<A>(kept) : (A*)c.grad;
  w.ldg = plan.in_place ? c.C : c.grad ? P : 0;
  A* each = arena.take<A>(threads * own);
  const RowsWork<T> shared = w;
  team(threads, [&](const Member& me) {
    RowsWork<T> w = shared;
    if (kept && !c.grad) w.g += me.id * P;  // nobody reads it: the sums alone are wanted
    A* mine = each + me.id * own;
    const Scratch<A> e = {mine, mine + plan.chunk * P, mine + (arrays - 1) * plan.chunk * P, P};
    const Range vectors = share(c.vectors, me.id, me.size), shards = share(plan.shards, me.id, me.size);
    if constexpr (F != Affine::row) {
      rows_columns(c, w, plan, me, vectors, mine + arrays * plan.chunk * P);
      me.wait();
    }
    for (int64_t k = shards.begin; k < shards.end; k++) {
      A* sum = plan.wait ? w.sum(c, k) : nullptr;
      if (plan.wait) clear(sum, 2 * P);
      rows_shard<T, F, MOMENTS, CE>(c, w, plan, {k * plan.shard_rows, smaller(c.B, (k + 1) * plan.shard_rows)}, e, sum);
    }
    if (!plan.wait) return end_streams();
    me.wait();
    rows_combine(c, w, plan, vectors);
    if (!c.grad) return;
    me.wait();
    rows_final(c, w, {smaller(c.B, shards.begin * plan.shard_rows), smaller(c.B, shards.end * plan.shard_rows)});
  });
}

}  // namespace kdcore::cpu::KD_ISA
