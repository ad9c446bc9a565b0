"""Fits the models of a data set and writes how good, how slow and how large they are: see README.md beside this file.

    python -m benchmarks.accuracy beauty --data DATA                # the runs that beauty.yaml names
    python -m benchmarks.accuracy beauty --data DATA --run bbqrec   # one row of the table
    python -m benchmarks.accuracy --table [beauty ...]              # the tables, from results that are there
    python -m benchmarks.accuracy beauty --data DATA --grid         # dropout and weight decay, to choose on validation
    python -m benchmarks.accuracy --table --grid                    # the choices

A row of `benchmarks/results/accuracy/NAME.csv` is a run, a seed and a split. What the file has is not measured again.
Finished run folders in `--out` are not fitted again either, unfinished ones are resumed.
"""

from __future__ import annotations

import argparse
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from bbqrec import Dataset
from benchmarks.accuracy.measure import measure
from benchmarks.accuracy.runs import NAMES, Runs
from benchmarks.accuracy.table import grid_table, headline, tables


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accuracy", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="name", help=f"of data sets, one to measure: {', '.join(NAMES)}")
    parser.add_argument("--table", action="store_true", help="show the tables (of all, if none is named)")
    parser.add_argument("--headline", action="store_true", help="show the table of the project's README")
    parser.add_argument("--grid", action="store_true", help="the models at each point of the grid, instead of the runs")
    parser.add_argument("--data", type=Path, help="the data set's folder")
    parser.add_argument("--run", nargs="+", metavar="RUN", help="which of the file's runs (default: all)")
    parser.add_argument("--seeds", type=int, help="as many, from 0 (default: what the file says)")
    parser.add_argument("--out", type=Path, default=Path("runs/accuracy"), help="folder of the run folders")
    parser.add_argument(
        "--csv", type=Path, help="where rows go (default: NAME.csv, or NAME-grid.csv, in benchmarks/results/accuracy)"
    )
    chosen = parser.parse_args(arguments)
    if unknown := [name for name in chosen.names if name not in NAMES]:
        parser.error(f"name: got {', '.join(unknown)}, expected names among {', '.join(NAMES)}")
    load, show = (Runs.load_grid, grid_table) if chosen.grid else (Runs.load, tables)
    if chosen.table:
        print(show(map(load, chosen.names or NAMES)))
        return
    if chosen.headline:
        print(headline(map(Runs.load, chosen.names or NAMES)))
        return
    if len(chosen.names) != 1 or not chosen.data:
        parser.error("one name and --data are needed to measure")

    runs = load(chosen.names[0], chosen.csv)
    if unknown := [name for name in chosen.run or () if name not in runs.runs]:
        parser.error(f"--run: got {', '.join(unknown)}, expected names among {', '.join(runs.runs)}")
    data = Dataset.load(chosen.data)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, max_tasks_per_child=1) as pool:  # a process a run: its memory is its own
        for name in chosen.run or runs.runs:
            run = runs.runs[name]
            for seed in range(chosen.seeds or run.seeds):
                if not runs.has(name, seed):
                    arguments_of_run = data, name, run.model, run.options, seed, chosen.out / runs.name
                    runs.add(pool.submit(measure, *arguments_of_run).result())
    print(show([runs]))


if __name__ == "__main__":
    main()
