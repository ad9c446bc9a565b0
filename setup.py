"""Builds what the machine allows; metadata is in pyproject.toml, how to compile is in CMakeLists.txt.

Environment: BBQ_REQUIRE_CPU=1 makes a missing CPU library an error, BBQ_CUDA=0|1 forbids or demands the CUDA
library (by default it is built where nvcc and a CUDA build of torch are), BBQ_TORCH_DIR names the folder of torch,
BBQ_SANITIZE, BBQ_WERROR and BBQ_CUDA_ARCHITECTURES are handed to CMake; CXX and CXXFLAGS mean what they always mean.

`python setup.py build_libraries --inplace` compiles into the source tree, only what changed.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

from setuptools import Command, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build

ROOT = Path(__file__).resolve().parent
PACKAGE = "bbqrec_kernels"
OLDEST_TORCH = (2, 10)


class NotBuilt(Exception):
    """Why a library is not built, in one line; `output` is what the compiler said."""

    def __init__(self, reason: str, output: str = "") -> None:
        super().__init__(reason)
        self.output = output


def find_torch() -> tuple[Path, str]:
    """Returns the folder and the version of the torch that the package will run with.

    By path, because pip builds in an isolated environment where torch cannot be imported although it lies on disk,
    in the environment that pip installs into.
    """
    if named := os.environ.get("BBQ_TORCH_DIR"):
        if not (version := torch_version(Path(named))):
            raise NotBuilt(f"BBQ_TORCH_DIR: got {named!r}, which is not the folder of an installed torch")
        candidates = [(Path(named), version)]
    else:
        folders = [*sys.path, sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
        for prefix in filter(None, map(os.environ.get, ("VIRTUAL_ENV", "CONDA_PREFIX"))):
            folders += [sysconfig.get_path("purelib", vars={"base": prefix, "platbase": prefix})]
        folders += [site.getusersitepackages(), *site.getsitepackages([sys.base_prefix])]
        found = ((Path(folder) / "torch", torch_version(Path(folder) / "torch")) for folder in folders if folder)
        candidates = [(folder, version) for folder, version in found if version]
    if not candidates:
        raise NotBuilt(
            "torch was not found on disk; install torch first, and where the build is isolated from it (uv), build "
            "with --no-build-isolation or name its folder in BBQ_TORCH_DIR"
        )
    folder, version = candidates[0]
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < OLDEST_TORCH:
        raise NotBuilt(f"torch {version} is too old, 2.10 or newer is needed")
    return folder.resolve(), version


def torch_version(folder: Path) -> str | None:
    try:
        text = (folder / "version.py").read_text()
    except OSError:
        return None
    match = re.search(r"^__version__ = ['\"]([^'\"]+)['\"]", text, re.MULTILINE)
    return match[1] if match else None


def find_tool(name: str, folder_attribute: str) -> str:
    """The program of the PyPI package (a build requirement, in no isolated environment's PATH), or the machine's."""
    if importlib.util.find_spec(name):
        folder = getattr(importlib.import_module(name), folder_attribute, None)
        if folder and (program := shutil.which(name, path=str(folder))):
            return program
    if program := shutil.which(name):
        return program
    raise NotBuilt(f"{name} was not found; run 'pip install {name}'")


def check_compiler() -> None:
    """Looks where CMake looks, so that its absence is a plain sentence."""
    if named := os.environ.get("CXX"):
        if not (shutil.which(named) or shutil.which(shlex.split(named)[0])):  # one with a space, or with options
            raise NotBuilt(f"no C++ compiler: CXX names {named!r}, which does not exist")
    elif not any(map(shutil.which, ("c++", "g++", "clang++"))):
        raise NotBuilt("no C++ compiler on the PATH (c++, g++ or clang++)")


def run(command: list[str], failure: str) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=build_environment())
    if done.returncode:
        raise NotBuilt(f"{failure}: {first_error(done.stdout)}", done.stdout)
    print(done.stdout, end="")  # warnings


def build_environment() -> dict[str, str]:
    environment = dict(os.environ)
    if target := sysconfig.get_config_var("MACOSX_DEPLOYMENT_TARGET"):
        environment.setdefault("MACOSX_DEPLOYMENT_TARGET", str(target))  # the one that the wheel's tag will say
    return environment


def first_error(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"\berror\b", line, re.IGNORECASE)]
    return (errors or lines or ["no output"])[0].replace(f"{ROOT}{os.sep}", "")


def build_library(name: str, build_folder: Path, target: Path, options: dict[str, object]) -> dict[str, object]:
    """Compiles one library to `target` and returns its entry in _build.json."""
    torch_folder, version = find_torch()
    check_compiler()
    cmake, ninja = find_tool("cmake", "CMAKE_BIN_DIR"), find_tool("ninja", "BIN_DIR")
    options = {"BBQ_TORCH_DIR": torch_folder, "CMAKE_MAKE_PROGRAM": ninja, **options}
    options |= {key: os.environ.get(key, "") for key in ("BBQ_SANITIZE", "BBQ_WERROR")}
    defines = [f"-D{key}={value}" for key, value in options.items()]
    run([cmake, "-S", str(ROOT), "-B", str(build_folder), "-G", "Ninja", *defines], "CMake cannot configure")
    run([cmake, "--build", str(build_folder), "--target", name, "--", "--quiet"], "compiling failed")
    replace(target, (build_folder / f"{name}.so").read_bytes())
    details = dict(line.split("=", 1) for line in (build_folder / f"{name}.txt").read_text().splitlines())
    return {"built": True, "torch": version, **{key: " ".join(value.split()) for key, value in details.items()}}


def build_cpu(build_folder: Path, target: Path) -> dict[str, object]:
    return build_library("_C", build_folder, target, {})


def build_cuda(build_folder: Path, target: Path) -> dict[str, object]:
    wish = os.environ.get("BBQ_CUDA", "")
    if wish == "0":
        raise NotBuilt("BBQ_CUDA=0")
    named = os.environ.get("CUDACXX")
    nvcc = shutil.which(named or "nvcc") or (None if named else shutil.which("nvcc", path="/usr/local/cuda/bin"))
    if not nvcc:
        raise NotBuilt(f"CUDACXX names {named!r}, which does not exist" if named else "nvcc was not found")
    if wish != "1" and not torch_has_cuda(find_torch()[0]):
        raise NotBuilt("torch is a build without CUDA; BBQ_CUDA=1 builds the library all the same")
    options: dict[str, object] = {"BBQ_CUDA": "ON", "CMAKE_CUDA_COMPILER": nvcc}
    if architectures := os.environ.get("BBQ_CUDA_ARCHITECTURES"):
        options["BBQ_CUDA_ARCHITECTURES"] = architectures
    return build_library("_C_cuda", build_folder, target, options)


def torch_has_cuda(folder: Path) -> bool:
    return bool(re.search(r"^cuda.*= ['\"]", (folder / "version.py").read_text(), re.MULTILINE))


def replace(target: Path, content: bytes) -> None:
    """Writes `target` by renaming: a process that has the old library mapped keeps it."""
    if target.exists() and target.read_bytes() == content:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f"{target.name}.{os.getpid()}")
    temporary.write_bytes(content)
    temporary.replace(target)


class BuildLibraries(Command):
    """Compiles the libraries and writes _build.json, which says what was built, with what, and why not."""

    description = "compile the libraries of bbqrec_kernels with CMake"
    user_options: ClassVar = [("inplace", "i", "write into the source tree, and keep objects for the next time")]
    boolean_options: ClassVar = ["inplace"]
    editable_mode = False

    def initialize_options(self) -> None:
        self.inplace = False
        self.build_lib: str | None = None

    def finalize_options(self) -> None:
        self.set_undefined_options("build_py", ("build_lib", "build_lib"))

    def run(self) -> None:
        if self.inplace or self.editable_mode:
            # CMake keeps the compiler, the flags and the place that it first saw: others get another folder.
            names = (
                "CXX",
                "CXXFLAGS",
                "LDFLAGS",
                "CMAKE_BUILD_TYPE",
                "BBQ_SANITIZE",
                "CUDACXX",
                "BBQ_CUDA_ARCHITECTURES",
            )
            seen = zlib.crc32(repr([str(ROOT), *(os.environ.get(name) for name in names)]).encode())
            self.build_into(ROOT / PACKAGE, ROOT / "build", f"-{seen:08x}")
        else:
            with tempfile.TemporaryDirectory() as build_folder:
                self.build_into(Path(self.build_lib) / PACKAGE, Path(build_folder), "")

    def build_into(self, package: Path, build_folder: Path, suffix: str) -> None:
        summary = {
            "cpu": self.build_one(build_cpu, build_folder / f"cpu{suffix}", package / "_C.so", "BBQ_REQUIRE_CPU"),
            "cuda": self.build_one(build_cuda, build_folder / f"cuda{suffix}", package / "_C_cuda.so", "BBQ_CUDA"),
        }
        replace(package / "_build.json", (json.dumps(summary, indent=2) + "\n").encode())
        self.built = [name for name, library in summary.items() if library["built"]]
        parts = [
            f"{name.upper()} library "
            + (f"built ({v['compiler']}, torch {v['torch']})" if v["built"] else f"not built: {v['reason']}")
            for name, v in summary.items()
        ]
        print(f"bbqrec: {'; '.join(parts)}{'' if self.built else '; this is a pure-Python package'}")

    @staticmethod
    def build_one(builder: Callable, build_folder: Path, library: Path, demand: str) -> dict[str, object]:
        """The entry of a library in _build.json; an error where the environment variable `demand` is 1."""
        try:
            return builder(build_folder, library)
        except NotBuilt as failure:
            library.unlink(missing_ok=True)
            if failure.output:
                print(failure.output)
            if os.environ.get(demand) == "1":
                title = {"_C": "CPU", "_C_cuda": "CUDA"}[library.stem]
                raise SystemExit(f"{demand}=1, but the {title} library was not built: {failure}") from None
            return {"built": False, "reason": str(failure)}

    def get_source_files(self) -> list[str]:
        return []  # MANIFEST.in names them

    def get_outputs(self) -> list[str]:
        return [str(Path(self.build_lib) / PACKAGE / name) for name in ("_C.so", "_C_cuda.so", "_build.json")]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class Build(build):
    """A build starts from an empty folder: what was deleted or not built this time must not ship."""

    sub_commands: ClassVar = [*build.sub_commands, ("build_libraries", None)]

    def run(self) -> None:
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class Wheel(bdist_wheel):
    """With a library inside: any Python, one platform. Without: any Python, any platform."""

    def run(self) -> None:
        self.run_command("build")
        self.root_is_pure = not self.get_finalized_command("build_libraries").built
        self.distribution.has_ext_modules = lambda: not self.root_is_pure  # what `install` asks for the folder
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        tag = super().get_tag()
        if self.root_is_pure:
            return tag
        # torch for macOS is not a fat library, and neither is this one.
        return "py3", "none", tag[2].replace("universal2", platform.machine())


if __name__ == "__main__":
    setup(cmdclass={"build": Build, "build_libraries": BuildLibraries, "bdist_wheel": Wheel})
