// Facts about Python objects, checked in one go: what bertfast/guard.py says, without the interpreter.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

namespace bertfast {

// A list of facts (kind, object, key, expected), as guard.py has them, laid out to be walked through. Objects are
// compared by identity. Nothing is owned: the list has to live, unchanged, as long as this does. Its facts refer to the
// model that keeps them, and the garbage collector sees that through the list only.
class Facts {
public:
    explicit Facts(const pybind11::list& facts) {
        for (const auto& item : facts) {
            PyObject* fact = item.ptr();
            facts_.push_back({PyTuple_GET_ITEM(fact, 1), PyTuple_GET_ITEM(fact, 2), PyTuple_GET_ITEM(fact, 3),
                              static_cast<Kind>(PyLong_AsLong(PyTuple_GET_ITEM(fact, 0)))});
        }
        if (PyErr_Occurred()) throw pybind11::error_already_set();
    }

    // Whether every fact holds.
    bool hold() const {
        const size_t count = facts_.size();
        for (size_t i = 0; i < count; ++i) {
            // Between two calls of a model its weights have pushed all of this out of the caches.
            if (i + 2 * ahead < count) prefetch(facts_[i + 2 * ahead].object);
            if (i + ahead < count && facts_[i + ahead].kind <= absent)
                prefetch(reinterpret_cast<PyDictObject*>(facts_[i + ahead].object)->ma_keys);
            if (!holds(facts_[i])) return false;
        }
        return true;
    }

private:
    enum Kind : long { entry, absent, empty, type, attribute };  // those of guard.py

    struct Fact {
        PyObject* object;
        PyObject* key;
        PyObject* expected;
        Kind kind;
    };

    static constexpr size_t ahead = 8;

    static void prefetch(const void* address) {
#if defined(__GNUC__)
        __builtin_prefetch(address);
#endif
    }

    static bool holds(const Fact& fact) {
        PyObject* found = nullptr;
        switch (fact.kind) {
            case entry:
                found = PyDict_GetItemWithError(fact.object, fact.key);
                break;
            case absent:
                if (PyDict_Contains(fact.object, fact.key) == 0) return true;
                break;
            case empty:
                return PyDict_Size(fact.object) == 0;
            case type:
                found = reinterpret_cast<PyObject*>(Py_TYPE(fact.object));
                break;
            case attribute:
                found = PyObject_GetAttr(fact.object, fact.key);
                Py_XDECREF(found);  // only its address is of interest
                break;
        }
        if (PyErr_Occurred()) throw pybind11::error_already_set();
        return found != nullptr && found == fact.expected;
    }

    std::vector<Fact> facts_;
};

}  // namespace bertfast
