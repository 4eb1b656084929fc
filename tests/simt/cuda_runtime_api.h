// The part of the CUDA runtime that csrc/cuda uses, for threads that simt.cpp runs one after the other on the CPU.
#pragma once
#include <math.h>

#include <cstddef>
#include <cstdint>

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };
typedef struct CUstream_st* cudaStream_t;
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
