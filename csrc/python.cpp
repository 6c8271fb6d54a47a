// The Python module embed_ext._C: a quick way into the forward op, and facts about the build.
#include <ATen/PythonTorchFunctionTLS.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include "autograd/node.h"
#include "cpu/recycled_memory.h"
#include "cpu/row_kernels.h"
#include "index_check.h"
#include "kept_gradient.h"

namespace embed_ext {
namespace {

namespace py = pybind11;

// Takes over where an argument is more than a plain tensor or parameter (a subclass, a proxy, a
// list), or a torch function mode is on: Python decides then whose turn it is.
py::object& general_path() {
  static auto* handler = new py::object();  // never destroyed: the interpreter may be gone by then
  return *handler;
}

// Counts a negative padding_idx from the end and turns None into -1, the op's "none".
int64_t resolve_padding_idx(PyObject* object, const at::Tensor& weight) {
  if (object == Py_None) {
    return -1;
  }
  const auto number = py::reinterpret_steal<py::object>(PyNumber_Index(object));
  if (!number) {
    throw python_error();
  }
  int overflow = 0;
  const int64_t value = PyLong_AsLongLongAndOverflow(number.ptr(), &overflow);
  if (overflow == 0 && (value == 0 || weight.dim() != 2)) {
    return value;
  }
  const int64_t num_rows = weight.dim() == 2 ? weight.sym_size(0).guard_int(__FILE__, __LINE__) : 0;
  if (overflow != 0 || value >= num_rows || value < -num_rows) {
    PyErr_Format(PyExc_AssertionError,
                 "Padding_idx must be within num_embeddings: it is %S and weight has %lld rows",
                 number.ptr(), static_cast<long long>(num_rows));
    throw python_error();
  }
  return value < 0 ? value + num_rows : value;
}

bool unpack_flag(PyObject* object) {
  const int truth = PyObject_IsTrue(object);
  if (truth < 0) {
    throw python_error();
  }
  return truth != 0;
}

// embedding(weight, indices, padding_idx, scale_grad_by_freq, sparse, coalesced,
// kept_gradient=None), positional only.
//
// A plain C function rather than a pybind11 one, and without torch.ops' argument matching, because
// for small lookups these would take longer than the lookup.
PyObject* embedding_entry(PyObject* /*module*/, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 6 || count == 7, "embedding(): takes 6 or 7 arguments, but got ",
                   count);
  if (!THPVariable_CheckExact(args[0]) || !THPVariable_CheckExact(args[1]) ||
      at::impl::torch_function_mode_enabled()) {
    return PyObject_Vectorcall(general_path().ptr(), args, 6, nullptr);
  }
  const at::Tensor& weight = THPVariable_Unpack(args[0]);
  const at::Tensor& indices = THPVariable_Unpack(args[1]);
  const int64_t padding_idx = resolve_padding_idx(args[2], weight);
  const bool scale_grad_by_freq = unpack_flag(args[3]);
  const bool sparse = unpack_flag(args[4]);
  const bool coalesced = unpack_flag(args[5]);
  std::shared_ptr<KeptGradient> kept;
  if (count == 7 && args[6] != Py_None) {
    kept = py::cast<std::shared_ptr<KeptGradient>>(py::handle(args[6]));
  }
  at::Tensor out = [&] {
    const py::gil_scoped_release no_gil;
    std::optional<KeptGradientScope> scope;
    if (kept != nullptr) {
      scope.emplace(std::move(kept));
    }
    return embedding_op().call(weight, indices, padding_idx, scale_grad_by_freq, sparse, coalesced);
  }();
  return THPVariable_Wrap(std::move(out));
  END_HANDLE_TH_ERRORS
}

PyMethodDef embedding_method = {
    "embedding", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&embedding_entry)),
    METH_FASTCALL,
    "embedding(weight, indices, padding_idx, scale_grad_by_freq, "
    "sparse, coalesced, kept_gradient=None) -> Tensor"};

py::dict build_config() {
  py::dict config;
  config["version"] = EMBED_EXT_VERSION;
  config["torch"] = EMBED_EXT_BUILD_TORCH_VERSION;
#if defined(__VERSION__)
  config["compiler"] = __VERSION__;
#else
  config["compiler"] = "unknown";
#endif
  config["cxx_standard"] = static_cast<long>(__cplusplus / 100);
#if defined(EMBED_EXT_WITH_CUDA)
  config["cuda_archs"] = EMBED_EXT_CUDA_ARCHS;
#else
  config["cuda_archs"] = py::none();
#endif
  return config;
}

const char* index_check_name(IndexCheckMode mode) {
  switch (mode) {
    case IndexCheckMode::kSync:
      return "sync";
    case IndexCheckMode::kNone:
      return "none";
    default:
      return "lazy";
  }
}

void set_index_check(const std::string& name) {
  for (const auto mode : {IndexCheckMode::kLazy, IndexCheckMode::kSync, IndexCheckMode::kNone}) {
    if (name == index_check_name(mode)) {
      return set_index_check_mode(mode);
    }
  }
  throw py::value_error("set_index_check(): expected 'lazy', 'sync' or 'none', but got '" + name +
                        "'");
}

}  // namespace
}  // namespace embed_ext

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using namespace embed_ext;
  m.attr("embedding") =
      py::reinterpret_steal<py::object>(PyCFunction_New(&embedding_method, nullptr));
  py::class_<KeptGradient, std::shared_ptr<KeptGradient>>(m, "KeptGradient")
      .def(py::init<>())
      .def_property_readonly(
          "bytes", py::cpp_function(&KeptGradient::bytes, py::call_guard<py::gil_scoped_release>()))
      .def("drop", &KeptGradient::drop, py::call_guard<py::gil_scoped_release>())
      // A copy begins with nothing: two tables do not share the memory of one gradient.
      .def(py::pickle([](const KeptGradient&) { return py::tuple(); },
                      [](const py::tuple&) { return std::make_shared<KeptGradient>(); }));
  m.def("set_verify_kept_gradients", &set_verify_kept_gradients);
  m.def("verify_kept_gradients", &verify_kept_gradients);
  m.def("cached_bytes", &cpu::recycled_memory_bytes);
  m.def("empty_cache", &cpu::drop_recycled_memory, py::call_guard<py::gil_scoped_release>());
  m.def("set_general_path", [](py::object handler) { general_path() = std::move(handler); });
  m.def("build_config", &build_config);
  m.def("cpu_capability", [] { return cpu::capability_name(cpu::capability()); });
  m.def("index_check", [] { return index_check_name(index_check_mode()); });
  m.def("set_index_check", &set_index_check);
  m.def("check_indices", [] {
    const py::gil_scoped_release no_gil;
    check_indices_now();
  });
}
