"""What can be timed: operators, each with shapes and with providers that do the same work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

DIRECTIONS = ("forward", "forward+backward")
OURS = "bbqrec"


class Unavailable(Exception):
    """Why a provider cannot run a case, in one clause."""


@dataclass(frozen=True)
class Case:
    """One set of sizes and a dtype."""

    sizes: dict[str, int]
    dtype: torch.dtype = torch.float32

    @property
    def shape(self) -> str:
        return " ".join(f"{name}={size}" for name, size in self.sizes.items())


# Prepares a call: takes the inputs of a case and whether it should run backward too. May raise Unavailable.
Prepare = Callable[[Any, bool], Callable[[], Any]]


@dataclass(frozen=True)
class Provider:
    """One way to do the work of an operator."""

    name: str
    prepare: Prepare
    backward: bool = True  # whether it has one
    slow_start: bool = False  # compiles for seconds before its first result; left out of quick runs


@dataclass(frozen=True)
class Operator:
    """An operator, its cases and its providers.

    Fields:
        group: what selects it on the command line.
        make_inputs: `(case, device)` to whatever the providers take.
        flops: `(case, inputs, backward)` to useful floating-point operations.
        check: `(impl, device)` raises AssertionError where our implementation is not within its error budget of the
            reference in float64.
        backward: whether the operator is differentiable.
    """

    name: str
    group: str
    cases: Sequence[Case]
    quick_cases: Sequence[Case]
    make_inputs: Callable[[Case, torch.device], Any]
    flops: Callable[[Case, Any, bool], float]
    check: Callable[[str, torch.device], None]
    backward: bool = True
    providers: list[Provider] = field(default_factory=list)

    def provider(self, name: str, **options: bool) -> Callable[[Prepare], Prepare]:
        """Decorator: adds a provider."""

        def add(prepare: Prepare) -> Prepare:
            self.providers.append(Provider(name, prepare, **options))
            return prepare

        return add


def operators(groups: Sequence[str] = ()) -> list[Operator]:
    """The operators of these groups, all by default."""
    from benchmarks import residual_quantization, similarity_attention

    everything = [*residual_quantization.OPERATORS, *similarity_attention.OPERATORS]
    return [operator for operator in everything if not groups or operator.group in groups]


def our_implementations(run: Callable[[str], Any]) -> list[str]:
    """Names of the implementations that can run, "auto" first: on a GPU each kernel is timed by name as well."""
    names = ["auto"]
    if torch.cuda.is_available():
        for name in ("triton", "cuda"):
            try:
                run(name)
                names.append(name)
            except ValueError:
                pass
    return names


def differentiate(
    function: Callable[..., Sequence[torch.Tensor]], tensors: Sequence[torch.Tensor]
) -> Callable[[], Any]:
    """A call that runs `function` on leaves like `tensors`, and the backward of all outputs it returns."""
    leaves = [t.detach().clone().requires_grad_(t.is_floating_point()) for t in tensors]
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    outputs = function(*leaves)
    grads = [torch.ones_like(output) for output in outputs]

    def call() -> Any:
        outputs = function(*leaves)
        return torch.autograd.grad(outputs, wanted, grads, allow_unused=True)

    return call


def without_grad(function: Callable[..., Any], tensors: Sequence[torch.Tensor]) -> Callable[[], Any]:
    def call() -> Any:
        with torch.no_grad():
            return function(*tensors)

    return call
