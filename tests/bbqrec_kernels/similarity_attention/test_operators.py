"""What PyTorch asks of operators: opcheck, compile, export, autocast, double backward."""

import subprocess
import sys
import textwrap
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bbqrec_kernels import gap, pack, prefix, similarity_attention, similarity_attention_varlen
from bbqrec_kernels.similarity_attention import api, ops
from bbqrec_kernels.testing import poisoned_outputs, with_layout
from bbqrec_kernels.testing.similarity_attention import random_inputs, random_packed_inputs

ALL_KINDS = ("prefix", "matches", "cosine", "gap")
MASKS = {
    "lengths": (torch.tensor([4, 2]), torch.tensor([5, 3]), False, 0.3),
    "no lengths": (None, None, True, 0.3),
}


def arguments_of(inputs, layout: str, *masks: object) -> tuple:
    tensors = {name: with_layout(tensor, layout) for name, tensor in inputs.tensors.items()}
    terms = tuple(type(inputs)(**{**inputs.__dict__, "tensors": tensors}).terms())
    query, key, value = (tensors[name] for name in ("query", "key", "value"))
    return query, key, value, *api._flatten(terms, query), *masks


def check_operators(forward, backward, arguments: tuple, layout: str) -> None:
    torch.library.opcheck(forward, arguments)
    plain = [a.detach() if isinstance(a, torch.Tensor) else a for a in arguments]
    output, logsumexp = forward(*plain)
    grad = with_layout(torch.randn(output.shape), layout)
    # The backward has no derivative to register: that test would ask for one.
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    for needs in ((True, True, True, True), (False, True, False, True)):
        torch.library.opcheck(backward, (grad, output, logsumexp, *plain, *needs), test_utils=checks)


@pytest.mark.parametrize("layout", ["contiguous", "permuted"])
@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("kinds", [(), ALL_KINDS], ids=["plain", "terms"])
def test_opcheck_padded(kinds: tuple[str, ...], masks: str, layout: str, operators: ops.Operators) -> None:
    few = {"heads": 1, "channels": 1} if operators is ops.triton else {}  # the interpreter is slow
    inputs = random_inputs(rows=4, columns=5, kinds=kinds, **few).require_grad()
    arguments = arguments_of(inputs, layout, *MASKS[masks])
    check_operators(operators.similarity_attention, operators.similarity_attention_backward, arguments, layout)


@pytest.mark.parametrize("layout", ["contiguous", "permuted"])
@pytest.mark.parametrize("kinds", [(), ALL_KINDS], ids=["plain", "terms"])
def test_opcheck_packed(kinds: tuple[str, ...], layout: str, operators: ops.Operators) -> None:
    few = {"heads": 1, "channels": 1} if operators is ops.triton else {}
    inputs = random_packed_inputs([3, 0, 5], kinds=kinds, **few).require_grad()
    arguments = arguments_of(inputs, layout, inputs.cu_seqlens, 5, True, 0.3)
    forward, backward = operators.similarity_attention_varlen, operators.similarity_attention_varlen_backward
    check_operators(forward, backward, arguments, layout)


def packed_attention(query, key, value, table, gap_table, codes, positions, cu_seqlens) -> torch.Tensor:
    terms = [prefix(codes, table, codebook_size=4), gap(positions, gap_table)]
    return similarity_attention_varlen(query, key, value, terms, cu_seqlens=cu_seqlens, max_seqlen=9, is_causal=True)


def packed_arguments() -> tuple[torch.Tensor, ...]:
    inputs = random_packed_inputs([3, 9, 5], kinds=("prefix", "gap")).require_grad()
    return (*inputs.tensors.values(), *(left for left, _ in inputs.compared), inputs.cu_seqlens)


def test_compiles_whole_forward_and_backward() -> None:
    arguments = packed_arguments()
    leaves = [a for a in arguments if a.requires_grad]
    results = []
    for function in (packed_attention, torch.compile(packed_attention, fullgraph=True)):
        output = function(*arguments)
        results.append([output, *torch.autograd.grad(output, leaves, torch.ones_like(output).cumsum(0))])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


