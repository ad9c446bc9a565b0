"""What is particular to the attention's CUDA kernels: schedules, faults, plans for small machines, NaN and layouts.

Their values are tested where those of every implementation are, in tests/bbqrec_kernels/similarity_attention.
"""

from dataclasses import replace
from itertools import pairwise
from types import ModuleType

import pytest
import torch
from torch import Tensor

from bbqrec_kernels import gap, prefix, similarity_attention
from bbqrec_kernels.similarity_attention import api, ops
from bbqrec_kernels.testing import GRADIENT_GATES, assert_gradient, assert_within_budget, poisoned_outputs
from bbqrec_kernels.testing.similarity_attention import AttentionInputs, random_inputs, random_packed_inputs

pytestmark = pytest.mark.usefixtures("attention_on_simt")

ALL_KINDS = ("prefix", "matches", "cosine", "gap")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def results(inputs: AttentionInputs, impl: str = "cpu") -> dict[str, Tensor]:
    """Output and every gradient; "cpu" is csrc/simt here."""
    inputs = inputs.require_grad()
    query = inputs.tensors["query"]
    grad = torch.randn(query.shape, generator=torch.Generator().manual_seed(3)).to(query.dtype)
    with poisoned_outputs():
        output = inputs.attend(impl)
        return {"output": output, **inputs.gradients(output, grad, list(inputs.tensors))}


def check(inputs: AttentionInputs, dtype: torch.dtype) -> None:
    """Compares output and every gradient with float64, within the budgets."""
    inputs = inputs.to(dtype)
    found, expected = results(inputs), results(inputs.to(torch.float64), "reference")
    plain = inputs.require_grad()
    output = plain.attend_in_plain_torch()
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    low = {"output": output, **plain.gradients(output, grad, list(inputs.tensors))}
    assert_within_budget("output", found["output"], low["output"], expected["output"])
    for name in inputs.tensors:
        gate = GRADIENT_GATES[dtype]
        assert_gradient(f"gradient of {name}", found[name], low[name], expected[name], gate=gate)


def same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


# ---- values: the borders of warps, tiles, parts of tiles and blocks


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(
    ("rows", "columns"), [(15, 17), (32, 31), (33, 64), (64, 65), (129, 127), (255, 40), (257, 96), (40, 257)]
)
def test_borders(rows: int, columns: int, is_causal: bool, dtype: torch.dtype) -> None:
    batch = 1 + 64 // rows
    inputs = random_inputs(batch=batch, rows=rows, columns=columns, width=24, kinds=("prefix",), is_causal=is_causal)
    check(inputs, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [2, 31, 33, 64, 65, 111, 128, 130, 200, 256])
