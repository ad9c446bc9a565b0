"""Public functions: check the arguments, choose an implementation, call it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bbqrec_kernels._checks import FLOATS, INTEGERS, check_device, check_dim, check_dtype, check_size, check_tensor
from bbqrec_kernels._dispatch import choose
from bbqrec_kernels.residual_quantization import ops, reference

_IMPLEMENTATIONS = {"reference": reference, "cpu": ops.native, "cuda": ops.native, "triton": ops.triton}


class ResidualQuantization(NamedTuple):
    """What `residual_quantize` returns."""

    quantized: Tensor
    """`(..., D)`, dtype of `x`: the sum of the chosen codewords. Its gradient goes to `x` unchanged."""
    codes: Tensor
    """`(..., L)` int64: the chosen codewords, -1 in a bad row."""
    commitment_loss: Tensor
    """`(L,)` float32: mean over rows and D of the squared rest after each level. Gradient to `x` only."""
    codebook_loss: Tensor
    """`(L,)` float32: the same values. Gradient to `codebooks` only."""


def residual_quantize(x: Tensor, codebooks: Tensor, *, impl: str = "auto") -> ResidualQuantization:
    """Finds the nearest codeword of each level for what the levels before left over.

    With `r_0 = x`, for each level `l`: `c_l = argmin_k ||r_l - codebooks[l, k]||²` (ties: the lowest `k`) and
    `r_{l+1} = r_l - codebooks[l, c_l]`, the codewords detached. No tensor of N·K elements exists; the backward
    recomputes residuals from codes.

    A row whose best distance is not finite is a bad row: codes -1, `quantized` NaN, both losses NaN, NaN gradient to
    that row and none to codebooks; other rows keep their values. A codeword that is not finite makes all rows bad.

    The backward reads `codebooks`: update them in place after it, not between forward and backward.

    Args:
        x: `(..., D)` float32, bfloat16 or float16, any strides.
        codebooks: `(L, K, D)` float32. All-float64 arguments run in the reference.
        impl: "auto", "reference", "cpu", "triton" or "cuda"; a named one never falls back.

    Returns:
        See `ResidualQuantization`. Zero rows give empty outputs and zero losses.

    Raises:
        TypeError: a dtype is not supported, or an argument is no tensor.
        ValueError: shapes or devices do not fit, or `impl` cannot run.

    Source: Lee et al. 2022, Autoregressive image generation using residual quantization, section 3.1.
    """
    _check_rows(x, codebooks)
    implementation = _IMPLEMENTATIONS[choose("residual_quantize", impl, x, codebooks)]
    return ResidualQuantization(*implementation.residual_quantize(x, codebooks))


def residual_decode(codes: Tensor, codebooks: Tensor, *, impl: str = "auto") -> Tensor:
    """Sums the codewords that codes name: `Σ_l codebooks[l, codes[..., l]]`.

    Args:
        codes: `(..., L)` integers; -1 adds nothing.
        codebooks: `(L, K, D)` float32 (or float64, in the reference); differentiable.
        impl: as in `residual_quantize`.

    Returns:
        `(..., D)`, dtype of `codebooks`.

    Raises:
        IndexError: a code is below -1 or not below K (on CUDA: a device-side assertion).
        TypeError, ValueError: as in `residual_quantize`.
    """
    _check_codebooks(codebooks)
    _check_codes(codes, codebooks)
    implementation = _IMPLEMENTATIONS[choose("residual_decode", impl, codebooks, codes)]
    return implementation.residual_decode(codes.long(), codebooks)


def residual_statistics(x: Tensor, codes: Tensor, codebooks: Tensor, *, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """Counts and sums of the residuals that chose each codeword: for k-means, EMA codebooks and dead-code revival.

    Args:
        x: `(..., D)`, as in `residual_quantize`.
        codes: `(..., L)` integers; -1 counts nowhere and leaves the residual as it is.
        codebooks: `(L, K, D)`, as in `residual_quantize`.
        impl: as in `residual_quantize`.

    Returns:
        `counts (L, K)` and `sums (L, K, D)`, both in the dtype of `codebooks`: rows that chose a codeword, and the
        sum of their `r_l`. Not differentiable.

    Raises:
        IndexError, TypeError, ValueError: as in `residual_decode`.
    """
    _check_rows(x, codebooks)
    _check_codes(codes, codebooks)
    check_device("codes", codes, "x", x)
    if codes.shape[:-1] != x.shape[:-1]:
        raise ValueError(
            f"codes: got shape {tuple(codes.shape)}, expected {(*x.shape[:-1], codebooks.shape[0])} "
            f"to go with x of shape {tuple(x.shape)}"
        )
    implementation = _IMPLEMENTATIONS[choose("residual_statistics", impl, x, codebooks, codes)]
    return implementation.residual_statistics(x.detach(), codes.long(), codebooks.detach())


def _check_codebooks(codebooks: Tensor) -> None:
    check_tensor("codebooks", codebooks)
    check_dtype("codebooks", codebooks, (torch.float32, torch.float64))
    check_dim("codebooks", codebooks, 3, "(levels, codebook_size, D)")
    if 0 in codebooks.shape:
        raise ValueError(f"codebooks: got shape {tuple(codebooks.shape)}, expected at least one level, codeword and D")


def _check_rows(x: Tensor, codebooks: Tensor) -> None:
    check_tensor("x", x)
    _check_codebooks(codebooks)
    check_device("codebooks", codebooks, "x", x)
    if codebooks.dtype == torch.float64:
        check_dtype("x", x, (torch.float64,), "codebooks are float64, and mixed dtypes are not supported")
    elif x.dtype == torch.float64:
        raise TypeError("x: got dtype float64 with codebooks of float32, expected both float64 or x in float32")
    else:
        check_dtype("x", x, FLOATS)
    if x.dim() == 0:
        raise ValueError("x: got a scalar, expected shape (..., D)")
    check_size("x", x, -1, codebooks.shape[-1], "D of codebooks")


def _check_codes(codes: Tensor, codebooks: Tensor) -> None:
    check_tensor("codes", codes)
    check_dtype("codes", codes, INTEGERS)
    check_device("codes", codes, "codebooks", codebooks)
    if codes.dim() == 0:
        raise ValueError("codes: got a scalar, expected shape (..., levels)")
    check_size("codes", codes, -1, codebooks.shape[0], "levels of codebooks")
