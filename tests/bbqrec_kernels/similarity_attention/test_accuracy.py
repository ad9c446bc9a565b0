"""Outputs and gradients of the kernels against float64, and what must hold bit for bit."""

import os
from dataclasses import replace

import pytest
import torch

from bbqrec_kernels import similarity_attention, similarity_attention_varlen
from bbqrec_kernels.testing import (
    GRADIENT_GATES,
    LAYOUTS,
    GradientGate,
    assert_gradient,
    assert_within_budget,
    poisoned_outputs,
    requires_grad_subsets,
    with_layout,
)
from bbqrec_kernels.testing.similarity_attention import AttentionInputs, random_inputs, random_packed_inputs

ALL_KINDS = ("prefix", "matches", "cosine", "gap")
INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1"  # and is slow: fewer channels and sequences
CHANNELS = 1 if INTERPRETS else 2

pytestmark = pytest.mark.usefixtures("target")


def check(
    inputs: AttentionInputs, dtype: torch.dtype, kernel: str, gate: GradientGate | None = None
) -> dict[str, torch.Tensor]:
    """Compares output and every gradient with float64, and returns the kernel's gradients."""
    actual, plain = inputs.to(dtype).require_grad(), inputs.to(dtype).require_grad()
    oracle = inputs.to(dtype).to(torch.float64).require_grad()
    names = list(inputs.tensors)
    grad = torch.randn(inputs.tensors["query"].shape, generator=torch.Generator().manual_seed(7)).to(dtype)
    with poisoned_outputs():
        output = actual.attend(kernel)
        gradients = actual.gradients(output, grad, names)
    plain_output, expected = plain.attend_in_plain_torch(), oracle.attend("reference")
    plain_gradients = plain.gradients(plain_output, grad, names)
    expected_gradients = oracle.gradients(expected, grad, names)

    assert output.dtype == dtype
    assert_within_budget("output", output, plain_output, expected)
    for name in names:
        assert gradients[name].dtype == actual.tensors[name].dtype
        assert_gradient(
            f"gradient of {name}",
            gradients[name],
            plain_gradients[name],
            expected_gradients[name],
            gate=gate or GRADIENT_GATES[dtype],
        )
    return gradients


@pytest.mark.parametrize("width", [1, 8, 60, 100, 128, 256])
def test_head_sizes(width: int, dtype: torch.dtype, kernel: str) -> None:
    heads = 2 if INTERPRETS else 8
    check(random_inputs(heads=heads, rows=33, width=width, kinds=("prefix",), is_causal=True), dtype, kernel)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(
    ("rows", "columns"), [(1, 1), (31, 33), (32, 64), (63, 65), (65, 63), (111, 1), (1, 111), (64, 130)]
)
def test_sizes(rows: int, columns: int, is_causal: bool, kernel: str, target: str) -> None:
    some = {"triton": 0, "simt": 64}.get(target, 256)  # the worst error of a few rows would be no budget
    batch = 2 + some // rows
    gradients = check(
        random_inputs(
            batch=batch,
            rows=rows,
            columns=columns,
            kinds=("prefix", "gap"),
            channels=CHANNELS,
            is_causal=is_causal,
        ),
        torch.float32,
        kernel,
    )
    for name in ("table0", "table1"):  # weights sum to one, whatever is added to all of them
        assert gradients[name].sum(-1).abs().max() < 1e-4


@pytest.mark.parametrize("codebook_size", [None, 4])
@pytest.mark.parametrize("kind", ALL_KINDS)
def test_kinds(kind: str, dtype: torch.dtype, codebook_size: int | None, kernel: str) -> None:
    check(
        random_inputs(rows=40, columns=37, kinds=(kind,), channels=CHANNELS + 1, codebook_size=codebook_size),
        dtype,
        kernel,
    )


def test_all_kinds_together_fill_the_channels(kernel: str) -> None:
    check(random_inputs(rows=40, kinds=ALL_KINDS, channels=2, is_causal=True), torch.float32, kernel)
    check(random_inputs(rows=40, kinds=("prefix",), channels=8, levels=16, is_causal=True), torch.float32, kernel)


@pytest.mark.parametrize("is_causal", [False, True])
def test_lengths(is_causal: bool, dtype: torch.dtype, kernel: str) -> None:
    inputs = random_inputs(batch=5, rows=40, columns=50, kinds=("prefix",), is_causal=is_causal)
    inputs = replace(
        inputs, query_lengths=torch.tensor([40, 1, 0, 33, 7]), key_lengths=torch.tensor([50, 50, 3, 0, 34])
    )
    check(inputs, dtype, kernel)


