"""Argument checks of the operators: each failure is one sentence with the argument, what came and what was expected."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch._subclasses.fake_tensor import FakeTensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def is_concrete(tensor: Tensor) -> bool:
    """Whether a tensor has values that Python can look at: not while tracing, and not inside a torch.func transform."""
    return not (
        torch.compiler.is_compiling()
        or isinstance(tensor, FakeTensor)
        or tensor.device.type == "meta"
        or is_functorch_wrapped_tensor(tensor)
    )


def is_on_cpu_to_look_at(tensor: Tensor) -> bool:
    """Whether looking at values is free as well: it does not wait for a GPU."""
    return tensor.device.type == "cpu" and is_concrete(tensor)


def assert_all(condition: Tensor, message: str) -> None:
    """An assertion, for values that Python cannot look at. Inside of `torch.func.vmap` there can be none."""
    if torch.compiler.is_compiling() or not is_functorch_wrapped_tensor(condition):
        torch._assert_async(condition.all(), message)


def check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a torch.Tensor")
    if value.layout != torch.strided or value.is_nested:
        kind = "a nested tensor" if value.is_nested else f"layout {short(value.layout)}"
        raise TypeError(f"{name}: got {kind}, expected a dense tensor; convert it with .to_dense()")


def check_int(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name}: got {type(value).__name__}, expected an int")


def check_bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a bool")


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


def short(name: torch.dtype | torch.layout) -> str:
    return str(name).removeprefix("torch.")
