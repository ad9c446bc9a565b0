"""Items that training did not know: their semantic IDs, recommendations, histories with them, and how they are kept."""

import json
import shutil
from collections import Counter

import numpy as np
import polars as pl
import pytest
import torch
from typer.testing import CliRunner

from bbqrec import BBQRec, Dataset, fit
from bbqrec.cli.main import app
from bbqrec.data.files import held


@pytest.fixture(scope="module")
def content_run(tiny_data, tiny_config, tmp_path_factory):
    """Of a model that knows items by their codes alone."""
    config = tiny_config.override({"model.item_id": False, "model.features": False})
    return fit(tiny_data, tmp_path_factory.mktemp("runs") / "content", config=config, progress=False)


@pytest.fixture(scope="module")
def described_run(tiny_data, tiny_config, tmp_path_factory):
    """Of a data set whose text features are made of its texts."""
    folder = tmp_path_factory.mktemp("data") / "described"
    tiny_data.save(folder)
    for path in folder.glob("features/text.*"):
        path.unlink()
    options = {"tokenizer.epochs": 1, "training.epochs": 1}
    return fit(folder, folder.parent / "run", config=tiny_config.override(options), progress=False)


@pytest.fixture
def histories(tiny_data):
    return [[tiny_data.item_ids[i] for i in row] for row in tiny_data.histories[:60]]


@pytest.fixture
def copy_of(tiny_data):
    """Features of items as they are in the data set: NaN where one lacks the modality."""
    whole = {
        name: np.where(each.present[:, None], each.values, np.nan).astype(np.float32)
        for name, each in tiny_data.features.items()
    }
    return lambda *items: {name: rows[list(items)] for name, rows in whole.items()}


def ranked(model, histories, **options):
    """For each history the scores of all items."""
    k = len(model.item_ids)
    return [dict(row) for row in model.recommend(histories, k, keep_history=True, **options)]


def test_a_copy_has_the_features_of_its_original_in_few_directions_too(tiny_data, tiny_config, tmp_path, copy_of):
    options = {"model.feature_width": 5, "tokenizer.epochs": 1, "training.epochs": 1}
    run = fit(tiny_data, tmp_path / "run", config=tiny_config.override(options), progress=False)
    assert run.model.features.shape == (tiny_data.n_items, 5)
    items = list(range(0, 60, 7))
    encoded = run.item_encoder.encode(len(items), copy_of(*items), None)
    torch.testing.assert_close(encoded.features, run.model.features[items], rtol=1e-5, atol=1e-6)
    model = BBQRec.load(run.folder)
    model.add_items(["copy"], features=copy_of(3))
    assert model.recommend([["copy"]], 1)


def test_a_copy_has_the_semantic_id_of_its_original(bbqrec_run, copy_of, tiny_data):
    model = BBQRec.load(bbqrec_run.folder)
    items = list(range(0, 60, 7))
    model.add_items([f"copy {i}" for i in items], features=copy_of(*items))
    for place, item in enumerate(items):
        original = model.semantic_id(tiny_data.item_ids[item]).rpartition(" · ")[0]
        assert model.semantic_id(f"copy {item}") == f"{original} · #{60 + place}"


def most_recommended(model, histories):
    """The item that most of these get among their first nine."""
    return Counter(item for row in model.recommend(histories, 9, keep_history=True) for item, _ in row).most_common(1)


def test_a_copy_of_a_popular_item_is_recommended_where_that_one_is(content_run, histories, copy_of, tiny_data):
    model = BBQRec.load(content_run.folder)
    [(name, times)] = most_recommended(model, histories)
    popular = tiny_data.item_index(name)
    alike = [i for i in range(60) if i != popular]
    features = {name: rows + 1e-4 * rows.std() for name, rows in copy_of(popular).items()}
    model.add_items(["copy"], titles=["a near copy"], features=features)
    assert model.title("copy") == "a near copy"
    found = 0
    for row in model.recommend(histories, 10, keep_history=True):
        items = [item for item, _ in row]
        if name in items[:9]:
            assert abs(items.index("copy") - items.index(name)) <= len(same_codes(model, popular, alike)) + 1
            assert dict(row)["copy"] == pytest.approx(dict(row)[name], rel=1e-5)
            found += 1
    assert found > times / 2 > 10


