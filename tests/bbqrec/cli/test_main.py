"""The command line: what it prints, for people and for programs, and how it fails."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import polars as pl
import pytest
import torch
from typer.testing import CliRunner

from bbqrec import BBQRec
from bbqrec.cli.main import _print_metrics, _print_recommendations, _print_table, app
from bbqrec.config import flat_options
from bbqrec.evaluation.ranking import METRICS
from bbqrec.report import collect

pytestmark = pytest.mark.usefixtures("undrawn")


def call(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def succeed(*arguments):
    result = call(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_help_is_quick_because_it_imports_nothing_heavy():
    heavy = {"torch", "polars", "lightning", "pydantic"}
    code = f"import sys, bbqrec.cli.main; print(sorted({heavy} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize(("given", "used"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_waiting_threads_sleep_unless_the_user_says_otherwise(given, used):
    code = """
import os, sys
from bbqrec.cli.main import app

class Watch:
    def find_spec(name, *_):
        if name == "torch":
            print(os.environ.get("OMP_WAIT_POLICY"), flush=True)
            os._exit(0)

sys.meta_path.insert(0, Watch)
app(["evaluate", "nowhere"])
"""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {"OMP_WAIT_POLICY": given} if given else {}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert result.stdout.split() == [used]


COMMANDS = [command.name or command.callback.__name__ for command in app.registered_commands]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command):
    assert "Usage:" in succeed(command, "--help")


def test_fit_evaluate_recommend(tiny_data, tiny_config, tmp_path):
    (tmp_path / "options.yaml").write_text(
        "training: {learning_rate: 0.01, batch_tokens: 256, epochs: 9}\nmodel: {dim: 16, max_length: 12}\n"
    )
    options = ["--config", tmp_path / "options.yaml", "--set", "training.epochs=2", "--set", "model.layers=1"]
    fit = ["fit", "--data", tiny_data.path, "--out", tmp_path / "run", "--model", "sasrec", *options]
    metrics = json.loads(succeed(*fit, "--json"))
    assert metrics["model"] == "sasrec"
    text = succeed(*fit)  # finished: reports
    assert f"{metrics['test']['ndcg@10']:.4f}" in text
    assert "history removed" in text

    evaluated = json.loads(succeed("evaluate", tmp_path / "run", "--json"))
    assert evaluated["ndcg@10"] == metrics["test"]["ndcg@10"]
    assert evaluated["candidates"] == "history removed"
    validation = succeed(
        "evaluate", tmp_path / "run", "--split", "validation", "--keep-history", "--data", tiny_data.path
    )
    assert "history kept" in validation


def test_tokenize(tiny_data, tiny_config, tmp_path):
    tiny_config.save(tmp_path / "options.yaml")
    command = ["tokenize", "--data", tiny_data.path, "--out", tmp_path / "run", "--config", tmp_path / "options.yaml"]
    figures = json.loads(succeed(*command, "--json"))
    text = succeed(*command)  # done: reports
    for value in (*figures["usage"], *figures["reconstruction"].values(), figures["collision_rate"]):
        assert f"{value:.1%}" in text
    assert f"{figures['agreement']:.1%}" in text
    table = pl.read_parquet(tmp_path / "run" / "semantic_ids.parquet")
    assert table["item"].to_list() == tiny_data.item_ids
    assert table["codes/text"].list.len().unique().to_list() == [3]


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


def features(change):
    def spoil(folder):
        np.save(folder / "features" / "text.npy", change(np.load(folder / "features" / "text.npy")))

    return spoil


def repeat_an_item(folder):
    items = pl.read_parquet(folder / "items.parquet")
    pl.concat([items, items[:1]]).write_parquet(folder / "items.parquet")


def keep_interactions(condition):
    def spoil(folder):
        path = folder / "interactions.parquet"
        pl.read_parquet(path).filter(condition).write_parquet(path)

    return spoil


def add_an_unknown_item(folder):
    path = folder / "interactions.parquet"
    table = pl.read_parquet(path)
    pl.concat([table, table[:1].with_columns(item=pl.lit("no-such-item"))]).write_parquet(path)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (shutil.rmtree, "shop does not exist; give the folder of a data set"),
        (write("interactions.parquet", ""), "interactions.parquet: cannot be read"),
        (keep_interactions(pl.lit(False)), "interactions.parquet: has no rows"),
        (features(lambda rows: rows[:-1]), "text.npy: got 59 rows, expected 60 (one for each line of text.items.txt)"),
        (
            features(lambda rows: np.where(np.arange(60)[:, None] == 6, np.nan, rows)),
            "text.npy: row 7 (counted from 1)",
        ),
        (add_an_unknown_item, "has item 'no-such-item', which items.parquet"),
        (keep_interactions(pl.int_range(pl.len()).over("user") < 1), "no user of shop has three interactions"),
        (repeat_an_item, "items.parquet: 'item-0000' appears twice, in rows 1 and 61"),
    ],
)
def test_data_that_cannot_be_used_is_one_sentence_and_leaves_no_run_folder(spoil, message, tiny_data, tmp_path):
    tiny_data.save(tmp_path / "shop")
    spoil(tmp_path / "shop")
    for command in ("fit", "tokenize"):
        result = call(command, "--data", tmp_path / "shop", "--out", tmp_path / "run")
        assert result.exit_code == 1, result.exception
        assert message in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1
        assert not (tmp_path / "run").exists()


def test_the_run_folder_of_another_data_set_is_refused(bbqrec_run, tiny_data, tmp_path):
    tiny_data.save(tmp_path / "shop")
    keep_interactions(pl.col("user") != tiny_data.user_ids[0])(tmp_path / "shop")
    result = call("fit", "--data", tmp_path / "shop", "--out", bbqrec_run.folder)
    assert result.exit_code == 1
    assert "holds a run of tiny" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_tiger_by_command(tiny_data, tmp_path):
    tiny = ["tokenizer.codebook_size=8", "tokenizer.epochs=1", "training.epochs=1", "model.dim=16", "model.beam=25"]
    options = [part for option in tiny for part in ("--set", option)]
    run = tmp_path / "run"
    metrics = json.loads(succeed("fit", "--data", tiny_data.path, "--out", run, "--model", "tiger", *options, "--json"))
    assert metrics["model"] == "tiger"
    assert json.loads(succeed("evaluate", run, "--json"))["ndcg@10"] == metrics["test"]["ndcg@10"]
    answer = json.loads(succeed("recommend", run, tiny_data.item_ids[3], "-k", 5, "--json"))
    assert [row["rank"] for row in answer["items"]] == [1, 2, 3, 4, 5]
    refused = call("recommend", run, tiny_data.item_ids[3], "-k", 26)
    assert refused.exit_code == 1
    assert "the search keeps 25 items" in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1


def test_targets_that_training_never_saw_are_a_line_of_their_own(capsys):
    warm = dict.fromkeys(METRICS, 0.5) | {"users": 20, "cold/users": 0}
    mixed = warm | {"cold/users": 3} | {f"cold/{name}": 0.25 for name in METRICS}
    _print_metrics({"validation": warm, "test": mixed}, "history removed")
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[4:] if line.strip()]
    assert lines == [
        ["validation", "20", *["0.5000"] * 7],
        ["test", "20", *["0.5000"] * 7],
        ["test,", "cold", "targets", "3", *["0.2500"] * 7],
    ]


def test_recommend_prints_what_the_model_says(bbqrec_run, tiny_data):
    model = BBQRec.load(bbqrec_run.folder)
    history = [tiny_data.item_ids[i] for i in (3, 1, 4)]
    expected = model.recommend([history], 5)[0]
    answer = json.loads(succeed("recommend", bbqrec_run.folder, *history, "-k", 5, "--json"))
    assert answer["history"] == history
    assert [row["item"] for row in answer["items"]] == [item for item, _ in expected]
    assert [row["rank"] for row in answer["items"]] == [1, 2, 3, 4, 5]
    assert answer["items"][0]["semantic_id"] == model.semantic_id(expected[0][0])
    text = succeed("recommend", bbqrec_run.folder, *history, "-k", 5)
    for item, score in expected:
        [line] = [line for line in text.splitlines() if item in line]
        assert model.title(item) in line
        assert f"{score:.3f}" in line
        assert model.semantic_id(item) in line


def test_inspect_shows_the_facts(bbqrec_run, tmp_path):
    facts = collect(bbqrec_run, bbqrec_run.metrics)
    page = bbqrec_run.folder / "report.html"
    assert json.loads(succeed("inspect", bbqrec_run.folder, "--json")) == {
        "run": str(bbqrec_run.folder),
        "report": str(page),
        "facts": json.loads(json.dumps(facts)),
    }
    text = succeed("inspect", bbqrec_run.folder)
    assert f"Page: {page}" in text
    for split in ("validation", "test"):
        assert f"{facts['metrics'][split]['ndcg@10']:.4f}" in text
        assert f"{facts['metrics']['most_popular'][split]['ndcg@10']:.4f}" in text
    weight, decay = bbqrec_run.model.similarity_weight.item(), bbqrec_run.model.similarity_decay.item()
    assert f"similarity to the history: weight {weight:g}, decay {round(decay, 6):g}\n" in text
    lines = [line.split() for line in text.splitlines()]
    assert ["1", str(facts["collisions"]["sizes"][0][1]), str(facts["collisions"]["sizes"][0][1])] in lines
    for n, table in enumerate(facts["reweighting"]):
        start = next(i for i, line in enumerate(lines) if line[-3:] == table["channel"].split())
        for bucket, name in enumerate(table["buckets"]):
            factors = bbqrec_run.model.tables[:, n, :, bucket].exp().flatten().tolist()
            assert lines[start + 4 + bucket] == [*name.split(), *(f"×{factor:.2f}" for factor in factors)]
    for example in facts["examples"]:
        for row in example["history"]:
            found = [*row["title"].split(), f"{row['attention']:.1%}", f"×{row['reweighting']:.2f}"]
            assert [row["item"], *found] in lines
        for row in example["recommended"]:
            marks = ["held", "out"] if row["is_target"] else []
            assert [str(row["rank"]), row["item"], *row["title"].split(), f"{row['score']:.3f}", *marks] in lines


@pytest.mark.parametrize(
    ("name", "absent"),
    [
        ("sasrec_run", ["Codebooks", "semantic IDs", "reweighted", "similarity"]),
        ("tiger_run", ["attention", "similarity"]),
    ],
)
def test_inspect_leaves_out_what_does_not_apply(name, absent, request):
    text = succeed("inspect", request.getfixturevalue(name).folder)
    assert not [words for words in absent if words in text]
    assert "Recommended; held out is" in text


def spoil_metrics(metrics, keys):
    """A copy without one value."""
    copy = json.loads(json.dumps(metrics))
    holder = copy
    for key in keys[:-1]:
        holder = holder[key]
    del holder[keys[-1]]
    return copy


METRIC_KEYS = [
    *((split, key) for split in ("validation", "test") for key in ("users", *METRICS)),
    *(("most_popular", split, key) for split in ("validation", "test") for key in ("users", *METRICS)),
    ("candidates",),
    ("validation",),
    ("test",),
    ("most_popular",),
    ("most_popular", "test"),
]


def test_inspect_names_what_is_missing_in_the_metrics(sasrec_run, tmp_path):
    run = shutil.copytree(sasrec_run.folder, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints", "logs"))
    for keys in METRIC_KEYS:
        (run / "metrics.json").write_text(json.dumps(spoil_metrics(sasrec_run.metrics, keys)))
        result = call("inspect", run)
        assert result.exit_code == 1, keys
        assert "metrics.json: is damaged" in result.stderr
        assert repr(keys[-1]) in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1
    cold = {**sasrec_run.metrics, "test": {**sasrec_run.metrics["test"], "cold/users": 3}}
    (run / "metrics.json").write_text(json.dumps(cold))
    assert "test has no number 'cold/recall@1'" in call("inspect", run).stderr


@pytest.mark.parametrize("name", ["bbqrec_run", "sasrec_run", "tiger_run"])
def test_inspect_without_the_data_set_says_what_it_leaves_out(name, request, tmp_path):
    whole = request.getfixturevalue(name)
    run = shutil.copytree(whole.folder, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    source = json.loads((run / "run.json").read_text())
    source["data"]["path"] = str(tmp_path / "gone")
    (run / "run.json").write_text(json.dumps(source))
    facts = json.loads(succeed("inspect", run, "--json"))["facts"]
    why = f"was made from {tmp_path / 'gone'}, which is gone; pass it"
    assert why in facts.pop("left_out")
    before = json.loads(succeed("inspect", whole.folder, "--json"))["facts"]
    del before["examples"]
    before["run"] |= {"users": None, "interactions": None}
    assert facts == before
    text = succeed("inspect", run, "--report", tmp_path / "page.html")
    assert why in text
    assert f"{facts['metrics']['test']['ndcg@10']:.4f}" in text
    page = (tmp_path / "page.html").read_text()
    assert why in page
    assert 'id="examples"' not in page
    assert "None" not in page.partition("</header>")[0]
    given = call("inspect", run, "--data", whole.data.path)
    assert given.exit_code == 0
    assert "Recommended; held out is" in given.stdout


def test_inspect_writes_the_page_anew(sasrec_run, tmp_path):
    run = shutil.copytree(sasrec_run.folder, tmp_path / "run")
    written = (run / "report.html").read_bytes()
    (run / "report.html").unlink()
    assert f"No page yet: bbqrec inspect {run} --report {run / 'report.html'}" in succeed("inspect", run)
    assert json.loads(succeed("inspect", run, "--json"))["report"] is None
    assert f"Page: {tmp_path / 'a.html'}" in succeed("inspect", run, "--report", tmp_path / "a.html")
    assert (tmp_path / "a.html").read_bytes() == written
    assert not (run / "report.html").exists()


def test_a_history_is_read_in_the_order_written(bbqrec_run, tiny_data):
    a, b, c = tiny_data.item_ids[:3]
    run = bbqrec_run.folder
    ways = [
        (run, a, b, c),
        (run, "--history", a, b, c),
        (run, "--history", a, "-k", 10, b, c),
        (run, "--history", f"{a},{b}", c),
        (run, "--history", f"{a},{b}, {c}"),
        (run, "--history", a, "--history", f"{b},{c}"),
        ("--history", f"{a},{b},{c}", run),
    ]
    for way in ways:
        assert json.loads(succeed("recommend", *way, "--json"))["history"] == [a, b, c], way
    refused = call("recommend", run, a, b, c, "--timestamps", "1,2,3")
    assert "timestamps: got some, expected None, as this model reads no times" in refused.stderr
    assert "expected whole numbers" in call("recommend", run, a, b, c, "--timestamps", "1,2,noon").stderr
    kept = json.loads(succeed("recommend", run, a, b, c, "-k", tiny_data.n_items, "--keep-history", "--json"))
    assert {a, b, c} <= {row["item"] for row in kept["items"]}


@pytest.mark.parametrize(
    "way", [("A", "--history", "B"), ("A", "--history=B"), ("--history", "A", "B", "--history", "C")]
)
def test_items_before_the_option_are_refused_because_they_would_change_places(way, bbqrec_run):
    refused = call("recommend", bbqrec_run.folder, *way)
    assert refused.exit_code == 2
    assert "write all items after one --history" in refused.stderr


def test_what_is_piped_is_neither_folded_nor_changed(capsys):
    title = "a [red] :smile: lamp " * 20
    _print_recommendations([{"rank": 1, "item": "i", "title": title, "score": 1.0, "semantic_id": "#1"}], "Next")
    assert title.strip() in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["recommend", "RUN"], "no item given"),
        (["recommend", "RUN", "no-such-item"], "'no-such-item' is not in the catalogue; the nearest known ids are"),
        (["recommend", "RUN", "ITEM", "-k", "1000"], "k: got 1000, expected 1 to 59"),
        (["recommend", "nowhere", "ITEM"], "holds no config.yaml"),
        (["evaluate", "RUN", "--split", "train"], "got 'train'"),
        (["evaluate", "RUN", "--data", "nowhere"], "nowhere"),
        (["inspect", "RUN", "--data", "nowhere"], "nowhere"),
        (["inspect", "nowhere"], "holds no config.yaml"),
        (["inspect", "RUN", "--report", "nowhere/page.html"], "in a folder that does not exist; make nowhere first"),
        (["inspect", "RUN", "--report", "RUN"], "is a folder, expected a file"),
        (["fit", "--data", "nowhere", "--out", "OUT"], "nowhere"),
        (["fit", "--data", "DATA", "--out", "OUT", "--model", "gru"], "'model_name': got 'gru'"),
        (["fit", "--data", "DATA", "--out", "OUT", "--set", "model.drpout=1"], "did you mean 'model.dropout'"),
        (
            ["fit", "--data", "DATA", "--out", "OUT", "--model", "sasrec", "--set", "model.beam=9"],
            "options: model.beam=9",
        ),
        (["fit", "--data", "DATA", "--out", "OUT", "--config", "nowhere.yaml"], "nowhere.yaml"),
        (["fit", "--data", "DATA", "--out", "RUN", "--set", "training.seed=9"], "a run with other options"),
        (
            ["fit", "--data", "DATA", "--out", "OUT", "--set", "training.seed=2147483648"],
            "'training.seed': got 2147483648",
        ),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_1(arguments, message, bbqrec_run, tiny_data, tmp_path):
    known = {"RUN": bbqrec_run.folder, "ITEM": tiny_data.item_ids[0], "DATA": tiny_data.path, "OUT": tmp_path / "out"}
    result = call(*(known.get(argument, argument) for argument in arguments))
    assert result.exit_code == 1
    assert result.stdout == ""
    assert message in result.stderr
    assert result.stderr.startswith("Error: ")
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("command", "name", "content", "named"),
    [
        ("recommend", "config.yaml", b"\xff\xfe", "config.yaml: not UTF-8"),
        ("recommend", "config.yaml", b"model: {heads: 3}", "model.safetensors: is damaged or does not fit config.yaml"),
        ("recommend", "semantic_ids.parquet", b"PAR1", "semantic_ids.parquet: is damaged"),
        ("recommend", "semantic_ids.parquet", None, "semantic_ids.parquet: is missing"),
        ("recommend", "model.safetensors", b"half a file", "model.safetensors: is damaged"),
        ("recommend", "model.safetensors", None, "model.safetensors: is missing"),
        ("evaluate", "run.json", b"{", "run.json: is damaged"),
        ("evaluate", "run.json", b"{}", "run.json: is damaged"),
        ("inspect", "metrics.json", b"{}", "metrics.json: is damaged"),
        ("inspect", "metrics.json", b"[]", "metrics.json: is damaged"),
        ("inspect", "metrics.json", None, "is unfinished; run `bbqrec fit` on it again"),
        ("inspect", "tokenizer.json", b"{}", "tokenizer.json: is damaged"),
        ("inspect", "tokenizer.json", b'{"residual": {}, "reconstruction": {}}', "(LookupError: it has no 'usage')"),
        ("inspect", "semantic_ids.parquet", b"PAR1", "semantic_ids.parquet: is damaged"),
        ("fit", "metrics.json", b"{}", "metrics.json: is damaged"),
        ("fit", "run.json", b"[]", "run.json: is damaged"),
    ],
)
def test_a_damaged_run_folder_is_one_sentence_naming_the_file(
    command, name, content, named, bbqrec_run, tiny_data, tmp_path
):
    run = shutil.copytree(bbqrec_run.folder, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints", "logs"))
    options = ["--config", bbqrec_run.folder / "config.yaml"]
    arguments = {
        "recommend": [run, tiny_data.item_ids[0]],
        "evaluate": [run],
        "inspect": [run],
        "fit": ["--data", tiny_data.path, "--out", run, *options],
    }
    (run / name).unlink()
    if content is not None:
        (run / name).write_bytes(content)
    result = call(command, *arguments[command])
    assert result.exit_code == 1, result.exception
    assert named in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.fixture
def requests(tiny_data, tmp_path):
    """A file of requests, and the histories in it."""
    histories = [[tiny_data.item_ids[i] for i in row] for row in ([3, 1, 4], [1], [5, 9, 2, 6])] * 100
    lines = [json.dumps({"user": f"u{n}", "history": history}) for n, history in enumerate(histories[:-1])]
    path = tmp_path / "requests.jsonl"
    path.write_text("\n".join([*lines, "", json.dumps(histories[-1])]))
    return path, histories


def test_many_histories_from_a_file(bbqrec_run, requests, tmp_path, monkeypatch):
    path, histories = requests
    model = BBQRec.load(bbqrec_run.folder)
    expected = model.recommend(histories, 3)
    rows = [
        json.loads(line) for line in succeed("recommend", bbqrec_run.folder, "--requests", path, "-k", 3).splitlines()
    ]
    assert [row["user"] for row in rows] == [*(f"u{n}" for n in range(299)), None]
    for row, best in zip(rows, expected, strict=True):
        assert [item["item"] for item in row["items"]] == [item for item, _ in best]
        assert [item["score"] for item in row["items"]] == pytest.approx([score for _, score in best], rel=1e-4)
        assert row["items"][0]["title"] == model.title(best[0][0])
    out = tmp_path / "found.parquet"
    succeed("recommend", bbqrec_run.folder, "--requests", path, "-k", 3, "--out", out)
    table = pl.read_parquet(out)
    assert table["item"].to_list() == [item for best in expected for item, _ in best]
    assert table["rank"].to_list() == [1, 2, 3] * 300
    lines = CliRunner().invoke(
        app, ["recommend", str(bbqrec_run.folder), "--requests", "-", "-k", "3"], input="\ufeff" + path.read_text()
    )
    assert [json.loads(line)["user"] for line in lines.stdout.splitlines()] == [row["user"] for row in rows]


@pytest.mark.parametrize("lines", ["", '["item-0003"]\n'], ids=["no request", "no user"])
def test_answers_have_the_same_columns_whatever_the_requests(lines, bbqrec_run, tmp_path):
    (tmp_path / "requests.jsonl").write_text(lines)
    out = tmp_path / "found.parquet"
    succeed("recommend", bbqrec_run.folder, "--requests", tmp_path / "requests.jsonl", "--out", out)
    kinds = {"user": pl.String, "rank": pl.Int64, "item": pl.String, "title": pl.String, "score": pl.Float64}
    assert dict(pl.read_parquet_schema(out)) == kinds


def test_a_reader_that_has_enough_is_no_error(bbqrec_run, requests):
    path, _ = requests
    program = f"{sys.executable} -c 'from bbqrec.cli import run; run()'"
    command = f"{program} recommend {bbqrec_run.folder} --requests {path} -k 20 | head -1"
    result = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=120)
    assert json.loads(result.stdout)["user"] == "u0"
    assert result.stderr == ""


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("nonsense", "line 302 is 'nonsense', expected"),
        ('{"history": []}', "line 302 is"),
        ('{"history": "ab"}', "line 302 is"),
        ('["no such item"]', "line 302: item: 'no such item' is not in the catalogue"),
        ('{"history": ["I0"], "timestamps": [3]}', "line 302: "),
    ],
)
def test_a_wrong_line_is_named_and_nothing_is_written(line, message, bbqrec_run, requests, tmp_path, tiny_data):
    path, _ = requests
    path.write_text(path.read_text() + "\n" + line.replace("I0", tiny_data.item_ids[0]))
    out = tmp_path / "found.jsonl"
    result = call("recommend", bbqrec_run.folder, "--requests", path, "-k", 3, "--out", out)
    assert result.exit_code == 1
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not out.exists()


def test_recommendations_among_candidates(bbqrec_run, tiny_data, tmp_path):
    ids = tiny_data.item_ids
    (tmp_path / "candidates.txt").write_text("\n".join(ids[10:15]) + "\n")
    arguments = ["recommend", bbqrec_run.folder, ids[3], ids[11], "--candidates", tmp_path / "candidates.txt"]
    found = json.loads(succeed(*arguments, "-k", 4, "--json"))["items"]
    assert {row["item"] for row in found} == {ids[i] for i in (10, 12, 13, 14)}
    everything = BBQRec.load(bbqrec_run.folder).recommend([[ids[3], ids[11]]], len(ids) - 2)[0]
    assert [row["item"] for row in found] == [item for item, _ in everything if item in ids[10:15]]
    result = call(*arguments, "-k", 5)
    assert "k: got 5, expected 1 to 4 for history 0 (5 candidates, 1 of them left out as history)" in result.stderr


def test_an_interrupted_demo_starts_again(tmp_path, monkeypatch):
    def stop(data, folder):
        folder.mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr("bbqrec.data.formats.native._write_files", stop)
    assert call("demo", "--out", tmp_path / "demo").exit_code == 130
    assert list((tmp_path / "demo").iterdir()) == []


# A call of each command that cannot work.
FAILURES = {
    "import": ["nowhere", "OUT"],
    "embed": ["nowhere", "--text", "sentence-transformers:x"],
    "fit": ["--data", "nowhere", "--out", "OUT"],
    "tokenize": ["--data", "nowhere", "--out", "OUT"],
    "evaluate": ["nowhere"],
    "inspect": ["nowhere"],
    "add-items": ["nowhere", "nowhere"],
    "recommend": ["nowhere", "item"],
    "export": ["nowhere", "OUT.pt2"],
    "demo": ["--out", "FILE"],
    "doctor": [],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_exit_codes_are_those_of_the_help(command, tmp_path, monkeypatch):
    assert "Exit codes: 0 done; 1 failed" in " ".join(succeed("--help").split())
    wrong = call(command, "--no-such-option")
    assert (wrong.exit_code, wrong.stdout) == (2, "")
    (tmp_path / "file").write_text("")
    places = {"OUT": tmp_path / "out", "FILE": tmp_path / "file", "OUT.pt2": tmp_path / "out.pt2"}
    monkeypatch.setattr("bbqrec.cli.main._version", lambda name: None)  # doctor finds nothing installed
    failed = call(command, *(places.get(argument, argument) for argument in FAILURES[command]))
    assert failed.exit_code == 1, failed.exception
    assert failed.stderr.startswith("Error: ")
    assert len(failed.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "error",
    [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("[..] can't allocate memory: you ..")],
)
def test_too_little_memory_is_one_sentence(error, tiny_data, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("bbqrec.training.fit._make_semantic_ids", fail)
    failed = call("fit", "--data", tiny_data.path, "--out", tmp_path / "run")
    assert failed.exit_code == 1
    assert failed.stderr.splitlines()[-1].startswith("Error: memory: there is not enough")
    monkeypatch.setattr("bbqrec.training.fit._make_semantic_ids", lambda job: fail_otherwise())
    assert isinstance(call("fit", "--data", tiny_data.path, "--out", tmp_path / "other").exception, RuntimeError)


def fail_otherwise():
    raise RuntimeError("a mistake of ours")


def test_a_table_without_rows_says_so(capsys):
    _print_table("Recommended", [])
    assert capsys.readouterr().out == "Recommended: none\n\n"


def test_wrong_usage_is_exit_code_2():
    assert call("fit").exit_code == 2
    assert call("fly").exit_code == 2


@pytest.mark.parametrize(("missing", "code"), [("typer", 1), (None, 0)])
def test_without_the_recommenders_extra_the_command_says_what_to_install(missing, code):
    script = f"import sys; sys.modules[{missing!r}] = None; sys.argv = ['bbqrec', '--help']; "
    script += "from bbqrec.cli import run; run()"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == code
    assert done.stderr == ("bbqrec: 'typer' is not installed; pip install 'bbqrec[models]'\n" if missing else "")


def complete(line):
    """What a shell is told that the last word of a line may become."""
    environment = {**os.environ, "_BBQREC_COMPLETE": "complete_bash", "COMP_WORDS": line}
    environment["COMP_CWORD"] = str(len(line.split()) - (not line.endswith(" ")))
    code = "from bbqrec.cli.main import app; app(prog_name='bbqrec')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("bbqrec e", ["embed", "evaluate", "export"]),
        ("bbqrec fit --model ", ["bbqrec", "sasrec", "tiger"]),
        ("bbqrec fit --set tokenizer.ep", ["tokenizer.epochs="]),
        ("bbqrec evaluate somewhere --split t", ["test"]),
        ("bbqrec recommend somewhere --keep", ["--keep-history"]),
    ],
)
def test_a_shell_completes(line, expected):
    assert complete(line) == expected


def test_the_shell_s_script_is_shown_and_installed(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    shells = {"bash": "complete -o default -F", "zsh": "compdef", "fish": "complete --command bbqrec"}
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")  # tests have no shell above them
    code = "from bbqrec.cli.main import app; app(prog_name='bbqrec')"
    for shell, words in shells.items():
        done = subprocess.run([sys.executable, "-c", code, "--show-completion", shell], capture_output=True, text=True)
        assert words in done.stdout, done
        assert "_BBQREC_COMPLETE" in done.stdout
    command = [sys.executable, "-c", code, "--install-completion", "bash"]
    subprocess.run(command, capture_output=True, check=True)
    assert any("_BBQREC_COMPLETE" in p.read_text() for p in tmp_path.rglob("*") if p.is_file())


def test_demo(tmp_path, monkeypatch, tiny_config):
    from bbqrec.data.demo import make_demo_dataset

    monkeypatch.setattr(
        "bbqrec.data.demo.make_demo_dataset", lambda seed: make_demo_dataset(n_users=150, n_items=60, seed=seed)
    )
    tiny = {key: value for key, value in flat_options(tiny_config).items() if key != "training.seed"}
    monkeypatch.setattr("bbqrec.cli.main.DEMO_OPTIONS", tiny)
    answer = json.loads(succeed("demo", "--out", tmp_path / "demo", "--seed", "1", "--json"))
    assert list(answer["test"]) == ["most popular", "SASRec", "BBQRec"]
    assert len(answer["items"]) == 10
    text = succeed("demo", "--out", tmp_path / "demo", "--seed", "1")  # finished: reports
    for row in answer["test"].values():
        assert f"{row['ndcg@10']:.4f}" in text
    assert answer["items"][0]["semantic_id"] in text
    refused = call("demo", "--out", tmp_path / "demo", "--seed", "2")
    assert refused.exit_code == 1
    assert "another seed" in refused.stderr


def test_doctor(monkeypatch):
    text = succeed("doctor")
    assert "residual_quantize" in text
    assert "extra [embed], for `bbqrec embed` only" in text
    assert "Ready" in text
    report = json.loads(succeed("doctor", "--json"))
    assert report["ready"] is True
    assert {"lightning", "polars", "typer"} <= set(report["models"])
    monkeypatch.setattr("bbqrec.cli.main._version", lambda name: None if name == "polars" else "1")
    broken = call("doctor")
    assert broken.exit_code == 1
    assert broken.stderr == "Error: polars missing: pip install 'bbqrec[models]'\n"
    assert json.loads(call("doctor", "--json").stdout)["ready"] is False
