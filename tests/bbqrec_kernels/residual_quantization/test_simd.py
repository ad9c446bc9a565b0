"""The SIMD targets of the CPU kernels: how one is chosen, and what happens at the borders of tiles and vectors."""

import itertools
import os
import subprocess
import sys

import pytest
import torch

from bbqrec_kernels import _library, residual_decode, residual_quantize, residual_statistics
from bbqrec_kernels.testing import residual_quantization as rq
from bbqrec_kernels.testing import simd_target, simd_targets


def test_a_target_is_chosen_and_given_back() -> None:
    names, current = simd_targets(), _library.SIMD.current
    assert names[0] == "baseline"
    assert current == os.environ.get("BBQ_SIMD", names[-1])
    for name in names:
        with simd_target(name):
            assert _library.SIMD.current == name
        assert _library.SIMD.current == current


def test_eight_and_sixteen_lanes_run_wherever_avx2_does() -> None:
    if "avx2" not in simd_targets():
        pytest.skip("this machine has no AVX2")
    assert "avx2x16" in simd_targets()


def test_unknown_target_is_refused() -> None:
    current = _library.SIMD.current
    expected = f"^SIMD target: got 'avx9', expected one of {', '.join(simd_targets())} on this machine$"
    with pytest.raises(ValueError, match=expected), simd_target("avx9"):
        pass
    assert _library.SIMD.current == current


@pytest.mark.parametrize("name", ["baseline", "avx9"])
def test_environment_names_the_target(name: str) -> None:
    code = """
    import torch
    from bbqrec_kernels import _library, residual_quantize
    try:
        residual_quantize(torch.zeros(1, 1), torch.zeros(1, 1, 1), impl="cpu")
        print(_library.SIMD.current)
    except ValueError as error:
        print(error)
    """
    script = "\n".join(line[4:] for line in code.splitlines())
    environment = {**os.environ, "BBQ_SIMD": name}
    output = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True).stdout
    if name == "baseline":
        assert output == "baseline\n"
    else:
        assert "BBQ_SIMD, SIMD target: got 'avx9', expected one of baseline" in output


# Around the rows of a tile (1 to 12) and of a block, the lanes of a vector and a panel, the columns of a slab.
EDGE_ROWS = [*range(1, 14), 47, 48, 49, 61, 97]
EDGE_SIZES = [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65]
EDGE_WIDTHS = [7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 79, 127, 128, 129, 193]


@pytest.mark.parametrize("size", EDGE_SIZES)
@pytest.mark.parametrize("width", EDGE_WIDTHS)
def test_codes_known_in_advance(cpu: str, width: int, size: int) -> None:
    for rows in EDGE_ROWS:
        x, codebooks, codes = rq.separated_inputs(rows, width=width, size=size, levels=2, seed=rows)
        result = residual_quantize(x, codebooks, impl=cpu)
        assert torch.equal(result.codes, codes)
        assert torch.equal(result.quantized, x)
        assert result.commitment_loss[1] == 0
        assert torch.equal(residual_decode(codes, codebooks, impl=cpu), x)


@pytest.mark.parametrize("width", [1, 9, 64, 65, 130])
def test_first_of_equal_codewords_wins_wherever_the_two_are(cpu: str, width: int) -> None:
    """Same lane of other vectors, other lanes of the same vector, other panels."""
    places = [0, 1, 3, 4, 7, 8, 15, 16, 17, 24, 31, 32, 33, 47, 48, 63, 64, 66]
    words = torch.randn(67, width)
    for first, second in itertools.combinations(places, 2):
        codebooks = words.clone()[None]
        codebooks[0, second] = codebooks[0, first]
        x = codebooks[0, [first]] + 1e-4 * torch.randn(14, width)
        expected = torch.cdist(x.double(), codebooks[0].double(), compute_mode="donot_use_mm_for_euclid_dist").min(-1)
        codes = residual_quantize(x, codebooks, impl=cpu).codes[:, 0]
        assert torch.equal(codes, expected.indices)
        assert width == 1 or (codes == first).all()


@pytest.mark.parametrize("size", [1, 5, 31, 33, 70])
def test_equal_codewords_give_code_zero(cpu: str, size: int) -> None:
    x, codebooks = rq.random_inputs(61, width=33, size=1, levels=3)
    assert not residual_quantize(x, codebooks.expand(3, size, 33), impl=cpu).codes.any()


