"""`fit` where a disk is full or bytes are damaged: what it says, what it keeps, and how it goes on."""

import json
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from bbqrec import BBQRec, Run, fit
from bbqrec.cli.main import app
from bbqrec.data.files import StorageFault, write_text
from bbqrec.training.modules import SequenceModule
from bbqrec.training.plots import read_log, save_curves
from bbqrec.training.trainer import _AtomicCheckpoints, read_checkpoint


def spoil(path, share=0.5):
    """Flips a bit of one byte: of the middle one, or wherever."""
    content = bytearray(path.read_bytes())
    content[int(len(content) * share)] ^= 1
    path.write_bytes(content)


def unfinished(run, folder):
    """A copy that lacks what is written last."""
    shutil.copytree(run.folder, folder)
    (folder / "metrics.json").unlink()
    return folder


@pytest.fixture
def small_disk(tmp_path):
    """A disk of its own, and a function that sets its size."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options):
        return subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True).returncode

    if os.name != "posix" or not shutil.which("mount") or mount("size=300k"):
        pytest.skip("needs to be allowed to mount a disk")
    yield folder, lambda size: mount(f"remount,size={size}")
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_is_one_sentence_and_fit_goes_on_when_there_is_room(
    sasrec_run, tiny_data, tiny_config, small_disk, tmp_path
):
    folder, resize = small_disk
    tiny_config.override({"model_name": "sasrec"}).save(tmp_path / "options.yaml")
    options = ["--data", tiny_data.path, "--out", folder / "run", "--config", tmp_path / "options.yaml"]
    arguments = ["fit", *map(str, options)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1, result.output
    [sentence] = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert re.match(r"Error: \S+/disk/run\S*: no space left for .* \(No space left on device\); make room", sentence)
    assert result.stderr.rstrip().endswith(sentence)
    assert not [path for path in folder.rglob(".*") if path.is_file()]
    for checkpoint in folder.rglob("*.ckpt"):
        read_checkpoint(checkpoint)
    assert resize("16m") == 0
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert Run(folder / "run").metrics == sasrec_run.metrics


def test_no_room_for_a_log_does_not_stop_a_run_that_is_resumed(bbqrec_run, tmp_path):
    """Lightning's logs are not written atomically: wherever they are cut off, what is whole is read."""
    log = bbqrec_run.folder / "logs" / "sequence_model"
    whole = read_log(log)
    [path] = log.glob("version_0/metrics.csv")
    content = path.read_bytes()
    cut = tmp_path / "sequence_model" / "version_0" / "metrics.csv"
    cut.parent.mkdir(parents=True)
    for end in range(len(content)):
        cut.write_bytes(content[:end])
        for row in read_log(tmp_path / "sequence_model").iter_rows(named=True):
            values = whole.row(row["epoch"], named=True)
            assert all(value in (None, values[name]) for name, value in row.items()), end
    cut.write_bytes(content[: content.index(b"\n") - 3])
    save_curves(tmp_path / "curves.png", tmp_path)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_checkpoint_with_one_wrong_bit_is_never_taken_for_a_whole_one(tmp_path):
    path = tmp_path / "last.ckpt"
    values = {"weights": torch.arange(1000.0), "epoch": 3, "names": ["a", "b"]}
    _AtomicCheckpoints().save_checkpoint(values, path)
    whole, moments = path.read_bytes(), random.Random(0)
    damaged = [whole[:size] for size in (0, 1, 100, len(whole) // 2, len(whole) - 1)]
    for place in moments.sample(range(len(whole)), 600):
        damaged.append(whole[:place] + bytes([whole[place] ^ 1 << moments.randrange(8)]) + whole[place + 1 :])
    refusals = []
    for content in damaged:
        path.write_bytes(content)
        try:
            loaded = read_checkpoint(path)
        except ValueError as error:
            refusals.append(str(error))
        else:  # a bit that says nothing, such as a date
            assert torch.equal(loaded["weights"], values["weights"])
            assert loaded["epoch"] == 3
            assert loaded["names"] == ["a", "b"]
    assert len(refusals) > 500
    assert all(refusal.startswith(f"{path}: is damaged") for refusal in refusals)
    assert all(f"delete the folder {tmp_path}, and fit trains this stage anew" in refusal for refusal in refusals)


def test_a_damaged_last_checkpoint_is_left_out_where_there_is_a_best_one(
    sasrec_run, tiny_data, tiny_config, tmp_path, capsys
):
    folder = unfinished(sasrec_run, tmp_path / "run")
    checkpoints = folder / "checkpoints" / "sequence_model"
    best = torch.load(checkpoints / "best.ckpt", weights_only=True)["epoch"] + 1
    spoil(checkpoints / "last.ckpt")
    resumed = fit(tiny_data, folder, model="sasrec", config=tiny_config)
    said = capsys.readouterr().err
    assert f"{checkpoints / 'last.ckpt'}: is damaged" in said
    assert f"; goes on from best.ckpt, after epoch {best}\n" in said
    assert resumed.metrics == sasrec_run.metrics
    weights = sasrec_run.model.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in resumed.model.state_dict().items())


@pytest.mark.parametrize("damaged", [("best",), ("best", "last")])
def test_a_stage_without_a_whole_checkpoint_is_trained_anew_when_they_are_deleted(
    damaged, sasrec_run, tiny_data, tiny_config, tmp_path, monkeypatch
):
    folder = unfinished(sasrec_run, tmp_path / "run")
    checkpoints = folder / "checkpoints" / "sequence_model"
    for name in damaged:
        spoil(checkpoints / f"{name}.ckpt")
    with monkeypatch.context() as patch:
        patch.setattr("bbqrec.training.trainer._fit_interruptibly", lambda *_: pytest.fail("trained"))
        with pytest.raises(ValueError, match=rf"best\.ckpt: is damaged .*; delete the folder {checkpoints}, and fit"):
            fit(tiny_data, folder, model="sasrec", config=tiny_config, progress=False)
    shutil.rmtree(checkpoints)
    assert fit(tiny_data, folder, model="sasrec", config=tiny_config, progress=False).metrics == sasrec_run.metrics


@pytest.mark.parametrize(
    "name", ["model.safetensors", "semantic_ids.parquet", "features.parquet", "tokenizer.safetensors"]
)
def test_one_wrong_bit_in_a_run_folder_is_refused(name, bbqrec_run, tiny_data, tiny_config, tmp_path):
    folder = unfinished(bbqrec_run, tmp_path / "run")
    shutil.copy(bbqrec_run.folder / "metrics.json", folder)
    spoil(folder / name)
    damaged = (
        rf"{name}: is damaged, its SHA-256 is not the one in run\.json; copy the run folder again, or fit into a new"
    )
    with pytest.raises(ValueError, match=damaged):
        BBQRec.load(folder).add_items(["new"], features={"text": tiny_data.features["text"].values[:1]})
    if name == "tokenizer.safetensors":
        (folder / "metrics.json").unlink()
        with pytest.raises(ValueError, match=damaged):
            fit(tiny_data, folder, config=tiny_config, progress=False)
    facts = json.loads((folder / "run.json").read_text())
    assert len(facts.pop("sha256")[name]) == 64
    (folder / "run.json").write_text(json.dumps(facts))
    Run(folder).require_whole(name)  # a run of an earlier version


def test_a_folder_that_cannot_be_written_is_refused_before_training(
    bbqrec_run, tiny_data, tiny_config, tmp_path, monkeypatch
):
    def closed(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("bbqrec.training.fit.train", lambda *_, **__: pytest.fail("trained"))
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"file: run cannot be made in this folder \(Not a directory\); choose one"):
        fit(tiny_data, tmp_path / "file" / "run", config=tiny_config)
    folder = unfinished(bbqrec_run, tmp_path / "run")
    monkeypatch.setattr("tempfile.TemporaryFile", closed)
    with pytest.raises(OSError, match=r"run: a file cannot be made in this folder \(Permission denied\); choose one"):
        fit(tiny_data, folder, config=tiny_config)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_command_says_where_it_stopped_and_resumes(
    number, code, sasrec_run, tiny_data, tiny_config, tmp_path, monkeypatch
):
    tiny_config.override({"model_name": "sasrec"}).save(tmp_path / "options.yaml")
    options = ["--data", tiny_data.path, "--out", tmp_path / "run", "--config", tmp_path / "options.yaml"]
    arguments = ["fit", *map(str, options)]
    ended = SequenceModule.on_train_epoch_end

    def stop(self):
        if self.current_epoch == 2:
            os.kill(os.getpid(), number)
        ended(self)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job starts with it ignored
    try:
        with monkeypatch.context() as patch:
            patch.setattr(SequenceModule, "on_train_epoch_end", stop)
            result = CliRunner().invoke(app, arguments)
    finally:
        signal.signal(signal.SIGINT, before)
    assert result.exit_code == code, result.output
    last = tmp_path / "run" / "checkpoints" / "sequence_model" / "last.ckpt"
    where = (
        f"Interrupted in epoch 3 of the sequence model; the last good checkpoint is {last}; the same command resumes."
    )
    assert result.stderr.splitlines()[-1] == where
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert Run(tmp_path / "run").metrics == sasrec_run.metrics


KILLED = """
import os, signal
from bbqrec.cli.main import app

replace = os.replace
def stop(source, target):
    if str(target).endswith("last.ckpt") and os.path.exists(target):
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
os.replace = stop
app()
"""


def test_who_is_killed_while_a_checkpoint_is_written_goes_on_from_the_former(
    sasrec_run, tiny_data, tiny_config, tmp_path
):
    config = tiny_config.override({"model_name": "sasrec"})
    config.save(tmp_path / "options.yaml")
    folder = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, "-c", KILLED, "fit", "--data", tiny_data.path, "--out", folder, "--config", "options.yaml"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == -signal.SIGKILL
    checkpoints = folder / "checkpoints" / "sequence_model"
    assert len(list(checkpoints.glob(".last.ckpt.*.tmp"))) == 1
    assert read_checkpoint(checkpoints / "last.ckpt")["epoch"] == 0
    assert fit(tiny_data, folder, config=config, progress=False).metrics == sasrec_run.metrics
    assert sorted(path.name for path in checkpoints.iterdir()) == ["best.ckpt", "last.ckpt"]


def test_a_fault_of_the_first_process_reaches_the_others(tmp_path):
    with pytest.raises(StorageFault) as fault:
        write_text(tmp_path / "nowhere" / "file", "")
    assert str(pickle.loads(pickle.dumps(fault.value))) == str(fault.value)
