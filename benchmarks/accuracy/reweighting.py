"""What it is worth to reweight attention by similarity: variations of its terms, with the same codes and seeds, paired.

    python -m benchmarks.accuracy.reweighting --data DATA --out runs/NAME --csv benchmarks/results/reweighting/NAME.csv
    python -m benchmarks.accuracy.reweighting --table benchmarks/results/reweighting/*.csv    # of files written before

The tokenizer is trained once a seed. Then every variation of the sequence model is trained to its best epoch. A row is
one of them and a seed; rows that the file has are not measured again. `VARIATIONS` says what they are.

Beside its own metrics, a row has those with what is added to the scores afterwards, weighted on validation: the
features' similarity to the history, as `model.similarity_output` adds it, and the lift of the codes shared with it
(`Reranked`).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from bbqrec import Config, Dataset, tokenize
from bbqrec.data.batches import PackedBatch, TrainingBatches
from bbqrec.data.dataset import Histories
from bbqrec.data.splits import Split, leave_one_out
from bbqrec.evaluation.ranking import evaluate
from bbqrec.models.sequence_model import TIME_BUCKETS, SequenceModel, attention_channels
from bbqrec.tokenizer import Tokenizer
from bbqrec.tokenizer.item_encoder import catalogue_features, principal_directions
from bbqrec.tokenizer.semantic_ids import SemanticIDs
from bbqrec.training.fit import best_similarity
from bbqrec.training.modules import SequenceModule
from bbqrec.training.run import device, versions
from bbqrec.training.trainer import Stage, train
from bbqrec_kernels import Term, cosine, gap, pack, prefix
from benchmarks.accuracy.table import paired
from benchmarks.machine import commit

PAIRS = 200_000  # of items, drawn to count by how much likelier than by chance a bucket is in a history
COSINE_BUCKETS = 8


@dataclass(frozen=True)
class Variation:
    """Which terms attention has, and how their tables are trained.

    Attributes:
        terms: "prefix" compares codes, as the product does; "cosine" features, with buckets that are equally frequent
            in histories; "place" and "time" are gaps; "own" is a bucket for the querying item itself.
        lift: tables start as the logarithm of how much likelier than by chance their bucket is in a history; at zero
            otherwise.
        speed: of the tables' learning rate, times that of the rest; above 1 they have no weight decay either.
    """

    terms: tuple[str, ...] = ()
    lift: bool = False
    speed: float = 1.0


VARIATIONS = {
    "none": Variation(),
    "prefix": Variation(("prefix",)),
    "prefix, fast": Variation(("prefix",), speed=20),
    "prefix + own, fast": Variation(("prefix", "own"), speed=20),
    "prefix + own, lift": Variation(("prefix", "own"), lift=True),
    "cosine + own, fast": Variation(("cosine", "own"), speed=20),
    "cosine + own, lift": Variation(("cosine", "own"), lift=True),
    "place": Variation(("place",)),
    "prefix + place": Variation(("prefix", "place")),
    "prefix + place, fast": Variation(("prefix", "place"), speed=20),
    "time": Variation(("time",)),
    "prefix + place + time": Variation(("prefix", "place", "time")),
}


class Comparisons:
    """What terms compare of a catalogue's items: one channel for each pair of modalities, one for all features."""

    def __init__(self, data: Dataset, split: Split, config: Config, semantic_ids: SemanticIDs, seed: int):
        self.codes, self.codebook_size = semantic_ids.codes, semantic_ids.codebook_size
        self.channels = attention_channels(self.codes.shape[1], config.model, semantic_ids.is_shared)
        self.vectors = nn.functional.normalize(catalogue_features(data.features), dim=1)
        together, apart = _pairs(split.train, config.model.max_length, seed)
        shares = torch.linspace(0, 1, COSINE_BUCKETS + 1)[1:-1]
        self.boundaries = self._cosines(*together).quantile(shares)
        counted = {
            "prefix": (self._matches, self.codes.shape[2] + 1),
            "cosine": (lambda *pair: torch.bucketize(self._cosines(*pair), self.boundaries)[:, None], COSINE_BUCKETS),
        }
        self.lifts = {name: _lift(bucket(*together), bucket(*apart), n) for name, (bucket, n) in counted.items()}

    def _matches(self, left: Tensor, right: Tensor) -> Tensor:
        """Leading codes that agree, `(N, channels)`."""
        of_left, of_right = zip(*self.channels, strict=True)
        query, key = self.codes[left][:, of_left], self.codes[right][:, of_right]
        return ((query == key) & (query >= 0)).long().cumprod(2).sum(2)

    def _cosines(self, left: Tensor, right: Tensor) -> Tensor:
        return (self.vectors[left] * self.vectors[right]).sum(1)