def same_codes(model, item, others):
    codes = model.semantic_ids.codes
    return [i for i in others if (codes[i] == codes[item]).all()]


def test_with_ids_a_copy_does_better_than_what_is_unlike(bbqrec_run, histories, copy_of, tiny_data):
    model = BBQRec.load(bbqrec_run.folder)
    [(name, _)] = most_recommended(model, histories)
    popular = tiny_data.item_index(name)
    unlike = tiny_data.item_index(min(model.item_ids, key=lambda item: sum(r[item] for r in ranked(model, histories))))
    features = {name: np.concatenate([copy_of(popular)[name], copy_of(unlike)[name]]) for name in tiny_data.features}
    model.add_items(["like", "unlike"], features=features)
    where = [row for row in ranked(model, histories) if sorted(row, key=row.get, reverse=True).index(name) < 10]
    assert len(where) > 10
    assert np.mean([row["like"] > row["unlike"] for row in where]) > 0.75


@pytest.mark.parametrize("run", ["bbqrec_run", "content_run"])
def test_without_the_new_items_not_a_bit_changes(run, histories, copy_of, request):
    folder = request.getfixturevalue(run).folder
    old, model = BBQRec.load(folder), BBQRec.load(folder)
    model.add_items([f"new {n}" for n in range(13)], features=copy_of(*range(13)))
    assert model.recommend(histories, 10, candidates=old.item_ids) == old.recommend(histories, 10)
    assert model.recommend(histories, 20) != old.recommend(histories, 20)  # there are others otherwise


def test_histories_may_hold_new_items(content_run, histories, copy_of, tiny_data):
    model = BBQRec.load(content_run.folder)
    model.add_items([f"copy {i}" for i in range(60)], features=copy_of(*range(60)))
    of_copies = [[f"copy {tiny_data.item_index(item)}" for item in history] for history in histories]
    originals, copies = ranked(model, histories), ranked(model, of_copies)
    for row, other in zip(originals, copies, strict=True):
        assert list(row.values()) == pytest.approx(list(other.values()), rel=1e-4, abs=1e-5)
    for history, row in zip(of_copies, model.recommend(of_copies, 20), strict=True):
        assert not set(history) & {item for item, _ in row}


def test_a_missing_modality(bbqrec_run, copy_of, histories):
    model = BBQRec.load(bbqrec_run.folder)
    both = copy_of(4, 4, 4)
    both["image"][1] = np.nan
    both["text"][2] = np.nan
    model.add_items(["whole", "of text", "of image"], features=both)
    assert [model.semantic_id(name).count("text ") for name in ("whole", "of text", "of image")] == [1, 1, 0]
    assert [model.semantic_id(name).count("image ") for name in ("whole", "of text", "of image")] == [1, 0, 1]
    model.add_items(["also of text"], features={"text": copy_of(4)["text"]})
    assert model.semantic_ids.codes[61].tolist() == model.semantic_ids.codes[63].tolist()
    [row] = ranked(model, histories[:1])
    assert row["of text"] == pytest.approx(row["also of text"], rel=1e-5)
    assert len({round(row[name], 4) for name in ("whole", "of text", "of image")}) == 3


def test_features_as_they_are_are_standardized_as_in_training(tiny_data, tiny_config, tmp_path, histories, copy_of):
    config = tiny_config.override({"model.features": True, "model.item_id": False, "training.epochs": 1})
    model = BBQRec.load(fit(tiny_data, tmp_path / "run", model="sasrec", config=config, progress=False).folder)
    model.add_items([f"copy {i}" for i in range(60)], features=copy_of(*range(60)))
    assert (model.model.features[60:] == model.model.features[:60]).all()
    [row] = ranked(model, histories[:1])
    for i, name in enumerate(tiny_data.item_ids):
        assert row[name] == pytest.approx(row[f"copy {i}"], rel=1e-4, abs=1e-5)
    assert model.semantic_id("copy 3") == "#63"
    model.save_new_items()
    again = BBQRec.load(tmp_path / "run")
    assert again.recommend(histories, 20) == model.recommend(histories, 20)


