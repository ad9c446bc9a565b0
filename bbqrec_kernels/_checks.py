"""Argument checks of the operators: each failure is one sentence with the argument, what came and what was expected."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a torch.Tensor")


def check_dtype(name: str, tensor: Tensor, allowed: Sequence[torch.dtype], hint: str = "") -> None:
    if tensor.dtype not in allowed:
        expected = " or ".join(short(dtype) for dtype in allowed)
        raise TypeError(f"{name}: got dtype {short(tensor.dtype)}, expected {expected}{hint and '; ' + hint}")


def check_dim(name: str, tensor: Tensor, dim: int, layout: str) -> None:
    if tensor.dim() != dim:
        raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, expected {dim} dimensions {layout}")


def check_size(name: str, tensor: Tensor, dim: int, size: int, reason: str) -> None:
    if tensor.shape[dim] != size:
        raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, expected size {size} in dimension {dim} ({reason})")


def check_device(name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    if tensor.device != like.device:
        raise ValueError(f"{name}: got device {tensor.device}, expected {like.device} like {like_name}; move it there")


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
