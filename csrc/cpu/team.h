// Threads and scratch memory. Included by every instruction set's file before its target is set, so that nothing of the
// standard library is compiled for more than the baseline.
#pragma once
#include <cstdint>
#include <cstring>

#include "elements.h"
#include "problem.h"
#if defined(_OPENMP)
#include <omp.h>
#endif

#define KD_NOINLINE __attribute__((noinline))

namespace kdcore::cpu {

struct Yes {
  static constexpr bool value = true;
};
struct No {
  static constexpr bool value = false;
};

}  // namespace kdcore::cpu
