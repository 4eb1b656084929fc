// Calls the CPU kernels on memory that is exactly as large as they were told, for a build with sanitizers. No torch.
//
// Every buffer lies twice: on the heap, where the sanitizer sees what the compiler instruments, and against a page that
// nobody may touch, which also catches masked loads and stores: those are beyond the sanitizer. Gaps between rows are
// poisoned. Scratch memory is new and full of NaN at every call, so that a result that was never written shows.
#include <sanitizer/asan_interface.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <random>
#include <vector>

#include "cpu/problem.h"

using namespace kdcore::cpu;

namespace {

enum class Place { heap, before_guard, after_guard };

// Bytes with nothing accessible beside them, all of them 0xff at first: NaN in every dtype.
class Memory {
 public:
  Memory(int64_t bytes, Place place) : place_(place) {
    if (place == Place::heap) {
      data = malloc(bytes ? bytes : 1);
    } else {
      const int64_t page = sysconf(_SC_PAGESIZE), inside = (bytes + page - 1) / page * page;
      mapped_ = inside + 2 * page;
      base_ = static_cast<char*>(mmap(nullptr, mapped_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
      if (base_ == MAP_FAILED || mprotect(base_ + page, inside, PROT_READ | PROT_WRITE)) abort();
      data = base_ + page + (place == Place::before_guard ? inside - bytes : 0);
    }
    memset(data, 0xff, bytes);
  }
  ~Memory() {
    if (place_ == Place::heap) {
      free(data);
    } else {
      munmap(base_, mapped_);
    }
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  void* data;

 private:
  Place place_;
  char* base_ = nullptr;
  int64_t mapped_ = 0;
};

Place scratch_place = Place::heap;

}  // namespace

// In place of the kernels' own, by the linker's --wrap. They want a line's alignment.
extern "C" void* __wrap__ZN6kdcore3cpu7scratchEl(int64_t bytes) {
  static thread_local std::unique_ptr<Memory> last;
  last.reset();
  last = std::make_unique<Memory>((bytes + 63) / 64 * 64, scratch_place == Place::heap ? Place::before_guard : scratch_place);
  return last->data;
}

namespace {

int64_t width(Dtype dtype) { return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2; }

void put(void* at, int64_t i, Dtype dtype, float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  switch (dtype) {
    case Dtype::f64: static_cast<double*>(at)[i] = x; return;
    case Dtype::f32: static_cast<float*>(at)[i] = x; return;
    case Dtype::bf16: static_cast<uint16_t*>(at)[i] = static_cast<uint16_t>(bits >> 16); return;
    case Dtype::f16: {
      _Float16 half = static_cast<_Float16>(x);
      memcpy(static_cast<char*>(at) + 2 * i, &half, 2);
      return;
    }
  }
}

bool is_nan(const void* at, int64_t i, Dtype dtype) {
  uint16_t half = 0;
  if (width(dtype) == 2) memcpy(&half, static_cast<const char*>(at) + 2 * i, 2);
  switch (dtype) {
    case Dtype::f64: return std::isnan(static_cast<const double*>(at)[i]);
    case Dtype::f32: return std::isnan(static_cast<const float*>(at)[i]);
    case Dtype::bf16: return (half & 0x7fff) > 0x7f80;
    case Dtype::f16: return (half & 0x7fff) > 0x7c00;
  }
  return true;
}

struct Shape {
  int64_t rows, classes, gap;
};

struct Kind {
  Normalize normalize;
  bool decoupled, cross_entropy, through, given, reduced, per_row;
};

struct Side {
  Side(Shape shape, Dtype dtype, Place place, unsigned seed)
      : stride(shape.classes + shape.gap), memory(((shape.rows - 1) * stride + shape.classes) * width(dtype), place) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal(0.5f, 2.0f);
    for (int64_t i = 0; i < shape.rows; ++i)
      for (int64_t j = 0; j < shape.classes; ++j) put(memory.data, i * stride + j, dtype, normal(random));
    if (!shape.gap) return;
    for (int64_t i = 0; i + 1 < shape.rows; ++i) {
      char* from = static_cast<char*>(memory.data) + (i * stride + shape.classes) * width(dtype);
      ASAN_POISON_MEMORY_REGION(from, shape.gap * width(dtype));
    }
    poisoned = true;
    bytes = ((shape.rows - 1) * stride + shape.classes) * width(dtype);
  }
  ~Side() {
    if (poisoned) ASAN_UNPOISON_MEMORY_REGION(memory.data, bytes);
  }
  int64_t stride;
  Memory memory;
  bool poisoned = false;
  int64_t bytes = 0;
};

double* doubles(const Memory& memory, int64_t n, double first, double step) {
  double* out = static_cast<double*>(memory.data);
  for (int64_t i = 0; i < n; ++i) out[i] = first + step * static_cast<double>(i % 7);
  return out;
}

[[noreturn]] void fail(const char* what, Shape shape, Dtype dtype, const Kind& kind, int64_t at) {
  fprintf(stderr, "%s at %lld: isa %s, %lldx%lld + %lld, dtype %d, normalize %d, decoupled %d, cross-entropy %d, given %d\n", what,
          static_cast<long long>(at), isa_name(current_isa()), static_cast<long long>(shape.rows),
          static_cast<long long>(shape.classes), static_cast<long long>(shape.gap), static_cast<int>(dtype),
          static_cast<int>(kind.normalize), kind.decoupled, kind.cross_entropy, kind.given);
  exit(1);
}

// One call with every buffer exact; want_*: which of the results.
void call(Shape shape, Dtype dtype, const Kind& kind, Place place, int threads, bool want_terms, bool want_grad, bool want_sums) {
  const int64_t B = shape.rows, C = shape.classes;
  const bool labelled = kind.decoupled || kind.cross_entropy;
  scratch_place = place;
  const Side student(shape, dtype, place, 1), teacher(shape, dtype, place, 2);
  const Memory index(B * 8, place), beta(B * 8, place), weight(B * 8, place), stats(4 * C * 8, place), sums(2 * C * 8, place);
  const Memory terms(4 * B * 8, place), grad(B * C * width(dtype), place), sums_out(2 * C * 8, place);
  int64_t* labels = static_cast<int64_t*>(index.data);
  for (int64_t i = 0; i < B; ++i) labels[i] = i % 3 == 0 ? C - 1 : i % 3 == 1 ? 0 : i * 31 % C;
  Problem p = {};
  p.student = student.memory.data, p.teacher = teacher.memory.data;
  p.rows = B, p.classes = C, p.student_stride = student.stride, p.teacher_stride = teacher.stride;
  p.dtype = dtype;
  p.index = labelled ? labels : nullptr;
  p.row_beta = kind.per_row && kind.decoupled ? doubles(beta, B, 1, 0.5) : nullptr;
  p.row_weight = kind.per_row ? doubles(weight, B, 0.1, 0.2) : nullptr;
  p.weight = 1.0 / static_cast<double>(B);
  p.temperature = 4, p.alpha = 1, p.beta = C == 2 ? 0 : 8, p.kd_weight = 1, p.ce_weight = 0.5;
  p.label_smoothing = kind.per_row ? 0.1 : 0, p.eps = kind.normalize == Normalize::instance ? 1e-7 : 1e-5;
  p.normalize = kind.normalize, p.decoupled = kind.decoupled, p.cross_entropy = kind.cross_entropy;
  p.stats = kind.given ? doubles(stats, 4 * C, 0.5, 0.25) : nullptr;
  p.through = kind.through;
  p.sums = kind.reduced ? doubles(sums, 2 * C, 0.01, 0.01) : nullptr;
  p.count = static_cast<double>(B);
  p.terms = want_terms ? static_cast<double*>(terms.data) : nullptr;
  p.grad = want_grad ? grad.data : nullptr;
  p.sums_out = want_sums ? static_cast<double*>(sums_out.data) : nullptr;
  p.threads = threads;
  run(p);
  for (int64_t i = 0; want_terms && i < 4 * B; ++i)
    if (i / B == 0 || (i / B == 3 ? kind.cross_entropy : kind.decoupled))
      if (std::isnan(p.terms[i])) fail("a term was not written", shape, dtype, kind, i);
  for (int64_t i = 0; want_grad && i < B * C; ++i)
    if (is_nan(p.grad, i, dtype)) fail("a gradient was not written", shape, dtype, kind, i);
  for (int64_t i = 0; want_sums && i < 2 * C; ++i)
    if (std::isnan(p.sums_out[i])) fail("a sum was not written", shape, dtype, kind, i);
}

void statistics(Shape shape, Dtype dtype, Place place, int threads) {
  scratch_place = place;
  const Side z(shape, dtype, place, 3);
  const Memory mean(shape.classes * 8, place), m2(shape.classes * 8, place);
  col_stats(z.memory.data, shape.rows, shape.classes, z.stride, dtype, static_cast<double*>(mean.data),
            static_cast<double*>(m2.data), threads);
  for (int64_t j = 0; j < shape.classes; ++j)
    if (std::isnan(static_cast<double*>(mean.data)[j]) || !(static_cast<double*>(m2.data)[j] >= 0))
      fail("a statistic was not written", shape, dtype, {}, j);
}

std::vector<Kind> kinds() {
  std::vector<Kind> all;
  for (bool decoupled : {false, true})
    for (bool cross_entropy : {false, true})
      for (bool per_row : {false, true}) {
        for (Normalize n : {Normalize::none, Normalize::instance})
          all.push_back({n, decoupled, cross_entropy, false, false, false, per_row});
        for (bool through : {false, true}) {
          all.push_back({Normalize::per_class, decoupled, cross_entropy, through, false, false, per_row});
          all.push_back({Normalize::per_class, decoupled, cross_entropy, through, true, false, per_row});
        }
        all.push_back({Normalize::per_class, decoupled, cross_entropy, true, true, true, per_row});
      }
  return all;
}

const std::vector<Place> kEvery = {Place::heap, Place::before_guard, Place::after_guard};

long walk(std::initializer_list<Shape> shapes, const std::vector<Kind>& kinds, const std::vector<Place>& places) {
  long calls = 0;
  for (Shape shape : shapes)
    for (Dtype dtype : {Dtype::f32, Dtype::f64, Dtype::f16, Dtype::bf16})
      for (Place place : places) {
        for (const Kind& kind : kinds) {
          if (kind.normalize == Normalize::per_class && shape.rows == 1 && !kind.given) continue;
          const int threads = calls % 2 ? 3 : 1;
          call(shape, dtype, kind, place, threads, true, true, false);
          if (calls % 3 == 0) call(shape, dtype, kind, place, threads, true, false, false);
          if (kind.given && kind.through && !kind.reduced) call(shape, dtype, kind, place, threads, false, false, true);
          ++calls;
        }
        statistics(shape, dtype, place, 1);
        statistics(shape, dtype, place, 3);
      }
  return calls;
}

}  // namespace

// driver ISA: 0 if nothing was wrong, 2 if this machine does not have it.
int main(int count, char** arguments) {
  Isa isa{};
  if (count != 2 || !parse_isa(arguments[1], &isa) || !set_isa(isa)) return 2;
  const auto all = kinds();
  long calls = walk({{1, 2, 0}, {1, 7, 0}, {2, 2, 0}, {2, 3, 1}, {3, 13, 0}, {5, 16, 0}, {7, 17, 3}, {8, 31, 0}, {9, 33, 1},
                     {10, 64, 0}, {17, 65, 7}, {41, 100, 0}, {65, 21, 0}, {13, 271, 0}},
                    all, kEvery);
  std::vector<Kind> few;
  for (const Kind& kind : all)
    if (kind.decoupled == kind.cross_entropy && !kind.per_row) few.push_back(kind);
  calls += walk({{300, 9, 2}, {13, 1271, 0}}, few, {Place::before_guard});
  // the columns' algorithm, and what many classes take instead
  calls += walk({{3, 8193, 0}, {18, 9001, 1}}, few, {Place::before_guard});
  // more than the caches hold, so that results go past them
  calls += walk({{195, 9001, 0}}, {{Normalize::per_class, true, true, true, false, false, false}}, {Place::before_guard});
  calls += walk({{1750, 1001, 1}}, {{Normalize::none, true, true, false, false, false, false}}, {Place::before_guard});
  printf("%s: %ld calls\n", isa_name(isa), calls);
  return 0;
}
