"""Runs the attention operators' CUDA kernels on the host in place of the CPU kernels, through the same autograd."""

import warnings
from collections.abc import Iterator
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

Outputs = tuple[Tensor, ...]


@pytest.fixture
def attention_on_simt(simt: ModuleType) -> Iterator[None]:
    """While it lasts, impl="cpu" of the attention functions is csrc/simt."""
    library = torch.library.Library("bbqrec_kernels", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is another kernel is the point
        for name, kernel in _kernels(simt).items():
            library.impl(name, kernel, "CPU", allow_override=True)
    yield
    library._destroy()


def _kernels(simt: ModuleType) -> dict:
    def forward(query, key, value, biases, queries, keys, boundaries, kinds, bits, buckets, masks) -> Outputs:
        output, logsumexp = torch.empty_like(query), query.new_empty(query.shape[:-1], dtype=torch.float64)
        dense = _with_dense_rows(output)
        terms = _arrays(queries), _arrays(keys), _arrays(boundaries), kinds, bits, buckets
        simt.similarity_attention(*map(_rows, (query, key, value)), _array(biases), *terms, *masks, _rows(dense), logsumexp.numpy())
        return output.copy_(dense), logsumexp

    def backward(grad, output, logsumexp, query, key, value, biases, queries, keys, boundaries, kinds, bits, buckets, masks, needs):
        wanted = [torch.empty_like(t) if need else None for t, need in zip((query, key, value, biases), needs, strict=True)]
        dense = [None if t is None else _with_dense_rows(t) for t in wanted]
        arrays = [None if t is None else _rows(t) for t in dense]
        terms = _arrays(queries), _arrays(keys), _arrays(boundaries), kinds, bits, buckets
        simt.similarity_attention_backward(
            _rows(grad), _rows(output), _array(logsumexp), *map(_rows, (query, key, value)), _array(biases), *terms,
            *masks, *arrays,
        )
        return tuple(
            query.new_empty(0) if out is None else out.copy_(rows) for out, rows in zip(wanted, dense, strict=True)
        )

    def padded_masks(query_lengths, key_lengths, is_causal, scale):
        lengths = (None if t is None else _array(t) for t in (query_lengths, key_lengths))
        return *lengths, None, 0, is_causal, scale

    def packed_masks(cu_seqlens, max_seqlen, is_causal, scale):
        return None, None, _array(cu_seqlens), max_seqlen, is_causal, scale

    def with_masks(masks):
        return (
            lambda *a: forward(*a[:10], masks(*a[10:])),
            lambda *a: backward(*a[:13], masks(*a[13:17]), a[17:]),
        )

    kernels = {}
    for name, masks in (("similarity_attention", padded_masks), ("similarity_attention_varlen", packed_masks)):
        kernels[name], kernels[f"{name}_backward"] = with_masks(masks)
    return kernels


def _with_dense_rows(tensor: Tensor) -> Tensor:
    """The tensor, or where its last dimension is not dense, a contiguous one of its shape: what the launches do."""
    return tensor if tensor.shape[-1] <= 1 or tensor.stride(-1) == 1 else torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _rows(tensor: Tensor) -> np.ndarray:
    """A view of the tensor's memory; bfloat16, which NumPy lacks, as its bits."""
    tensor = tensor.detach()
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        tensor = tensor.contiguous()
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().contiguous().numpy()


def _arrays(tensors: list[Tensor]) -> list[np.ndarray]:
    return [_array(tensor) for tensor in tensors]
