// The passes that write the gradient, from exponentials that are at hand.
#pragma once

namespace kdcore::cpu::KD_ISA {

// Writes a row of n: value(j) is a whole vector, value(j, m) the m lanes from j on. stream: past the caches.
template <class T, class Value>
KD_INLINE void write_row(T* out, int64_t n, bool stream, Value value) {
  using V = Vec<Accumulator<T>>;
  int64_t j = 0;
  if (stream) {
    const int64_t line = V::W * sizeof(T),
                  head = smaller(n, (int64_t)(-(intptr_t)out & (line - 1)) / (int64_t)sizeof(T));
    if (head) V::out(out, value(0, (int)head), (int)head);
    for (j = head; j + V::W <= n; j += V::W) V::stream(out + j, value(j));
  } else {
    for (; j + V::W <= n; j += V::W) V::out(out + j, value(j));
  }
  if (j < n) V::out(out + j, value(j, (int)(n - j)), (int)(n - j));
}

// A row whose gradient needs nothing from other rows. gain: of its columns, for class statistics that are constants.
template <class T, bool COLUMNS, bool SLOPE, bool CE, class A = Accumulator<T>>
KD_NOINLINE void write_local(const T* s, T* out, int64_t n, Scratch<A> e, const RowFactors<A>& f, int k, const A* gain,
                             bool stream) {
  using V = Vec<A>;
  using X = typename V::R;
  const X a = V::set(f.student[k]), b = V::set(f.teacher[k]), slope = V::set(f.slope[k]), level = V::set(f.level[k]);
  const X center = V::set(f.center[k]), other = V::set(f.other[k]), uniform = V::set(f.uniform[k]);
  auto value = [&](int64_t j, int m = V::W) __attribute__((always_inline)) {
    X x = V::fnma(V::load(e.teacher + j), b, V::load(e.student + j) * a);
    if constexpr (COLUMNS) x = x * V::load(gain + j);
    if constexpr (SLOPE) x = V::fma((m < V::W ? V::in(s + j, m) : V::in(s + j)) - center, slope, x + level);
    if constexpr (CE) x = x + V::fma(V::load(e.rest + j), other, V::set(0) - uniform);
    return x;
  };
  write_row(out, n, stream, value);
}

// g = dL/dh of R rows from their exponentials, for n columns: column sums of g and of g (s - ref); g is stored with the
// cross-entropy's gradient over the gain that the last pass will multiply by.
template <class T, bool CE, int R, class A = Accumulator<T>>
KD_NOINLINE void sum_gradients(const T* s, int64_t lds, int64_t n, Scratch<A> e, const RowFactors<A>& f, int k,
                               const A* ref, const A* inverse_gain, A* g, int64_t ldg, bool padded_g, A* sum,
                               A* moment) {
  using V = Vec<A>;
  using X = typename V::R;
  X a[R], b[R], other[R], uniform[R];
  for (int r = 0; r < R; r++) {
    a[r] = V::set(f.student[k + r]), b[r] = V::set(f.teacher[k + r]);
    other[r] = V::set(f.other[k + r]), uniform[r] = V::set(f.uniform[k + r]);
  }
  auto step = [&](int64_t j, auto whole) __attribute__((always_inline)) {
    constexpr bool kWhole = decltype(whole)::value;
    const int left = (int)smaller(V::W, n - j);
    const X center = V::load(ref + j), inverse = CE ? V::load(inverse_gain + j) : V::set(0);
    X total = V::load(sum + j), weighted = V::load(moment + j);
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
      const T* p = s + r * lds + j;
      const X x = V::fnma(V::load(e.teacher + r * e.stride + j), b[r], V::load(e.student + r * e.stride + j) * a[r]);
      const X d = (kWhole ? V::in(p) : V::in(p, left)) - center;
      total = total + x, weighted = V::fma(x, d, weighted);
      X y = x;
      if constexpr (CE)
        y = V::fma(V::fma(V::load(e.rest + r * e.stride + j), other[r], V::set(0) - uniform[r]), inverse, x);
      if (kWhole || padded_g) {
        V::store(g + r * ldg + j, y);
      } else {
        V::out(g + r * ldg + j, y, left);
      }
    }
    V::store(sum + j, total), V::store(moment + j, weighted);
  };
  int64_t j = 0;
  for (; j + V::W <= n; j += V::W) step(j, Yes{});
  if (j < n) step(j, No{});
}

