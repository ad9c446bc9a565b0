"""`fit`: the run folder, resuming, refusing, silence."""

import errno
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.torch import load_file

from bbqrec import Config, Run, fit, tokenize
from bbqrec.config import flat_options
from bbqrec.data.dataset import Histories
from bbqrec.data.splits import leave_one_out
from bbqrec.evaluation.ranking import evaluate
from bbqrec.models.most_popular import MostPopular
from bbqrec.models.tiger import Tiger
from bbqrec.tokenizer.model import Tokenizer
from bbqrec.training import fit as fitting
from bbqrec.training import modules
from bbqrec.training.modules import SequenceModule, TokenizerModule
from bbqrec.training.plots import read_log

pytestmark = pytest.mark.usefixtures("undrawn")


class Stop(Exception):
    pass


def stop_after(monkeypatch, module, epoch, how):
    """Stops training at the end of an epoch (counted from 0), before its checkpoint is written."""
    ended = module.on_train_epoch_end

    def hook(self):
        if self.current_epoch > epoch:
            how()
        ended(self)

    monkeypatch.setattr(module, "on_train_epoch_end", hook)


def throw():
    raise Stop


def same_weights(a, b, but=()):
    left, right = a.model.state_dict(), b.model.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left if name not in but)


def test_run_folder(bbqrec_run, tiny_data, tiny_config):
    names = {path.name for path in bbqrec_run.folder.iterdir()}
    assert names == {
        "config.yaml",
        "run.json",
        "tokenizer.safetensors",
        "tokenizer.json",
        "features.parquet",
        "semantic_ids.parquet",
        "model.safetensors",
        "metrics.json",
        "curves.png",
        "codebooks.png",
        "report.html",
        "logs",
        "checkpoints",
    }
    run = Run(bbqrec_run.folder)
    assert run.config == tiny_config
    assert run.finished
    assert run.facts["data"]["fingerprint"] == tiny_data.fingerprint()
    assert run.facts["seconds"] > 0
    assert 50 < run.facts["peak_memory_mb"] < 50_000
    table = pl.read_parquet(run.folder / "semantic_ids.parquet")
    assert table["item"].to_list() == tiny_data.item_ids
    assert run.semantic_ids.modalities == tuple(tiny_data.features)
    for m, name in enumerate(tiny_data.features):
        assert table[f"codes/{name}"].to_list() == run.model.codes[:, m].tolist()


def test_sasrec_has_no_tokenizer(sasrec_run):
    assert not (sasrec_run.folder / "tokenizer.safetensors").exists()
    assert not (sasrec_run.folder / "codebooks.png").exists()
    assert "tokenizer" not in sasrec_run.metrics
    assert sasrec_run.semantic_ids is None


def test_tiger_leaves_the_same_files(tiger_run, bbqrec_run, tiny_data):
    assert {path.name for path in tiger_run.folder.iterdir()} == {path.name for path in bbqrec_run.folder.iterdir()}
    run = Run(tiger_run.folder)
    assert isinstance(run.model, Tiger)
    assert run.config == tiger_run.config
    assert run.metrics["model"] == "tiger"
    for split in ("validation", "test"):
        assert run.evaluate(split) == run.metrics[split]
    table = pl.read_parquet(run.folder / "semantic_ids.parquet")
    assert run.semantic_ids.modalities == tuple(tiny_data.features)
    for m, name in enumerate(tiny_data.features):
        assert table[f"codes/{name}"].to_list() == run.model.codes[:, m].tolist()
    assert len(run.semantic_ids.codebooks) == len(tiny_data.features)  # one for each modality
    log = read_log(run.folder / "logs" / "sequence_model")
    assert run.metrics["validation"]["ndcg@10"] == pytest.approx(log["validation/ndcg@10"].max(), rel=1e-6)
    assert log["train/loss"][-1] < log["train/loss"][0]


def test_tiger_takes_the_codes_of_bbqrec_where_options_say_so(bbqrec_run, tiny_data, tiny_config, tmp_path):
    theirs = flat_options(bbqrec_run.config)
    options = {key: value for key, value in theirs.items() if key.startswith("tokenizer.")}
    options |= {"training.epochs": 1, "training.seed": 0}
    run = fit(tiny_data, tmp_path / "run", model="tiger", config=tiny_config.override(options), progress=False)
    assert torch.equal(run.model.codes, bbqrec_run.model.codes)


def test_tiger_with_items_that_lack_a_modality(tiny_data, tiny_config, tmp_path):
    text = tiny_data.features["text"]
    present = np.arange(tiny_data.n_items) % 3 > 0
    some = replace(text, values=text.values * present[:, None], present=present)
    data = tiny_data.with_features("text", some)
    config = tiny_config.override({"tokenizer.epochs": 1, "training.epochs": 1, "model.beam": 60})
    run = fit(data, tmp_path / "run", model="tiger", config=config, progress=False)
    m = list(data.features).index("text")
    assert (run.model.codes[:, m] >= 0).all(1).tolist() == present.tolist()
    assert run.metrics["test"]["recall@20"] > 0


@pytest.mark.parametrize("split", ["validation", "test"])
def test_metrics_are_those_of_the_saved_model(bbqrec_run, split):
    assert Run(bbqrec_run.folder).evaluate(split) == bbqrec_run.metrics[split]
    assert bbqrec_run.metrics["most_popular"][split] != bbqrec_run.metrics[split]
    cold = ~np.isin(getattr(bbqrec_run.split, split).targets, bbqrec_run.split.train.items)
    assert bbqrec_run.metrics[split]["cold/users"] == cold.sum()


