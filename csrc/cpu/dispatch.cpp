#include <atomic>
#include <cstdlib>
#include <new>

#include "team.h"
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace kdcore::cpu {

#define KD_DECLARE(isa)                                                                 \
  namespace isa {                                                                       \
  void run(const Problem&);                                                             \
  void col_stats(const void*, int64_t, int64_t, int64_t, Dtype, double*, double*, int); \
  }
KD_DECLARE(generic)
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
KD_DECLARE(avx2)
KD_DECLARE(avx512)
#endif

namespace {

constexpr Isa kAll[] = {Isa::generic, Isa::avx2, Isa::avx512};
std::atomic<int> chosen{-1};

bool has(Isa isa) {
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
  if (isa == Isa::avx2)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (isa == Isa::avx512)
    return has(Isa::avx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#endif
  return isa == Isa::generic;
}

struct Block {
  static constexpr std::size_t kKept = 256 << 20;
  void* memory = nullptr;
  std::size_t size = 0;
  ~Block() { clear(); }

  void clear() {
    std::free(memory);
    memory = nullptr;
    size = 0;
  }

  void* get(std::size_t bytes) {
    if (bytes <= size) return memory;
    clear();
    const std::size_t page = 2 << 20, step = bytes >= page ? page : 4096;
    size = (bytes + step - 1) / step * step;
    memory = std::aligned_alloc(step, size);
    if (!memory) {
      size = 0;
      throw std::bad_alloc();
    }
#if defined(__linux__)
    if (step == page) madvise(memory, size, MADV_HUGEPAGE);  // a fault of a small page costs more than its arithmetic
#endif
    return memory;
  }
};

thread_local Block blocks[2];

void clear_scratch() {
  for (Block& block : blocks)
    if (block.size > Block::kKept) block.clear();
}

}  // namespace

void* scratch(int64_t bytes, Use use) { return blocks[static_cast<int>(use)].get(static_cast<std::size_t>(bytes)); }

Isa best_isa() { return has(Isa::avx512) ? Isa::avx512 : has(Isa::avx2) ? Isa::avx2 : Isa::generic; }

Isa current_isa() {
  int isa = chosen.load(std::memory_order_relaxed);
  if (isa < 0) {
    Isa wanted = best_isa();
    const char* name = std::getenv("KDCORE_CPU_ISA");
    if (name && parse_isa(name, &wanted) && !has(wanted)) wanted = best_isa();
    isa = static_cast<int>(wanted);
    chosen.store(isa, std::memory_order_relaxed);
  }
  return static_cast<Isa>(isa);
}

bool set_isa(Isa isa) {
  if (!has(isa)) return false;
  chosen.store(static_cast<int>(isa), std::memory_order_relaxed);
  return true;
}

const char* isa_name(Isa isa) { return isa == Isa::avx512 ? "avx512" : isa == Isa::avx2 ? "avx2" : "generic"; }

bool parse_isa(const char* name, Isa* isa) {
  for (Isa each : kAll)
    if (!std::strcmp(name, isa_name(each))) {
      *isa = each;
      return true;
    }
  return false;
}

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define KD_PICK(call)       \
  switch (current_isa()) {  \
    case Isa::avx512:       \
      return avx512::call;  \
    case Isa::avx2:         \
      return avx2::call;    \
    case Isa::generic:      \
      return generic::call; \
  }
#else
#define KD_PICK(call) return generic::call;
#endif

namespace {

void run_best(const Problem& problem) { KD_PICK(run(problem)) }

void col_stats_best(const void* z, int64_t rows, int64_t classes, int64_t stride, Dtype dtype, double* mean, double* m2,
                    int threads) {
  KD_PICK(col_stats(z, rows, classes, stride, dtype, mean, m2, threads))
}

}  // namespace

void run(const Problem& problem) {
  run_best(problem);
  clear_scratch();
}

void col_stats(const void* z, int64_t rows, int64_t classes, int64_t stride, Dtype dtype, double* mean, double* m2,
               int threads) {
  col_stats_best(z, rows, classes, stride, dtype, mean, m2, threads);
  clear_scratch();
}

}  // namespace kdcore::cpu
