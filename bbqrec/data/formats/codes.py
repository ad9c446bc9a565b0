"""Integer codes of items, such as semantic IDs of other projects, as features.

The size of a code says nothing: code 7 is no nearer to 8 than to 200. What codes do say is which items share one, level
by level. So the codes of each level are written one-hot and the levels put side by side. A residual quantizer describes
in each level what the ones before have left over, less and less of it; so the one-hot vector of level l (from 0) has
squared length 2^-l. The dot product of two items is then the sum of 2^-l over the levels in which they agree: agreement
in one level counts for more than in all later ones together, and agreement in later levels still counts where a level
before differs, because all items share a level's codebook.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np

from bbqrec.data.dataset import Features
from bbqrec.data.files import BROKEN_NPZ, one_line, read_npz_array

LARGEST = 2**34  # bytes of the features that codes become


def read_codes(path: Path, n_items: int) -> dict[str, Features]:
    """Features by modality from an `.npz` of code arrays, a row an item in the order of the catalogue.

    The modality is what the name of an array says before its first underscore: `text_llama__v1` holds codes of texts.
    The first array of each modality in the file counts; others are further versions of the same and are not read.
    To use one of those: `data.with_features("text", one_hot_codes(np.load(path)["text_llama__v1"]))`.

    Raises `ValueError` naming the file and the array of the first fault.
    """
    features = {}
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path}: is no .npz file; write it with numpy.savez")
    try:
        with zipfile.ZipFile(path) as file:
            first = {}
            for member in file.infolist():
                name = member.filename.removesuffix(".npy")
                first.setdefault(name.partition("_")[0], (name, member))
            codes = {modality: (name, read_npz_array(file, member)) for modality, (name, member) in first.items()}
    except BROKEN_NPZ as error:
        reason = one_line(error)
        raise ValueError(f"{path}: holds an array that cannot be read ({reason}); write it with numpy.savez") from None
    if not codes:
        raise ValueError(f"{path}: holds no arrays, expected codes of shape ({n_items}, levels)")
    for modality, (name, array) in codes.items():
        if array.ndim == 2 and len(array) != n_items:
            raise ValueError(f"{path}: {name} has {len(array)} rows, expected {n_items} (one for each item)")
        try:
            features[modality] = one_hot_codes(array)
        except (ValueError, TypeError) as error:
            raise type(error)(f"{path}: {name}: {error}") from None
    return features


def one_hot_codes(codes: np.ndarray) -> Features:
    """Codes as vectors: one-hot for each level, the squared length of level l (from 0) being 2^-l; see this module.

    Args:
        codes: `(n_items, L)` integers from 0; a row of -1 says that the item has none.

    Returns features as wide as there are different codes in use, summed over the levels.

    Raises `TypeError` (no integers) and `ValueError` (shape, other negative codes, no item with codes, or so many
    different ones that the features would take more than 16 GiB).
    """
    if codes.dtype.kind not in "iu":
        raise TypeError(f"codes: got {codes.dtype}, expected integers")
    if codes.ndim != 2 or not codes.shape[1]:
        raise ValueError(f"codes: got shape {codes.shape}, expected (n_items, levels)")
    absent = (codes == -1).all(1)
    bad = (codes < 0).any(1) & ~absent
    if bad.any():
        raise ValueError(
            f"codes: row {bad.argmax() + 1} (counted from 1) has {codes[bad.argmax()].min()}, "
            "expected codes from 0, or -1 in every level of an item without any"
        )
    rows = np.flatnonzero(~absent)
    if not len(rows):
        raise ValueError("codes: no item has any; leave this modality out")
    levels = [np.unique(column, return_inverse=True) for column in codes[rows].T]
    width = sum(len(used) for used, _ in levels)
    if len(codes) * width * 4 > LARGEST:
        raise ValueError(
            f"codes: got {width:,} different ones for {len(codes):,} items, whose features would be "
            f"{len(codes) * width * 4 / 2**30:,.1f} GiB, expected at most {LARGEST / 2**30:g}; leave out levels"
        )
    values, start = np.zeros((len(codes), width), np.float32), 0
    for level, (used, index) in enumerate(levels):
        values[rows, start + index] = 2 ** (-level / 2)
        start += len(used)
    return Features(values, ~absent)
