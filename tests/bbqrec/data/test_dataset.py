"""Dataset, Features and Histories: their checks, look-ups and fingerprint."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bbqrec.data import Dataset, Features, Histories
from bbqrec.data.dataset import unknown_item
from bbqrec.data.text import tfidf_svd


def test_histories_index_slice_and_span():
    histories = Histories(np.arange(6), np.array([0, 2, 2, 6]), timestamps=np.arange(6) * 10)
    assert len(histories) == 3
    assert histories.lengths.tolist() == [2, 0, 4]
    assert [histories[n].tolist() for n in range(3)] == [[0, 1], [], [2, 3, 4, 5]]
    assert histories[-1].tolist() == [2, 3, 4, 5]
    assert [h.tolist() for h in histories[1:]] == [[], [2, 3, 4, 5]]
    assert histories[1:].timestamps.tolist() == [20, 30, 40, 50]
    spans = histories.spans(np.array([3, 0]), np.array([5, 1]))
    assert [h.tolist() for h in spans] == [[3, 4], [0]]
    assert spans.timestamps.tolist() == [30, 40, 0]
    with pytest.raises(IndexError, match="got sequence 3, expected one below 3"):
        histories[3]


def test_interactions_are_sorted_by_time_and_ties_keep_their_order():
    users, items, times = np.array([1, 0, 1, 1, 0]), np.array([4, 3, 2, 1, 0]), np.array([7, 5, 7, 6, 5])
    assert [h.tolist() for h in Histories.from_interactions(users, items, times, 3)] == [[3, 0], [1, 4, 2], []]
    assert [h.tolist() for h in Histories.from_interactions(users, items, None, 2)] == [[3, 0], [4, 2, 1]]


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"items": np.zeros(2, np.int32), "offsets": np.array([0, 2])}, TypeError, "items of int32, expected int64"),
        ({"items": np.zeros((1, 2), np.int64), "offsets": np.array([0, 2])}, ValueError, r"items of shape \(1, 2\)"),
        ({"items": np.zeros(2, np.int64), "offsets": np.array([0, 3])}, ValueError, "end at 2"),
        ({"items": np.zeros(2, np.int64), "offsets": np.array([0, 2, 1, 2])}, ValueError, "never decrease"),
        ({"items": np.zeros(2, np.int64), "offsets": np.array([], np.int64)}, ValueError, "start at 0"),
        (
            {"items": np.zeros(2, np.int64), "offsets": np.array([0, 2]), "timestamps": np.zeros(1, np.int64)},
            ValueError,
            "1 timestamps for 2 items",
        ),
    ],
)
def test_histories_that_do_not_fit_together(arguments, kind, message):
    with pytest.raises(kind, match=message):
        Histories(**arguments)


@pytest.mark.parametrize(
    ("values", "present", "kind", "message"),
    [
        (np.ones((2, 3)), np.ones(2, bool), TypeError, "float64 and present of bool"),
        (np.ones(2, np.float32), np.ones(2, bool), ValueError, r"got values \(2,\)"),
        (np.ones((2, 0), np.float32), np.ones(2, bool), ValueError, "F >= 1"),
        (np.ones((2, 3), np.float32), np.ones(3, bool), ValueError, r"present \(3,\)"),
        (np.ones((2, 3), np.float32), np.zeros(2, bool), ValueError, "no item has any"),
        (np.array([[0], [np.nan]], np.float32), np.ones(2, bool), ValueError, "row 2 .* NaN"),
        (np.array([[np.inf], [0]], np.float32), np.ones(2, bool), ValueError, "row 1 .* infinity"),
    ],
)
def test_bad_features(values, present, kind, message):
    with pytest.raises(kind, match=message):
        Features(values, present)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"item_ids": ["mug", "bowl", "mug", "bench"]}, r"item_ids: 'mug' appears twice, in rows 1 and 3"),
        ({"user_ids": ["ann", "bo", "bo"]}, r"user_ids: 'bo' appears twice, in rows 2 and 3"),
        ({"user_ids": ["ann"]}, r"histories: got 3, expected 1 \(one for each user\)"),
        ({"histories": Histories.from_lists([[], [], []])}, "there is no interaction"),
        ({"histories": Histories.from_lists([[0], [4], [1]])}, "item indices 0 to 4, expected 0 to 3"),
        ({"histories": Histories.from_lists([[0], [-1], [1]])}, "item indices -1 to 1"),
        ({"features": {"text": Features(np.ones((3, 2), np.float32), np.ones(3, bool))}}, "'text'.: got 3 rows"),
        ({"texts": {"title": ["x"]}}, "'title'.: got 1, expected 4"),
    ],
)
def test_contents_that_do_not_fit_together(tiny, change, message):
    with pytest.raises(ValueError, match=message):
        replace(tiny, **change)


def test_histories_from_lists():
    histories = Histories.from_lists([[0, 1], [], [2]], [[5, 6], [], [7]])
    assert [each.tolist() for each in histories] == [[0, 1], [], [2]]
    assert histories.timestamps.tolist() == [5, 6, 7]
    with pytest.raises(ValueError, match=r"timestamps of sequence 0: got 1, expected 2 \(one an item\)"):
        Histories.from_lists([[0, 1], [2]], [[1], [2, 3]])
    with pytest.raises(ValueError, match="timestamps: got 1, expected 2"):
        Histories.from_lists([[0], [2]], [[1]])
    with pytest.raises(TypeError, match="sequences: got float64, expected whole numbers"):
        Histories.from_lists([[0.5]])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([0, 99], "rows: got 0 to 99, expected 0 to 3"),
        ([1, 1], "rows: got 2 for 2 vectors"),
        ([1], "rows: got 1 for 2"),
    ],
)
def test_features_of_items_that_are_not_there(rows, message):
    with pytest.raises(ValueError, match=message):
        Features.of_items(np.ones((2, 3)), np.array(rows), 4)


def test_titles_and_texts(tiny):
    assert [tiny.title(i) for i in range(4)] == ["Blue mug", "bowl", "Läslampa", "Bench, 2 m"]
    assert [tiny.text(i) for i in range(4)] == ["Blue mug. clay", "a\nb", "Läslampa", "Bench, 2 m. oak"]
    assert replace(tiny, texts={}).title(0) == "mug"


def test_item_index_names_the_nearest_ids(tiny):
    assert [tiny.item_index(item_id) for item_id in tiny.item_ids] == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="'bowls' is not in the catalogue; the nearest known ids are 'bowl'"):
        tiny.item_index("bowls")


def test_an_unknown_item_of_a_large_catalogue_is_compared_with_ids_of_its_length(monkeypatch):
    compared = []
    monkeypatch.setattr("difflib.get_close_matches", lambda word, ids, **_: compared.extend(ids) or ids[:1])
    message = unknown_item("mugg", [*(f"item-{i:06}" for i in range(30_000)), "mugs"])
    assert message.endswith("the nearest known ids are 'mugs'")
    assert len(compared) == 20_000


def test_features_of_another_data_set_are_joined_by_item_id(tiny):
    other = replace(
        tiny,
        item_ids=["lamp", "vase", "mug", "bench"],
        features={"sound": Features.of_items(np.array([[7], [8], [9]], np.float32), np.array([0, 1, 2]), 4)},
    )
    made = replace(tiny, path=Path("shop")).with_features_of(other, "sound")
    assert made.path is None  # it is not what that folder holds
    joined = made.features["sound"]
    assert joined.values.tolist() == [[9], [0], [7], [0]]
    assert joined.present.tolist() == [True, False, True, False]
    with pytest.raises(ValueError, match="tiny has no 'smell' features; it has text, image"):
        other.with_features_of(tiny, "smell")
    with pytest.raises(ValueError, match="no item that has 'sound' features"):
        replace(tiny, item_ids=["a", "b", "c", "bench"]).with_features_of(other, "sound")


def test_fingerprint_tells_all_contents_apart_and_nothing_else(tiny):
    text = tiny.features["text"]
    shifted = Histories(tiny.histories.items, np.array([0, 3, 5, 8]), tiny.histories.timestamps)
    variants = [
        replace(tiny, item_ids=["mug", "bowl", "lamp", "benc"]),
        replace(tiny, item_ids=["mugb", "owl", "lamp", "bench"]),
        replace(tiny, user_ids=["ann", "bo", "di"]),
        replace(tiny, histories=shifted),
        replace(tiny, histories=replace(tiny.histories, timestamps=None)),
        replace(tiny, histories=replace(tiny.histories, timestamps=tiny.histories.timestamps + 1)),
        replace(tiny, features={**tiny.features, "text": replace(text, values=text.values + 1)}),
        replace(tiny, features={**tiny.features, "text": replace(text, values=text.values[:, :2])}),
        replace(tiny, features={**tiny.features, "text": replace(text, present=np.array([1, 1, 1, 0], bool))}),
        replace(tiny, features={"image": tiny.features["image"], "sound": text}),
        replace(tiny, texts={**tiny.texts, "title": ["Blue mug!", "", "Läslampa", "Bench, 2 m"]}),
        replace(tiny, texts={"title": tiny.texts["title"]}),
    ]
    prints = [tiny.fingerprint(), *(variant.fingerprint() for variant in variants)]
    assert len(set(prints)) == len(prints)
    derived = Features(np.ones((4, 1), np.float32), np.ones(4, bool), tfidf_svd(["a", "b", "c", "d"]).words)
    same = replace(tiny, name="x", features={"d": derived, **dict(reversed(tiny.features.items()))})
    assert same.fingerprint() == tiny.fingerprint()


def test_fingerprint_is_the_same_in_another_process(tmp_path, tiny):
    tiny.save(tmp_path / "a")
    script = f"from bbqrec.data import Dataset; print(Dataset.load({str(tmp_path / 'a')!r}).fingerprint())"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == tiny.fingerprint()


def test_folders_that_hold_no_data_set(tmp_path):
    with pytest.raises(ValueError, match="absent does not exist"):
        Dataset.load(tmp_path / "absent")
    with pytest.raises(ValueError, match="is empty"):
        Dataset.load(tmp_path)
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ValueError, match=r"notes\.txt is a file"):
        Dataset.load(tmp_path / "notes.txt")
    with pytest.raises(ValueError, match=r"holds notes\.txt, which is no known format; expected interactions"):
        Dataset.load(tmp_path)
