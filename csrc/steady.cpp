#include "steady.h"

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

namespace py = pybind11;

namespace convmixer_fast {
namespace {

// Interned, as the keys of a module's dictionaries are.
PyObject* name(const char* text) {
  PyObject* made = PyUnicode_InternFromString(text);
  if (made == nullptr) throw py::error_already_set();
  return made;
}

struct Names {
  PyObject* modules = name("_modules");
  PyObject* parameters = name("_parameters");
  PyObject* buffers = name("_buffers");
  PyObject* approximate = name("approximate");
  PyObject* eps = name("eps");
  PyObject* weight = name("weight");
  PyObject* bias = name("bias");
  PyObject* running_mean = name("running_mean");
  PyObject* running_var = name("running_var");
  PyObject* version = name("_version");
  PyObject* data_ptr = name("data_ptr");
  PyObject* dtype = name("dtype");
  PyObject* shape = name("shape");
  PyObject* is_contiguous = name("is_contiguous");
};

const Names& names() {
  static const Names all;
  return all;
}

// An owned reference, or none where Python raised.
class Ref {
 public:
  explicit Ref(PyObject* owned) : object_(owned) {}
  ~Ref() { Py_XDECREF(object_); }
  Ref(const Ref&) = delete;
  Ref& operator=(const Ref&) = delete;
  PyObject* get() const { return object_; }
  bool is(PyObject* other) const { return object_ == other && other != nullptr; }
  bool equals(PyObject* other) const {
    return object_ != nullptr && PyObject_RichCompareBool(object_, other, Py_EQ) == 1;
  }

 private:
  PyObject* object_;
};

PyObject* item(PyObject* tuple, Py_ssize_t i) { return PyTuple_GET_ITEM(tuple, i); }

// An entry of an object's or module's dictionary, borrowed; null where there is none.
PyObject* entry(PyObject* dictionary, PyObject* key) {
  return dictionary != nullptr && PyDict_Check(dictionary) ? PyDict_GetItemWithError(dictionary, key)
                                                           : nullptr;
}

void require_tuples(const py::tuple& rows, Py_ssize_t size, const char* what) {
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(rows.ptr()); ++i) {
    PyObject* row = item(rows.ptr(), i);
    if (!PyTuple_Check(row) || PyTuple_GET_SIZE(row) != size) {
      throw py::type_error(std::string(what) + ": must be tuples of " + std::to_string(size));
    }
  }
}

bool has_children(PyObject* own, PyObject* children) {
  PyObject* modules = entry(own, names().modules);
  if (modules == nullptr || !PyTuple_Check(children)) return false;
  const Py_ssize_t count = PyTuple_GET_SIZE(children);
  if (!PyDict_CheckExact(modules)) {  // an OrderedDict's order is its own
    const Ref values(PyMapping_Values(modules));
    const Ref found(values.get() == nullptr ? nullptr : PySequence_Tuple(values.get()));
    return found.equals(children);
  }
  if (PyDict_Size(modules) != count) return false;
  PyObject* child = nullptr;
  for (Py_ssize_t at = 0, i = 0; PyDict_Next(modules, &at, nullptr, &child); ++i) {
    if (child != item(children, i)) return false;
  }
  return true;
}

bool module_unchanged(PyObject* row, PyObject* falsy, PyObject* methods) {
  PyObject* module = item(row, 0);
  const Ref own(PyObject_GenericGetDict(module, nullptr));
  if (own.get() == nullptr || reinterpret_cast<PyObject*>(Py_TYPE(module)) != item(row, 1)) return false;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(falsy); ++i) {
    PyObject* value = entry(own.get(), item(falsy, i));
    if (value == nullptr || PyObject_IsTrue(value) != 0) return false;
  }
  // Offloading and adapter libraries set a method on the object instead of a hook.
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(methods); ++i) {
    if (entry(own.get(), item(methods, i)) != nullptr) return false;
  }
  return has_children(own.get(), item(row, 2));
}

bool act_unchanged(PyObject* row) {
  const Ref own(PyObject_GenericGetDict(item(row, 0), nullptr));
  if (own.get() == nullptr) return false;
  PyObject* form = entry(own.get(), names().approximate);
  return PyObject_RichCompareBool(form == nullptr ? Py_None : form, item(row, 1), Py_EQ) == 1;
}

// Of tensors that were contiguous, as those on a CPU must be to have a packed copy: with the same shape
// they have the same strides while they are so.
bool stamped(PyObject* tensor, PyObject* stamp) {
  return item(stamp, 0) == tensor &&
         Ref(PyObject_GetAttr(tensor, names().version)).equals(item(stamp, 1)) &&
         Ref(PyObject_CallMethodNoArgs(tensor, names().data_ptr)).equals(item(stamp, 2)) &&
         Ref(PyObject_GetAttr(tensor, names().dtype)).is(item(stamp, 3)) &&
         Ref(PyObject_GetAttr(tensor, names().shape)).equals(item(stamp, 4)) &&
         Ref(PyObject_CallMethodNoArgs(tensor, names().is_contiguous)).is(Py_True);
}

