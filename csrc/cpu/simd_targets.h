// The SIMD targets that CMake compiles each *_simd.cpp for, and the choice among them at run time.
#pragma once

#include <initializer_list>

// Best last. `baseline` is what every machine of the architecture has; `avx2x16` is for tests: the vectors of avx512
// on machines without it.
#if defined(BBQ_X86_TARGETS)
#define BBQ_FOR_SIMD_TARGETS(X) X(baseline) X(avx2x16) X(avx2) X(avx512)
#else
#define BBQ_FOR_SIMD_TARGETS(X) X(baseline)
#endif

namespace bbq {

enum class Element { kFloat32, kBFloat16, kFloat16 };  // of the tensors that the kernels get

#define BBQ_NAME(target) target,
enum class SimdTarget { BBQ_FOR_SIMD_TARGETS(BBQ_NAME) };
#undef BBQ_NAME

// The target whose kernels run: the best that this machine has, unless bbq_set_simd_target chose another.
SimdTarget simd_target();

// Of the tables of kernels of all targets, in the order of SimdTarget, that of the chosen one.
template <class Kernels>
const Kernels& of_target(std::initializer_list<const Kernels*> tables) {
  return **(tables.begin() + static_cast<int>(simd_target()));
}

}  // namespace bbq
