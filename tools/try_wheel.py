"""Tries the one wheel beside several versions of torch: the tests of the sdist, run on what the wheel installed.

    python tools/try_wheel.py --torch 2.10.0 newest [--python python3.13] [--dist dist] [-- tests/bbqrec_kernels -x]

Builds sdist and wheel once, with the packages of this Python (or takes them from the folder of --dist), and makes an
environment for each torch in build/try_wheel, or brings the one that is there up to date. Everything else is as new as
pip makes it, as for a user. What `pip install torch` takes may be a CUDA build, 5 to 7 GB on disk; PIP_EXTRA_INDEX_URL
or `--torch 2.10.0+cpu` choose another. Exit code 1 where a test failed, or where the library is not the wheel's or does
not load. What the steps print goes to build/try_wheel/<environment>.log.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build" / "try_wheel"
PACKAGES = {"bbqrec", "bbqrec_kernels", "bbqrec.egg-info"}
# The CUDA kernels on the host ("simt") are no part of the wheel, and whether they are right does not depend on torch.
TESTS = ["tests/bbqrec_kernels", "tests/bbqrec", "-k", "not simt"]
WHICH = """
import json, torch, bbqrec, bbqrec_kernels
from bbqrec_kernels import _library
files = [bbqrec.__file__, bbqrec_kernels.__file__, str(_library.CPU.path)]
print(json.dumps({"torch": torch.__version__, "files": files, "blocker": _library.CPU.blocker}))
"""


class Failed(Exception):
    """Why a torch was not tried to the end, in one line."""


class Environment:
    """A virtual environment with one torch, and the log of what is done in it."""

    def __init__(self, python: str, torch: str) -> None:
        code = "import sys; print('python%d.%d' % sys.version_info[:2])"
        tag = subprocess.check_output([python, "-c", code], text=True).strip()
        self.base, self.torch = python, torch
        self.folder = WORK / f"{tag}-torch-{torch}"
        self.log = self.folder.with_name(f"{self.folder.name}.log")
        self.log.write_text("")

    def run(self, step: str, command: list[object], cwd: Path) -> str:
        """Returns what a command prints; one that fails is an error. No setting of the caller's reaches it."""
        inherited = ("BBQ_", "PYTHON", "PYTEST_", "VIRTUAL_ENV", "CONDA_")
        environment = {name: value for name, value in os.environ.items() if not name.startswith(inherited)}
        with self.log.open("a+") as log:
            log.write(f"\n$ {' '.join(map(str, command))}\n")
            log.flush()
            start = log.tell()
            done = subprocess.run(list(map(str, command)), cwd=cwd, env=environment, stdout=log, stderr=log)
            log.seek(start)
            output = log.read()
        if done.returncode:
            raise Failed(f"{step}: exit code {done.returncode}, {summary(output)}{self.log.relative_to(ROOT)}")
        return output

    def python(self, step: str, arguments: list[object], cwd: Path) -> str:
        return self.run(step, [self.folder / "bin" / "python", *arguments], cwd)

    def install(self, wheel: Path) -> None:
        if not any(self.folder.glob("lib/python*/site-packages/pip")):
            self.run("venv", [self.base, "-m", "venv", self.folder], ROOT)
        torch = ["--upgrade", "torch"] if self.torch == "newest" else [f"torch=={self.torch}"]
        self.python("pip", ["-m", "pip", "install", *torch, f"{wheel}[models,dev]"], ROOT)
        # A version that is installed already is no news to pip, whatever the wheel holds.
        self.python("pip", ["-m", "pip", "install", "--no-deps", "--force-reinstall", wheel], ROOT)

    def check_origin(self, cwd: Path) -> str:
        """The version of torch, after a look at where the packages and the library are loaded from."""
        lines = self.python("import", ["-c", WHICH], cwd).splitlines()
        found = json.loads(next(line for line in lines if line.startswith("{")))  # there may be warnings around it
        if found["blocker"]:
            raise Failed(found["blocker"])
        if strangers := [file for file in found["files"] if not Path(file).is_relative_to(self.folder)]:
            raise Failed(f"not of the wheel: {', '.join(strangers)}")
        self.run("bbqrec doctor", [self.folder / "bin" / "bbqrec", "doctor"], cwd)
        return found["torch"]


def summary(output: str) -> str:
    """What pytest says at its end, such as `3 failed, 40 passed in 7.10s, `; nothing where it is not pytest."""
    found = re.findall(r"^=*\s?(\d+ (?:passed|failed|skipped|error).*? in [\d.]+s).*$", output, re.MULTILINE)
    return "".join(f"{line}, " for line in found[-1:])


def build_distributions(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    with (WORK / "build.log").open("w") as log:
        done = subprocess.run(command, env={**os.environ, "BBQ_REQUIRE_CPU": "1"}, stdout=log, stderr=log)
    if done.returncode:
        raise SystemExit(f"building failed: {(WORK / 'build.log').relative_to(ROOT)}")


def the_one(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise SystemExit(f"{folder}: got {names}, expected one file {pattern}")
    return found[0].resolve()


def unpack_without_packages(sdist: Path, folder: Path) -> Path:
    """What the tests need, and nothing that could be imported in place of the wheel; returns its root."""
    shutil.rmtree(folder, ignore_errors=True)
    with tarfile.open(sdist) as archive:
        members = [member for member in archive if PACKAGES.isdisjoint(member.name.split("/")[1:2])]
        archive.extractall(folder, members, filter="data")
    (root,) = folder.iterdir()
    return root


def try_torch(environment: Environment, wheel: Path, sdist: Path, tests: list[str]) -> bool:
    """Prints the line of one torch, and says whether all went well."""
    started, torch = time.monotonic(), environment.torch
    try:
        environment.install(wheel)
        tree = unpack_without_packages(sdist, environment.folder.with_name(f"{environment.folder.name}-tests"))
        torch = environment.check_origin(tree)
        result = summary(environment.python("tests", ["-m", "pytest", "-q", "-n", "auto", *tests], tree))
        verdict = "passed"
    except Failed as failure:
        result, verdict = f"{failure}, ", "FAILED"
    print(f"{verdict}  torch {torch:<12} {result}with installing {time.monotonic() - started:.0f} s", flush=True)
    return verdict == "passed"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", nargs="+", default=["2.10.0", "newest"], help="versions; 'newest' is what pip takes")
    parser.add_argument("--python", default=sys.executable, help="the Python of the environments")
    parser.add_argument("--dist", type=Path, help="folder with one sdist and one wheel, which are taken as they are")
    parser.add_argument("tests", nargs="*", help=f"arguments of pytest, after --; by default {' '.join(TESTS)}")
    arguments = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    dist = arguments.dist or WORK / "dist"
    if not arguments.dist:
        build_distributions(dist)
    wheel, sdist = the_one(dist, "*.whl"), the_one(dist, "*.tar.gz")
    print(f"{wheel.name}, tests of {sdist.name}", flush=True)
    environments = [Environment(arguments.python, torch) for torch in arguments.torch]
    tried = [try_torch(environment, wheel, sdist, arguments.tests or TESTS) for environment in environments]
    return 0 if all(tried) else 1


if __name__ == "__main__":
    sys.exit(main())
