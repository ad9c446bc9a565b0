"""The facts of a finished run, as plain values: what `report.html` and `bbqrec inspect` show."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from bbqrec.config import Config
from bbqrec.data.batches import PackedBatch, pack_histories
from bbqrec.data.dataset import Dataset
from bbqrec.data.splits import Heldout
from bbqrec.evaluation.ranking import ranks
from bbqrec.models.sequence_model import SequenceModel
from bbqrec.models.tiger import Tiger
from bbqrec.tokenizer.semantic_ids import SemanticIDs, decode
from bbqrec.training.plots import STAGES, read_log
from bbqrec.training.run import Run

MAP_ITEMS = 2000  # at most: bounds the time of the map, and the size of the page
EXAMPLES = 4  # users
HISTORY_SHOWN = 10  # latest items of an example's history
RECOMMENDED = 10
GROUPS = 12  # most used first codes
NAMED = 4  # items of a group, or of those that share a semantic ID


def collect(run: Run, metrics: dict[str, Any]) -> dict[str, Any]:
    """Facts of a run whose model is at hand; what does not apply to the model has no key.

    Args:
        run: with its data set, model and table of items; `metrics.json` is not read.
        metrics: what it holds, or will.

    Returns:
        Values that JSON can hold. "run": what was trained, on what, at what cost. "curves": by stage, columns over
        epochs. "metrics". With semantic IDs "codebooks", "collisions" and "groups" (items by first code); "map":
        places of items in two dimensions; with tables in attention "reweighting"; "examples": users of the test split.
        Where the data set is not where it was, or has changed, what only it knows is missing, and "left_out" says so.

    Raises `ValueError` where a file of the run is damaged, or a data set that was given is another.
    """
    model, data = run.model, None
    try:
        data = run.data
    except ValueError as error:
        if run.has_data_given:
            raise
        why = str(error)
    titles = run.items["title"].to_list()
    semantic_ids = _semantic_ids(run)
    labels = None if semantic_ids is None else _first_codes(semantic_ids)
    facts = {"run": _run(run, data), "curves": _curves(run), "metrics": metrics}
    if data is None:
        facts["left_out"] = (
            f"Without the data set there are no counts of users and interactions, and no examples. {why}"
        )
    if semantic_ids is not None:
        facts["codebooks"] = _codebooks(semantic_ids, run.tokenizer_figures)
        facts["collisions"] = _collisions(semantic_ids, titles)
        facts["groups"] = _groups(labels, titles)
    facts["map"] = _map(run, semantic_ids, labels, titles)
    modalities = () if semantic_ids is None else semantic_ids.modalities
    if tables := _reweighting(model, modalities):
        facts["reweighting"] = tables
    if data is None:
        return facts
    facts["examples"] = _examples(model, run.config, data, run.split.test, titles, has_tables=bool(tables))
    return facts


def _run(run: Run, data: Dataset | None) -> dict[str, Any]:
    recorded = run.facts
    return {
        "model": run.config.model_name,
        "data": recorded["data"]["name"],
        "users": None if data is None else data.n_users,
        "items": len(run.items),
        "interactions": None if data is None else len(data.histories.items),
        "seed": run.config.training.seed,
        "max_length": run.config.model.max_length,
        "seconds": recorded.get("seconds"),
        "peak_memory_mb": recorded.get("peak_memory_mb"),
        "device": recorded.get("device"),
        "versions": recorded["versions"],
        "similarity": _similarity(run.model),
    }


def _similarity(model: SequenceModel | Tiger) -> dict[str, float] | None:
    """What `model.similarity_output` came to; None where scores are without."""
    if isinstance(model, Tiger) or not model.adds_similarity:
        return None
    return {"weight": round(model.similarity_weight.item(), 6), "decay": round(model.similarity_decay.item(), 6)}


def _curves(run: Run) -> dict[str, dict[str, list]]:
    """By stage: "epoch", counted from 1, and the columns of the log but "step"."""
    curves = {}
    for stage in STAGES:
        log = read_log(run.folder / "logs" / stage)
        if len(log):
            columns = {name: log[name].to_list() for name in log.columns if "/" in name}
            curves[stage] = {"epoch": (log["epoch"] + 1).to_list(), **columns}
    return curves


def _semantic_ids(run: Run) -> SemanticIDs | None:
    """As `Run.semantic_ids`, of a run that need not be finished."""
    if not run.model.has_semantic_ids:
        return None
    return SemanticIDs(run.modalities, run.model.codes, run.model.codebooks.detach())


def _codebooks(semantic_ids: SemanticIDs, figures: dict[str, Any]) -> dict[str, Any]:
    """The tokenizer's figures, and how many items each codeword has: by modality and level, the most used first."""
    size = semantic_ids.codebook_size
    counts = {}
    for name, codes in zip(semantic_ids.modalities, semantic_ids.codes.unbind(1), strict=True):
        present = codes[(codes >= 0).all(1)]
        counts[name] = [torch.bincount(level, minlength=size).sort(descending=True)[0].tolist() for level in present.T]
    return {
        "levels": semantic_ids.codes.shape[2],
        "size": size,
        "shared": semantic_ids.is_shared,
        **{key: value for key, value in figures.items() if key != "collision_rate"},
        "counts": counts,
    }


