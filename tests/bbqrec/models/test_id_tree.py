"""The tree of semantic IDs: tokens are unique, and its nodes are the prefixes that exist, neither more nor fewer."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bbqrec.models.id_tree import IDTree

K = 3
CODES = torch.tensor([[[2, 0], [1, 1]], [[0, 1], [2, 2]], [[2, 0], [1, 1]], [[2, 0], [-1, -1]], [[2, 0], [1, 1]]])


@pytest.fixture
def tree():
    return IDTree(CODES, K)


def random_codes(n_items=200, seed=0):
    codes = torch.randint(0, K, (n_items, 2, 2), generator=torch.Generator().manual_seed(seed))
    codes[::7, 1] = -1
    return codes


def test_tokens_are_codes_and_the_number_among_equals(tree):
    assert tree.sizes == (4, 4, 4, 4, 3)
    assert tree.tokens.tolist() == [
        [2, 0, 1, 1, 0],
        [0, 1, 2, 2, 0],
        [2, 0, 1, 1, 1],
        [2, 0, 3, 3, 0],  # lacks the second modality: a token of its own, at both levels
        [2, 0, 1, 1, 2],
    ]
    assert tree.items.tolist() == [1, 0, 2, 4, 3]


def test_every_item_has_an_id_of_its_own():
    tree = IDTree(random_codes(), K)
    assert len(tree.tokens.unique(dim=0)) == 200
    assert tree.tokens[:, -1].max() + 1 == tree.sizes[-1] > 1


def test_nodes_are_the_prefixes_that_exist():
    tree = IDTree(random_codes(), K)
    paths = [()]  # of the nodes at a depth, in their order
    for depth in range(tree.depth):
        first, token = tree.first_child(depth).tolist(), tree.token(depth).tolist()
        assert len(first) == len(paths) + 1
        assert (first[0], first[-1]) == (0, len(token))
        paths = [(*path, token[n]) for k, path in enumerate(paths) for n in range(first[k], first[k + 1])]
        assert paths == sorted({tuple(row[: depth + 1]) for row in tree.tokens.tolist()})
    assert [tuple(tree.tokens[item].tolist()) for item in tree.items] == paths


def test_expand_takes_the_best_children_of_all_beams(tree):
    nodes, scores = torch.tensor([[0, 1], [1, 0]]), torch.tensor([[-1.0, -2.0], [-0.5, -torch.inf]])
    log_probs = torch.log(torch.tensor([[[0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1]]] * 2))
    best = tree.expand(1, nodes, scores, log_probs, width=5)
    # node 0 is token 0, followed by 1 alone; node 1 is token 2, followed by 0 alone
    assert best.nodes[0].tolist() == [0, 1]
    assert best.parents[0].tolist() == [0, 1]
    expected = [-1 + log_probs[0, 0, 1].item(), -2 + log_probs[0, 1, 0].item()]
    assert best.scores[0].tolist() == pytest.approx(expected)
    assert (best.nodes[1, 0], best.parents[1, 0]) == (1, 0)
    assert best.scores[1].tolist() == pytest.approx([-0.5 + log_probs[1, 0, 0].item(), -torch.inf])


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 30), st.integers(1, 8), st.integers(0, 99))
def test_a_search_is_that_of_a_list_of_prefixes(n_items, width, seed):
    """Beams of several searches, depth by depth, against all prefixes of IDs that begin with a beam."""
    tree, generator = IDTree(random_codes(n_items, seed), K), torch.Generator().manual_seed(seed)
    nodes, scores = torch.zeros(2, 1, dtype=torch.int64), torch.zeros(2, 1)
    ids = [tuple(row) for row in tree.tokens.tolist()]
    beams = [[((), 0.0)]] * 2
    for depth in range(tree.depth):
        log_probs = torch.randn(2, nodes.shape[1], tree.sizes[depth], generator=generator)
        best = tree.expand(depth, nodes, scores, log_probs, width)
        paths = sorted({row[: depth + 1] for row in ids})
        following = []
        for search, beam in enumerate(beams):
            found = [
                (path, score + log_probs[search, place, path[-1]].item())
                for place, (prefix, score) in enumerate(beam)
                for path in paths
                if path[:-1] == prefix
            ]
            found = sorted(found, key=lambda each: -each[1])[:width]
            is_one = best.scores[search] > -torch.inf
            assert [paths[node] for node in best.nodes[search][is_one].tolist()] == [path for path, _ in found]
            assert best.scores[search][is_one].tolist() == pytest.approx([score for _, score in found], abs=1e-5)
            parents = [beam[place][0] for place in best.parents[search][is_one].tolist()]
            assert parents == [path[:-1] for path, _ in found]
            following.append(found)
        nodes, scores, beams = best.nodes, best.scores, following


def test_expand_keeps_no_more_than_asked(tree):
    log_probs = torch.tensor([[[-3.0, -9.0, -1.0, -2.0]]])
    best = tree.expand(0, torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1), log_probs, width=1)
    assert [tuple(row.flatten().tolist()) for row in best] == [(1,), (0,), (-1.0,)]


def test_nan_is_no_score_that_is_passed_over(tree):
    log_probs = torch.full((1, 1, 4), torch.nan)
    best = tree.expand(0, torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1), log_probs, width=2)
    assert best.scores.isnan().all()
    following = tree.expand(1, best.nodes, best.scores, torch.zeros(1, 2, 4), width=2)
    assert following.scores.shape == (1, 2)
    assert following.scores.isnan().all()


def test_one_item():
    tree = IDTree(torch.tensor([[[0]]]), 1)
    assert (tree.sizes, tree.items.tolist()) == ((2, 1), [0])
    best = tree.expand(0, torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1), torch.zeros(1, 1, 2), width=3)
    assert best.nodes.tolist() == [[0]]
