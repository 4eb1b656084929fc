// What the CPU kernels are asked for. No torch here: the glue in ops.cpp fills it in.
#pragma once
#include <cstdint>

namespace kdcore::cpu {

enum class Dtype { f32, f64, f16, bf16 };
enum class Normalize { none, per_class, instance };  // the order is that of the ops' argument

// One call, over rows that all count: the glue has taken the ignored ones out and checked the labels.
struct Problem {
  const void* student;
  const void* teacher;
  int64_t rows, classes;
  int64_t student_stride, teacher_stride;  // elements between rows; within a row they are contiguous
  Dtype dtype;

  const int64_t* index;      // [rows] labels, or null
  const double* row_beta;    // [rows], or null for beta
  const double* row_weight;  // [rows] factor of a row's gradient, or null for weight
  double weight;
  double temperature, alpha, beta, kd_weight, ce_weight, label_smoothing, eps;
  Normalize normalize;
  bool decoupled;      // DKD; otherwise KD, which has no use for a label
  bool cross_entropy;  // compute its term; needs labels

  // per_class alone
  const double* stats;  // [4, classes] mean_s, var_s, mean_t, var_t, or null for those of these rows
  bool through;         // the gradient flows through the student's statistics
  const double* sums;  // [2, classes] sums_out, reduced elsewhere, for the way through; or null for those of these rows
  double count;        // rows that the statistics cover

  // results, each unless null
  double* terms;     // [4, rows] kd, tckd, nckd, ce: T^2 in the first three, alpha and beta in kd
  void* grad;        // [rows, classes] contiguous: of sum_i weight_i (kd_weight kd_i + ce_weight ce_i)
  double* sums_out;  // [2, classes] sums over the rows of dL/dh and of h dL/dh

  int threads;  // the results do not depend on it
};

enum class Isa { generic, avx2, avx512 };

Isa best_isa();         // of this machine
Isa current_isa();      // best_isa, lowered by KDCORE_CPU_ISA or set_isa
bool set_isa(Isa isa);  // false: this machine does not have it
const char* isa_name(Isa);
bool parse_isa(const char* name, Isa* isa);

// The calling thread's memory for one call, at least that large and aligned to a cache line. Blocks of usual size are
// kept for its next call, because fresh pages cost more than what is done with them; larger ones go when the call ends.
enum class Use { kernels, packing };
void* scratch(int64_t bytes, Use use);

void run(const Problem& problem);

// Mean and sum of squared deviations of each class, [classes] each.
void col_stats(const void* z, int64_t rows, int64_t classes, int64_t stride, Dtype dtype, double* mean, double* m2,
               int threads);

}  // namespace kdcore::cpu