def _collisions(semantic_ids: SemanticIDs, titles: list[str]) -> dict[str, Any]:
    """How many items share all their codes with how many others. "sizes": pairs (items that share, such groups)."""
    _, inverse, counts = semantic_ids.codes.flatten(1).unique(dim=0, return_inverse=True, return_counts=True)
    sizes, groups = counts.unique(return_counts=True)
    largest = (inverse == counts.argmax()).nonzero()[:, 0].tolist()
    return {
        "rate": semantic_ids.collision_rate(),
        "items": len(inverse),
        "distinct": len(counts),
        "sizes": list(zip(sizes.tolist(), groups.tolist(), strict=True)),
        "largest": [titles[i] for i in largest[:NAMED]] if len(largest) > 1 else [],
    }


def _first_codes(semantic_ids: SemanticIDs) -> list[str]:
    """The first code of every item, in its first modality; with the modality's name where each has codes of its own."""
    labels = []
    for codes in semantic_ids.codes[:, :, 0].tolist():
        modality = next((m for m, code in enumerate(codes) if code >= 0), None)
        if modality is None:
            labels.append("none")
        elif semantic_ids.is_shared:
            labels.append(str(codes[modality]))
        else:
            labels.append(f"{semantic_ids.modalities[modality]} {codes[modality]}")
    return labels


def _groups(labels: list[str], titles: list[str]) -> list[dict[str, Any]]:
    """The first codes that most items have, with some of these."""
    members: dict[str, list[int]] = {}
    for item, label in enumerate(labels):
        members.setdefault(label, []).append(item)
    ordered = sorted(members.items(), key=lambda pair: -len(pair[1]))  # stable: ties in the order of the items
    return [
        {"code": label, "items": len(items), "titles": [titles[i] for i in items[:NAMED]]}
        for label, items in ordered[:GROUPS]
    ]


def _map(run: Run, semantic_ids: SemanticIDs | None, labels: list[str] | None, titles: list[str]) -> dict[str, Any]:
    """Where items lie in two dimensions, from -1 to 1: every one, or evenly spaced ones of a large catalogue."""
    model = run.model
    if isinstance(model, Tiger):
        vectors, of_what = decode(model.codes, model.codebooks), "what the codes of an item decode to"
    else:
        vectors, of_what = model.item_vectors(), "the vectors that the model reads for items"
    shown = np.linspace(0, len(titles) - 1, min(len(titles), MAP_ITEMS)).astype(int)
    places = _two_dimensions(vectors.detach().cpu().numpy()[shown])
    item_ids = run.items["item"].to_list()
    points = []
    for item, (x, y) in zip(shown.tolist(), places.tolist(), strict=True):
        point = {"item": item_ids[item], "title": titles[item], "x": x, "y": y}
        if semantic_ids is not None:
            point |= {"code": labels[item], "semantic_id": semantic_ids.text(item)}
        points.append(point)
    return {"of_what": of_what, "items": len(titles), "points": points}


def _two_dimensions(vectors: np.ndarray) -> np.ndarray:
    """t-SNE that starts from the two principal components: neighbours stay neighbours. The same bits every time."""
    from sklearn.manifold import TSNE  # takes a second to import

    with threadpool_limits(1):  # sums of several threads have no fixed order
        centred = vectors.astype(np.float64)
        centred -= centred.mean(0)
        centred[np.abs(centred) <= np.finfo(np.float32).eps * np.abs(vectors).max(initial=0)] = 0  # rounding errors
        _, _, axes = np.linalg.svd(centred, full_matrices=False)
        axes *= np.sign(axes[np.arange(len(axes)), np.abs(axes).argmax(1)])[:, None]
        places = np.zeros((len(vectors), 2))
        main = centred @ axes[:2].T
        places[:, : main.shape[1]] = main
        if len(vectors) >= 8 and places.any():  # fewer have no neighbourhoods
            start = (places / places[:, 0].std() * 1e-4).astype(np.float32)
            perplexity = min(30, (len(vectors) - 1) / 3)
            tsne = TSNE(2, init=start, perplexity=perplexity, max_iter=500, random_state=0)
            places = tsne.fit_transform(centred.astype(np.float32)).astype(np.float64)
    places -= (places.max(0) + places.min(0)) / 2
    return (places / max(np.abs(places).max(), 1e-12)).round(4)


