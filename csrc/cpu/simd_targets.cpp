// The choice of a SIMD target, and the functions by which bbqrec_kernels/_library.py reads and changes it.
#include "simd_targets.h"

#include <atomic>
#include <iterator>
#include <string>

#define BBQ_EXPORT extern "C" __attribute__((visibility("default")))

namespace bbq {
namespace {

#define BBQ_STRING(target) #target,
constexpr const char* kNames[] = {BBQ_FOR_SIMD_TARGETS(BBQ_STRING)};
#undef BBQ_STRING

bool can_run(SimdTarget target) {
#if defined(BBQ_X86_TARGETS)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (target == SimdTarget::avx2 || target == SimdTarget::avx2x16) return avx2;
  if (target == SimdTarget::avx512) {
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
#endif
  return target == SimdTarget::baseline;
}

SimdTarget best() {
  SimdTarget found = SimdTarget::baseline;
  for (size_t i = 0; i < std::size(kNames); ++i) {
    if (can_run(SimdTarget(i))) found = SimdTarget(i);
  }
  return found;
}

std::atomic<SimdTarget>& chosen() {
  static std::atomic<SimdTarget> target{best()};
  return target;
}

}  // namespace

SimdTarget simd_target() { return chosen().load(std::memory_order_relaxed); }

}  // namespace bbq

// Names of the targets that this machine can run, best last, with spaces between.
BBQ_EXPORT const char* bbq_simd_targets() {
  static const std::string names = [] {
    std::string list;
    for (size_t i = 0; i < std::size(bbq::kNames); ++i) {
      if (!bbq::can_run(bbq::SimdTarget(i))) continue;
      if (!list.empty()) list += ' ';
      list += bbq::kNames[i];
    }
    return list;
  }();
  return names.c_str();
}

BBQ_EXPORT const char* bbq_simd_target() { return bbq::kNames[static_cast<int>(bbq::simd_target())]; }

// False, and nothing changes, where the name is unknown or the machine cannot run it.
BBQ_EXPORT bool bbq_set_simd_target(const char* name) {
  for (size_t i = 0; i < std::size(bbq::kNames); ++i) {
    if (bbq::kNames[i] == std::string(name) && bbq::can_run(bbq::SimdTarget(i))) {
      bbq::chosen().store(bbq::SimdTarget(i), std::memory_order_relaxed);
      return true;
    }
  }
  return false;
}
