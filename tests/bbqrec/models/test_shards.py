"""Which process holds which items; what crosses over between several is in tests/distributed."""

import pytest
import torch

from bbqrec.models.shards import own_rows, shard_sizes


@pytest.mark.parametrize(
    ("n_items", "processes", "sizes"), [(41, 1, [41]), (40, 2, [20, 20]), (41, 4, [11, 11, 11, 8]), (3, 3, [1, 1, 1])]
)
def test_all_hold_equally_many_but_the_last(n_items: int, processes: int, sizes: list[int]) -> None:
    assert shard_sizes(n_items, processes) == sizes
    parts = torch.arange(n_items).chunk(processes)
    assert [len(part) for part in parts] == sizes  # as distributed tensors are cut


@pytest.mark.parametrize(("n_items", "processes"), [(5, 4), (2, 3)])
def test_a_process_without_items_is_refused(n_items: int, processes: int) -> None:
    with pytest.raises(ValueError, match=rf"^model\.sharded_items: .* {n_items} items and {processes} processes"):
        shard_sizes(n_items, processes)


def test_own_rows_of_a_whole_table_are_all() -> None:
    table = torch.randn(3, 2)
    assert own_rows(table) is table
