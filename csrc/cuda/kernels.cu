// Runs the kernels of rows.cuh and columns.cuh, in an order that shapes and arguments alone decide: no result is read
// back, so a call can be captured in a CUDA graph and replayed.
#include <algorithm>
#include <limits>

#include "columns.cuh"
#include "rows.cuh"

namespace kdcore::cuda {
namespace {

template <class F>
auto with_dtype(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::f64:
      return f(double{});
    case Dtype::f16:
      return f(__half{});
    case Dtype::bf16:
      return f(__nv_bfloat16{});
    default:
      return f(float{});
  }
}

// Cuts a block of memory into arrays. From null it only measures.
class Carver {
 public:
  explicit Carver(void* base) : base_(static_cast<char*>(base)) {}

  template <class V>
  V* take(int64_t size) {
    constexpr size_t aligned = 256;
    const size_t at = bytes_;
    bytes_ += (static_cast<size_t>(size) * sizeof(V) + aligned - 1) / aligned * aligned;
    return base_ ? reinterpret_cast<V*>(base_ + at) : nullptr;
  }

  size_t bytes() const { return bytes_; }

 private:
  char* base_;
  size_t bytes_ = 0;
};

// Rows that one thread adds up in a pass over columns: few, for many threads, where there are few columns; at most 512
// chunks, which one thread merges.
int64_t chunk_rows(const Shape& shape) {
  const int64_t least = shape.classes < 8192 ? 32 : 256, chunks = 512;
  return std::max(least, (shape.rows + chunks - 1) / chunks);
}

int64_t chunks_of(int64_t rows, int64_t chunk) { return (rows + chunk - 1) / chunk; }

// Queues kernels on a stream until one cannot be.
class Queue {
 public:
  explicit Queue(cudaStream_t stream) { config_.stream = stream; }

  template <class... Parameters, class... Values>
  void run(void (*kernel)(Parameters...), int64_t blocks, const Values&... values) {
    if (error_ != cudaSuccess || blocks == 0) return;
    if (blocks > std::numeric_limits<int32_t>::max()) {
      error_ = cudaErrorInvalidConfiguration;
      return;
    }
    config_.gridDim = dim3(static_cast<unsigned>(blocks));
    config_.blockDim = dim3(kThreads);
    error_ = cudaLaunchKernelEx(&config_, kernel, static_cast<Parameters>(values)...);
    if (error_ != cudaSuccess) cudaGetLastError();  // it is reported: the next call starts clean
  }

  cudaError_t error() const { return error_; }

