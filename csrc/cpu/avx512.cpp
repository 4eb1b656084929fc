#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>

#include <cmath>

#include "team.h"
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#define KD_ISA avx512
#include "../kd_math.h"
#include "vec_avx512.h"

#include "all.h"
#pragma GCC pop_options
#endif
