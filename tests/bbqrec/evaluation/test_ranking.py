"""`evaluate` against a loop over users and items, and its protocol case by case."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bbqrec.data import Heldout, Histories, leave_one_out
from bbqrec.data.formats import unisrec
from bbqrec.evaluation import evaluate, ranks
from bbqrec.models.most_popular import MostPopular


class Table:
    """Scores looked up by the last item of the history."""

    def __init__(self, scores):
        self.scores = torch.as_tensor(scores)

    def score(self, batch):
        return self.scores[batch.items[batch.last]]


def heldout_of(histories, targets):
    return Heldout(Histories.from_lists(histories), np.array(targets), np.arange(len(targets)) + 100)


def one(scores, history, target, **options):
    """Metrics of a single user with the given scores."""
    table = Table([scores] * len(scores))
    return evaluate(table, heldout_of([history], [target]), len(scores), max_length=10, **options)


def brute_force(scores, histories, targets, keep_history):
    found = []
    for history, target in zip(histories, targets, strict=True):
        own = scores[history[-1]]
        rank = 1
        for item in range(len(own)):
            is_candidate = item != target and (keep_history or item not in history)
            rank += is_candidate and own[item] >= own[target]
        found.append(rank)
    n = len(found)
    return {
        **{f"recall@{k}": sum(r <= k for r in found) / n for k in (1, 5, 10, 20)},
        **{f"ndcg@{k}": sum(1 / math.log2(r + 1) for r in found if r <= k) / n for k in (5, 10, 20)},
        "users": n,
    }


@st.composite
def problems(draw):
    """Few different scores and items, so that ties, repeats and targets in the history are common."""
    n_items = draw(st.integers(1, 30))
    item = st.integers(0, n_items - 1)
    n_users = draw(st.integers(1, 7))
    histories = draw(st.lists(st.lists(item, min_size=1, max_size=6), min_size=n_users, max_size=n_users))
    targets = draw(st.lists(item, min_size=n_users, max_size=n_users))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    scores = generator.integers(-1, draw(st.integers(1, 20)), (n_items, n_items)).astype(np.float32)
    scores[scores < 0] = -np.inf
    trained = generator.random(n_items) < 0.5
    return scores, histories, targets, trained


@settings(max_examples=200, deadline=None)
@given(problems(), st.booleans(), st.integers(1, 8))
def test_against_brute_force(problem, keep_history, batch_users):
    scores, histories, targets, trained = problem
    options = {"keep_history": keep_history, "max_length": 3, "batch_users": batch_users, "train_items": trained}
    found = evaluate(Table(scores), heldout_of(histories, targets), len(scores), **options)
    expected = brute_force(scores, histories, targets, keep_history)
    cold = [n for n, target in enumerate(targets) if not trained[target]]
    expected["cold/users"] = len(cold)
    if cold:
        apart = brute_force(scores, [histories[n] for n in cold], [targets[n] for n in cold], keep_history)
        expected |= {f"cold/{name}": value for name, value in apart.items()}
    assert found == pytest.approx(expected)


def test_ties_count_against_the_target():
    metrics = one([1.0, 1.0, 1.0, 0.0], [3], 0)
    assert (metrics["recall@1"], metrics["recall@5"]) == (0, 1)
    assert metrics["ndcg@5"] == pytest.approx(1 / math.log2(3 + 1))


def test_items_of_the_history_are_removed_unless_kept():
    assert one([1.0, 2.0, 3.0], [1, 2], 0)["recall@1"] == 1
    assert one([1.0, 2.0, 3.0], [1, 2], 0, keep_history=True)["recall@1"] == 0


def test_the_target_is_never_removed():
    metrics = one([1.0, 2.0, 3.0], [0, 1, 2], 0)
    assert (metrics["recall@1"], metrics["users"]) == (1, 1)


def test_the_whole_history_is_removed_not_only_what_the_model_sees():
    scores = [[1.0, 2.0, 0.0]] * 3
    metrics = evaluate(Table(scores), heldout_of([[1, 2]], [0]), 3, max_length=1)
    assert metrics["recall@1"] == 1


def test_the_ranker_sees_the_latest_items():
    class Recorder(Table):
        def score(self, batch):
            self.seen = batch.items.tolist()
            return super().score(batch)

    recorder = Recorder([[1.0] * 5] * 5)
    evaluate(recorder, heldout_of([[0, 1, 2, 3], [4]], [1, 1]), 5, max_length=2)
    assert recorder.seen == [2, 3, 4]


def test_item_vectors_are_made_once():
    class Maker(Table):
        made = 0

        def item_vectors(self):
            self.made += 1
            return self.made

        def score(self, batch, vectors):
            assert vectors == 1
            return super().score(batch)

    maker = Maker([[1.0] * 5] * 5)
    evaluate(maker, heldout_of([[0], [4], [3]], [1, 1, 1]), 5, max_length=2, batch_users=1)
    assert maker.made == 1


def test_cold_targets_are_reported_apart():
    heldout = heldout_of([[0], [0], [0]], [1, 2, 3])
    scores = Table([[0.0, 3.0, 2.0, 1.0]] * 4)
    metrics = evaluate(scores, heldout, 4, max_length=5, train_items={0, 2})
    assert (metrics["users"], metrics["cold/users"]) == (3, 2)
    assert (metrics["cold/recall@1"], metrics["recall@1"]) == (0.5, pytest.approx(1 / 3))
    assert evaluate(scores, heldout, 4, max_length=5, train_items=np.array([0, 1, 2, 3])) == {
        **evaluate(scores, heldout, 4, max_length=5),
        "cold/users": 0,
    }


def test_ranks():
    scores = torch.tensor([[3.0, 2.0, 1.0], [1.0, 1.0, 1.0]])
    assert ranks(scores, torch.tensor([2, 0])).tolist() == [3, 3]
    excluded = torch.tensor([[True, False, True], [False, True, False]])
    assert ranks(scores, torch.tensor([2, 0]), excluded).tolist() == [2, 2]


def test_ranks_of_items_shared_out(monkeypatch):
    """What three processes sum up, found in turn: ties and excluded items lie on all sides."""
    scores, targets = torch.randint(6, (50, 14)).float(), torch.randint(14, (50,))
    excluded = torch.rand(50, 14) < 0.3
    cuts = [(0, 5), (5, 10), (10, 14)]

    def in_each(summed):
        monkeypatch.setattr("bbqrec.evaluation.ranking.summed", summed)
        for first, stop in cuts:
            part = slice(first, stop)
            ranks(scores[:, part], targets, excluded[:, part], SimpleNamespace(first=first))

    sent = []
    in_each(lambda value: sent.append(value) or value)
    of_targets = sum(sent[::2])
    assert torch.equal(of_targets[:, 0], scores.gather(1, targets[:, None])[:, 0])
    sent.clear()
    in_each(lambda value: sent.append(value) or (of_targets if value.is_floating_point() else value))
    assert torch.equal(sum(sent[1::2]), ranks(scores, targets, excluded))


@pytest.mark.parametrize(
    ("scores", "histories", "targets", "options", "message"),
    [
        ([[0.0, math.nan]] * 2, [[0]], [1], {}, "scores of user 100 hold NaN"),
        ([[0.0, 0.0], [0.0, math.nan]], [[0], [1]], [1, 0], {}, "scores of user 101 hold NaN"),
        ([[0.0] * 3] * 2, [[0]], [1], {}, r"got scores \(1, 3\), expected \(1, 2\)"),
        ([[0.0] * 2] * 2, [[0]], [2], {}, "targets up to 2, expected 0 to 1"),
        ([[0.0] * 2] * 2, [], [], {}, "heldout: has no user"),
        ([[0.0] * 2] * 2, [[0]], [1], {"train_items": np.ones(3, bool)}, r"mask of shape \(3,\), expected \(2,\)"),
    ],
)
def test_what_cannot_be_evaluated(scores, histories, targets, options, message):
    heldout = heldout_of(histories, np.array(targets, np.int64))
    with pytest.raises(ValueError, match=message):
        evaluate(Table(scores), heldout, 2, max_length=5, **options)


def test_most_popular_counts_training():
    popular = MostPopular(Histories.from_lists([[0, 2], [2], []]), n_items=4)
    heldout = heldout_of([[1], [2]], [2, 3])
    metrics = evaluate(popular, heldout, 4, max_length=5)
    assert metrics["recall@1"] == 0.5  # 2 leads; 3 was never taken and shares the last place with 1, after 0
    assert metrics["ndcg@5"] == pytest.approx((1 + 1 / math.log2(3 + 1)) / 2)


@pytest.mark.parametrize(
    ("folder", "recall", "ndcg"), [("mm_subset", 0.0478, 0.0230), ("full", 0.0316, 0.0180)], ids=["mm_subset", "full"]
)
def test_most_popular_on_real_data_gives_the_known_numbers(shared_data, folder, recall, ndcg):
    """Counts of the training part alone: with the validation items too, mm_subset would give .0502/.0234."""
    data = unisrec.read(shared_data / "amazon2018_scientific" / folder)
    split = leave_one_out(data)
    metrics = evaluate(MostPopular(split.train, data.n_items), split.test, data.n_items, max_length=50)
    assert (round(metrics["recall@10"], 4), round(metrics["ndcg@10"], 4)) == (recall, ndcg)
