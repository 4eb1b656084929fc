// The module kdcore._C_autograd: kdcore::fused with its derivative, called from Python without the dispatcher's layers.
//
// A small batch's loss takes less time than those layers do. It speaks torch's own C++, not the stable ABI, so it
// serves the torch that it was built with alone; with any other the registered op does the same, slower.
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/mul.h>
#include <ATen/record_function.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>

namespace {

namespace ag = torch::autograd;

// torch counts its nodes by std::shared_ptr or, since 2.14 or so, by its own pointer.
using NodePointer = std::decay_t<decltype(ag::Edge::function)>;

template <class Node, class Pointer = NodePointer, class... Arguments>
Pointer make_node(Arguments&&... arguments) {
  if constexpr (std::is_same_v<Pointer, std::shared_ptr<ag::Node>>) {
    return std::make_shared<Node>(std::forward<Arguments>(arguments)...);
  } else {
    return c10::make_intrusive<Node>(std::forward<Arguments>(arguments)...);
  }
}

// Whether a tensor is what its memory holds: dense, on the CPU, no subclass, no wrapper, no lazy negation.
bool is_plain(const at::Tensor& z) {
  using Key = c10::DispatchKey;
  constexpr c10::DispatchKeySet usual{Key::CPU, Key::AutogradCPU, Key::ADInplaceOrView, Key::AutocastCPU};
  return (z.key_set().raw_repr() & ~usual.raw_repr()) == 0;
}

// Whether somebody is to see the call, or to change what it does: modes, transforms, tracers, profilers.
bool is_watched() {
  using Key = c10::DispatchKey;
  constexpr c10::DispatchKeySet watchers{Key::Python,        Key::PythonTLSSnapshot,
                                         Key::Tracer,        Key::FuncTorchDynamicLayerFrontMode,
                                         Key::Functionalize, Key::FuncTorchDynamicLayerBackMode};
  return c10::impl::tls_local_dispatch_key_set().included_.has_any(watchers) || at::hasCallbacks() ||
         at::impl::torch_function_mode_enabled() || ag::ForwardADLevel::try_get_by_idx(0);
}

bool is_one(const at::Tensor& grad_loss) {
  if (!is_plain(grad_loss) || grad_loss.numel() != 1) return false;
  return grad_loss.scalar_type() == at::kDouble ? *grad_loss.const_data_ptr<double>() == 1
                                                : *grad_loss.const_data_ptr<float>() == 1;
}

// A loss whose gradient was computed with it.
struct KdcoreLoss : ag::Node {
  ag::SavedVariable gradient;
  std::string second;  // what is said to whoever differentiates the gradient

  std::string name() const override { return "KdcoreLoss"; }

  ag::variable_list apply(ag::variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!grads[0].defined()) return {at::Tensor()};
    at::Tensor known = gradient.unpack();
    if (c10::GradMode::is_enabled()) {  // the result depends on what the loss does, but how is not known
      known = known.detach();
      ag::create_gradient_edge(known, make_node<ag::Error>(second, ag::edge_list{ag::Edge(getptr(), 0)}));
    } else if (is_one(grads[0])) {  // itself: a leaf takes it over without a copy
      return {ag::get_current_graph_task_keep_graph() ? known.clone() : known};
    }
    return {at::mul(known, grads[0])};
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    gradient.reset_data();
  }

  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override { args.collect(gradient, false); }

  ag::variable_list apply_with_saved(const ag::variable_list& grads,
                                     torch::dynamo::autograd::SwapSavedVariables& saved) override {
    saved.before(gradient);
    ag::variable_list result = apply(ag::variable_list(grads));
    saved.after(gradient);
    return result;
  }
};

at::Tensor with_gradient(const at::Tensor& student, at::Tensor loss, const at::Tensor& gradient, const char* second) {
  const NodePointer node = make_node<KdcoreLoss>();
  auto* const own = static_cast<KdcoreLoss*>(node.get());
  own->gradient = ag::SavedVariable(gradient, false);
  own->second = second;
  own->add_next_edge(ag::impl::gradient_edge(student));
  ag::create_gradient_edge(loss, node);
  return loss;
}

struct WithoutGil {
  PyThreadState* const state = PyEval_SaveThread();
  ~WithoutGil() { PyEval_RestoreThread(state); }
};

// fused(second, student, teacher, index, row_beta, stats, *numbers, ignore_index, normalize, *switches): the arguments
// of kdcore::fused but the last. Gives (loss, parts); None where the call is not for this way.
PyObject* fused(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  constexpr int kTensorsTo = 6, kNumbersTo = 13, kIntegersTo = 15, kAll = 19;
  TORCH_CHECK_TYPE(count == kAll, "fused takes ", kAll, " arguments");
  static const c10::OperatorHandle op = c10::Dispatcher::singleton().findSchemaOrThrow("kdcore::fused", "");
  if (is_watched()) Py_RETURN_NONE;
  const char* const second = PyUnicode_AsUTF8(arguments[0]);
  torch::jit::Stack stack;
  stack.reserve(kAll);
  for (int i = 1; i < kTensorsTo; ++i) {
    if (arguments[i] == Py_None) {
      stack.emplace_back();
      continue;
    }
    if (!THPVariable_CheckExact(arguments[i]) || !is_plain(THPVariable_Unpack(arguments[i]))) Py_RETURN_NONE;
    stack.emplace_back(THPVariable_Unpack(arguments[i]));
  }
  for (int i = kTensorsTo; i < kNumbersTo; ++i) stack.emplace_back(PyFloat_AsDouble(arguments[i]));
  for (int i = kNumbersTo; i < kIntegersTo; ++i) {
    stack.emplace_back(static_cast<int64_t>(PyLong_AsLongLong(arguments[i])));
  }
  for (int i = kIntegersTo; i < kAll; ++i) stack.emplace_back(PyObject_IsTrue(arguments[i]) == 1);
  if (PyErr_Occurred()) return nullptr;
  const at::Tensor student = stack[0].toTensor();
  const bool needs_grad = student.requires_grad() && c10::GradMode::is_enabled() && !c10::InferenceMode::is_enabled();
  stack.emplace_back(needs_grad);
  {
    const WithoutGil others_run;
    op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), &stack);
  }
  at::Tensor loss = stack[0].toTensor();
  if (needs_grad) loss = with_gradient(student, loss, stack[2].toTensor(), second);
  PyObject* const parts = THPVariable_Wrap(stack[1].toTensor());
  return Py_BuildValue("(NN)", THPVariable_Wrap(std::move(loss)), parts);
  END_HANDLE_TH_ERRORS
}

PyMethodDef methods[] = {
    {"fused", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(fused)), METH_FASTCALL, nullptr}, {}};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C_autograd", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C_autograd() { return PyModule_Create(&module); }
