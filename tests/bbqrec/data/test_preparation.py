"""What `bbqrec import` leaves out, and what it says about it."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from bbqrec import Dataset
from bbqrec.cli.main import app
from bbqrec.data.dataset import Features, Histories
from bbqrec.data.preparation import prepare


def data_set(lists, timestamps=None, n_items=5):
    values = np.arange(2.0 * n_items, dtype=np.float32).reshape(n_items, 2)
    present = np.arange(n_items) != 1
    return Dataset(
        name="small",
        item_ids=[f"item-{i}" for i in range(n_items)],
        user_ids=[f"user-{u}" for u in range(len(lists))],
        histories=Histories.from_lists(lists, timestamps),
        features={"image": Features(values * present[:, None], present)},
        texts={"title": [f"Title {i}" for i in range(n_items)]},
    )


def named(data):
    """Histories in names, which survive renumbering."""
    return {user: [data.item_ids[i] for i in data.histories[u]] for u, user in enumerate(data.user_ids)}


def test_a_core_is_found_again_and_again():
    # Without user-2, who has one interaction, item-2 has one: then user-1 has one, and so on.
    data = data_set([[0, 3, 0, 3], [2, 3], [2], [0, 3]])
    prepared = prepare(data, k_core=2)
    assert named(prepared.data) == {"user-0": ["item-0", "item-3", "item-0", "item-3"], "user-3": ["item-0", "item-3"]}
    assert prepared.data.texts["title"] == ["Title 0", "Title 3"]
    assert prepared.data.features["image"].values.tolist() == [[0, 1], [6, 7]]
    assert prepared.figures["counts"] == {
        "read": {"users": 4, "items": 5, "interactions": 9},
        "repeated": {"users": 0, "items": 0, "interactions": 0},
        "below 2 interactions": {"users": 2, "items": 3, "interactions": 3},
        "written": {"users": 2, "items": 2, "interactions": 6},
    }


def core_of(lists, k):
    """By the definition, round by round."""
    while True:
        counts = Counter(item for items in lists.values() for item in items)
        left = {user: [item for item in items if counts[item] >= k] for user, items in lists.items() if len(items) >= k}
        if left == lists:
            return left
        lists = left


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.integers(0, 6), max_size=9), min_size=1, max_size=9).filter(any), st.integers(1, 3))
def test_any_core_has_itself_as_core(lists, k):
    data = data_set(lists, [list(range(len(items))) for items in lists], n_items=7)
    expected = core_of(named(data), k)
    if not expected:
        with pytest.raises(ValueError, match=f"k_core: got {k}, but no user and item"):
            prepare(data, k_core=k)
        return
    core = prepare(data, k_core=k).data
    assert named(core) == expected
    assert core.histories.lengths.min() >= k
    assert np.bincount(core.histories.items, minlength=core.n_items).min() >= k
    assert prepare(core, k_core=k).data.fingerprint() == core.fingerprint()


def test_every_core_has_enough_and_is_the_largest():
    generator = np.random.default_rng(0)
    data = data_set([generator.integers(0, 40, n).tolist() for n in generator.integers(1, 9, 60)], n_items=40)
    core = prepare(replace(data, path=Path("shop")), k_core=4).data
    assert core.path is None  # it is not what that folder holds
    assert core.histories.lengths.min() >= 4
    assert np.bincount(core.histories.items, minlength=core.n_items).min() >= 4
    # One at a time, in any order, ends at the same core.
    left = named(data)
    while True:
        counts = {}
        for items in left.values():
            for item in items:
                counts[item] = counts.get(item, 0) + 1
        user = next((u for u, items in left.items() if len(items) < 4), None)
        item = next((i for i, n in counts.items() if n < 4), None)
        if user is not None:
            del left[user]
        elif item is not None:
            left = {u: [i for i in items if i != item] for u, items in left.items()}
        else:
            break
    assert named(core) == left


def test_repeats_need_the_same_time():
    data = data_set([[0, 0, 0, 1], [0]], [[5, 5, 7, 7], [5]])
    prepared = prepare(data)
    assert named(prepared.data) == {"user-0": ["item-0", "item-0", "item-1"], "user-1": ["item-0"]}
    assert prepared.data.histories.timestamps.tolist() == [5, 7, 7, 5]
    assert prepared.figures["counts"]["repeated"]["interactions"] == 1
    assert prepared.figures["time_ties"] == 1
    assert len(prepare(data, keep_repeats=True).data.histories.items) == 5
    without_times = prepare(data_set([[0, 0, 0, 1], [0]]))
    assert without_times.figures["time_ties"] is None
    assert len(without_times.data.histories.items) == 5


def test_nothing_is_left_out_unasked():
    data = data_set([[0, 3], [2]])
    assert prepare(data).data.fingerprint() == data.fingerprint()


@pytest.mark.parametrize(
    ("k", "message"), [(3, "k_core: got 3, but no user and item of small"), (-1, "k_core: got -1")]
)
def test_impossible_cores(k, message):
    with pytest.raises(ValueError, match=message):
        prepare(data_set([[0, 3], [2]]), k_core=k)


def test_the_command_writes_what_it_says(tmp_path):
    data_set([[0, 3, 0, 3], [2, 3], [2], [0, 3]]).save(tmp_path / "source")
    arguments = ["import", str(tmp_path / "source"), str(tmp_path / "target"), "--k-core", "2"]
    result = CliRunner().invoke(app, [*arguments, "--json"], catch_exceptions=False)
    figures = json.loads(result.stdout)
    written = Dataset.load(tmp_path / "target")
    assert figures["counts"]["written"] == {"users": written.n_users, "items": written.n_items, "interactions": 6}
    assert figures["features"]["image"] == 1
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 1
    assert "is not empty; give a new one" in again.stderr
    shown = CliRunner().invoke(app, [*arguments[:2], str(tmp_path / "other")], catch_exceptions=False).stdout
    assert "written" in shown
    assert "No timestamps" in shown


def test_an_interrupted_save_leaves_nothing(tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        data_set([[0, 3]]).save(tmp_path / "target")
    assert not list(tmp_path.iterdir())
