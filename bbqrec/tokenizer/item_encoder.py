"""`ItemEncoder`: what a finished run makes of items that it was not trained on.

It reads, beside the weights of the tokenizer, what `save_preparation` writes:

features.parquet   one row a modality: its name, how its features are standardized, and its rows of the directions, if
                   the sequence model reads principal directions: see `principal_directions`
words.parquet      one row a word, if the "text" features were made of texts: see `WordVectors`
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from bbqrec.config import TokenizerConfig
from bbqrec.data.dataset import Features, check_finite
from bbqrec.data.files import atomically, read_parquet
from bbqrec.data.text import WordVectors
from bbqrec.tokenizer.model import ROWS_AT_ONCE, Standardization, encoder, standardize
from bbqrec_kernels import residual_quantize

FEATURES, WORDS, TOKENIZER = "features.parquet", "words.parquet", "tokenizer.safetensors"
FARTHEST = 1e6  # standard deviations from a run's features: further away they are no such features, but an accident


def save_preparation(folder: Path, features: dict[str, Features], directions: Tensor | None) -> None:
    """Writes how the feature sets that a run uses are prepared for its models."""
    used = {name: Standardization.of(feature) for name, feature in features.items()}
    columns = {
        "modality": list(used),
        "mean": [each.mean.tolist() for each in used.values()],
        "constant": [each.constant.tolist() for each in used.values()],
        "scale": [each.scale for each in used.values()],
    }
    if directions is not None:
        blocks = directions.split([len(each.mean) for each in used.values()])
        columns["directions"] = [block.tolist() for block in blocks]
    for feature in features.values():
        if feature.words is not None:
            feature.words.save(folder / WORDS)
    atomically(folder / FEATURES, pl.DataFrame(columns).write_parquet)  # last: it says that all is there


def read_preparation(path: Path) -> tuple[dict[str, Standardization], Tensor | None]:
    """What `save_preparation` wrote: how to standardize, by modality, and the directions, or None."""
    standardizations, blocks = {}, []
    for row in read_parquet(path).iter_rows(named=True):
        mean = np.array(row["mean"])
        standardizations[row["modality"]] = Standardization(mean, np.array(row["constant"]), row["scale"])
        if "directions" in row:
            blocks.append(np.array(row["directions"], np.float32))
            if blocks[-1].shape != (len(mean), blocks[0].shape[1]):
                raise ValueError(f"directions of {row['modality']!r} do not fit its features")
    return standardizations, torch.from_numpy(np.concatenate(blocks)) if blocks else None


def read_encoders(path: Path, widths: list[int], config: TokenizerConfig) -> list[tuple[nn.Module, Tensor]]:
    """Encoders of features of these widths out of a tokenizer's weights, each with its codebooks."""
    state = load_file(path)
    with torch.device("meta"):  # sizes that are not those of the weights allocate nothing
        encoders = nn.ModuleList(encoder(width, config.hidden, config.dim) for width in widths)
    prefix = "encoders."
    own = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    encoders.load_state_dict(own, assign=True)
    books = [0 if config.shared_codebooks else m for m in range(len(widths))]
    return [(each, state[f"quantizers.{book}.codebooks"]) for each, book in zip(encoders, books, strict=True)]


def model_features(standardized: list[Tensor], directions: Tensor | None = None) -> Tensor:
    """What `model.features` reads: all feature sets `(N, F)` side by side, in `directions`.

    Rows are of about unit norm, and every feature set has the same part in that, however wide it is.
    """
    values = torch.cat([rows / (len(standardized) * rows.shape[1]) ** 0.5 for rows in standardized], dim=1)
    return values if directions is None else values @ directions


def catalogue_features(features: Mapping[str, Features], directions: Tensor | None = None) -> Tensor:
    """`model_features` of the items that training knows."""
    return model_features([standardize(feature)[0] for feature in features.values()], directions)


def principal_directions(features: Mapping[str, Features], width: int | None) -> Tensor | None:
    """The orthonormal directions `(F, width)` in which `catalogue_features` vary most; None if there are no more than
    `width`, or that is None.

    An optimizer step maps the features of the whole catalogue, and similarity compares with all of them: there are
    models of text and images with thousands, which say little in most directions.
    """
    if width is None or sum(feature.values.shape[1] for feature in features.values()) <= width:
        return None
    products = sum(rows.double().T @ rows.double() for rows in catalogue_features(features).split(ROWS_AT_ONCE))
    return torch.linalg.eigh(products).eigenvectors[:, -width:].flip(1).float()


