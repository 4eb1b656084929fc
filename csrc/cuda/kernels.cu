// Runs the kernels of columns.cuh, rows.cuh, tile.cuh and gradient.cuh, in an order that shapes and arguments alone
// decide: no result is read back, so a call can be captured in a CUDA graph and replayed.
#include <initializer_list>
#include <limits>
#include <type_traits>

#include "gradient.cuh"
#include "rows.cuh"
#include "tile.cuh"

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

template <class F>
auto with_bool(bool value, F f) {
  return value ? f(std::true_type{}) : f(std::false_type{});
}

template <class T>
constexpr int kVector = sizeof(T) == 8 ? 2 : 4;  // as in plan.h

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

// Queues kernels on a stream until one cannot be.
class Queue {
 public:
  explicit Queue(cudaStream_t stream) { config_.stream = stream; }

  template <class... Parameters, class... Values>
  void run(void (*kernel)(Parameters...), int64_t blocks, int threads, const Values&... values) {
    if (error_ != cudaSuccess || blocks == 0) return;
    if (blocks > std::numeric_limits<int32_t>::max()) {
      error_ = cudaErrorInvalidConfiguration;
      return;
    }
    config_.gridDim = dim3(static_cast<unsigned>(blocks));
    config_.blockDim = dim3(static_cast<unsigned>(threads));
    error_ = cudaLaunchKernelEx(&config_, kernel, static_cast<Parameters>(values)...);
    if (error_ != cudaSuccess) cudaGetLastError();  // it is reported: the next call starts clean
  }

  cudaError_t error() const { return error_; }

 private:
  cudaLaunchConfig_t config_{};
  cudaError_t error_ = cudaSuccess;
};

// -- what a problem asks for

int itemsize(Dtype dtype) { return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2; }

int alignment(std::initializer_list<uint64_t> numbers) {
  uint64_t bits = 16;
  for (uint64_t number : numbers) bits |= number;
  return static_cast<int>(bits & (~bits + 1));
}

uint64_t address(const void* p) { return reinterpret_cast<uintptr_t>(p); }

// Whether no exponential of class-normalised logits needs a maximum: Samuelson's inequality,
// for the batch's own statistics.
bool is_bounded(const Problem& p) {
  if (p.normalize != Normalize::per_class || p.stats) return false;
  return std::sqrt(static_cast<double>(p.shape.rows)) <= kLargestExponent * p.temperature;
}

Kind kind_of(const Problem& p) {
  if (p.normalize == Normalize::instance) return Kind::instance;
  if (p.normalize == Normalize::none) return Kind::plain;
  return is_bounded(p) ? Kind::bounded : Kind::shifted;
}

// The way through the statistics needs the gradient's sums; a record keeps them for later.
bool needs_sums(const Problem& p) {
  if (p.normalize != Normalize::per_class || p.recorded) return false;
  return p.col_sums || (p.through && !p.sums && (p.grad || p.record));
}

Plan plan_of(const Problem& p) {
  const uint64_t size = itemsize(p.shape.dtype);
  const uint64_t row = p.grad ? p.shape.classes * size : 0;
  const int words = alignment({address(p.student.data), address(p.teacher.data), address(p.grad), row,
                               p.student.stride * size, p.teacher.stride * size});
  return make_plan({p.shape.rows, p.shape.classes, static_cast<int>(size), words, p.normalize == Normalize::per_class,
                    is_bounded(p), needs_sums(p), p.normalize == Normalize::instance});
}

// -- memory

// What the gradient needs of all the rest.
template <class A>
void carve_record(const Problem& p, const Plan& plan, Work<A>& w, Carver& memory) {
  w.count = memory.take<A>(2);
  w.factors = memory.take<RowFactors<A>>(p.shape.rows);
  if (p.normalize == Normalize::instance) w.affines = memory.take<RowAffine<A>>(p.shape.rows);
  if (p.normalize != Normalize::per_class) return;
  for (Coefficients<A>* of : {&w.of_s, &w.of_t}) {
    for (A** array : {&of->mean, &of->scale, &of->offset}) *array = memory.take<A>(plan.padded);
  }
  w.sums = memory.take<A>(2 * plan.padded);
}

