// The CUDA side of the ops whose schemas are in ../ops.cpp: arguments, outputs, workspace. The maths is in kernels.cu.
// Nothing here reads from the device: no label is checked, no row counted, and the caller never waits.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>

#include "../arguments.h"
#include "launch.h"

namespace kdcore {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::accelerator::DeviceGuard;

cuda::Dtype dtype_of(const Tensor& logits) {
  const ScalarType type = logits.scalar_type();
  if (type == ScalarType::Float) return cuda::Dtype::f32;
  if (type == ScalarType::BFloat16) return cuda::Dtype::bf16;
  if (type == ScalarType::Half) return cuda::Dtype::f16;
  KD_CHECK(type == ScalarType::Double, "logits must be float32, float64, float16 or bfloat16");
  return cuda::Dtype::f64;
}

ScalarType accumulator(const Tensor& logits) {
  return logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

Tensor fresh(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType type) {
  return torch::stable::new_empty(like, sizes, type);
}

Tensor row_major(const Tensor& z) { return z.stride(1) == 1 ? z : torch::stable::contiguous(z); }

void check_device(const Tensor& tensor, const Tensor& student) {
  KD_CHECK(tensor.is_cuda() && tensor.get_device_index() == student.get_device_index(),
           "every tensor must be on the student's device");
}

// Contiguous numbers in the dtype that the kernels take.
OptionalTensor numbers(const OptionalTensor& tensor, int64_t size, const Tensor& student, ScalarType wanted) {
  if (!tensor) return std::nullopt;
  check_device(*tensor, student);
  KD_CHECK(tensor->numel() == size, "row_beta, stats, sums, count or grad_loss has a wrong size");
  const ScalarType type = tensor->scalar_type();
  KD_CHECK(type == ScalarType::Float || type == ScalarType::Double,
           "row_beta, stats, sums, count and grad_loss must be float32 or float64");
  return torch::stable::contiguous(type == wanted ? *tensor : torch::stable::to(*tensor, wanted));
}

OptionalTensor labels(const OptionalTensor& index, const Tensor& student) {
  if (!index) return std::nullopt;
  check_device(*index, student);
  KD_CHECK(index->scalar_type() == ScalarType::Long, "index must be int64");
  KD_CHECK(index->dim() == 1 && index->size(0) == student.size(0), "index must have one label per row");
  return torch::stable::contiguous(*index);
}

const void* data(const OptionalTensor& tensor) { return tensor ? tensor->data_ptr() : nullptr; }

// Runs on the current stream of the logits' device; torch reuses the workspace only behind it on that stream.
template <class Problem, class Launch>
void launch(const Problem& problem, const Tensor& logits, Launch run) {
  const Tensor workspace = fresh(logits, {static_cast<int64_t>(cuda::workspace_bytes(problem))}, ScalarType::Byte);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(logits.get_device_index(), &stream));
  const cudaError_t error = run(problem, workspace.data_ptr(), static_cast<cudaStream_t>(stream));
  if (error != cudaSuccess) throw std::runtime_error(std::string("kdcore: CUDA: ") + cudaGetErrorString(error));
}

const Common& checked(const Common& c) {
  KD_CHECK(c.student.is_cuda(), "student must be on a CUDA device");
  check_shapes(c);
  KD_CHECK(c.student.scalar_type() == c.teacher.scalar_type(), "student and teacher differ in dtype");
  KD_CHECK(c.student.size(1) < (int64_t{1} << 30), "logits have too many classes");
  check_device(c.teacher, c.student);
  return c;
}

// One call as the kernels want it; keeps what the problem points to.
class Input {
 public:
  explicit Input(const Common& c)
      : guard_(checked(c).student.get_device_index()),
        student_(row_major(c.student)),
        teacher_(row_major(c.teacher)),
        index_(labels(c.index, c.student)),
        row_beta_(numbers(c.row_beta, c.student.size(0), c.student, accumulator(c.student))),
        stats_(numbers(c.stats, 4 * c.student.size(1), c.student, ScalarType::Double)),
        rows(c.student.size(0)),
        classes(c.student.size(1)),
        type(c.student.scalar_type()),
        acc(accumulator(c.student)) {
    problem.shape = {rows, classes, dtype_of(c.student), static_cast<const int64_t*>(data(index_)), c.ignore_index};
    problem.student = {student_.data_ptr(), student_.stride(0)};
    problem.teacher = {teacher_.data_ptr(), teacher_.stride(0)};
    problem.row_beta = data(row_beta_);
    problem.temperature = c.temperature;
    problem.alpha = c.alpha;
    problem.beta = c.beta;
    problem.kd_weight = c.kd_weight;
    problem.ce_weight = c.cross_entropy ? c.ce_weight : 0;
    problem.label_smoothing = c.label_smoothing;
    problem.eps = c.eps;
    problem.normalize = static_cast<cuda::Normalize>(c.normalize);
    problem.decoupled = c.decoupled;
    problem.cross_entropy = c.cross_entropy;
    problem.stats = static_cast<const double*>(data(stats_));
    problem.through = c.through;
  }

