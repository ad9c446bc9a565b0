"""The CPU kernels on every SIMD target: borders of tiles and vectors, exp, table sizes, NaN beside what is masked."""

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from bbqrec_kernels import gap, prefix, similarity_attention
from bbqrec_kernels.similarity_attention import api, ops
from bbqrec_kernels.testing import poisoned_outputs, simd_target, simd_targets
from bbqrec_kernels.testing.similarity_attention import AttentionInputs, random_inputs, random_packed_inputs

pytestmark = pytest.mark.usefixtures("cpu_target")


def results(inputs: AttentionInputs, impl: str) -> dict[str, Tensor]:
    """Output and every gradient."""
    inputs = inputs.require_grad()
    grad = torch.randn(inputs.tensors["query"].shape, generator=torch.Generator().manual_seed(3))
    with poisoned_outputs():
        output = inputs.attend(impl)
        return {"output": output, **inputs.gradients(output, grad, list(inputs.tensors))}


def assert_like_float64(inputs: AttentionInputs) -> None:
    expected = results(inputs.to(torch.float64), "reference")
    for name, actual in results(inputs, "cpu").items():  # some gradients cancel to zero
        error = (actual.double() - expected[name]).norm() / expected[name].norm().clamp(min=2)
        assert error < 3e-6, (name, float(error))


# Around the rows of a product (3, 6 or 12), the lanes of a vector and the 64 rows and keys of a tile.
EDGES = [1, 2, 3, 4, 5, 7, 8, 9, 11, 12, 13, 15, 16, 17, 24, 25, 31, 33, 47, 48, 49, 63, 64, 65, 79, 127, 128, 129]


@pytest.mark.parametrize("is_causal", [False, True])
def test_every_number_of_rows_and_keys(is_causal: bool) -> None:
    for index, rows in enumerate(EDGES):
        for columns in {rows, EDGES[-1 - index], EDGES[(5 * index) % len(EDGES)]}:
            inputs = random_inputs(batch=1, heads=1, rows=rows, columns=columns, width=9, is_causal=is_causal)
            assert_like_float64(inputs)


@pytest.mark.parametrize("width", [1, 3, 4, 5, 8, 15, 16, 17, 24, 31, 32, 33, 48, 63, 64, 65, 80, 129, 256])
def test_every_width(width: int) -> None:
    assert_like_float64(random_inputs(batch=1, rows=21, columns=30, width=width, is_causal=True))


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_shape_term_and_length(data: st.DataObject) -> None:
    options = {
        "heads": data.draw(st.integers(1, 3)),
        "width": data.draw(st.integers(1, 40)),
        "kinds": data.draw(st.lists(st.sampled_from(["prefix", "matches", "cosine", "gap"]), max_size=3)),
        "channels": data.draw(st.integers(1, 2)),
        "levels": data.draw(st.integers(1, 5)),
        "codebook_size": data.draw(st.sampled_from([None, 4])),
        "is_causal": data.draw(st.booleans()),
        "seed": data.draw(st.integers(0, 99)),
    }
    tokens = st.integers(1, 90)
    if data.draw(st.booleans()):
        assert_like_float64(random_packed_inputs(data.draw(st.lists(tokens, min_size=1, max_size=4)), **options))
        return
    batch, rows, columns = data.draw(st.integers(1, 3)), data.draw(tokens), data.draw(tokens)
    lengths = {
        name: data.draw(
            st.none() | st.lists(st.integers(0, most + 1), min_size=batch, max_size=batch).map(torch.tensor)
        )
        for name, most in (("query_lengths", rows), ("key_lengths", columns))
    }
    assert_like_float64(replace(random_inputs(batch=batch, rows=rows, columns=columns, **options), **lengths))


