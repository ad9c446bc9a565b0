"""What does not depend on values: arguments, implementations, and life inside PyTorch (compile, export, autocast)."""

import re

import pytest
import torch
from torch import Tensor

from bbqrec_kernels import residual_decode, residual_quantize, residual_statistics
from bbqrec_kernels._dispatch import IMPLEMENTATIONS
from bbqrec_kernels.residual_quantization import ops
from bbqrec_kernels.testing import residual_quantization as rq
from bbqrec_kernels.testing import with_layout

X, BOOKS, CODES = torch.zeros(4, 8), torch.zeros(2, 5, 8), torch.zeros(4, 2, dtype=torch.int64)

INVALID = {
    "x: got list, expected a torch.Tensor": (TypeError, residual_quantize, [1.0], BOOKS),
    "codebooks: got NoneType, expected a torch.Tensor": (TypeError, residual_quantize, X, None),
    "x: got dtype int64, expected float32 or bfloat16 or float16": (TypeError, residual_quantize, X.long(), BOOKS),
    "codebooks: got dtype bfloat16, expected float32 or float64": (TypeError, residual_quantize, X, BOOKS.bfloat16()),
    "x: got dtype float32, expected float64; codebooks are float64, and mixed dtypes are not supported": (
        TypeError,
        residual_quantize,
        X,
        BOOKS.double(),
    ),
    "x: got dtype float64 with codebooks of float32, expected both float64 or x in float32": (
        TypeError,
        residual_quantize,
        X.double(),
        BOOKS,
    ),
    "codebooks: got shape (5, 8), expected 3 dimensions (levels, codebook_size, D)": (
        ValueError,
        residual_quantize,
        X,
        BOOKS[0],
    ),
    "codebooks: got shape (2, 0, 8), expected at least one level, codeword and D": (
        ValueError,
        residual_quantize,
        X,
        BOOKS[:, :0],
    ),
    "x: got a scalar, expected shape (..., D)": (ValueError, residual_quantize, X[0, 0], BOOKS),
    "x: got shape (4, 7), expected size 8 in dimension -1 (D of codebooks)": (
        ValueError,
        residual_quantize,
        X[:, 1:],
        BOOKS,
    ),
    "codebooks: got device meta, expected cpu like x; move it there": (
        ValueError,
        residual_quantize,
        X,
        BOOKS.to("meta"),
    ),
    "codes: got tuple, expected a torch.Tensor": (TypeError, residual_decode, (1, 2), BOOKS),
    "codes: got dtype float32, expected int64 or int32 or int16 or int8 or uint8": (
        TypeError,
        residual_decode,
        CODES.float(),
        BOOKS,
    ),
    "codes: got dtype bool, expected int64 or int32 or int16 or int8 or uint8": (
        TypeError,
        residual_decode,
        CODES.bool(),
        BOOKS,
    ),
    "codes: got a scalar, expected shape (..., levels)": (ValueError, residual_decode, CODES[0, 0], BOOKS),
    "codes: got shape (4, 1), expected size 2 in dimension -1 (levels of codebooks)": (
        ValueError,
        residual_decode,
        CODES[:, 1:],
        BOOKS,
    ),
    "codes: got device meta, expected cpu like codebooks; move it there": (
        ValueError,
        residual_decode,
        CODES.to("meta"),
        BOOKS,
    ),
    "codes: got shape (3, 2), expected (4, 2) to go with x of shape (4, 8)": (
        ValueError,
        residual_statistics,
        X,
        CODES[1:],
        BOOKS,
    ),
    "x: got shape (4, 6), expected size 8 in dimension -1 (D of codebooks)": (
        ValueError,
        residual_statistics,
        X[:, 2:],
        CODES,
        BOOKS,
    ),
}


@pytest.mark.parametrize("message", INVALID)
def test_invalid_arguments(impl: str, message: str) -> None:
    kind, function, *arguments = INVALID[message]
    with pytest.raises(kind, match=f"^{re.escape(message)}$"):
        function(*arguments, impl=impl)


CALLS = [
    (residual_quantize, (X, BOOKS)),
    (residual_decode, (CODES, BOOKS)),
    (residual_statistics, (X, CODES, BOOKS)),
]


@pytest.mark.parametrize(("function", "arguments"), CALLS)
def test_named_implementation_never_falls_back(function, arguments) -> None:
    name = function.__name__
    expected = ", ".join(map(repr, IMPLEMENTATIONS))
    with pytest.raises(ValueError, match=f"^impl: got 'fast', expected one of {expected}$"):
        function(*arguments, impl="fast")
    for impl in ("triton", "cuda"):
        with pytest.raises(ValueError, match=f"^impl: {name} cannot run as '{impl}': .*; choose another or 'auto'$"):
            function(*arguments, impl=impl)
    double = [t.double() if t.is_floating_point() else t for t in arguments]
    message = f"^impl: {name} cannot run as 'cpu': float64 runs in the reference only; choose another or 'auto'$"
    with pytest.raises(ValueError, match=message):
        function(*double, impl="cpu")
    function(*double)


