"""Leave-one-out."""

from dataclasses import replace

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
    assert split.train_items.tolist() == [0, 1, 2]


def test_timestamps_go_along(tiny):
    split = leave_one_out(tiny)
    assert split.train.timestamps.tolist() == [5, 6, 1, 2]
    assert split.test.histories.timestamps.tolist() == [5, 6, 6, 2, 3]


def test_only_short_histories(tiny):
    split = leave_one_out(replace(tiny, histories=Histories.from_lists([[0, 1], [1], [2]])))
    assert len(split.validation) == len(split.test) == 0
    assert len(split.train.items) == 4