def test_texts_of_a_run_that_makes_its_features_of_texts(described_run, copy_of):
    model = BBQRec.load(described_run.folder)
    assert model.reads_texts
    texts = [described_run.data.text(i) for i in range(60)]
    values, present = described_run.item_encoder.words.encode([*texts, "", "zzzz qqqq"])
    assert present.tolist() == [True] * 60 + [False] * 2
    own = described_run.data.features["text"].values
    assert np.abs(values[:60] - own).max() < 1e-4
    image = {"image": copy_of(*range(60))["image"]}
    model.add_items([f"copy {i}" for i in range(60)], texts=texts, features=image)
    same = (model.semantic_ids.codes[60:] == model.semantic_ids.codes[:60]).all(2).all(1)
    assert same.float().mean() > 0.95
    with pytest.raises(ValueError, match="'void' has nothing in any of 'image', 'text'"):
        model.add_items(["void"], texts=["zzzz"])
    with pytest.raises(ValueError, match="texts: got 1, expected 2"):
        model.add_items(["a", "b"], texts=["lamp"])
    with pytest.raises(ValueError, match="texts: got some, and 'text' features as well"):
        model.add_items(["a"], texts=["lamp"], features={"text": own[:1]})


def test_what_is_saved_is_there_again(bbqrec_run, histories, copy_of, tmp_path):
    run = shutil.copytree(bbqrec_run.folder, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints", "logs"))
    model = BBQRec.load(run)
    with pytest.raises(ValueError, match="save_new_items: there are no new items"):
        model.save_new_items()
    model.add_items(["a", "b"], titles=["Ah", ""], features=copy_of(1, 2))
    assert BBQRec.load(run).item_ids == bbqrec_run.items["item"].to_list()
    model.save_new_items()
    again = BBQRec.load(run)
    assert again.recommend(histories, 10) == model.recommend(histories, 10)
    assert (again.title("a"), again.title("b"), again.semantic_id("b")) == ("Ah", "b", model.semantic_id("b"))
    again.add_items(["c"], features=copy_of(3))
    again.save_new_items()
    assert BBQRec.load(run).item_ids[60:] == ["a", "b", "c"]
    assert BBQRec.load(run, new_items=False).item_ids == bbqrec_run.items["item"].to_list()
    model.add_items(["d"], features=copy_of(4))
    with pytest.raises(ValueError, match=r"new_items\.parquet has 'c', which was not there when this run was loaded"):
        model.save_new_items()
    assert BBQRec.load(run).item_ids[60:] == ["a", "b", "c"]
    (run / "new_items.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"new_items\.parquet: is damaged"):
        BBQRec.load(run)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sasrec_run", "this model knows items by their own IDs alone"),
        ("tiger_run", "TIGER finds items by a search in the IDs that it was trained to write"),
    ],
)
def test_models_that_cannot_refuse(name, message, request, copy_of):
    model = BBQRec.load(request.getfixturevalue(name).folder)
    with pytest.raises(ValueError, match=message):
        model.add_items(["new"], features=copy_of(0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"items": ["item-0003"]}, "items: 'item-0003' is in the catalogue already"),
        ({"items": ["x", "x"]}, "items: 'x' appears twice"),
        ({"items": ["x"], "titles": ["a", "b"]}, "titles: got 2, expected 1"),
        ({"items": ["x"], "texts": ["lamp"]}, "the run's 'text' features were made elsewhere"),
        ({"items": ["x"], "features": {}}, "items: 'x' has nothing in any of 'image', 'text'"),
        ({"items": ["x"], "features": {"sound": np.ones((1, 2))}}, "features: got 'sound', expected feature sets"),
        ({"items": ["x"], "features": {"text": np.ones((1, 2))}}, r"features\['text'\]: got float64 of shape \(1, 2\)"),
        ({"items": ["x", "y"]}, r"got float32 of shape \(1, \d+\), expected numbers of shape \(2, "),
    ],
)
def test_a_mistake_is_named_and_changes_nothing(change, message, bbqrec_run, copy_of):
    model = BBQRec.load(bbqrec_run.folder)
    with pytest.raises(ValueError, match=message):
        model.add_items(**{"features": copy_of(0), **change})
    assert len(model.item_ids) == len(model.model.codes) == 60
    for wrong in ({"items": "x"}, {"items": ["x"], "titles": [5]}, {"items": ["x"], "texts": [None]}):
        with pytest.raises(TypeError, match=rf"{list(wrong)[-1]}: got .*, expected a list of"):
            model.add_items(**{"features": copy_of(0), **wrong})
    far = copy_of(0)
    far["text"][0, 0] = 3e38
    with pytest.raises(ValueError, match=r"features\['text'\]: got numbers more than 1,000,000 standard deviations"):
        model.add_items(["x"], features=far)
    assert len(model.item_ids) == 60
    infinite = copy_of(0)
    infinite["text"][0, 0] = np.inf
    with pytest.raises(ValueError, match=r"features\['text'\]: row 1 .* holds NaN or infinity"):
        model.add_items(["x"], features=infinite)