  void weigh(const Tensor& grad_loss) {
    KD_CHECK(grad_loss.dim() == 1 && grad_loss.size(0) == rows, "grad_loss must have one number per row");
    row_weight_ = numbers(grad_loss, rows, student_, acc);
    problem.row_weight = data(row_weight_);
  }

  void use_sums(const Tensor& sums, const Tensor& count) {
    sums_ = numbers(sums, 2 * classes, student_, acc);
    count_ = numbers(count, 1, student_, acc);
    problem.sums = data(sums_);
    problem.count = data(count_);
  }

  Tensor make(std::initializer_list<int64_t> sizes, ScalarType of) const { return fresh(student_, sizes, of); }

  void run() const { launch(problem, student_, cuda::run); }

 private:
  DeviceGuard guard_;
  Tensor student_, teacher_;
  OptionalTensor index_, row_beta_, stats_, row_weight_, sums_, count_;

 public:
  int64_t rows, classes;
  ScalarType type, acc;
  cuda::Problem problem{};
};

std::tuple<Tensor, Tensor, Tensor> fused(KD_COMMON, bool mean, bool grad) {
  Input in(KD_COMMON_VALUES);
  const Tensor loss = in.make({}, in.acc), parts = in.make({4}, in.acc);
  const Tensor gradient = grad ? in.make({in.rows, in.classes}, in.type) : in.make({0}, in.type);
  in.problem.mean = mean;
  in.problem.loss = loss.data_ptr();
  in.problem.part_means = parts.data_ptr();
  in.problem.grad = grad ? gradient.data_ptr() : nullptr;
  in.run();
  return {loss, parts, gradient};
}

// The loss, and what its gradient needs beside the logits: a byte for each, whose layout the kernels know.
std::tuple<Tensor, Tensor, Tensor> prepare(KD_COMMON, bool mean) {
  Input in(KD_COMMON_VALUES);
  const Tensor loss = in.make({}, in.acc), parts = in.make({4}, in.acc);
  const Tensor record = in.make({static_cast<int64_t>(cuda::record_bytes(in.problem))}, ScalarType::Byte);
  in.problem.mean = mean;
  in.problem.loss = loss.data_ptr();
  in.problem.part_means = parts.data_ptr();
  in.problem.record = record.data_ptr();
  in.run();
  return {loss, parts, record};
}

Tensor complete(const Tensor& grad_loss, const Tensor& student, const Tensor& teacher, const Tensor& record,
                int64_t normalize, bool decoupled, bool cross_entropy, bool through, bool mean) {
  constexpr double kAny = 1;  // the record has it
  Input in({student, teacher, std::nullopt, std::nullopt, std::nullopt, kAny, kAny, kAny, kAny,
            cross_entropy ? 1.0 : 0.0, 0, kAny, 0, normalize, decoupled, cross_entropy, through, true});
  const OptionalTensor factor = numbers(grad_loss, 1, student, in.acc);
  KD_CHECK(record.is_cuda() && static_cast<size_t>(record.numel()) == cuda::record_bytes(in.problem),
           "record is not that of these logits");
  const Tensor out = in.make({in.rows, in.classes}, in.type);
  in.problem.mean = mean;
  in.problem.grad_loss = data(factor);
  in.problem.record = record.data_ptr();
  in.problem.recorded = true;
  in.problem.grad = out.data_ptr();
  in.run();
  return out;
}

std::tuple<Tensor, Tensor> forward(KD_COMMON) {
  KD_CHECK(normalize != 1 || stats, "normalize = 1 needs stats");
  Input in(KD_COMMON_VALUES);
  const Tensor losses = in.make({in.rows}, in.acc), parts = in.make({4, in.rows}, in.acc);
  in.problem.row_losses = losses.data_ptr();
  in.problem.row_parts = parts.data_ptr();
  in.run();
  return {losses, parts};
}

Tensor sums(const Tensor& grad_loss, KD_COMMON) {
  KD_CHECK(normalize == 1 && stats, "sums needs normalize = 1 and stats");
  Input in(KD_COMMON_VALUES);
  in.weigh(grad_loss);
  const Tensor out = in.make({2, in.classes}, in.acc);
  in.problem.col_sums = out.data_ptr();
  in.run();
  return out;
}

Tensor backward(const Tensor& grad_loss, KD_COMMON, const OptionalTensor& sums, const OptionalTensor& count) {
  KD_CHECK(normalize != 1 || stats, "normalize = 1 needs stats");
  KD_CHECK(sums.has_value() == count.has_value(), "sums and count belong together");
  Input in(KD_COMMON_VALUES);
  in.weigh(grad_loss);
  if (sums) in.use_sums(*sums, *count);
  const Tensor out = in.make({in.rows, in.classes}, in.type);
  in.problem.grad = out.data_ptr();
  in.run();
  return out;
}

std::tuple<Tensor, Tensor, Tensor> col_stats(const Tensor& z, const OptionalTensor& index, int64_t ignore_index) {
  KD_CHECK(z.is_cuda(), "logits must be on a CUDA device");
  KD_CHECK(z.dim() == 2 && z.size(1) >= 1, "logits must be [B, C]");
  const DeviceGuard guard(z.get_device_index());
  const Tensor logits = row_major(z);
  const OptionalTensor labels_of = labels(index, z);
  const ScalarType f64 = ScalarType::Double;  // a mean in float32 would lose what an offset leaves of it
  const Tensor count = fresh(z, {}, f64), mean = fresh(z, {z.size(1)}, f64), m2 = fresh(z, {z.size(1)}, f64);
  cuda::ColStats problem{};
  problem.shape = {z.size(0), z.size(1), dtype_of(z), static_cast<const int64_t*>(data(labels_of)), ignore_index};
  problem.logits = {logits.data_ptr(), logits.stride(0)};
  problem.count = static_cast<double*>(count.data_ptr());
  problem.mean = static_cast<double*>(mean.data_ptr());
  problem.m2 = static_cast<double*>(m2.data_ptr());
  launch(problem, z, cuda::col_stats);
  return {count, mean, m2};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kdcore, CUDA, m) {
  m.impl("col_stats", TORCH_BOX(&col_stats));
  m.impl("fused", TORCH_BOX(&fused));
  m.impl("prepare", TORCH_BOX(&prepare));
  m.impl("complete", TORCH_BOX(&complete));
  m.impl("forward", TORCH_BOX(&forward));
  m.impl("sums", TORCH_BOX(&sums));
  m.impl("backward", TORCH_BOX(&backward));
}

}  // namespace kdcore
