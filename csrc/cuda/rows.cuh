// Passes over rows: how many count, each row's sums, what follows from them, and the sums over the rows.
#pragma once
#include "common.cuh"

namespace kdcore::cuda {

// One block.
template <class A>
__global__ void count_rows(Shape shape, A* count) {
  Total<int64_t> mine{0};
  for (int64_t row = threadIdx.x; row < shape.rows; row += kThreads) mine.value += !ignored(shape, row);
  const int64_t all = block_reduce(mine).value;
  if (threadIdx.x == 0) *count = static_cast<A>(all);
}

// The instance mode's statistics of a row, by its block; shifted by the row's first logit until the mean is known.
template <class T>
__device__ Affine<Acc<T>> standardise(const Logits& z, int64_t row, int64_t classes, double eps, Acc<T>* deviation) {
  using A = Acc<T>;
  const A first = load<T>(z, row, 0), size = static_cast<A>(classes);
  Total<A> sum{0};
  for (int64_t j = threadIdx.x; j < classes; j += kThreads) sum.value += load<T>(z, row, j) - first;
  const Affine<A> mean = affine<A, A>(first, block_reduce(sum).value / size, 1);
  Deviations<A> mine{0, 0};
  for (int64_t j = threadIdx.x; j < classes; j += kThreads) mine.add(mean.centred(load<T>(z, row, j)));
  const Deviations<A> all = block_reduce(mine);
  *deviation = sqrt(all.m2(size) / (size - 1));
  return {mean.mean, mean.rest + all.sum / size, 1 / (*deviation + static_cast<A>(eps))};
}

// The affine of a class: its own under per_class, otherwise the row's.
template <class A>
__device__ Affine<A> pick(const Affine<A>* columns, const Affine<A>& row, int64_t column) {
  return columns ? columns[column] : row;
}

// Nothing to shift by where every class is masked: their exponentials are 0 as they are.
template <class A>
__device__ A shift(A top) {
  return top == -INFINITY ? A{0} : top;
}

template <class T, class A = Acc<T>>
__device__ Tops<A> row_tops(const Problem& p, const Work<A>& w, const RowPass<A>& found, int64_t row,
                            int64_t left_out) {
  Tops<A> mine{-INFINITY, -INFINITY, -INFINITY};
  for (int64_t j = threadIdx.x; j < p.shape.classes; j += kThreads) {
    const A s = load<T>(p.student, row, j), t = load<T>(p.teacher, row, j);
    const bool out = j == left_out;
    mine.merge({out ? -INFINITY : pick(w.columns_s, found.student, j)(s),
                out ? -INFINITY : pick(w.columns_t, found.teacher, j)(t), s});
  }
  const Tops<A> all = block_reduce(mine);
  return {shift(all.student), shift(all.teacher), shift(all.raw)};
}

// One block per row.
template <class T, class A = Acc<T>>
__global__ void row_pass(Problem p, Work<A> w) {
  using N = Num<A>;
  const int64_t row = blockIdx.x, classes = p.shape.classes;
  if (ignored(p.shape, row)) return;
  const bool instance = p.normalize == Normalize::instance;
  const int64_t label = p.shape.index ? p.shape.index[row] : -1, left_out = p.decoupled ? label : -1;

  RowPass<A> found{{0, 0, 1}, {0, 0, 1}, 0, {}, {}};
  if (instance) {
    A of_teacher;
    found.teacher = standardise<T>(p.teacher, row, classes, p.eps, &of_teacher);
    found.student = standardise<T>(p.student, row, classes, p.eps, &found.deviation);
  }
  const Tops<A> tops = found.tops = row_tops<T>(p, w, found, row, left_out);

  Sums<A> mine{};
  for (int64_t j = threadIdx.x; j < classes; j += kThreads) {
    const A s = load<T>(p.student, row, j), t = load<T>(p.teacher, row, j);
    if (p.cross_entropy) {
      if (j != label) mine.ce_rest += N::exp(s - tops.raw);
      mine.ce_logits += s - tops.raw;
    }
    if (j == left_out) continue;
    const A u = (pick(w.columns_s, found.student, j)(s) - tops.student) * w.inverse_temperature;
    const A v = (pick(w.columns_t, found.teacher, j)(t) - tops.teacher) * w.inverse_temperature;
    const A e_u = N::exp(u), e_v = N::exp(v);
    mine.zs += e_u;
    mine.zt += e_v;
    if (e_v != 0) mine.gap += e_v * (v - u);  // a masked class would make 0 * inf of it
    if (instance) {
      const A d = found.student.centred(s);
      mine.tilt_s += e_u * d;
      mine.tilt_t += e_v * d;
    }
  }
  found.sums = block_reduce(mine);
  if (threadIdx.x == 0) w.passes[row] = found;
}

// The distillation terms of a row.
template <class T, class A = Acc<T>>
__device__ RowTerms<double> distillation(const Problem& p, const Work<A>& w, const RowPass<A>& found, int64_t row,
                                         int64_t label, double beta) {
  const RowSums<double> sums{found.sums.zs, found.sums.zt, found.sums.gap};
  if (!p.decoupled) return kd_terms(sums);
  const A h_s = pick(w.columns_s, found.student, label)(load<T>(p.student, row, label));
  const A h_t = pick(w.columns_t, found.teacher, label)(load<T>(p.teacher, row, label));
  const double label_s = static_cast<double>(h_s - found.tops.student) / p.temperature;
  const double label_t = static_cast<double>(h_t - found.tops.teacher) / p.temperature;
  RowTerms<double> terms = dkd_terms(sums, label_s, label_t, p.alpha, beta);
  if (p.shape.classes == 2) terms.nckd = 0;  // one class left: nothing to compare, whatever it holds
  return terms;
}

template <class T, class A = Acc<T>>
__device__ CrossEntropy<double> cross_entropy(const Problem& p, const RowPass<A>& found, int64_t row, int64_t label) {
  const double classes = static_cast<double>(p.shape.classes), mean = found.sums.ce_logits / classes;
  const double at_label = load<T>(p.student, row, label) - found.tops.raw;
  return cross_entropy_terms<double>(found.sums.ce_rest, at_label, mean, p.label_smoothing, classes);
}

// What the row gives to the gradient of each of its elements; weight is the row's, label -1 where there is none.
template <class T, class A = Acc<T>>
__device__ RowFactors<A> factors_of(const Problem& p, const RowPass<A>& found, const RowTerms<double>& terms,
                                    const CrossEntropy<double>& ce, int64_t row, int64_t label, double weight) {
  const double kd = weight * p.kd_weight * p.temperature, entropy = weight * p.ce_weight;
  RowFactors<A> made{};
  made.student = found.student;
  made.teacher = found.teacher;
  made.tops = found.tops;
  made.factor_s = static_cast<A>(kd * terms.student);
  made.factor_t = static_cast<A>(kd * terms.teacher);
  made.at_label = static_cast<A>(kd * terms.label);
  made.ce_factor = static_cast<A>(entropy * ce.other);
  made.ce_uniform = static_cast<A>(entropy * p.label_smoothing / static_cast<double>(p.shape.classes));
  made.ce_at_label = static_cast<A>(entropy * ce.at_label);
  if (p.normalize == Normalize::instance && found.deviation != 0) {
    double q = kd * (terms.student * found.sums.tilt_s - terms.teacher * found.sums.tilt_t);
    if (p.decoupled && label >= 0) q += kd * terms.label * found.student.centred(load<T>(p.student, row, label));
    const double scale = found.student.scale, freedom = static_cast<double>(p.shape.classes - 1);
    made.spread = static_cast<A>(scale * scale * q / (freedom * found.deviation));
  }
  made.label = label;
  made.counts = true;
  return made;
}

// A row's loss and parts; T^2 is in the first three, alpha and beta in kd.
template <class A>
__device__ void report(const Problem& p, const Work<A>& w, int64_t row, double kd, double tckd, double nckd,
                       double ce) {
  const double parts[4] = {kd, tckd, nckd, ce};
  for (int part = 0; part < 4; ++part) w.row_parts[part * p.shape.rows + row] = static_cast<A>(parts[part]);
  w.row_losses[row] = static_cast<A>(p.kd_weight * kd + (p.ce_weight != 0 ? p.ce_weight * ce : 0));
}

// One thread per row: what it reports and, for a gradient, its factors. All of a row with a label that is no class is
// NaN, and the label is never used as an index.
template <class T, class A = Acc<T>>
__global__ void row_terms(Problem p, Work<A> w) {
  const int64_t row = thread_index();
  if (row >= p.shape.rows) return;
  if (ignored(p.shape, row)) {
    w.factors[row].counts = false;
    return report(p, w, row, 0, 0, 0, 0);
  }
  const RowPass<A> found = w.passes[row];
  const int64_t label = p.shape.index ? p.shape.index[row] : -1;
  const bool missing = p.shape.index && (label < 0 || label >= p.shape.classes);
  const bool pair = p.decoupled && p.shape.classes == 2;
  const double beta = pair ? 0 : p.row_beta ? static_cast<const A*>(p.row_beta)[row] : p.beta;

  RowTerms<double> terms{NAN, NAN, NAN, NAN, NAN};
  CrossEntropy<double> ce{NAN, NAN, NAN};
  if (!missing) {
    terms = distillation<T>(p, w, found, row, label, beta);
    ce = p.cross_entropy ? cross_entropy<T>(p, found, row, label) : CrossEntropy<double>{0, 0, 0};
  }

  const double square = p.temperature * p.temperature, entropy = p.cross_entropy ? ce.loss : 0;
  if (p.decoupled) {
    const double kd = p.alpha * terms.tckd + (pair ? 0 : beta * terms.nckd);
    report(p, w, row, square * kd, square * terms.tckd, square * terms.nckd, entropy);
  } else {
    report(p, w, row, square * terms.nckd, 0, 0, entropy);
  }

  const double weight = p.row_weight ? static_cast<const A*>(p.row_weight)[row]
                        : p.mean     ? 1 / fmax(static_cast<double>(*w.count), 1.0)
                                     : 1.0;
  w.factors[row] = factors_of<T>(p, found, terms, ce, row, missing ? -1 : label, weight);
}

// Five blocks: the loss and its four parts, over the rows.
template <class A>
__global__ void reduce_rows(Problem p, Work<A> w) {
  const int64_t rows = p.shape.rows;
  const int part = static_cast<int>(blockIdx.x) - 1;
  const A* const values = part < 0 ? w.row_losses : w.row_parts + part * rows;
  Total<double> mine{0};
  for (int64_t row = threadIdx.x; row < rows; row += kThreads) mine.value += values[row];
  const double sum = block_reduce(mine).value, count = fmax(static_cast<double>(*w.count), 1.0);
  if (threadIdx.x != 0) return;
  A* const out = part < 0 ? static_cast<A*>(p.loss) : static_cast<A*>(p.part_means) + part;
  *out = static_cast<A>(part >= 0 || p.mean ? sum / count : sum);
}

}  // namespace kdcore::cuda
