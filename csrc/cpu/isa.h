// One source, one object per instruction set.
//
// Every kernel file is compiled once for each instruction set, with -DBERTFAST_ISA=avx512, avx2 or baseline and
// the matching -m flags, and dispatch.cpp (compiled once, without any) chooses among the results at run time.
//
// The trap is the one-definition rule. An inline function or a template that two of these objects emit under the
// same name is merged by the linker, which keeps whichever copy it met first: an AVX-512 copy of std::sort would
// then crash on a machine that has only AVX2. Therefore
//   - everything in a kernel file, and in a header that only kernel files include, lives in
//     `namespace bertfast::BERTFAST_ISA`, so that its names differ between the objects;
//   - kernel files use no std:: templates (vector, sort, function, ...). Memory comes from scratch(), loops run
//     through parallel_for(), both implemented in parallel.cpp, which is compiled once;
//   - <cstdint>, <cstring> and the intrinsics headers are safe: they hold types, C functions and functions that
//     are always inlined.
#pragma once

#ifndef BERTFAST_ISA
#error "compile this file with -DBERTFAST_ISA=avx512, avx2 or baseline"
#endif

// For the small functions of simd.h and its like: a call would pass vectors through memory.
#define BERTFAST_INLINE static inline __attribute__((always_inline))
