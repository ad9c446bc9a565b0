"""Item-kNN against its formula, history by history."""

import numpy as np
import pytest

from bbqrec.data.batches import pack_histories
from bbqrec.data.dataset import Features
from bbqrec.models.item_knn import ItemKNN

HISTORIES = [[3, 1, 4], [2], [5, 5]]


def features(width, absent=()):
    generator = np.random.default_rng(width)
    present = ~np.isin(np.arange(6), absent)
    values = generator.standard_normal((6, width)).astype(np.float32) + 3
    return Features(np.where(present[:, None], values, 0).astype(np.float32), present)


def cosines(feature):
    centred = (feature.values - feature.values[feature.present].mean(0)) * feature.present[:, None]
    norms = np.linalg.norm(centred, axis=1, keepdims=True)
    rows = np.divide(centred, norms, out=np.zeros_like(centred), where=norms > 0)
    return rows @ rows.T


@pytest.mark.parametrize("decay", [0, 0.5, 1])
def test_scores_are_decayed_sums_of_cosines(decay):
    sets = {"text": features(7), "image": features(4, absent=[4])}
    similarity = np.mean([cosines(feature) for feature in sets.values()], axis=0)
    scores = ItemKNN(sets, decay).score(pack_histories(HISTORIES, 10)).numpy()
    for history, row in zip(HISTORIES, scores, strict=True):
        expected = sum(decay**age * similarity[item] for age, item in enumerate(reversed(history)))
        np.testing.assert_allclose(row, expected, rtol=1e-4, atol=1e-5)
