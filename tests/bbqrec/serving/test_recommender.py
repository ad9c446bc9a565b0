"""Recommendations from a run folder alone."""

import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bbqrec import BBQRec, fit
from bbqrec.data.batches import pack_histories
from bbqrec.models.sequence_model import SequenceModel


@pytest.fixture(scope="module")
def model(bbqrec_run):
    return BBQRec.load(bbqrec_run.folder)


@pytest.fixture
def histories(tiny_data):
    return [[tiny_data.item_ids[i] for i in row] for row in ([3, 1, 4], [1], [5, 9, 2, 6])]


def test_needs_nothing_but_the_folder(bbqrec_run, histories, model, tmp_path, monkeypatch):
    copy = shutil.copytree(bbqrec_run.folder, tmp_path / "elsewhere", ignore=shutil.ignore_patterns("checkpoints"))
    monkeypatch.setattr("bbqrec.data.dataset.Dataset.load", lambda path: pytest.fail("read the data set"))
    assert BBQRec.load(copy).recommend(histories) == model.recommend(histories)


def test_best_scores_of_the_model_without_the_history(bbqrec_run, tiny_data, histories, model):
    scores = bbqrec_run.model.score(pack_histories([np.array([3, 1, 4])], 12))[0]
    best = [i for i in scores.argsort(descending=True).tolist() if i not in (3, 1, 4)][:10]
    [recommended, *_] = model.recommend(histories)
    assert [item for item, _ in recommended] == [tiny_data.item_ids[i] for i in best]
    assert [score for _, score in recommended] == pytest.approx(scores[best].tolist(), rel=1e-5)


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_recommended_is_what_sorting_all_scores_gives(data, bbqrec_run, model):
    item = st.integers(0, len(model.item_ids) - 1)
    histories = data.draw(st.lists(st.lists(item, min_size=1, max_size=15), min_size=1, max_size=4))
    candidates = data.draw(st.none() | st.sets(item, min_size=20))
    keep_history, k = data.draw(st.booleans()), data.draw(st.integers(1, 5))
    found = model.recommend(
        [[model.item_ids[i] for i in history] for history in histories],
        k,
        keep_history=keep_history,
        candidates=None if candidates is None else [model.item_ids[i] for i in candidates],
    )
    scores = bbqrec_run.model.score(pack_histories(histories, model.max_length))
    for history, own, recommended in zip(histories, scores.tolist(), found, strict=True):
        allowed = set(range(len(own)) if candidates is None else candidates)
        if not keep_history:
            allowed -= set(history)
        best = sorted((own[i] for i in allowed), reverse=True)[:k]
        items = [model.item_index(name) for name, _ in recommended]
        assert len(set(items) & allowed) == k
        assert [own[i] for i in items] == pytest.approx(best, rel=1e-4, abs=1e-5)
        assert [score for _, score in recommended] == pytest.approx(best, rel=1e-4, abs=1e-5)


def test_history_items_are_left_out_unless_kept(histories, model, tiny_data):
    n = tiny_data.n_items
    for history, recommended in zip(histories, model.recommend(histories, n - 4), strict=True):
        assert not {item for item, _ in recommended} & set(history)
    [everything] = model.recommend(histories[:1], n, keep_history=True)
    assert {item for item, _ in everything} == set(tiny_data.item_ids)


def test_tables_at_zero_change_no_recommendation_of_a_trained_sasrec(sasrec_run, bbqrec_run, histories, model):
    plain, config = BBQRec.load(sasrec_run.folder), sasrec_run.config.model.model_copy(update={"content": False})
    joined = SequenceModel(len(plain.item_ids), config, bbqrec_run.semantic_ids)
    missing, unexpected = joined.load_state_dict(sasrec_run.model.state_dict(), strict=False)
    assert set(missing) == {"tables", "codes", "codebooks"}
    assert not unexpected
    with_tables = BBQRec(joined, plain.item_ids, plain.titles, plain.max_length, bbqrec_run.semantic_ids)
    everyone = histories + [[plain.item_ids[i] for i in row] for row in sasrec_run.data.histories]
    assert not joined.tables.any()
    ours, theirs = with_tables.recommend(everyone), plain.recommend(everyone)
    assert [[item for item, _ in row] for row in ours] == [[item for item, _ in row] for row in theirs]
    with torch.no_grad():
        joined.tables.normal_()
    assert with_tables.recommend(everyone) != ours