 private:
  cudaLaunchConfig_t config_{};
  cudaError_t error_ = cudaSuccess;
};

bool needs_col_sums(const Problem& p) {
  return p.normalize == Normalize::per_class && (p.col_sums || (p.grad && p.through && !p.sums));
}

template <class A>
Work<A> carve(const Problem& p, Carver& memory) {
  const int64_t rows = p.shape.rows, classes = p.shape.classes;
  Work<A> w{};
  w.inverse_temperature = static_cast<A>(1 / p.temperature);
  w.chunk = chunk_rows(p.shape);
  w.chunks = chunks_of(rows, w.chunk);
  w.count = memory.take<A>(1);
  if (p.normalize == Normalize::per_class) {
    w.columns_s = memory.take<Affine<A>>(classes);
    w.columns_t = memory.take<Affine<A>>(classes);
    if (!p.stats) w.moments = memory.take<Moments<A>>(w.chunks * classes);
  }
  w.passes = memory.take<RowPass<A>>(rows);
  w.factors = memory.take<RowFactors<A>>(rows);
  w.row_losses = p.row_losses ? static_cast<A*>(p.row_losses) : memory.take<A>(rows);
  w.row_parts = p.row_parts ? static_cast<A*>(p.row_parts) : memory.take<A>(4 * rows);
  if (needs_col_sums(p)) {
    w.partial_sums = memory.take<ColSums<A>>(w.chunks * classes);
    w.col_sums = p.col_sums ? static_cast<A*>(p.col_sums) : memory.take<A>(2 * classes);
  }
  return w;
}

// The normalisation of each class of one side; stats are its given mean and variance, or null.
template <class T, class A = Acc<T>>
void normalise(const Problem& p, const Work<A>& w, const Logits& z, const double* stats, Affine<A>* columns,
               Queue& queue) {
  const int64_t classes = p.shape.classes, across = tiles(classes);
  if (stats) return queue.run(use_stats<A>, across, stats, classes, p.eps, columns);
  queue.run(col_moments<T>, across * w.chunks, p.shape, z, w.chunk, w.moments);
  queue.run(merge_moments<A, WriteAffine<A>>, across, w.moments, w.chunks, classes, WriteAffine<A>{columns, p.eps});
}

template <class T, class A = Acc<T>>
cudaError_t run_typed(const Problem& p, const Work<A>& w, cudaStream_t stream) {
  const int64_t rows = p.shape.rows, across = tiles(p.shape.classes);
  const bool per_class = p.normalize == Normalize::per_class;
  Queue queue(stream);
  if (p.loss || (per_class && p.grad && p.through && !p.count)) queue.run(count_rows<A>, 1, p.shape, w.count);
  if (per_class) {
    normalise<T>(p, w, p.student, p.stats, w.columns_s, queue);
    normalise<T>(p, w, p.teacher, p.stats ? p.stats + 2 * p.shape.classes : nullptr, w.columns_t, queue);
  }
  queue.run(row_pass<T>, rows, p, w);
  queue.run(row_terms<T>, tiles(rows), p, w);
  if (p.loss) queue.run(reduce_rows<A>, 5, p, w);
  if (needs_col_sums(p)) {
    queue.run(col_pass<T>, across * w.chunks, p, w);
    queue.run(merge_col_sums<A>, across, w.partial_sums, w.chunks, p.shape.classes, w.col_sums);
  }
  if (p.grad) queue.run(gradient<T>, across * chunks_of(rows, kGradRows), p, w);
  return queue.error();
}

template <class A>
Moments<A>* carve(const ColStats& p, Carver& memory) {
  return memory.take<Moments<A>>(chunks_of(p.shape.rows, chunk_rows(p.shape)) * p.shape.classes);
}

}  // namespace

size_t workspace_bytes(const Problem& problem) {
  Carver memory(nullptr);
  with_dtype(problem.shape.dtype, [&](auto zero) { carve<Acc<decltype(zero)>>(problem, memory); });
  return memory.bytes();
}

cudaError_t run(const Problem& problem, void* workspace, cudaStream_t stream) {
  return with_dtype(problem.shape.dtype, [&](auto zero) {
    using T = decltype(zero);
    Carver memory(workspace);
    return run_typed<T>(problem, carve<Acc<T>>(problem, memory), stream);
  });
}

size_t workspace_bytes(const ColStats& problem) {
  Carver memory(nullptr);
  with_dtype(problem.shape.dtype, [&](auto zero) { carve<Acc<decltype(zero)>>(problem, memory); });
  return memory.bytes();
}

cudaError_t col_stats(const ColStats& problem, void* workspace, cudaStream_t stream) {
  return with_dtype(problem.shape.dtype, [&](auto zero) {
    using T = decltype(zero);
    using A = Acc<T>;
    const Shape& shape = problem.shape;
    const int64_t chunk = chunk_rows(shape), chunks = chunks_of(shape.rows, chunk), across = tiles(shape.classes);
    const WriteStats write{problem.mean, problem.m2};
    Carver memory(workspace);
    Moments<A>* const moments = carve<A>(problem, memory);
    Queue queue(stream);
    queue.run(count_rows<double>, 1, shape, problem.count);
    queue.run(col_moments<T>, across * chunks, shape, problem.logits, chunk, moments);
    queue.run(merge_moments<A, WriteStats>, across, moments, chunks, shape.classes, write);
    return queue.error();
  });
}

}  // namespace kdcore::cuda
