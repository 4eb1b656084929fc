// The module kdcore._C_cuda: loading it registers the ops of ops_cuda.cpp. kdcore._C, which has their schemas, is
// loaded first.
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <cuda_runtime_api.h>

#ifndef KDCORE_CUDA_ARCHS
#define KDCORE_CUDA_ARCHS ""
#endif

PyMODINIT_FUNC PyInit__C_cuda() {
  static PyModuleDef definition{};
  definition.m_base = PyModuleDef_HEAD_INIT;
  definition.m_name = "_C_cuda";
  definition.m_doc = "The CUDA kernels of the loss op.";
  definition.m_size = -1;
  PyObject* const module = PyModule_Create(&definition);
  if (module == nullptr) return nullptr;
  if (PyModule_AddStringConstant(module, "architectures", KDCORE_CUDA_ARCHS) != 0 ||
      PyModule_AddIntConstant(module, "cuda_version", CUDART_VERSION) != 0) {
    Py_DECREF(module);
    return nullptr;
  }
  return module;
}
