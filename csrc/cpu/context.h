// One call, as the kernels see it: typed pointers, derived numbers, and workspace.
#pragma once

namespace kdcore::cpu::KD_ISA {

KD_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
KD_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
KD_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
KD_INLINE int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

struct Range {
  int64_t begin, end;
};
KD_INLINE Range share(int64_t n, int part, int parts) { return {n * part / parts, n * (part + 1) / parts}; }

// Per class: h / ln(2) T = (z - ref) * scale + offset; ref + a rest that offset holds is the mean.
template <class A>
struct Columns {
  A *ref, *scale, *offset;
  KD_INLINE Columns at(int64_t j) const { return {ref + j, scale + j, offset + j}; }
};

// Per class: dz = g * gain + (z - ref) * slope + level.
template <class A>
struct Final {
  A *gain, *slope, *level;
  KD_INLINE Final at(int64_t j) const { return {gain + j, slope + j, level + j}; }
};

template <class T>
struct Context {
  using A = Accumulator<T>;
  const Problem& p;
  const T *s, *t;
  T* grad;
  int64_t B, C, lds, ldt, vectors, padded;  // padded: classes, up to whole vectors
  A kappa;                                  // log2(e) / T: exponentials are powers of 2
  double gradient;                          // of a row's loss in h: kd_weight * T^2 / T
  bool batch;                               // class statistics are those of these rows
  bool through;

  explicit Context(const Problem& q)
      : p(q),
        s((const T*)q.student),
        t((const T*)q.teacher),
        grad((T*)q.grad),
        B(q.rows),
        C(q.classes),
        lds(q.student_stride),
        ldt(q.teacher_stride),
        vectors(ceil_div(q.classes, Vec<A>::W)),
        padded(vectors * Vec<A>::W),
        kappa((A)(kLog2e / q.temperature)),
        gradient(q.kd_weight * q.temperature),
        batch(q.normalize == Normalize::per_class && !q.stats),
        through(q.normalize == Normalize::per_class && (q.through || q.sums_out)) {}

  KD_INLINE double weight(int64_t row) const { return p.row_weight ? p.row_weight[row] : p.weight; }
  KD_INLINE double beta(int64_t row) const { return p.row_beta ? p.row_beta[row] : p.beta; }
  KD_INLINE bool labels() const { return p.index && (p.decoupled || p.cross_entropy); }
};

// Hands out aligned pieces of one block.
struct Arena {
  char* at;
  template <class X>
  X* take(int64_t n) {
    X* piece = (X*)at;
    at += round_up(n * (int64_t)sizeof(X), 64);
    return piece;
  }
};

KD_INLINE Arena workspace(int64_t bytes) { return {(char*)scratch(bytes, Use::kernels)}; }

}  // namespace kdcore::cpu::KD_ISA