def test_many_histories_are_served_in_batches(histories, model, monkeypatch):
    together = model.recommend(histories, 5)
    score, asked = model.model.score, []
    monkeypatch.setattr(model.model, "score", lambda batch, *rest: asked.append(len(batch.last)) or score(batch, *rest))
    for limits in ({"BATCH_HISTORIES": 2}, {"BATCH_SCORES": 2 * len(model.item_ids) + 1}, {"BATCH_SCORES": 1}):
        with monkeypatch.context() as patched:
            for name, value in limits.items():
                patched.setattr(f"bbqrec.serving.recommender.{name}", value)
            split = model.recommend(histories, 5)
        assert [[item for item, _ in row] for row in split] == [[item for item, _ in row] for row in together]
        assert max(asked) == (1 if limits == {"BATCH_SCORES": 1} else 2)
        asked.clear()
    assert model.recommend([]) == []


def test_threads_that_ask_at_once_get_what_each_would_alone(bbqrec_run, histories, model):
    asked = [histories[n % 3 : n % 3 + 1] for n in range(60)]
    alone = [model.recommend(each) for each in asked]
    shared = BBQRec.load(bbqrec_run.folder)  # nothing computed yet
    with ThreadPoolExecutor(6) as threads:
        assert list(threads.map(shared.recommend, asked)) == alone


def test_titles_and_semantic_ids(model, sasrec_run, tiny_data):
    item = tiny_data.item_ids[7]
    assert model.title(item) == tiny_data.title(7)
    assert "text " in model.semantic_id(item)
    assert model.semantic_id(item).endswith(" · #7")
    assert BBQRec.load(sasrec_run.folder).semantic_id(item) == "#7"


@pytest.mark.parametrize("k", [0, -1, 58])
def test_k_is_bounded_by_the_candidates(k, model, histories):
    with pytest.raises(ValueError, match=rf"k: got {k}, expected 1 to 57 for history 0 \(60 items, 3 of them"):
        model.recommend(histories, k)


def test_a_history_that_leaves_nothing_is_named(model, histories):
    with pytest.raises(ValueError, match=r"nothing is left to recommend for history 0 \(3 candidates, 3 of them left"):
        model.recommend(histories[:1], 1, candidates=histories[0])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"k": "2"}, "k: got '2'"),
        ({"k": 2.0}, "k: got 2.0"),
        ({"candidates": "item-0001"}, "candidates: got 'item-0001'"),
    ],
)
def test_arguments_of_another_kind_are_named(wrong, message, model, histories):
    with pytest.raises(TypeError, match=message):
        model.recommend(histories, **wrong)


def test_no_candidates_are_named(model, histories):
    with pytest.raises(ValueError, match="candidates: got none, expected at least one item id"):
        model.recommend(histories, candidates=[])


def test_histories_may_be_arrays(model, histories):
    assert model.recommend([np.array(history) for history in histories]) == model.recommend(histories)
    with pytest.raises(ValueError, match="history 0 is empty"):
        model.recommend([np.array([], dtype=str)])


def test_unknown_item_names_the_nearest(model, tiny_data):
    item = tiny_data.item_ids[7]
    with pytest.raises(ValueError) as error:
        model.recommend([[item, item + "x"]])
    assert repr(item + "x") in str(error.value)
    assert repr(item) in str(error.value).split("nearest")[1]


def test_empty_history_is_named(model, histories):
    with pytest.raises(ValueError, match="history 1 is empty"):
        model.recommend([histories[0], []])


