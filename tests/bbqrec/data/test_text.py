"""Features derived from texts."""

import numpy as np

from bbqrec.data.text import WordVectors, tfidf_svd


def test_items_with_common_words_are_near_and_absent_texts_are_absent():
    features = tfidf_svd(
        ["red clay mug", "blue clay mug", "", "steel garden bench", "oak garden bench", "..."], width=3
    )
    assert features.derived
    assert features.present.tolist() == [True, True, False, True, True, False]
    assert features.values.shape == (6, 3)
    assert not features.values[~features.present].any()
    np.testing.assert_allclose(np.linalg.norm(features.values[features.present], axis=1), 1, rtol=1e-5)
    similarity = features.values @ features.values.T
    assert similarity[0, 1] > similarity[0, 3] + 0.3
    assert similarity[3, 4] > similarity[1, 4] + 0.3


def test_it_is_deterministic():
    texts = [f"word{i % 7} word{i % 11} word{i}" for i in range(50)]
    np.testing.assert_array_equal(tfidf_svd(texts).values, tfidf_svd(texts).values)


def test_no_words_no_features():
    assert tfidf_svd(["", "..."]) is None


def test_a_single_item():
    assert tfidf_svd(["mug"]).present.tolist() == [True]


def test_texts_to_come_are_treated_alike(tmp_path):
    texts = ["red clay mug", "blue clay mug", "", "steel garden bench", "oak garden bench", "..."]
    features = tfidf_svd(texts, width=3)
    features.words.save(tmp_path / "words.parquet")
    for words in (features.words, WordVectors.load(tmp_path / "words.parquet")):
        values, present = words.encode([*texts, "a red clay bench", "unheard of"])
        np.testing.assert_allclose(values[:6], features.values, atol=1e-6)
        assert present.tolist() == [*features.present, True, False]
        assert values.dtype == np.float32
        assert values[6] @ features.values[0] > values[6] @ features.values[4] > 0.1
