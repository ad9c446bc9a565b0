"""The benchmarks run, say what they measured, and refuse to time what is wrong."""

import csv
import importlib.util
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

from benchmarks import __main__, machine, plots, residual_quantization, runner, scale, summary, timing
from benchmarks.base import Base
from benchmarks.registry import DIRECTIONS, OURS, Unavailable, operators
from benchmarks.runner import Options, Row

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
QUICK = Options(CPU, seconds=0.0, quick=True)


def benchmarks(*arguments: object, succeeds: bool = True) -> str:
    command = [sys.executable, "-m", "benchmarks", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert (done.returncode == 0) == succeeds, done.stdout
    return done.stdout


def test_one_file_holds_the_rows_of_all_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def run(chosen, options, say, path):
        asked.append(([operator.name for operator in chosen], path))
        return [], True

    monkeypatch.setattr(__main__, "run", run)
    assert __main__.main(["--quick", "--csv", str(tmp_path / "both.csv")]) == 0
    assert asked == [([operator.name for operator in operators(["rq", "attention"])], tmp_path / "both.csv")]
    asked.clear()
    __main__.main(["attention", "rq"])
    assert [path.name.partition("_")[0] for _, path in asked] == ["attention", "rq"]


@pytest.mark.filterwarnings("ignore:Data has no positive values")  # to plot: what takes no time
def test_rows_of_other_steps_and_sizes_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "scale.csv"
    for call in ("--items 60 --steps codes import", "--items 50 --steps import", "--items 60 --steps codes"):
        monkeypatch.setattr(sys, "argv", ["scale", *call.split(), "--csv", str(path)])
        scale.main()
    with path.open() as file:
        rows = [(row["items"], row["step"]) for row in csv.DictReader(file)]
    assert rows == [("50", "import"), ("60", "import"), ("60", "codes")]
    assert path.with_suffix(".png").is_file()


def test_quick_run_times_every_operator_and_writes_a_row_for_each_provider(tmp_path: Path) -> None:
    output = benchmarks("rq", "--quick", "--csv", tmp_path / "rq.csv")
    with (tmp_path / "rq.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == list(Row.__dataclass_fields__)
    ran = {(row["operator"], row["provider"], row["direction"]) for row in rows}
    for operator in operators(["rq"]):
        for direction in DIRECTIONS[: 2 if operator.backward else 1]:
            assert (operator.name, OURS, direction) in ran
            assert (operator.name, "torch eager", direction) in ran
    for row in rows:
        assert 0 < float(row["min_ms"]) <= float(row["median_ms"])
        assert float(row["gflops"]) > 0
        assert row["device"].startswith("cpu ")
        assert row["commit"] != ""
    for package, provider in (("faiss", "faiss, beam 1"), ("vector_quantize_pytorch", "vector-quantize-pytorch")):
        if importlib.util.find_spec(package):
            assert ("residual_quantize", provider, "forward") in ran
        else:
            assert f"{provider} skipped: " in output
    assert plots.plot(tmp_path / "rq.csv").stat().st_size > 1000


@pytest.mark.parametrize("operator", operators(["attention"]), ids=lambda operator: operator.name)
def test_attention_runs(operator) -> None:
    lines: list[str] = []
    rows, passed = runner.run([operator], QUICK, lines.append)
    assert passed, lines
    assert {(OURS, direction) for direction in DIRECTIONS} <= {(row.provider, row.direction) for row in rows}
    assert len({row.provider for row in rows}) == len(operator.providers) - sum(
        p.slow_start for p in operator.providers
    )


@pytest.mark.parametrize("operator", operators(), ids=lambda operator: operator.name)
def test_no_speed_of_a_wrong_result(operator, monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules[operator.make_inputs.__module__]

    def wrong(function):
        def call(*arguments, impl="auto", **options):
            result = function(*arguments, impl=impl, **options)
            first = next(t for t in (result if isinstance(result, tuple) else (result,)) if t.is_floating_point())
            if impl == "auto":
                first.detach().view(-1)[0] += 1e-2
            return result

        return call

    targets = [(module, operator.name)]
    if module is not residual_quantization:
        targets = [(sys.modules["bbqrec_kernels.testing.similarity_attention"], operator.name)]
    assert runner.refused(operator, CPU) is None
    for where, name in targets:
        monkeypatch.setattr(where, name, wrong(getattr(where, name)))
    lines: list[str] = []
    rows, passed = runner.run([operator], QUICK, lines.append)
    assert not passed
    assert rows == []
    assert "REFUSED" in lines[0]
    assert "ms" not in "".join(lines).split()


def test_peer_with_other_codes_is_left_out() -> None:
    inputs = residual_quantization.make_inputs(residual_quantization.QUICK[0], CPU)
    with pytest.raises(Unavailable, match=r"only .*% of its codes are ours"):
        residual_quantization._agree((inputs.codes + 1) % 16, inputs)


def test_turns_are_fair_and_times_are_those_of_the_clock() -> None:
    order: list[str] = []

    def sleep(name: str, seconds: float):
        return lambda: (order.append(name), time.sleep(seconds))

    samples = timing.measure({"a": sleep("a", 0.004), "b": sleep("b", 0.012)}, CPU, 0.0, least_rounds=4)
    rounds = [tuple(order[i : i + 2]) for i in range(len(order) - 8, len(order), 2)]
    assert set(rounds) == {("a", "b"), ("b", "a")}  # each round both, in an order of its own
    assert 0.004 <= samples["a"].least < samples["b"].least
    assert len(samples["a"].seconds) == 4


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="this system does not tell the peak")
def test_peak_memory_is_that_of_the_call() -> None:
    size = 64 * 2**20
    peak = machine.peak_extra_bytes(lambda: torch.ones(size // 4).sum(), CPU)
    assert 0.9 * size < peak < 1.5 * size
    assert machine.peak_extra_bytes(lambda: None, CPU) < 0.1 * size


def test_base_that_does_not_exist_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = benchmarks("rq", "--quick", "--base", "no-such-commit", succeeds=False)
    assert "--base: got 'no-such-commit'" in output
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(ValueError, match="--base: got 'no-such-commit'"), Base("no-such-commit", CPU):
        pass
    assert not list(tmp_path.iterdir())


def test_memory_of_another_process_is_not_told() -> None:
    assert runner._peak(timing.Remote(lambda repeats: 0.0), CPU) is None
    assert runner._peak(lambda: None, CPU) is not None


def test_tables_do_not_mix_machines(tmp_path: Path) -> None:
    (path,) = (ROOT / "benchmarks" / "results").glob("rq_cpu_*.csv")
    (tmp_path / "other.csv").write_text(path.read_text().replace("cpu x86_64", "cpu arm64"))
    assert summary.tables([path])
    with pytest.raises(ValueError, match="paths: got files of 2 machines"):
        summary.tables([path, tmp_path / "other.csv"])


def test_unknown_group_is_named() -> None:
    assert "group: got rp, expected names among rq, attention" in benchmarks("rp", succeeds=False)


@pytest.mark.check
def test_base_is_built_and_timed_beside_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("no repository here")
    monkeypatch.setenv("CMAKE_BUILD_TYPE", "Debug")  # which compiles sooner; how fast it is matters nothing here
    with Base("HEAD", CPU) as base:
        operator = residual_quantization.DECODE
        rows, passed = runner.run([operator], Options(CPU, 0.0, True, base=base), print)
        tree = base._tree
    assert passed
    assert {row.provider for row in rows} >= {OURS, f"{OURS}@HEAD"}
    assert not tree.exists()


def test_commit_has_a_plus_where_code_differs_but_not_for_results(tmp_path: Path, monkeypatch) -> None:
    def git(*arguments: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(
            ["git", *who, *arguments], cwd=tmp_path, check=True, stdout=subprocess.PIPE, text=True
        ).stdout

    monkeypatch.setattr(machine, "ROOT", tmp_path)
    results, code = tmp_path / "benchmarks" / "results" / "rows.csv", tmp_path / "code.py"
    results.parent.mkdir(parents=True)
    results.write_text("1\n")
    code.write_text("1\n")
    git("init", "-q")
    git("add", "-A")
    git("commit", "-qm", "all")
    head = git("rev-parse", "--short", "HEAD").strip()
    results.write_text("2\n")
    assert machine.commit.__wrapped__() == head
    code.write_text("2\n")
    assert machine.commit.__wrapped__() == f"{head}+"
