"""Writing files: whole or not at all, also where the disk is full or the folder is closed."""

import errno
import fcntl
import os
import resource
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

from bbqrec.data.demo import make_demo_dataset
from bbqrec.data.embedding import _save_array, _save_part
from bbqrec.data.files import LOCK, StorageFault, atomically, held, remove_temporaries, require_writable, write_text
from bbqrec.serving import export
from bbqrec.tokenizer.semantic_ids import SemanticIDs
from bbqrec.training import plots, trainer
from bbqrec.training.run import save_weights

NUMBERS = torch.arange(100_000.0)


class Adds(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(NUMBERS)

    def forward(self, x):
        return x + self.weight


def write_program(path):
    program = torch.export.export(Adds(), (NUMBERS,))
    atomically(path, lambda temporary: export._save(program, "{}", temporary))


def write_picture(path):
    figure = Figure()
    figure.subplots().plot(NUMBERS[:100].sin())
    plots._save(figure, path)


# Everything that is written, each as its own library writes it, larger than the limit below.
WRITERS = {
    "weights": lambda path: save_weights({"a": NUMBERS}, path),
    "checkpoint": lambda path: trainer._AtomicCheckpoints().save_checkpoint({"a": NUMBERS}, path),
    "small checkpoint": lambda path: trainer._AtomicCheckpoints().save_checkpoint({"a": NUMBERS[:900]}, path),
    "program": write_program,
    "table": lambda path: SemanticIDs.none(9000).save_table(path, [str(i) for i in range(9000)], ["t"] * 9000),
    "array": lambda path: atomically(path, partial(_save_array, NUMBERS.numpy())),
    "part": lambda path: atomically(path, partial(_save_part, {"values": NUMBERS.numpy()})),
    "text": lambda path: write_text(path, "words " * 1000),
    "picture": write_picture,
}


@pytest.fixture
def little_room():
    """No file can be larger than 4 KB: PyTorch's last bytes of a small checkpoint do not fit, nor the first of others.

    Python ignores the signal that comes with it, so that writing fails as on a full disk.
    """
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("name", WRITERS)
def test_where_there_is_no_room_the_former_file_stays(name, tmp_path, little_room):
    path = tmp_path / "folder" / "file"
    path.parent.mkdir()
    path.write_bytes(b"former")
    with pytest.raises(
        StorageFault, match=r"^\S+/folder: no space left for file \(File too large\); make room"
    ) as fault:
        WRITERS[name](path)
    assert fault.value.errno == errno.EFBIG
    assert path.read_bytes() == b"former"
    assert os.listdir(path.parent) == ["file"]


def test_where_there_is_no_room_there_is_no_data_set(tmp_path, little_room):
    with pytest.raises(StorageFault, match=r"no space left for shop"):
        make_demo_dataset(n_users=150, n_items=60).save(tmp_path / "shop")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("stop", [KeyboardInterrupt, ValueError])
def test_who_stops_in_the_middle_leaves_the_former_file(stop, tmp_path):
    def write(temporary):
        Path(temporary).write_bytes(b"half")
        raise stop

    path = tmp_path / "file"
    path.write_bytes(b"former")
    with pytest.raises(stop):
        atomically(path, write)
    assert path.read_bytes() == b"former"
    assert os.listdir(tmp_path) == ["file"]


def test_a_file_takes_its_place_once_it_is_on_the_disk(tmp_path, monkeypatch):
    done = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: done.append(os.readlink(f"/proc/self/fd/{handle}")) or sync(handle))
    monkeypatch.setattr(os, "replace", lambda *names: done.append("replaced") or replace(*names))
    write_text(tmp_path / "file", "text")
    assert [Path(name).suffix or name for name in done] == [".tmp", "replaced", str(tmp_path)]


def test_temporary_files_of_killed_calls_are_removed(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    for name in (".run.json.abc.tmp", "checkpoints/.last.ckpt.abc.tmp", ".tmpAbC", "kept.tmp", ".kept"):
        (tmp_path / name).write_text("half")
    remove_temporaries(tmp_path)
    assert sorted(path.name for path in tmp_path.rglob("*")) == [".kept", "checkpoints", "kept.tmp"]


def test_a_folder_that_takes_no_files_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    closed = r"file: run cannot be made in this folder \(Not a directory\); choose one that is there"
    with pytest.raises(StorageFault, match=closed):
        require_writable(tmp_path / "file" / "run")
    with pytest.raises(
        StorageFault, match=r"nowhere: file cannot be made in this folder \(No such file or directory\)"
    ):
        write_text(tmp_path / "nowhere" / "file", "")
    with pytest.raises(StorageFault, match=closed):
        make_demo_dataset(n_users=20, n_items=40).save(tmp_path / "file" / "run")
    with pytest.raises(ValueError, match=r"folder: \S+ is a file, expected a folder"):
        make_demo_dataset(n_users=20, n_items=40).save(tmp_path / "file")


def test_what_is_wrong_for_other_reasons_stays_as_it_is(tmp_path):
    def fail(_):
        raise ValueError("wrong")

    with pytest.raises(ValueError, match=r"^wrong$"):
        atomically(tmp_path / "file", fail)


def test_a_folder_is_held_until_its_process_dies(tmp_path):
    code = "import fcntl, sys; fcntl.flock(file := open(sys.argv[1], 'a'), fcntl.LOCK_EX); print(flush=True); input()"
    other = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path / LOCK], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with other:
        other.stdout.readline()
        with pytest.raises(ValueError, match=f"out: another process is working on {tmp_path}; wait"), held(tmp_path):
            pass
        other.kill()
    assert (tmp_path / LOCK).is_file()
    with held(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_a_lock_that_is_removed_while_it_is_taken_holds_nothing(tmp_path, monkeypatch):
    """Whoever held it ends between the moments when the file is opened and when it is locked."""
    lock, asked = fcntl.flock, []

    def ends_first(file, how):
        asked.append(how)
        if len(asked) == 1:
            (tmp_path / LOCK).unlink()
        return lock(file, how)

    monkeypatch.setattr(fcntl, "flock", ends_first)
    with held(tmp_path), pytest.raises(ValueError, match="out: another process"), held(tmp_path):
        pass
    assert len(asked) == 3


def test_a_disk_without_locks_holds_nothing(tmp_path, monkeypatch):
    def no_locks(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with held(tmp_path), held(tmp_path):
        pass
    assert not list(tmp_path.iterdir())