// `next`: of the stamps; moves past those of this half.
bool half_unchanged(PyObject* row, PyObject* settings, PyObject* stamps, Py_ssize_t& next) {
  const Ref conv(PyObject_GenericGetDict(item(row, 0), nullptr));
  const Ref norm(PyObject_GenericGetDict(item(row, 1), nullptr));
  PyObject* values = item(row, 2);
  if (!PyTuple_Check(values) || PyTuple_GET_SIZE(values) != PyTuple_GET_SIZE(settings)) return false;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(settings); ++i) {
    PyObject* value = entry(conv.get(), item(settings, i));
    if (value == nullptr || PyObject_RichCompareBool(value, item(values, i), Py_EQ) != 1) return false;
  }
  PyObject* eps = entry(norm.get(), names().eps);
  if (eps == nullptr || PyObject_RichCompareBool(eps, item(row, 3), Py_EQ) != 1) return false;
  PyObject* kept = entry(conv.get(), names().parameters);
  PyObject* affine = entry(norm.get(), names().parameters);
  PyObject* statistics = entry(norm.get(), names().buffers);
  PyObject* const sources[] = {entry(kept, names().weight),
                               entry(kept, names().bias),
                               entry(affine, names().weight),
                               entry(affine, names().bias),
                               entry(statistics, names().running_mean),
                               entry(statistics, names().running_var)};
  // An attribute of the object comes before its parameter of that name.
  PyObject* const names_of[] = {names().weight, names().bias, names().running_mean, names().running_var};
  for (PyObject* key : names_of) {
    if (entry(conv.get(), key) != nullptr || entry(norm.get(), key) != nullptr) return false;
  }
  for (PyObject* tensor : sources) {
    if (tensor == nullptr || next == PyTuple_GET_SIZE(stamps)) return false;
    PyObject* stamp = item(stamps, next++);
    if (tensor == Py_None || stamp == Py_None) {
      if (tensor != stamp) return false;
    } else if (!PyTuple_Check(stamp) || PyTuple_GET_SIZE(stamp) != 6 || !stamped(tensor, stamp)) {
      return false;
    }
  }
  return true;
}

// What could not be read has changed.
bool answer(bool unchanged) {
  if (PyErr_Occurred() == nullptr) return unchanged;
  PyErr_Clear();
  return false;
}

}  // namespace

bool modules_unchanged(const py::tuple& modules, const py::tuple& acts, const py::tuple& falsy,
                       const py::tuple& methods) {
  require_tuples(modules, 3, "modules");
  require_tuples(acts, 2, "acts");
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(modules.ptr()); ++i) {
    if (!module_unchanged(item(modules.ptr(), i), falsy.ptr(), methods.ptr())) return answer(false);
  }
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(acts.ptr()); ++i) {
    if (!act_unchanged(item(acts.ptr(), i))) return answer(false);
  }
  return answer(true);
}

bool attributes_unchanged(const py::tuple& rows) {
  // Python gives a type another version tag when it or a base is written to (none, 0, until the next
  // look-up): while the tags of the last full answer stand, only owners that are no types are asked.
  struct Answered {
    py::tuple rows;
    std::vector<std::pair<PyTypeObject*, unsigned>> tags;
  };
  static Answered& last = *new Answered();
  bool known = last.rows.ptr() == rows.ptr();
  for (std::size_t i = 0; known && i < last.tags.size(); ++i) {
    known = last.tags[i].second != 0 && last.tags[i].first->tp_version_tag == last.tags[i].second;
  }
  if (!known) require_tuples(rows, 3, "rows");
  std::vector<std::pair<PyTypeObject*, unsigned>> tags;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(rows.ptr()); ++i) {
    PyObject* row = item(rows.ptr(), i);
    PyObject* owner = item(row, 0);
    if (known && PyType_Check(owner)) continue;
    if (!Ref(PyObject_GetAttr(owner, item(row, 1))).is(item(row, 2))) return answer(false);
    if (PyType_Check(owner)) tags.emplace_back(reinterpret_cast<PyTypeObject*>(owner), 0u);
  }
  if (!known) {
    for (auto& tag : tags) tag.second = tag.first->tp_version_tag;
    tags.erase(std::unique(tags.begin(), tags.end()), tags.end());
    last = {rows, std::move(tags)};
  }
  return true;
}

bool parameters_unchanged(const py::tuple& halves, const py::tuple& settings, const py::tuple& stamps) {
  require_tuples(halves, 4, "halves");
  Py_ssize_t next = 0;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(halves.ptr()); ++i) {
    if (!half_unchanged(item(halves.ptr(), i), settings.ptr(), stamps.ptr(), next)) return answer(false);
  }
  return answer(next == PyTuple_GET_SIZE(stamps.ptr()));
}

}  // namespace convmixer_fast