@pytest.mark.parametrize(
    "lengths",
    [[5] * 40, [0, 1, 2, 0] * 200, [63, 1, 65, 0, 32, 33]],
    ids=["even", "short", "odd"],
)
@pytest.mark.parametrize("is_causal", [False, True])
def test_packed_sequences(lengths: list[int], is_causal: bool, dtype: torch.dtype, kernel: str) -> None:
    lengths = lengths[:12] if INTERPRETS else lengths
    inputs = random_packed_inputs(lengths, kinds=("prefix", "gap"), channels=CHANNELS, is_causal=is_causal)
    check(inputs, dtype, kernel)


@pytest.mark.parametrize("packed", [False, True])
def test_every_subset_of_gradients(packed: bool, kernel: str) -> None:
    """What is asked for does not change by what else is; what is not asked for is not computed."""
    if packed:
        inputs = random_packed_inputs([5, 9], kinds=("prefix", "gap"), channels=CHANNELS, is_causal=True)
    else:
        inputs = random_inputs(rows=9, kinds=("prefix", "gap"), channels=CHANNELS, is_causal=True)
    full = inputs.require_grad()
    output = full.attend(kernel)
    grad = torch.randn_like(output)
    expected = full.gradients(output, grad, list(full.tensors))
    for subset in requires_grad_subsets(list(inputs.tensors))[:: 5 if INTERPRETS else 1]:
        some = inputs.require_grad(subset)
        output = some.attend(kernel)
        output.backward(grad)
        for name, tensor in some.tensors.items():
            if name in subset:
                assert torch.equal(tensor.grad, expected[name]), (subset, name)
            else:
                assert tensor.grad is None, (subset, name)
    assert not inputs.attend(kernel).requires_grad


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_inputs_and_of_the_incoming_gradient(layout: str, packed: bool, kernel: str) -> None:
    make = random_packed_inputs if packed else random_inputs
    options = {"lengths": [5, 9]} if packed else {"rows": 9}
    inputs = make(**options, kinds=ALL_KINDS, channels=CHANNELS).require_grad()
    output = inputs.attend(kernel)
    grad = torch.randn(output.shape)
    expected = inputs.gradients(output, grad, list(inputs.tensors))
    other = replace(
        inputs,
        tensors={name: with_layout(tensor, layout) for name, tensor in inputs.tensors.items()},
        compared=tuple((with_layout(left, layout), with_layout(right, layout)) for left, right in inputs.compared),
    )
    with poisoned_outputs():
        actual = other.attend(kernel)
        gradients = other.gradients(actual, with_layout(grad, layout), list(other.tensors))
    assert torch.equal(actual, output)
    for name, gradient in gradients.items():
        assert torch.equal(gradient, expected[name]), name