@pytest.mark.parametrize(("batch", "heads"), [(1, 1), (1, 8), (3, 5), (16, 1)])
def test_spans_of_keys_are_added(batch: int, heads: int) -> None:
    """Query gradients are sums over spans of 512 keys: apart for few heads, some of them for more, at once for many."""
    inputs = random_inputs(batch=batch, heads=heads, rows=70, columns=1100, width=8, is_causal=True)
    assert_like_float64(inputs)
    lengths = torch.full((batch,), 513)
    assert_like_float64(replace(inputs, key_lengths=lengths))
    first = replace(
        inputs,
        tensors={n: t if n.startswith("table") else t[:1] for n, t in inputs.tensors.items()},
        compared=tuple((left[:1], right[:1]) for left, right in inputs.compared),
    )
    alone, together = results(first, "cpu"), results(inputs, "cpu")
    assert torch.equal(alone["output"], together["output"][:1])
    # The gradient coming in is drawn for the shape of the output: the same only where there is one sequence.
    assert batch > 1 or torch.equal(alone["query"], together["query"][:1])


@pytest.mark.parametrize("is_causal", [False, True])
def test_thread_count_does_not_change_a_bit_of_many_units(is_causal: bool) -> None:
    padded = random_inputs(batch=2, heads=3, rows=600, width=8, kinds=("prefix", "gap"), is_causal=is_causal)
    packed = random_packed_inputs(list(range(1, 100)), kinds=("prefix", "gap"), is_causal=is_causal)
    threads = torch.get_num_threads()
    for inputs in (padded, packed):
        found = []
        try:
            for count in (1, 2, 5, 2):
                torch.set_num_threads(count)
                found.append(results(inputs, "cpu"))
        finally:
            torch.set_num_threads(threads)
        for other in found[1:]:
            for name, tensor in found[0].items():
                assert torch.equal(tensor, other[name]), name


def test_exp_is_right_to_the_last_bits() -> None:
    """Two keys of scores 0 and x: the weight of the second is eˣ / (1 + eˣ)."""
    x = torch.cat([torch.linspace(-86, 0, 20_001), -torch.logspace(-30, 1, 2001), torch.tensor([0.0, -0.0])])
    query = torch.ones(len(x), 1, 1, 1)
    key = torch.stack([torch.zeros_like(x), x], -1)[:, None, :, None]
    value = torch.tensor([0.0, 1.0]).expand(len(x), 1, 2)[..., None]
    actual = similarity_attention(query, key, value, scale=1.0, impl="cpu").double().flatten()
    expected = 1 / (1 + (-x.double()).exp())
    error = ((actual - expected) / expected).abs().max() / torch.finfo(torch.float32).eps
    assert error < 3  # exp itself, the sum, its reciprocal and a product


def test_exp_of_what_is_far_away_is_zero_and_of_nan_is_nan() -> None:
    scores = torch.tensor([-111.0, -1e4, -3e38, -torch.inf, torch.nan, torch.inf])
    key = torch.stack([torch.zeros_like(scores), scores], -1)[:, None, :, None]
    value = torch.tensor([0.0, 1.0]).expand(len(scores), 1, 2)[..., None]
    query = torch.ones(len(scores), 1, 1, 1)
    weights = similarity_attention(query, key, value, scale=1.0, impl="cpu").flatten()
    assert (weights[:4] == 0).all()
    assert weights[4:].isnan().all()


def test_exp_overflows_to_infinity_where_the_logsumexp_is_not_that_of_the_scores() -> None:
    """Called directly, the backward may be given any logsumexp: weights e^(score - logsumexp) show in grad_value."""
    one, zero = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
    for logsumexp in (-80.0, -88.0, -88.6875, -89.0, -1e30):
        lse = torch.tensor([[[logsumexp]]], dtype=torch.float64)
        terms = api._flatten((), one)
        needs = (False, False, True, False)
        gradients = ops.native.similarity_attention_backward(
            one, zero, lse, zero, one, one, *terms, None, None, False, 1.0, *needs
        )
        expected = torch.tensor(-logsumexp, dtype=torch.float64).exp().float()
        torch.testing.assert_close(gradients[2].flatten()[0], expected, rtol=1e-6, atol=0)


