"""Compiles the CUDA sources for one architecture, without a GPU: `python tools/cuda_cubins.py 90a` tabulates kernels.

`compile_cubins` is for tests and static analysis: cubins to disassemble, and what ptxas says of each kernel.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURES = ("80", "90a", "100a")


@dataclass(frozen=True)
class Usage:
    """What one kernel uses, as ptxas reports it."""

    registers: int
    stack_bytes: int
    spill_store_bytes: int
    spill_load_bytes: int
    static_shared_bytes: int


@dataclass(frozen=True)
class Cubin:
    source: Path
    path: Path
    kernels: dict[str, Usage]  # by their C++ name


def missing_tool() -> str | None:
    """What keeps CUDA sources from being compiled here, None if nothing."""
    return next((f"no {tool} on this machine" for tool in ("nvcc", "cmake", "ninja") if not _which(tool)), None)


def compile_cubins(architecture: str, folder: Path, torch_folder: Path) -> list[Cubin]:
    """Compiles every csrc/cuda/*.cu to `folder` with the flags of CMakeLists.txt.

    Args:
        architecture: "80", "90a", "100a", ...
        folder: where cubins go; exists.
        torch_folder: of an installed torch, CPU or CUDA build.

    Raises:
        RuntimeError: nvcc fails; the message is its output.
    """
    defines = {
        "BBQ_CUDA": "ON",
        "BBQ_CUDA_ARCHITECTURES": f"{architecture}-real",
        "BBQ_TORCH_DIR": torch_folder,
        "CMAKE_CUDA_COMPILER": _which("nvcc"),
        "BBQ_WERROR": "ON",
    }
    options = [f"-D{name}={value}" for name, value in defines.items()]
    _run(["cmake", "-S", ROOT, "-B", folder / "cmake", "-G", "Ninja", *options])
    commands = json.loads((folder / "cmake" / "compile_commands.json").read_text())
    return [_compile(command, folder) for command in commands if command["file"].endswith(".cu")]


def _compile(command: dict[str, str], folder: Path) -> Cubin:
    source = Path(command["file"])
    path = folder / f"{source.stem}.cubin"
    arguments = shlex.split(command["command"])
    # One architecture's code instead of an object with all of them.
    generate = next(a for a in arguments if a.startswith("--generate-code="))
    architecture = re.search(r"code=\[?(sm_\w+)", generate)[1]
    arguments = [a for a in arguments if a not in ("-c", "-MD") and not a.startswith("--generate-code=")]
    for option in ("-o", "-MT", "-MF"):
        if option in arguments:
            at = arguments.index(option)
            del arguments[at : at + 2]
    output = _run([*arguments, "-cubin", f"-arch={architecture}", "-o", path], cwd=folder)
    return Cubin(source, path, _parse(output))


def _parse(output: str) -> dict[str, Usage]:
    pattern = re.compile(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers([^\n]*)",
        re.DOTALL,
    )
    found = {}
    for name, stack, stores, loads, registers, rest in pattern.findall(output):
        shared = re.search(r"(\d+) bytes smem", rest)
        found[name] = Usage(int(registers), int(stack), int(stores), int(loads), int(shared[1]) if shared else 0)
    return {demangled: found[name] for name, demangled in zip(found, _demangle(list(found)), strict=True)}


def _demangle(names: list[str]) -> list[str]:
    if not shutil.which("c++filt"):
        return names
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    return [re.sub(r"^void bbq::entry<(?:bbq::)?(.*?) ?>\(.*$", r"\1", line) for line in done.stdout.splitlines()]


def _run(command: list[object], cwd: Path | None = None) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, "PATH": _path()},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed:\n{done.stdout}")
    return done.stdout


def _path() -> str:
    """The scripts beside this Python come first: the machine's own CMake may be too old."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"], "/usr/local/cuda/bin"])


def _which(tool: str) -> str | None:
    return shutil.which(tool, path=_path())


def main() -> None:
    import torch

    if missing := missing_tool():
        raise SystemExit(f"tools/cuda_cubins.py: {missing}")
    for architecture in sys.argv[1:] or ARCHITECTURES:
        with tempfile.TemporaryDirectory() as folder:
            for cubin in compile_cubins(architecture, Path(folder), Path(torch.__file__).parent):
                print(f"{cubin.source.name} for sm_{architecture}: registers, stack, spilled bytes, kernel")
                for name, usage in cubin.kernels.items():
                    spilled = usage.spill_store_bytes + usage.spill_load_bytes
                    print(f"  {usage.registers:4} {usage.stack_bytes:6} {spilled:6}  {name}")


if __name__ == "__main__":
    main()
