"""Features for items that come with texts only."""

from __future__ import annotations

import numpy as np

from bbqrec.data.dataset import Dataset, Features

WIDTH = 128


def with_text_features(data: Dataset) -> Dataset:
    """`data`, with "text" features derived from its texts if it has texts but no such features."""
    if "text" in data.features or not data.texts:
        return data
    features = tfidf_svd([data.text(i) for i in range(data.n_items)])
    return data if features is None else data.with_features("text", features)


def tfidf_svd(texts: list[str], width: int = WIDTH) -> Features | None:
    """Words weighted by TF-IDF, reduced by SVD; rows have length 1.

    Args:
        texts: one an item; items without any word in use lack the modality.
        width: of the features, at most; small catalogues have less.

    Returns None if the texts have no words at all.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer  # slow to import
    from sklearn.preprocessing import normalize
    from sklearn.utils.extmath import randomized_svd

    if not any(any(character.isalnum() for character in text) for text in texts):
        return None
    words = TfidfVectorizer(sublinear_tf=True, token_pattern=r"\w+", dtype=np.float32)
    weights = words.fit_transform(texts)  # (n_items, n_words), sparse
    present = np.diff(weights.indptr) > 0
    left, singular_values, _ = randomized_svd(weights, min(width, *weights.shape), random_state=0)
    values = normalize(left * singular_values)
    return Features(np.where(present[:, None], values, 0).astype(np.float32), present, derived=True)
