"""Residual quantization: quantize, decode and statistics, ours and others'."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from bbqrec_kernels import residual_decode, residual_quantize, residual_statistics
from bbqrec_kernels.residual_quantization import reference
from bbqrec_kernels.testing import assert_gradient, assert_within_budget
from bbqrec_kernels.testing import residual_quantization as rq
from benchmarks.registry import OURS, Case, Operator, Unavailable, differentiate, our_implementations, without_grad

AGREEMENT = 0.999  # of a peer's codes with ours: near-ties may go either way


class Inputs(NamedTuple):
    x: Tensor
    codebooks: Tensor
    codes: Tensor  # what quantize finds


def _case(rows: int, width: int, levels: int, size: int, dtype: torch.dtype = torch.float32) -> Case:
    return Case({"N": rows, "D": width, "L": levels, "K": size}, dtype)


LARGE = [_case(100_000, 64, 3, 256), _case(20_000, 96, 4, 512), _case(10_000, 256, 4, 1024)]
SMALL = [_case(2000, 64, 3, 64), _case(256, 64, 3, 64), _case(1, 64, 3, 64)]  # the recommender's everyday calls
LOW = [_case(100_000, 64, 3, 256, torch.bfloat16)]
GPU = [_case(1_000_000, 64, 3, 256), _case(65_536, 256, 4, 1024)]
CASES = [*LARGE, *SMALL, *LOW, *(GPU if torch.cuda.is_available() else [])]
QUICK = [_case(500, 32, 2, 16)]


def make_inputs(case: Case, device: torch.device) -> Inputs:
    sizes = case.sizes
    x, codebooks = rq.random_inputs(
        sizes["N"], width=sizes["D"], levels=sizes["L"], size=sizes["K"], dtype=case.dtype, device=device
    )
    return Inputs(x, codebooks, residual_quantize(x, codebooks).codes)


def _search_flops(case: Case, inputs: Inputs, backward: bool) -> float:
    sizes = case.sizes
    return 2.0 * sizes["N"] * sizes["L"] * sizes["K"] * sizes["D"]


def _walk_flops(case: Case, inputs: Inputs, backward: bool) -> float:
    sizes = case.sizes
    return (2.0 if backward else 1.0) * sizes["N"] * sizes["L"] * sizes["D"]


# ---- Correctness: a quick check against float64, before any speed is printed ----


def _check_inputs(device: torch.device) -> Inputs:
    return make_inputs(_case(333, 65, 3, 37), device)


def check_quantize(impl: str, device: torch.device) -> None:
    x, codebooks, _ = _check_inputs(device)
    x.requires_grad_()
    codebooks.requires_grad_()
    result = residual_quantize(x, codebooks, impl=impl)
    rq.assert_codes(result.codes, x, codebooks)

    def formula(dtype: torch.dtype) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, codebooks)]
        values = _outputs(reference.quantize_to_codes(*leaves, result.codes))
        return values, torch.autograd.grad(values, leaves, [torch.ones_like(v) for v in values])

    outputs = _outputs(result)
    grads = torch.autograd.grad(outputs, (x, codebooks), [torch.ones_like(o) for o in outputs])
    (low, low_grads), (oracle, oracle_grads) = formula(torch.float32), formula(torch.float64)
    for name, *values in zip(("quantized", "commitment_loss", "codebook_loss"), outputs, low, oracle, strict=True):
        assert_within_budget(name, *values)
    for name, *values in zip(("x", "codebooks"), grads, low_grads, oracle_grads, strict=True):
        assert_gradient(f"gradient of {name}", *values)


def check_decode(impl: str, device: torch.device) -> None:
    _, codebooks, codes = _check_inputs(device)

    def run(words: Tensor, impl: str) -> tuple[Tensor, Tensor]:
        words = words.detach().requires_grad_()
        decoded = residual_decode(codes, words, impl=impl)
        return decoded, torch.autograd.grad(decoded.square().sum(), words)[0]

    decoded, grad = run(codebooks, impl)
    low, low_grad = run(codebooks, "reference")
    oracle, oracle_grad = run(codebooks.double(), "reference")
    assert_within_budget("decoded", decoded, low, oracle)
    assert_gradient("gradient of codebooks", grad, low_grad, oracle_grad)


def check_statistics(impl: str, device: torch.device) -> None:
    x, codebooks, codes = _check_inputs(device)
    counts, sums = residual_statistics(x, codes, codebooks, impl=impl)
    _, low = residual_statistics(x, codes, codebooks, impl="reference")
    oracle_counts, oracle = residual_statistics(x.double(), codes, codebooks.double(), impl="reference")
    assert torch.equal(counts.double(), oracle_counts), "counts: not those of the reference"
    assert_within_budget("sums", sums, low, oracle)


def _outputs(result: tuple[Tensor, ...]) -> list[Tensor]:
    return [result[0], result[2], result[3]]  # what has a gradient


QUANTIZE = Operator("residual_quantize", "rq", CASES, QUICK, make_inputs, _search_flops, check_quantize)
DECODE = Operator("residual_decode", "rq", [*LARGE, *SMALL[:1]], QUICK, make_inputs, _walk_flops, check_decode)
STATISTICS = Operator(
    "residual_statistics", "rq", [*LARGE, *SMALL[:1]], QUICK, make_inputs, _walk_flops, check_statistics, backward=False
)
OPERATORS = [QUANTIZE, DECODE, STATISTICS]

# ---- Ours ----


def _add_ours() -> None:
    tiny = torch.zeros(1, 8), torch.zeros(1, 2, 8)
    for impl in our_implementations(lambda name: residual_quantize(*(t.cuda() for t in tiny), impl=name)):
        name = OURS if impl == "auto" else f"{OURS} {impl}"

        @QUANTIZE.provider(name)
        def quantize(inputs: Inputs, backward: bool, impl: str = impl):
            if backward:
                return differentiate(
                    lambda x, codebooks: _outputs(residual_quantize(x, codebooks, impl=impl)), inputs[:2]
                )
            return without_grad(lambda x, codebooks: residual_quantize(x, codebooks, impl=impl), inputs[:2])

        @DECODE.provider(name)
        def decode(inputs: Inputs, backward: bool, impl: str = impl):
            run = differentiate if backward else without_grad
            return run(lambda codebooks: [residual_decode(inputs.codes, codebooks, impl=impl)], [inputs.codebooks])

        @STATISTICS.provider(name)
        def statistics(inputs: Inputs, backward: bool, impl: str = impl):
            return lambda: residual_statistics(inputs.x, inputs.codes, inputs.codebooks, impl=impl)


_add_ours()

# ---- Plain torch ----


def quantize_in_torch(x: Tensor, codebooks: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The straightforward way: a matrix of distances per level, its argmin, straight-through and the two losses."""
    rows = x.float()
    residual, quantized = rows, torch.zeros_like(rows)
    codes, commitment, codebook = [], [], []
    for words in codebooks:
        with torch.no_grad():
            distances = torch.addmm(words.square().sum(-1), residual, words.T, alpha=-2)
            chosen = distances.argmin(-1)
        word = F.embedding(chosen, words)
        codes.append(chosen)
        commitment.append((residual - word.detach()).square().mean())
        codebook.append((residual.detach() - word).square().mean())
        residual = residual - word.detach()
        quantized = quantized + word.detach()
    straight_through = rows + (quantized - rows).detach()
    return straight_through.to(x.dtype), torch.stack(codes, -1), torch.stack(commitment), torch.stack(codebook)


