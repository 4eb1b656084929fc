#pragma once
#include <cstdlib>
#include <cstring>
#include <functional>

#include "cuda_runtime_api.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};
extern dim3 threadIdx, blockIdx, blockDim;

namespace simt {
void launch(unsigned blocks, unsigned threads, const std::function<void()>& body);
void exchange(const void* mine, void* other, size_t bytes, int offset);  // among the lanes of a warp
}  // namespace simt

void __syncthreads();

template <class V>
V __shfl_xor_sync(unsigned mask, V value, int offset) {
  static_assert(sizeof(V) <= 8);
  if (mask != 0xffffffffu) abort();
  V other;
  simt::exchange(&value, &other, sizeof(V), offset);
  return other;
}

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

template <class... Parameters, class... Values>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Values&&... values) {
  simt::launch(config->gridDim.x, config->blockDim.x, [=] { kernel(values...); });
  return cudaSuccess;
}