def test_reference_compiles_whole() -> None:
    arguments = packed_arguments()

    def attend(query, key, value, table, gap_table, codes, positions, cu_seqlens):
        terms = [prefix(codes, table, codebook_size=4), gap(positions, gap_table)]
        return similarity_attention_varlen(
            query, key, value, terms, cu_seqlens=cu_seqlens, max_seqlen=9, is_causal=True, impl="reference"
        )

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments), attend(*arguments))


def test_one_compiled_graph_serves_all_lengths() -> None:
    """Sequences differ from batch to batch: neither their number nor the longest may compile again without end."""

    def attend(query, codes, table, cu_seqlens, max_seqlen):
        term = prefix(codes, table, codebook_size=4)
        options = {"cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen, "is_causal": True}
        return similarity_attention_varlen(query, query, query, term, **options)

    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend="aot_eager")
    torch._dynamo.utils.counters.clear()
    for length in range(2, 14):
        inputs = random_packed_inputs([length, 3, length + 1], kinds=("prefix",))
        arguments = (inputs.tensors["query"], inputs.compared[0][0], inputs.tensors["table0"], inputs.cu_seqlens)
        assert torch.equal(compiled(*arguments, length + 1), attend(*arguments, length + 1))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


def test_padded_attention_compiles_for_all_shapes() -> None:
    def attend(query, key, codes, key_codes, table):
        term = prefix(codes, table, key_codes=key_codes, codebook_size=4)
        return similarity_attention(query, key, key, term, is_causal=True)

    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows, columns in ((3, 5), (5, 4), (7, 9), (8, 8)):
        inputs = random_inputs(rows=rows, columns=columns, kinds=("prefix",)).require_grad()
        arguments = (inputs.tensors["query"], inputs.tensors["key"], *inputs.compared[0], inputs.tensors["table0"])
        expected, actual = attend(*arguments), compiled(*arguments)
        assert torch.equal(actual, expected)
        leaves = [a for a in arguments if a.requires_grad]
        gradients = [torch.autograd.grad(out.square().sum(), leaves) for out in (expected, actual)]
        assert all(map(torch.equal, *gradients))


def test_compiled_with_the_longest_sequence_as_data() -> None:
    inputs = random_packed_inputs([3, 5, 2], kinds=("gap",))
    query, key, value = (inputs.tensors[name] for name in ("query", "key", "value"))

    def attend(cu_seqlens: torch.Tensor) -> torch.Tensor:
        longest = int(cu_seqlens.diff().max())
        return similarity_attention_varlen(query, key, value, inputs.terms(), cu_seqlens=cu_seqlens, max_seqlen=longest)

    cu_seqlens = torch.tensor([0, 3, 8, 10], dtype=torch.int32)
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(cu_seqlens), attend(cu_seqlens))


def test_torch_func_and_forward_mode_run_in_the_reference() -> None:
    inputs = random_inputs(batch=1, heads=1, rows=3, width=2, kinds=("prefix",))
    query, key = inputs.tensors["query"], inputs.tensors["key"]

    def attend(query: torch.Tensor, impl: str = "auto") -> torch.Tensor:
        return similarity_attention(query, key, key, inputs.terms(), impl=impl)

    jacobian = torch.autograd.functional.jacobian(attend, query)
    tangent = torch.randn_like(query)
    expected = torch.einsum("abcdefgh,efgh->abcd", jacobian, tangent)
    torch.testing.assert_close(torch.func.jvp(attend, (query,), (tangent,))[1], expected)
    torch.testing.assert_close(torch.func.jacrev(attend)(query), jacobian)
    torch.testing.assert_close(torch.func.jacfwd(attend)(query), jacobian)
    queries = torch.randn(4, *query.shape)
    torch.testing.assert_close(torch.vmap(attend)(queries), torch.stack([attend(q) for q in queries]))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(query, tangent)
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(attend(dual)).tangent, expected)
        with pytest.raises(ValueError, match="cannot run as 'cpu': forward-mode derivatives run in the reference only"):
            attend(dual, impl="cpu")
    with pytest.raises(ValueError, match=r"cannot run as 'cpu': torch.func transforms \(vmap, grad, jvp\) run in the"):
        torch.func.jacrev(lambda q: attend(q, impl="cpu"))(query)


