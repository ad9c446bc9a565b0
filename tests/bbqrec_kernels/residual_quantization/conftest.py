"""Fixtures of the tests of residual quantization.

In a process that runs Triton's interpreter (TRITON_INTERPRET=1, see tests/interpret) they test the Triton kernels.
"""

import os
from collections.abc import Callable, Iterator
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from bbqrec_kernels.testing import simd_target, simd_targets

INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1"
CPU = [f"cpu-{name}" for name in simd_targets()] or ["cpu"]  # once for each SIMD target of this machine
KERNELS = ["triton"] if INTERPRETS else CPU
SIMULATED = [] if INTERPRETS else ["simt"]


@pytest.fixture(params=["reference", *KERNELS, *SIMULATED])
def impl(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every implementation that runs on this machine.

    "simt" is the CUDA kernels' bodies on the host: while it lasts they stand where the CPU kernels are registered, and
    so run through the same checks, autograd and layouts. Its name is "cpu" then.
    """
    if request.param == "simt":
        request.getfixturevalue("simt_for_cpu")
        yield "cpu"
    else:
        yield from running(request.param)


@pytest.fixture(params=KERNELS)
def every_kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    """Those that are not the formula itself."""
    yield from running(request.param)


@pytest.fixture(params=["triton" if INTERPRETS else "cpu"])
def kernel(request: pytest.FixtureRequest) -> str:
    """The same, for what does not depend on the SIMD target."""
    return request.param


@pytest.fixture(params=CPU)
def cpu(request: pytest.FixtureRequest) -> Iterator[str]:
    """The CPU kernels alone."""
    yield from running(request.param)


def running(name: str) -> Iterator[str]:
    """Yields the name of the implementation, and holds the CPU kernels to a SIMD target meanwhile."""
    impl, _, target = name.partition("-")
    if not target:
        yield impl
        return
    with simd_target(target):
        yield impl


@pytest.fixture
def simt_for_cpu(simt: ModuleType, standing_in_for_cpu: Callable) -> Iterator[None]:
    """Registers the kernels of csrc/simt in place of the CPU kernels."""
    with standing_in_for_cpu(_kernels(simt)):
        yield


def _kernels(simt: ModuleType) -> dict:
    def quantize(x: Tensor, codebooks: Tensor):
        width, levels = x.shape[-1], codebooks.shape[0]
        quantized, codes, *losses = simt.residual_quantize(_numpy(x.reshape(-1, width)), _numpy(codebooks))
        codes = torch.from_numpy(codes).reshape(*x.shape[:-1], levels)
        return _like(x, quantized), codes, *map(torch.from_numpy, losses)

    def quantize_backward(x, codebooks, codes, grad_quantized, grad_commitment, grad_codebook, need_x, need_codebooks):
        rows = x.reshape(-1, x.shape[-1])
        ups = (_numpy(grad_quantized.reshape(rows.shape)) if grad_quantized is not None else None,)
        ups += tuple(_numpy(grad) if grad is not None else None for grad in (grad_commitment, grad_codebook))
        arguments = _numpy(rows), _numpy(codebooks), _numpy(codes.reshape(len(rows), codes.shape[-1]))
        grad_x, grad_codebooks = simt.residual_quantize_backward(*arguments, *ups, need_x, need_codebooks)
        return (
            _like(x, grad_x) if need_x else x.new_empty(0),
            _like(codebooks, grad_codebooks) if need_codebooks else codebooks.new_empty(0),
        )

    def decode(codes: Tensor, codebooks: Tensor) -> Tensor:
        output = simt.residual_decode(_numpy(codes.reshape(-1, codes.shape[-1])), _numpy(codebooks))
        return torch.from_numpy(output).reshape(*codes.shape[:-1], codebooks.shape[-1])

    def decode_backward(grad: Tensor, codes: Tensor, codebooks: Tensor) -> Tensor:
        flat = grad.reshape(-1, grad.shape[-1]), codes.reshape(-1, codes.shape[-1])
        return _like(codebooks, simt.residual_decode_backward(*map(_numpy, flat), _numpy(codebooks)))

    def statistics(x: Tensor, codes: Tensor, codebooks: Tensor):
        flat = x.reshape(-1, x.shape[-1]), codes.reshape(-1, codes.shape[-1])
        return tuple(map(torch.from_numpy, simt.residual_statistics(*map(_numpy, flat), _numpy(codebooks))))

    return {
        "residual_quantize": quantize,
        "residual_quantize_backward": quantize_backward,
        "residual_decode": decode,
        "residual_decode_backward": decode_backward,
        "residual_statistics": statistics,
    }


def _numpy(tensor: Tensor) -> np.ndarray:
    """A contiguous array; bfloat16, which NumPy lacks, as its bits."""
    tensor = tensor.detach().contiguous()
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


def _like(tensor: Tensor, array: np.ndarray) -> Tensor:
    """The values of an array with the dtype, shape and strides of a tensor."""
    values = torch.from_numpy(array)
    values = values.view(torch.bfloat16) if tensor.dtype == torch.bfloat16 else values
    return torch.empty_like(tensor).copy_(values.reshape(tensor.shape))
