"""Kills training at random moments: every restart has to go on, and the end has to be what it is undisturbed.

    python tools/soak.py --kills 50 [--seed 0] [--out runs/soak]

Trains on a generated catalogue, first undisturbed, then killed (SIGKILL) after a random part of that time and started
again, until it is through; then anew, until there were as many kills as asked for. Every other kill waits on until a
checkpoint is being written. Exit code 1, and the folder is kept,
where a restart fails, or metrics, weights or semantic IDs differ from the undisturbed run's.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bbqrec.data.demo import make_demo_dataset
from bbqrec.data.files import TEMPORARY

OPTIONS = {"tokenizer.epochs": 4, "training.epochs": 5, "training.patience": 5}
COMPARED = ("model.safetensors", "tokenizer.safetensors", "semantic_ids.parquet")


def start(data: Path, run: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "bbqrec.cli.main", "fit", "--data", str(data), "--out", str(run)]
    for key, value in OPTIONS.items():
        command += ["--set", f"{key}={value}"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen) -> None:
    _, said = process.communicate()
    if process.returncode:
        raise SystemExit(f"a restart failed: {said}")


def is_killed(process: subprocess.Popen, seconds: float, run: Path, *, while_writing: bool) -> tuple[bool, bool]:
    """Kills a process after some time, or later, in the middle of a write: whether it lived so long, and was in one."""
    left = half_written(run)  # by an earlier kill
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        while while_writing and process.poll() is None and half_written(run) <= left:
            time.sleep(0.0002)
        if process.poll() is None:
            process.kill()
            process.communicate()
            return True, not half_written(run) <= left
    return False, False


def half_written(run: Path) -> set[Path]:
    return set(run.glob(f"checkpoints/*/.*{TEMPORARY}"))


def differences(run: Path, expected: Path) -> list[str]:
    """Names of the files in which a run is not the undisturbed one."""
    found = [name for name in COMPARED if (run / name).read_bytes() != (expected / name).read_bytes()]
    metrics = [json.loads((folder / "metrics.json").read_text()) for folder in (run, expected)]
    return found if metrics[0] == metrics[1] else [*found, "metrics.json"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="how many, at least")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--out", type=Path, help="folder, new; by default one that is deleted if all goes well")
    arguments = parser.parse_args()
    out = arguments.out or Path(tempfile.mkdtemp(prefix="bbqrec-soak-"))
    data, expected, moments = out / "data", out / "undisturbed", random.Random(arguments.seed)
    make_demo_dataset(n_users=300, n_items=200).save(data)
    started = time.perf_counter()
    finish(start(data, expected))
    undisturbed = time.perf_counter() - started
    kills = runs = torn = 0
    while kills < arguments.kills:
        run = out / f"run-{runs}"
        runs, whole = runs + 1, True
        while not (run / "metrics.json").is_file():
            process, started = start(data, run), time.perf_counter()
            seconds = moments.uniform(0.1, 1) * undisturbed
            killed, in_a_write = is_killed(process, seconds, run, while_writing=kills % 2 == 1)
            if not killed:
                finish(process)
                if whole:  # the machine may have less to do than it had at first
                    undisturbed = min(undisturbed, time.perf_counter() - started)
            whole = False
            kills += killed
            torn += in_a_write
        if wrong := differences(run, expected):
            raise SystemExit(f"after {kills} kills, {run} is not what an undisturbed run is: {', '.join(wrong)}")
        print(f"{kills} kills, {torn} in the middle of a checkpoint; {runs} runs ended as undisturbed", flush=True)
        shutil.rmtree(run)
    if arguments.out is None:
        shutil.rmtree(out)


if __name__ == "__main__":
    main()
