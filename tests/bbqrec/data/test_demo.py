"""The generated shop has the structure that it claims."""

import time

import numpy as np
import pytest

from bbqrec.data import leave_one_out
from bbqrec.data.demo import make_demo_dataset
from bbqrec.evaluation import evaluate
from bbqrec.models.most_popular import MostPopular


@pytest.fixture(scope="module")
def demo():
    return make_demo_dataset()


def similarities(features: np.ndarray) -> np.ndarray:
    centred = features - features.mean(0)
    unit = centred / np.linalg.norm(centred, axis=1, keepdims=True)
    return unit @ unit.T


def nearest(features: np.ndarray) -> np.ndarray:
    similarity = similarities(features)
    np.fill_diagonal(similarity, -1)
    return similarity.argmax(1)


def test_size_and_shape(demo):
    assert (demo.n_users, demo.n_items) == (3000, 1000)
    lengths = demo.histories.lengths
    assert lengths.min() >= 5
    assert lengths.max() <= 20
    assert all(len(set(history.tolist())) == len(history) for history in demo.histories)
    assert len(set(demo.texts["title"])) == 1000
    assert 0.02 < 1 - demo.features["image"].present.mean() < 0.08
    assert demo.features["text"].present.all()


def test_same_seed_same_data_and_quickly(demo):
    started = time.process_time()
    assert make_demo_dataset().fingerprint() == demo.fingerprint()
    assert time.process_time() - started < 3
    assert make_demo_dataset(seed=1).fingerprint() != demo.fingerprint()


def test_text_shows_the_object_and_image_shows_the_style(demo):
    objects = np.array([title.removesuffix(" no. 2").split()[-1] for title in demo.texts["title"]])
    styles = np.array([details.split()[-2] for details in demo.texts["details"]])
    text, image = (nearest(demo.features[name].values) for name in ("text", "image"))
    present = demo.features["image"].present
    assert (objects[text] == objects).mean() > 0.9
    assert (styles[image] == styles)[present].mean() > 0.9
    adjectives = np.array([title.split()[0] for title in demo.texts["title"]])
    materials = np.array([title.split()[1] for title in demo.texts["title"]])
    alike = similarities(demo.features["image"].values[present])
    same_style = (styles[:, None] == styles)[np.ix_(present, present)]
    other_words = ((adjectives[:, None] != adjectives) & (materials[:, None] != materials))[np.ix_(present, present)]
    assert alike[same_style & other_words].mean() > alike[~same_style].mean() + 0.3


def test_the_next_item_follows_from_the_last(demo):
    """Ranking by transitions between items beats ranking by popularity by far: order means something."""
    split = leave_one_out(demo)
    follows = np.zeros((demo.n_items, demo.n_items))
    for history in split.train:
        np.add.at(follows, (history[:-1], history[1:]), 1)

    class Transitions(MostPopular):
        def score(self, batch):
            return super().score(batch) * 1e-3 + self.counts.new_tensor(follows[batch.items[batch.last]]).float()

    def recall(ranker):
        return evaluate(ranker(split.train, demo.n_items), split.test, demo.n_items, max_length=50)["recall@10"]

    assert recall(Transitions) > 1.3 * recall(MostPopular)


def test_bad_sizes():
    with pytest.raises(ValueError, match="n_users: got 0"):
        make_demo_dataset(n_users=0)
    with pytest.raises(ValueError, match="n_items: got 39"):
        make_demo_dataset(n_items=39)


@pytest.mark.parametrize(("n_users", "n_items"), [(1, 40), (50, 4000)])
def test_other_sizes(n_users, n_items):
    demo = make_demo_dataset(n_users, n_items)
    assert (demo.n_users, demo.n_items) == (n_users, n_items)