def decode_in_torch(codes: Tensor, codebooks: Tensor) -> Tensor:
    return sum(F.embedding(chosen, words) for chosen, words in zip(codes.unbind(-1), codebooks, strict=True))


def statistics_in_torch(x: Tensor, codes: Tensor, codebooks: Tensor) -> tuple[Tensor, Tensor]:
    residual, counts, sums = x.float(), [], []
    for chosen, words in zip(codes.unbind(-1), codebooks, strict=True):
        counts.append(torch.bincount(chosen, minlength=len(words)).float())
        sums.append(torch.zeros_like(words).index_add_(0, chosen, residual))
        residual = residual - F.embedding(chosen, words)
    return torch.stack(counts), torch.stack(sums)


def _compiled(function):
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False)


for _name, _wrap, _slow in (("torch eager", lambda f: f, False), ("torch.compile", _compiled, True)):

    @QUANTIZE.provider(_name, slow_start=_slow)
    def _quantize(inputs: Inputs, backward: bool, wrap=_wrap):
        function = wrap(quantize_in_torch)
        _agree(function(*inputs[:2])[1], inputs)
        if backward:
            return differentiate(lambda x, codebooks: _outputs(function(x, codebooks)), inputs[:2])
        return without_grad(function, inputs[:2])

    @DECODE.provider(_name, slow_start=_slow)
    def _decode(inputs: Inputs, backward: bool, wrap=_wrap):
        function = wrap(decode_in_torch)
        run = differentiate if backward else without_grad
        return run(lambda codebooks: [function(inputs.codes, codebooks)], [inputs.codebooks])

    @STATISTICS.provider(_name, slow_start=_slow)
    def _statistics(inputs: Inputs, backward: bool, wrap=_wrap):
        return without_grad(wrap(statistics_in_torch), (inputs.x, inputs.codes, inputs.codebooks))