def test_the_best_and_the_latest_epoch_are_kept(bbqrec_run):
    log = read_log(bbqrec_run.folder / "logs" / "sequence_model")
    assert log["epoch"].to_list() == list(range(len(log)))
    run = Run(bbqrec_run.folder, bbqrec_run.data)
    run.model.similarity_weight.fill_(0)  # which is chosen later
    assert run.evaluate("validation")["ndcg@10"] == pytest.approx(log["validation/ndcg@10"].max(), rel=1e-6)
    checkpoints = bbqrec_run.folder / "checkpoints" / "sequence_model"
    assert torch.load(checkpoints / "last.ckpt", weights_only=True)["epoch"] == log["epoch"][-1]
    assert torch.load(checkpoints / "best.ckpt", weights_only=True)["epoch"] == log["validation/ndcg@10"].arg_max()


def test_as_much_similarity_as_is_best_on_validation(bbqrec_run):
    run = Run(bbqrec_run.folder, bbqrec_run.data)
    weight, decay = run.model.similarity_weight.item(), run.model.similarity_decay.item()
    assert weight in fitting.SIMILARITY_WEIGHTS  # the demo's items are alike in kinds, so 0 is not the best
    assert round(decay, 6) in fitting.SIMILARITY_DECAYS

    def metric(weight, decay):
        run.model.similarity_weight.fill_(weight)
        run.model.similarity_decay.fill_(decay)
        return run.evaluate("validation")["ndcg@10"]

    best = metric(weight, decay)
    assert best == run.metrics["validation"]["ndcg@10"] > metric(0, decay)
    others = [(w, fitting.SIMILARITY_DECAYS[0]) for w in fitting.SIMILARITY_WEIGHTS if w < weight]
    others += [(weight, d) for d in fitting.SIMILARITY_DECAYS]
    assert all(best >= metric(*other) for other in others)


@pytest.mark.parametrize(
    ("best", "chosen"),
    [((2, 0.5), (2, 0.5)), ((1, 0.9), (1, 0.9)), ((4, 0.7), (4, 0.7)), ((0, 0.7), (0, 0.7)), ((9, 0.5), (4, 0.5))],
)
def test_the_search_for_similarity_finds_the_peak(best, chosen, bbqrec_run, monkeypatch):
    """Where the metric falls off to all sides of one weight and decay."""

    def metric(model, *_, **__):
        weight, decay = model.similarity_weight.item(), model.similarity_decay.item()
        return {"ndcg@10": 1 - abs(weight - best[0]) / 10 - abs(decay - best[1]) / 10}

    monkeypatch.setattr(fitting, "evaluate", metric)
    run = Run(bbqrec_run.folder, bbqrec_run.data)
    validation, say = run.split.validation, lambda *_, **__: None
    job = SimpleNamespace(config=run.config, data=run.data, validation=validation, say=say)
    fitting._choose_similarity(job, run.model)
    found = run.model.similarity_weight.item(), run.model.similarity_decay.item()
    assert found == pytest.approx(chosen)


def test_items_that_nobody_took_in_training_are_what_their_content_says(tiny_data, tiny_config, tmp_path):
    newcomer, only_once = 7, 8  # the second is all that a user took, which is no transition to learn
    lists = [[item for item in row if item not in (newcomer, only_once)] for row in tiny_data.histories]
    histories = Histories.from_lists([*lists[2:], [only_once], [*lists[0], newcomer]])
    data = replace(tiny_data, histories=histories)
    config = tiny_config.override({"tokenizer.epochs": 1, "training.epochs": 1})
    run = fit(data, tmp_path / "run", config=config, progress=False)
    assert newcomer in run.split.test.targets
    cold = np.setdiff1d(np.arange(data.n_items), run.split.train_items)
    assert {newcomer, only_once} <= set(cold)
    assert (run.model.item_id == 0).all(1).nonzero()[:, 0].tolist() == cold.tolist()


def test_similarity_that_does_not_help_is_left_out(tiny_data, tiny_config, tmp_path):
    noise = {
        name: replace(each, values=np.random.default_rng(0).standard_normal(each.values.shape).astype(np.float32))
        for name, each in tiny_data.features.items()
    }
    histories = Histories.from_lists([[(start + i) % 60 for i in range(8)] for start in range(150)])  # learned by heart
    config = tiny_config.override({"model.features": True, "training.learning_rate": 0.02, "training.epochs": 15})
    data = replace(tiny_data, features=noise, histories=histories)
    run = fit(data, tmp_path / "run", model="sasrec", config=config, progress=False)
    assert run.model.similarity_weight == 0
    assert not run.model.adds_similarity
    assert run.metrics["validation"]["ndcg@10"] > 0.9


def test_the_best_epoch_is_returned_and_not_the_last(tiny_data, tiny_config, tmp_path):
    config = tiny_config.override({"training.epochs": 5, "training.patience": 5, "training.learning_rate": 0.05})
    run = fit(tiny_data, tmp_path / "run", model="sasrec", config=config, progress=False)
    checkpoints = run.folder / "checkpoints" / "sequence_model"
    best, last = (torch.load(checkpoints / f"{name}.ckpt", weights_only=True) for name in ("best", "last"))
    assert best["epoch"] < last["epoch"]
    for name, weights in run.model.state_dict().items():
        assert torch.equal(weights, best["state_dict"][f"model.{name}"]), name
    assert not torch.equal(run.model.item_id, last["state_dict"]["model.item_id"])