def strided_rows(tensor: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    """The tensor with its dimensions but the last in this order in memory, its rows part of longer ones of NaN."""
    buffer = torch.full((*(tensor.shape[i] for i in order), 2 * tensor.shape[-1] + 1), torch.nan, dtype=tensor.dtype)
    back = [order.index(i) for i in range(len(order))]
    rows = buffer[..., 1 : tensor.shape[-1] + 1].permute(*back, len(order))
    return rows.copy_(tensor.detach()).requires_grad_(tensor.requires_grad)


@pytest.mark.parametrize("width", [16, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_every_tensor_in_strides_of_its_own(packed: bool, dtype: torch.dtype, width: int) -> None:
    make = random_packed_inputs if packed else random_inputs
    options = {"lengths": [5, 70]} if packed else {"batch": 3, "heads": 2, "rows": 9, "columns": 70}
    orders = [(1, 0), (0, 1)] * 2 if packed else [(0, 2, 1), (2, 1, 0), (1, 0, 2), (2, 0, 1)]
    inputs = make(**options, width=width, is_causal=True).to(dtype).require_grad()
    output = inputs.attend("cpu")
    grad = torch.randn(output.shape).to(dtype)
    expected = inputs.gradients(output, grad, list(inputs.tensors))
    heads = ("query", "key", "value")
    tensors = {n: strided_rows(inputs.tensors[n], order) for n, order in zip(heads, orders[:3], strict=True)}
    other = replace(inputs, tensors=inputs.tensors | tensors)
    with poisoned_outputs():
        actual = other.attend("cpu")
        gradients = other.gradients(actual, strided_rows(grad, orders[3]), list(inputs.tensors))
    assert torch.equal(actual, output)
    for name, gradient in gradients.items():
        assert torch.equal(gradient, expected[name]), name


def far_apart(tensors: list[torch.Tensor], dim: int) -> list[torch.Tensor]:
    """The tensors, more than 2^31 elements between first and third last (of two: last) along a dimension.

    The third last of 67 is the first of a tile. Most of the memory in between is never touched.
    """
    (shape,) = {tensor.shape for tensor in tensors}
    strides, elements = list(tensors[0].contiguous().stride()), tensors[0].numel()
    strides[dim] = 2**31 // max(1, shape[dim] - 3) + len(tensors) * elements
    buffer = torch.empty(strides[dim] * (shape[dim] - 1) + len(tensors) * elements, dtype=tensors[0].dtype)
    views = [buffer.as_strided(shape, strides, i * elements) for i in range(len(tensors))]
    return [view.copy_(tensor.detach()) for view, tensor in zip(views, tensors, strict=True)]


@pytest.mark.parametrize(("packed", "dim"), [(False, dim) for dim in range(4)] + [(True, dim) for dim in range(3)])
def test_offsets_past_32_bits(packed: bool, dim: int, kernel: str) -> None:
    make = random_packed_inputs if packed else random_inputs
    rows = 5 if INTERPRETS else 67
    options = {"lengths": [2, rows]} if packed else {"rows": rows}
    inputs = make(**options, width=8, channels=1, is_causal=True).to(torch.float16).require_grad()
    heads = ("query", "key", "value")
    output = inputs.attend(kernel)
    grad = torch.randn(output.shape).to(output.dtype)
    expected = inputs.gradients(output, grad, list(inputs.tensors))
    *far, far_grad = far_apart([*(inputs.tensors[name] for name in heads), grad], dim)
    views = {name: view.requires_grad_() for name, view in zip(heads, far, strict=True)}
    other = replace(inputs, tensors=inputs.tensors | views)
    actual = other.attend(kernel)
    assert torch.equal(actual, output)
    for name, gradient in other.gradients(actual, far_grad, list(inputs.tensors)).items():
        assert torch.equal(gradient, expected[name]), name


def test_heads_inside_are_read_and_written_where_they_are() -> None:
    """What linear layers give, `(B, S, H, D)`, costs no copy: a copy would be contiguous."""
    query, key, value = torch.randn(2, 5, 3, 4, 16).permute(2, 0, 3, 1, 4).unbind()
    for tensor in (query, key, value):
        tensor.requires_grad_()
    output = similarity_attention(query, key, value, impl="cpu")
    assert output.transpose(1, 2).is_contiguous()
    for gradient in torch.autograd.grad(output.square().sum(), (query, key, value)):
        assert gradient.transpose(1, 2).is_contiguous()


def test_expanded_inputs(kernel: str) -> None:
    query = torch.randn(1, 1, 5, 8).expand(2, 3, 5, 8).requires_grad_()
    output = similarity_attention(query, query, query, impl=kernel)
    expected = similarity_attention(query, query, query, impl="reference")
    torch.testing.assert_close(output, expected)


@pytest.mark.skipif(INTERPRETS, reason="the CPU kernels have threads")
@pytest.mark.parametrize("packed", [False, True])
def test_thread_count_does_not_change_a_bit(packed: bool) -> None:
    make = random_packed_inputs if packed else random_inputs
    options = {"lengths": [100, 3, 70]} if packed else {"batch": 3, "rows": 100}
    inputs = make(**options, kinds=("prefix", "gap"), is_causal=True).require_grad()
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            output = inputs.attend("cpu")
            grad = torch.ones_like(output).cumsum(0)
            results.append([output, *inputs.gradients(output, grad, list(inputs.tensors)).values()])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_zero_table_is_plain_attention_bit_for_bit(impl: str, dtype: torch.dtype) -> None:
    inputs = random_inputs(rows=20 if INTERPRETS else 50, kinds=ALL_KINDS, is_causal=True).to(dtype)
    zeros = {n: torch.zeros_like(t) if n.startswith("table") else t for n, t in inputs.tensors.items()}
    plain = {n: t for n, t in inputs.tensors.items() if not n.startswith("table")}
    with_tables = replace(inputs, tensors=zeros).require_grad()
    without = replace(inputs, tensors=plain, kinds=(), compared=()).require_grad()
    outputs = [with_tables.attend(impl), without.attend(impl)]
    assert torch.equal(*outputs)
    grad = torch.randn_like(outputs[0])
    for name in plain:
        assert torch.equal(
            with_tables.gradients(outputs[0], grad, [name])[name], without.gradients(outputs[1], grad, [name])[name]
        )
        outputs = [with_tables.attend(impl), without.attend(impl)]


def test_plain_attention_is_that_of_torch(kernel: str) -> None:
    query, key, value = torch.randn(3, 2, 4, 33, 24)
    for is_causal in (False, True):
        expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=is_causal)
        for terms in (None, []):
            actual = similarity_attention(query, key, value, terms, is_causal=is_causal, impl=kernel)
            torch.testing.assert_close(actual, expected)
    scaled = torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=0.5)
    torch.testing.assert_close(similarity_attention(query, key, value, scale=0.5, impl=kernel), scaled)


def test_forbidden_buckets(impl: str) -> None:
    """A bucket of -inf gets no weight and no gradient; rows where all is forbidden are zeros with zero gradients."""
    inputs = random_inputs(batch=1, rows=12, kinds=("prefix",), channels=1).require_grad()
    with torch.no_grad():
        inputs.tensors["table0"][:, :, 1:] = -torch.inf
        inputs.compared[0][0][0, 3] = inputs.compared[0][1][0, 3] = 2
        inputs.compared[0][0][0, 5] = 1  # row 5 is to agree with every key, and so to attend to nothing
        inputs.compared[0][1][0, :, :, 0] = 1
        inputs.compared[0][0][0, [0, 1, 2, 3], :, 0] = 0
    output = inputs.attend(impl)
    gradients = inputs.gradients(output, torch.randn_like(output), list(inputs.tensors))
    assert (output[0, :, 5] == 0).all()
    assert (gradients["query"][0, :, 5] == 0).all()
    assert (output[0, :, 0] != 0).any()
    assert (gradients["table0"][:, :, 1:] == 0).all()
    for name, gradient in gradients.items():
        assert gradient.isfinite().all(), name


@pytest.mark.parametrize("name", ["key", "value"])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_nan_and_infinity_stay_out_of_rows_that_do_not_see_them(poison: float, name: str, impl: str) -> None:
    inputs = random_inputs(batch=1, heads=1, rows=6, columns=4, kinds=("prefix",), is_causal=True).require_grad()
    with torch.no_grad():
        inputs.tensors[name][0, 0, 2] = poison
    output = inputs.attend(impl)
    bad = ~output[0, 0].isfinite().all(-1)
    assert bad.tolist()[:4] == [False] * 4  # the first two rows see no key at all
    assert (output[0, 0, :2] == 0).all()
    assert bad.tolist()[4:] == [True, True] or poison == torch.inf  # a score of -inf is no more than a forbidden pair
    grad = torch.ones_like(output)
    grad[0, 0, 4:] = 0
    with torch.no_grad():
        inputs.tensors[name][0, 0, 2] = 0
    clean = inputs.attend(impl)[0, 0, :4]
    if impl == "triton":  # sums over visible pairs alone go another way
        torch.testing.assert_close(clean, output[0, 0, :4])
    else:
        assert torch.equal(clean, output[0, 0, :4])


def test_gradients_of_rows_that_see_no_nan_are_finite(impl: str) -> None:
    inputs = random_inputs(batch=1, heads=1, rows=4, kinds=("prefix",), is_causal=True).require_grad()
    with torch.no_grad():
        inputs.tensors["key"][0, 0, 3] = inputs.tensors["value"][0, 0, 3] = torch.nan
    output = inputs.attend(impl)
    assert output[0, 0].isnan().any(-1).tolist() == [False, False, False, True]
    gradients = inputs.gradients(output, torch.ones_like(output), ["query"])
    assert gradients["query"][0, 0].isnan().any(-1).tolist() == [False, False, False, True]


@pytest.mark.parametrize("scaled", ["query", "table0"])
def test_large_scores_keep_the_budgets(scaled: str, kernel: str) -> None:
    """The difference of two large numbers, a score and the logsumexp, must not lose what the forward knew."""
    inputs = random_inputs(batch=8, heads=4, rows=64, kinds=("prefix",), is_causal=True)
    change = (lambda t: t * 1000) if scaled == "query" else (lambda t: t + 1e4)
    inputs = replace(inputs, tensors={**inputs.tensors, scaled: change(inputs.tensors[scaled])})
    gate = GradientGate(relative_l2=2e-3, cosine=1 - 1e-5)  # float32 rounds such scores by 1e-4
    check(inputs, torch.float32, kernel, gate)


@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_nan_stays_where_it_matters(impl: str, name: str) -> None:
    inputs = random_inputs(batch=1, heads=2, rows=6, kinds=("prefix",)).require_grad()
    with torch.no_grad():
        inputs.tensors[name][0, 0, 2] = torch.nan
    output = inputs.attend(impl)
    bad_rows = output[0, 0].isnan().all(-1)
    assert bad_rows.tolist() == ([i == 2 for i in range(6)] if name == "query" else [True] * 6)
    assert output[0, 1].isfinite().all()
    gradients = inputs.gradients(output, torch.ones_like(output), list(inputs.tensors))
    assert gradients["table0"][:, 0].isnan().any()
    assert gradients["table0"][:, 1].isfinite().all()


def test_what_is_past_the_lengths_is_never_read(impl: str) -> None:
    inputs = random_inputs(batch=2, rows=6, columns=7, kinds=("prefix",))
    inputs = replace(inputs, query_lengths=torch.tensor([4, 0]), key_lengths=torch.tensor([5, 7]))
    clean = inputs.require_grad()
    dirty = inputs.require_grad()
    with torch.no_grad():
        dirty.tensors["query"][0, :, 4:] = torch.nan
        dirty.tensors["query"][1] = torch.inf
        dirty.tensors["key"][0, :, 5:] = torch.nan
        dirty.tensors["value"][0, :, 5:] = torch.nan
    outputs = [each.attend(impl) for each in (clean, dirty)]
    assert torch.equal(*outputs)
    assert (outputs[1][0, :, 4:] == 0).all()
    grad = torch.randn_like(outputs[0])
    names = list(inputs.tensors)
    gradients = [each.gradients(out, grad, names) for each, out in zip((clean, dirty), outputs, strict=True)]
    for name in names:
        assert torch.equal(gradients[0][name], gradients[1][name]), name


def test_large_scores_do_not_overflow(kernel: str) -> None:
    query = torch.full((1, 1, 4, 8), 1e4)
    value = torch.randn(1, 1, 4, 8)
    output = similarity_attention(query, query, value, impl=kernel)
    torch.testing.assert_close(output, value.mean(2, keepdim=True).expand_as(value))


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4)])
def test_empty_inputs(impl: str, shape: tuple[int, ...]) -> None:
    query, key, value = (torch.zeros(shape).requires_grad_() for _ in range(3))
    output = similarity_attention(query, key, value, is_causal=True, impl=impl)
    output.sum().backward()
    assert output.shape == query.grad.shape == shape


