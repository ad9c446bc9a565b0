"""The slower checks, one line each; `make check` calls this. Names of steps as arguments run only those.

What a step prints goes to build/check/<step>.log, and to the terminal where it fails. Exit code 1 if any failed.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOGS = ROOT / "build" / "check"
WORKERS = str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
STEPS = {
    # the CPU sources for other architectures and compilers; sdist, wheel, every way of pip install
    "tests": [sys.executable, *f"-m pytest -q -m check -n {WORKERS} --dist loadgroup --durations=20 tests".split()],
    # the operators' tests under AddressSanitizer and UndefinedBehaviorSanitizer
    "sanitizers": ["bash", "tools/sanitize.sh", "address,undefined", "-n", WORKERS],
    # those of several threads under ThreadSanitizer, in one process: workers would share the threads out
    "threads": ["bash", "tools/sanitize.sh", "thread"],
    # every reader of files, on broken ones
    "fuzz": [sys.executable, "tools/fuzz.py", "--inputs", "100"],
    # the site, anew: what is unchanged since the last time would not warn again
    "docs": [sys.executable, "-m", "sphinx", "-EWqb", "html", "-d", "build/doctrees", "docs", "build/docs"],
}


def run(name: str) -> bool:
    """Runs a step, prints its line, and says whether it passed."""
    started = time.monotonic()
    with (LOGS / f"{name}.log").open("w+") as log:
        code = subprocess.run(STEPS[name], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT).returncode
        log.seek(0)
        output = log.read()
    result = re.findall(r"^=*\s?(\d+ (?:passed|failed|skipped|error).*?) in [\d.]+s.*$", output, re.MULTILINE)
    if code:
        print(output)
    else:
        print("".join(f"    {line}\n" for line in output.splitlines() if line.startswith("SKIPPED")), end="")
    seconds = time.monotonic() - started
    print(f"{'FAILED' if code else 'passed'}  {name:<10} {seconds:4.0f} s  {' '.join(result[-1:])}", flush=True)
    return code == 0


def main() -> int:
    names = sys.argv[1:] or list(STEPS)
    if unknown := [name for name in names if name not in STEPS]:
        print(f"tools/check.py: got {', '.join(unknown)}, expected names among {', '.join(STEPS)}", file=sys.stderr)
        return 2
    LOGS.mkdir(parents=True, exist_ok=True)
    failed = [name for name in names if not run(name)]
    print(f"check: {len(names) - len(failed)} of {len(names)} steps passed" + "".join(f", {n} failed" for n in failed))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
