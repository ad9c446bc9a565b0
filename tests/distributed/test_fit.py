"""Processes that `torchrun` starts: they train as one would, on their batches together, and agree on everything."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from polars.testing import assert_frame_equal
from safetensors.torch import load_file

from bbqrec import Config, Dataset, Run, fit
from bbqrec.data.batches import pack_histories
from bbqrec.data.demo import make_demo_dataset
from bbqrec.evaluation.ranking import evaluate
from bbqrec.training.plots import read_log

TINY = {
    "tokenizer.levels": 2,
    "tokenizer.codebook_size": 8,
    "tokenizer.dim": 16,
    "tokenizer.hidden": 16,
    "tokenizer.epochs": 2,
    "tokenizer.revive_after": 1,
    "tokenizer.batch_tokens": 100,
    "tokenizer.batch_items": 32,
    "model.dim": 16,
    "model.max_length": 12,
    "training.epochs": 2,
    "training.batch_tokens": 100,
    "training.learning_rate": 0.01,
}
NEAR = 0.02  # metrics of 70 users, two of whom may have changed places by a rounding error
FIT = """
import json, sys
import torch
from torch import distributed
from bbqrec import Config, fit
from bbqrec.evaluation.ranking import evaluate
from bbqrec.processes import PATIENCE, rank_and_world, together
from bbqrec.tokenizer.model import Tokenizer

moved = []
revive = Tokenizer.revive_codewords
Tokenizer.revive_codewords = lambda self: moved.append(revive(self)) or moved[-1]
data, out, model, options = sys.argv[1:]
with together():
    run = fit(data, out, model=model, config=Config().override(json.loads(options)), progress=False)
    mine = {**run.model.state_dict(), **{f"moved {i}": torch.cat(m) for i, m in enumerate(moved)}}
    mine = {name: value.double().sum().item() for name, value in mine.items()}
    rank, world = rank_and_world()
    assert distributed.group.WORLD._get_backend(torch.device("cpu")).options._timeout == PATIENCE
    everybody = [None] * world
    options = {"n_items": run.data.n_items, "max_length": 12, "batch_users": 16, "train_items": range(20)}
    in_batches = evaluate(run.model, run.split.test, **options)
    distributed.all_gather_object(everybody, (mine, in_batches))
    assert all(other == everybody[0] for other in everybody), everybody
    if rank == 0:
        print(json.dumps({"world": world, "revivals": len(moved), "evaluated": everybody[0][1]}))
"""
# One step of plain gradient descent shows the gradient: for each case of options, on a catalogue made up.
STEP = """
import json, sys
from pathlib import Path
import torch
from bbqrec import Config, Dataset
from bbqrec.data.batches import TrainingBatches
from bbqrec.data.splits import leave_one_out
from bbqrec.models import losses
from bbqrec.models.build import build_model
from bbqrec.processes import is_first, together
from bbqrec.tokenizer.semantic_ids import SemanticIDs
from bbqrec.training.modules import SequenceModule
from bbqrec.training.trainer import Stage, train

data, out, cases, tokens = Dataset.load(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]), int(sys.argv[4])
split, n_items = leave_one_out(data), data.n_items
losses.CHUNK_SCORES["cpu"] = 1000  # several chunks


class Descent(SequenceModule):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


def step(config, folder):
    batches = TrainingBatches(split.train, 12, tokens, seed=0)
    assert len(batches) == 1, len(batches)
    torch.manual_seed(0)
    codes, features = torch.randint(4, (n_items, 2, 3)), torch.randn(n_items, 5)
    codes[::5, 1] = -1
    ids = SemanticIDs(("text", "image"), codes, torch.randn(1, 3, 4, 8)) if config.model_name == "bbqrec" else None
    model = build_model(config, n_items, ids, features)
    if config.model.sharded_items:
        model.share_items()
    module = Descent(model, config, batches, data.user_ids, split.validation, n_items)
    return train(module, Stage(folder, "sequence_model", 1))["state_dict"]


with together():
    after = {name: step(Config().override(options), out / name) for name, options in cases.items()}
    if is_first():
        torch.save(after, out / "after.pt")
"""
# With items shared out and without, under the same seeds.
SHARE = """
import json, sys, weakref
from torch import distributed
from bbqrec import Config, fit
from bbqrec.models.sequence_model import SequenceModel
from bbqrec.processes import rank_and_world, together

share = SequenceModel.share_items


def share_and_look(model):
    share(model)
    own = [getattr(model, name).to_local() for name in ("item_id", "features", "codes")]
    assert [len(rows) for rows in own] == [(21, 20)[rank_and_world()[0]]] * 3
    assert all(rows.untyped_storage().nbytes() == rows.nbytes for rows in own)


SequenceModel.share_items = share_and_look
data, out, options = sys.argv[1:]
with together():
    for name, shared in (("whole", False), ("shared", True)):
        config = Config().override({**json.loads(options), "model.sharded_items": shared})
        fit(data, f"{out}/{name}", config=config, progress=False)
    group = weakref.ref(distributed.group.WORLD)