def test_auto_takes_the_compiled_library_on_the_cpu() -> None:
    x, codebooks = rq.random_inputs(70)
    backward = residual_quantize(x.requires_grad_(), codebooks).quantized.grad_fn
    assert type(backward).__name__ == "ResidualQuantizeBackward"  # its name() is an error in torch 2.10


def test_meta_tensors_give_shapes() -> None:
    x, codebooks, codes = X.to("meta"), BOOKS.to("meta"), CODES.to("meta")
    result = residual_quantize(x, codebooks)
    assert (result.quantized.shape, result.codes.shape, result.codebook_loss.shape) == ((4, 8), (4, 2), (2,))
    assert residual_decode(codes, codebooks).shape == (4, 8)
    assert [t.shape for t in residual_statistics(x, codes, codebooks)] == [(2, 5), (2, 5, 8)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(impl: str, dtype: torch.dtype) -> None:
    x, codebooks = rq.random_inputs(65, width=33)
    plain = residual_quantize(x, codebooks, impl=impl)
    with torch.autocast("cpu", dtype):
        cast = residual_quantize(x, codebooks, impl=impl)
        decoded = residual_decode(plain.codes, codebooks, impl=impl)
        sums = residual_statistics(x, plain.codes, codebooks, impl=impl)[1]
    for one, other in zip(plain, cast, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    assert decoded.dtype == sums.dtype == torch.float32
    assert torch.equal(decoded, residual_decode(plain.codes, codebooks, impl=impl))


def test_inference_mode(impl: str) -> None:
    x, codebooks = rq.random_inputs(5)
    with torch.inference_mode():
        result = residual_quantize(x.requires_grad_(), codebooks, impl=impl)
    assert not result.quantized.requires_grad


def test_double_backward_says_that_it_does_not_exist(kernel: str) -> None:
    x, codebooks = rq.random_inputs(5)
    x.requires_grad_()
    codebooks.requires_grad_()
    sentence = "^{}: double backward was asked for, only first derivatives exist; use impl='reference'$"
    loss = residual_quantize(x, codebooks, impl=kernel).commitment_loss.sum()
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(ValueError, match=sentence.format("residual_quantize")):
        grad.sum().backward()
    decoded = residual_decode(torch.zeros(5, 3, dtype=torch.int64), codebooks, impl=kernel)
    up = torch.ones_like(decoded).requires_grad_()
    (grad,) = torch.autograd.grad(decoded, codebooks, up, create_graph=True)
    with pytest.raises(ValueError, match=sentence.format("residual_decode")):
        grad.sum().backward()


def test_reference_has_second_derivatives() -> None:
    x, codebooks = rq.random_inputs(5, width=4)
    x.requires_grad_()
    loss = residual_quantize(x, codebooks, impl="reference").commitment_loss.sum()
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    torch.testing.assert_close(torch.autograd.grad(grad.sum(), x)[0], torch.full_like(x, 3 * 2 / x.numel()))


OPERATORS = {"cpu": ops.native, "triton": ops.triton}


@pytest.mark.parametrize("layout", ["contiguous", "permuted", "sliced"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(kernel: str, layout: str, dtype: torch.dtype) -> None:
    operators = OPERATORS[kernel]
    x, codebooks = rq.random_inputs((3, 5), width=6, size=4, levels=2, dtype=dtype)
    x, codebooks = with_layout(x.requires_grad_(), layout), with_layout(codebooks.requires_grad_(), layout)
    codes = with_layout(operators.residual_quantize(x, codebooks)[1], layout)
    ups = with_layout(torch.randn_like(x), layout), torch.randn(2), torch.randn(2)
    torch.library.opcheck(operators.residual_quantize, (x, codebooks))
    torch.library.opcheck(operators.residual_decode, (codes, codebooks))
    constants = x.detach(), codebooks.detach()
    torch.library.opcheck(operators.residual_statistics, (constants[0], codes, constants[1]))
    torch.library.opcheck(operators.residual_quantize_backward, (*constants, codes, *ups, True, True))
    torch.library.opcheck(operators.residual_quantize_backward, (*constants, codes, ups[0], None, None, True, False))
    torch.library.opcheck(operators.residual_quantize_backward, (*constants, codes, None, None, ups[2], False, True))
    torch.library.opcheck(operators.residual_decode_backward, (ups[0].float(), codes, constants[1]))


def everything(x: Tensor, codebooks: Tensor, impl: str) -> tuple[Tensor, ...]:
    """All three operators between other computation."""
    result = residual_quantize(x.tanh(), codebooks, impl=impl)
    counts, sums = residual_statistics(x, result.codes, codebooks, impl=impl)
    decoded = residual_decode(result.codes, codebooks, impl=impl)
    loss = result.codebook_loss.sum() + 0.25 * result.commitment_loss.sum()
    loss = loss + (result.quantized.float() * decoded.sin()).sum()
    return loss, result.codes, counts, sums


@pytest.mark.parametrize(("backend", "dynamic"), [("inductor", False), ("aot_eager", True)])
def test_compile_without_graph_breaks(kernel: str, backend: str, dynamic: bool) -> None:
    compiled = torch.compile(everything, fullgraph=True, backend=backend, dynamic=dynamic)
    for rows in (65, 7) if dynamic else (65,):
        x, codebooks = rq.random_inputs((rows, 2), width=12, size=9)
        x, codebooks = with_layout(x.requires_grad_(), "permuted"), codebooks.requires_grad_()
        expected, actual = everything(x, codebooks, kernel), compiled(x, codebooks, kernel)
        for one, other in zip(expected, actual, strict=True):
            torch.testing.assert_close(other, one)
        grads = torch.autograd.grad(expected[0], (x, codebooks))
        for one, other in zip(grads, torch.autograd.grad(actual[0], (x, codebooks)), strict=True):
            torch.testing.assert_close(other, one)


def test_export(kernel: str) -> None:
    class Quantizer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.codebooks = torch.nn.Parameter(torch.randn(3, 9, 12))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            result = residual_quantize(x, self.codebooks, impl=kernel)
            return result.codes, residual_decode(result.codes, self.codebooks, impl=kernel)

    module = Quantizer()
    rows = torch.export.Dim("rows", min=2)
    program = torch.export.export(module, (torch.randn(6, 12),), dynamic_shapes=({0: rows},))
    x = torch.randn(11, 12)
    for one, other in zip(module(x), program.module()(x), strict=True):
        assert torch.equal(one, other)


def test_forward_mode_and_torch_func_run_in_the_reference():
    x, codebooks = torch.randn(3, 4), torch.randn(2, 5, 4)

    def quantized(x, impl="auto"):
        return residual_quantize(x, codebooks, impl=impl).quantized

    tangent = torch.randn_like(x)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, tangent)
        assert torch.allclose(torch.autograd.forward_ad.unpack_dual(quantized(dual)).tangent, tangent)
        with pytest.raises(ValueError, match="forward-mode derivatives run in the reference only"):
            quantized(dual, impl="cpu")
    torch.testing.assert_close(torch.func.jvp(quantized, (x,), (tangent,))[1], tangent)

    def loss(x):
        return torch.func.jvp(lambda x: residual_quantize(x, codebooks).commitment_loss, (x,), (tangent,))[1]

    assert loss(x).abs().min() > 0
    torch.testing.assert_close(torch.compile(loss, fullgraph=True, backend="eager")(x), loss(x))


@pytest.mark.parametrize("in_dims", [(0, 0, 0), (None, 0, None), (0, None, None), (None, None, 0)])
def test_vmap_runs_in_the_reference(in_dims):
    arguments = torch.randn(2, 6, 4), torch.randint(-1, 5, (2, 6, 3)), torch.randn(2, 3, 5, 4)
    arguments = [a if dim == 0 else a[0] for a, dim in zip(arguments, in_dims, strict=True)]

    def nth(n):
        return [a[n] if dim == 0 else a for a, dim in zip(arguments, in_dims, strict=True)]

    found = torch.vmap(residual_statistics, in_dims)(*arguments)
    for n in range(2):
        torch.testing.assert_close(tuple(each[n] for each in found), residual_statistics(*nth(n)))
    if any(dim == 0 for dim in in_dims[1:]):
        found = torch.vmap(residual_decode, in_dims[1:])(*arguments[1:])
        torch.testing.assert_close(found, torch.stack([residual_decode(*nth(n)[1:]) for n in range(2)]))


@pytest.mark.parametrize("code", [-2, 5])
def test_compiled_code_refuses_wrong_codes_too(code, impl):
    decode = torch.compile(lambda c, b: residual_decode(c, b, impl=impl), backend="aot_eager")
    codebooks = torch.randn(2, 5, 4)
    assert decode(torch.tensor([[0, -1]]), codebooks).shape == (1, 4)
    with pytest.raises((IndexError, RuntimeError), match="codes: "):
        decode(torch.tensor([[code, 0]]), codebooks)