def test_widths(width: int, dtype: torch.dtype) -> None:
    check(random_inputs(heads=3, rows=70, columns=66, width=width, is_causal=True), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("codebook_size", [None, 4, 254, 2**14])
def test_all_kinds_in_words_of_every_size(codebook_size: int | None, dtype: torch.dtype) -> None:
    """Codes that are not packed, and words of up to 32 and 64 bits."""
    check(random_inputs(rows=70, columns=50, kinds=ALL_KINDS, channels=2, codebook_size=codebook_size), dtype)


@pytest.mark.parametrize("levels", [1, 2, 3, 4, 5, 8, 16])
@pytest.mark.parametrize("kind", ["prefix", "matches"])
def test_packed_words_give_the_bits_of_separate_codes(kind: str, levels: int) -> None:
    inputs = random_inputs(rows=70, width=16, kinds=(kind,), levels=levels, is_causal=True)
    packed, separate = results(inputs), results(replace(inputs, codebook_size=None))
    # Prefixes of packed codes sum up their tables level by level, all else bucket by bucket.
    torch.testing.assert_close(packed.pop("table0"), separate.pop("table0"), rtol=1e-5, atol=2e-5)
    same_bits(packed, separate)


@pytest.mark.parametrize("n_buckets", [1, 2, 4, 5, 8, 9, 17, 64])
def test_every_size_of_a_table(n_buckets: int) -> None:
    inputs = random_inputs(batch=4, rows=40, kinds=("gap",), n_buckets=n_buckets)
    generator = torch.Generator().manual_seed(n_buckets)
    far = tuple(torch.randint(0, 2 ** min(n_buckets, 62), (4, 40, 2), generator=generator) for _ in range(2))
    check(replace(inputs, compared=(far,)), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_eight_channels_and_none(dtype: torch.dtype) -> None:
    check(random_inputs(rows=70, kinds=("prefix",), channels=8, is_causal=True), dtype)
    check(random_inputs(rows=70, kinds=(), is_causal=True), dtype)


def test_logsumexp_is_that_of_the_scores() -> None:
    for dtype, tolerance in ((torch.float32, 2e-6), (torch.bfloat16, 2e-6), (torch.float16, 2e-6)):
        query, key = (torch.randn(1, 2, 70, 16).to(dtype) for _ in range(2))
        _, found = ops.native.similarity_attention(query, key, key, *api._flatten((), query), None, None, False, 1.0)
        expected = (query.double() @ key.double().transpose(-1, -2)).logsumexp(-1)
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * 4)


# ---- schedules


CASES = {
    "padded": lambda: random_inputs(
        heads=1, rows=70, columns=90, width=16, kinds=ALL_KINDS, channels=1, is_causal=True
    ),
    "packed": lambda: random_packed_inputs([70, 0, 3], heads=1, kinds=("prefix", "cosine"), channels=1, is_causal=True),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_turns_of_threads_change_no_bit(simt: ModuleType, case: str, dtype: torch.dtype) -> None:
    inputs = CASES[case]().to(dtype)
    expected = results(inputs)
    for order in ("reverse", "shuffled"):
        simt.set_order(order)
        same_bits(expected, results(inputs))


@pytest.mark.parametrize("kibibytes", [163, 99, 64])
def test_plans_for_every_machine(simt: ModuleType, kibibytes: int) -> None:
    """A100, consumer cards, and one smaller than any: fewer warps to a block, the same rows."""
    inputs = random_inputs(heads=1, rows=130, width=64, kinds=ALL_KINDS, channels=2, is_causal=True)
    expected = results(inputs)
    simt.set_limits(3, kibibytes * 1024)
    for name, tensor in results(inputs).items():
        if name.startswith("table"):  # sums over blocks
            torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-4)
        else:
            assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kinds", [(), ALL_KINDS], ids=["plain", "terms"])
def test_the_widest_heads_fit_consumer_cards(simt: ModuleType, kinds: tuple[str, ...], dtype: torch.dtype) -> None:
    """Forward and backward: of float32 with one tile at once where two do not fit, and with the same bits."""
    inputs = random_inputs(batch=1, heads=1, rows=50, width=256, kinds=kinds, is_causal=True).to(dtype)
    expected = results(inputs)
    simt.set_limits(3, 99 * 1024)
    found = results(inputs)
    for table in (name for name in expected if name.startswith("table")):  # sums over blocks
        torch.testing.assert_close(found.pop(table), expected[table], rtol=1e-4, atol=1e-4)
    same_bits(found, expected)


def test_a_machine_that_is_too_small_is_named(simt: ModuleType) -> None:
    simt.set_limits(3, 16 * 1024)
    with pytest.raises(ValueError, match="query: this device has too little shared memory for the head size"):
        random_inputs(width=256).attend("cpu")


def test_sequences_do_not_depend_on_their_neighbours() -> None:
    lengths = [70, 0, 1, 33]
    inputs = random_packed_inputs(lengths, kinds=("prefix", "gap"), is_causal=True)
    together = inputs.attend("cpu")
    starts = inputs.cu_seqlens.tolist()
    for start, end in pairwise(starts):
        alone = replace(
            inputs,
            tensors={n: t if n.startswith("table") else t[start:end] for n, t in inputs.tensors.items()},
            compared=tuple((left[start:end], right[start:end]) for left, right in inputs.compared),
            cu_seqlens=torch.tensor([0, end - start], dtype=torch.int32),
        )
        assert torch.equal(alone.attend("cpu"), together[start:end])


# ---- faults


def test_every_barrier_and_every_wait_is_missed(simt: ModuleType) -> None:
    """Each is left out in turn: csrc/simt says so, in one of these cases at least."""
    with_nan = CASES["padded"]()  # what is no number takes a path of its own
    with_nan.tensors["value"][0, 0, 30] = with_nan.tensors["key"][0, 0, 31] = torch.nan
    with_nan.tensors["query"][0, 0, 5] = torch.nan
    full = random_inputs(batch=1, heads=1, rows=70, kinds=("cosine",), channels=1)
    wide = random_inputs(batch=1, heads=1, rows=20, width=130, kinds=())
    simt.set_limits(3, 96 * 1024)  # holds one tile of `wide` at once in the backward
    cases = [with_nan, full, replace(full, kinds=(), compared=()), wide]
    simt.synchronizations()
    for inputs in cases:
        results(inputs)
    places = simt.synchronizations()
    assert {what for what, _ in places} == {"barrier", "warp barrier", "wait"}
    assert len(places) > 15
    for what, line in sorted(places):
        simt.leave_out(what, line)
        with pytest.raises(simt.Fault, match=r"without a (barrier|wait)|before any write"):
            list(map(results, cases))


# ---- what is no number, and what is not covered


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("place", [0, 5, 40, 69])
def test_what_is_not_finite_stays_out_of_rows_and_keys_that_it_does_not_meet(
    place: int, poison: float, dtype: torch.dtype
) -> None:
    inputs = random_inputs(batch=1, heads=2, rows=70, kinds=("prefix",), is_causal=True).to(dtype)
    clean = results(inputs)
    for name in ("query", "key", "value"):
        dirty = inputs.to(dtype)
        dirty.tensors[name] = dirty.tensors[name].clone()
        dirty.tensors[name][0, 0, place] = poison
        found = results(dirty)
        if name == "query":  # keys behind it are not seen by it
            for gradient in ("key", "value"):
                assert torch.equal(found[gradient][0, 0, place + 1 :], clean[gradient][0, 0, place + 1 :])
            rows = [i for i in range(70) if i != place]
            assert torch.equal(found["output"][0, 0, rows], clean["output"][0, 0, rows])
            assert not found["output"][0, 0, place].isfinite().any()
        else:  # rows before it do not see it
            for gradient in ("output", "query"):
                assert torch.equal(found[gradient][0, 0, :place], clean[gradient][0, 0, :place])
            if name == "value" or poison != poison:
                assert not found["output"][0, 0, place:].isfinite().any()
        for each in ("output", "query", "key", "value"):
            assert torch.equal(found[each][0, 1], clean[each][0, 1])


def test_nan_is_where_the_reference_has_it() -> None:
    """In one column of a value and of the incoming gradient, on and off the diagonal."""
    for name, place in (("value", 3), ("value", 68), ("key", 40), ("query", 40)):
        inputs = random_inputs(batch=1, heads=1, rows=70, kinds=("prefix",), is_causal=True)
        inputs.tensors[name][0, 0, place, 2] = torch.nan
        found, expected = results(inputs), results(inputs.to(torch.float64), "reference")
        for each, tensor in found.items():
            if each.startswith("table"):
                assert tensor.isnan().any() == expected[each].isnan().any(), (name, each)
            else:
                assert torch.equal(tensor.isnan(), expected[each].isnan()), (name, each)


def test_gradients_of_rows_that_attend_to_nothing_are_not_read() -> None:
    """All buckets of row 40 are forbidden: NaN in its incoming gradient reaches no key and no table."""
    codes = torch.zeros(1, 70, 1, 2, dtype=torch.int64)
    codes[0, 40] = 1
    table = torch.tensor([[[-torch.inf, 0.0, 0.5]]])
    query, key, value = (t.requires_grad_() for t in torch.randn(3, 1, 1, 70, 8).unbind(0))
    keys = codes.clone()
    keys[0, 40] = 0  # nothing agrees with row 40 any more
    output = similarity_attention(query, key, value, prefix(codes, table, key_codes=keys, codebook_size=3), impl="cpu")
    assert (output[0, 0, 40] == 0).all()
    grad = torch.randn_like(output)
    clean = torch.autograd.grad(output, (query, key, value), grad, retain_graph=True)
    grad[0, 0, 40] = torch.nan
    for one, other in zip(clean, torch.autograd.grad(output, (query, key, value), grad), strict=True):
        assert torch.equal(one, other)
        assert one.isfinite().all()


def test_tokens_that_no_sequence_covers_give_zeros() -> None:
    """The public function refuses such `cu_seqlens` on the CPU; on CUDA nobody looks at its values."""
    inputs = random_packed_inputs([3, 40, 4, 30], kinds=("prefix",), is_causal=True)
    query, key, value = (inputs.tensors[name] for name in ("query", "key", "value"))
    flat = api._flatten(tuple(inputs.terms()), query)
    for starts, longest in (([3, 43, 47], 40), ([0, 60, 77], 50), ([5], 0), ([-9, 20, 900], 100)):
        cu_seqlens = torch.tensor(starts, dtype=torch.int32)
        with poisoned_outputs():
            output, logsumexp = ops.native.similarity_attention_varlen(
                query, key, value, *flat, cu_seqlens, longest, True, 0.3
            )
            gradients = ops.native.similarity_attention_varlen_backward(
                output, output, logsumexp, query, key, value, *flat, cu_seqlens, longest, True, 0.3, *[True] * 4
            )
        covered = torch.zeros(77, dtype=torch.bool)
        for start, end in pairwise(starts):
            covered[max(start, 0) : max(start, 0) + max(0, min(end, 77) - max(start, 0))][:longest] = True
        for tensor in (output, *gradients[:3]):
            assert tensor.isfinite().all()
            assert (tensor[~covered] == 0).all()
        assert torch.equal(logsumexp[:, 0] == -torch.inf, ~covered)
        assert gradients[3].isfinite().all()
    decreasing = torch.tensor([9, 3, 90, -5], dtype=torch.int32)  # no values are promised, but no address is wrong
    ops.native.similarity_attention_varlen(query, key, value, *flat, decreasing, 30, True, 0.3)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("heads", [0, 2])
def test_tables_have_zero_gradients_where_there_is_no_sequence(heads: int, packed: bool) -> None:
    """A batch of none, and `cu_seqlens` of one element."""
    make, none = (random_packed_inputs, {"lengths": []}) if packed else (random_inputs, {"batch": 0})
    for name, tensor in results(make(**none, heads=heads, kinds=("prefix", "gap"))).items():
        assert (tensor == 0).all(), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [7, 8, 20, 24])
