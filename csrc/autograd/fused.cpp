// The module kdcore._C_autograd: kdcore::fused with its derivative, called from Python without the dispatcher's layers.
//
// It does what an autograd function in Python would, in a third of the time: a small batch's loss takes less than that
// function. It speaks torch's own C++, not the stable ABI, so it serves the torch that it was built with alone; with any
// other the function in Python does.
#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/mul.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/autograd/variable.h>

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

bool is_one(const at::Tensor& grad_loss) {
  if (at::isTensorSubclassLike(grad_loss) || !grad_loss.is_cpu() || grad_loss.numel() != 1) return false;
  return grad_loss.scalar_type() == at::kDouble ? *grad_loss.const_data_ptr<double>() == 1
                                                : *grad_loss.const_data_ptr<float>() == 1;
}

// A loss whose gradient was computed with it.
struct KdcoreLoss : ag::Node {
  ag::SavedVariable gradient;
  std::string second;  // what is said to whoever differentiates the gradient

  std::string name() const override { return "KdcoreLoss"; }

  ag::variable_list apply(ag::variable_list&& grads) override {
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

  void release_variables() override { gradient.reset_data(); }
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

c10::IValue argument(PyObject* value) {
  if (value == Py_None) return {};
  if (PyBool_Check(value)) return value == Py_True;
  if (PyFloat_Check(value)) return PyFloat_AS_DOUBLE(value);
  return static_cast<int64_t>(PyLong_AsLongLong(value));
}

// fused(second, student, teacher, index, row_beta, stats, *numbers, ignore_index, *switches) -> (loss, parts): the
// arguments of kdcore::fused but the last. The caller has looked at their types.
PyObject* fused(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  constexpr int kTensors = 5, kNumbers = 7, kAll = 19;
  TORCH_CHECK_TYPE(count == kAll, "fused takes ", kAll, " arguments");
  static const c10::OperatorHandle op = c10::Dispatcher::singleton().findSchemaOrThrow("kdcore::fused", "");
  const char* const second = PyUnicode_AsUTF8(arguments[0]);
  const at::Tensor& student = THPVariable_Unpack(arguments[1]);
  const bool needs_grad = student.requires_grad() && c10::GradMode::is_enabled();
  torch::jit::Stack stack;
  stack.reserve(kAll);
  for (int i = 1; i <= kTensors; ++i) {
    stack.push_back(arguments[i] == Py_None ? c10::IValue() : c10::IValue(THPVariable_Unpack(arguments[i])));
  }
  for (int i = kTensors + 1; i <= kTensors + kNumbers; ++i) stack.emplace_back(PyFloat_AsDouble(arguments[i]));
  for (int i = kTensors + kNumbers + 1; i < kAll; ++i) stack.push_back(argument(arguments[i]));
  stack.emplace_back(needs_grad);
  if (PyErr_Occurred()) return nullptr;
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), &stack);
  at::Tensor loss = stack[0].toTensor();
  if (needs_grad) loss = with_gradient(student, loss, stack[2].toTensor(), second);
  PyObject* const parts = THPVariable_Wrap(stack[1].toTensor());
  stack.clear();
  return Py_BuildValue("(NN)", THPVariable_Wrap(std::move(loss)), parts);
  END_HANDLE_TH_ERRORS
}

PyMethodDef methods[] = {
    {"fused", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(fused)), METH_FASTCALL, nullptr}, {}};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C_autograd", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C_autograd() { return PyModule_Create(&module); }
