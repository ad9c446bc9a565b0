"""The exported recommender: what it answers where there is no bbqrec, and what it refuses."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from bbqrec import BBQRec, fit
from bbqrec.cli.main import app
from bbqrec_kernels import _library

ROOT = Path(__file__).parents[3]

# Answers the questions on stdin: {"file", "compiled", "ask": [{"histories", "timestamps"}]}.
ELSEWHERE = """
import json, sys

class Nothing:
    def find_spec(name, *_):
        if name.partition(".")[0] in ("bbqrec", "lightning", "polars", "pydantic", "typer", "safetensors"):
            raise ModuleNotFoundError(f"{name} is not for this test")

sys.meta_path.insert(0, Nothing)
import torch
import bbqrec_kernels

torch.set_num_threads(1)
question = json.load(sys.stdin)
about = {"about.json": ""}
if question["compiled"]:
    program = torch._inductor.aoti_load_package(question["file"])
    about = json.loads(program.get_metadata()["about"])
else:
    program = torch.export.load(question["file"], extra_files=about).module()
    about = json.loads(about["about.json"])
answers = []
for inputs in question["ask"]:
    try:
        items, scores = program(*(torch.tensor(each) for each in inputs))
        answers.append([[about["items"][i] for i in row] for row in items.tolist()])
        answers[-1] = [list(zip(*row)) for row in zip(answers[-1], scores.tolist())]
    except Exception as error:
        answers.append(str(error))
