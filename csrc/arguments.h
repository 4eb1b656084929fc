// What the ops are called with, on every device: by the stable API alone.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <stdexcept>

// The checks of torch::stable name the file on the machine that built it; the Python side explains these further.
#define KD_CHECK(condition, text)                                \
  do {                                                           \
    if (!(condition)) throw std::runtime_error("kdcore: " text); \
  } while (false)

namespace kdcore {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// What every op but col_stats is given first, in the order of the schemas.
struct Common {
  const Tensor &student, &teacher;
  const OptionalTensor &index, &row_beta, &stats;
  double temperature, alpha, beta, kd_weight, ce_weight, label_smoothing, eps;
  int64_t ignore_index, normalize;
  bool decoupled, cross_entropy, through;
  bool recorded = false;  // labels and numbers are in a record
};

#define KD_COMMON                                                                                                      \
  const Tensor &student, const Tensor &teacher, const OptionalTensor &index, const OptionalTensor &row_beta,           \
      const OptionalTensor &stats, double temperature, double alpha, double beta, double kd_weight, double ce_weight,  \
      double label_smoothing, double eps, int64_t ignore_index, int64_t normalize, bool decoupled, bool cross_entropy, \
      bool through
#define KD_COMMON_VALUES                                                                                            \
  Common {                                                                                                          \
    student, teacher, index, row_beta, stats, temperature, alpha, beta, kd_weight, ce_weight, label_smoothing, eps, \
        ignore_index, normalize, decoupled, cross_entropy, through                                                  \
  }

inline void check_shapes(const Common& c) {
  KD_CHECK(c.student.dim() == 2 && c.teacher.dim() == 2, "logits must be [B, C]");
  KD_CHECK(c.student.size(0) == c.teacher.size(0) && c.student.size(1) == c.teacher.size(1),
           "student and teacher differ in shape");
  KD_CHECK(c.student.size(1) >= 2, "logits need at least 2 classes");
  KD_CHECK(c.normalize >= 0 && c.normalize <= 2, "normalize must be 0, 1 or 2");
  KD_CHECK(c.recorded || c.index || !(c.decoupled || c.cross_entropy), "DKD and cross-entropy need index");
  KD_CHECK(!c.stats || (c.normalize == 1 && c.stats->dim() == 2 && c.stats->size(0) == 4),
           "stats must be [4, C], with normalize = 1");
}

}  // namespace kdcore
