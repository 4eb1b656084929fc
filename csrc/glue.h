// Between torch's tensors and the kernels' pointers, by the stable API alone.
#pragma once
#include <omp.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>

#include "arguments.h"
#include "cpu/problem.h"

namespace kdcore {

// torch's own numbers of the dtypes; each is a call, so they are asked for once.
struct Codes {
  int32_t f32 = aoti_torch_dtype_float32(), f64 = aoti_torch_dtype_float64(), f16 = aoti_torch_dtype_float16(),
          bf16 = aoti_torch_dtype_bfloat16(), i64 = aoti_torch_dtype_int64(), cpu = aoti_torch_device_type_cpu();
};

inline const Codes& codes() {
  static const Codes all;
  return all;
}

inline int32_t code_of(const Tensor& tensor) {
  int32_t code = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &code));
  return code;
}

inline cpu::Dtype dtype_of(int32_t code) {
  if (code == codes().f32) return cpu::Dtype::f32;
  if (code == codes().bf16) return cpu::Dtype::bf16;
  if (code == codes().f16) return cpu::Dtype::f16;
  KD_CHECK(code == codes().f64, "logits must be float32, float64, float16 or bfloat16");
  return cpu::Dtype::f64;
}

inline size_t width(cpu::Dtype dtype) { return dtype == cpu::Dtype::f64 ? 8 : dtype == cpu::Dtype::f32 ? 4 : 2; }

inline int32_t accumulator(int32_t code) { return code == codes().f64 ? code : codes().f32; }

// The kernels' team: torch's choice, which OpenMP alone does not know in a new thread.
inline int threads() { return omp_in_parallel() ? 1 : static_cast<int>(torch::stable::get_num_threads()); }

// Uninitialised and contiguous; the cheapest way there is through the stable API.
inline Tensor fresh(std::initializer_list<int64_t> sizes, int32_t code) {
  const int64_t strides[2] = {sizes.size() == 2 ? sizes.begin()[1] : 1, 1};
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(sizes.size(), sizes.begin(), strides, code, codes().cpu, 0, &made));
  return Tensor(made);
}

// Uninitialised room, on the stack while it is small.
template <class T, size_t near>
class Room {
 public:
  Room() {}  // not "= default", which would clear it
  Room(const Room&) = delete;
  Room& operator=(const Room&) = delete;

  T* take(int64_t size) {
    if (size <= static_cast<int64_t>(near)) return near_;
    far_ = std::make_unique_for_overwrite<T[]>(size);
    return far_.get();
  }

 private:
  T near_[near];
  std::unique_ptr<T[]> far_;
};

// The numbers of a float32 or float64 tensor as doubles; they stay where they are if that is what they are.
template <size_t near>
const double* doubles(const Tensor& tensor, int64_t size, Room<double, near>& room) {
  const int32_t code = code_of(tensor);
  KD_CHECK(code == codes().f32 || code == codes().f64,
           "row_beta, stats, sums and grad_loss must be float32 or float64");
  KD_CHECK(tensor.numel() == size, "row_beta, stats, sums or grad_loss has a wrong size");
  const bool plain = tensor.is_contiguous();
  if (plain && code == codes().f64) return static_cast<const double*>(tensor.data_ptr());
  const Tensor flat = plain ? tensor : torch::stable::contiguous(tensor);
  double* const out = room.take(size);
  if (code == codes().f64) {
    std::copy_n(static_cast<const double*>(flat.data_ptr()), size, out);
  } else {
    std::copy_n(static_cast<const float*>(flat.data_ptr()), size, out);
  }
  return out;
}

inline void store(void* out, int32_t code, const double* values, int64_t size) {
  if (code == codes().f64) {
    std::copy_n(values, size, static_cast<double*>(out));
  } else {
    std::copy_n(values, size, static_cast<float*>(out));
  }
}

// Which rows count. Where all do, nothing is copied.
class Rows {
 public:
  Rows(const OptionalTensor& index, int64_t rows, int64_t classes, int64_t ignore_index) : all(rows), valid(rows) {
    if (!index) return;
    KD_CHECK(code_of(*index) == codes().i64, "index must be int64");
    KD_CHECK(index->dim() == 1 && index->size(0) == rows, "index must have one label per row");
    index_ = rows == 0 || index->stride(0) == 1 ? *index : torch::stable::contiguous(*index);
    labels = static_cast<const int64_t*>(index_->data_ptr());
    int64_t outside = 0, ignored = 0;
    for (int64_t i = 0; i < rows; ++i) {
      const bool out = labels[i] == ignore_index;
      ignored += out;
      outside += !out & (static_cast<uint64_t>(labels[i]) >= static_cast<uint64_t>(classes));
    }
    if (outside) refuse(classes, ignore_index);
    if (ignored) choose(rows - ignored, ignore_index);
  }

  bool packed() const { return valid != all; }

  // The rows that count, one after the other.
  void gather(const void* from, int64_t stride, size_t bytes, char* to) const {
#pragma omp parallel for num_threads(threads()) if (valid * bytes > 1 << 18)
    for (int64_t i = 0; i < valid; ++i) {
      std::memcpy(to + i * bytes, static_cast<const char*>(from) + kept_[i] * stride, bytes);
    }
  }

  // Moves the first rows to their places, from the last on, so that none is overwritten before it moved.
  void scatter(void* data, size_t bytes) const {
    if (!packed()) return;
    char* const out = static_cast<char*>(data);
    int64_t end = all;
    for (int64_t i = valid - 1; i >= 0; --i) {
      std::memset(out + (kept_[i] + 1) * bytes, 0, (end - kept_[i] - 1) * bytes);
      if (kept_[i] != i) std::memcpy(out + kept_[i] * bytes, out + i * bytes, bytes);
      end = kept_[i];
    }
    std::memset(out, 0, end * bytes);
  }

  int64_t all, valid;
  const int64_t* labels = nullptr;  // of the rows that count

 private:
  [[noreturn]] void refuse(int64_t classes, int64_t ignore_index) const {
    const int64_t* bad = labels;
    while (*bad == ignore_index || (*bad >= 0 && *bad < classes)) ++bad;
    throw std::out_of_range("kdcore: label " + std::to_string(*bad) + " is outside the " + std::to_string(classes) +
                            " classes");
  }

  void choose(int64_t count, int64_t ignore_index) {
    int64_t* const packed = packed_room_.take(count);
    kept_ = kept_room_.take(count);
    int64_t next = 0;
    for (int64_t i = 0; i < all; ++i) {
      if (labels[i] == ignore_index) continue;
      packed[next] = labels[i];
      kept_[next++] = i;
    }
    labels = packed;
    valid = count;
  }

  OptionalTensor index_;
  int64_t* kept_ = nullptr;
  Room<int64_t, 256> packed_room_, kept_room_;
};

// The logits of one side as the kernels read them: elements side by side, any distance between rows.
struct Logits {
  explicit Logits(const Tensor& z)
      : tensor(z.stride(1) == 1 ? z : torch::stable::contiguous(z)),
        data(tensor.data_ptr()),
        stride(tensor.stride(0)) {}

  void pack(const Rows& rows, int64_t classes, size_t item, char* room) {
    rows.gather(data, stride * item, classes * item, room);
    data = room;
    stride = classes;
  }

  Tensor tensor;
  const void* data;
  int64_t stride;
};

}  // namespace kdcore
