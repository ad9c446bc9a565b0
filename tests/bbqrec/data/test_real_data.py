"""Real data sets in the formats of others: their published counts, and the most popular items as a check of splits."""

import numpy as np
import pytest

from bbqrec.data import Dataset, formats, leave_one_out
from bbqrec.evaluation import evaluate
from bbqrec.models.most_popular import MostPopular


@pytest.fixture(scope="module")
def read(shared_data):
    """Reads a data set once; without features derived from texts, which take longest."""
    found: dict[str, Dataset] = {}

    def read(folder: str) -> Dataset:
        if folder not in found:
            found[folder] = formats.read(shared_data / folder)
        return found[folder]

    return read


@pytest.mark.parametrize(
    ("folder", "users", "items", "interactions"),
    [
        ("amazon2014_beauty", 22363, 12101, 198502),
        ("amazon2014_sports", 35598, 18357, 296337),
        ("amazon2018_instruments", 17112, 6250, 136226),
        ("ml1m", 6040, 3706, 1000209),
        ("ml100k", 943, 1682, 100000),
    ],
)
def test_counts(read, folder, users, items, interactions):
    data = read(folder)
    assert (data.n_users, data.n_items, len(data.histories.items)) == (users, items, interactions)
    assert len(np.unique(data.histories.items)) == items


@pytest.mark.parametrize(
    ("folder", "recall", "ndcg"),
    [
        ("amazon2014_beauty", 0.0110, 0.0053),
        ("amazon2014_sports", 0.0091, 0.0052),
        ("amazon2018_instruments", 0.0680, 0.0453),
        ("ml1m", 0.0394, 0.0194),
    ],
)
def test_most_popular_gives_the_known_numbers(read, folder, recall, ndcg):
    data = read(folder)
    split = leave_one_out(data)
    metrics = evaluate(MostPopular(split.train, data.n_items), split.test, data.n_items, max_length=50)
    assert (round(metrics["recall@10"], 4), round(metrics["ndcg@10"], 4)) == (recall, ndcg)


@pytest.mark.parametrize(
    ("folder", "item", "column", "start"),
    [
        ("amazon2014_beauty", "B004756YJA", "title", "OPI Nail Lacquer, Simmer"),
        ("amazon2014_sports", "1881509818", "categories_and_brand", "Ghost|Hunting"),
        ("ml1m", "1", "plot", "A cowboy doll"),
        ("ml100k", "242", "title", "Kolya"),
    ],
)
def test_texts_belong_to_their_items(read, folder, item, column, start):
    data = read(folder)
    assert data.texts[column][data.item_index(item)].startswith(start)


def test_times_of_movielens(read):
    data = read("ml100k")
    assert data.histories[0].shape == (39,)
    assert data.user_ids[0] == "196"
    times = data.histories.timestamps
    assert (times.min(), times.max()) == (874724710, 893286638)
    assert (np.diff(times)[np.diff(np.repeat(np.arange(data.n_users), data.histories.lengths)) == 0] >= 0).all()


def test_neighbours_by_codes_of_instruments_find_what_comes_next(read):
    """The two latest items' most similar ones hold the test item far more often than chance (.0016) would."""
    data = read("amazon2018_instruments")
    heldout = leave_one_out(data).test
    latest = np.stack([history[-2:] for history in heldout.histories[:1500]])
    for modality, expected in (("text", 0.015), ("image", 0.01)):
        values = data.features[modality].values
        scores = np.stack([values[pair].sum(0) for pair in latest]) @ values.T
        for row, history in zip(scores, heldout.histories, strict=False):
            row[history] = -1
        own = scores[np.arange(1500), heldout.targets[:1500]]
        assert ((scores > own[:, None]).sum(1) < 10).mean() > expected
