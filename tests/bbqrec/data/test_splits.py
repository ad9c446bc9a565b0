"""Leave-one-out."""

from dataclasses import replace

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bbqrec.data import Histories, leave_one_out


def test_leave_one_out(tiny):
    short = replace(
        tiny, user_ids=list("abcde"), histories=Histories.from_lists([[0, 1, 2, 3], [1], [], [2, 2, 3], [0, 1]])
    )
    split = leave_one_out(short)
    assert [h.tolist() for h in split.train] == [[0, 1], [1], [], [2], [0, 1]]
    assert [h.tolist() for h in split.validation.histories] == [[0, 1], [2]]
    assert split.validation.targets.tolist() == [2, 2]
    assert [h.tolist() for h in split.test.histories] == [[0, 1, 2], [2, 2]]
    assert split.test.targets.tolist() == [3, 3]
    assert split.validation.users.tolist() == split.test.users.tolist() == [0, 3]
    assert len(split.test) == 2
    assert split.train_items.tolist() == [0, 1]  # one item alone, 2, is no transition


def test_timestamps_go_along(tiny):
    split = leave_one_out(tiny)
    assert split.train.timestamps.tolist() == [5, 6, 1, 2]
    assert split.test.histories.timestamps.tolist() == [5, 6, 6, 2, 3]


def test_a_sample_of_users_is_theirs_alone_and_the_same_every_time(timed_data):
    whole = leave_one_out(timed_data).validation
    some = whole.sample(20, seed=0)
    assert len(some) == len(set(some.users)) == 20
    assert sorted(some.users) == some.users.tolist()
    for n, user in enumerate(some.users):
        (place,) = np.flatnonzero(whole.users == user)
        assert some.targets[n] == whole.targets[place]
        assert np.array_equal(some.histories[n], whole.histories[place])
        assert np.array_equal(some.histories[n : n + 1].timestamps, whole.histories[place : place + 1].timestamps)
    assert np.array_equal(whole.sample(20, seed=0).users, some.users)
    assert not np.array_equal(whole.sample(20, seed=1).users, some.users)
    assert whole.sample(None, seed=0) is whole.sample(len(whole), seed=0) is whole


def test_only_short_histories(tiny):
    split = leave_one_out(replace(tiny, histories=Histories.from_lists([[0, 1], [1], [2]])))
    assert len(split.validation) == len(split.test) == 0
    assert len(split.train.items) == 4


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, 6), min_size=1, max_size=12).filter(any))
def test_every_interaction_is_trained_or_held_out(tiny, lengths):
    offsets = np.cumsum([0, *lengths])
    histories = Histories(np.arange(offsets[-1]), offsets, timestamps=np.arange(offsets[-1]) * 10)
    names = [str(i) for i in range(offsets[-1])]  # every interaction is an item of its own
    users = names[: len(lengths)] + [f"u{i}" for i in range(len(lengths) - len(names))]
    split = leave_one_out(replace(tiny, item_ids=names, user_ids=users, histories=histories, features={}, texts={}))
    assert len(split.train) == len(lengths)
    kept = iter(zip(split.validation.histories, split.test.histories, strict=True))
    targets = iter(zip(split.validation.users, split.validation.targets, split.test.targets, strict=True))
    for user, (history, train) in enumerate(zip(histories, split.train, strict=True)):
        if len(history) < 3:
            assert train.tolist() == history.tolist()
            continue
        *first, second_last, last = history.tolist()
        assert next(targets) == (user, second_last, last)
        assert train.tolist() == first
        assert [each.tolist() for each in next(kept)] == [first, [*first, second_last]]
    assert not [*kept, *targets]
    for part in (split.train, split.validation.histories, split.test.histories):
        assert (part.timestamps == part.items * 10).all()
