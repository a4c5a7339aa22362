// Facts about Python objects, checked in one go: what bertfast/guard.py says, without the interpreter.
#pragma once

#include <pybind11/pybind11.h>

namespace bertfast {

// Whether every fact of the list holds. A fact is a tuple (kind, object, key, expected); kinds are those of guard.py.
// The list stays Python's, so that the garbage collector sees what it refers to. Objects are compared by identity.
inline bool holds(const pybind11::list& facts) {
    enum Kind : long { entry, absent, empty, type, attribute };
    const Py_ssize_t count = PyList_GET_SIZE(facts.ptr());
    for (Py_ssize_t i = 0; i < count; ++i) {
        PyObject* fact = PyList_GET_ITEM(facts.ptr(), i);
        PyObject* object = PyTuple_GET_ITEM(fact, 1);
        PyObject* key = PyTuple_GET_ITEM(fact, 2);
        PyObject* expected = PyTuple_GET_ITEM(fact, 3);
        bool as_expected = false;
        switch (PyLong_AsLong(PyTuple_GET_ITEM(fact, 0))) {
            case entry:
                as_expected = PyDict_GetItemWithError(object, key) == expected;
                break;
            case absent:
                as_expected = PyDict_Contains(object, key) == 0;
                break;
            case empty:
                as_expected = PyDict_Size(object) == 0;
                break;
            case type:
                as_expected = reinterpret_cast<PyObject*>(Py_TYPE(object)) == expected;
                break;
            case attribute: {
                PyObject* found = PyObject_GetAttr(object, key);
                as_expected = found == expected;
                Py_XDECREF(found);
                break;
            }
        }
        if (PyErr_Occurred()) throw pybind11::error_already_set();
        if (!as_expected) return false;
    }
    return true;
}

}  // namespace bertfast