def test_epochs_and_weights_are_chosen_by_some_users_and_metrics_are_of_all(
    tiny_data, tiny_config, tmp_path, monkeypatch, capsys
):
    asked = []

    def recorded(ranker, heldout, *args, **options):
        asked.append(heldout.users)
        return evaluate(ranker, heldout, *args, **options)

    for module in (modules, fitting):
        monkeypatch.setattr(module, "evaluate", recorded)
    config = tiny_config.override({"training.validation_users": 7})
    run = fit(tiny_data, tmp_path / "run", config=config)
    users = leave_one_out(tiny_data).validation.users
    *choosing, _, _, _, _ = asked  # what ends a run: two models, two splits
    assert len(choosing) >= run.config.training.patience
    assert all(len(chosen) == 7 and np.array_equal(chosen, choosing[0]) for chosen in choosing)
    assert run.metrics["validation"]["users"] == run.metrics["test"]["users"] == len(users) > 7
    assert f"validated on 7 of {len(users)} users" in capsys.readouterr().err


def test_final_metrics_are_of_some_users_where_asked(tiny_data, tiny_config, tmp_path, capsys):
    config = tiny_config.override({"training.final_users": 7, "training.epochs": 1})
    run = fit(tiny_data, tmp_path / "run", model="sasrec", config=config)
    every = run.split.test
    assert f"metrics: of 7 of {len(every)} users" in capsys.readouterr().err
    some = every.sample(7, config.training.seed)
    of_some = {"n_items": tiny_data.n_items, "max_length": run.config.model.max_length}
    expected = evaluate(run.model, some, train_items=run.split.train_items, **of_some)
    assert run.metrics["test"] == expected
    assert run.metrics["most_popular"]["test"]["users"] == run.metrics["validation"]["users"] == 7
    assert run.evaluate("test")["users"] == len(every)


def test_nothing_is_learned_from_held_out_items(tiny_data, tiny_config, tmp_path):
    config = tiny_config.override({"tokenizer.epochs": 1, "training.epochs": 1})
    histories = tiny_data.histories
    items, last = histories.items.copy(), histories.offsets[1:][histories.lengths >= 3] - 1
    held_out = np.concatenate([last, last - 1])
    items[held_out] = (items[held_out] + 7) % tiny_data.n_items
    other = replace(tiny_data, histories=replace(histories, items=items))
    a, b = (
        fit(data, tmp_path / name, config=config, progress=False) for name, data in (("a", tiny_data), ("b", other))
    )
    left, right = (load_file(run.folder / "tokenizer.safetensors") for run in (a, b))
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert same_weights(a, b, but=("similarity_weight", "similarity_decay"))  # chosen on validation
    popular = [MostPopular(run.split.train, tiny_data.n_items).counts for run in (a, b)]
    assert torch.equal(*popular)
    assert a.metrics["test"] != b.metrics["test"]  # the targets are others


@pytest.mark.parametrize(
    ("option", "model"),
    [
        ("training.learning_rate=0.02", "tiger"),
        ("training.weight_decay=5", "tiger"),
        ("training.batch_tokens=128", "tiger"),
        ("model.dropout=0.5", "tiger"),
        ("tokenizer.item_contrast_weight=1", "tiger"),
        ("tokenizer.shared_codebooks=true", "tiger"),
    ],
)
def test_options_change_the_result(option, model, tiny_data, tiny_config, tmp_path):
    config = tiny_config.override({"tokenizer.epochs": 1, "training.epochs": 1})
    weights = "tokenizer.safetensors" if model == "bbqrec" else "model.safetensors"
    a, b = (
        load_file(fit(tiny_data, tmp_path / name, model=model, config=options, progress=False).folder / weights)
        for name, options in (("a", config), ("b", config.override([option])))
    )
    assert not all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["model.heads=3"], r"model\.dim: got 16, expected a multiple of 3 \(model\.heads\)"),
        (["model.dim=514"], r"model\.dim: got 514, expected at most 512"),
        (["tokenizer.dim=15"], r"tokenizer\.dim: got 15, expected a multiple of 2"),
        (["model.item_id=false", "model.content=false", "model.features=false"], r"model\.item_id: got false"),
        (["model_name=sasrec", "model.item_id=false"], r"model\.item_id: got false"),
        (["model_name=tiger", "model.reweighting=true"], r"model\.reweighting=True .* do nothing with model 'tiger'"),
        (["model_name=tiger", "model.heads=3"], r"model\.dim: got 16, expected a multiple of 3 \(model\.heads\)"),
        (["model.beam=9"], r"model\.beam=9 \(default 50\) would do nothing with model 'bbqrec'"),
    ],
)
def test_options_that_do_not_fit_take_no_folder(options, message, tiny_data, tiny_config, tmp_path):
    with pytest.raises(ValueError, match=message):
        fit(tiny_data, tmp_path / "run", config=tiny_config.override(options))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("length", "message"), [(2, "has three interactions"), (3, "left for training")])
def test_too_short_histories_take_no_folder(length, message, tiny_data, tiny_config, tmp_path):
    histories = Histories.from_lists([history[:length] for history in tiny_data.histories])
    with pytest.raises(ValueError, match=message):
        fit(replace(tiny_data, histories=histories), tmp_path / "run", config=tiny_config)
    assert not (tmp_path / "run").exists()