def test_no_keys_at_all(impl: str) -> None:
    query = torch.randn(1, 2, 3, 4, requires_grad=True)
    key, value = torch.zeros(2, 1, 2, 0, 4).unbind(0)
    output = similarity_attention(query, key, value, impl=impl)
    output.sum().backward()
    assert (output == 0).all()
    assert (query.grad == 0).all()


def test_no_tokens_at_all(impl: str) -> None:
    query = torch.zeros(0, 2, 4, requires_grad=True)
    for starts in ([0], [0, 0, 0]):
        options = {"cu_seqlens": torch.tensor(starts, dtype=torch.int32), "max_seqlen": 0, "impl": impl}
        output = similarity_attention_varlen(query, query, query, **options)
        output.sum().backward()
        assert output.shape == query.grad.shape == (0, 2, 4)


def test_packed_equals_one_by_one_bit_for_bit(kernel: str) -> None:
    lengths = [3, 40, 0, 17]
    inputs = random_packed_inputs(lengths, kinds=("prefix", "gap"), is_causal=True)
    together = inputs.attend(kernel)
    for start, end in zip(inputs.cu_seqlens.tolist(), inputs.cu_seqlens.tolist()[1:], strict=False):
        if end > start:
            alone = replace(
                inputs,
                tensors={n: t if n.startswith("table") else t[start:end] for n, t in inputs.tensors.items()},
                compared=tuple((left[start:end], right[start:end]) for left, right in inputs.compared),
                cu_seqlens=torch.tensor([0, end - start], dtype=torch.int32),
            )
            assert torch.equal(alone.attend(kernel), together[start:end])