def _pairs(train: Histories, max_length: int, seed: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Items that are in a history at two different places, less than `max_length` apart, and items that are drawn
    independently, as often as they occur."""
    draw = np.random.default_rng(seed)
    first = draw.integers(len(train.items), size=4 * PAIRS)
    second = first + draw.integers(1, max_length, size=len(first))
    history = np.repeat(np.arange(len(train)), train.lengths)
    inside = second < len(train.items)
    first, second = first[inside], second[inside]
    same = history[first] == history[second]
    together = train.items[first[same]][:PAIRS], train.items[second[same]][:PAIRS]
    apart = draw.choice(train.items, (2, PAIRS))
    return tuple(map(torch.from_numpy, together)), tuple(map(torch.from_numpy, apart))


def _lift(together: Tensor, apart: Tensor, buckets: int) -> Tensor:
    """`(channels, buckets)`: log of the share of pairs in a bucket, together against apart."""
    counts = [
        torch.stack([column.bincount(minlength=buckets) for column in pairs.unbind(1)]) for pairs in (together, apart)
    ]
    return torch.log((counts[0] + 1) / len(together)) - torch.log((counts[1] + 1) / len(apart))


class VariedModel(SequenceModel):
    """A sequence model whose attention has the terms of a variation."""

    def __init__(self, compared: Comparisons, variation: Variation, config: Config, *catalogue):
        super().__init__(len(compared.codes), config.override({"model.reweighting": False}).model, *catalogue)
        self.comparisons, self.variation = compared, variation
        self.own_tables = nn.ParameterDict({name: self._table(name) for name in variation.terms})

    def _table(self, name: str) -> nn.Parameter:
        """`(layers, channels, heads, buckets)`. Channels say much the same, so each has its part of the lift."""
        buckets = {"own": 2, "place": (self.config.max_length - 1).bit_length() + 1, "time": TIME_BUCKETS}
        if name in buckets:
            return nn.Parameter(torch.zeros(self.config.layers, 1, self.config.heads, buckets[name]))
        lift = self.comparisons.lifts[name] / len(self.comparisons.lifts[name])
        start = lift if self.variation.lift else torch.zeros_like(lift)
        return nn.Parameter(start[None, :, None].repeat(self.config.layers, 1, self.config.heads, 1))

    def _terms(self, batch: PackedBatch) -> list[list[Term]]:
        makers = {name: getattr(self, f"_{name}")(batch) for name in self.own_tables}
        return [
            [make(self.own_tables[name][layer]) for name, make in makers.items()] for layer in range(self.config.layers)
        ]

    def _prefix(self, batch: PackedBatch) -> Callable[[Tensor], Term]:
        left, right = zip(*self.comparisons.channels, strict=True)
        codes, size = self.comparisons.codes[batch.items], self.comparisons.codebook_size
        query, key = pack(codes[:, left], size), pack(codes[:, right], size)
        return lambda table: prefix(query, table, key_codes=key)

    def _cosine(self, batch: PackedBatch) -> Callable[[Tensor], Term]:
        vectors = self.comparisons.vectors[batch.items][:, None]
        return lambda table: cosine(vectors, table, boundaries=self.comparisons.boundaries)

    def _place(self, batch: PackedBatch) -> Callable[[Tensor], Term]:
        return partial(gap, batch.positions[:, None])

    _own = _place  # of whose table the last bucket holds all other places

    def _time(self, batch: PackedBatch) -> Callable[[Tensor], Term]:
        return partial(gap, batch.timestamps[:, None])


class VariedModule(SequenceModule):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        speed, options = self.model.variation.speed, self.config.training
        tables = list(self.model.own_tables.parameters())
        if speed == 1 or not tables:
            return super().configure_optimizers()
        held_out = {id(table) for table in tables}
        others = [parameter for parameter in self.parameters() if id(parameter) not in held_out]
        groups = [
            {"params": others, "weight_decay": options.weight_decay},
            {"params": tables, "lr": options.learning_rate * speed, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=options.learning_rate)


class Reranked(nn.Module):
    """A model whose scores get, for all items of a history, the lift of the codes that a candidate shares with them.

    An item that lacks a modality shares no code there.
    """

    def __init__(self, model: VariedModel):
        super().__init__()
        self.model, self.weight, self.decay = model, 0.0, 0.0
        compared = model.comparisons
        self.shared = []  # for each modality and depth: number of each item's prefix, and what sharing it is worth
        for channel, (left, right) in enumerate(compared.channels):
            if left != right:
                continue
            steps = compared.lifts["prefix"][channel].diff() / compared.codes.shape[1]
            for depth, step in enumerate(steps.tolist(), 1):
                codes = compared.codes[:, left, :depth]
                number = codes.unique(dim=0, return_inverse=True)[1]
                self.shared.append((number, step, codes[:, 0] >= 0))

    def item_vectors(self) -> Tensor:
        return self.model.item_vectors()

    def score(self, batch: PackedBatch, vectors: Tensor) -> Tensor:
        scores = self.model.score(batch, vectors)
        if not self.weight:
            return scores
        token = torch.arange(len(batch.items))
        history = torch.bucketize(token, batch.cu_seqlens[1:].long(), right=True)
        weights = self.weight * self.decay ** (batch.last[history] - token)
        for number, step, present in self.shared:
            profiles = scores.new_zeros(len(scores), int(number.max()) + 1)
            of_item = number[batch.items]
            profiles.index_put_((history, of_item), weights * present[batch.items], accumulate=True)
            scores += step * profiles[:, number] * present
        return scores


def measure(
    data: Dataset, split: Split, config: Config, variation: Variation, semantic_ids: SemanticIDs, folder: Path
) -> list[dict[str, object]]:
    """Trains one variation and returns the metrics of both splits."""
    started = time.perf_counter()
    seed, max_length = config.training.seed, config.model.max_length
    compared = Comparisons(data, split, config, semantic_ids, seed)
    torch.manual_seed(seed)
    features = None
    if config.model.features:
        features = catalogue_features(data.features, principal_directions(data.features, config.model.feature_width))
    model = VariedModel(compared, variation, config, semantic_ids, features)
    batches = TrainingBatches(split.train, max_length, config.training.batch_tokens, seed)
    module = VariedModule(model, config, batches, data.user_ids, split.validation, data.n_items)
    options = config.training
    best = train(module, Stage(folder, "sequence_model", options.epochs, options.patience, options.decay_after))
    module.load_state_dict(best["state_dict"])
    model.forget_ids(split.train_items)
    facts = {"epochs": best["epoch"] + 1, "seconds": round(time.perf_counter() - started, 1)}
    model.eval()
    tables = {name: table.abs().max().item() for name, table in model.own_tables.items()}
    print(f"largest bias: {tables}; epoch {facts['epochs']}", flush=True)

    heldout = {"validation": split.validation, "test": split.test}
    reranked = Reranked(model)
    rows = {name: {"split": name, **facts} for name in heldout}

    def note(ranker: nn.Module, suffix: str = "") -> None:
        for name, part in heldout.items():
            found = evaluate(ranker, part, data.n_items, max_length=max_length)
            rows[name] |= {f"{metric}{suffix}": round(found[metric], 5) for metric in ("recall@10", "ndcg@10")}

    note(model)
    for suffix, weighted in (("+features", [model]), ("+codes", [reranked]), ("+features+codes", [model, reranked])):
        for ranker in weighted:
            _weigh(ranker, split, data.n_items, max_length)
        note(reranked, suffix)
        for ranker in (model, reranked):
            _set_weight(ranker, 0.0, 0.0)
    return list(rows.values())


def _weigh(ranker: nn.Module, split: Split, n_items: int, max_length: int) -> None:
    """By validation, as `fit` does."""
    if isinstance(ranker, VariedModel) and ranker.similarity_weight is None:
        return

    def found(weight: float, decay: float) -> float:
        _set_weight(ranker, weight, decay)
        return evaluate(measured, split.validation, n_items, max_length=max_length)["ndcg@10"]

    measured = ranker
    _set_weight(ranker, *best_similarity(found)[:2])


def _set_weight(ranker: nn.Module, weight: float, decay: float) -> None:
    if isinstance(ranker, Reranked):
        ranker.weight, ranker.decay = weight, decay
    elif ranker.similarity_weight is not None:
        ranker.similarity_weight.fill_(weight)
        ranker.similarity_decay.fill_(decay)


def codes_of(data: Dataset, config: Config, folder: Path) -> SemanticIDs:
    """The semantic IDs of `bbqrec tokenize`, made there or found."""
    tokenize(data, folder, config=config, progress=False)
    tokenizer = Tokenizer(data.features, data.n_items, config.tokenizer, config.model.max_length)
    tokenizer.load_state_dict(load_file(folder / "tokenizer.safetensors"))
    return tokenizer.eval().semantic_ids()


def table_of(files: list[Path]) -> str:
    """One line a data set, options and variation: test NDCG@10, and the difference to no terms, paired by seed."""
    kinds = {"": "scores as they are", "+features": "+ similarity of features", "+codes": "+ of codes"}
    head = ["data", "options", "terms", "seeds", *kinds.values(), "+ of both"]
    kinds["+features+codes"] = head[-1]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for path in files:
        rows = pl.read_csv(path).filter(split="test").fill_null("")
        for (data, options, name), chosen in rows.group_by("data", "options", "variation", maintain_order=True):
            plain = rows.filter(data=data, options=options, variation="none")
            cells = [data, f"`{options}`" if options else "", name, str(len(chosen))]
            for kind in kinds:
                column = f"ndcg@10{kind}"
                mean = f"{chosen[column].mean():.4f}".removeprefix("0")
                over = paired(chosen, plain, column)
                cells.append(f"{mean}, {over}" if over else mean)
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, nargs="+", help="files to show in one table, instead of measuring")
    parser.add_argument("--data", type=Path, help="data set")
    parser.add_argument("--out", type=Path, help="folder of the run folders")
    parser.add_argument("--csv", type=Path, help="file to write, or to add rows to")
    parser.add_argument("--variations", nargs="+", choices=VARIATIONS, default=["none", "prefix"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="options of all runs")
    arguments = parser.parse_args()
    if arguments.table:
        print(table_of(arguments.table))
        return
    if not (arguments.data and arguments.out and arguments.csv):
        parser.error("--data, --out and --csv are needed to measure")

    data, options = Dataset.load(arguments.data), " ".join(arguments.set)
    timed = [name for name in arguments.variations if "time" in VARIATIONS[name].terms]
    if timed and data.histories.timestamps is None:
        parser.error(f"--variations: got {', '.join(timed)}, but {arguments.data} has no timestamps; leave it out")
    split, config = leave_one_out(data), Config().override(arguments.set)
    keys = ["options", "variation", "seed"]
    done = pl.read_csv(arguments.csv).fill_null("") if arguments.csv.exists() else pl.DataFrame()
    arguments.csv.parent.mkdir(parents=True, exist_ok=True)
    for seed in arguments.seeds:
        seeded = config.override({"training.seed": seed})
        for name in arguments.variations:
            if len(done) and (options, name, seed) in done.select(keys).rows():
                continue
            folder = arguments.out / " ".join([options, str(seed)]).strip()
            codes = codes_of(data, seeded, folder / "codes")
            rows = measure(data, split, seeded, VARIATIONS[name], codes, folder / name)
            made = {"data": data.name, "options": options, "variation": name, "seed": seed}
            facts = {**versions(), "commit": commit(), "device": device()}
            done = pl.concat([done, pl.DataFrame([{**made, **row, **facts} for row in rows])], how="diagonal_relaxed")
            done.write_csv(arguments.csv)
            print(rows[1] | made, flush=True)
    print(table_of([arguments.csv]))


if __name__ == "__main__":
    main()
