// Runs CUDA kernels that were compiled as C++: the threads of a block are fibers, switched at barriers and shuffles, in
// an order that the tests choose; blocks come one after the other. A barrier that not all threads of a block reach, or
// a shuffle that not all lanes of a warp reach, ends the process. x86-64 alone.
#include <algorithm>
#include <cstdio>
#include <random>
#include <vector>

#include "cuda_runtime.h"

dim3 threadIdx, blockIdx, blockDim;

extern "C" void simt_switch(void** from, void* to);
asm(R"(
.text
.globl simt_switch
.hidden simt_switch
simt_switch:
  push %rbx
  push %rbp
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbp
  pop %rbx
  ret
)");

namespace simt {
namespace {

constexpr unsigned kMost = 1024, kLanes = 32;
constexpr size_t kStack = 64 << 10;
enum class State { ready, at_shuffle, at_barrier, done };

void* scheduler;
void* fibers[kMost];
State states[kMost];
uint64_t slots[kMost];
unsigned current;
const std::function<void()>* job;
std::mt19937 order(0);
bool shuffled;

[[noreturn]] void fail(const char* what) {
  fprintf(stderr, "simt: %s, block %u of %u threads\n", what, blockIdx.x, blockDim.x);
  abort();
}

void pause(State state) {
  states[current] = state;
  simt_switch(&fibers[current], scheduler);
}

void fiber() {
  for (;;) {
    (*job)();
    pause(State::done);
  }
}

void resume(unsigned thread) {
  current = thread;
  threadIdx.x = thread;
  if (!fibers[thread]) {
    char* const top = static_cast<char*>(malloc(kStack)) + kStack;
    void** stack = reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(top) & ~uintptr_t{15}) - 8);
    *--stack = reinterpret_cast<void*>(&fiber);
    for (int i = 0; i < 6; ++i) *--stack = nullptr;
    fibers[thread] = stack;
  }
  simt_switch(&scheduler, fibers[thread]);
}

// Lets go what waits for threads that have all come. False if nobody can go on.
bool release(unsigned threads) {
  bool any = false;
  for (unsigned warp = 0; warp < threads; warp += kLanes) {
    const auto waits = [](State state) { return state == State::at_shuffle; };
    if (!std::all_of(states + warp, states + warp + kLanes, waits)) continue;
    std::fill_n(states + warp, kLanes, State::ready);
    any = true;
  }
  if (any) return true;
  if (!std::all_of(states, states + threads, [](State state) { return state == State::at_barrier; })) return false;
  std::fill_n(states, threads, State::ready);
  return true;
}

bool is_ready(unsigned thread) { return states[thread] == State::ready; }

// Runs a random warp as far as it can go alone: the others are then behind by as much as barriers allow.
void run_ahead(const std::vector<unsigned>& threads) {
  const auto first = std::find_if(threads.begin(), threads.end(), is_ready);
  if (first == threads.end()) return;
  const unsigned warp = *first / kLanes * kLanes;
  const auto waits = [](State state) { return state == State::at_shuffle; };
  do {
    std::replace(states + warp, states + warp + kLanes, State::at_shuffle, State::ready);
    for (unsigned thread : threads) {
      if (thread / kLanes * kLanes == warp && is_ready(thread)) resume(thread);
    }
  } while (std::all_of(states + warp, states + warp + kLanes, waits));
}

// One step of each thread that can take one.
void step(std::vector<unsigned>& threads) {
  if (shuffled) {
    std::shuffle(threads.begin(), threads.end(), order);
    return run_ahead(threads);
  }
  for (unsigned thread : threads) {
    if (is_ready(thread)) resume(thread);
  }
}

void run_block(std::vector<unsigned>& threads) {
  std::fill_n(states, threads.size(), State::ready);
  for (;;) {
    step(threads);
    if (std::all_of(states, states + threads.size(), [](State state) { return state == State::done; })) return;
    const bool released = release(threads.size());
    if (!released && std::none_of(threads.begin(), threads.end(), is_ready))
      fail("threads wait for others that do not come");
  }
}

}  // namespace

void exchange(const void* mine, void* other, size_t bytes, int offset) {
  std::memcpy(&slots[current], mine, bytes);
  pause(State::at_shuffle);
  const uint64_t found = slots[current ^ offset];
  pause(State::at_shuffle);  // before anybody writes again
  std::memcpy(other, &found, bytes);
}

void launch(unsigned blocks, unsigned threads, const std::function<void()>& body) {
  blockDim.x = threads;
  if (threads > kMost || threads % kLanes) fail("not a whole number of warps");
  job = &body;
  std::vector<unsigned> ids(threads), grid(blocks);
  for (unsigned i = 0; i < threads; ++i) ids[i] = i;
  for (unsigned i = 0; i < blocks; ++i) grid[i] = i;
  if (shuffled) std::shuffle(grid.begin(), grid.end(), order);
  for (unsigned block : grid) {
    blockIdx.x = block;
    run_block(ids);
  }
}

}  // namespace simt

void __syncthreads() { simt::pause(simt::State::at_barrier); }

extern "C" void simt_shuffle(bool on) { simt::shuffled = on; }
