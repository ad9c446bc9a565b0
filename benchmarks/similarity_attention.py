"""Similarity-reweighted attention with a learned prefix table: padded and packed, ours and others'."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from bbqrec_kernels import pack, prefix, similarity_attention, similarity_attention_varlen
from bbqrec_kernels.similarity_attention.reference import buckets
from bbqrec_kernels.testing import assert_gradient, assert_within_budget
from bbqrec_kernels.testing import similarity_attention as sa
from benchmarks.registry import OURS, Case, Operator, Unavailable, differentiate, our_implementations, without_grad

LEVELS = 4
CODEBOOK_SIZE = 256
USED_CODES = 4  # of each level, so that prefixes of every length occur


class Inputs(NamedTuple):
    query: Tensor  # (B, H, S, D), or (T, H, D) packed
    key: Tensor
    value: Tensor
    bias: Tensor  # (1, H, LEVELS + 1) float32
    codes: Tensor  # (B, S, 1, LEVELS), or (T, 1, LEVELS)
    cu_seqlens: Tensor | None  # packed only

    def differentiable(self) -> tuple[Tensor, ...]:
        return self.query, self.key, self.value, self.bias


def _dense(batch: int, heads: int, tokens: int, width: int, dtype: torch.dtype = torch.float32) -> Case:
    return Case({"B": batch, "H": heads, "S": tokens, "D": width}, dtype)


def _packed(batch: int, heads: int, longest: int, width: int, dtype: torch.dtype = torch.float32) -> Case:
    return Case({"B": batch, "H": heads, "longest": longest, "D": width}, dtype)


# Lengths of the histories in Amazon Beauty (5-core): at each share of its users. The mean is 8.9.
LENGTHS = {0: 5, 0.25: 5, 0.5: 6, 0.75: 9, 0.9: 14, 0.95: 21, 0.98: 32, 0.99: 43, 0.995: 56, 0.999: 98, 1: 204}

GPU_DENSE = [_dense(256, 4, 200, 64, torch.bfloat16), _dense(32, 8, 2048, 64, torch.bfloat16)]
CPU_DENSE = [_dense(64, 4, 200, 32), _dense(128, 2, 50, 64), _dense(16, 4, 1024, 32), _dense(2, 4, 4096, 64)]
GPU_PACKED = [_packed(4096, 4, 50, 64, torch.bfloat16), _packed(1024, 4, 200, 64, torch.bfloat16)]
CPU_PACKED = [_packed(512, 2, 50, 64), _packed(256, 4, 200, 32)]
ON_GPU = torch.cuda.is_available()


def make_inputs(case: Case, device: torch.device) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    sizes = case.sizes
    batch, heads, width = sizes["B"], sizes["H"], sizes["D"]
    if "longest" in sizes:
        lengths = _lengths(batch, sizes["longest"])
        tokens = int(lengths.sum())
        shape, code_shape = (tokens, heads, width), (tokens, 1, LEVELS)
        cu_seqlens = F.pad(lengths.cumsum(0), (1, 0)).to(device, torch.int32)
    else:
        shape, code_shape = (batch, heads, sizes["S"], width), (batch, sizes["S"], 1, LEVELS)
        cu_seqlens = None
    query, key, value = (torch.randn(shape, generator=generator).to(device, case.dtype) for _ in range(3))
    bias = torch.randn(1, heads, LEVELS + 1, generator=generator).to(device)
    codes = torch.randint(USED_CODES, code_shape, generator=generator).to(device)
    return Inputs(query, key, value, bias, codes, cu_seqlens)


def _lengths(batch: int, longest: int) -> Tensor:
    """Lengths of histories of as many users as there are sequences, cut to the last `longest`, in random order."""
    shares, lengths = (np.fromiter(numbers, float) for numbers in (LENGTHS.keys(), LENGTHS.values()))
    found = np.interp(np.linspace(0, 1, batch), shares, lengths).astype(int).clip(max=longest)
    return torch.from_numpy(np.random.default_rng(0).permutation(found))


def _flops(case: Case, inputs: Inputs, backward: bool) -> float:
    """Two products per visible pair, five more in the backward; what is padding or masked does not count."""
    if inputs.cu_seqlens is None:
        pairs = case.sizes["B"] * case.sizes["S"] * (case.sizes["S"] + 1) / 2
    else:
        lengths = inputs.cu_seqlens.diff().double()
        pairs = float((lengths * (lengths + 1) / 2).sum())
    return (7 if backward else 2) * 2.0 * case.sizes["H"] * case.sizes["D"] * pairs


def _check(inputs: sa.AttentionInputs, impl: str, device: torch.device) -> None:
    def on_device(dtype: torch.dtype) -> sa.AttentionInputs:
        cast = inputs.to(dtype)
        moved = {
            "tensors": {name: t.to(device) for name, t in cast.tensors.items()},
            "compared": tuple((a.to(device), b.to(device)) for a, b in cast.compared),
            "cu_seqlens": None if cast.cu_seqlens is None else cast.cu_seqlens.to(device),
        }
        return type(cast)(**{**cast.__dict__, **moved}).require_grad()

    names = list(inputs.tensors)
    mine, plain, exact = on_device(torch.float32), inputs.to(torch.float32).require_grad(), on_device(torch.float64)
    output, low, oracle = mine.attend(impl), plain.attend_in_plain_torch(), exact.attend("reference")
    assert_within_budget("output", output.cpu(), low, oracle.cpu())
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    found = mine.gradients(output, grad.to(device), names)
    low_grads, oracle_grads = plain.gradients(low, grad, names), exact.gradients(oracle, grad.to(device), names)
    for name in names:
        assert_gradient(f"gradient of {name}", found[name].cpu(), low_grads[name], oracle_grads[name].cpu())


def check_dense(impl: str, device: torch.device) -> None:
    _check(sa.random_inputs(rows=67, width=32, is_causal=True), impl, device)


def check_packed(impl: str, device: torch.device) -> None:
    _check(sa.replace(sa.random_packed_inputs([5, 1, 40, 17], width=32), is_causal=True), impl, device)


DENSE = Operator(
    "similarity_attention",
    "attention",
    GPU_DENSE if ON_GPU else CPU_DENSE,
    [_dense(2, 2, 33, 16)],
    make_inputs,
    _flops,
    check_dense,
)
PACKED = Operator(
    "similarity_attention_varlen",
    "attention",
    GPU_PACKED if ON_GPU else CPU_PACKED,
    [_packed(5, 2, 20, 16)],
    make_inputs,
    _flops,
    check_packed,
)
OPERATORS = [DENSE, PACKED]


def _run(function, inputs: Inputs, backward: bool):
    run = differentiate if backward else without_grad
    return run(lambda *tensors: [function(*tensors)], inputs.differentiable())


# ---- Ours: codes are packed once, as a model does for all its layers ----


def _add_ours() -> None:
    tiny = torch.zeros(1, 1, 1, 16)
    for impl in our_implementations(lambda name: similarity_attention(*(tiny.cuda(),) * 3, impl=name)):
        name = OURS if impl == "auto" else f"{OURS} {impl}"

        @DENSE.provider(name)
        def dense(inputs: Inputs, backward: bool, impl: str = impl):
            codes = pack(inputs.codes, CODEBOOK_SIZE)
            return _run(
                lambda q, k, v, bias: similarity_attention(q, k, v, prefix(codes, bias), is_causal=True, impl=impl),
                inputs,
                backward,
            )

        @PACKED.provider(name)
        def packed(inputs: Inputs, backward: bool, impl: str = impl):
            codes, longest = pack(inputs.codes, CODEBOOK_SIZE), int(inputs.cu_seqlens.diff().max())
            options = {"cu_seqlens": inputs.cu_seqlens, "max_seqlen": longest, "is_causal": True, "impl": impl}
            return _run(
                lambda q, k, v, bias: similarity_attention_varlen(q, k, v, prefix(codes, bias), **options),
                inputs,
                backward,
            )


_add_ours()

# ---- Packed sequences padded before, which is not timed ----


def _padded(inputs: Inputs) -> Inputs:
    if inputs.cu_seqlens is None:
        return inputs
    lengths = inputs.cu_seqlens.diff().tolist()

    def pad(tensor: Tensor) -> Tensor:  # (T, ...) -> (B, longest, ...)
        return torch.nn.utils.rnn.pad_sequence(tensor.split(lengths), batch_first=True)

    heads = [pad(t).transpose(1, 2) for t in (inputs.query, inputs.key, inputs.value)]
    return Inputs(*heads, inputs.bias, pad(inputs.codes), None)


@PACKED.provider(f"{OURS}, padded")
def _ours_padded(inputs: Inputs, backward: bool):
    inputs = _padded(inputs)
    codes = pack(inputs.codes, CODEBOOK_SIZE)
    return _run(
        lambda q, k, v, bias: similarity_attention(q, k, v, prefix(codes, bias), is_causal=True), inputs, backward
    )


# ---- PyTorch's attention ----


def _buckets(inputs: Inputs) -> Tensor:
    """`(B, S, S)`: the number of leading levels that agree."""
    return buckets(prefix(inputs.codes, inputs.bias), 0)[0]


@DENSE.provider("SDPA without bias")
@PACKED.provider("SDPA without bias, padded")
def _sdpa_without_bias(inputs: Inputs, backward: bool):
    inputs = _padded(inputs)
    return _run(lambda q, k, v, bias: F.scaled_dot_product_attention(q, k, v, is_causal=True), inputs, backward)


@DENSE.provider("SDPA, materialized bias")
@PACKED.provider("SDPA, materialized bias, padded")
def _sdpa_with_bias(inputs: Inputs, backward: bool):
    inputs = _padded(inputs)
    found = _buckets(inputs)
    hidden = torch.ones(found.shape[-2:], dtype=torch.bool, device=found.device).triu(1)

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        mask = F.embedding(found, bias[0].T.to(q.dtype)).movedim(-1, 1).masked_fill(hidden, -torch.inf)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    return _run(attend, inputs, backward)


@DENSE.provider("FlexAttention", slow_start=True)
def _flex_attention(inputs: Inputs, backward: bool):
    if backward and not inputs.query.is_cuda:
        raise Unavailable("FlexAttention has no backward on the CPU")
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch._dynamo.reset()
    codes, tokens = inputs.codes[:, :, 0], inputs.codes.shape[1]
    attend = torch.compile(flex_attention, dynamic=False)
    mask = create_block_mask(lambda b, h, i, j: j <= i, None, None, tokens, tokens, device=inputs.query.device)

    def run(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        table = bias[0]

        def score(value: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            bucket = agree = (codes[b, i, 0] == codes[b, j, 0]).to(torch.int32)
            for level in range(1, LEVELS):
                agree = agree * (codes[b, i, level] == codes[b, j, level]).to(torch.int32)
                bucket = bucket + agree
            return value + table[h, bucket]

        return attend(q, k, v, score_mod=score, block_mask=mask)

    return _run(run, inputs, backward)
