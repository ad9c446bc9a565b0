"""`fit`: from a data set to a finished run folder, resuming where a call stopped; `tokenize`: the first half of it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from safetensors.torch import load_file

from bbqrec import report
from bbqrec.config import Config, flat_options
from bbqrec.data.batches import PrefixBatches, TrainingBatches
from bbqrec.data.dataset import Dataset, Features
from bbqrec.data.files import LOCK, held, remove_temporaries, require_writable
from bbqrec.data.splits import Heldout, Split, leave_one_out
from bbqrec.evaluation.ranking import evaluate
from bbqrec.models.build import build_model
from bbqrec.models.most_popular import MostPopular
from bbqrec.models.sequence_model import SequenceModel, attention_channels
from bbqrec.models.shards import shard_sizes
from bbqrec.models.tiger import Tiger
from bbqrec.processes import first_does, is_first, rank_and_world, together
from bbqrec.tokenizer.item_encoder import (
    FEATURES,
    TOKENIZER,
    WORDS,
    catalogue_features,
    principal_directions,
    read_preparation,
    save_preparation,
)
from bbqrec.tokenizer.model import Tokenizer
from bbqrec.tokenizer.semantic_ids import SemanticIDs
from bbqrec.training import plots
from bbqrec.training.modules import SequenceModule, TokenizerModule
from bbqrec.training.run import Run, damage_named, device, save_model, save_weights, versions, write_json
from bbqrec.training.trainer import Stage, train
from bbqrec_kernels.similarity_attention.api import MAX_HEAD_SIZE
from bbqrec_kernels.similarity_attention.terms import MAX_CHANNELS

SIMILARITY_WEIGHTS = (0.5, 1.0, 2.0, 4.0)  # tried in turn while they help
SIMILARITY_DECAYS = (0.7, 0.5, 0.9)  # the first one with all of them, the others with the best


def fit(
    data: Dataset | str | Path,
    out: str | Path,
    *,
    model: str | None = None,
    config: Config | None = None,
    progress: bool | None = None,
) -> Run:
    """Trains a recommender and writes its run folder (see `bbqrec.training.run`).

    Under `torchrun` its processes train together, one on each device: all call `fit` with the same arguments, see the
    same files, and read the same data; the first one writes. A step is then over the batches of all of them.

    Args:
        data: a data set, or the path of one.
        out: the run folder. If it holds an unfinished run of the same data and options, that run is resumed and ends
            where an undisturbed one ends; a finished one is returned as it is.
        model: "bbqrec", "sasrec" or "tiger"; overrides `config.model_name`.
        config: options; the defaults of `Config` otherwise.
        progress: report on stderr; by default in lines, with progress bars on a terminal. False is silent.

    Returns:
        The finished `Run`.

    Raises:
        ValueError: the data cannot be used, `out` holds another run, a damaged one, or one that another call works on,
            the options do not fit the data, or training diverges.
        OSError: `out` cannot be written, or its disk is full; what was finished before is kept.
        ConnectionError: another of the processes ended.
        KeyboardInterrupt: interrupted; call again to resume.
    """
    with together(), ExitStack() as holding:
        job = _start(data, out, model, config, progress, holding)
        if job.run.finished:
            return job.run
        with _costs_recorded(job.run):
            semantic_ids = _make_semantic_ids(job) if job.has_semantic_ids else None
            sequence_model = _fit_sequence_model(job, semantic_ids)
        metrics = _final_metrics(job, sequence_model)
        first_does(lambda: _finish(job, semantic_ids, sequence_model, metrics))
    return Run(job.run.folder, job.data)


def tokenize(
    data: Dataset | str | Path,
    out: str | Path,
    *,
    model: str | None = None,
    config: Config | None = None,
    progress: bool | None = None,
) -> Run:
    """Makes the semantic IDs of a data set and no recommender yet: `fit` on the same folder goes on from there.

    Arguments, resuming, processes and errors are those of `fit`. The folder then holds `semantic_ids.parquet`,
    `tokenizer.json` (`Run.tokenizer_figures`), `tokenizer.safetensors` and `codebooks.png`; where it does already,
    nothing is trained.

    Raises:
        ValueError: also where the model is one without semantic IDs.
    """
    name = model or (config or Config()).model_name
    if name == "sasrec":
        raise ValueError(f"model: got {name!r}, which has no semantic IDs; expected another")
    with together(), ExitStack() as holding:
        job = _start(data, out, model, config, progress, holding)
        if not job.run.finished:
            with _costs_recorded(job.run):
                _make_semantic_ids(job)
    return Run(job.run.folder, job.data)


@dataclass(frozen=True)
class _Job:
    """What all steps of a run need."""

    run: Run
    data: Dataset
    features: dict[str, Features]
    directions: torch.Tensor | None  # of `principal_directions`
    split: Split
    validation: Heldout  # by which epochs and weights are chosen; `split` has that of all users
    config: Config
    bars: bool
    say: Callable[..., None]

    @property
    def has_semantic_ids(self) -> bool:
        return self.config.model_name != "sasrec"

    @property
    def names(self) -> tuple[list[str], list[str]]:
        """IDs and titles of all items."""
        return self.data.item_ids, [self.data.title(i) for i in range(self.data.n_items)]


def _start(
    data: Dataset | str | Path,
    out: str | Path,
    model: str | None,
    config: Config | None,
    progress: bool | None,
    holding: ExitStack,
) -> _Job:
    """Checks everything that can be checked before training, and claims the run folder as long as `holding` lasts."""
    if not isinstance(data, Dataset):
        data = Dataset.load(data)
    if not isinstance(config, (Config, NoneType)):
        raise TypeError(f"config: got {type(config).__name__}, expected a Config; Config().override takes a mapping")
    config = config or Config()
    if model is not None:
        config = config.override({"model_name": model})
    features = _chosen_features(data, config)
    split = leave_one_out(data)
    _check_options(data, features, split, config)
    first_does(lambda: _claim(Path(out), data, config, holding))
    run = Run(Path(out), data)
    say = _quiet if progress is False or not is_first() else _say
    bars = is_first() and (sys.stderr.isatty() if progress is None else progress)
    directions = None
    if not run.finished:
        if features:
            first_does(lambda: _prepare(run, features, config))
            with damage_named(run.folder / FEATURES):
                directions = read_preparation(run.folder / FEATURES)[1]
        widths = [f"{name} ({feature.values.shape[1]})" for name, feature in features.items()]
        say(
            f"{data.name}: {data.n_users:,} users, {data.n_items:,} items, features: {', '.join(widths) or 'none used'}"
        )
        if (
            config.model_name != "sasrec"
            and len(features) > 1
            and config.model.reweighting
            and config.model.cross_modal
        ):
            channels = attention_channels(len(features), config.model, config.tokenizer.shared_codebooks)
            if not config.tokenizer.shared_codebooks:
                say("model.cross_modal: no, modalities with codebooks of their own have no code in common")
            elif len(channels) == len(features):
                say(f"model.cross_modal: no, of {MAX_CHANNELS} channels in attention it needs {len(features) ** 2}")
    validation = split.validation.sample(config.training.validation_users, config.training.seed)
    return _Job(run, data, features, directions, split, validation, config, bars, say)


def _prepare(run: Run, features: dict[str, Features], config: Config) -> None:
    """Once a run: another machine may find other directions, and a checkpoint has features in those of the first."""
    if (run.folder / FEATURES).is_file():
        return
    width = config.model.feature_width if config.model.features else None
    save_preparation(run.folder, features, principal_directions(features, width))


def _chosen_features(data: Dataset, config: Config) -> dict[str, Features]:
    """The feature sets that the run uses: none for SASRec, unless it is given them."""
    if config.model_name == "sasrec" and not config.model.features:
        return {}
    wanted = config.tokenizer.modalities
    if wanted is None:
        wanted = list(data.features)
    if not wanted and config.model_name == "sasrec":
        raise ValueError(f"model.features: got true, but {data.name} has no features; set it to false")
    if not wanted:
        raise ValueError(f"data: {data.name} has no features to make semantic IDs from; use model 'sasrec'")
    for name in wanted:
        if name not in data.features:
            known = ", ".join(data.features) or "none"
            raise ValueError(f"tokenizer.modalities: got {name!r}, expected feature sets of {data.name}: {known}")
    return {name: data.features[name] for name in wanted}


def _check_options(data: Dataset, features: dict[str, Features], split: Split, config: Config) -> None:
    """Refuses what training would refuse, before there is a run folder that could not be used for other options."""
    if not len(split.test):
        raise ValueError(
            f"data: no user of {data.name} has three interactions, so nothing can be held out; give more interactions"
        )
    if not (split.train.lengths > 1).any():
        raise ValueError(
            f"data: no user of {data.name} has two interactions left for training (four in all, as two are held out); "
            "give more interactions"
        )
    model, tokenizer = config.model, config.tokenizer
    config.check_read()
    if model.sharded_items:
        shard_sizes(data.n_items, rank_and_world()[1])  # refuses too few items
    if model.relative_time and data.histories.timestamps is None:
        raise ValueError(f"model.relative_time: got true, but {data.name} has no timestamps; set it to false")
    _check_heads("model.dim", model.dim, model.heads, "model.heads")
    if config.model_name == "sasrec":
        if not (model.features or model.item_id):
            raise ValueError("model.item_id: got false for a model without semantic IDs, so items have no vector")
        return
    if config.model_name == "bbqrec" and not (model.content or model.features or model.item_id):
        raise ValueError("model.item_id: got false, and model.content too, so items have no vector; set one to true")
    _check_heads("tokenizer.dim", tokenizer.dim, 2, "heads of the tokenizer's history encoder")
    if model.reweighting:
        attention_channels(len(features), model, tokenizer.shared_codebooks)  # refuses too many


def _check_heads(option: str, dim: int, heads: int, what: str) -> None:
    if dim % heads:
        raise ValueError(f"{option}: got {dim}, expected a multiple of {heads} ({what})")
    if dim // heads > MAX_HEAD_SIZE:
        raise ValueError(f"{option}: got {dim}, expected at most {MAX_HEAD_SIZE * heads} ({MAX_HEAD_SIZE} a head)")


def _claim(folder: Path, data: Dataset, config: Config, holding: ExitStack) -> None:
    """Makes the folder a run folder of this data and these options, or finds that it is one already.

    Until `holding` ends no other call works on it, unless the run is finished.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out: {folder} is a file, expected a folder; choose another name")
    if not (folder / "run.json").is_file():  # the last of the two that are written here
        ours = ("config.yaml", ".config.yaml.", ".run.json.", LOCK)  # a call that was killed right here leaves these
        if folder.is_dir() and not all(path.name.startswith(ours) for path in folder.iterdir()):
            raise ValueError(f"out: {folder} is not empty and no run folder; choose a new or empty folder")
    if not (folder / "metrics.json").is_file():  # otherwise it is finished, and nothing is written
        require_writable(folder)
        holding.enter_context(held(folder))
    if not (folder / "run.json").is_file():
        remove_temporaries(folder)
        config.save(folder / "config.yaml")
        path = None if data.path is None else str(Path(data.path).resolve())
        source = {"name": data.name, "path": path, "fingerprint": data.fingerprint()}
        facts = {"data": source, "versions": versions(), "device": device(), "processes": rank_and_world()[1]}
        write_json(folder / "run.json", facts)
        return

    run = Run(folder, data)
    source = run.facts["data"]
    if source["fingerprint"] != data.fingerprint():
        raise ValueError(
            f"out: {folder} holds a run of {source['name']} ({source['path'] or 'made in memory'}), which is not the "
            f"data given, {data.name}; choose another folder"
        )
    theirs, ours = flat_options(run.config), flat_options(config)
    changed = [f"{key}={theirs[key]} (now {ours[key]})" for key in ours if theirs[key] != ours[key]]
    if changed and _has_trained(folder):
        raise ValueError(f"out: {folder} holds a run with other options, {', '.join(changed)}; choose another folder")
    if changed:  # as where the former ones took too much memory
        for name in (FEATURES, WORDS):
            (folder / name).unlink(missing_ok=True)
        config.save(folder / "config.yaml")
    if not run.finished:
        remove_temporaries(folder)


