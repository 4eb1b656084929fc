#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>

#include <cmath>

#include "team.h"
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#define KD_ISA avx2
#include "../kd_math.h"
#include "vec_avx2.h"

#include "all.h"
#pragma GCC pop_options
#endif