def test_rows_that_are_not_aligned(width: int, dtype: torch.dtype) -> None:
    """Heads inside a wider projection: pieces of 16 bytes are copied where they are aligned, elements elsewhere."""
    wide = torch.randn(2, 40, 4 * width + 3).to(dtype)
    for offset in (0, 1, 2):
        parts = [wide[..., offset + i * width : offset + (i + 1) * width].unsqueeze(1) for i in range(3)]
        strided = AttentionInputs(dict(zip(("query", "key", "value"), parts, strict=True)), is_causal=True)
        dense = AttentionInputs({name: t.contiguous() for name, t in strided.tensors.items()}, is_causal=True)
        assert torch.equal(strided.attend("cpu"), dense.attend("cpu"))
        gradients = []
        for inputs in (strided, dense):
            leaves = {name: t.detach().requires_grad_() for name, t in inputs.tensors.items()}
            output = replace(inputs, tensors=leaves).attend("cpu")
            gradients.append(torch.autograd.grad(output, list(leaves.values()), torch.ones_like(output).cumsum(2)))
        for one, other in zip(*gradients, strict=True):
            assert torch.equal(one, other)


def test_positions_at_the_ends_of_int64() -> None:
    ends = torch.iinfo(torch.int64)
    positions = torch.tensor([0, 1, ends.max, ends.min, -1, 2**31, -(2**31), 2**62])[None, :, None]
    term = gap(positions, torch.randn(1, 1, 64))
    query, key, value = torch.randn(3, 1, 1, 8, 16).unbind(0)
    found = similarity_attention(query, key, value, term, impl="cpu")
    torch.testing.assert_close(found, similarity_attention(query, key, value, term, impl="reference"))
