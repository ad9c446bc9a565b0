"""Feature files from texts and images, by pretrained models that others made: what `bbqrec embed` does.

Of a folder in the native format it reads

    items.parquet|csv                the items; all their text columns together are an item's text
    images/<item>.<extension>        images, in any format that Pillow reads: the name of the file is that of the item

and it writes

    features/<modality>.npy          and `.items.txt`, as `bbqrec.data.formats.native` reads them
    features/<modality>.json         what they were made by
    features/.<modality>.parts/      what an unfinished call has so far, a file a batch, each moved there whole
"""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from zipfile import ZipFile

import numpy as np
import torch

from bbqrec.data.dataset import check_finite, joined
from bbqrec.data.files import BROKEN_NPZ, Sink, atomically, held, one_line, read_npz_array, write_text
from bbqrec.data.formats import native

SENTENCE_TRANSFORMERS = "sentence-transformers:"
TEXTS_A_PART, IMAGES_A_PART = 256, 64  # what an interrupted call loses at most
TEXTS_A_BATCH = 32  # padded to the longest of them


class Encoded(NamedTuple):
    """What a model makes of a part of the inputs."""

    values: np.ndarray  # (N, F) float32, of those that could be read
    failures: dict[int, str]  # why the others could not, by their place in the part


class Encoder(NamedTuple):
    """A model at hand."""

    encode: Callable[[Sequence[Any]], Encoded]
    identity: bytes  # hash of what decides on its outputs


@dataclass(frozen=True)
class _Job:
    """Features of one modality to make.

    Attributes:
        modality: "text" or "image".
        model: its name or folder.
        items: that have an input, in the order of the catalogue.
        inputs: of these items: texts, or paths of images.
        versions: says of each input whether it is still the same.
        part: inputs that are encoded and kept together.
        n_items: of the catalogue.
        notes: more to report.
        load: opens the model.
    """

    modality: str
    model: str
    items: list[str]
    inputs: list[Any]
    versions: list[str]
    part: int
    n_items: int
    notes: dict[str, Any]
    load: Callable[[str], Encoder]


def embed(
    folder: str | Path,
    *,
    text: str | None = None,
    image: str | None = None,
    images: str | Path | None = None,
    progress: bool | None = None,
) -> dict[str, dict[str, Any]]:
    """Makes `features/text` from the texts of items, and `features/image` from their images.

    An interrupted call, however it ended, goes on where it was and ends with the same features; one that is done
    already, of the same inputs by the same model, does nothing. Items without an input, and those whose image cannot be
    read, lack the modality.

    Args:
        folder: a folder in the native format, with `items.parquet|csv`; it need not hold interactions.
        text: "sentence-transformers:" and the folder of such a model, or its name on the Hugging Face Hub.
        image: folder of a vision model of `transformers` with its image processor, or its name. Features are
            `get_image_features` of models with two towers such as CLIP, otherwise what the model's pooler gives, or
            the mean over positions where it has none.
        images: folder of the images, by default `images` in `folder`. A link in it that leads out of it is not read.
        progress: a bar on stderr; by default on a terminal only.

    Returns:
        For each modality "model", "items" (of the catalogue), "made" (rows written), "without" (items without an
        input), "unreadable" (a sentence for each input that could not be read), "width", "file"; of images also
        "strays", the number of images that name no item.

    Raises:
        ImportError: a package of the extra `[embed]` is missing.
        ValueError: there is nothing to embed, a model cannot be loaded, features are there that were made otherwise, or
            another call works on the folder.
    """
    if text is None and image is None:
        raise ValueError("embed: got no model; give a text model, an image model, or both")
    if images is not None and image is None:
        raise ValueError(f"images: got {images} without an image model to read them; give one")
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"data: {folder} is no folder; give one with items.parquet or items.csv")
    path = native.items_file(folder)
    item_ids, texts = native.read_items(path)
    native.check_lines(item_ids)
    jobs = []  # what is wrong with the second is said before the first one's hours
    if text is not None:
        jobs.append(_of_texts(text, path, item_ids, texts))
    if image is not None:
        jobs.append(_of_images(image, folder, None if images is None else Path(images), item_ids))
    features = folder / "features"
    features.mkdir(exist_ok=True)
    with held(features, "data"):
        return {job.modality: _make(job, features, progress) for job in jobs}