def _has_trained(folder: Path) -> bool:
    """Whether there is anything that other options would have made otherwise, beside what `_prepare` makes anew."""
    return (folder / TOKENIZER).is_file() or any((folder / "checkpoints").glob("*/*.ckpt"))


def _make_semantic_ids(job: _Job) -> SemanticIDs:
    """Trains the tokenizer, unless that is done, and writes what it says about the catalogue."""
    options, seed, max_length = job.config.tokenizer, job.config.training.seed, job.config.model.max_length
    torch.manual_seed(seed)
    tokenizer = Tokenizer(job.features, job.data.n_items, options, max_length)
    weights = job.run.folder / TOKENIZER
    if weights.is_file():
        job.run.require_whole(TOKENIZER)
    else:
        batches = TrainingBatches(job.split.train, max_length, options.batch_tokens, seed)
        module = TokenizerModule(tokenizer, job.config, batches, job.data.user_ids)
        epochs = min(options.epochs, -(-options.max_steps // len(batches)))
        train(module, Stage(job.run.folder, "tokenizer", epochs), bars=job.bars, say=job.say)
        first_does(lambda: save_weights(tokenizer.state_dict(), weights))
    with damage_named(weights):
        tokenizer.load_state_dict(load_file(weights))
    tokenizer.eval()
    semantic_ids = tokenizer.semantic_ids()
    first_does(lambda: _write_semantic_ids(job, tokenizer, semantic_ids))
    return semantic_ids


def _write_semantic_ids(job: _Job, tokenizer: Tokenizer, semantic_ids: SemanticIDs) -> None:
    """Them, and what there is to say about them."""
    figures = {**semantic_ids.figures(), **tokenizer.fidelity()}
    semantic_ids.save_table(job.run.folder / "semantic_ids.parquet", *job.names)
    plots.save_codebook_usage(job.run.folder / "codebooks.png", semantic_ids)
    write_json(job.run.folder / "tokenizer.json", figures)
    job.run.record_hashes()
    used = ", ".join(f"{share:.0%}" for share in figures["usage"])
    job.say(f"tokenizer: codewords in use {used}; items sharing all codes {figures['collision_rate']:.1%}")


def _fit_sequence_model(job: _Job, semantic_ids: SemanticIDs | None) -> SequenceModel | Tiger:
    """Trains until the validation metric stops rising, and returns the model of the best epoch."""
    options, max_length = job.config.training, job.config.model.max_length
    torch.manual_seed(options.seed)
    build = partial(build_model, job.config, job.data.n_items, semantic_ids, _features_of_model(job))
    model = build()
    if job.config.model.sharded_items:
        model.share_items()
    batches_of_model = PrefixBatches if isinstance(model, Tiger) else TrainingBatches
    batches = batches_of_model(job.split.train, max_length, options.batch_tokens, options.seed)
    user_ids = job.data.user_ids
    module = SequenceModule(model, job.config, batches, user_ids, job.validation, job.data.n_items)
    if isinstance(model, SequenceModel) and model.samples:
        job.say(f"sequence model: softmax over {job.config.model.sampled_items:,} items drawn each step")
    if len(job.validation) < len(job.split.validation):
        job.say(f"sequence model: validated on {len(job.validation):,} of {len(job.split.validation):,} users")
    if module.shards is not None:
        job.say(f"sequence model: {module.shards.sizes[0]:,} of {job.data.n_items:,} items in each process")
    stage = Stage(job.run.folder, "sequence_model", options.epochs, options.patience, options.decay_after)
    best = train(module, stage, bars=job.bars, say=job.say)
    if module.shards is not None:
        module.model = model = build()  # a whole one in the host's memory: what follows is as it ever is
    module.load_state_dict(best.pop("state_dict"))
    job.say(f"sequence model: best of {best['epochs_run']} epochs is number {best['epoch'] + 1}")
    model = model.cpu().eval()
    if isinstance(model, SequenceModel):
        model.forget_ids(job.split.train_items)
        if model.similarity_weight is not None:
            _choose_similarity(job, model)
    return model


def _choose_similarity(job: _Job, model: SequenceModel) -> None:
    """Sets how much likeness to the history counts: what ranks the validation targets best, nothing if none helps."""

    def found(weight: float, decay: float) -> float:
        model.similarity_weight.fill_(weight)
        model.similarity_decay.fill_(decay)
        max_length = job.config.model.max_length
        return evaluate(model, job.validation, job.data.n_items, max_length=max_length)["ndcg@10"]

    weight, decay, without, best = best_similarity(found)
    model.similarity_weight.fill_(weight)
    model.similarity_decay.fill_(decay)
    amount = f"weight {weight:g}, decay {decay:g}" if weight else "none"
    job.say(f"similarity to the history: {amount}, validation ndcg@10 {without:.4f} without", end=" ")
    job.say(f"and {best:.4f} with it")


def best_similarity(found: Callable[[float, float], float]) -> tuple[float, float, float, float]:
    """Weight and decay with the highest `found(weight, decay)`, and that without (at weight 0) and with them."""
    decay = SIMILARITY_DECAYS[0]
    chosen = (0.0, decay)
    without = best = found(*chosen)
    for weight in SIMILARITY_WEIGHTS:
        if (metric := found(weight, decay)) <= best:
            break
        best, chosen = metric, (weight, decay)
    for decay in SIMILARITY_DECAYS[1:] if chosen[0] else ():
        if (metric := found(chosen[0], decay)) > best:
            best, chosen = metric, (chosen[0], decay)
    return *chosen, without, best


def _features_of_model(job: _Job) -> torch.Tensor | None:
    """See `catalogue_features`; None if the model reads none."""
    if not job.config.model.features:
        return None
    return catalogue_features(job.features, job.directions)


def _final_metrics(job: _Job, model: SequenceModel | Tiger) -> dict[str, Any]:
    split, n_items, training = job.split, job.data.n_items, job.config.training
    options = {"n_items": n_items, "max_length": job.config.model.max_length, "train_items": split.train_items}
    popular = MostPopular(split.train, n_items)
    parts = {"validation": split.validation, "test": split.test}
    held_out = {name: part.sample(training.final_users, training.seed) for name, part in parts.items()}
    if len(held_out["test"]) < len(split.test):
        job.say(f"metrics: of {len(held_out['test']):,} of {len(split.test):,} users")
    metrics = {
        "model": job.config.model_name,
        "data": job.data.name,
        "candidates": "all items, history removed",
        **{name: evaluate(model, part, **options) for name, part in held_out.items()},
        "most_popular": {name: evaluate(popular, part, **options) for name, part in held_out.items()},
    }
    return {**metrics, "tokenizer": job.run.tokenizer_figures} if job.has_semantic_ids else metrics


def _finish(job: _Job, semantic_ids: SemanticIDs | None, model: SequenceModel | Tiger, metrics: dict[str, Any]) -> None:
    """Writes what a finished run holds."""
    folder = job.run.folder
    if semantic_ids is None:
        SemanticIDs.none(job.data.n_items).save_table(folder / "semantic_ids.parquet", *job.names)
    plots.save_curves(folder / "curves.png", folder / "logs")
    save_model(model, folder / "model.safetensors")
    _save_report(job, model, metrics)
    job.run.record_hashes()
    write_json(folder / "metrics.json", metrics)  # last: it says that the run is finished
    test, popular = metrics["test"], metrics["most_popular"]["test"]
    job.say(f"test: ndcg@10 {test['ndcg@10']:.4f}, recall@10 {test['recall@10']:.4f}", end=" ")
    job.say(f"(most popular {popular['ndcg@10']:.4f}, {popular['recall@10']:.4f}; history removed)")


def _save_report(job: _Job, model: SequenceModel | Tiger, metrics: dict[str, Any]) -> None:
    run = Run(job.run.folder, job.data)
    run.model = model  # at hand, and the run is not finished before its metrics are written
    report.save(run.folder / "report.html", report.collect(run, metrics))


@contextmanager
def _costs_recorded(run: Run) -> Iterator[None]:
    """Adds the time spent to that of earlier calls in `run.json`, whatever ends it, and keeps the most memory used."""
    started = time.perf_counter()
    try:
        yield
    except BaseException:
        with suppress(OSError):  # a disk that is still full must not hide what happened
            _add_costs(run, time.perf_counter() - started)
        raise
    _add_costs(run, time.perf_counter() - started)


def _add_costs(run: Run, seconds: float) -> None:
    if not is_first():
        return
    facts = Run(run.folder).facts
    peaks = [peak for peak in (facts.get("peak_memory_mb"), _peak_memory_mb()) if peak is not None]
    costs = {"seconds": round(facts.get("seconds", 0) + seconds, 1), "peak_memory_mb": max(peaks, default=None)}
    run.add_facts(costs)


def _peak_memory_mb() -> int | None:
    """The most memory that this process has had resident so far; None where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit // 2**20


def _say(text: str, end: str = "\n") -> None:
    print(text, end=end, file=sys.stderr, flush=True)


def _quiet(text: str, end: str = "\n") -> None:
    del text, end
