// What both binding files need: Python integers as addresses and as dropout seeds.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

namespace bertfast {

// An address, as any type of pointer; 0 is null.
struct Pointer {
    uintptr_t address;
    template <class T>
    operator T*() const {
        return reinterpret_cast<T*>(address);
    }
};

// A dropout seed: any Python integer, modulo 2^64, so that the negative half of an int64 tensor is welcome.
struct Seed {
    uint64_t value = 0;
};

}  // namespace bertfast

namespace pybind11::detail {

template <>
struct type_caster<bertfast::Pointer> {
    PYBIND11_TYPE_CASTER(bertfast::Pointer, const_name("int"));
    bool load(handle source, bool) {
        if (!PyLong_Check(source.ptr())) return false;
        value.address = static_cast<uintptr_t>(PyLong_AsUnsignedLongLong(source.ptr()));
        if (!PyErr_Occurred()) return true;
        PyErr_Clear();
        return false;
    }
};

template <>
struct type_caster<bertfast::Seed> {
    PYBIND11_TYPE_CASTER(bertfast::Seed, const_name("int"));
    bool load(handle source, bool) {
        if (!PyLong_Check(source.ptr())) return false;
        value.value = PyLong_AsUnsignedLongLongMask(source.ptr());
        return true;
    }
};

}  // namespace pybind11::detail
