"""Measures semantic IDs: those of the tokenizer, of plain quantization without it, and of other projects.

    python -m benchmarks.accuracy.semantic_ids --data DATA --out runs/tokenizer --csv FILE [--codes peers.npz]

One row a set of codes and modality. All sets are measured alike, on codes alone:

usage, perplexity    means over levels, of the codebook of that set
collision_rate       share of items whose codes, over all modalities, another item has as well
agreement            share of items whose modalities have the same first code
explained            share of the features' variance that the codes of unseen items explain (5 folds): level by level,
                     the mean of what the levels before left over is taken from the other items with that code
next_l1, next_l2     how much more often an item and the next one of the same user share the first code, or the first
                     two, than two interactions taken at random: what codes know of behaviour (in training)

Sets: `bbqrec` is what `bbqrec tokenize` makes, `residual k-means` quantizes the standardized features as they are, all
modalities by one codebook; `CCA + residual k-means` first projects two modalities on their 64 leading canonical
directions. The arrays of `--codes` belong to the items in the order of the data set.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import torch
from torch import Tensor

from bbqrec import Config, Dataset, tokenize
from bbqrec.data.splits import leave_one_out
from bbqrec.tokenizer.model import standardize
from bbqrec.tokenizer.semantic_ids import SemanticIDs
from bbqrec_kernels import residual_kmeans, residual_quantize
from benchmarks.machine import commit

FOLDS = 5


def plain_codes(data: Dataset, config: Config, aligned: bool) -> Tensor:
    """`(n_items, M, L)` codes of residual k-means over all modalities."""
    tables = [standardize(feature) for feature in data.features.values()]
    rows = [values for values, _ in tables]
    if aligned:
        both = tables[0][1] & tables[1][1]
        rows = canonical(*rows, both, width=config.tokenizer.dim)
    present = torch.stack([mask for _, mask in tables], 1)
    pool = torch.cat([values[mask] for values, (_, mask) in zip(rows, tables, strict=True)])
    generator = torch.Generator().manual_seed(0)
    codebooks = residual_kmeans(pool, config.tokenizer.levels, config.tokenizer.codebook_size, generator=generator)
    codes = torch.stack([residual_quantize(values, codebooks).codes for values in rows], 1)
    return codes.masked_fill(~present[:, :, None], -1)


def canonical(left: Tensor, right: Tensor, both: Tensor, width: int, ridge: float = 0.1) -> list[Tensor]:
    """Both sides in the `width` directions in which they correlate most (CCA, regularized)."""
    whitened = []
    for values in (left, right):
        x = values[both].double()
        energies, directions = torch.linalg.eigh(x.T @ x / len(x))
        whitened.append(values.double() @ (directions * (energies + ridge * energies.mean()).rsqrt()))
    u, _, v = torch.linalg.svd(whitened[0][both].T @ whitened[1][both])
    return [(whitened[0] @ u[:, :width]).float(), (whitened[1] @ v.T[:, :width]).float()]


def explained(codes: Tensor, values: Tensor, codebook_size: int) -> float:
    """See `explained` above: codes `(N, L)`, centred features `(N, F)`."""
    folds = torch.randperm(len(codes), generator=torch.Generator().manual_seed(0)) % FOLDS
    error = 0.0
    for fold in range(FOLDS):
        rest, known = values.double(), folds != fold
        for code in codes.T:
            sums = torch.zeros(codebook_size, values.shape[1], dtype=torch.float64).index_add_(
                0, code[known], rest[known]
            )
            counts = torch.bincount(code[known], minlength=codebook_size).clamp_min(1)
            rest = rest - (sums / counts[:, None])[code]
        error += rest[~known].square().sum().item()
    return 1 - error / values.double().square().sum().item()


def lift_of_next(codes: Tensor, data: Dataset, levels: int) -> float:
    """See `next_l1` above: codes `(n_items, L)`; how much likelier agreement on the first `levels` is."""
    train = leave_one_out(data).train
    follows = np.ones(len(train.items), bool)
    follows[train.offsets[:-1][train.lengths > 0]] = False
    items, after = torch.from_numpy(train.items), torch.from_numpy(follows).nonzero()[:, 0]
    _, words = codes[:, :levels].unique(dim=0, return_inverse=True)
    there = codes[:, 0] >= 0
    left, right = items[after - 1], items[after]
    fits = there[left] & there[right]
    shares = torch.bincount(words[items[there[items]]]).double()
    by_chance = (shares / shares.sum()).square().sum()
    return ((words[left] == words[right])[fits].double().mean() / by_chance).item()


def rows_of(name: str, ids: SemanticIDs, data: Dataset) -> Iterator[dict[str, object]]:
    for m, modality in enumerate(ids.modalities):
        codes = ids.codes[:, m]
        mine = SemanticIDs((modality,), codes[:, None], ids.codebooks)
        usage = mine.usage()
        feature = data.features.get(modality)
        row = {
            "codes": name,
            "modality": modality,
            "levels": codes.shape[1],
            "codebook_size": ids.codebook_size,
            "usage": np.mean(usage["usage"]),
            "perplexity": np.mean(usage["perplexity"]),
            "collision_rate": ids.collision_rate(),
            "agreement": ids.agreement(),
            "explained": None,
            "next_l1": lift_of_next(codes, data, 1),
            "next_l2": lift_of_next(codes, data, 2),
        }
        if feature is not None:
            values, present = standardize(feature)
            present &= codes[:, 0] >= 0
            row["explained"] = explained(codes[present], values[present], ids.codebook_size)
        yield {key: round(float(v), 4) if isinstance(v, float) else v for key, v in row.items()}


def code_sets(arguments: argparse.Namespace, data: Dataset) -> Iterator[tuple[str, SemanticIDs]]:
    config = Config().override(arguments.set)
    run = tokenize(data, arguments.out, config=config)
    names = tuple(name for name in data.features if f"codes/{name}" in run.items.columns)
    data = replace(data, features={name: data.features[name] for name in names})
    codes = torch.tensor(np.stack([run.items[f"codes/{name}"].to_list() for name in names], 1))
    books = torch.empty(1, 0, config.tokenizer.codebook_size, 0)  # only the size counts here
    yield "bbqrec", SemanticIDs(names, codes, books)
    if len({feature.values.shape[1] for feature in data.features.values()}) == 1:
        yield "residual k-means", SemanticIDs(names, plain_codes(data, config, aligned=False), books)
    if len(names) == 2:
        yield "CCA + residual k-means", SemanticIDs(names, plain_codes(data, config, aligned=True), books)
    if arguments.codes:
        with np.load(arguments.codes) as arrays:
            for name, array in arrays.items():
                peer = torch.from_numpy(array.astype(np.int64))[:, None]
                if len(peer) != data.n_items:
                    raise ValueError(f"{name}: got {len(peer)} rows, expected {data.n_items} (one for each item)")
                yield name, SemanticIDs(("text",), peer, torch.empty(1, 0, int(peer.max()) + 1, 0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="data set")
    parser.add_argument("--out", type=Path, required=True, help="run folder of the tokenizer")
    parser.add_argument("--csv", type=Path, required=True, help="file to write")
    parser.add_argument("--codes", type=Path, help=".npz of other projects' codes, for the modality text")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="options of the tokenizer")
    arguments = parser.parse_args()

    data = Dataset.load(arguments.data)
    rows = [row for name, ids in code_sets(arguments, data) for row in rows_of(name, ids, data)]
    table = pl.DataFrame(rows, infer_schema_length=None).with_columns(data=pl.lit(data.name), commit=pl.lit(commit()))
    arguments.csv.parent.mkdir(parents=True, exist_ok=True)
    table.write_csv(arguments.csv)
    with pl.Config(tbl_rows=-1, tbl_cols=-1, tbl_width_chars=200, fmt_str_lengths=50):
        print(table.drop("data", "commit"))


if __name__ == "__main__":
    main()
