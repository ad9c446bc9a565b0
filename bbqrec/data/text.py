"""Features for items that come with texts only."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from bbqrec.data.dataset import Dataset, Features
from bbqrec.data.files import atomically, read_parquet

if TYPE_CHECKING:
    from sklearn.feature_extraction.text import TfidfVectorizer

WIDTH = 128


@dataclass(frozen=True, eq=False)
class WordVectors:
    """How texts became features: for texts to come.

    Attributes:
        words: W words in use, in lower case.
        weights: `(W,)` float32, inverse document frequencies.
        directions: `(W, F)` float32, where a word leads.
    """

    words: list[str]
    weights: np.ndarray
    directions: np.ndarray

    def encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Features `(N, F)` float32 of texts, rows of length 1 or zero, and `(N,)` bool: which have any known word."""
        from sklearn.preprocessing import normalize  # slow to import

        vectorizer = _vectorizer(vocabulary=self.words)
        vectorizer.idf_ = self.weights
        frequencies = vectorizer.transform(texts)
        return normalize(frequencies @ self.directions).astype(np.float32), np.diff(frequencies.indptr) > 0

    def save(self, path: Path) -> None:
        """Writes parquet, a row a word."""
        directions = pl.Series(self.directions, dtype=pl.Array(pl.Float32, self.directions.shape[1]))
        frame = pl.DataFrame({"word": self.words, "weight": self.weights, "direction": directions})
        atomically(path, frame.write_parquet)

    @classmethod
    def load(cls, path: Path) -> WordVectors:
        frame = read_parquet(path)
        return cls(frame["word"].to_list(), frame["weight"].to_numpy(), frame["direction"].to_numpy())


def with_text_features(data: Dataset) -> Dataset:
    """`data`, with "text" features derived from its texts if it has texts but no such features."""
    if "text" in data.features or not data.texts:
        return data
    features = tfidf_svd([data.text(i) for i in range(data.n_items)])
    return data if features is None else replace(data, features={**data.features, "text": features})


def tfidf_svd(texts: list[str], width: int = WIDTH) -> Features | None:
    """Words weighted by TF-IDF, reduced by SVD; rows have length 1.

    Args:
        texts: one an item; items without any word in use lack the modality.
        width: of the features, at most; small catalogues have less.

    Returns None if the texts have no words at all.
    """
    from sklearn.preprocessing import normalize  # slow to import
    from sklearn.utils.extmath import randomized_svd

    if not any(any(character.isalnum() for character in text) for text in texts):
        return None
    vectorizer = _vectorizer()
    weights = vectorizer.fit_transform(texts)  # (n_items, n_words), sparse
    present = np.diff(weights.indptr) > 0
    left, singular_values, right = randomized_svd(weights, min(width, *weights.shape), random_state=0)
    values = np.where(present[:, None], normalize(left * singular_values), 0).astype(np.float32)
    words = WordVectors(
        vectorizer.get_feature_names_out().tolist(), vectorizer.idf_.astype(np.float32), right.T.astype(np.float32)
    )
    return Features(values, present, words)


def _vectorizer(**options: Any) -> TfidfVectorizer:
    from sklearn.feature_extraction.text import TfidfVectorizer  # slow to import

    return TfidfVectorizer(sublinear_tf=True, token_pattern=r"\w+", dtype=np.float32, **options)
