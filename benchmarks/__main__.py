"""Times the operators against what a user would pick instead: see README.md."""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
from pathlib import Path

import torch

from benchmarks import machine
from benchmarks.base import Base
from benchmarks.registry import DIRECTIONS, operators
from benchmarks.runner import Options, run

GROUPS = ("rq", "attention")
RESULTS = Path(__file__).parent / "results"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("groups", nargs="*", metavar="group", help=f"of operators: {', '.join(GROUPS)} (default: all)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--threads", type=int, help="of the CPU (default: what torch takes)")
    parser.add_argument("--direction", choices=DIRECTIONS, help="default: both")
    parser.add_argument("--seconds", type=float, default=3.0, help="for each provider of a case (default: 3)")
    parser.add_argument(
        "--quick", action="store_true", help="tiny cases, nothing that compiles first, no CSV by default"
    )
    parser.add_argument("--skip", metavar="PROVIDER", nargs="+", default=[], help="providers to leave out, by name")
    parser.add_argument("--base", metavar="REF", help="a git commit to build in a temporary worktree and time as well")
    parser.add_argument(
        "--csv", type=Path, help="where the rows go (default: results/GROUP_DEVICE.csv beside this file)"
    )
    parser.add_argument("--plot", action="store_true", help="draw the CSV as PNG beside it (needs matplotlib)")
    options = parser.parse_args(arguments)
    if unknown := [group for group in options.groups if group not in GROUPS]:
        parser.error(f"group: got {', '.join(unknown)}, expected names among {', '.join(GROUPS)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: got cuda, but torch sees no GPU")
    if options.threads:
        torch.set_num_threads(options.threads)

    device = torch.device(options.device)
    print(f"{machine.describe(device)}\n{machine.versions()}\ncommit {machine.commit()}")
    directions = [options.direction] if options.direction else DIRECTIONS
    passed = True
    with contextlib.ExitStack() as stack:
        try:
            base = stack.enter_context(Base(options.base, device)) if options.base else None
        except ValueError as error:
            parser.error(str(error))
        groups = options.groups or GROUPS
        for together in [groups] if options.csv else [[group] for group in groups]:  # one file holds all of them
            settings = Options(device, options.seconds, options.quick, directions, base, frozenset(options.skip))
            path = options.csv or (
                None if options.quick else RESULTS / f"{together[0]}_{slug(machine.describe(device))}.csv"
            )
            rows, fine = run(operators(together), settings, lambda line: print(line, flush=True), path)
            passed = passed and fine
            if path and rows:
                print(f"\nwrote {path}")
                if options.plot:
                    from benchmarks.plots import plot

                    print(f"wrote {plot(path)}")
    return 0 if passed else 1


def slug(description: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", description.lower()).strip("_")


if __name__ == "__main__":
    sys.exit(main())