def test_a_run_of_an_older_version_says_what_it_lacks(bbqrec_run, copy_of, tmp_path):
    run = shutil.copytree(bbqrec_run.folder, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints", "logs"))
    (run / "features.parquet").unlink()
    with pytest.raises(ValueError, match=r"features\.parquet: is missing; .* fit into a new one"):
        BBQRec.load(run).add_items(["x"], features=copy_of(0))
    for name in ("features.parquet", "tokenizer.safetensors"):
        content = (bbqrec_run.folder / name).read_bytes()
        (run / name).write_bytes(content[: len(content) // 2])
        with pytest.raises(ValueError, match=rf"{name}: is damaged"):
            BBQRec.load(run).add_items(["x"], features=copy_of(0))
        (run / name).write_bytes(content)


def call(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_by_command(bbqrec_run, tiny_data, copy_of, tmp_path):
    run = shutil.copytree(bbqrec_run.folder, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints", "logs"))
    folder = tmp_path / "new"
    (folder / "features").mkdir(parents=True)
    pl.DataFrame({"item": ["a", "b"], "title": ["Ah", "Be"]}).write_csv(folder / "items.csv")
    for name, rows in {**copy_of(4, 5), "sound": np.ones((2, 3))}.items():  # the run does not use the last one
        np.save(folder / "features" / f"{name}.npy", rows)
        (folder / "features" / f"{name}.items.txt").write_text("a\nb\n")
    said = call("add-items", run, folder, "--json")
    assert said.stderr == f"Left out, as {run} uses no such features: sound\n"
    answer = json.loads(said.stdout)
    model = BBQRec.load(run)
    assert answer["new_items"] == 2
    assert answer["items"][0] == {"item": "a", "title": "Ah", "semantic_id": model.semantic_id("a")}
    item = tiny_data.item_ids[4]
    found = json.loads(call("recommend", run, "a", item, "-k", 60, "--json").stdout)["items"]
    assert "b" in [row["item"] for row in found]
    with held(run):
        meanwhile = call("add-items", run, folder)
    assert meanwhile.exit_code == 1
    assert meanwhile.stderr.startswith(f"Error: run: another process is working on {run}; wait")
    again = call("add-items", run, folder)
    assert again.exit_code == 1
    assert "'a' is in the catalogue already" in again.stderr
    evaluated = json.loads(call("evaluate", run, "--json").stdout)
    assert evaluated["ndcg@10"] == bbqrec_run.metrics["test"]["ndcg@10"]


def test_texts_by_command(described_run, tmp_path):
    run = shutil.copytree(described_run.folder, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints", "logs"))
    title = described_run.data.title(3)
    pl.DataFrame({"item": ["a"], "title": [title]}).write_csv(tmp_path / "items.csv")
    result = call("add-items", run, tmp_path / "items.csv")
    assert result.exit_code == 0, result.output
    assert title in result.stdout
    model = BBQRec.load(run)
    text = Dataset.load(described_run.data.path).features["text"]
    assert text.derived
    assert (model.semantic_ids.codes[60, model.semantic_ids.modalities.index("text")] >= 0).all()
