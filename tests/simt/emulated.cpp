// csrc/cuda/kernels.cu, compiled as C++, behind a C interface.
#include "cuda/kernels.cu"

using namespace kdcore::cuda;

extern "C" {
size_t kd_workspace_bytes(const Problem* problem) { return workspace_bytes(*problem); }
size_t kd_record_bytes(const Problem* problem) { return record_bytes(*problem); }
int kd_run(const Problem* problem, void* workspace) { return run(*problem, workspace, nullptr); }
size_t kd_stats_bytes(const ColStats* problem) { return workspace_bytes(*problem); }
int kd_col_stats(const ColStats* problem, void* workspace) { return col_stats(*problem, workspace, nullptr); }
size_t kd_problem_size() { return sizeof(Problem); }
}
