// The ops' schemas, and the CPU side of each: arguments, rows to leave out, outputs. The maths is in cpu/.
#include <tuple>

#include "glue.h"

namespace kdcore {
namespace {

const Common& checked(const Common& c) {
  check_shapes(c);
  KD_CHECK(code_of(c.student) == code_of(c.teacher), "student and teacher differ in dtype");
  return c;
}

// One call as the kernels want it; keeps what the problem points to.
class Input {
 public:
  explicit Input(const Common& c)
      : code(code_of(checked(c).student)),
        rows(c.index, c.student.size(0), c.student.size(1), c.ignore_index),
        student_(c.student),
        teacher_(c.teacher),
        kd_weight_(c.kd_weight),
        ce_weight_(c.cross_entropy ? c.ce_weight : 0) {
    const int64_t classes = c.student.size(1);
    const cpu::Dtype dtype = dtype_of(code);
    if (rows.packed()) {
      const size_t item = width(dtype), bytes = rows.valid * classes * item;
      char* const room = static_cast<char*>(cpu::scratch(2 * bytes, cpu::Use::packing));
      student_.pack(rows, classes, item, room);
      teacher_.pack(rows, classes, item, room + bytes);
    }
    const bool others = c.decoupled && classes > 2;  // of two classes one is left beside the label
    const bool computed[] = {true, c.decoupled, others, c.cross_entropy};
    std::memcpy(computed_, computed, sizeof computed);
    problem = {
        .student = student_.data,
        .teacher = teacher_.data,
        .rows = rows.valid,
        .classes = classes,
        .student_stride = student_.stride,
        .teacher_stride = teacher_.stride,
        .dtype = dtype,
        .index = rows.labels,
        .row_beta = c.row_beta && others ? per_row(*c.row_beta, row_beta_) : nullptr,
        .row_weight = nullptr,
        .weight = 1,
        .temperature = c.temperature,
        .alpha = c.alpha,
        .beta = others ? c.beta : 0,
        .kd_weight = c.kd_weight,
        .ce_weight = ce_weight_,
        .label_smoothing = c.label_smoothing,
        .eps = c.eps,
        .normalize = static_cast<cpu::Normalize>(c.normalize),
        .decoupled = c.decoupled,
        .cross_entropy = c.cross_entropy,
        .stats = c.stats ? doubles(*c.stats, 4 * classes, stats_) : nullptr,
        .through = c.through,
        .sums = nullptr,
        .count = static_cast<double>(rows.valid),
        .terms = nullptr,
        .grad = nullptr,
        .sums_out = nullptr,
        .threads = threads(),
    };
  }

  // Factors of the rows' gradients. Those of a sum are one number, seen as many times as there are rows.
  void weigh(const Tensor& grad_loss) {
    KD_CHECK(grad_loss.dim() == 1 && grad_loss.size(0) == rows.all, "grad_loss must have one number per row");
    if (rows.all > 1 && grad_loss.stride(0) == 0) {
      Tensor seen = grad_loss;
      Room<double, 1> room;
      problem.weight = *doubles(torch::stable::narrow(seen, 0, 0, 1), 1, room);
    } else {
      problem.row_weight = per_row(grad_loss, weight_);
    }
  }

  // The gradient goes to the rows that count, first, and from there to their places.
  void run(void* grad = nullptr) {
    problem.grad = grad;
    if (rows.valid) cpu::run(problem);
    if (grad) rows.scatter(grad, problem.classes * width(problem.dtype));
  }

  // kd, tckd, nckd, ce: whether the call computes it.
  bool computed(int term) const { return computed_[term]; }

  double loss(double kd, double ce) const { return kd_weight_ * kd + (ce_weight_ != 0 ? ce_weight_ * ce : 0); }

  const int32_t code;
  const Rows rows;
  cpu::Problem problem;

 private:
  using RowRoom = Room<double, 256>;

