"""Runs cases: the correctness gate, then all providers of a case in turns, then one row for each."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

from benchmarks import machine
from benchmarks.base import Base
from benchmarks.registry import DIRECTIONS, OURS, Case, Operator, Unavailable
from benchmarks.timing import Call, Remote, Samples, measure

GEMM = "GEMM"
GEMM_SIZE = 2048


@dataclass(frozen=True)
class Row:
    """One line of results/*.csv; README.md says what each column means."""

    operator: str
    provider: str
    shape: str
    dtype: str
    direction: str
    median_ms: float
    min_ms: float
    spread: float
    rounds: int
    peak_extra_mb: float | None
    gflops: float
    gemm_gflops: float
    gemm_share: float
    host_us: float | None
    timing: str
    device: str
    versions: str
    commit: str


@dataclass(frozen=True)
class Options:
    device: torch.device
    seconds: float  # for each provider of a case
    quick: bool
    directions: Sequence[str] = DIRECTIONS
    base: Base | None = None
    skip: frozenset[str] = frozenset()  # names of providers


def run(
    operators: Sequence[Operator], options: Options, say: Callable[[str], None], csv_path: Path | None = None
) -> tuple[list[Row], bool]:
    """Returns the rows of all operators, and whether every one passed its check. `say` gets progress, line by line.

    The CSV is written after every case: a run that is cut short keeps what it measured.
    """
    rows, passed = [], True
    for operator in operators:
        if refusal := refused(operator, options.device):
            say(f"\n{operator.name}: REFUSED, no speed of a wrong result: {refusal}")
            passed = False
            continue
        for case in operator.quick_cases if options.quick else operator.cases:
            for direction in options.directions:
                if direction == DIRECTIONS[1] and not operator.backward:
                    continue
                found = list(run_case(operator, case, direction, options, say))
                say(table(found))
                rows += found
                if csv_path:
                    write_csv(rows, csv_path)
    return rows, passed


def refused(operator: Operator, device: torch.device) -> str | None:
    """Why the speed of an operator may not be told: what its check says of any implementation that is timed."""
    for provider in operator.providers:
        if provider.name.split()[0] == OURS:
            impl = provider.name.removeprefix(OURS).strip() or "auto"
            try:
                operator.check(impl, device)
            except AssertionError as error:
                return f"{impl}: {error}"
    return None


def run_case(
    operator: Operator, case: Case, direction: str, options: Options, say: Callable[[str], None]
) -> Iterator[Row]:
    backward = direction == DIRECTIONS[1]
    say(f"\n{operator.name}  {case.shape}  {_name(case.dtype)}  {direction}")
    inputs = operator.make_inputs(case, options.device)
    calls: dict[str, Call] = {}
    for provider in operator.providers:
        try:
            if provider.name in options.skip:
                raise Unavailable("--skip names it")
            if backward and not provider.backward:
                raise Unavailable("it has no backward")
            if options.quick and provider.slow_start:
                raise Unavailable("it compiles first, which --quick leaves out")
            calls[provider.name] = provider.prepare(inputs, backward)
        except Unavailable as reason:
            say(f"  {provider.name} skipped: {reason}")
        except Exception as error:  # a peer that breaks must not end the run
            if provider.name.split()[0] == OURS:
                raise
            say(
                f"  {provider.name} skipped: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            )
    if options.base:
        calls[options.base.provider] = options.base.prepare(operator, case, backward)
    peaks = {name: _peak(call, options.device) for name, call in calls.items()}
    calls[GEMM] = _gemm(case, options)
    samples = measure(calls, options.device, 0.02 if options.quick else options.seconds)

    flops = operator.flops(case, inputs, backward)
    gemm = 2.0 * _gemm_size(options) ** 3 / samples[GEMM].least / 1e9
    for name, sample in samples.items():
        if name != GEMM:
            commit = options.base.commit if options.base and name == options.base.provider else machine.commit()
            yield _row(operator, case, direction, name, sample, peaks[name], flops, gemm, options.device, commit)


def _row(
    operator: Operator,
    case: Case,
    direction: str,
    provider: str,
    sample: Samples,
    peak: int | None,
    flops: float,
    gemm: float,
    device: torch.device,
    commit: str,
) -> Row:
    rate = flops / sample.least / 1e9
    return Row(
        operator=operator.name,
        provider=provider,
        shape=case.shape,
        dtype=_name(case.dtype),
        direction=direction,
        median_ms=_rounded(sample.median * 1e3),
        min_ms=_rounded(sample.least * 1e3),
        spread=round(sample.spread, 3),
        rounds=len(sample.seconds),
        peak_extra_mb=None if peak is None else round(peak / 2**20, 1),
        gflops=_rounded(rate),
        gemm_gflops=_rounded(gemm),
        gemm_share=round(rate / gemm, 3),
        host_us=None if sample.host_seconds is None else round(sample.host_seconds * 1e6, 1),
        timing=sample.how,
        device=machine.describe(device),
        versions=machine.versions(),
        commit=commit,
    )


def _peak(call: Call, device: torch.device) -> int | None:
    call()  # what is allocated once does not count
    return None if isinstance(call, Remote) else machine.peak_extra_bytes(call, device)  # that is another process's


def _gemm_size(options: Options) -> int:
    size = 4 * GEMM_SIZE if options.device.type == "cuda" else GEMM_SIZE
    return 256 if options.quick else size


def _gemm(case: Case, options: Options) -> Call:
    """A square matrix product in the arithmetic of the case: float32 on the CPU, the dtype of the case on a GPU."""
    dtype = case.dtype if options.device.type == "cuda" else torch.float32
    size = _gemm_size(options)
    a, b = (torch.randn(size, size, device=options.device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def table(rows: Sequence[Row]) -> str:
    """Rows of one case as text, fastest first, each with the time it takes for one of ours."""
    if not rows:
        return "  nothing ran"
    ours = next((row.min_ms for row in rows if row.provider == OURS), rows[0].min_ms)
    heads = zip(("min ms", "median", "spread", "MB", "GFLOP/s", "GEMM", "× ours"), (10, 10, 7, 8, 9, 6, 7), strict=True)
    lines = [f"  {'provider':<32} " + " ".join(f"{head:>{width}}" for head, width in heads)]
    for row in sorted(rows, key=lambda row: row.min_ms):
        memory = "" if row.peak_extra_mb is None else f"{row.peak_extra_mb:.1f}"
        host = "" if row.host_us is None else f"  host {row.host_us:.0f} µs, {row.timing}"
        lines.append(
            f"  {row.provider:<32} {row.min_ms:>10.4g} {row.median_ms:>10.4g} {row.spread:>7.0%} {memory:>8} "
            f"{row.gflops:>9.4g} {row.gemm_share:>6.0%} {row.min_ms / ours:>7.2f}{host}"
        )
    return "\n".join(lines)


def write_csv(rows: Sequence[Row], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