assert group() is None, "threads of gloo outlive their use"
"""
# Stopped in the third epoch, copied as it is then, and resumed.
RESUME = """
import json, shutil, sys
from bbqrec import Config, fit
from bbqrec.processes import first_does, together
from bbqrec.training.modules import SequenceModule

ended = SequenceModule.on_train_epoch_end


def stop(module):
    if module.current_epoch == 2:
        raise InterruptedError
    ended(module)


data, out, cases = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
with together():
    for name, options in cases.items():
        config = Config().override(options)
        fit(data, f"{out}/{name}/undisturbed", config=config, progress=False)
        SequenceModule.on_train_epoch_end = stop
        try:
            fit(data, f"{out}/{name}/interrupted", config=config, progress=False)
        except InterruptedError:
            SequenceModule.on_train_epoch_end = ended
        else:
            raise AssertionError(name)
        first_does(lambda: shutil.copytree(f"{out}/{name}/interrupted", f"{out}/{name}/left") and None)
        fit(data, f"{out}/{name}/interrupted", config=config, progress=False)
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("data") / "tiny"
    make_demo_dataset(n_users=70, n_items=41).save(folder)
    return Dataset.load(folder)


def launch(processes: int, code: str, *arguments: object, check: bool = True) -> subprocess.CompletedProcess:
    """Runs the code under `torchrun`, beside what its second argument names."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    done = subprocess.run(
        [*command, *in_a_file(code, *arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert not check or done.returncode == 0, done.stderr
    return done


def without_launcher(processes: int, code: str, *arguments: object) -> list[subprocess.CompletedProcess]:
    """Runs it in processes that nobody ends where one of them does: `torchrun` ends the others, sooner or later."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
    world = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "GROUP_RANK": "0"}
    common = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "none", **address, **world}
    command = [sys.executable, *in_a_file(code, *arguments)]
    started = [
        subprocess.Popen(
            command, env={**common, "RANK": str(n), "LOCAL_RANK": str(n)}, stderr=subprocess.PIPE, text=True
        )
        for n in range(processes)
    ]
    try:
        said = [process.communicate(timeout=300)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    return [
        subprocess.CompletedProcess(command, process.returncode, stderr=stderr)
        for process, stderr in zip(started, said, strict=True)
    ]


def before_an_epoch_ends(do: str) -> str:
    """Code to come before other code: does something more, in one line, at every end of an epoch."""
    return f"""
import os, signal
from bbqrec.training import modules

rank, ended = os.environ['RANK'], modules.SequenceModule.on_train_epoch_end


def end(self):
    {do}
    ended(self)


modules.SequenceModule.on_train_epoch_end = end
"""


def in_a_file(code: str, *arguments: object) -> list[str]:
    script = Path(arguments[1]).parent / "script.py"
    script.write_text(code)
    return [str(script), *map(str, arguments)]


@pytest.mark.parametrize(
    ("model", "processes"), [("bbqrec", 2), ("sasrec", 2), pytest.param("bbqrec", 4, marks=pytest.mark.check)]
)
def test_processes_agree_and_one_evaluates_as_all(data: Dataset, tmp_path: Path, model: str, processes: int) -> None:
    """Weights, codebooks and revived codewords are equal everywhere; the last batches of 4 processes are uneven."""
    done = launch(processes, FIT, data.path, tmp_path / "run", model, json.dumps(TINY))
    found = json.loads(done.stdout)
    assert found["world"] == processes
    assert (found["revivals"] > 0) == (model == "bbqrec")
    run = Run(tmp_path / "run")
    assert run.facts["processes"] == processes
    in_batches = {"n_items": data.n_items, "max_length": 12, "batch_users": 16, "train_items": range(20)}
    assert found["evaluated"] == evaluate(run.model, run.split.test, **in_batches)
    assert run.metrics["test"] == run.evaluate("test")


def test_a_step_of_two_processes_is_one_over_all_their_transitions(data: Dataset, tmp_path: Path) -> None:
    options = {"model.dim": 16, "model.max_length": 12, "model.dropout": 0.0}
    shared, sampled = {**options, "model.sharded_items": True}, {"model.sampled_items": 20}
    cases = {
        "whole": {**options, "model_name": "sasrec"},
        "shared": {**shared, "model_name": "sasrec"},
        "shared, with content": shared,
        "sampled": {**options, **sampled},
        "sampled, shared": {**shared, **sampled},
    }
    tokens = int(sum(max(0, length - 3) for length in data.histories.lengths))
    for processes, share in ((1, tokens), (2, tokens // 2 + 1)):
        folder = tmp_path / str(processes)
        folder.mkdir()
        launch(processes, STEP, data.path, folder, json.dumps(cases), share)
    one, two = (torch.load(tmp_path / str(processes) / "after.pt") for processes in (1, 2))
    one["sampled, shared"] = two.pop("sampled")  # each process draws its own sample, whoever holds the rows
    for case, weights in two.items():
        assert weights.keys() == one[case].keys()
        for name, value in one[case].items():
            torch.testing.assert_close(weights[name], value, rtol=1e-4, atol=1e-6, msg=f"{case}: {name}")


def test_items_shared_out_are_trained_as_whole_tables_are(data: Dataset, tmp_path: Path) -> None:
    launch(2, SHARE, data.path, tmp_path / "runs", json.dumps(TINY))
    whole, shared = (Run(tmp_path / "runs" / name) for name in ("whole", "shared"))
    assert_alike(shared, whole)
    assert shared.metrics["test"] == pytest.approx(whole.metrics["test"], abs=NEAR)
    assert shared.metrics["test"] == shared.evaluate("test")
    logs = (read_log(run.folder / "logs" / "sequence_model") for run in (shared, whole))
    assert_frame_equal(*logs, rel_tol=1e-3, abs_tol=NEAR)


def assert_alike(run: Run, expected: Run) -> None:
    """By item vectors and scores: what shifts all scores of attention has a gradient of rounding errors, which Adam
    makes as large as any other."""
    batch = pack_histories(expected.split.test.histories, 12)
    for what in (lambda model: model.item_vectors(), lambda model: model.score(batch)):
        torch.testing.assert_close(what(run.model), what(expected.model), rtol=1e-4, atol=1e-5)


@pytest.mark.check
def test_weights_that_one_process_spoils_end_all(data: Dataset, tmp_path: Path) -> None:
    spoil = before_an_epoch_ends("if rank == '1': modules.own_rows(self.model.item_id.detach())[0] = float('nan')")
    options = json.dumps({**TINY, "model.sharded_items": True})
    for process in without_launcher(2, spoil + FIT, data.path, tmp_path / "run", "sasrec", options):
        assert process.returncode == 1
        assert "training: diverged in epoch 1, weights are not finite" in process.stderr


@pytest.mark.check
def test_items_shared_out_resume_with_any_number_of_processes(data: Dataset, tmp_path: Path) -> None:
    options = {**TINY, "training.epochs": 3}
    shared, sampled = {**options, "model.sharded_items": True}, {"model.sampled_items": 20}
    cases = {"all": shared, "sampled": {**shared, **sampled}, "sampled, whole": {**options, **sampled}}
    launch(2, RESUME, data.path, tmp_path / "runs", json.dumps(cases))
    for case, options in cases.items():
        folder = tmp_path / "runs" / case
        ends = [load_file(folder / name / "model.safetensors") for name in ("undisturbed", "interrupted")]
        for name, value in ends[0].items():
            assert torch.equal(ends[1][name], value), f"{case}: {name}"
        shutil.copytree(folder / "left", folder / "for three")
        fit(data, folder / "left", config=Config().override(options), progress=False)
        launch(3, FIT, data.path, folder / "for three", "bbqrec", json.dumps(options))  # who agree, or it fails
        for name in ("left", "for three"):
            assert len(read_log(folder / name / "logs" / "sequence_model")) == 3
            checkpoint = torch.load(folder / name / "checkpoints" / "sequence_model" / "last.ckpt", weights_only=True)
            assert checkpoint["state_dict"]["model.item_id"].shape == (data.n_items, 16)
    runs = [Run(tmp_path / "runs" / name / "undisturbed") for name in ("sampled", "sampled, whole")]
    assert_alike(*runs)


@pytest.mark.check
def test_interrupted_processes_resume_and_end_where_undisturbed_ones_do(data: Dataset, tmp_path: Path) -> None:
    options = {**TINY, "training.epochs": 3}
    launch(2, FIT, data.path, tmp_path / "undisturbed", "bbqrec", json.dumps(options))
    stop = before_an_epoch_ends("if self.current_epoch > 1: os._exit(3)")
    out = tmp_path / "interrupted"
    assert launch(2, stop + FIT, data.path, out, "bbqrec", json.dumps(options), check=False).returncode
    assert not Run(out).finished
    launch(2, FIT, data.path, out, "bbqrec", json.dumps(options))
    ends = [load_file(tmp_path / name / "model.safetensors") for name in ("undisturbed", "interrupted")]
    for name, value in ends[0].items():
        assert torch.equal(ends[1][name], value), name


@pytest.mark.check
def test_where_a_process_dies_the_others_say_so_and_end(data: Dataset, tmp_path: Path) -> None:
    die = before_an_epoch_ends("if rank == '1' and self.current_epoch == 1: os.kill(os.getpid(), signal.SIGKILL)")
    arguments = (data.path, tmp_path / "run", "sasrec", json.dumps(TINY))
    first, second = without_launcher(2, die + FIT, *arguments)
    assert second.returncode == -signal.SIGKILL
    assert first.returncode == 1
    assert "ConnectionError: processes: process 0 lost another of 2" in first.stderr
    launch(2, FIT, *arguments)


def test_what_the_first_process_refuses_all_refuse(data: Dataset, tmp_path: Path) -> None:
    shorter = Config().override({**TINY, "training.epochs": 1})
    fit(data, tmp_path / "run", model="sasrec", config=shorter, progress=False)
    done = launch(2, FIT, data.path, tmp_path / "run", "sasrec", json.dumps(TINY), check=False)
    assert done.returncode
    assert done.stderr.count("holds a run with other options, training.epochs=1 (now 2)") == 2