def test_more_modalities_than_attention_takes(tiny_data, tiny_config, tmp_path, capsys):
    def with_modalities(n):
        return replace(tiny_data, features={f"m{i}": tiny_data.features["text"] for i in range(n)})

    with pytest.raises(
        ValueError, match=r"tokenizer\.modalities: got 9, expected at most 8 .* model\.reweighting=false"
    ):
        fit(with_modalities(9), tmp_path / "run", config=tiny_config)
    assert not (tmp_path / "run").exists()
    config = tiny_config.override({"tokenizer.epochs": 1, "training.epochs": 1})
    run = fit(with_modalities(3), tmp_path / "run", config=config)
    assert "model.cross_modal: no, of 8 channels in attention it needs 9" in capsys.readouterr().err
    assert run.model.channels == [(0, 0), (1, 1), (2, 2)]


def test_tokenizer_figures(bbqrec_run):
    figures = bbqrec_run.metrics["tokenizer"]
    assert figures == bbqrec_run.tokenizer_figures
    assert figures.keys() == {"usage", "perplexity", "collision_rate", "agreement", "residual", "reconstruction"}
    assert len(figures["usage"]) == len(figures["perplexity"]) == 3
    assert min(figures["usage"]) > 0
    assert max(figures["usage"]) <= 1
    assert figures["collision_rate"] == bbqrec_run.semantic_ids.collision_rate()


def test_tokenize_is_the_first_half_of_fit(bbqrec_run, tiny_data, tiny_config, tmp_path, monkeypatch):
    run = tokenize(tiny_data, tmp_path / "run", config=tiny_config, progress=False)
    assert not run.finished
    assert run.items.equals(bbqrec_run.items)
    assert run.tokenizer_figures == bbqrec_run.tokenizer_figures
    assert (run.folder / "codebooks.png").exists()
    with monkeypatch.context() as patch:
        patch.setattr("bbqrec.training.fit.train", lambda *_, **__: pytest.fail("trained again"))
        tokenize(tiny_data, run.folder, config=tiny_config, progress=False)
    finished = fit(tiny_data, run.folder, config=tiny_config, progress=False)
    assert finished.metrics == bbqrec_run.metrics
    assert same_weights(finished, bbqrec_run)


def test_tokenize_refuses_a_model_without_semantic_ids(tiny_data, tiny_config, tmp_path):
    with pytest.raises(ValueError, match=r"model: got 'sasrec', which has no semantic IDs"):
        tokenize(tiny_data, tmp_path / "run", model="sasrec", config=tiny_config)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("model", ["bbqrec", "sasrec"])
def test_places_and_times_between_interactions(model, timed_data, tiny_data, tiny_config, tmp_path):
    config = tiny_config.override({"tokenizer.epochs": 1, "training.epochs": 2})
    config = config.override({"model.relative_position": True, "model.relative_time": True})
    run = fit(timed_data, tmp_path / "run", model=model, config=config, progress=False)
    assert run.model.time_tables.abs().sum() > 0
    assert run.model.position_tables.abs().sum() > 0
    assert Run(run.folder, timed_data).evaluate("test") == run.metrics["test"]
    with pytest.raises(ValueError, match=r"model\.relative_time: got true, but .* has no timestamps; set it to false"):
        fit(tiny_data, tmp_path / "other", config=config)
    assert not (tmp_path / "other").exists()


def test_training_lowers_every_loss_it_minimizes(bbqrec_run):
    for stage in ("tokenizer", "sequence_model"):
        loss = read_log(bbqrec_run.folder / "logs" / stage)["train/loss"]
        assert loss[-1] < loss[0], stage


