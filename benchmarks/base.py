"""Another commit beside this one: built in a temporary worktree, timed in a process of its own, turn by turn with ours.

`python -m benchmarks.base` is that process. It reads one JSON request a line: `{"operator", "sizes", "dtype",
"backward", "device", "threads"}` prepares a call, `{"repeats"}` times it; it answers with one line each.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType

import torch

from benchmarks import machine, timing
from benchmarks.registry import OURS, Case, Operator, operators


class Base:
    """The operators as they are at `ref`. A context manager: on leaving, the worktree goes.

    Raises:
        ValueError: git knows no such commit, or it does not build.
    """

    def __init__(self, ref: str, device: torch.device) -> None:
        self.provider = f"{OURS}@{ref}"
        self._ref, self._device = ref, device

    def __enter__(self) -> Base:
        with contextlib.ExitStack() as leaving:  # where something fails in between, too
            folder = Path(tempfile.mkdtemp(prefix="benchmarks-"))
            leaving.callback(shutil.rmtree, folder, ignore_errors=True)
            self._tree = folder / "tree"
            self._git("worktree", "add", "--quiet", "--detach", str(self._tree), self._ref)
            leaving.callback(self._git, "worktree", "remove", "--force", str(self._tree))
            self._start()
            self._leaving = leaving.pop_all()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._worker.stdin.close()
        self._worker.wait()
        self._leaving.close()

    def _start(self) -> None:
        self.commit = self._git("rev-parse", "--short", self._ref).strip()
        # The same benchmarks time both, and the package beside them is the one that is imported.
        shutil.rmtree(self._tree / "benchmarks", ignore_errors=True)
        shutil.copytree(
            machine.ROOT / "benchmarks", self._tree / "benchmarks", ignore=shutil.ignore_patterns("results")
        )
        # Without a library it would be timed as plain torch.
        demanded = {"BBQ_REQUIRE_CPU": "1"} if self._device.type == "cpu" else {}
        environment = {**os.environ, **demanded, "PYTHONPATH": str(self._tree)}
        build = [sys.executable, "setup.py", "-q", "build_libraries", "--inplace"]
        done = subprocess.run(build, cwd=self._tree, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"--base: {self._ref} does not build: {(done.stderr or done.stdout).strip()[-500:]}")
        command = [sys.executable, "-m", "benchmarks.base"]
        self._worker = subprocess.Popen(
            command, cwd=self._tree, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def prepare(self, operator: Operator, case: Case, backward: bool) -> timing.Remote:
        self._ask(
            operator=operator.name,
            sizes=case.sizes,
            dtype=str(case.dtype).removeprefix("torch."),
            backward=backward,
            device=str(self._device),
            threads=torch.get_num_threads(),
        )
        return timing.Remote(lambda repeats: self._ask(repeats=repeats))

    def _ask(self, **request: object) -> float:
        self._worker.stdin.write(json.dumps(request) + "\n")
        self._worker.stdin.flush()
        answer = self._worker.stdout.readline()
        if not answer:
            raise RuntimeError(f"the process of {self._ref} ended with exit code {self._worker.wait()}")
        return float(json.loads(answer))

    def _git(self, *arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=machine.ROOT, capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"--base: got {self._ref!r}, and git says: {done.stderr.strip()}")
        return done.stdout


def serve() -> None:
    answers, sys.stdout = sys.stdout, sys.stderr  # nothing else may be printed between answers
    timed = None
    for line in sys.stdin:
        request = json.loads(line)
        if "repeats" in request:
            answer = timed(request["repeats"])
        else:
            torch.set_num_threads(request["threads"])
            operator = next(o for o in operators() if o.name == request["operator"])
            case, device = Case(request["sizes"], getattr(torch, request["dtype"])), torch.device(request["device"])
            provider = next(p for p in operator.providers if p.name == OURS)
            call = provider.prepare(operator.make_inputs(case, device), request["backward"])
            timed, answer = timing.timer(call, device), 0.0
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    serve()