@pytest.mark.parametrize("wrong", [["a", "b"], [[1, 2]], "ab"])
def test_histories_must_be_lists_of_strings(wrong, model):
    with pytest.raises(TypeError, match="expected a list of item ids"):
        model.recommend(wrong)


def test_no_run_folder(tmp_path):
    with pytest.raises(ValueError, match=r"holds no config\.yaml"):
        BBQRec.load(tmp_path / "nowhere")


def test_unfinished_run(bbqrec_run, tmp_path):
    late = ("metrics.json", "model.safetensors", "semantic_ids.parquet", "curves.png", "codebooks.png")
    copy = shutil.copytree(bbqrec_run.folder, tmp_path / "unfinished", ignore=shutil.ignore_patterns(*late))
    with pytest.raises(ValueError, match="is unfinished"):
        BBQRec.load(copy)


def test_a_model_that_reads_times_wants_one_for_each_item(timed_data, tiny_config, tmp_path, histories, model):
    config = tiny_config.override({"model.relative_time": True, "tokenizer.epochs": 1, "training.epochs": 1})
    timed = BBQRec.load(fit(timed_data, tmp_path / "run", config=config, progress=False).folder)
    torch.nn.init.normal_(timed.model.time_tables)
    soon, late = ([[day * n**2 for n in range(len(h))] for h in histories] for day in (1, 10**6))
    assert timed.recommend(histories, timestamps=soon) != timed.recommend(histories, timestamps=late)
    with pytest.raises(ValueError, match="timestamps: got None, expected one for each item"):
        timed.recommend(histories)
    for wrong in (
        [[1], [1], [1]],
        [[1.5, 2, 3]],
        [["1", "2", "3"]],
        [[3, 2, 1]],
        [5],
        [],
        [[1, 2, 2**63]],
        [[False, 1, True]],
    ):
        with pytest.raises(ValueError, match=r"timestamps: got .* expected [123] whole numbers, oldest first"):
            timed.recommend(histories, timestamps=wrong)
    with pytest.raises(ValueError, match="timestamps: got some, expected None, as this model reads no times"):
        model.recommend(histories, timestamps=soon)


def test_tiger_recommends_what_its_search_finds(tiger_run, histories, tiny_data):
    model = BBQRec.load(tiger_run.folder)
    scores = tiger_run.model.score(pack_histories([np.array([3, 1, 4])], 12))[0]
    best = [i for i in scores.argsort(descending=True).tolist() if i not in (3, 1, 4)][:10]
    [recommended, *_] = model.recommend(histories)
    assert [item for item, _ in recommended] == [tiny_data.item_ids[i] for i in best]
    assert [score for _, score in recommended] == pytest.approx(scores[best].tolist(), rel=1e-5)
    assert all(score < 0 for _, score in recommended)  # log-probabilities
    assert [len(row) for row in model.recommend(histories, 30, keep_history=True)] == [30] * len(histories)
    assert "text " in model.semantic_id(recommended[0][0])


def test_tiger_recommends_no_item_that_its_search_does_not_find(tiger_run, histories):
    model = BBQRec.load(tiger_run.folder)
    with pytest.raises(ValueError, match=r"k: got 31, expected 1 to 30 for history 0: the search keeps 30 items"):
        model.recommend(histories, 31, keep_history=True)
    found = int((tiger_run.model.score(pack_histories([np.array([3, 1, 4])], 12))[0, [3, 1, 4]] > -torch.inf).sum())
    assert len(model.recommend(histories[:1], 30 - found)[0]) == 30 - found
    with pytest.raises(ValueError, match=rf"k: got {31 - found}, expected 1 to {30 - found} for history 0"):
        model.recommend(histories[:1], 31 - found)
    with pytest.raises(ValueError, match=r"k: got 58, expected 1 to 57 for history 0 \(60 items, 3 of them"):
        model.recommend(histories, 58)
