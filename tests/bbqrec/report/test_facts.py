"""The facts of a run: each against a computation of its own."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from bbqrec import BBQRec, Run, fit
from bbqrec.cli.main import _print_facts
from bbqrec.data.batches import pack_histories
from bbqrec.data.splits import leave_one_out
from bbqrec.evaluation.ranking import RECALL_AT
from bbqrec.report import collect, facts, save
from bbqrec.tokenizer.semantic_ids import SemanticIDs
from bbqrec.training import fit as fit_module
from bbqrec.training.plots import read_log
from bbqrec_kernels import gap, similarity_attention

ALWAYS = {"run", "curves", "metrics", "map", "examples"}
OF_CODES = {"codebooks", "collisions", "groups"}


def collected(run):
    return collect(run, run.metrics)


@pytest.fixture(scope="module")
def found(bbqrec_run):
    return collected(bbqrec_run)


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("bbqrec_run", ALWAYS | OF_CODES | {"reweighting"}),
        ("sasrec_run", ALWAYS),
        ("tiger_run", ALWAYS | OF_CODES),
    ],
)
def test_what_does_not_apply_is_not_there(name, keys, request):
    found = collected(request.getfixturevalue(name))
    assert found.keys() == keys
    assert json.loads(json.dumps(found, allow_nan=False)).keys() == keys
    rows = [row for example in found["examples"] for row in example["history"]]
    of_attention = {"bbqrec_run": {"attention", "reweighting"}, "sasrec_run": {"attention"}, "tiger_run": set()}[name]
    assert all(row.keys() == {"item", "title", *of_attention} for row in rows)


def test_head(found, bbqrec_run, tiny_data):
    assert found["run"]["users"] == tiny_data.n_users
    assert found["run"]["items"] == tiny_data.n_items
    assert found["run"]["interactions"] == len(tiny_data.histories.items)
    assert found["run"]["seconds"] == bbqrec_run.facts["seconds"]
    assert found["run"]["similarity"]["weight"] == bbqrec_run.model.similarity_weight
    assert found["metrics"] == bbqrec_run.metrics


def test_curves_are_the_logs(found, bbqrec_run):
    assert list(found["curves"]) == ["tokenizer", "sequence_model"]
    for stage, columns in found["curves"].items():
        log = read_log(bbqrec_run.folder / "logs" / stage)
        assert columns["epoch"] == list(range(1, len(log) + 1))
        assert columns.keys() == {"epoch", *(name for name in log.columns if "/" in name)}
        assert columns["train/loss"] == log["train/loss"].to_list()


def test_codebooks(found, bbqrec_run):
    books, figures = found["codebooks"], bbqrec_run.tokenizer_figures
    assert (books["levels"], books["size"], books["shared"]) == (3, 8, True)
    for key in ("usage", "perplexity", "residual", "reconstruction", "agreement"):
        assert books[key] == figures[key]
    for m, name in enumerate(bbqrec_run.semantic_ids.modalities):
        for level in range(3):
            used = Counter(bbqrec_run.model.codes[:, m, level].tolist())
            del used[-1]
            expected = sorted(used.values(), reverse=True)
            assert books["counts"][name][level] == expected + [0] * (8 - len(expected))


def test_collisions(found, bbqrec_run, tiny_data):
    rows = [tuple(codes) for codes in bbqrec_run.model.codes.flatten(1).tolist()]
    counts = Counter(rows)
    collisions = found["collisions"]
    assert collisions["items"] == tiny_data.n_items
    assert collisions["distinct"] == len(counts)
    assert dict(collisions["sizes"]) == Counter(counts.values())
    assert collisions["rate"] == pytest.approx(sum(counts[row] > 1 for row in rows) / len(rows))
    most = max(counts.values())
    assert most > 1  # of these codes: otherwise the next line tests nothing
    sharing = {tiny_data.title(i): rows[i] for i in range(len(rows))}
    assert len(collisions["largest"]) == min(most, 4)
    assert len({sharing[title] for title in collisions["largest"]}) == 1


def test_groups_are_of_the_first_code_of_the_first_modality_that_an_item_has(found, bbqrec_run, tiny_data):
    first = [next(codes[0] for codes in item if codes[0] >= 0) for item in bbqrec_run.model.codes.tolist()]
    counts = Counter(map(str, first))
    assert [group["items"] for group in found["groups"]] == sorted(counts.values(), reverse=True)[: facts.GROUPS]
    index = {tiny_data.title(i): i for i in range(tiny_data.n_items)}
    for group in found["groups"]:
        assert group["items"] == counts[group["code"]]
        assert all(str(first[index[title]]) == group["code"] for title in group["titles"])
    assert [point["code"] for point in found["map"]["points"]] == list(map(str, first))


@pytest.mark.parametrize(("books", "expected"), [(1, ["2", "1", "none"]), (2, ["a 2", "b 1", "none"])])
def test_first_codes_of_items_that_lack_modalities(books, expected):
    codes = torch.tensor([[[2, 0], [1, 0]], [[-1, -1], [1, 2]], [[-1, -1], [-1, -1]]])
    assert facts._first_codes(SemanticIDs(("a", "b"), codes, torch.zeros(books, 2, 3, 4))) == expected


def test_codes_of_separate_codebooks_are_named_with_their_modality(tiger_run):
    names = tiger_run.semantic_ids.modalities
    assert all(group["code"].split()[0] in names for group in collected(tiger_run)["groups"])


def test_the_tables_are_those_of_the_model(found, bbqrec_run):
    tables, model = found["reweighting"], bbqrec_run.model
    assert [table["channel"] for table in tables] == ["image × image", "image × text", "text × image", "text × text"]
    assert bbqrec_run.semantic_ids.modalities == ("image", "text")
    for channel, table in enumerate(tables):
        assert table["buckets"] == ["0 levels agree", "1 level agrees", "2 levels agree", "all 3 agree"]
        assert torch.equal(torch.tensor(table["log_weights"]), model.tables[:, channel].detach())
    assert model.tables.abs().sum() > 0


def test_tables_of_places_and_times(timed_data, tiny_config, tmp_path, capsys):
    options = {"model.relative_position": True, "model.relative_time": True, "training.epochs": 1}
    config = tiny_config.override(options)
    run = fit(timed_data, tmp_path / "run", model="sasrec", config=config, progress=False)
    found = collected(run)
    place, time = found["reweighting"]
    assert torch.equal(torch.tensor(place["log_weights"]), run.model.position_tables[:, 0].detach())
    assert torch.equal(torch.tensor(time["log_weights"]), run.model.time_tables[:, 0].detach())
    assert place["buckets"] == ["0", "1", "2–3", "4–7", "≥ 8"]
    assert len(time["buckets"]) == 48
    assert all("reweighting" in row for example in found["examples"] for row in example["history"])
    met = (run.model.time_tables != 0).any(dim=2).any(dim=0)[0]
    assert met.any()
    assert not met.all()
    save(tmp_path / "page.html", found)
    for text in ((tmp_path / "page.html").read_text(encoding="utf-8"), printed(found, capsys)):
        for name, was_met in zip(time["buckets"][12:], met.tolist()[12:], strict=True):  # the others are short
            assert (name in text) == was_met, name


def printed(found, capsys):
    _print_facts(found)
    return capsys.readouterr().out


def test_names_of_agreement():
    assert facts.agreement_buckets(1) == ["0 levels agree", "the level agrees"]
    assert facts.agreement_buckets(4)[0] == "0 levels agree"
    assert facts.agreement_buckets(4)[-1] == "all 4 agree"


@pytest.mark.parametrize("buckets", [1, 2, 3, 6, 9])
def test_names_of_distances_are_the_ranges_of_the_operator(buckets):
    names = facts.gap_buckets(buckets)
    assert len(names) == buckets
    one = torch.zeros(1, 1, 1, 1)
    for distance in range(300):
        [inside] = [n for n, name in enumerate(names) if is_in(distance, name)]
        places = torch.tensor([[[0], [distance]]])
        bias = torch.zeros(1, 1, buckets)
        bias[0, 0, inside] = 1.0  # the operator's output says whether this is the entry it looked up
        term = gap(places[:, 1:], bias, key_positions=places)
        value = torch.tensor([[[[1.0], [0.0]]]])
        [share] = similarity_attention(one, one.expand(1, 1, 2, 1), value, [term]).flatten().tolist()
        itself = is_in(0, names[inside])
        assert share == pytest.approx(0.5 if itself else torch.tensor([1.0, 0.0]).softmax(0)[0].item(), abs=1e-6)


def is_in(distance, name):
    if name == "any":
        return True
    if name.startswith("≥"):
        return distance >= int(name[1:])
    low, _, high = name.partition("–")
    return int(low) <= distance <= int(high or low)


def test_large_distances_are_named_in_three_digits():
    assert facts.gap_buckets(48)[-1] == "≥ 70.4 T"
    assert facts.gap_buckets(22)[20] == "524 k–1.05 M"


def test_examples_are_what_the_model_recommends(found, bbqrec_run, tiny_data):
    model, split = BBQRec.load(bbqrec_run.folder), bbqrec_run.split.test
    assert len(found["examples"]) == 4
    for example in found["examples"]:
        n = split.users.tolist().index(tiny_data.user_ids.index(example["user"]))
        history = [tiny_data.item_ids[i] for i in split.histories[n]]
        assert example["interactions"] == len(history)
        assert example["read"] == min(len(history), 12)
        assert [row["item"] for row in example["history"]] == history[-10:]
        assert example["target"]["item"] == tiny_data.item_ids[split.targets[n]]
        everything = model.recommend([history], tiny_data.n_items - len(set(history)))[0]
        assert [row["item"] for row in example["recommended"]] == [item for item, _ in everything[:10]]
        scores = [row["score"] for row in example["recommended"]]
        np.testing.assert_allclose(scores, [score for _, score in everything[:10]], rtol=1e-5)
        rank = [item for item, _ in everything].index(example["target"]["item"]) + 1
        assert example["target"]["rank"] == rank
        assert [row["rank"] for row in example["recommended"] if row["is_target"]] == [rank] * (rank <= 10)


def test_a_target_in_its_own_history_is_a_candidate(sasrec_run, tiny_data):
    items = tiny_data.histories.items.copy()
    last = tiny_data.histories.offsets[1:] - 1
    items[last] = items[last - 2]  # taken again
    data = replace(tiny_data, histories=replace(tiny_data.histories, items=items))
    run = Run(sasrec_run.folder, tiny_data)
    titles = [data.title(i) for i in range(data.n_items)]
    found = facts._examples(run.model, run.config, data, leave_one_out(data).test, titles, has_tables=False)
    recommended = Counter()
    for example in found:
        assert 1 <= example["target"]["rank"] <= data.n_items
        recommended.update(row["item"] == example["target"]["item"] for row in example["recommended"])
        others = {row["item"] for row in example["history"]} - {example["target"]["item"]}
        assert not others & {row["item"] for row in example["recommended"]}
    assert recommended[True] == sum(example["target"]["rank"] <= 10 for example in found)


def test_ranks_of_all_users_give_the_metrics(sasrec_run, monkeypatch):
    monkeypatch.setattr(facts, "EXAMPLES", 150)
    found = collected(sasrec_run)
    ranks = np.array([example["target"]["rank"] for example in found["examples"]])
    assert len(ranks) == 150
    for k in RECALL_AT:
        assert (ranks <= k).mean() == pytest.approx(sasrec_run.metrics["test"][f"recall@{k}"])


def test_attention_and_its_change(found, bbqrec_run, tiny_data):
    split = bbqrec_run.split.test
    for example in found["examples"]:
        n = split.users.tolist().index(tiny_data.user_ids.index(example["user"]))
        batch = pack_histories(split.histories[n : n + 1], 12)
        weights, plain = (each.mean(0)[-10:] for each in bbqrec_run.model.attention(batch))
        assert [row["attention"] for row in example["history"]] == weights.tolist()
        ratios = [row["reweighting"] for row in example["history"]]
        np.testing.assert_allclose(ratios, (weights / plain).numpy(), rtol=1e-6)
        if example["read"] <= 10:
            assert sum(row["attention"] for row in example["history"]) == pytest.approx(1, abs=1e-5)


def test_tiger_finds_what_its_search_keeps(tiger_run):
    tiger_run.model.config.beam, beam = 3, tiger_run.model.config.beam
    try:
        examples = collected(tiger_run)["examples"]
    finally:
        tiger_run.model.config.beam = beam
    assert all(len(example["recommended"]) <= 3 for example in examples)
    assert any(example["target"]["rank"] is None for example in examples)


def test_large_catalogues_are_sampled_evenly(sasrec_run, tiny_data, monkeypatch):
    monkeypatch.setattr(facts, "MAP_ITEMS", 13)
    chart = collected(sasrec_run)["map"]
    assert chart["items"] == 60
    items = [tiny_data.item_index(point["item"]) for point in chart["points"]]
    assert len(items) == 13
    assert (items[0], items[-1]) == (0, 59)
    assert set(np.diff(items)) <= {4, 5}


@pytest.mark.parametrize("shape", [(1, 4), (2, 4), (7, 4), (8, 4), (40, 1)])
@pytest.mark.parametrize("alike", [False, True])
def test_a_map_of_few_or_equal_items(shape, alike):
    vectors = np.zeros(shape, np.float32) if alike else np.random.default_rng(0).normal(size=shape).astype(np.float32)
    places = facts._two_dimensions(vectors)
    assert places.shape == (shape[0], 2)
    assert np.isfinite(places).all()
    assert np.abs(places).max() == (0 if alike or len(places) == 1 else 1)


def test_items_that_differ_by_rounding_errors_are_in_one_place():
    vectors = np.tile(np.random.default_rng(0).normal(size=16).astype(np.float32), (40, 1))  # their mean is another
    vectors[7] = np.nextafter(vectors[7], np.float32(9))
    assert not facts._two_dimensions(vectors).any()


def test_neighbours_on_the_map_are_neighbours_in_truth():
    rng = np.random.default_rng(0)
    group = rng.integers(12, size=300)
    vectors = (rng.normal(size=(12, 24)) * 3)[group] + rng.normal(size=(300, 24)) * 0.3
    places = facts._two_dimensions(vectors.astype(np.float32))
    distances = np.linalg.norm(places[:, None] - places, axis=2) + 10 * np.eye(300)
    assert (group[distances.argmin(1)] == group).mean() > 0.99
    assert np.array_equal(places, facts._two_dimensions(vectors.astype(np.float32)))


def test_a_run_is_finished_only_when_its_page_is_written(tiny_data, tiny_config, tmp_path, monkeypatch):
    def fail(path, found):
        raise OSError("no space left")

    config = tiny_config.override({"training.epochs": 1})
    with monkeypatch.context() as patch:
        patch.setattr(fit_module.report, "save", fail)
        with pytest.raises(OSError, match="no space"):
            fit(tiny_data, tmp_path / "run", model="sasrec", config=config, progress=False)
    assert not Run(tmp_path / "run").finished
    run = fit(tiny_data, tmp_path / "run", model="sasrec", config=config, progress=False)
    save(tmp_path / "again.html", collected(run))
    assert (tmp_path / "again.html").read_bytes() == (run.folder / "report.html").read_bytes()
