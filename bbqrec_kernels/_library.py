"""Loads the compiled libraries beside this file, and remembers why one could not be loaded.

`setup.py` writes the libraries (`_C` for the CPU, `_C_cuda` for CUDA) and `_build.json`, which says for each
whether it was built, with what, and if not, why. Importing never fails: a missing library is reported by the call
that needs it and by `python -m bbqrec_kernels.collect_env`.

The CPU library holds its SIMD kernels several times and runs the best that the machine can; the environment variable
BBQ_SIMD names another (csrc/cpu/simd_targets.h).
"""

from __future__ import annotations

import ctypes
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

_FOLDER = Path(__file__).parent
_SUFFIXES = (".so", ".dylib")


@dataclass(frozen=True)
class Library:
    """One compiled library: whether its kernels are registered, and the reason if they are not."""

    name: str
    path: Path | None
    blocker: str | None  # None when loaded, otherwise why its kernels cannot run
    build: dict[str, Any] = field(default_factory=dict)  # compiler, torch headers, ... as setup.py wrote them

    @property
    def loaded(self) -> bool:
        return self.blocker is None

    def has_code_for(self, capability: tuple[int, int]) -> bool:
        """Whether a GPU of this compute capability runs what the build's list of architectures names.

        Code for 80 runs on all that came later, as it includes PTX; 80-real on 8.x; 90a on 9.0 alone.
        """
        for entry in self.build.get("architectures", "all").split(";"):
            name = re.fullmatch(r"(\d+)(\d)([af]?)(-real|-virtual)?", entry.strip())
            if name is None:  # such as "native" and "all"
                return True
            major, minor, kind = int(name[1]), int(name[2]), name[3]
            if kind == "a":
                fits = capability == (major, minor)
            elif kind == "f" or name[4] == "-real":
                fits = capability[0] == major and capability[1] >= minor
            else:
                fits = capability >= (major, minor)
            if fits:
                return True
        return False


def _read_build_summary() -> dict[str, dict[str, Any]]:
    try:
        return json.loads((_FOLDER / "_build.json").read_text())
    except (OSError, json.JSONDecodeError):
        return {}


def _load(name: str, title: str, build: dict[str, Any]) -> Library:
    path = next((p for p in (_FOLDER / f"{name}{suffix}" for suffix in _SUFFIXES) if p.exists()), None)
    if path is None:
        reason = build.get("reason", "this installation holds no compiled library")
        return Library(name, None, f"the {title} library was not built: {reason}", build)
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        first_line = str(error).strip().splitlines()[0]
        built_for = build.get("torch", "an unknown torch")
        return Library(
            name,
            path,
            f"the {title} library (built against torch {built_for}) does not load into torch {torch.__version__}: "
            f"{first_line}",
            build,
        )
    return Library(name, path, None, build)


class Simd:
    """The choice among the SIMD targets of the CPU library, for the whole process."""

    def __init__(self, library: Library) -> None:
        self._functions = ctypes.CDLL(str(library.path))
        self._functions.bbq_simd_targets.restype = self._functions.bbq_simd_target.restype = ctypes.c_char_p
        self._functions.bbq_set_simd_target.argtypes = [ctypes.c_char_p]
        self._functions.bbq_set_simd_target.restype = ctypes.c_bool

    @property
    def names(self) -> list[str]:
        """The targets that this machine can run, best last."""
        return self._functions.bbq_simd_targets().decode().split()

    @property
    def current(self) -> str:
        return self._functions.bbq_simd_target().decode()

    def choose(self, name: str) -> None:
        """Runs the kernels of another target from now on.

        Raises:
            ValueError: there is none of this name, or this machine cannot run it.
        """
        if not self._functions.bbq_set_simd_target(name.encode()):
            raise ValueError(f"SIMD target: got {name!r}, expected one of {', '.join(self.names)} on this machine")


def _load_cpu(build: dict[str, Any]) -> tuple[Library, Simd | None]:
    """The CPU library, with the SIMD target that BBQ_SIMD names; a wrong name blocks it."""
    library = _load("_C", "CPU", build)
    if not library.loaded:
        return library, None
    simd = Simd(library)
    if name := os.environ.get("BBQ_SIMD"):
        try:
            simd.choose(name)
        except ValueError as error:
            return Library(library.name, library.path, f"BBQ_SIMD, {error}", build), None
    return library, simd


_SUMMARY = _read_build_summary()
CPU, SIMD = _load_cpu(_SUMMARY.get("cpu", {}))
CUDA = _load("_C_cuda", "CUDA", _SUMMARY.get("cuda", {}))