  const double* per_row(const Tensor& tensor, RowRoom (&room)[2]) const {
    const double* const all = doubles(tensor, rows.all, room[0]);
    if (!rows.packed()) return all;
    double* const packed = room[1].take(rows.valid);
    rows.gather(all, sizeof(double), sizeof(double), reinterpret_cast<char*>(packed));
    return packed;
  }

  Logits student_, teacher_;
  double kd_weight_, ce_weight_;
  bool computed_[4];
  RowRoom row_beta_[2], weight_[2];
  Room<double, 512> stats_;
};

// Eight running sums, so that additions need not wait for each other.
double total(const double* values, int64_t size) {
  double sums[8] = {};
  int64_t i = 0;
  for (; i + 8 <= size; i += 8)
    for (int k = 0; k < 8; ++k) sums[k] += values[i + k];
  for (; i < size; ++i) sums[i % 8] += values[i];
  return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

std::tuple<Tensor, Tensor, Tensor> fused(KD_COMMON, bool mean, bool grad) {
  Input in(KD_COMMON_VALUES);
  const int64_t valid = in.rows.valid;
  const int32_t acc = accumulator(in.code);
  std::tuple<Tensor, Tensor, Tensor> out{
      fresh({}, acc), fresh({4}, acc), grad ? fresh({in.rows.all, in.problem.classes}, in.code) : fresh({0}, in.code)};
  Room<double, 1024> room;
  const double* const terms = in.problem.terms = room.take(4 * valid);
  in.problem.weight = mean && valid ? 1 / static_cast<double>(valid) : 1;
  in.run(grad ? std::get<2>(out).data_ptr() : nullptr);
  double sums[4], means[4];
  for (int term = 0; term < 4; ++term) {
    sums[term] = in.computed(term) ? total(terms + term * valid, valid) : 0;
    means[term] = valid ? sums[term] / static_cast<double>(valid) : 0;
  }
  const double loss = mean ? in.loss(means[0], means[3]) : in.loss(sums[0], sums[3]);
  store(std::get<0>(out).data_ptr(), acc, &loss, 1);
  store(std::get<1>(out).data_ptr(), acc, means, 4);
  return out;
}

std::tuple<Tensor, Tensor> forward(KD_COMMON) {
  KD_CHECK(normalize != 1 || stats, "normalize = 1 needs stats");
  Input in(KD_COMMON_VALUES);
  const int64_t all = in.rows.all, valid = in.rows.valid;
  const int32_t acc = accumulator(in.code);
  const size_t item = acc == codes().f64 ? sizeof(double) : sizeof(float);
  std::tuple<Tensor, Tensor> out{fresh({all}, acc), fresh({4, all}, acc)};
  Room<double, 1280> room;
  double* const terms = in.problem.terms = room.take(5 * valid);
  double* const loss = terms + 4 * valid;
  in.run();
  const auto put = [&](void* to, const double* values) {
    store(to, acc, values, valid);
    in.rows.scatter(to, item);
  };
  for (int64_t i = 0; i < valid; ++i) loss[i] = in.loss(terms[i], terms[3 * valid + i]);
  put(std::get<0>(out).data_ptr(), loss);
  for (int term = 0; term < 4; ++term) {
    double* const values = terms + term * valid;
    if (!in.computed(term)) std::memset(values, 0, valid * sizeof(double));
    put(static_cast<char*>(std::get<1>(out).data_ptr()) + term * all * item, values);
  }
  return out;
}

Tensor sums(const Tensor& grad_loss, KD_COMMON) {
  KD_CHECK(normalize == 1 && stats, "sums needs normalize = 1 and stats");
  Input in(KD_COMMON_VALUES);
  in.weigh(grad_loss);
  const int64_t size = 2 * in.problem.classes;
  const int32_t acc = accumulator(in.code);
  Tensor out = fresh({2, in.problem.classes}, acc);
  const auto values = std::make_unique<double[]>(size);  // 0 where no row counts
  in.problem.sums_out = values.get();
  in.run();
  store(out.data_ptr(), acc, values.get(), size);
  return out;
}

Tensor backward(const Tensor& grad_loss, KD_COMMON, const OptionalTensor& sums, const OptionalTensor& count) {
  KD_CHECK(normalize != 1 || stats, "normalize = 1 needs stats");
  KD_CHECK(sums.has_value() == count.has_value(), "sums and count belong together");
  Input in(KD_COMMON_VALUES);
  in.weigh(grad_loss);
  Room<double, 256> sums_room;
  Room<double, 1> count_room;
  if (sums) {
    in.problem.sums = doubles(*sums, 2 * in.problem.classes, sums_room);
    in.problem.count = *doubles(*count, 1, count_room);
  }
  Tensor out = fresh({in.rows.all, in.problem.classes}, in.code);
  in.run(out.data_ptr());
  return out;
}

std::tuple<Tensor, Tensor, Tensor> col_stats(const Tensor& z, const OptionalTensor& index, int64_t ignore_index) {
  KD_CHECK(z.dim() == 2 && z.size(1) >= 1, "logits must be [B, C]");
  const int64_t classes = z.size(1);
  const cpu::Dtype dtype = dtype_of(code_of(z));
  const Rows rows(index, z.size(0), classes, ignore_index);
  Logits logits(z);
  if (rows.packed()) {
    const size_t item = width(dtype);
    logits.pack(rows, classes, item, static_cast<char*>(cpu::scratch(rows.valid * classes * item, cpu::Use::packing)));
  }
  const int32_t f64 = codes().f64;  // a mean in float32 would lose what an offset leaves of it
  std::tuple<Tensor, Tensor, Tensor> out{fresh({}, f64), fresh({classes}, f64), fresh({classes}, f64)};
  auto* const mean = static_cast<double*>(std::get<1>(out).data_ptr());
  auto* const m2 = static_cast<double*>(std::get<2>(out).data_ptr());
  *static_cast<double*>(std::get<0>(out).data_ptr()) = static_cast<double>(rows.valid);
  if (rows.valid) {
    cpu::col_stats(logits.data, rows.valid, classes, logits.stride, dtype, mean, m2, threads());
  } else {
    std::fill_n(mean, classes, 0.0);
    std::fill_n(m2, classes, 0.0);
  }
  return out;
}

#define KD_COMMON_SCHEMA                                                                                \
  "Tensor student, Tensor teacher, Tensor? index, Tensor? row_beta, Tensor? stats, float temperature, " \
  "float alpha, float beta, float kd_weight, float ce_weight, float label_smoothing, float eps, "       \
  "int ignore_index, int normalize, bool decoupled, bool cross_entropy, bool through"

}  // namespace
}  // namespace kdcore

STABLE_TORCH_LIBRARY(kdcore, m) {
  m.def("col_stats(Tensor z, Tensor? index, int ignore_index) -> (Tensor count, Tensor mean, Tensor m2)");
  m.def("fused(" KD_COMMON_SCHEMA ", bool mean, bool grad) -> (Tensor loss, Tensor parts, Tensor grad)");
  m.def("prepare(" KD_COMMON_SCHEMA ", bool mean) -> (Tensor loss, Tensor parts, Tensor record)");
  m.def(
      "complete(Tensor grad_loss, Tensor student, Tensor teacher, Tensor record, int normalize, bool decoupled, "
      "bool cross_entropy, bool through, bool mean) -> Tensor");
  m.def("forward(" KD_COMMON_SCHEMA ") -> (Tensor loss, Tensor parts)");
  m.def("sums(Tensor grad_loss, " KD_COMMON_SCHEMA ") -> Tensor");
  m.def("backward(Tensor grad_loss, " KD_COMMON_SCHEMA ", Tensor? sums, Tensor? count) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(kdcore, CPU, m) {
  m.impl("col_stats", TORCH_BOX(&kdcore::col_stats));
  m.impl("fused", TORCH_BOX(&kdcore::fused));
  m.impl("forward", TORCH_BOX(&kdcore::forward));
  m.impl("sums", TORCH_BOX(&kdcore::sums));
  m.impl("backward", TORCH_BOX(&kdcore::backward));
}