def test_logsumexp_is_nearly_double() -> None:
    query, key = torch.randn(1, 1, 77, 8), torch.randn(1, 1, 300, 8)
    terms = api._flatten((), query)
    _, actual = ops.native.similarity_attention(query, key, key, *terms, None, None, False, 1.0)
    expected = (query.double() @ key.double().transpose(-1, -2)).logsumexp(-1)
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-6)  # what float32 makes of the scores
    _, actual = ops.native.similarity_attention(query, 0 * key, key, *terms, None, None, False, 1.0)
    torch.testing.assert_close(actual, torch.full_like(actual, 300).log(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("n_buckets", [1, 2, 5, 6, 7, 8, 11, 12, 13, 15, 16, 17, 31, 32, 33, 64])
def test_every_size_of_a_table(n_buckets: int) -> None:
    """Tables in one register, in two, and in memory; gradients as masked sums, and lane by lane."""
    generator = torch.Generator().manual_seed(n_buckets)
    inputs = random_inputs(batch=1, rows=70, kinds=("gap",), n_buckets=n_buckets)
    far = tuple(torch.randint(0, 2 ** min(n_buckets, 62), (1, 70, 2), generator=generator) for _ in range(2))
    assert_like_float64(replace(inputs, compared=(far,)))
    if n_buckets % 2 == 1:  # otherwise 0 is a boundary, and similarities are near it
        assert_like_float64(random_inputs(batch=1, rows=30, kinds=("cosine",), n_buckets=n_buckets))


@pytest.mark.parametrize("kind", ["prefix", "matches"])
@pytest.mark.parametrize(("levels", "size"), [(1, 4), (2, 4), (3, 1022), (4, 62), (4, 254), (4, 256), (5, 4), (16, 4)])
def test_packed_words_give_the_bits_of_separate_codes(kind: str, levels: int, size: int) -> None:
    """Words of up to 32 bits, and wider ones."""
    inputs = random_inputs(batch=1, rows=70, kinds=(kind,), levels=levels, codebook_size=size, is_causal=True)
    packed, separate = results(inputs, "cpu"), results(replace(inputs, codebook_size=None), "cpu")
    for name, tensor in packed.items():
        assert torch.equal(tensor, separate[name]), name


def test_gap_of_near_and_far_positions() -> None:
    """Positions near the first of a tile are compared in 32 bits, others one by one."""
    limit = 2**29
    edges = [0, 1, 2, 3, 2**24 - 1, 2**24, 2**24 + 1, 2**25 - 1, limit - 1, limit, limit + 1, 2**30 - 1, 2**31, 2**62]
    positions = torch.tensor(edges + [-p for p in edges])
    for keys in (positions, positions.abs() % limit, positions.flip(0)):
        for first in (0, limit - 1, -limit, 2**40):
            term = gap(
                (positions + first)[None, :, None], torch.randn(1, 1, 64), key_positions=(keys + first)[None, :, None]
            )
            query, key, value = torch.zeros(3, 1, 1, len(positions), 1)
            value = torch.randn(1, 1, len(positions), 16)
            query, key = query.expand_as(value), key.expand_as(value)
            actual = similarity_attention(query, key, value, term, impl="cpu")
            torch.testing.assert_close(actual, similarity_attention(query, key, value, term, impl="reference"))


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("place", [0, 5, 40, 69])
def test_what_is_not_finite_stays_out_of_rows_and_keys_that_it_does_not_meet(place: int, poison: float) -> None:
    inputs = random_inputs(batch=1, heads=2, rows=70, kinds=("prefix",), is_causal=True)
    clean = results(inputs, "cpu")
    for name in ("query", "key", "value"):
        dirty = inputs.to(torch.float32)
        dirty.tensors[name] = dirty.tensors[name].clone()
        dirty.tensors[name][0, 0, place] = poison
        found = results(dirty, "cpu")
        if name == "query":  # keys behind it are not seen by it
            for gradient in ("key", "value"):
                assert torch.equal(found[gradient][0, 0, place + 1 :], clean[gradient][0, 0, place + 1 :])
            rows = [i for i in range(70) if i != place]
            assert torch.equal(found["output"][0, 0, rows], clean["output"][0, 0, rows])
            assert not found["output"][0, 0, place].isfinite().any()
        else:  # rows before it do not see it
            for gradient in ("output", "query"):
                assert torch.equal(found[gradient][0, 0, :place], clean[gradient][0, 0, :place])
        for each in ("output", "query", "key", "value"):
            assert torch.equal(found[each][0, 1], clean[each][0, 1])


def test_rows_that_attend_to_nothing_give_nothing_to_keys_whatever_they_hold() -> None:
    inputs = random_inputs(batch=1, heads=1, rows=20, columns=7, kinds=("prefix",), is_causal=True)
    clean = results(inputs, "cpu")
    inputs.tensors["query"][0, 0, :13] = torch.nan  # the first 13 rows see no key
    found = results(inputs, "cpu")
    for name, tensor in clean.items():
        assert torch.equal(tensor, found[name]), name


@pytest.mark.parametrize("width", [5, 16, 31])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nothing_outside_the_tensors_is_read(width: int, dtype: torch.dtype) -> None:
    """All tensors end where their memory does: what lies behind is NaN."""

    def framed(tensor: Tensor) -> Tensor:
        memory = torch.full((tensor.numel() + 128,), torch.nan, dtype=tensor.dtype)
        memory[64:-64] = tensor.flatten()
        return memory[64:-64].view(tensor.shape)

    inputs = random_inputs(batch=1, rows=19, columns=23, width=width, kinds=("prefix", "cosine")).to(dtype)
    frames = {name: framed(tensor).requires_grad_() for name, tensor in inputs.tensors.items()}
    grad = torch.randn(inputs.tensors["query"].shape).to(dtype)
    clean, dirty = inputs.require_grad(), replace(inputs, tensors=frames)
    outputs = [each.attend("cpu") for each in (clean, dirty)]
    assert torch.equal(*outputs)
    names = list(inputs.tensors)
    gradients = [each.gradients(out, framed(grad), names) for each, out in zip((clean, dirty), outputs, strict=True)]
    for name in names:
        assert torch.equal(gradients[0][name], gradients[1][name]), name


def test_targets_agree() -> None:
    inputs = random_inputs(rows=70, width=40, kinds=("prefix", "matches", "cosine", "gap"), is_causal=True)
    found = []
    for name in simd_targets():
        with simd_target(name):
            found.append(results(inputs, "cpu"))
    for other in found[1:]:
        for name, tensor in found[0].items():
            torch.testing.assert_close(tensor, other[name], rtol=1e-4, atol=2e-5)


def test_a_row_that_sees_one_key_gives_its_score_no_gradient() -> None:
    inputs = random_inputs(batch=1, rows=40, columns=40, width=100, kinds=("prefix",), is_causal=True).require_grad()
    output = inputs.attend("cpu")
    gradient = inputs.gradients(output, torch.randn_like(output), ["query"])["query"]
    assert (gradient[:, :, 0] == 0).all()
    assert (gradient[:, :, 1] != 0).any()


def test_levels_are_found_for_any_head_alone() -> None:
    """Heads share the buckets of a tile: what a head gives does not depend on how many there are."""
    inputs = random_inputs(batch=1, heads=40, rows=30, width=16, kinds=("prefix",), is_causal=True)
    together = inputs.attend("cpu")
    (left, right), table = inputs.compared[0], inputs.tensors["table0"]
    for head in (0, 7, 31, 32, 39):
        query, key, value = (inputs.tensors[name][:, head : head + 1] for name in ("query", "key", "value"))
        term = prefix(left, table[:, head : head + 1], key_codes=right, codebook_size=inputs.codebook_size)
        alone = similarity_attention(query, key, value, term, is_causal=True, impl="cpu")
        assert torch.equal(alone, together[:, head : head + 1])
