// The module kdcore._C_autograd: the usual calls of kd_loss and dkd_loss, from their Python arguments to kdcore::fused
// and its derivative, without the dispatcher's layers.
//
// A small batch's loss takes less time than those layers, or than looking at its arguments in Python. It speaks torch's
// own C++, not the stable ABI, so it serves the torch that it was built with alone; with any other the registered op
// does the same, slower.
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

#include <cmath>
#include <initializer_list>

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
      if (ag::get_current_graph_task_keep_graph()) return {known.clone()};
      gradient.reset_data();  // at once: another thread that is in this graph must not get the same memory
      return {known};
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

constexpr double kClassEps = 1e-5, kInstanceEps = 1e-7;  // the defaults of losses/normalise.py

struct WithoutGil {
  PyThreadState* const state = PyEval_SaveThread();
  ~WithoutGil() { PyEval_RestoreThread(state); }
};

// What kd_loss or dkd_loss was called with, as the op wants it.
struct Call {
  at::Tensor student, teacher, index;
  double temperature, alpha, beta, kd_weight, ce_weight, label_smoothing;
  int64_t ignore_index, normalize;
  bool decoupled, cross_entropy, through, mean, parts;
};

bool is_word(PyObject* value, const char* word) {
  return PyUnicode_Check(value) && PyUnicode_CompareWithASCIIString(value, word) == 0;
}

bool read_number(PyObject* value, double* number) {
  if (!PyFloat_Check(value) && !PyLong_Check(value)) return false;
  *number = PyFloat_AsDouble(value);
  return std::isfinite(*number);
}

bool read_integer(PyObject* value, int64_t* number) {
  if (!PyLong_Check(value)) return false;
  *number = PyLong_AsLongLong(value);
  return true;
}

bool read_tensor(PyObject* value, at::Tensor* tensor) {
  if (!THPVariable_CheckExact(value) || !is_plain(THPVariable_Unpack(value))) return false;
  *tensor = THPVariable_Unpack(value);
  return true;
}

// The place of a word in a list, or -1.
int64_t read_word(PyObject* value, std::initializer_list<const char*> words) {
  int64_t at = 0;
  for (const char* word : words) {
    if (is_word(value, word)) return at;
    ++at;
  }
  return -1;
}

// Settings in the order of the Python class of that name. False for whatever is not usual; the op looks at the rest.
bool read_settings(PyObject* settings, Call* call) {
  constexpr Py_ssize_t kSettings = 10;
  if (!PyTuple_Check(settings) || PyTuple_GET_SIZE(settings) != kSettings) return false;
  auto at = [&](Py_ssize_t i) { return PyTuple_GET_ITEM(settings, i); };
  const int64_t stats = read_word(at(7), {"batch", "detached"}), reduction = read_word(at(8), {"mean", "sum"});
  call->normalize = read_word(at(1), {"none", "class", "instance"});
  call->through = stats == 0;
  call->mean = reduction == 0;
  call->parts = at(9) == Py_True;
  return call->normalize >= 0 && (stats == 0 || (stats == 1 && call->normalize == 1)) && reduction >= 0 &&
         at(2) == Py_None && PyBool_Check(at(9)) && read_number(at(0), &call->temperature) && call->temperature > 0 &&
         read_number(at(3), &call->kd_weight) && read_number(at(4), &call->ce_weight) &&
         read_number(at(5), &call->label_smoothing) && call->label_smoothing >= 0 && call->label_smoothing <= 1 &&
         read_integer(at(6), &call->ignore_index);
}

bool read_call(PyObject* const* arguments, Call* call) {
  call->decoupled = arguments[0] == Py_True;
  if (!read_tensor(arguments[1], &call->student) || !read_tensor(arguments[2], &call->teacher)) return false;
  if (!read_settings(arguments[4], call)) return false;
  if (!read_number(arguments[5], &call->alpha) || !read_number(arguments[6], &call->beta)) return false;
  if (arguments[3] == Py_None) {
    if (call->decoupled || call->ce_weight != 0) return false;
  } else if (!read_tensor(arguments[3], &call->index) || call->index.dim() != 1) {
    return false;
  }
  call->cross_entropy = call->index.defined() && (call->parts || call->ce_weight != 0);
  const bool alone = call->normalize == 1 && call->student.dim() == 2 && call->student.size(0) == 1;
  return !alone && call->student.scalar_type() != at::kHalf;  // see losses/compiled.py
}

torch::jit::Stack stack_of(const Call& call, bool needs_grad) {
  const c10::IValue none;
  return {call.student,
          call.teacher,
          call.index.defined() ? c10::IValue(call.index) : none,
          none,
          none,
          call.temperature,
          call.alpha,
          call.beta,
          call.kd_weight,
          call.ce_weight,
          call.label_smoothing,
          call.normalize == 2 ? kInstanceEps : kClassEps,
          call.ignore_index,
          call.normalize,
          call.decoupled,
          call.cross_entropy,
          call.through,
          call.mean,
          needs_grad};
}

// loss(decoupled, student, teacher, target, settings, alpha, beta, backend, second) -> the loss; with its parts where
// they are wanted; None where the call is for another way: it is not usual, somebody watches, or the op refuses it.
PyObject* loss(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  constexpr int kAll = 9;
  TORCH_CHECK_TYPE(count == kAll, "loss takes ", kAll, " arguments");
  static const c10::OperatorHandle op = c10::Dispatcher::singleton().findSchemaOrThrow("kdcore::fused", "");
  Call call;
  const bool usual = !is_watched() && read_word(arguments[7], {"auto", "cpu"}) >= 0 && read_call(arguments, &call);
  if (PyErr_Occurred()) {  // a number that is too large
    PyErr_Clear();
    Py_RETURN_NONE;
  }
  if (!usual) Py_RETURN_NONE;
  const bool needs_grad =
      call.student.requires_grad() && c10::GradMode::is_enabled() && !c10::InferenceMode::is_enabled();
  torch::jit::Stack stack = stack_of(call, needs_grad);
  try {
    const WithoutGil others_run;
    op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), &stack);
  } catch (const std::exception&) {
    Py_RETURN_NONE;
  }
  at::Tensor value = stack[0].toTensor();
  if (needs_grad) value = with_gradient(call.student, value, stack[2].toTensor(), PyUnicode_AsUTF8(arguments[8]));
  if (!call.parts) return THPVariable_Wrap(std::move(value));
  PyObject* const parts = THPVariable_Wrap(stack[1].toTensor());
  return Py_BuildValue("(NN)", THPVariable_Wrap(std::move(value)), parts);
  END_HANDLE_TH_ERRORS
}

PyMethodDef methods[] = {{"loss", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(loss)), METH_FASTCALL, nullptr},
                         {}};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C_autograd", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C_autograd() { return PyModule_Create(&module); }
