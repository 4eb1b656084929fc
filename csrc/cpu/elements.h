// What the kernels of every instruction set share: element types and the constants of the exponential. No code.
#pragma once
#include <cstdint>

namespace kdcore::cpu {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <class T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <class T>
using Accumulator = typename AccumulatorOf<T>::type;

// Eight rows at once, for the maths of rows.
typedef double d8 __attribute__((vector_size(64)));
typedef int64_t i8 __attribute__((vector_size(64)));

constexpr double kLn2 = 0.693147180559945309417, kLog2e = 1.44269504088896340736;

// 2^f for |f| <= 1/2, minimax of degree 5, 7.5e-8 relative; highest power first.
constexpr float kExp2[6] = {0.00132764721678f, 0.00967554133102f, 0.0555071327288f,
                            0.24022119724f,    0.693146967065f,   1.0f};

// e^f for |f| <= ln(2)/2: Taylor's series, whose rest is 4e-18.
constexpr int kExpTerms = 14;
constexpr double kExp[kExpTerms] = {
    1.0 / 6227020800, 1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320, 1.0 / 5040,
    1.0 / 720,        1.0 / 120,       1.0 / 24,       1.0 / 6,       1.0 / 2,      1.0,         1.0};

constexpr int kRows = 8;  // that are finished together

}  // namespace kdcore::cpu