// dz = g gain + (s - ref) slope + level, R rows; g may be where dz goes.
template <class T, int R, class A = Accumulator<T>>
KD_NOINLINE void write_final(const T* s, int64_t lds, int64_t n, const A* ref, Final<A> f, const A* g, int64_t ldg,
                             T* out, int64_t ldo) {
  using V = Vec<A>;
  using X = typename V::R;
  auto step = [&](int64_t j, auto whole) __attribute__((always_inline)) {
    constexpr bool kWhole = decltype(whole)::value;
    const int left = (int)smaller(V::W, n - j);
    const X center = V::load(ref + j), gain = V::load(f.gain + j), slope = V::load(f.slope + j),
            level = V::load(f.level + j);
    X y[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
      const T* p = s + r * lds + j;
      const X d = (kWhole ? V::in(p) : V::in(p, left)) - center;
      const X x = kWhole ? V::load(g + r * ldg + j) : V::in(g + r * ldg + j, left);
      y[r] = V::fma(x, gain, V::fma(d, slope, level));
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
      if constexpr (kWhole) {
        V::out(out + r * ldo + j, y[r]);
      } else {
        V::out(out + r * ldo + j, y[r], left);
      }
    }
  };
  int64_t j = 0;
  for (; j + V::W <= n; j += V::W) step(j, Yes{});
  if (j < n) step(j, No{});
}

// The same for one row past the caches.
template <class T, class A = Accumulator<T>>
KD_NOINLINE void stream_final(const T* s, int64_t n, const A* ref, Final<A> f, const A* g, T* out) {
  using V = Vec<A>;
  write_row(out, n, true, [&](int64_t j, int m = V::W) __attribute__((always_inline)) {
    const auto d = (m < V::W ? V::in(s + j, m) : V::in(s + j)) - V::load(ref + j);
    return V::fma(V::load(g + j), V::load(f.gain + j), V::fma(d, V::load(f.slope + j), V::load(f.level + j)));
  });
}

// What the last pass needs of n columns: the batch norm's backward, from the sums of g and of g (s - ref). Those sums
// are also given, over the temperature, as sums of dL/dh and of h dL/dh.
template <class T, class A = Accumulator<T>>
KD_NOINLINE void finish_final(const Context<T>& c, int64_t first, int64_t n, Columns<A> x, const A* sum,
                              const A* moment, Final<A> f) {
  using V = Vec<A>;
  const Problem& p = c.p;
  const A inverse = (A)1 / c.kappa, share_of = (A)(1 / p.count);
  for (int64_t j = 0; j < n; j += V::W) {
    const auto scale = V::load(x.scale + j), offset = V::load(x.offset + j), gain = scale * V::set(inverse);
    auto s1 = V::load(sum + j), s2 = V::fma(scale, V::load(moment + j), offset * s1) * V::set(inverse);
    if (p.sums || p.sums_out) {
      alignas(64) A one[V::W], two[V::W];
      V::store(one, s1), V::store(two, s2);
      for (int k = 0; k < V::W && j + k < n; k++) {
        if (p.sums_out) p.sums_out[first + j + k] = one[k], p.sums_out[c.C + first + j + k] = two[k];
        if (p.sums) one[k] = (A)p.sums[first + j + k], two[k] = (A)p.sums[c.C + first + j + k];
      }
      s1 = V::load(one), s2 = V::load(two);
    }
    const auto rate = V::set(share_of) * gain, slope = rate * s2 * V::set(inverse);
    V::store(f.gain + j, gain);
    V::store(f.slope + j, V::set(0) - slope * scale);
    V::store(f.level + j, V::set(0) - V::fma(slope, offset, rate * s1));
  }
}

}  // namespace kdcore::cpu::KD_ISA