@pytest.mark.parametrize(("module", "epoch"), [(TokenizerModule, 1), (SequenceModule, 0), (SequenceModule, 2)])
def test_an_interrupted_run_ends_where_an_undisturbed_one_ends(
    module, epoch, bbqrec_run, tiny_data, tiny_config, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        stop_after(patch, module, epoch, throw)
        with pytest.raises(Stop):
            fit(tiny_data, tmp_path / "run", config=tiny_config, progress=False)
    assert not Run(tmp_path / "run").finished
    torch.manual_seed(12345)  # another process has another state
    resumed = fit(tiny_data, tmp_path / "run", config=tiny_config, progress=False)
    assert resumed.metrics == bbqrec_run.metrics
    assert same_weights(resumed, bbqrec_run)
    stage = "tokenizer" if module is TokenizerModule else "sequence_model"
    ours, theirs = (read_log(run.folder / "logs" / stage) for run in (resumed, bbqrec_run))
    assert ours["train/loss"].to_list() == theirs["train/loss"].to_list()


def test_a_resumed_run_reads_features_in_the_directions_of_its_start(tiny_data, tiny_config, tmp_path, monkeypatch):
    config = tiny_config.override({"model.feature_width": 5})
    with monkeypatch.context() as patch:
        stop_after(patch, SequenceModule, 0, throw)
        with pytest.raises(Stop):
            fit(tiny_data, tmp_path / "run", config=config, progress=False)
    found = fitting.principal_directions
    monkeypatch.setattr(
        fitting, "principal_directions", lambda *arguments: -found(*arguments)
    )  # as another machine may
    run = fit(tiny_data, tmp_path / "run", config=config, progress=False)
    rows = {name: np.where(f.present[:, None], f.values, np.nan) for name, f in tiny_data.features.items()}
    encoded = run.item_encoder.encode(tiny_data.n_items, rows, None)
    torch.testing.assert_close(encoded.features, run.model.features, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("module", "epoch"), [(TokenizerModule, 1), (SequenceModule, 1)])
def test_an_interrupted_tiger_ends_where_an_undisturbed_one_ends(
    module, epoch, tiger_run, tiny_data, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        stop_after(patch, module, epoch, throw)
        with pytest.raises(Stop):
            fit(tiny_data, tmp_path / "run", config=tiger_run.config, progress=False)
    torch.manual_seed(12345)
    resumed = fit(tiny_data, tmp_path / "run", config=tiger_run.config, progress=False)
    assert resumed.metrics == tiger_run.metrics
    assert same_weights(resumed, tiger_run)


@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_revived_codewords_survive_an_interruption_in_the_middle_of_an_epoch(
    ema_decay, tiny_data, tiny_config, tmp_path, monkeypatch
):
    options = {"codebook_size": 64, "revive_after": 4, "epochs": 4, "ema_decay": ema_decay}
    config = tiny_config.override({f"tokenizer.{key}": value for key, value in options.items()})
    revived = []
    revive = Tokenizer.revive_codewords
    with monkeypatch.context() as patch:
        patch.setattr(Tokenizer, "revive_codewords", lambda self: revived.append(revive(self)) or revived[-1])
        undisturbed = tokenize(tiny_data, tmp_path / "undisturbed", config=config, progress=False)
    assert sum(int(moved.sum()) for [moved] in revived) > 0

    step = TokenizerModule.training_step

    def stop_in_epoch_2(self, batch, index):
        if self.current_epoch == 2 and index == 1:
            throw()
        step(self, batch, index)

    with monkeypatch.context() as patch:
        patch.setattr(TokenizerModule, "training_step", stop_in_epoch_2)
        with pytest.raises(Stop):
            tokenize(tiny_data, tmp_path / "run", config=config, progress=False)
    spent = Run(tmp_path / "run").facts["seconds"]
    torch.manual_seed(12345)
    resumed = tokenize(tiny_data, tmp_path / "run", config=config, progress=False)
    left, right = (load_file(run.folder / "tokenizer.safetensors") for run in (resumed, undisturbed))
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert resumed.facts["seconds"] > spent > 0


def test_a_killed_process_leaves_a_run_that_ends_where_an_undisturbed_one_ends(
    sasrec_run, tiny_data, tiny_config, tmp_path
):
    tiny_config.override({"model_name": "sasrec"}).save(tmp_path / "options.yaml")
    arguments = ["fit", "--data", str(tiny_data.path), "--out", "run", "--config", "options.yaml"]
    process = subprocess.Popen(
        [sys.executable, "-c", "from bbqrec.cli.main import app; app()", *arguments],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    checkpoint = tmp_path / "run" / "checkpoints" / "sequence_model" / "last.ckpt"
    while process.poll() is None and not checkpoint.exists():
        time.sleep(0.01)
    process.kill()
    process.wait()
    config = tiny_config.override({"model_name": "sasrec"})
    resumed = fit(tiny_data, tmp_path / "run", config=config, progress=False)
    assert resumed.metrics == sasrec_run.metrics
    assert same_weights(resumed, sasrec_run)


def test_what_a_call_killed_at_its_start_leaves_is_no_obstacle(tiny_data, tiny_config, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / ".run.json.abc.tmp").write_text("{")
    (folder / ".config.yaml.abc.tmp").write_text("half: a")
    config = tiny_config.override({"tokenizer.epochs": 1})
    run = tokenize(tiny_data, folder, config=config, progress=False)
    assert run.config == config
    assert not list(folder.glob(".*"))


def test_a_folder_that_another_call_works_on_is_refused(tiny_data, tiny_config, tmp_path, monkeypatch):
    folder = tmp_path / "run"

    def call_again(job):
        for again in (fit, tokenize):
            with pytest.raises(
                ValueError, match=f"^out: another process is working on {folder}; wait until it ends, or"
            ):
                again(tiny_data, folder, config=tiny_config, progress=False)
        assert Run(folder).config == tiny_config  # reading is free
        raise KeyboardInterrupt

    monkeypatch.setattr(fitting, "_make_semantic_ids", call_again)
    for call in (fit, tokenize):
        with pytest.raises(KeyboardInterrupt):
            call(tiny_data, folder, config=tiny_config, progress=False)
        assert not list(folder.glob(".*"))


def test_seconds_are_of_all_calls(tiny_data, tiny_config, tmp_path):
    config = tiny_config.override({"tokenizer.epochs": 1, "training.epochs": 1})
    first = tokenize(tiny_data, tmp_path / "run", config=config, progress=False).facts["seconds"]
    assert first > 0
    run = fit(tiny_data, tmp_path / "run", config=config, progress=False)
    assert run.facts["seconds"] > first
    files = {path: path.read_bytes() for path in run.folder.iterdir() if path.is_file()}
    tokenize(tiny_data, run.folder, config=config, progress=False)  # finished: nothing to do
    assert files == {path: path.read_bytes() for path in run.folder.iterdir() if path.is_file()}


def test_divergence_is_named(tiny_data, tiny_config, tmp_path, monkeypatch):
    ended = SequenceModule.on_train_epoch_end

    def diverge(self):
        self.model.item_id.data[3] = torch.nan
        ended(self)

    monkeypatch.setattr(SequenceModule, "on_train_epoch_end", diverge)
    with pytest.raises(ValueError, match=r"epoch 1, weights are not finite; there is no .* training\.learning_rate"):
        fit(tiny_data, tmp_path / "run", model="sasrec", config=tiny_config, progress=False)


@pytest.mark.parametrize(
    ("module", "stage", "option"),
    [(TokenizerModule, "tokenizer", "tokenizer"), (SequenceModule, "sequence_model", "training")],
)
def test_a_loss_that_is_no_number_stops_training(module, stage, option, tiny_data, tiny_config, tmp_path, monkeypatch):
    step, seen = module.training_step, []

    def diverge(self, batch, index):
        seen.append(batch)
        if self.current_epoch == 1:
            next(self.parameters()).data.fill_(torch.nan)
        return step(self, batch, index)

    folder = tmp_path / "run"
    monkeypatch.setattr(module, "training_step", diverge)
    with pytest.raises(ValueError, match="diverged in epoch 2, loss is nan") as error:
        fit(tiny_data, folder, config=tiny_config, progress=False)
    users = ", ".join(repr(tiny_data.user_ids[user]) for user in seen[-1].users.unique().tolist()[:10])
    assert f" (users {users}" in str(error.value)
    assert " in step " in str(error.value)
    latest = folder / "checkpoints" / stage / "last.ckpt"
    assert f"the last good checkpoint is {latest}; lower {option}.learning_rate" in str(error.value)
    weights = torch.load(latest, weights_only=True)["state_dict"].values()
    assert all(value.isfinite().all() for value in weights if value.is_floating_point())


def test_a_full_disk_leaves_the_former_checkpoint(sasrec_run, tiny_data, tiny_config, tmp_path, monkeypatch):
    save, folder, writes = torch.save, tmp_path / "run", []

    def full(checkpoint, file):
        writes.append(file)
        if len(writes) > 2:  # best.ckpt and last.ckpt of the first epoch
            file.write(b"half a checkpoint")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(checkpoint, file)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(
            OSError, match=r"sequence_model: no space left for \w+\.ckpt \(No space left on device\); make room"
        ):
            fit(tiny_data, folder, model="sasrec", config=tiny_config, progress=False)
    checkpoints = folder / "checkpoints" / "sequence_model"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["best.ckpt", "last.ckpt"]
    assert all(torch.load(path, weights_only=True)["epoch"] == 0 for path in checkpoints.iterdir())
    (checkpoints / ".last.ckpt.killed.tmp").write_bytes(b"what a kill in the middle of writing leaves")
    resumed = fit(tiny_data, folder, model="sasrec", config=tiny_config, progress=False)
    assert resumed.metrics == sasrec_run.metrics
    assert same_weights(resumed, sasrec_run)
    assert sorted(path.name for path in checkpoints.iterdir()) == ["best.ckpt", "last.ckpt"]


def test_codebooks_of_their_own_are_not_compared(tiny_data, tiny_config, tmp_path, capsys):
    options = {"tokenizer.shared_codebooks": False, "tokenizer.epochs": 1, "training.epochs": 1}
    run = fit(tiny_data, tmp_path / "run", config=tiny_config.override(options))
    assert "model.cross_modal: no, modalities with codebooks of their own" in capsys.readouterr().err
    assert run.model.channels == [(0, 0), (1, 1)]
    assert run.metrics["tokenizer"]["agreement"] is None


def test_resuming_after_the_last_epoch_trains_no_more(bbqrec_run, tiny_data, tiny_config, tmp_path):
    copy = shutil.copytree(bbqrec_run.folder, tmp_path / "run")
    for name in ("metrics.json", "model.safetensors"):
        (copy / name).unlink()
    resumed = fit(tiny_data, copy, config=tiny_config, progress=False)
    assert resumed.metrics == bbqrec_run.metrics
    assert same_weights(resumed, bbqrec_run)


@pytest.mark.parametrize("content", [b"", b"half a checkpoint"])
def test_a_damaged_checkpoint_without_a_best_one_is_named(content, bbqrec_run, tiny_data, tiny_config, tmp_path):
    copy = shutil.copytree(bbqrec_run.folder, tmp_path / "run")
    for name in ("metrics.json", "tokenizer.safetensors"):
        (copy / name).unlink()
    last = copy / "checkpoints" / "tokenizer" / "last.ckpt"
    last.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{last}: is damaged .*; delete the folder {last.parent}, and fit trains"):
        fit(tiny_data, copy, config=tiny_config, progress=False)


def test_the_best_epoch_is_remembered_in_a_folder_that_was_moved(tiny_data, tiny_config, tmp_path, monkeypatch):
    config = tiny_config.override({"training.epochs": 5, "training.patience": 5, "training.learning_rate": 0.05})
    undisturbed = fit(tiny_data, tmp_path / "undisturbed", model="sasrec", config=config, progress=False)
    best = torch.load(undisturbed.folder / "checkpoints" / "sequence_model" / "best.ckpt", weights_only=True)["epoch"]
    assert best < 4  # otherwise nothing could be forgotten
    with monkeypatch.context() as patch:
        stop_after(patch, SequenceModule, best, throw)
        with pytest.raises(Stop):
            fit(tiny_data, tmp_path / "before", model="sasrec", config=config, progress=False)
    (tmp_path / "before").rename(tmp_path / "after")
    resumed = fit(tiny_data, tmp_path / "after", model="sasrec", config=config, progress=False)
    assert resumed.metrics == undisturbed.metrics
    assert same_weights(resumed, undisturbed)


def test_options_that_are_no_config_are_refused(tiny_data, tmp_path):
    with pytest.raises(TypeError, match="config: got dict, expected a Config"):
        fit(tiny_data, tmp_path / "run", config={"training.epochs": 1})
    assert not (tmp_path / "run").exists()


def test_patience_holds_after_resuming(tiny_data, tiny_config, tmp_path):
    config = tiny_config.override({"training.epochs": 40, "training.patience": 1, "training.learning_rate": 0.1})
    run = fit(tiny_data, tmp_path / "run", model="sasrec", config=config, progress=False)
    epochs = len(read_log(run.folder / "logs" / "sequence_model"))
    assert epochs < 40
    metrics = run.metrics
    (run.folder / "metrics.json").unlink()
    resumed = fit(tiny_data, run.folder, model="sasrec", config=config, progress=False)
    assert resumed.metrics == metrics
    assert len(read_log(run.folder / "logs" / "sequence_model")) == epochs


def test_the_learning_rate_falls_while_validation_does_not_rise(tiny_data, tiny_config, tmp_path, monkeypatch):
    options = {"training.epochs": 12, "training.patience": 5, "training.decay_after": 2, "training.learning_rate": 0.2}
    config = tiny_config.override(options)

    def ended_with(run):
        last = torch.load(run.folder / "checkpoints" / "sequence_model" / "last.ckpt", weights_only=True)
        return last["optimizer_states"][0]["param_groups"][0]["lr"]

    run = fit(tiny_data, tmp_path / "run", model="sasrec", config=config, progress=False)
    expected, best, waited = 0.2, 0.0, 0
    for value in read_log(run.folder / "logs" / "sequence_model")["validation/ndcg@10"]:
        best, waited = max(best, value), 0 if value > best else waited + 1
        if waited and waited % 2 == 0:
            expected /= 3
    assert expected < 0.1
    assert ended_with(run) == pytest.approx(expected)

    with monkeypatch.context() as patch:
        stop_after(patch, SequenceModule, 4, throw)
        with pytest.raises(Stop):
            fit(tiny_data, tmp_path / "other", model="sasrec", config=config, progress=False)
    resumed = fit(tiny_data, tmp_path / "other", model="sasrec", config=config, progress=False)
    assert ended_with(resumed) == ended_with(run)
    assert same_weights(resumed, run)


def test_ctrl_c_raises_and_can_be_pressed_again(tiny_data, tiny_config, tmp_path, monkeypatch):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job starts with it ignored
    stop_after(monkeypatch, SequenceModule, 0, lambda: os.kill(os.getpid(), signal.SIGINT))
    try:
        with pytest.raises(KeyboardInterrupt):
            fit(tiny_data, tmp_path / "run", model="sasrec", config=tiny_config, progress=False)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_finished_run_is_returned_as_it_is(bbqrec_run, tiny_data, tiny_config, monkeypatch):
    monkeypatch.setattr("bbqrec.training.fit.train", lambda *_, **__: pytest.fail("trained again"))
    assert fit(tiny_data, bbqrec_run.folder, config=tiny_config).metrics == bbqrec_run.metrics


def test_seeds_differ_and_the_same_seed_repeats(sasrec_run, tiny_data, tiny_config, tmp_path):
    again = fit(tiny_data, tmp_path / "a", model="sasrec", config=tiny_config, progress=False)
    assert same_weights(again, sasrec_run)
    other = fit(
        tiny_data, tmp_path / "b", model="sasrec", config=tiny_config.override(["training.seed=1"]), progress=False
    )
    assert not same_weights(other, sasrec_run)


def test_the_folder_of_another_data_set_is_refused(bbqrec_run, tiny_config):
    from bbqrec.data.demo import make_demo_dataset

    with pytest.raises(ValueError, match=r"holds a run of .*, which is not the data given"):
        fit(make_demo_dataset(n_users=100, n_items=50, seed=3), bbqrec_run.folder, config=tiny_config)


def test_other_options_are_taken_while_nothing_is_trained(tiny_data, tiny_config, tmp_path, monkeypatch):
    def fail(*_):
        raise MemoryError

    small = tiny_config.override({"training.epochs": 1, "tokenizer.epochs": 1, "model.feature_width": 7})
    with monkeypatch.context() as patched:
        patched.setattr(fitting, "_make_semantic_ids", fail)
        with pytest.raises(MemoryError):
            fit(tiny_data, tmp_path / "run", config=small.override({"model.feature_width": 5}), progress=False)
    run = fit(tiny_data, tmp_path / "run", config=small, progress=False)
    assert run.config == small
    assert run.model.features.shape[1] == 7
    with pytest.raises(ValueError, match="other options"):
        fit(tiny_data, tmp_path / "run", config=tiny_config)


def test_other_options_leave_nothing_of_the_former_ones(tiny_data, tiny_config, tmp_path, monkeypatch):
    tiny_data.save(tmp_path / "described")
    (tmp_path / "described" / "features" / "text.npy").unlink()
    (tmp_path / "described" / "features" / "text.items.txt").unlink()
    with monkeypatch.context() as patched:
        patched.setattr(fitting, "_make_semantic_ids", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            fit(tmp_path / "described", tmp_path / "run", config=tiny_config, progress=False)
    assert (tmp_path / "run" / "words.parquet").is_file()
    options = {"training.epochs": 1, "tokenizer.epochs": 1, "tokenizer.modalities": ["image"]}
    run = fit(tmp_path / "described", tmp_path / "run", config=tiny_config.override(options), progress=False)
    assert not (run.folder / "words.parquet").exists()
    assert run.item_encoder.words is None


def test_training_takes_no_device_but_cuda_and_the_cpu(tiny_data, tiny_config, tmp_path, monkeypatch):
    for package in ("fabric", "pytorch"):
        monkeypatch.setattr(f"lightning.{package}.accelerators.mps.MPSAccelerator.is_available", lambda: True)
    run = fit(tiny_data, tmp_path / "run", model="sasrec", config=tiny_config.override({"training.epochs": 1}))
    assert run.finished


def test_other_options_are_refused_and_named(bbqrec_run, tiny_data, tiny_config):
    with pytest.raises(ValueError, match=r"other options, model\.layers=2 \(now 1\), training\.seed=0 \(now 5\);"):
        fit(tiny_data, bbqrec_run.folder, config=tiny_config.override(["training.seed=5", "model.layers=1"]))


def test_a_folder_with_other_files_is_refused(tiny_data, tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match="is not empty and no run folder"):
        fit(tiny_data, tmp_path)
    with pytest.raises(ValueError, match="is a file"):
        fit(tiny_data, tmp_path / "thesis.tex")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_unknown_modality_is_named(tiny_data, tmp_path):
    with pytest.raises(ValueError, match=r"modalities: got 'sound', expected feature sets of .*: image, text"):
        fit(tiny_data, tmp_path / "run", config=Config().override({"tokenizer.modalities": ["sound"]}))
    assert not (tmp_path / "run").exists()


def test_one_modality_alone(tiny_data, tiny_config, tmp_path):
    config = tiny_config.override({"tokenizer.modalities": ["image"], "training.epochs": 1, "tokenizer.epochs": 1})
    run = fit(tiny_data, tmp_path / "run", config=config, progress=False)
    assert run.semantic_ids.modalities == ("image",)
    assert run.metrics["tokenizer"]["agreement"] is None


def test_names_of_modalities_are_free(bbqrec_run, tiny_data, tiny_config, tmp_path):
    names = ("clip.v1", "title")
    renamed = replace(tiny_data, features=dict(zip(names, tiny_data.features.values(), strict=True)))
    run = fit(renamed, tmp_path / "run", config=tiny_config, progress=False)
    assert run.semantic_ids.modalities == names
    assert run.items["title"].to_list() == bbqrec_run.items["title"].to_list()
    assert same_weights(run, bbqrec_run)


@pytest.mark.parametrize("model", ["bbqrec", "tiger"])
def test_semantic_ids_need_features(model, tiny_data, tiny_config, tmp_path):
    with pytest.raises(ValueError, match="has no features to make semantic IDs from; use model 'sasrec'"):
        fit(replace(tiny_data, features={}), tmp_path / "run", model=model, config=tiny_config)


def test_sasrec_with_features_comes_back_from_its_folder(tiny_data, tiny_config, tmp_path):
    config = tiny_config.override(["model.features=true", "tokenizer.modalities=[text]", "model.item_id=false"])
    run = fit(tiny_data, tmp_path / "run", model="sasrec", config=config, progress=False)
    assert Run(run.folder, tiny_data).evaluate("test") == run.metrics["test"]
    assert run.model.features.shape == tiny_data.features["text"].values.shape
    assert not (run.folder / "tokenizer.json").exists()
    config = tiny_config.override(["model.features=true"])
    with pytest.raises(ValueError, match=r"model\.features: got true, but .* has no features; set it to false"):
        fit(replace(tiny_data, features={}), tmp_path / "other", model="sasrec", config=config)


def test_a_moved_data_set_can_be_given(sasrec_run, tiny_data, tmp_path):
    copy = shutil.copytree(sasrec_run.folder, tmp_path / "run")
    facts = json.loads((copy / "run.json").read_text())
    facts["data"]["path"] = None
    (copy / "run.json").write_text(json.dumps(facts))
    with pytest.raises(ValueError, match=r"pass it: Run\(folder, data\)"):
        Run(copy).evaluate()
    assert Run(copy, tiny_data).evaluate() == sasrec_run.metrics["test"]
    facts["data"]["path"] = str(tmp_path / "moved-away")
    (copy / "run.json").write_text(json.dumps(facts))
    with pytest.raises(ValueError, match=r"moved-away, which is gone; pass it: .* --data"):
        Run(copy).evaluate()


def test_evaluate_knows_its_splits(sasrec_run):
    with pytest.raises(ValueError, match="got 'train', expected 'validation' or 'test'"):
        sasrec_run.evaluate("train")
    kept = sasrec_run.evaluate(keep_history=True)
    assert kept["ndcg@10"] < sasrec_run.metrics["test"]["ndcg@10"]
    options = {"keep_history": True, "max_length": 12, "train_items": sasrec_run.split.train_items}
    assert kept == evaluate(sasrec_run.model, sasrec_run.split.test, sasrec_run.data.n_items, **options)


def test_a_normal_run_says_little(tiny_data, tiny_config, tmp_path, capfd, caplog, recwarn):
    config = tiny_config.override({"tokenizer.epochs": 1, "training.epochs": 1})
    level = logging.getLogger("lightning.pytorch").level
    fit(tiny_data, tmp_path / "loud", config=config)
    said = capfd.readouterr()
    assert said.out == ""
    assert [line.split(":")[0] for line in said.err.splitlines()] == [
        tiny_data.name,
        "tokenizer",
        "sequence model",
        "similarity to the history",
        "test",
    ]
    fit(tiny_data, tmp_path / "silent", config=config, progress=False)
    assert capfd.readouterr() == ("", "")
    assert not [record for record in caplog.records if record.levelno >= logging.INFO]
    assert not [str(warning.message) for warning in recwarn]
    assert logging.getLogger("lightning.pytorch").level == level
