"""README's tables of speed: `python -m benchmarks.summary benchmarks/results/*_cpu_*.csv` prints them from the rows."""

from __future__ import annotations

import csv
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.registry import OURS

# What the tables leave out: the small cases and the cheap operators, which are in the CSV.
OPERATORS = ("residual_quantize", "similarity_attention", "similarity_attention_varlen")
LEAST_MS = 1.0
DTYPE = "float32"


def tables(paths: Sequence[Path]) -> str:
    """One table for each operator in these CSVs: our time, its rate as a share of a matrix product's, and each peer's
    time by ours."""
    rows = []
    for path in paths:
        with path.open(newline="") as file:
            rows += [row for row in csv.DictReader(file) if row["dtype"] == DTYPE]
    if len(devices := sorted({row["device"] for row in rows})) > 1:
        raise ValueError(f"paths: got files of {len(devices)} machines ({'; '.join(devices)}), expected those of one")
    return "\n\n".join(_table([row for row in rows if row["operator"] == name], name) for name in OPERATORS)


def _table(rows: list[dict[str, str]], operator: str) -> str:
    cases: dict[tuple[str, str], dict[str, dict[str, str]]] = {}
    for row in rows:
        cases.setdefault((row["shape"], row["direction"]), {})[row["provider"]] = row
    cases = {case: found for case, found in cases.items() if float(found[OURS]["min_ms"]) >= LEAST_MS}
    peers = list(dict.fromkeys(name for found in cases.values() for name in found if name != OURS))
    lines = [
        f"| `{operator}` | | ms | of GEMM | " + " | ".join(peers) + " |",
        "|---|---|" + "---:|" * (2 + len(peers)),
    ]
    for (shape, direction), found in cases.items():
        ours = found[OURS]
        ratios = (
            f"{float(found[name]['min_ms']) / float(ours['min_ms']):.3g}×" if name in found else "–" for name in peers
        )
        share = f"{float(ours['gemm_share']):.0%}"
        lines.append(f"| {shape} | {direction} | {float(ours['min_ms']):.3g} | {share} | {' | '.join(ratios)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(tables([Path(name) for name in sys.argv[1:]]))