@dataclass(frozen=True, eq=False)
class EncodedItems:
    """N items as the models read them.

    Attributes:
        codes: `(N, M, L)` int64, -1 where an item lacks the modality; None of a run without semantic IDs.
        features: `(N, F)` float32, see `model_features`.
        present: `(N, M)` bool.
    """

    codes: Tensor | None
    features: Tensor
    present: np.ndarray


class ItemEncoder:
    """Turns features of items, or their texts where the run's features were made of texts, into `EncodedItems`.

    Args:
        standardizations: of the run's feature sets, by modality.
        directions: see `principal_directions`.
        words: what made its "text" features, None where they were given.
        encoders: of the tokenizer, with the codebooks `(L, K, d)` of each modality; None of a run without semantic IDs.
    """

    def __init__(
        self,
        standardizations: dict[str, Standardization],
        directions: Tensor | None,
        words: WordVectors | None,
        encoders: list[tuple[nn.Module, Tensor]] | None,
    ):
        self.standardizations, self.directions = standardizations, directions
        self.words = words
        self.encoders = encoders

    @torch.no_grad()
    def encode(self, n: int, features: Mapping[str, np.ndarray], texts: list[str] | None) -> EncodedItems:
        """Encodes n items.

        Args:
            features: by modality `(n, F)`, as in the data set that the run was made from; a row of NaN, or a modality
                that is not there, says that an item lacks it.
            texts: one an item, if the run's "text" features were made of texts.

        Raises:
            ValueError: a modality, a shape or a value does not fit, or texts cannot be read.
        """
        values, present = {}, {}
        for name, rows in features.items():
            values[name], present[name] = self._given(n, name, rows)
        if texts is not None:
            values["text"], present["text"] = self._from_texts(n, features, texts)
        standardized, masks, codes = [], [], []
        for m, (name, preparation) in enumerate(self.standardizations.items()):
            mask = present.get(name, np.zeros(n, bool))
            x = preparation.apply(values.get(name, np.zeros((n, len(preparation.mean)), np.float32)), mask)
            if not (x.abs() <= FARTHEST).all():
                raise ValueError(
                    f"features[{name!r}]: got numbers more than {FARTHEST:,.0f} standard deviations from those of the "
                    "run; make them as those of the data set were"
                )
            standardized.append(x)
            masks.append(mask)
            if self.encoders is not None:
                behaviour_aligned, codebooks = self.encoders[m]
                found = residual_quantize(behaviour_aligned(x), codebooks).codes
                codes.append(found.masked_fill(~torch.from_numpy(mask)[:, None], -1))
        features_of_model = model_features(standardized, self.directions)
        return EncodedItems(torch.stack(codes, 1) if codes else None, features_of_model, np.stack(masks, 1))

    def _given(self, n: int, name: str, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if name not in self.standardizations:
            known = ", ".join(map(repr, self.standardizations))
            raise ValueError(f"features: got {name!r}, expected feature sets that the run uses: {known}")
        rows, width = np.asarray(rows), len(self.standardizations[name].mean)
        if rows.shape != (n, width) or rows.dtype.kind not in "fiu":
            raise ValueError(
                f"features[{name!r}]: got {rows.dtype} of shape {rows.shape}, expected numbers of shape ({n}, {width})"
            )
        rows = rows.astype(np.float32)
        present = ~np.isnan(rows).all(1)
        rows = np.where(present[:, None], rows, 0)
        check_finite(rows, f"features[{name!r}]")
        return rows, present

    def _from_texts(self, n: int, features: Mapping[str, np.ndarray], texts: list[str]) -> tuple:
        if "text" not in self.standardizations:
            raise ValueError("texts: got some, but the run uses no 'text' features; leave them out")
        if self.words is None:
            raise ValueError(
                "texts: got some, but the run's 'text' features were made elsewhere; give features={'text': ...} that "
                "the same model made of them"
            )
        if "text" in features:
            raise ValueError("texts: got some, and 'text' features as well; give one of them")
        if len(texts) != n:
            raise ValueError(f"texts: got {len(texts)}, expected {n} (one for each item)")
        return self.words.encode(list(texts))