def _of_texts(model: str, path: Path, item_ids: list[str], texts: dict[str, list[str]]) -> _Job:
    name = model.removeprefix(SENTENCE_TRANSFORMERS)
    if name.startswith("~"):  # a shell looks for it at the start of a word only
        name = str(Path(name).expanduser())
    if name == model or not name:
        raise ValueError(
            f"text: got {model!r}, expected {SENTENCE_TRANSFORMERS}<folder or name of a model>, e.g. "
            f"{SENTENCE_TRANSFORMERS}all-MiniLM-L6-v2"
        )
    _check_model("text", name)
    together = [joined(column[i] for column in texts.values()) for i in range(len(item_ids))]
    chosen = [i for i, words in enumerate(together) if words]
    if not chosen:
        columns = f"its columns {', '.join(texts)} are empty" if texts else "it has no text column beside item"
        raise ValueError(f"text: {path} says nothing about any item: {columns}; add a column such as title")
    inputs = [together[i] for i in chosen]
    items = [item_ids[i] for i in chosen]
    return _Job("text", name, items, inputs, inputs, TEXTS_A_PART, len(item_ids), {}, _load_text_model)


def _of_images(model: str, folder: Path, images: Path | None, item_ids: list[str]) -> _Job:
    _check_model("image", model)
    known = set(_needs("PIL.Image").registered_extensions())
    root = folder / "images" if images is None else images
    if not root.is_dir():
        raise ValueError(f"images: {root} is no folder; make it, with a file for each item, e.g. {item_ids[0]}.jpg")
    if images is None and not root.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"images: {root} leads out of {folder}; if it shall, name it as the folder of the images")
    found: dict[str, Path] = {}
    wanted, strays = set(item_ids), 0
    for path in sorted(root.iterdir()):
        if path.suffix.lower() not in known or path.is_dir():
            continue
        if path.stem not in wanted:
            strays += 1
        elif path.stem in found:
            raise ValueError(f"images: {found[path.stem]} and {path.name} are both of item {path.stem!r}; keep one")
        else:
            found[path.stem] = path
    if not found:
        raise ValueError(f"images: no file in {root} has the name of an item, e.g. {item_ids[0]}.jpg")
    items = [item for item in item_ids if item in found]
    inputs = [found[item] for item in items]
    load = partial(_load_image_model, root=root.resolve())
    versions = [_version(path) for path in inputs]
    return _Job("image", model, items, inputs, versions, IMAGES_A_PART, len(item_ids), {"strays": strays}, load)


def _check_model(modality: str, name: str) -> None:
    """What can only be a folder is looked for here: the libraries would ask the network for it."""
    if (name.startswith((".", "/")) or name.count("/") > 1) and not Path(name).is_dir():
        raise ValueError(f"{modality}: {name} is no folder; give that of a model, or the name of one")


def _version(path: Path) -> str:
    try:
        facts = path.stat()
    except OSError:  # a link to nowhere: reading it says so
        return path.name
    return f"{path.name} {facts.st_size} {facts.st_mtime_ns}"


