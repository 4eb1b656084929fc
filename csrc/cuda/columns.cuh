// Passes over columns: a thread has one class and walks down some rows, so that a warp reads neighbours.
#pragma once
#include "common.cuh"

namespace kdcore::cuda {

constexpr int64_t kGradRows = 16;  // of a thread in the gradient, which has nothing to merge

// Moments of a class over a chunk's rows; shifted by its first until the mean is known. Twice over the same logits, the
// second time out of the cache: squares taken in one pass lose what the first row is away from the others.
template <class T, class A = Acc<T>>
__global__ void col_moments(Shape shape, Logits z, int64_t chunk, Moments<A>* moments) {
  const Place at = place(shape.classes);
  if (at.column >= shape.classes) return;
  int64_t begin = at.chunk * chunk;
  const int64_t end = min(begin + chunk, shape.rows);
  while (begin < end && ignored(shape, begin)) ++begin;
  const A first = begin < end ? load<T>(z, begin, at.column) : A{0};
  A count = 0, sum = 0;
  for (int64_t row = begin; row < end; ++row) {
    if (ignored(shape, row)) continue;
    count += 1;
    sum += load<T>(z, row, at.column) - first;
  }
  const A size = max(count, A{1});
  const Affine<A> mean = affine<A, A>(first, sum / size, 1);
  Deviations<A> all{0, 0};
  for (int64_t row = begin; row < end; ++row) {
    if (!ignored(shape, row)) all.add(mean.centred(load<T>(z, row, at.column)));
  }
  moments[at.chunk * shape.classes + at.column] = {count, mean.mean, mean.rest + all.sum / size, all.m2(size)};
}

// One thread per class: Chan's merge of its chunks, in order, given to write(column, moments). The rest is the mean
// less the first chunk's.
template <class A, class Write>
__global__ void merge_moments(const Moments<A>* moments, int64_t chunks, int64_t classes, Write write) {
  const int64_t column = thread_index();
  if (column >= classes) return;
  Moments<double> all{0, 0, 0, 0};
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const Moments<A> next = moments[chunk * classes + column];
    if (next.count == 0) continue;
    if (all.count == 0) all.mean = next.mean;
    const double delta = ((next.mean - all.mean) + next.rest) - all.rest;
    const double share = next.count / (all.count + next.count);
    all.m2 += next.m2 + delta * delta * all.count * share;
    all.rest += delta * share;
    all.count += next.count;
  }
  write(column, all);
}

// The results of col_stats.
struct WriteStats {
  double *mean, *m2;

  __device__ void operator()(int64_t column, const Moments<double>& all) const {
    mean[column] = all.mean + all.rest;
    m2[column] = all.m2;
  }
};

// The normalisation by those statistics.
template <class A>
struct WriteAffine {
  Affine<A>* columns;
  double eps;

  __device__ void operator()(int64_t column, const Moments<double>& all) const {
    const double variance = all.m2 / fmax(all.count, 1.0);
    columns[column] = affine<A, double>(all.mean, all.rest, 1 / sqrt(variance + eps));
  }
};

// The normalisation by given statistics, [2, classes] mean and variance.
template <class A>
__global__ void use_stats(const double* stats, int64_t classes, double eps, Affine<A>* columns) {
  const int64_t column = thread_index();
  if (column >= classes) return;
  columns[column] = affine<A, double>(stats[column], 0, 1 / sqrt(stats[classes + column] + eps));
}

// dL/dh of an element.
template <class A>
__device__ A slope(const RowFactors<A>& row, A h_s, A h_t, bool at_label, A inverse_temperature) {
  if (at_label) return row.at_label;
  return row.factor_s * Num<A>::exp((h_s - row.tops.student) * inverse_temperature) -
         row.factor_t * Num<A>::exp((h_t - row.tops.teacher) * inverse_temperature);
}

// Cross-entropy's part of the gradient at a class that is not the label.
template <class A>
__device__ A entropy_slope(const RowFactors<A>& row, A logit) {
  return row.ce_factor * Num<A>::exp(logit - row.tops.raw) - row.ce_uniform;
}

// Sums of a class's slopes over a chunk's rows, for the way through its statistics.
template <class T, class A = Acc<T>>
__global__ void col_pass(Problem p, Work<A> w) {
  const int64_t classes = p.shape.classes;
  const Place at = place(classes);
  if (at.column >= classes) return;
  const Affine<A> student = w.columns_s[at.column], teacher = w.columns_t[at.column];
  const int64_t begin = at.chunk * w.chunk, end = min(begin + w.chunk, p.shape.rows);
  ColSums<A> sums{0, 0};
  for (int64_t row = begin; row < end; ++row) {
    const RowFactors<A>& factors = w.factors[row];
    if (!factors.counts) continue;
    const A h_s = student(load<T>(p.student, row, at.column)), h_t = teacher(load<T>(p.teacher, row, at.column));
    const A g = slope(factors, h_s, h_t, p.decoupled && at.column == factors.label, w.inverse_temperature);
    sums.gradient += g;
    sums.tilt += g * h_s;
  }
  w.partial_sums[at.chunk * classes + at.column] = sums;
}

// One thread per class.
template <class A>
__global__ void merge_col_sums(const ColSums<A>* partial, int64_t chunks, int64_t classes, A* col_sums) {
  const int64_t column = thread_index();
  if (column >= classes) return;
  ColSums<double> all{0, 0};
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const ColSums<A> next = partial[chunk * classes + column];
    all.gradient += next.gradient;
    all.tilt += next.tilt;
  }
  col_sums[column] = static_cast<A>(all.gradient);
  col_sums[classes + column] = static_cast<A>(all.tilt);
}

// The gradient with respect to the student's logits.
template <class T, class A = Acc<T>>
__global__ void gradient(Problem p, Work<A> w) {
  const int64_t classes = p.shape.classes;
  const Place at = place(classes);
  if (at.column >= classes) return;
  const bool per_class = p.normalize == Normalize::per_class, instance = p.normalize == Normalize::instance;
  Affine<A> student{0, 0, 1}, teacher{0, 0, 1};
  ColSums<A> mean{0, 0};
  if (per_class) {
    student = w.columns_s[at.column];
    teacher = w.columns_t[at.column];
  }
  if (per_class && p.through) {
    const A* const sums = p.sums ? static_cast<const A*>(p.sums) : w.col_sums;
    const A rows = p.count ? *static_cast<const A*>(p.count) : *w.count, least = 1;
    mean = {sums[at.column] / max(rows, least), sums[classes + at.column] / max(rows, least)};
  }
  const int64_t begin = at.chunk * kGradRows, end = min(begin + kGradRows, p.shape.rows);
  for (int64_t row = begin; row < end; ++row) {
    const RowFactors<A>& factors = w.factors[row];
    A dz = 0;
    if (factors.counts) {
      if (instance) {
        student = factors.student;
        teacher = factors.teacher;
      }
      const A s = load<T>(p.student, row, at.column), h_s = student(s);
      const A h_t = teacher(load<T>(p.teacher, row, at.column));
      const bool at_label = at.column == factors.label;
      dz = slope(factors, h_s, h_t, p.decoupled && at_label, w.inverse_temperature);
      if (per_class && p.through) dz -= mean.gradient + h_s * mean.tilt;
      dz *= student.scale;
      if (instance) dz -= student.centred(s) * factors.spread;
      if (p.ce_weight != 0) dz += at_label ? factors.ce_at_label : entropy_slope(factors, s);
    }
    static_cast<T*>(p.grad)[row * classes + at.column] = Element<T>::narrow(dz);
  }
}

}  // namespace kdcore::cuda
