// A few threads that work on one call and wait for each other between its passes.
#pragma once

namespace kdcore::cpu::KD_ISA {

struct Member {
  int id, size;
  KD_INLINE void wait() const {
#if defined(_OPENMP)
    if (size > 1) {
#pragma omp barrier
    }
#endif
  }
};

// Every member runs work; all of them pass the same waits.
template <class Work>
KD_INLINE void team(int threads, const Work& work) {
#if defined(_OPENMP)
  if (threads > 1) {
#pragma omp parallel num_threads(threads)
    work(Member{omp_get_thread_num(), omp_get_num_threads()});
    return;
  }
#endif
  work(Member{0, 1});
}

}  // namespace kdcore::cpu::KD_ISA