def _make(job: _Job, folder: Path, progress: bool | None) -> dict[str, Any]:
    encoder = job.load(job.model)
    identity = _hash([encoder.identity, str(job.part).encode(), *_encoded(job.items), *_encoded(job.versions)])
    target, record = folder / f"{job.modality}.npy", folder / f"{job.modality}.json"
    if target.is_file():
        made = _read_record(record)
        if made.get("identity") != identity:
            raise ValueError(
                f"{target}: is there already, made of other {job.modality}s or by another model; delete it to make "
                "it anew"
            )
        _clear(job, folder)
        return {**made["figures"], "file": str(target)}
    parts = _claim(folder / f".{job.modality}.parts", identity)
    values, failures = _encode(job, encoder, parts, progress)
    if not len(values):
        raise ValueError(f"{job.modality}: not one of {len(job.inputs)} could be read; the first: {failures[0][1]}")
    check_finite(values, f"{job.modality}: what {job.model} makes of them")
    failed = {job.items[n] for n, _ in failures}
    names = [item for item in job.items if item not in failed]
    figures = {
        "model": job.model,
        "items": job.n_items,
        "made": len(names),
        "without": job.n_items - len(job.items),
        "unreadable": [reason for _, reason in failures],
        "width": values.shape[1],
        **job.notes,
    }
    # The array is last: without it the other two are not looked at. All parts are still there until it is.
    write_text(target.with_suffix(".items.txt"), "".join(f"{name}\n" for name in names))
    write_text(record, json.dumps({"identity": identity, "figures": figures}, indent=2) + "\n")
    atomically(target, partial(_save_array, values))
    _clear(job, folder)
    return {**figures, "file": str(target)}