@pytest.mark.parametrize("width", [1, 63, 64, 65, 200])
def test_row_does_not_see_the_size_of_its_tile(cpu: str, width: int) -> None:
    """Rows alone, and at the end of calls of every length, with codewords a few roundings apart."""
    x, codebooks = rq.random_inputs(60, width=width, size=45, levels=2)
    codebooks[:, 1:] = codebooks[:, :1] + 1e-6 * torch.randn(2, 44, width)
    together = residual_quantize(x, codebooks, impl=cpu)
    for first, last in (
        [(i, i + 1) for i in range(60)] + [(0, i) for i in range(1, 60)] + [(59 - i, 60) for i in range(60)]
    ):
        result = residual_quantize(x[first:last], codebooks, impl=cpu)
        assert torch.equal(result.codes, together.codes[first:last])
        assert torch.equal(result.quantized, together.quantized[first:last])


@pytest.mark.parametrize("width", [1, 5, 16, 63, 64, 65, 131])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nothing_outside_the_tensors_is_read_or_written(cpu: str, width: int, dtype: torch.dtype) -> None:
    """Rows and codewords end where their memory does: what lies behind is NaN and stays NaN."""

    def framed(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
        size = torch.Size(shape).numel()
        memory = torch.full((size + 128,), torch.nan, dtype=dtype)
        memory[64:-64] = torch.randn(size).to(dtype)
        return memory, memory[64:-64].view(shape)

    (x_memory, x), (memory, codebooks) = framed(50, width, dtype=dtype), framed(2, 35, width)
    result = residual_quantize(x.requires_grad_(), codebooks.requires_grad_(), impl=cpu)
    clean_x, clean = x.detach().clone(), codebooks.detach().clone()
    expected = residual_quantize(clean_x.requires_grad_(), clean.requires_grad_(), impl=cpu)
    for one, other in zip(expected, result, strict=True):
        assert torch.equal(one, other)
    outputs = ("quantized", "commitment_loss", "codebook_loss")
    for tensors, r in (((x, codebooks), result), ((clean_x, clean), expected)):
        ones = [torch.ones_like(getattr(r, name)) for name in outputs]
        grads = torch.autograd.grad([getattr(r, name) for name in outputs], tensors, ones)
        decoded = residual_decode(r.codes, tensors[1], impl=cpu)
        grads += torch.autograd.grad(decoded.sum(), tensors[1])
        grads += residual_statistics(tensors[0], r.codes, tensors[1], impl=cpu)
        if r is result:
            found = grads
    for one, other in zip(found, grads, strict=True):
        assert torch.equal(one, other)
    for frame in (x_memory, memory):
        assert frame[:64].isnan().all()
        assert frame[-64:].isnan().all()


def test_every_16_bit_number_is_read_exactly(cpu: str) -> None:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.bfloat16, torch.float16):
        x = bits.view(dtype)[:, None]
        codes, codebooks = torch.arange(2**16)[:, None], torch.zeros(1, 2**16, 1)
        _, sums = residual_statistics(x, codes, codebooks, impl=cpu)
        torch.testing.assert_close(sums[0], x.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tail", [0, 3])
def test_16_bit_results_are_rounded_as_torch_rounds(cpu: str, dtype: torch.dtype, tail: int) -> None:
    """One codeword of every magnitude, with numbers half way between two of the format and beside them."""
    bits = torch.arange(0, 2**15, 3, dtype=torch.int32).to(torch.int16)
    near = bits.view(dtype).float()
    near = near[near < 1e15]
    halfway = near + (torch.nextafter(near.to(dtype), torch.tensor(torch.inf, dtype=dtype)).float() - near) / 2
    values = torch.cat(
        [near, halfway, torch.nextafter(halfway, torch.tensor(0.0)), torch.tensor([65519.0, 65520.0, 7e4])]
    )
    values = values[values < 1e16]  # their squares stay finite
    values = torch.cat([values, -values])
    values = values[: len(values) // 64 * 64 + tail] if tail else values
    quantized = residual_quantize(torch.zeros(1, len(values), dtype=dtype), values[None, None], impl=cpu).quantized
    assert torch.equal(quantized[0], values.to(dtype))


def test_targets_agree_where_float32_is_exact() -> None:
    x, codebooks = torch.randint(-3, 4, (131, 70)).float(), torch.randint(-2, 3, (3, 45, 70)).float()
    x.requires_grad_(), codebooks.requires_grad_()
    results = []
    for name in simd_targets():
        with simd_target(name):
            result = residual_quantize(x, codebooks)
            grads = torch.autograd.grad(result.quantized, x, torch.ones(131, 70))
            results.append([result.quantized, result.codes, *grads, *residual_statistics(x, result.codes, codebooks)])
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))
