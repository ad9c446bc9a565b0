"""`python -m benchmarks.accuracy` measures what `fit` and `evaluate` say, and its tables say what the rows do."""

from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import yaml
from scipy import stats

from bbqrec import Config, Dataset
from bbqrec.data.demo import make_demo_dataset
from bbqrec.data.splits import leave_one_out
from bbqrec.evaluation import evaluate
from bbqrec.evaluation.ranking import METRICS
from bbqrec.models import ItemKNN, MostPopular
from bbqrec.training.run import Run
from benchmarks.accuracy import __main__, measure, runs, table
from benchmarks.accuracy.runs import NAMES, Runs

SHOP = {
    "title": "Shop",
    "published": [{"model": "Rival", "recall": 0.5, "ndcg": 0.25, "source": "a paper"}],
    "runs": {
        "most-popular": {"model": "most_popular", "in_parts": True},
        "item-knn": {"model": "item_knn"},
        "bbqrec": {"model": "sasrec", "options": ["training.epochs=1", "model.max_length=7"], "seeds": 2},
    },
}


class InThisProcess:
    """Stands in for the pool of processes, whose start takes longer than such a run."""

    def __init__(self, *_: object, **__: object):
        pass

    def __enter__(self) -> "InThisProcess":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def submit(self, function: Callable, *arguments: object) -> Future:
        future = Future()
        future.set_result(function(*arguments))
        return future


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A function that measures the runs of `SHOP` on a small data set, and the data set."""
    monkeypatch.setattr(runs, "FOLDER", tmp_path)
    monkeypatch.setattr(__main__, "NAMES", ["shop"])
    (tmp_path / "shop.yaml").write_text(yaml.safe_dump(SHOP, sort_keys=False))
    data = make_demo_dataset(n_users=80, n_items=40)
    data.save(tmp_path / "data")
    csv = tmp_path / "shop.csv"

    def call(*arguments: str) -> pl.DataFrame:
        places = ["--data", tmp_path / "data", "--out", tmp_path / "out", "--csv", csv]
        __main__.main(["shop", *map(str, places), *arguments])
        return pl.read_csv(csv, infer_schema_length=None)

    return call, data


def test_rows_are_what_fit_and_evaluate_say_and_none_is_measured_twice(
    shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    call, data = shop
    split = leave_one_out(data)
    first = call("--run", "bbqrec", "--seeds", "1")
    monkeypatch.setattr(__main__, "ProcessPoolExecutor", InThisProcess)
    assert first.select("run", "seed", "split").rows() == [("bbqrec", 0, "test"), ("bbqrec", 0, "validation")]
    finished = (tmp_path / "out" / "shop" / "bbqrec-0" / "run.json").stat().st_mtime_ns

    rows = call()
    made = [("most-popular", 0), ("item-knn", 0), ("bbqrec", 0), ("bbqrec", 1)]
    assert rows.filter(split="test").select("run", "seed").rows() == made
    assert (tmp_path / "out" / "shop" / "bbqrec-0" / "run.json").stat().st_mtime_ns == finished
    assert rows.filter(run="bbqrec", seed=0).equals(first.select(rows.columns))
    for seed in (0, 1):
        run = Run(tmp_path / "out" / "shop" / f"bbqrec-{seed}")
        for part in ("validation", "test"):
            metrics, row = run.metrics[part], rows.filter(run="bbqrec", seed=seed, split=part).row(0, named=True)
            assert [row[name] for name in METRICS] == [round(metrics[name], 5) for name in METRICS]
            assert row["options"] == "training.epochs=1 model.max_length=7"
            assert row["seconds"] > 0
            assert row["commit"] != ""
    most_popular = MostPopular(split.train, data.n_items)
    expected = evaluate(most_popular, split.test, data.n_items, max_length=50, keep_history=True)
    row = rows.filter(run="most-popular", split="test").row(0, named=True)
    assert row["kept/ndcg@10"] == round(expected["ndcg@10"], 5)
    decay = float(rows.filter(run="item-knn")["options"][0].removeprefix("decay="))
    found = [
        evaluate(ItemKNN(data.features, other), split.validation, data.n_items, max_length=50)["ndcg@10"]
        for other in measure.DECAYS
    ]
    assert found[measure.DECAYS.index(decay)] == max(found)

    capsys.readouterr()
    __main__.main(["shop", "--table"])  # no results among the committed ones
    assert "`bbqrec`" not in capsys.readouterr().out
    call()
    assert "| `bbqrec` | SASRec `training.epochs=1` `model.max_length=7` | 2 |" in capsys.readouterr().out


def test_rows_name_the_commits_that_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = make_demo_dataset(n_users=80, n_items=40)
    data.save(tmp_path / "data")
    run = Dataset.load(tmp_path / "data"), "sasrec", "sasrec", ["training.epochs=1"], 0, tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(measure, "commit", lambda: "first")
        patch.setattr(measure, "fit", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            measure.measure(*run)
    for now in ("second", "third"):  # which finishes it, and which finds it finished
        monkeypatch.setattr(measure, "commit", lambda now=now: now)
        assert {row["commit"] for row in measure.measure(*run)} == {"first second"}


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["shops", "--table"], "name: got shops, expected names among shop"),
        (["shop"], "one name and --data are needed"),
        (["shop", "--data", "x", "--run", "tiger"], "--run: got tiger, expected names among most-popular"),
    ],
)
@pytest.mark.usefixtures("shop")
def test_wrong_arguments(arguments: list[str], complaint: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        __main__.main(arguments)
    assert complaint in capsys.readouterr().err


def test_parts_are_of_the_users_that_their_names_say() -> None:
    data = make_demo_dataset(n_users=80, n_items=40)
    split = leave_one_out(data)
    trained = split.train.items[split.train.items > 2]  # items 0 to 2 are new
    ranker = ItemKNN(data.features, 0.5)
    found = measure.part_metrics(ranker, split.test, trained, data.n_items, 50)
    counts = np.bincount(trained, minlength=data.n_items)
    of_target, lengths = counts[split.test.targets], split.test.histories.lengths
    users = {"kept": len(split.test), "cold": (of_target == 0).sum(), "short": (lengths <= 4).sum()}
    users["rare"] = ((of_target >= 1) & (of_target <= 5)).sum()
    assert {part: found[f"{part}/users"] for part in users} == users
    metrics = evaluate(ranker, split.test, data.n_items, max_length=50, train_items=trained)
    assert found["cold/recall@10"] == round(metrics["cold/recall@10"], 5)
    assert found["ndcg@10"] == round(metrics["ndcg@10"], 5)
    nobody = measure.part_metrics(ranker, split.test, np.tile(np.arange(data.n_items), 9), data.n_items, 50)
    assert (nobody["cold/users"], nobody["cold/ndcg@10"]) == (0, None)


def test_difference_is_paired_by_seed() -> None:
    left = pl.DataFrame({"seed": [2, 0, 1, 5], "ndcg@10": [0.13, 0.11, 0.12, 0.9]})
    right = pl.DataFrame({"seed": [0, 1, 2, 3], "ndcg@10": [0.10, 0.115, 0.11, 0.5]})
    interval = stats.ttest_rel([0.11, 0.12, 0.13], [0.10, 0.115, 0.11]).confidence_interval()
    half = (interval.high - interval.low) / 2
    assert table.paired(left, right) == f"+.0117 (± {half:.4f})".replace("0.", ".")
    assert table.paired(left, left) == ""
    assert table.paired(left.head(1), right) == ""
    assert table.paired(left, right.clear()) == ""


def test_two_calls_on_one_file_lose_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "FOLDER", tmp_path)
    (tmp_path / "shop.yaml").write_text(yaml.safe_dump(SHOP, sort_keys=False))
    one, other = (Runs.load("shop", tmp_path / "rows.csv") for _ in range(2))
    for call, run in ((one, "bbqrec"), (other, "most-popular"), (one, "bbqrec")):
        call.add([{"run": run, "seed": len(call.rows), "split": "test"}])
    assert Runs.load("shop", tmp_path / "rows.csv").rows["run"].to_list() == ["most-popular", "bbqrec", "bbqrec"]


def test_table_has_means_differences_and_what_others_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "FOLDER", tmp_path)
    (tmp_path / "shop.yaml").write_text(yaml.safe_dump(SHOP, sort_keys=False))
    shop = Runs.load("shop", tmp_path / "none.csv")
    facts = {"model": "x", "options": "", "recall@10": 0.2, "peak_memory_mb": 100, "seconds": 90.0, "commit": "abc1234"}
    facts |= {f"{part}/{name}": 0.125 for part in table.PARTS for name in ("recall@10", "ndcg@10")}
    facts |= {f"{part}/users": 1234 for part in table.PARTS} | {"cold/ndcg@10": None}
    for run, values in {"most-popular": [0.05, 0.07], "bbqrec": [0.1, 0.14]}.items():
        for seed, ndcg in enumerate(values):
            for split in ("test", "validation"):
                shop.add([{"run": run, "seed": seed, "split": split, "ndcg@10": ndcg, **facts}])
    lines = table.tables([shop]).splitlines()
    assert lines[0] == "### Shop"
    first = "| `most-popular` | most popular | 2 | .2000 | .0600 (± .0141) | -.0600 (± .1271) | .0600 (± .0141) "
    assert first + "| 1.5 | 100 | abc1234 |" in lines
    assert "| published | Rival (a paper) |  | .5000 | .2500 |  |  |  |  |  |" in lines
    assert "| `most-popular` | .1250, 1,234 users | none | .1250, 1,234 users | .1250, 1,234 users |" in lines
    assert shop.rows["run"].to_list() == ["most-popular"] * 4 + ["bbqrec"] * 4


@pytest.mark.parametrize("name", NAMES)
def test_files_name_options_that_there_are_and_rows_are_theirs(name: str) -> None:
    loaded = Runs.load(name)
    for run, entry in loaded.runs.items():
        config = Config.parse({"model_name": entry.model} if entry.model in ("bbqrec", "sasrec", "tiger") else {})
        config.override(entry.options).check_read()
        of_run = pl.concat([loaded.of(run, split) for split in ("test", "validation")])
        if not of_run.is_empty() and entry.model != "item_knn":
            said = of_run.select("model", pl.col("options").fill_null("")).unique().rows()
            assert said == [(entry.model, " ".join(entry.options))]
    if not loaded.rows.is_empty():
        assert set(loaded.rows["run"]) <= loaded.runs.keys()
        keys = loaded.rows.select("run", "seed", "split")
        assert keys.is_unique().all()


def test_grid_is_of_every_model_and_its_table_of_validation(shop, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    call, _ = shop
    points = [["model.dropout=0.2"], ["model.dropout=0.35"]]
    monkeypatch.setattr(__main__, "ProcessPoolExecutor", InThisProcess)
    monkeypatch.setattr(runs, "POINTS", points)
    monkeypatch.setattr(table, "POINTS", points)
    rows = call("--grid", "--seeds", "2")
    names = ["bbqrec model.dropout=0.2", "bbqrec model.dropout=0.35"]
    assert rows["run"].unique(maintain_order=True).to_list() == names
    assert rows["options"][0] == "training.epochs=1 model.max_length=7 model.dropout=0.2"
    means = [rows.filter(run=name, split="validation")["ndcg@10"].mean() for name in names]
    cells = [f"{value:.4f}".removeprefix("0") for value in means]
    cells[means.index(max(means))] = f"**{max(means):.4f}**".replace("0.", ".")
    assert f"| Shop | `bbqrec` | 2 | {' | '.join(cells)} |" in capsys.readouterr().out