def _clear(job: _Job, folder: Path) -> None:
    """Removes the parts of finished features, and halves of files that killed calls left."""
    for path in folder.glob(f".{job.modality}.*"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _claim(parts: Path, identity: str) -> Path:
    """The folder of this job's parts: that of another job is emptied first."""
    owner = parts / "job"
    if not owner.is_file() or owner.read_text(encoding="utf-8") != identity:
        shutil.rmtree(parts, ignore_errors=True)
        parts.mkdir(parents=True)
        write_text(owner, identity)
    return parts


def _encode(
    job: _Job, encoder: Encoder, parts: Path, progress: bool | None
) -> tuple[np.ndarray, list[tuple[int, str]]]:
    """Values of all inputs that could be read, and the places of the others, with reasons."""
    tqdm = _needs("tqdm").tqdm
    starts = range(0, len(job.inputs), job.part)
    paths = [parts / f"{n:06}.npz" for n in range(len(starts))]
    done = sum(path.is_file() for path in paths) * job.part
    values, failures = [], []
    bar = tqdm(
        total=len(job.inputs),
        initial=min(done, len(job.inputs)),
        desc=job.modality,
        unit=f" {job.modality}s",
        disable=None if progress is None else not progress,  # None: quiet where stderr is no terminal
    )
    with bar:
        for start, path in zip(starts, paths, strict=True):
            inputs = job.inputs[start : start + job.part]
            if not path.is_file():
                made = encoder.encode(inputs)
                arrays = {"values": made.values, "failed": np.array(list(made.failures), np.int64)}
                arrays["reasons"] = np.array(list(made.failures.values()), str)
                atomically(path, partial(_save_part, arrays))
                bar.update(len(inputs))
            part = _read_part(path)
            values.append(part["values"])
            reasons = zip(part["failed"].tolist(), part["reasons"].tolist(), strict=True)
            failures += [(start + n, reason) for n, reason in reasons]
    return np.concatenate([rows for rows in values if len(rows)] or values), failures


def _read_part(path: Path) -> dict[str, np.ndarray]:
    try:
        with ZipFile(path) as part:
            return {name: read_npz_array(part, part.getinfo(f"{name}.npy")) for name in ("values", "failed", "reasons")}
    except (*BROKEN_NPZ, KeyError) as error:
        raise ValueError(f"{path}: is damaged ({one_line(error)}); delete it, and it is made again") from None


def _read_record(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # features that somebody else put there have none
        return {}


def _save_array(values: np.ndarray, path: str) -> None:
    with Sink(path) as file:
        np.save(file, values)


def _save_part(arrays: dict[str, np.ndarray], path: str) -> None:
    with open(path, "wb") as file:  # given a name, NumPy would add its ending
        np.savez(file, **arrays)


def _load_text_model(name: str) -> Encoder:
    library, transformers = _needs("sentence_transformers"), _needs("transformers")
    with _loading("text", name, transformers):
        model = library.SentenceTransformer(name)

    def encode(texts: Sequence[str]) -> Encoded:
        values = model.encode(list(texts), batch_size=TEXTS_A_BATCH, show_progress_bar=False, convert_to_numpy=True)
        return Encoded(np.asarray(values, np.float32), {})

    return Encoder(encode, _identity(model, str(model)))


def _load_image_model(name: str, root: Path) -> Encoder:
    transformers = _needs("transformers")
    with _loading("image", name, transformers):
        # Pillow reads the files anyway; with torchvision, where there is one, features would differ in their last bits.
        processor = transformers.AutoImageProcessor.from_pretrained(name, backend="pil")
        model, report = transformers.AutoModel.from_pretrained(name, output_loading_info=True)
    missing = sorted(report["missing_keys"])
    # A model that was trained to classify has no pooler: the library makes one at random.
    has_pooler = not any("pooler" in key for key in missing)
    if lost := [key for key in missing if "pooler" not in key]:
        raise ValueError(f"image: {name} lacks weights of its own model, e.g. {lost[0]}; give another")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model.eval().to(device)

    def encode(paths: Sequence[Path]) -> Encoded:
        pictures, failures = [], {}
        for n, path in enumerate(paths):
            try:
                pictures.append(_picture(path, root))
            except ValueError as error:
                failures[n] = str(error)
        if not pictures:
            return Encoded(np.empty((0, 0), np.float32), failures)
        pixels = processor(images=pictures, return_tensors="pt").to(device)
        with torch.inference_mode():
            return Encoded(_pooled(model, pixels, has_pooler).float().cpu().numpy(), failures)

    options = json.dumps(processor.to_dict(), sort_keys=True, default=str)
    return Encoder(encode, _identity(model, options, random=missing))


def _pooled(model: torch.nn.Module, pixels: dict[str, torch.Tensor], has_pooler: bool) -> torch.Tensor:
    """`(B, F)`: what the model says about each image as a whole."""
    has_towers = hasattr(model, "get_image_features")
    output = model.get_image_features(**pixels) if has_towers else model(**pixels)
    if isinstance(output, torch.Tensor):
        return output
    if has_pooler and output.get("pooler_output") is not None:
        return output.pooler_output.flatten(1)
    hidden = output.last_hidden_state  # (B, positions, F), or (B, F, height, width) of convolutions
    return hidden.mean(1) if hidden.dim() == 3 else hidden.flatten(2).mean(2)


def _picture(path: Path, root: Path) -> Any:
    """A Pillow image in RGB, the right way up. Raises `ValueError` saying why there is none."""
    pillow, operations = _needs("PIL.Image"), _needs("PIL.ImageOps")
    if not path.resolve().is_relative_to(root):
        raise ValueError(f"{path}: is a link that leads out of its folder, and is not followed")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", pillow.DecompressionBombWarning)  # twice as large is an error
            with pillow.open(path) as image:
                return operations.exif_transpose(image).convert("RGB")
    except (OSError, ValueError, SyntaxError, pillow.DecompressionBombError) as error:
        raise ValueError(f"{path}: cannot be read ({' '.join(str(error).split())[:200]})") from None


@contextmanager
def _loading(modality: str, name: str, transformers: ModuleType) -> Iterator[None]:
    """Says in one sentence what the libraries say in many, and lets them draw no bars of their own."""
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    except (OSError, ValueError, RuntimeError, LookupError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{modality}: {name} cannot be loaded as a model ({type(error).__name__}: {reason}); give the folder of "
            "one, or a name on the Hugging Face Hub"
        ) from error


def _identity(model: torch.nn.Module, options: str, random: Iterable[str] = ()) -> bytes:
    """Hash of the weights, but for those that are random and not used, and of what else decides on the outputs."""
    state = model.state_dict()
    weights = [
        part
        for name in sorted(state.keys() - set(random))
        for part in (name.encode(), state[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    ]
    return bytes.fromhex(_hash([options.encode(), *weights]))


def _encoded(strings: Iterable[str]) -> Iterator[bytes]:
    return (string.encode() for string in strings)


def _hash(parts: Iterable[bytes | memoryview]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))  # sizes keep neighbours apart
        digest.update(part)
    return digest.hexdigest()


def _needs(name: str) -> ModuleType:
    """Imports a module of the extra on first use."""
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        raise ImportError(f"embed needs {error.name!r}: pip install 'bbqrec[embed]'") from error