print(json.dumps({"about": about, "answers": answers, "loaded": sorted(sys.modules)}))
"""


def elsewhere(file, *ask, compiled=False):
    """What the program in `file` answers to these inputs in a process of its own, and what it says about itself."""
    question = json.dumps({"file": str(file), "compiled": compiled, "ask": ask})
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE], input=question, capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert not [name for name in found["loaded"] if name.partition(".")[0] == "bbqrec"]
    return found["about"], found["answers"]


def padded(model, histories, values=None, fill=-1, left=False):
    """Numbers of items, or other values of them, in rows of one length."""
    rows = [[model.item_index(item) for item in history] for history in histories] if values is None else values
    length = max(map(len, rows))
    return [[fill] * (length - len(r)) + list(r) if left else list(r) + [fill] * (length - len(r)) for r in rows]


def expected(model, histories, k, **options):
    return [[[item, score] for item, score in row] for row in model.recommend(histories, k, **options)]


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def histories(tiny_data):
    """Some longer than what the model reads; one of a single item."""
    whole = [[tiny_data.item_ids[i] for i in row] for row in tiny_data.histories[:40]]
    assert max(map(len, whole)) > 12
    return [*whole, whole[0][:1]]


@pytest.fixture(scope="module")
def model(bbqrec_run):
    return BBQRec.load(bbqrec_run.folder)


@pytest.fixture(scope="module")
def program(model, tmp_path_factory):
    """Exported, to recommend five items."""
    path = tmp_path_factory.mktemp("programs") / "program.pt2"
    model.export(path, 5)
    return path


def test_it_recommends_what_the_model_recommends(model, program, histories, one_thread):
    batches = [histories, histories[:1], histories[-1:], histories[3:5]]
    ask = [[padded(model, batch)] for batch in batches]
    about, answers = elsewhere(program, *ask, [padded(model, histories, left=True)])
    assert answers[:-1] == [expected(model, batch, 5) for batch in batches]
    assert answers[-1] == answers[0]  # padding on the other side
    assert (about["items"], about["titles"]) == (model.item_ids, model.titles)
    assert (about["k"], about["max_length"], about["keep_history"]) == (5, 12, False)


OPTIONS = {
    "all there is": {
        "model.relative_time": True,
        "model.relative_position": True,
        "model.cosine_output": True,
        "model.features": True,
        "model.item_id": False,
        "tokenizer.modalities": ["text"],
    },
    "as little as can be": {"model_name": "sasrec"},
}


@pytest.mark.parametrize("options", OPTIONS)
def test_every_kind_of_model(options, timed_data, tiny_config, histories, tmp_path, one_thread):
    quick = {"tokenizer.epochs": 1, "training.epochs": 1}
    config = tiny_config.override({**quick, **OPTIONS[options]})
    model = BBQRec.load(fit(timed_data, tmp_path / "run", config=config, progress=False).folder)
    for tables in (model.model.tables, model.model.position_tables, model.model.time_tables):
        if tables is not None:
            torch.nn.init.normal_(tables)
    reads_times = config.model.relative_time
    times = [[100 * n**3 for n in range(len(history))] for history in histories] if reads_times else None
    model.export(tmp_path / "program.pt2", 7)
    ask = [padded(model, histories)] + ([padded(model, histories, times, fill=0)] if reads_times else [])
    about, [answer] = elsewhere(tmp_path / "program.pt2", ask)
    assert answer == expected(model, histories, 7, timestamps=times)
    assert about["reads_timestamps"] == reads_times


def test_new_items_and_a_kept_history_go_along(bbqrec_run, histories, tiny_data, tmp_path, one_thread):
    model = BBQRec.load(bbqrec_run.folder)
    rows = {name: each.values[:9] for name, each in tiny_data.features.items()}
    model.add_items([f"new {n}" for n in range(9)], features=rows)
    model.export(tmp_path / "program.pt2", 30, keep_history=True)
    asked = [*histories, ["new 3", tiny_data.item_ids[4], "new 5"]]
    about, [answer] = elsewhere(tmp_path / "program.pt2", [padded(model, asked)])
    assert answer == expected(model, asked, 30, keep_history=True)
    assert about["items"][60:] == [f"new {n}" for n in range(9)]
    assert any(item.startswith("new") for row in answer for item, _ in row)


def test_what_there_are_too_few_items_for_and_what_is_no_history(program):
    whole, empty, unknown = [list(range(58))], [[3, 1], [-1, -1]], [[3, 60]]
    _, answers = elsewhere(program, [whole], [empty], [unknown])
    assert [score == -torch.inf for _, score in answers[0][0]] == [False, False, True, True, True]
    assert {item for item, _ in answers[0][0][:2]} == {"item-0058", "item-0059"}
    assert "a row has no item" in answers[1]
    assert "a number is that of no item" in answers[2]


def test_the_file_holds_vectors_and_not_what_they_were_made_of(program):
    names = set(torch.export.load(program).state_dict)
    assert {"vectors", "model.codes", "model.tables"} <= names
    assert not {name for name in names if "item_id" in name or "content" in name or "codebooks" in name}


def test_without_a_compiler_nothing_is_compiled(sasrec_run, tmp_path):
    no_compiler = torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)})  # pytest would remove the option
    with no_compiler, pytest.raises(ValueError, match=r"compiled: AOTInductor failed \(.*\); export without it"):
        BBQRec.load(sasrec_run.folder).export(tmp_path / "program.pt2", compiled=True)
    assert list(tmp_path.iterdir()) == []


def test_without_a_library_it_is_one_sentence(sasrec_run, tmp_path, monkeypatch):
    monkeypatch.setattr(_library, "CPU", _library.Library("_C", None, "the CPU library was not built: no compiler"))
    with pytest.raises(ValueError, match=r"export: needs the compiled library .* not built: no compiler"):
        BBQRec.load(sasrec_run.folder).export(tmp_path / "x.pt2")


def test_tiger_is_refused(tiger_run, tmp_path):
    with pytest.raises(ValueError, match="export: TIGER's search has no fixed shapes"):
        BBQRec.load(tiger_run.folder).export(tmp_path / "program.pt2")


def test_by_command(bbqrec_run, tmp_path):
    run = str(bbqrec_run.folder)

    def call(*arguments):
        return CliRunner().invoke(app, ["export", run, *map(str, arguments)])

    file = tmp_path / "program.pt2"
    facts = json.loads(call(file, "-k", 3, "--json").stdout)
    assert facts == {"run": run, "file": str(file), "items": 60, "k": 3, "megabytes": facts["megabytes"]}
    assert 0 < facts["megabytes"] < 5
    for arguments, message in (
        ((tmp_path / "program.bin",), "expected a name that ends in .pt2"),
        ((tmp_path / "nowhere" / "program.pt2",), "in a folder that exists"),
        ((file, "-k", 61), "k: got 61, expected 1 to 60"),
    ):
        refused = call(*arguments)
        assert refused.exit_code == 1
        assert message in refused.stderr
        assert len(refused.stderr.strip().splitlines()) == 1


@pytest.mark.check
def test_compiled(model, histories, tmp_path, one_thread):
    model.export(tmp_path / "program.pt2", 5, compiled=True)
    ask = [[padded(model, batch)] for batch in (histories, histories[:1])]
    _, answers = elsewhere(tmp_path / "program.pt2", *ask, compiled=True)
    for answer, batch in zip(answers, (histories, histories[:1]), strict=True):
        for row, other in zip(answer, expected(model, batch, 5), strict=True):
            assert [item for item, _ in row] == [item for item, _ in other]
            assert [score for _, score in row] == pytest.approx([score for _, score in other], rel=1e-5)