# ---- Other packages ----


def _faiss_quantizer(inputs: Inputs):
    try:
        import faiss
    except ImportError:
        raise Unavailable("faiss-cpu is not installed") from None
    if inputs.x.is_cuda:
        raise Unavailable("faiss-cpu runs on the CPU only")
    if inputs.x.dtype != torch.float32:
        raise Unavailable("faiss takes float32 only")
    levels, size, width = inputs.codebooks.shape
    if size & (size - 1):
        raise Unavailable("faiss wants a codebook size that is a power of two")
    faiss.omp_set_num_threads(torch.get_num_threads())
    quantizer = faiss.ResidualQuantizer(width, levels, size.bit_length() - 1)
    faiss.copy_array_to_vector(inputs.codebooks.numpy().ravel(), quantizer.codebooks)
    quantizer.max_beam_size = 1
    quantizer.is_trained = True
    return quantizer


@QUANTIZE.provider("faiss, beam 1", backward=False)
def _quantize_by_faiss(inputs: Inputs, backward: bool):
    quantizer = _faiss_quantizer(inputs)
    levels, size, _ = inputs.codebooks.shape
    packed = quantizer.compute_codes(inputs.x.numpy())
    shifts = torch.arange(levels) * (size.bit_length() - 1)
    words = sum(torch.from_numpy(packed[:, i].astype("int64")) << (8 * i) for i in range(packed.shape[1]))
    _agree((words[:, None] >> shifts) & (size - 1), inputs)
    return lambda: quantizer.compute_codes(inputs.x.numpy())


@DECODE.provider("faiss, beam 1", backward=False)
def _decode_by_faiss(inputs: Inputs, backward: bool):
    quantizer = _faiss_quantizer(inputs)
    packed = quantizer.compute_codes(inputs.x.numpy())
    return lambda: quantizer.decode(packed)


@QUANTIZE.provider("vector-quantize-pytorch")
def _quantize_by_vector_quantize_pytorch(inputs: Inputs, backward: bool):
    try:
        from vector_quantize_pytorch import ResidualVQ
    except ImportError:
        raise Unavailable("vector-quantize-pytorch is not installed") from None
    if inputs.x.dtype != torch.float32:
        raise Unavailable("its codebooks would be rounded to the dtype of x")
    levels, size, width = inputs.codebooks.shape
    module = ResidualVQ(
        dim=width,
        num_quantizers=levels,
        codebook_size=size,
        learnable_codebook=True,
        ema_update=False,
        rotation_trick=False,
    ).to(inputs.x.device)
    for layer, words in zip(module.layers, inputs.codebooks, strict=True):
        layer._codebook.embed.data.copy_(words[None])
    module.train(backward)
    x = inputs.x[None].clone().requires_grad_(backward)
    _agree(module(x)[1][0], inputs)
    if not backward:
        return without_grad(module, [x])
    wanted = [x, *(p for p in module.parameters() if p.requires_grad)]

    def step():
        quantized, _, losses = module(x)
        return torch.autograd.grad(quantized.sum() + losses.sum(), wanted, allow_unused=True)

    return step


def _agree(codes: Tensor, inputs: Inputs) -> None:
    """A peer that finds other codes does other work, and its time means nothing."""
    share = float((codes == inputs.codes).float().mean()) if codes.shape == inputs.codes.shape else 0.0
    needed = AGREEMENT if inputs.x.dtype == torch.float32 else 0.95
    if share < needed:
        raise Unavailable(f"only {share:.1%} of its codes are ours")