def test_compiled_torch_func_and_forward_mode_run_in_the_reference_too() -> None:
    inputs = random_inputs(batch=1, heads=1, rows=3, width=2, kinds=("prefix",))
    query, key = inputs.tensors["query"], inputs.tensors["key"]

    def attend(query: torch.Tensor) -> torch.Tensor:
        return similarity_attention(query, key, key, inputs.terms())

    def derivative(query: torch.Tensor) -> torch.Tensor:
        return torch.func.jvp(attend, (query,), (torch.ones_like(query),))[1]

    queries = torch.randn(4, *query.shape)
    for function, argument in ((derivative, query), (torch.vmap(attend), queries)):
        compiled = torch.compile(function, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(argument), function(argument))


def test_gradients_in_batches_are_for_the_reference() -> None:
    query = torch.randn(1, 1, 3, 2)

    def jacobian(impl: str, **options) -> torch.Tensor:
        return torch.autograd.functional.jacobian(
            lambda query: similarity_attention(query, query, query, impl=impl), query, **options
        )

    with pytest.raises(ValueError, match="gradients were asked for in batches"):
        jacobian("cpu", vectorize=True)
    torch.testing.assert_close(jacobian("reference", vectorize=True), jacobian("cpu"))


def test_the_reference_pads_to_the_longest_sequence_and_not_to_the_limit() -> None:
    query, cu_seqlens = torch.randn(8, 1, 4, dtype=torch.float64), torch.tensor([0, 3, 3, 8], dtype=torch.int32)
    wide, narrow = (
        similarity_attention_varlen(query, query, query, cu_seqlens=cu_seqlens, max_seqlen=n) for n in (2**30, 5)
    )
    assert torch.equal(wide, narrow)