template <class A>
void carve_rest(const Problem& p, const Plan& plan, Work<A>& w, Carver& memory) {
  if (p.normalize == Normalize::per_class && !p.stats) {
    w.moments = memory.take<Moments<A>>(2 * plan.chunks * p.shape.classes);
  }
  w.row_sums = memory.take<RowSum<A>>(p.shape.rows * plan.splits);
  w.total_blocks = plan.tiled ? plan.row_chunks : ceil_div(p.shape.rows, kThreads);
  w.totals = memory.take<double>(w.total_blocks * kTotals);
  w.partials = plan.tiled ? plan.row_chunks : plan.chunks;
  if (needs_sums(p)) w.partial = memory.take<A>(w.partials * 2 * plan.padded);
}

template <class A>
Work<A> carve(const Problem& p, const Plan& plan, Carver& record, Carver& rest) {
  Work<A> w{};
  w.exponent = static_cast<A>(kLog2e / p.temperature);
  carve_record(p, plan, w, p.record ? record : rest);
  if (!p.recorded) carve_rest(p, plan, w, rest);
  return w;
}

// -- the passes

template <class T, class A = Acc<T>>
void find_statistics(const Problem& p, const Plan& plan, const Work<A>& w, Queue& queue) {
  const int64_t classes = p.shape.classes;
  if (p.stats)
    return queue.run(use_stats<A>, ceil_div(plan.padded, kThreads), kThreads, p.stats, plan, classes, p.eps, w);
  with_bool(plan.wide, [&](auto wide) {
    queue.run(col_moments<T, kVector<T>, wide>, 2 * plan.tiles * plan.chunks, kThreads, p.shape, p.student, p.teacher,
              2, plan, w.moments);
  });
  queue.run(merge_moments<A>, 2 * plan.padded / kWarp, kThreads, plan, classes, p.eps, w);
}

template <class T, int V, class A = Acc<T>>
void run_tile(const Problem& p, const Plan& plan, const Work<A>& w, Queue& queue) {
  with_bool(plan.row_wide, [&](auto wide) {
    with_bool(p.cross_entropy,
              [&](auto ce) { queue.run(tile_rows<T, V, wide, ce>, plan.row_chunks, plan.threads(), p, plan, w); });
  });
}

template <class T, Kind K, class A = Acc<T>>
void run_rows(const Problem& p, const Plan& plan, const Work<A>& w, Queue& queue) {
  constexpr int R = kByClass<K> ? 2 : 1;
  with_bool(p.cross_entropy, [&](auto ce) {
    with_bool(plan.row_wide, [&](auto wide) {
      queue.run(row_sums<T, kVector<T>, wide, K, ce, R>, plan.row_chunks * plan.splits, kThreads, p, plan, w);
    });
    queue.run(finish_rows<T, K, ce>, w.total_blocks, kThreads, p, plan, w);
  });
}

template <class T, class A = Acc<T>>
void find_rows(const Problem& p, const Plan& plan, const Work<A>& w, Queue& queue) {
  if (plan.tiled) {
    if constexpr (sizeof(T) == 8) {
      return run_tile<T, kDoubleTile>(p, plan, w, queue);
    } else {
      if (plan.row_vector == kNarrowTile) return run_tile<T, kNarrowTile>(p, plan, w, queue);
      return run_tile<T, kWideTile>(p, plan, w, queue);
    }
  }
  switch (kind_of(p)) {
    case Kind::bounded:
      return run_rows<T, Kind::bounded>(p, plan, w, queue);
    case Kind::shifted:
      return run_rows<T, Kind::shifted>(p, plan, w, queue);
    case Kind::plain:
      return run_rows<T, Kind::plain>(p, plan, w, queue);
    case Kind::instance:
      return run_rows<T, Kind::instance>(p, plan, w, queue);
  }
}

