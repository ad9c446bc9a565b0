"""The recommender as one file, for programs that have torch and `bbqrec_kernels`, and neither this package nor the run.

    import json, torch, bbqrec_kernels
    about = {"about.json": ""}
    recommend = torch.export.load("recommender.pt2", extra_files=about).module()
    names = json.loads(about["about.json"])["items"]
    items, scores = recommend(torch.tensor([[3, 1, 4], [1, -1, -1]]))     # numbers into names, (2, k)

and of a compiled one, which needs no Python code of the model at all,

    recommend = torch._inductor.aoti_load_package("recommender.pt2")
    names = json.loads(recommend.get_metadata()["about"])["items"]
"""

from __future__ import annotations

import copy
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bbqrec.data.batches import PackedBatch
from bbqrec.data.files import Sink, atomically
from bbqrec.models.sequence_model import SequenceModel

ABOUT = "about.json"
OF_ITEM_VECTORS = ("item_id", "of_features", "content", "codebooks")  # of a model: not needed after them


class Program(nn.Module):
    """What is exported: histories in, the best next items and their scores out.

    Args:
        model: trained; the vectors of its items are computed here, once and for all.
        k: how many items.
        max_length: latest items of a history that count.
        keep_history: also recommend items of the history.
    """

    def __init__(self, model: SequenceModel, k: int, max_length: int, keep_history: bool):
        super().__init__()
        self.k, self.max_length, self.keep_history = k, max_length, keep_history
        with torch.no_grad():
            vectors = model.item_vectors().cpu()
        self.model = copy.deepcopy(model).cpu().eval().requires_grad_(False)
        self.adds_similarity = self.model.adds_similarity
        for name in OF_ITEM_VECTORS if self.adds_similarity else (*OF_ITEM_VECTORS, "features"):
            if hasattr(self.model, name):
                setattr(self.model, name, None)
        self.register_buffer("vectors", vectors)
        _, compared = self.model.compared(vectors[:0], vectors)
        self.register_buffer("compared", None if compared is vectors else compared)

    def forward(self, histories: Tensor, timestamps: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The `k` best next items of B histories, and their scores, `(B, k)` each, best first.

        Args:
            histories: `(B, S)` int64, numbers of items, oldest first, and -1 where a row has no item, on either side.
            timestamps: `(B, S)` int64, for a model that reads times.

        A score of -inf says that there are fewer items to recommend. Numbers of no item, and rows without one, are
        errors.
        """
        is_item = histories >= 0
        torch._assert_async(is_item.any(1).all(), "histories: a row has no item, expected one at least in each")
        torch._assert_async((histories < len(self.vectors)).all(), "histories: a number is that of no item")
        from_the_end = is_item.flip(1).cumsum(1).flip(1)
        read = is_item & (from_the_end <= self.max_length)
        row, column = read.nonzero(as_tuple=True)  # (T,)
        batch = PackedBatch(
            items=histories[row, column],
            positions=(read.cumsum(1) - 1)[row, column],
            timestamps=None if timestamps is None else timestamps[row, column],
            cu_seqlens=F.pad(read.sum(1).cumsum(0), (1, 0)).int(),
            max_seqlen=self.max_length,
        )
        hidden, _ = self.model.compared(self.model(batch, self.vectors)[batch.last], self.vectors[:0])
        scores = self.model.products(hidden, self.vectors if self.compared is None else self.compared)
        if self.adds_similarity:
            scores = scores + self.model.similarity(batch)
        if not self.keep_history:
            # Where there is no item, another one of the row: that is excluded anyway.
            excluded = torch.where(is_item, histories, histories.amax(1, keepdim=True))
            scores.scatter_(1, excluded, -torch.inf)
        best = scores.topk(self.k)
        return best.indices, best.values


def export(program: Program, about: dict[str, Any], path: Path, *, compiled: bool) -> None:
    """Writes `program`, wholly or not at all, with what there is to know about it (values that JSON can hold).

    The number of histories, and of items in them, are free. `compiled`: machine code for this kind of processor.
    Raises `ValueError` where that cannot be made.
    """
    batch, length = torch.export.Dim("batch", min=1), torch.export.Dim("length", min=1)
    example = torch.tensor([[0, -1], [0, 0], [0, 0]])  # neither is 0 or 1, which would be taken for constants
    inputs = (example, example.clone()) if program.model.config.relative_time else (example,)
    shapes = tuple({0: batch, 1: length} for _ in inputs)
    with torch.no_grad():
        exported = torch.export.export(program, inputs, dynamic_shapes=shapes)
    text = json.dumps(about, ensure_ascii=False)
    if not compiled:
        atomically(path, lambda temporary: _save(exported, text, temporary))
        return
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        try:
            made = torch._inductor.aoti_compile_and_package(
                exported,
                package_path=str(Path(folder) / "made.pt2"),
                inductor_configs={"aot_inductor.metadata": {"about": text}},
            )
        except RuntimeError as error:  # among them that there is no compiler
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"compiled: AOTInductor failed ({reason}); export without it") from error
        atomically(path, Path(made).replace)


def _save(exported: torch.export.ExportedProgram, about: str, path: str) -> None:
    with Sink(path) as file:
        torch.export.save(exported, file, extra_files={ABOUT: about})