def _reweighting(model: SequenceModel | Tiger, modalities: tuple[str, ...]) -> list[dict[str, Any]]:
    """The tables in attention: log-weights by layer, head and bucket, for each channel."""
    if isinstance(model, Tiger):
        return []
    found = []
    if model.tables is not None:
        for channel, (left, right) in enumerate(model.channels):
            name = f"{modalities[left]} × {modalities[right]}"
            levels = model.tables.shape[-1] - 1
            found.append(_table("semantic IDs", name, agreement_buckets(levels), model.tables[:, channel]))
    for kind, name, tables in (
        ("position", "places between two items", model.position_tables),
        ("time", "time between two items", model.time_tables),
    ):
        if tables is not None:
            found.append(_table(kind, name, gap_buckets(tables.shape[-1]), tables[:, 0]))
    return found


def _table(kind: str, channel: str, buckets: list[str], log_weights: Tensor) -> dict[str, Any]:
    return {"kind": kind, "channel": channel, "buckets": buckets, "log_weights": log_weights.detach().tolist()}


def agreement_buckets(levels: int) -> list[str]:
    """Names of the buckets of `prefix`: 0 to `levels` leading levels agree."""
    if levels == 1:
        return ["0 levels agree", "the level agrees"]
    between = [f"{n} level{'s agree' if n > 1 else ' agrees'}" for n in range(1, levels)]
    return ["0 levels agree", *between, f"all {levels} agree"]


def gap_buckets(buckets: int) -> list[str]:
    """Names of the buckets of `gap`: ranges of distances, the last one open."""
    if buckets == 1:
        return ["any"]
    names = ["0"]
    for n in range(1, buckets - 1):
        low, high = 2 ** (n - 1), 2**n - 1
        names.append(_short(low) if low == high else f"{_short(low)}–{_short(high)}")
    return [*names, f"≥ {_short(2 ** (buckets - 2))}"]


def _short(number: int) -> str:
    """Three digits where it is large: what follows is no news in a range that spans a factor of two."""
    for unit, name in ((10**12, "T"), (10**9, "G"), (10**6, "M"), (10**4, "k")):
        if number >= unit:
            unit = 1000 if name == "k" else unit
            return f"{number / unit:.3g} {name}"
    return str(number)


def _examples(
    model: SequenceModel | Tiger, config: Config, data: Dataset, test: Heldout, titles: list[str], *, has_tables: bool
) -> list[dict[str, Any]]:
    """Users evenly spaced over the test split, whatever the model makes of them; candidates as in the evaluation."""
    chosen = np.unique(np.linspace(0, len(test) - 1, EXAMPLES).astype(int)).tolist()
    return [_example(model, config, data, test, titles, n, has_tables=has_tables) for n in chosen]


def _example(
    model: SequenceModel | Tiger,
    config: Config,
    data: Dataset,
    test: Heldout,
    titles: list[str],
    n: int,
    *,
    has_tables: bool,
) -> dict[str, Any]:
    history, target = test.histories[n], int(test.targets[n])
    batch = pack_histories(test.histories[n : n + 1], config.model.max_length)
    scores = model.score(batch)
    excluded = torch.zeros(scores.shape, dtype=torch.bool)
    excluded[0, torch.from_numpy(history)] = True
    excluded[0, target] = False
    rank = int(ranks(scores, torch.tensor([target]), excluded)) if scores[0, target] != -torch.inf else None
    best = scores[0].masked_fill(excluded[0], -torch.inf).topk(min(RECOMMENDED, data.n_items))

    def named(item: int) -> dict[str, Any]:
        return {"item": data.item_ids[item], "title": titles[item]}

    return {
        "user": data.user_ids[test.users[n]],
        "interactions": len(history),
        "read": len(batch.items),  # by the model: the latest ones
        "history": [{**named(i), **row} for i, row in _attended(model, batch, has_tables)[-HISTORY_SHOWN:]],
        "target": {**named(target), "rank": rank},
        "recommended": [
            {"rank": place, **named(item), "score": score, "is_target": item == target}
            for place, (score, item) in enumerate(zip(*(t.tolist() for t in best), strict=True), start=1)
            if score != -torch.inf
        ],
    }


def _attended(model: SequenceModel | Tiger, batch: PackedBatch, has_tables: bool) -> list[tuple[int, dict[str, float]]]:
    """Items of a history, oldest first; with the share of attention that each gets, and how the tables changed it.

    "attention" is the weight that the last item gives to this one in the last layer, the mean over heads;
    "reweighting" is its quotient by what it would be without tables. TIGER attends to tokens, not to items.
    """
    items = batch.items.tolist()
    if isinstance(model, Tiger):
        return [(item, {}) for item in items]
    weights, plain = (each.mean(0) for each in model.attention(batch))
    rows = [{"attention": weight} for weight in weights.tolist()]
    if has_tables:
        for row, ratio in zip(rows, (weights / plain.clamp_min(1e-30)).tolist(), strict=True):
            row["reweighting"] = ratio
    return list(zip(items, rows, strict=True))