def test_torch_func_over_what_is_compared_and_over_lengths() -> None:
    query, bias, codes = torch.randn(2, 2, 6, 8), torch.randn(2, 2, 4), torch.randint(5, (4, 2, 6, 2, 3))
    lengths = torch.randint(1, 7, (4, 2))

    def attend(codes: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        terms = prefix(codes, bias, codebook_size=5)
        return similarity_attention(query, query, query, terms, key_lengths=lengths)

    found = torch.vmap(attend)(codes, lengths)
    torch.testing.assert_close(found, torch.stack([attend(*each) for each in zip(codes, lengths, strict=True)]))
    found = torch.vmap(lambda lengths: attend(codes[0], lengths))(lengths)
    torch.testing.assert_close(found, torch.stack([attend(codes[0], each) for each in lengths]))


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("packed", [False, True])
def test_meta_and_fake_tensors_have_shapes(packed: bool, impl: str) -> None:
    inputs = random_packed_inputs([3, 4], kinds=ALL_KINDS) if packed else random_inputs(kinds=ALL_KINDS)

    def attend(convert) -> torch.Tensor:
        tensors = {name: convert(tensor) for name, tensor in inputs.tensors.items()}
        compared = tuple((convert(left), convert(right)) for left, right in inputs.compared)
        moved = replace(inputs, tensors=tensors, compared=compared)
        if not packed:
            return moved.attend(impl)
        packing = {"cu_seqlens": convert(inputs.cu_seqlens), "max_seqlen": 4}
        return similarity_attention_varlen(
            *(tensors[name] for name in ("query", "key", "value")), moved.terms(), **packing, impl=impl
        )

    assert attend(lambda t: t.to("meta")).shape == inputs.tensors["query"].shape
    with FakeTensorMode() as mode:
        assert attend(mode.from_tensor).shape == inputs.tensors["query"].shape


def test_the_logsumexp_has_no_derivative(operators: ops.Operators) -> None:
    inputs = random_inputs(kinds=()).require_grad()
    output, logsumexp = operators.similarity_attention(*arguments_of(inputs, "contiguous", None, None, True, 1.0))
    assert output.requires_grad
    assert not logsumexp.requires_grad


def test_exports() -> None:
    class Attention(torch.nn.Module):
        def forward(self, *arguments: torch.Tensor) -> torch.Tensor:
            return packed_attention(*arguments)

    arguments = tuple(a.detach() for a in packed_arguments())
    program = torch.export.export(Attention(), arguments)
    torch.testing.assert_close(program.module()(*arguments), packed_attention(*arguments))
    assert "bbqrec_kernels.similarity_attention_varlen" in str(program.graph)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_autocast_casts_query_key_and_value_only(impl: str) -> None:
    inputs = random_inputs(kinds=("prefix",)).require_grad()
    with torch.autocast("cpu", torch.bfloat16):
        output = inputs.attend(impl)
    assert output.dtype == torch.bfloat16
    output.sum().backward()
    assert {t.grad.dtype for t in inputs.tensors.values()} == {torch.float32}
    expected = inputs.to(torch.bfloat16).attend(impl)
    assert torch.equal(output, expected)


@pytest.mark.parametrize("packed", [False, True])
def test_double_backward_says_that_there_is_none(packed: bool, kernel: str) -> None:
    inputs = (random_packed_inputs([4], kinds=()) if packed else random_inputs(kinds=())).require_grad()
    query = inputs.tensors["query"]
    (gradient,) = torch.autograd.grad(inputs.attend(kernel).sum(), query, create_graph=True)
    with pytest.raises(ValueError, match="double backward was asked for, only first derivatives exist"):
        gradient.sum().backward()


def test_no_matrix_of_all_pairs_exists() -> None:
    """Forward and backward at S = 3000 stay far below the 36 MB of one S×S float matrix."""
    import resource

    def run(rows: int) -> None:
        inputs = random_inputs(batch=1, heads=1, rows=rows, width=8, kinds=("prefix",), is_causal=True).require_grad()
        inputs.attend("cpu").sum().backward()

    run(64)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run(3000)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 12_000  # KiB


def test_memory_of_a_long_sequence_grows_with_its_length_alone() -> None:
    """Partial sums of query gradients are as many as make up enough units of work, not one for each span of keys.

    In a process of its own: what another test once needed would hide it.
    """
    code = """
    import resource, torch
    from bbqrec_kernels import similarity_attention
    def peak_after(rows):
        query = torch.randn(1, 8, rows, 16, requires_grad=True)
        similarity_attention(query, query, query, is_causal=True, impl="cpu").sum().backward()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(-peak_after(64) + peak_after(8192))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 12 * 8 * 8192 * 16 * 4 / 1024  # KiB: 12 times the query


def test_direct_calls_with_tensors_that_do_not_fit_are_refused(operators: ops.Operators) -> None:
    """The operators check what the public functions guarantee: nothing is read out of bounds."""
    inputs = random_inputs(rows=4, kinds=("prefix",))
    arguments = list(arguments_of(inputs, "contiguous", torch.tensor([4, 4]), None, False, 1.0))
    key = arguments[1]
    wrong = {
        "key": (1, key[:, :1]),
        "value": (2, key.half()),
        "biases": (3, arguments[3][:-1]),
        "terms": (4, [arguments[4][0][:1]]),
        "buckets": (9, [7]),
        "length of bits": (8, []),
        "bits": (8, [65]),
        "kind": (7, [9]),
        "query": (0, arguments[0][0]),
        "query_lengths": (10, torch.tensor([4])),
        "dtype of query_lengths": (10, torch.tensor([4.0, 4.0])),
    }
    for position, value in wrong.values():
        with pytest.raises(ValueError, match=r"expected|do not fit together"):
            operators.similarity_attention(*arguments[:position], value, *arguments[position + 1 :])
    output, logsumexp = operators.similarity_attention(*arguments)
    for grad, result, sums in (
        (output[:1], output, logsumexp),
        (output, output.half(), logsumexp),
        (output, output, logsumexp[..., :1]),
    ):
        with pytest.raises(ValueError, match="grad, output, logsumexp: expected"):
            operators.similarity_attention_backward(grad, result, sums, *arguments, True, True, True, True)


def test_words_with_bits_above_the_levels_stay_inside_the_table(kernel: str) -> None:
    """`PackedCodes` is a tuple that anyone can take apart: wrong words may give wrong buckets, but no wrong address."""
    packed = pack(torch.zeros(1, 2, 1, 2, dtype=torch.int64), 3)
    query = torch.randn(1, 1, 2, 8)
    table = torch.tensor([[[-1.0, -2.0, -3.0]]], requires_grad=True)
    broken = prefix(packed._replace(key=packed.key + (1 << 62)), table)
    own = prefix(packed, table)
    output = similarity_attention(query, query, query, [broken], impl=kernel)
    output[..., 0].sum().backward()
    assert torch.equal(output, similarity_attention(query, query, query, own, impl=kernel))  # all levels agree


def test_direct_calls_with_sequences_that_do_not_fit_are_refused(operators: ops.Operators) -> None:
    query = torch.zeros(4, 1, 2)
    terms = api._flatten((), query)
    for starts in ([1, 4], [0, 3], [0, 5, 4], [0, 4], []):
        with pytest.raises(ValueError, match="cu_seqlens: expected int32 values"):
            operators.similarity_attention_varlen(
                query, query, query, *terms, torch.tensor(starts, dtype=torch.int32), 3, False, 1.0
            )
    with pytest.raises(ValueError, match="cu_seqlens: expected int32 values"):
        operators.similarity_attention_varlen(query, query, query, *terms, torch.tensor([0, 4]), 4, False, 1.0)


def test_rows_that_attend_to_nothing_have_a_logsumexp_of_minus_infinity(operators: ops.Operators) -> None:
    inputs = random_inputs(batch=2, rows=4, kinds=())
    masks = (torch.tensor([4, 1]), torch.tensor([0, 4]), False, 1.0)
    with poisoned_outputs():
        _, logsumexp = operators.similarity_attention(*arguments_of(inputs, "contiguous", *masks))
    nothing = torch.tensor([[True] * 4, [False, True, True, True]])[:, None].expand(2, 2, 4)
    assert torch.equal(logsumexp == -torch.inf, nothing)
    assert logsumexp[~nothing].isfinite().all()


def test_a_call_takes_few_steps_of_python() -> None:
    inputs = random_packed_inputs([3, 5], kinds=ALL_KINDS).require_grad()
    query, key, value = (inputs.tensors[name] for name in ("query", "key", "value"))
    terms = list(inputs.terms())
    calls = 0

    def count(_frame, event: str, _argument) -> None:
        nonlocal calls
        calls += event == "call"

    for profile in (None, count):  # the first call imports and remembers
        sys.setprofile(profile)
        try:
            output = similarity_attention_varlen(
                query, key, value, terms, cu_seqlens=inputs.cu_seqlens, max_seqlen=5, is_causal=True
            )
            output.sum().backward()
        finally:
            sys.setprofile(None)
    assert calls < 300  # on a small batch they cost as much as kernels; torch.library.register_autograd has 660


def test_named_implementations() -> None:
    query = torch.randn(1, 1, 2, 4)
    with pytest.raises(ValueError, match="similarity_attention cannot run as 'cuda'"):
        similarity_attention(query, query, query, impl="cuda")
    with pytest.raises(ValueError, match="cannot run as 'cpu': float64 runs in the reference only"):
        similarity_attention(*[query.double()] * 3, impl="cpu")
    with pytest.raises(ValueError, match="impl: got 'fast', expected one of 'auto', 'reference'"):
        similarity_attention(query, query, query, impl="fast")
    assert similarity_attention(*[query.double()] * 3).dtype == torch.float64
