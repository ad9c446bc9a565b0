"""Files are written whole or not at all; and what a library says of a broken one is an error."""

from __future__ import annotations

import errno
import io
import math
import os
import re
import tempfile
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
import polars as pl

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
TEMPORARY = ".tmp"  # ends the names of files that are not finished
LOCK = ".lock"
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # of a disk
TRIES = 100
DEFLATE_AT_MOST = 1032  # bytes that one packed byte can stand for
BROKEN_NPZ = (  # what reading a broken or hostile one raises; NumPy parses headers as Python
    ValueError,
    EOFError,
    RuntimeError,  # of zipfile: encrypted, or packed in a way that it does not know
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
    OSError,  # places before the file's start
)


class StorageFault(OSError):
    """A full disk, or a folder that cannot be written, in one sentence. `errno` is the system's."""


def atomically(path: Path, write: Callable[[str], Any]) -> None:
    """Calls `write` with a temporary name beside `path`, and moves the result there once it is on the disk.

    Raises `StorageFault` where that fails; the former file is still there then, and nothing half-written.
    """
    with storage_faults_named(path.parent, path.name):
        with _closed_folder_named(path.parent, path.name):
            handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=TEMPORARY)
        os.close(handle)
        try:
            write(temporary)
            os.chmod(temporary, 0o644)
            _sync(temporary)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)  # some libraries clean up themselves
            raise
        _sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8, lines as they are, atomically."""
    atomically(path, lambda temporary: Path(temporary).write_text(text, encoding="utf-8", newline="\n"))


def folder_atomically(folder: Path, write: Callable[[Path], Any]) -> None:
    """`atomically` for a folder that is not there yet, or empty: `write` makes it, under a temporary name."""
    with _closed_folder_named(folder.parent, folder.name):
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.")
    with storage_faults_named(folder.parent, folder.name), temporary:
        whole = Path(temporary.name) / folder.name
        write(whole)
        for path in (*whole.rglob("*"), whole):
            _sync(path)
        if folder.exists():  # it is empty, and some systems rename onto no folder
            folder.rmdir()
        whole.rename(folder)
        _sync(folder.parent)


def remove_temporaries(folder: Path) -> None:
    """Removes what killed calls left in a folder and those in it."""
    for pattern in (f".*{TEMPORARY}", ".tmp*"):  # the latter are those of safetensors
        for path in folder.rglob(pattern):
            path.unlink()


def require_writable(folder: Path) -> None:
    """Makes a folder, or finds that it takes files: raises `StorageFault` before there is work to lose."""
    with _closed_folder_named(folder.parent, folder.name):
        folder.mkdir(parents=True, exist_ok=True)
    with _closed_folder_named(folder, "a file"), tempfile.TemporaryFile(dir=folder):
        pass


@contextmanager
def held(folder: Path, argument: str = "out") -> Iterator[None]:
    """Holds a folder, which can be written: raises `ValueError` where another call does, in this process or another.

    It ends with the process, and those that it forked, whatever ends them. On systems and disks without locks nothing
    is held. `argument` is what the error calls the folder.
    """
    path = folder / LOCK
    with _closed_folder_named(folder, LOCK):
        file = _locked(path)
    if file is None:
        wait = "wait until it ends, or choose another folder"
        raise ValueError(f"{argument}: another process is working on {folder}; {wait}")
    with file:
        try:
            yield
        finally:
            with suppress(OSError):  # what happened is more important, and a file that nobody holds does no harm
                path.unlink()


def _locked(path: Path) -> IO[str] | None:
    """A file, made where it is not there, that nobody else has locked; None where somebody has."""
    for _ in range(TRIES):
        file = path.open("a")
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
        except OSError as error:
            if error.errno in NO_LOCKS:
                return file
            file.close()
            raise
        # Whoever held it may have removed it in between: a third one would make it anew, and lock that.
        with suppress(FileNotFoundError):
            if os.path.samestat(path.stat(), os.fstat(file.fileno())):
                return file
        file.close()
    return path.open("a")  # a disk that gives a file another number each time


@contextmanager
def storage_faults_named(folder: Path, what: str) -> Iterator[None]:
    """A full disk becomes a `StorageFault` that names the folder."""
    try:
        yield
    except Exception as error:
        number = _error_number(error)
        if isinstance(error, StorageFault) or number not in FULL:
            raise
        raise _fault(number, f"{folder}: no space left for {what}", "make room and call again") from error


@contextmanager
def _closed_folder_named(folder: Path, what: str) -> Iterator[None]:
    """Whatever keeps a file from being made in a folder becomes a `StorageFault` that names it."""
    try:
        yield
    except OSError as error:
        wanted = "choose one that is there and can be written"
        number = errno.ENOTDIR if isinstance(error, FileExistsError) else error.errno  # a file has the folder's name
        raise _fault(number, f"{folder}: {what} cannot be made in this folder", wanted) from error


def _fault(number: int, what: str, remedy: str) -> StorageFault:
    fault = StorageFault(f"{what} ({os.strerror(number)}); {remedy}")
    fault.errno = number
    return fault


class Sink(io.BufferedIOBase):
    """A file to write to that never fails while it is written: its first fault is raised when it is closed.

    PyTorch ends the whole process where a write fails while it cleans up, and NumPy does not say what failed.
    """

    def __init__(self, path: str | Path):
        self._file = open(path, "wb")  # noqa: SIM115 (a `with` would end too early: `close` closes it)
        self._fault: OSError | None = None

    def write(self, data: Any) -> int:
        self._try(self._file.write, data)
        return memoryview(data).nbytes

    def seek(self, *place: int) -> int:
        return self._try(self._file.seek, *place)

    def _try(self, do: Callable[..., int], *arguments: Any) -> int:
        if self._fault is None:
            try:
                return do(*arguments)
            except OSError as error:
                self._fault = error
        return 0

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        if self.closed:
            return
        super().close()
        try:
            self._file.close()
        finally:
            if self._fault is not None:
                raise self._fault


def _error_number(error: Exception) -> int | None:
    """What the system said: polars and safetensors pass it on in words only."""
    if isinstance(error, OSError) and error.errno:
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None


def _sync(path: str | Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    if os.name != "posix" and Path(path).is_dir():  # Windows opens no folders
        return
    handle = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_npz_array(file: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    """An array of an `.npz`. A header that claims more than the file can hold is refused before it is allocated.

    Raises one of `BROKEN_NPZ`.
    """
    with file.open(member) as stream:
        version = np.lib.format.read_magic(stream)
        reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = reader(stream)
    claimed, most = math.prod(shape) * dtype.itemsize, member.compress_size * DEFLATE_AT_MOST
    if not 0 <= claimed <= min(member.file_size, most):
        raise ValueError(f"{member.filename} of shape {shape} would be {claimed:,} bytes, which it does not hold")
    with file.open(member) as stream:
        return np.lib.format.read_array(stream, allow_pickle=False)


def read_parquet(path: Path) -> pl.DataFrame:
    """The table of one file, whatever characters its name has. Raises `PolarsError` where it is broken."""
    with panics_raised():
        return pl.read_parquet(path, glob=False)


@contextmanager
def panics_raised() -> Iterator[None]:
    """Polars panics at some broken values, which no `except Exception` catches: here that is a `ComputeError`."""
    try:
        yield
    except pl.exceptions.PanicException as panic:
        raise pl.exceptions.ComputeError(str(panic)) from None


def one_line(text: object) -> str:
    """For a message: what a library or a file says, without line breaks, and not all of what is long."""
    words = " ".join(str(text).split())
    return words if len(words) <= 200 else f"{words[:200]}..."
