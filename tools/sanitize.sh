#!/usr/bin/env bash
# tools/sanitize.sh address,undefined | thread [arguments of pytest]: runs the operators' tests on a CPU library built
# with AddressSanitizer and UndefinedBehaviorSanitizer, or with ThreadSanitizer, in a copy of the tree under
# build/sanitize. Called by `make check`.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$PWD/.venv/bin/python
copy=build/sanitize
case ${1-} in
  address,undefined | thread) sanitizers=$1 && shift ;;
  *) echo "tools/sanitize.sh: got '${1-}', expected address,undefined or thread" >&2 && exit 2 ;;
esac

mkdir -p "$copy"
rm -rf "$copy"/{bbqrec_kernels,csrc,tests}
cp -rp bbqrec_kernels csrc setup.py CMakeLists.txt pyproject.toml "$copy"
mkdir "$copy/tests"
cp -rp tests/conftest.py tests/bbqrec_kernels "$copy/tests"
cd "$copy"
rm -f bbqrec_kernels/_C.so
BBQ_REQUIRE_CPU=1 BBQ_SANITIZE=$sanitizers "$python" -W ignore setup.py -q build_libraries --inplace | tail -n 1

case $sanitizers in
  address,undefined)
    # torch.compile starts compilers and worker processes, and runs the same kernels; csrc/simt exchanges stacks, which
    # the sanitizer cannot follow, and checks every access itself; the gigabytes between rows of past_32 are slow. Of the
    # SIMD targets those of the narrowest and the widest registers: the others lack no code that they have.
    runtime=asan
    between=$(cd ../.. && "$python" -c "from bbqrec_kernels.testing import simd_targets as t; print(*{'avx2x16', *t()[1:-1]})")
    tests=(-k "not compile and not export and not simt and not past_32 and not reference and not ${between// / and not }")
    ;;
  thread)
    # Every operator, forward and backward, on more threads than a small machine has cores. Of the longest test the
    # causal half, which writes the same memory.
    runtime=tsan
    tests=(-k "thread and not (many_units and False) and not simt")
    export OMP_NUM_THREADS=4
    ;;
esac
# Python itself is not instrumented: the runtime comes first by LD_PRELOAD, with the C++ library whose exceptions it
# intercepts. What Python never frees is no leak of ours, and what torch and Python write is no race of ours.
compiler=${CXX:-c++}
LD_PRELOAD="$($compiler -print-file-name=lib$runtime.so) $($compiler -print-file-name=libstdc++.so.6)"
export LD_PRELOAD ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONMALLOC=malloc
export TSAN_OPTIONS=halt_on_error=1:ignore_noninstrumented_modules=1
"$python" - "$sanitizers" $runtime <<'CHECK'
import ctypes, sys, bbqrec_kernels._library as library
assert library.CPU.loaded, library.CPU.blocker
assert "build/sanitize" in str(library.CPU.path), library.CPU.path
assert f"-fsanitize={sys.argv[1]}" in library.CPU.build["flags"], library.CPU.build
assert hasattr(ctypes.CDLL(None), f"__{sys.argv[2]}_init"), "the sanitizer's runtime is not in the process"
CHECK
# A report ends the process, so nothing may hold back what was written to stderr, and pytest may not take the signal.
"$python" -m pytest -p no:cacheprovider -p no:faulthandler --capture=sys -q "${tests[@]}" "$@" tests
