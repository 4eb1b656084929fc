// What the CUDA kernels are asked for. No torch here: the glue in ops_cuda.cpp fills it in. Every pointer is the
// device's; "acc" is double for double logits and float for the others. Nothing below waits for the device.
#pragma once
#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "plan.h"

namespace kdcore::cuda {

// The logits of one side.
struct Logits {
  const void* data;
  int64_t stride;  // elements between rows; within a row they are contiguous
};

// Rows and the labels that say which of them count.
struct Shape {
  int64_t rows, classes;
  Dtype dtype;
  const int64_t* index;  // [rows] labels, or null: every row counts
  int64_t ignore_index;
};

// One call. What is computed is what has a place to go.
struct Problem {
  Shape shape;
  Logits student, teacher;

  const void* row_beta;    // acc [rows], or null for beta
  const void* row_weight;  // acc [rows] factor of a row's gradient, or null for 1
  const void* grad_loss;   // acc: factor of the whole gradient, or null for 1
  bool mean;               // of the loss and, unless rows have weights, of the gradient
  double temperature, alpha, beta, kd_weight, ce_weight, label_smoothing, eps;
  Normalize normalize;
  bool decoupled;      // DKD; otherwise KD, which has no use for a label
  bool cross_entropy;  // compute its term; needs labels

  // per_class alone
  const double* stats;  // [4, classes] mean_s, var_s, mean_t, var_t, or null for those of these rows
  bool through;         // the gradient flows through the student's statistics
  const void* sums;     // acc [2, classes] col_sums, reduced elsewhere, for the way through; or null for those of these
  const void* count;    // acc: rows that sums cover; given with them

  // results, each unless null
  void* loss;  // acc: mean or sum of the rows' losses; with it part_means, acc [4]: kd, tckd, nckd, ce
  void* part_means;
  void* row_losses;  // acc [rows]; with it row_parts, acc [4, rows]
  void* row_parts;
  void* col_sums;  // acc [2, classes] sums over the rows of dL/dh and of h dL/dh, cross-entropy left out
  void* grad;      // [rows, classes] contiguous, in the logits' dtype

  void* record;   // record_bytes: what the gradient needs of all the rest, or null if nobody asks for it later
  bool recorded;  // it is there: compute the gradient from it and the logits alone; of the numbers, ce_weight != 0
                  // counts
};

// Device memory that run needs beside its arguments; it may hold anything.
size_t workspace_bytes(const Problem& problem);
size_t record_bytes(const Problem& problem);

cudaError_t run(const Problem& problem, void* workspace, cudaStream_t stream);

// Rows that count, mean and sum of squared deviations of each class ([classes] each).
struct ColStats {
  Shape shape;
  Logits logits;
  double *count, *mean, *m2;
};

size_t workspace_bytes(const ColStats& problem);

cudaError_t col_stats(const ColStats& problem, void* workspace, cudaStream_t stream);

}  // namespace kdcore::cuda
