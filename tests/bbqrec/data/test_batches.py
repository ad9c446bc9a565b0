"""Packing of histories, and the batches of training."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from bbqrec.data import Histories, PackedBatch, PrefixBatches, TrainingBatches, pack_histories
from bbqrec.data.batches import PREFIXES_A_HISTORY


def sequences(batch: PackedBatch, values: torch.Tensor) -> list[list[int]]:
    bounds = batch.cu_seqlens.tolist()
    return [values[a:b].tolist() for a, b in pairwise(bounds)]


def test_pack_keeps_the_latest_items():
    histories = Histories(np.array([5, 6, 7, 8, 1, 2]), np.array([0, 4, 5, 6]), timestamps=np.arange(6) * 10)
    batch = pack_histories(histories, max_length=3)
    assert sequences(batch, batch.items) == [[6, 7, 8], [1], [2]]
    assert sequences(batch, batch.positions) == [[0, 1, 2], [0], [0]]
    assert sequences(batch, batch.timestamps) == [[10, 20, 30], [40], [50]]
    assert (batch.cu_seqlens.dtype, batch.items.dtype, batch.positions.dtype) == (torch.int32, torch.int64, torch.int64)
    assert (batch.max_seqlen, batch.targets) == (3, None)
    assert batch.items[batch.last].tolist() == [8, 1, 2]


def test_pack_takes_lists_and_moves_to_a_device():
    batch = pack_histories([[3, 1], np.array([2])], max_length=5)
    assert sequences(batch, batch.items) == [[3, 1], [2]]
    moved = batch.to("meta")
    assert {moved.items.device.type, moved.positions.device.type, moved.cu_seqlens.device.type} == {"meta"}
    assert (moved.timestamps, moved.targets, moved.max_seqlen) == (None, None, 2)


def test_pack_refuses_empty_histories_and_lengths():
    with pytest.raises(ValueError, match=r"histories: number 1 \(counted from 0\) is empty"):
        pack_histories([[1], []], max_length=5)
    with pytest.raises(ValueError, match="max_length: got 0"):
        pack_histories([[1]], max_length=0)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.integers(0, 50), min_size=1, max_size=9), max_size=8), st.integers(1, 10))
def test_a_pack_is_the_end_of_every_history(histories, max_length):
    times = [[7 * item for item in history] for history in histories]
    for given_ in (histories, Histories.from_lists(histories, times)):
        batch = pack_histories(given_, max_length)
        ends = [history[-max_length:] for history in histories]
        assert sequences(batch, batch.items) == ends
        assert sequences(batch, batch.positions) == [list(range(len(end))) for end in ends]
        assert batch.max_seqlen == max(map(len, ends), default=0)
        assert batch.items[batch.last].tolist() == [history[-1] for history in histories]
        assert batch.timestamps is None if given_ is histories else torch.equal(batch.timestamps, 7 * batch.items)


lengths_of_histories = st.lists(st.integers(0, 23), min_size=1, max_size=30).filter(lambda lengths: max(lengths) > 1)


def numbered(lengths: list[int]) -> Histories:
    """Every interaction is an item of its own, so that a transition is known by its first item."""
    offsets = np.cumsum([0, *lengths])
    return Histories(np.arange(offsets[-1]), offsets, timestamps=np.arange(offsets[-1]) * 10)


@settings(max_examples=200, deadline=None)
@given(lengths_of_histories, st.integers(1, 9), st.integers(1, 60), st.integers(0, 3))
def test_every_transition_is_trained_once_an_epoch(lengths, max_length, batch_tokens, epoch):
    histories = numbered(lengths)
    owners = np.repeat(np.arange(len(lengths)), lengths)
    batches = TrainingBatches(histories, max_length, batch_tokens, seed=0)
    batches.set_epoch(epoch)
    produced = list(batches)
    assert len(produced) == len(batches)
    seen = []
    for batch in produced:
        inputs, targets = sequences(batch, batch.items), sequences(batch, batch.targets)
        assert 0 < len(batch.items) < batch_tokens + max_length
        assert batch.max_seqlen == max(map(len, inputs)) <= max_length
        assert batch.positions.tolist() == [p for items in inputs for p in range(len(items))]
        assert torch.equal(batch.timestamps, batch.items * 10)
        assert batch.users.tolist() == [owners[items[0]] for items in inputs]
        for items, following in zip(inputs, targets, strict=True):
            assert items == list(range(items[0], items[0] + len(items)))
            assert following == [item + 1 for item in items]
        seen += batch.items.tolist()
    lasts = set((histories.offsets[1:] - 1)[histories.lengths > 0].tolist())
    assert sorted(seen) == sorted(set(range(len(histories.items))) - lasts)


def test_windows_are_counted_from_the_end():
    batches = TrainingBatches(numbered([8]), max_length=3, batch_tokens=100, seed=0)
    (batch,) = batches
    assert sorted(sequences(batch, batch.items)) == [[0], [1, 2, 3], [4, 5, 6]]


def test_batches_are_about_equally_full():
    rng = np.random.default_rng(0)
    batches = TrainingBatches(numbered(rng.integers(2, 30, 2000).tolist()), max_length=50, batch_tokens=512, seed=0)
    sizes = [len(batch.items) for batch in batches]
    assert np.mean(sizes) <= 512
    assert min(sizes) > 512 - 60
    assert max(sizes) < 512 + 50


def order(batches: TrainingBatches) -> list[list[int]]:
    return [batch.items.tolist() for batch in batches]


def test_order_depends_on_seed_and_epoch_alone():
    histories = numbered([7] * 40)
    undisturbed = TrainingBatches(histories, 10, 32, seed=3)
    epochs = []
    for epoch in range(3):
        undisturbed.set_epoch(epoch)
        epochs.append(order(undisturbed))
    resumed = TrainingBatches(histories, 10, 32, seed=3)
    resumed.set_epoch(2)
    assert order(resumed) == epochs[2]
    assert order(resumed) == epochs[2]
    assert len({str(epoch) for epoch in epochs}) == 3
    other = TrainingBatches(histories, 10, 32, seed=4)
    other.set_epoch(2)
    assert order(other) != epochs[2]


def test_number_of_batches_is_the_same_in_every_epoch():
    rng = np.random.default_rng(0)
    batches = TrainingBatches(numbered(rng.integers(1, 60, 100).tolist()), 20, 64, seed=0)
    counts = set()
    for epoch in range(20):
        batches.set_epoch(epoch)
        counts.add(len(list(batches)))
    assert counts == {len(batches)}


def test_the_epoch_may_be_set_after_the_iterator_is_made():
    """Lightning makes the iterator first and calls on_train_epoch_start next."""
    batches = TrainingBatches(numbered([7] * 40), 10, 32, seed=3)
    iterator = iter(batches)
    batches.set_epoch(5)
    found = [batch.items.tolist() for batch in iterator]
    assert found == order(batches)


def test_loader_workers_share_the_batches():
    batches = TrainingBatches(numbered([7] * 40), 10, 32, seed=3)
    loader = DataLoader(batches, batch_size=None, num_workers=2, multiprocessing_context="fork")
    assert [batch.items.tolist() for batch in loader] == order(batches)


def test_distributed_ranks_share_the_batches(monkeypatch):
    batches = TrainingBatches(numbered([7] * 20), 10, 30, seed=0)
    alone = order(batches)
    assert len(alone) == 4
    shares = []
    for rank in range(3):
        monkeypatch.setattr("bbqrec.data.batches.rank_and_world", lambda rank=rank: (rank, 3))
        assert len(batches) == 2
        shares.append(order(batches))
    assert [len(share) for share in shares] == [2, 2, 2]
    times = Counter(str(items) for share in shares for items in share)
    assert set(times) == set(map(str, alone))
    assert sorted(times.values()) == [1, 1, 2, 2]


@pytest.mark.parametrize(
    ("lengths", "max_length", "batch_tokens", "message"),
    [
        ([1, 0, 1], 5, 10, "histories: no user has two interactions"),
        ([3], 0, 10, "max_length: got 0, expected at least 1"),
        ([3], 5, 0, "batch_tokens: got 0, expected at least 1"),
    ],
)
def test_what_cannot_be_trained(lengths, max_length, batch_tokens, message):
    with pytest.raises(ValueError, match=message):
        TrainingBatches(numbered(lengths), max_length, batch_tokens, seed=0)


@settings(max_examples=200, deadline=None)
@given(lengths_of_histories, st.integers(1, 9), st.integers(1, 60), st.integers(0, 3))
def test_a_pass_trains_every_transition_once_with_what_came_before(lengths, max_length, batch_tokens, first_pass):
    histories = numbered(lengths)
    batches = PrefixBatches(histories, max_length, batch_tokens, seed=0)
    start_of = np.repeat(histories.offsets[:-1], histories.lengths)
    seen, shares = [], []
    for epoch in range(first_pass * batches.epochs_of_a_pass, (first_pass + 1) * batches.epochs_of_a_pass):
        batches.set_epoch(epoch)
        produced = list(batches)
        assert len(produced) == len(batches)
        shares.append(0)
        for batch in produced:
            for inputs, following in zip(sequences(batch, batch.items), sequences(batch, batch.targets), strict=True):
                target = inputs[-1] + 1
                assert following == [item + 1 for item in inputs]
                assert inputs == list(range(max(start_of[target], target - max_length), target))
                seen.append(target)
                shares[-1] += 1
    firsts = set(histories.offsets[:-1][histories.lengths > 0].tolist())
    assert sorted(seen) == sorted(set(range(len(histories.items))) - firsts)
    assert max(shares) - min(shares) <= 1


def test_long_histories_take_several_epochs_a_pass():
    few, many = (PrefixBatches(numbered([n] * 20), 5, 64, seed=0) for n in (4, 61))
    assert few.epochs_of_a_pass == 1
    assert many.epochs_of_a_pass == 60 // PREFIXES_A_HISTORY
    assert PrefixBatches(numbered([PREFIXES_A_HISTORY + 2] * 20), 5, 64, seed=0).epochs_of_a_pass == 2
    sizes = []
    for epoch in range(4):
        many.set_epoch(epoch)
        sizes += [len(batch.items) for batch in many]
    assert 55 < np.mean(sizes) <= 65


def test_prefixes_depend_on_seed_and_epoch_alone():
    histories = numbered([3, 40, 1, 17, 90])
    first, again, other = (PrefixBatches(histories, 10, 32, seed=seed) for seed in (3, 3, 4))
    produced = []
    for epoch in range(5):
        first.set_epoch(epoch)
        produced.append(order(first))
    again.set_epoch(4)
    other.set_epoch(4)
    assert order(again) == produced[4] != order(other)
    assert len({str(epoch) for epoch in produced}) == 5
