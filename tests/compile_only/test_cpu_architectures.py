"""The CPU sources compile without a warning for every architecture and compiler that the package promises."""

import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from bbqrec_kernels.testing import simd_targets

ROOT = Path(__file__).parents[2]
# Clang with the C++ library and the headers of every system, from PyPI; `make check` installs it.
CLANG = [sys.executable, "-m", "ziglang", "c++", "-target"]
COMPILERS = {
    "x86-64-v4": ["g++", "-march=x86-64-v4"],
    "x86-64 Linux, Clang": [*CLANG, "x86_64-linux-gnu"],
    "x86-64 macOS, Clang": [*CLANG, "x86_64-macos"],
    "ARM Linux": ["aarch64-linux-gnu-g++"],
    "ARM Linux, Clang": [*CLANG, "aarch64-linux-gnu"],
    "ARM macOS, Clang": [*CLANG, "aarch64-macos"],
}


@pytest.mark.check
@pytest.mark.parametrize("target", COMPILERS)
def test_compiles_without_warnings(target: str, tmp_path: Path) -> None:
    compiler = COMPILERS[target]
    if not shutil.which(compiler[0]):
        pytest.skip(f"no {compiler[0]} on this machine")
    if compiler[:3] == CLANG[:3] and not importlib.util.find_spec("ziglang"):
        pytest.skip("no Clang: pip install ziglang")
    if compiler[0] == "g++" and not subprocess.check_output(["g++", "-dumpmachine"], text=True).startswith("x86_64"):
        pytest.skip("g++ on this machine does not target x86-64")
    # CMake says how this machine compiles each source, once for each SIMD target; the compiler is then exchanged.
    # Objects only: there is no libtorch of another architecture to link with.
    x86 = "ON" if "x86" in target else "OFF"
    defines = ["-DBBQ_WERROR=ON", f"-DBBQ_TORCH_DIR={Path(torch.__file__).parent}", f"-DBBQ_X86_TARGETS={x86}"]
    # The scripts beside this Python come first: the machine's own CMake may be too old.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {
        **os.environ,
        "PATH": path,
        "ZIG_GLOBAL_CACHE_DIR": str(tmp_path),
        "ZIG_LOCAL_CACHE_DIR": str(tmp_path),
    }
    subprocess.run(["cmake", "-S", ROOT, "-B", tmp_path, "-G", "Ninja", *defines], env=environment, check=True)
    commands = json.loads((tmp_path / "compile_commands.json").read_text())
    compiled = Counter(Path(c["file"]).name for c in commands)
    times = {True: 4 if x86 == "ON" else 1, False: 1}
    expected = {p.name: times[p.stem.endswith("_simd")] for p in (ROOT / "csrc" / "cpu").glob("*.cpp")}
    assert compiled == expected
    quick = ["-O0"] if compiler[:3] == CLANG[:3] else []  # Clang's warnings, unlike GCC's, do not need its optimizer
    for command in commands:
        arguments = [*compiler, *shlex.split(command["command"])[1:], *quick]
        done = subprocess.run(arguments, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


@pytest.mark.check
@pytest.mark.skipif(not shutil.which("nm"), reason="no nm on this machine")
@pytest.mark.parametrize("build_type", ["Release", "Debug"])
def test_simd_objects_share_no_function(tmp_path: Path, build_type: str) -> None:
    """Of a function that several objects define, the linker keeps one: perhaps that with instructions too new.

    No warning either: this is how the compiler of this machine builds them.
    """
    defines = [f"-DBBQ_TORCH_DIR={Path(torch.__file__).parent}", f"-DCMAKE_BUILD_TYPE={build_type}", "-DBBQ_WERROR=ON"]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    for command in (["cmake", "-S", ROOT, "-B", tmp_path, "-G", "Ninja", *defines], ["cmake", "--build", tmp_path]):
        subprocess.run(command, env={**os.environ, "PATH": path}, check=True)
    objects = list(tmp_path.glob("CMakeFiles/simd_*.dir/**/*.o"))
    assert len(objects) >= len(simd_targets())
    for file in objects:
        listing = subprocess.check_output(["nm", "--defined-only", "--extern-only", "-C", file], text=True)
        defined = [line.split(maxsplit=2) for line in listing.splitlines()]
        # The address of the runtime's exception handler is the same in all of them.
        names = {name.rpartition("::")[0] for _, _, name in defined if not name.startswith("DW.ref.")}
        assert names == {f"bbq::{simd_name(file)}"}, listing


def simd_name(file: Path) -> str:
    return next(part for part in file.parts if part.startswith("simd_")).removeprefix("simd_").removesuffix(".dir")
