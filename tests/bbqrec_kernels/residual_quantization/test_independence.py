"""A row's result depends on that row and the codebooks alone, bit for bit; sums do not depend on threads."""

import subprocess
import sys
import textwrap

import pytest
import torch
from torch import Tensor

from bbqrec_kernels import residual_decode, residual_quantize, residual_statistics
from bbqrec_kernels.testing import residual_quantization as rq


def near_tied_inputs(rows: int, width: int, size: int = 50) -> tuple[Tensor, Tensor]:
    """Codewords a few roundings apart: any other order of operations gives other codes."""
    x, codebooks = rq.random_inputs(rows, width=width, size=size, levels=2)
    codebooks[:, 1:] = codebooks[:, :1] + 1e-6 * torch.randn(2, size - 1, width)
    return x, codebooks


@pytest.mark.parametrize("width", [1, 15, 64, 65, 111])
def test_row_does_not_see_its_position(impl: str, width: int) -> None:
    x, codebooks = near_tied_inputs(131, width)
    codes, quantized = residual_quantize(x, codebooks, impl=impl)[1::-1]
    assert width == 1 or codes[:, 0].unique().numel() > 5
    is_slow = impl in ("simt", "triton")  # where threads run one after the other
    selections = [torch.randperm(131)[:70]] if is_slow else [torch.randperm(131), torch.arange(1, 131)]
    selections += [torch.arange(3, 68), torch.arange(0, 131, 2)]
    selections += [torch.tensor([i]) for i in (0, 63, 64, 127, 130)]
    for rows in selections:
        result = residual_quantize(x[rows], codebooks, impl=impl)
        assert torch.equal(result.codes, codes[rows])
        assert torch.equal(result.quantized, quantized[rows])


def test_row_does_not_see_its_neighbours(impl: str) -> None:
    x, codebooks = near_tied_inputs(66, 33)
    codes = residual_quantize(x, codebooks, impl=impl).codes
    x[1::2] = torch.randn(33, 33) * 1e6
    assert torch.equal(residual_quantize(x, codebooks, impl=impl).codes[::2], codes[::2])


def test_gradient_of_a_row_does_not_see_its_position(impl: str) -> None:
    x, codebooks = near_tied_inputs(131, 65)
    up, shuffle = torch.randn(131, 65), torch.randperm(131)

    def grad_x(x: Tensor, up: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        result = residual_quantize(x, codebooks, impl=impl)
        return torch.autograd.grad((result.quantized, result.commitment_loss), x, (up, torch.tensor([0.3, 0.7])))[0]

    assert torch.equal(grad_x(x, up)[shuffle], grad_x(x[shuffle], up[shuffle]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_thread_count_changes_no_bit(cpu: str, dtype: torch.dtype) -> None:
    x, codebooks = rq.random_inputs(3001, width=33, size=20, dtype=dtype)
    up = torch.randn_like(x)

    def everything() -> list[Tensor]:
        a, b = x.clone().requires_grad_(), codebooks.clone().requires_grad_()
        result = residual_quantize(a, b, impl=cpu)
        outputs = (result.quantized, result.commitment_loss, result.codebook_loss)
        grads = torch.autograd.grad(outputs, (a, b), (up, torch.ones(3), torch.ones(3)))
        decoded = residual_decode(result.codes, b, impl=cpu)
        grads += torch.autograd.grad(decoded, b, up.float())
        return [*result, *grads, decoded, *residual_statistics(x, result.codes, codebooks, impl=cpu)]

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = everything()
        for number in (2, 3, 2):
            torch.set_num_threads(number)
            for one, other in zip(expected, everything(), strict=True):
                assert torch.equal(one, other)
    finally:
        torch.set_num_threads(threads)


def test_every_call_gives_the_same_bits(impl: str) -> None:
    """Sums over rows that share a codeword have a fixed order, although two threads work on them."""
    x, codebooks = rq.random_inputs(3000, width=64, levels=2, size=16)
    codebooks.requires_grad_()

    def everything() -> list[Tensor]:
        result = residual_quantize(x, codebooks, impl=impl)
        decoded = residual_decode(result.codes, codebooks, impl=impl)
        loss = result.codebook_loss.sum() + (decoded * x).sum()
        return [*torch.autograd.grad(loss, codebooks), *residual_statistics(x, result.codes, codebooks, impl=impl)]

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        expected = everything()
        for _ in range(2 if impl == "simt" else 10):
            assert all(map(torch.equal, expected, everything()))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("impl", "rows", "size"), [("cpu", 200_000, 1024), ("cpu", 1024, 200_000), ("reference", 20_000, 4096)]
)
def test_memory_does_not_grow_with_rows_times_codewords(impl: str, rows: int, size: int) -> None:
    code = f"""
    import resource, sys, torch
    from bbqrec_kernels import residual_quantize
    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    def step(x, codebooks):
        result = residual_quantize(x, codebooks, impl="{impl}")
        (result.quantized.sum() + result.commitment_loss.sum() + result.codebook_loss.sum()).backward()
    x, codebooks = torch.randn({rows}, 1, requires_grad=True), torch.randn(1, {size}, 1, requires_grad=True)
    step(x[:1000], codebooks[:, :100])
    before = peak()
    step(x, codebooks)
    print(peak() - before)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < rows * size * 4 / 4  # a quarter of one float32 tensor of N·K elements