template <class T, class A = Acc<T>>
void find_all_but_the_gradient(const Problem& p, const Plan& plan, const Work<A>& w, Queue& queue) {
  if (p.normalize == Normalize::per_class) find_statistics<T>(p, plan, w, queue);
  find_rows<T>(p, plan, w, queue);
  const bool sums = needs_sums(p);
  if (sums && !plan.tiled) {
    with_bool(plan.wide, [&](auto wide) {
      queue.run(col_sums<T, kVector<T>, wide>, plan.tiles * plan.chunks, kThreads, p, plan, w);
    });
  }
  const int64_t tiles = sums ? ceil_div(p.shape.classes, kWarp) : 0;
  queue.run(finish<A>, tiles + 1, kThreads, p, plan, w, tiles);
}

template <class T, Kind K, class A = Acc<T>>
void run_gradient(const Problem& p, const Plan& plan, const Work<A>& w, Queue& queue) {
  with_bool(plan.wide, [&](auto wide) {
    with_bool(p.ce_weight != 0, [&](auto ce) {
      queue.run(gradient<T, kVector<T>, wide, K, ce>, plan.tiles * plan.chunks, kThreads, p, plan, w);
    });
  });
}

template <class T, class A = Acc<T>>
void find_gradient(const Problem& p, const Plan& plan, const Work<A>& w, Queue& queue) {
  switch (p.normalize) {
    case Normalize::per_class:
      return run_gradient<T, Kind::shifted>(p, plan, w, queue);
    case Normalize::none:
      return run_gradient<T, Kind::plain>(p, plan, w, queue);
    case Normalize::instance:
      return run_gradient<T, Kind::instance>(p, plan, w, queue);
  }
}

Plan plan_of(const ColStats& p) {
  const uint64_t size = itemsize(p.shape.dtype);
  const int words = alignment({address(p.logits.data), p.logits.stride * size});
  return make_plan({p.shape.rows, p.shape.classes, static_cast<int>(size), words, true, true, false, false});
}

}  // namespace

size_t workspace_bytes(const Problem& problem) {
  Carver record(nullptr), rest(nullptr);
  const Plan plan = plan_of(problem);
  with_dtype(problem.shape.dtype, [&](auto zero) { carve<Acc<decltype(zero)>>(problem, plan, record, rest); });
  return rest.bytes();
}

size_t record_bytes(const Problem& problem) {
  Carver record(nullptr);
  const Plan plan = plan_of(problem);
  with_dtype(problem.shape.dtype, [&](auto zero) {
    Work<Acc<decltype(zero)>> w{};
    carve_record(problem, plan, w, record);
  });
  return record.bytes();
}

cudaError_t run(const Problem& problem, void* workspace, cudaStream_t stream) {
  return with_dtype(problem.shape.dtype, [&](auto zero) {
    using T = decltype(zero);
    const Plan plan = plan_of(problem);
    Carver record(problem.record), rest(workspace);
    const Work<Acc<T>> w = carve<Acc<T>>(problem, plan, record, rest);
    Queue queue(stream);
    if (!problem.recorded) find_all_but_the_gradient<T>(problem, plan, w, queue);
    if (problem.grad) find_gradient<T>(problem, plan, w, queue);
    return queue.error();
  });
}

size_t workspace_bytes(const ColStats& problem) {
  const Plan plan = plan_of(problem);
  return with_dtype(problem.shape.dtype, [&](auto zero) {
    return static_cast<size_t>(plan.chunks * problem.shape.classes) * sizeof(Moments<Acc<decltype(zero)>>);
  });
}

cudaError_t col_stats(const ColStats& problem, void* workspace, cudaStream_t stream) {
  return with_dtype(problem.shape.dtype, [&](auto zero) {
    using T = decltype(zero);
    using A = Acc<T>;
    const Plan plan = plan_of(problem);
    auto* const moments = static_cast<Moments<A>*>(workspace);
    Queue queue(stream);
    with_bool(plan.wide, [&](auto wide) {
      queue.run(col_moments<T, kVector<T>, wide>, plan.tiles * plan.chunks, kThreads, problem.shape, problem.logits,
                problem.logits, 1, plan, moments);
    });
    queue.run(write_moments<A>, ceil_div(problem.shape.classes, kWarp), kThreads, plan, moments, problem);
    return queue.error();
  });
}

}  // namespace kdcore::cuda
