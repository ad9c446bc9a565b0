"""How the operators are tested: error budgets, poisoned outputs, memory layouts, and inputs for each operator.

Nothing here needs pytest. Inputs and rules of one operator are in the module of its name.
"""

from bbqrec_kernels.testing.budgets import GRADIENT_GATES, GradientGate, assert_gradient, assert_within_budget
from bbqrec_kernels.testing.tensors import (
    LAYOUTS,
    poisoned_outputs,
    requires_grad_subsets,
    simd_target,
    simd_targets,
    with_layout,
)

__all__ = [
    "GRADIENT_GATES",
    "LAYOUTS",
    "GradientGate",
    "assert_gradient",
    "assert_within_budget",
    "poisoned_outputs",
    "requires_grad_subsets",
    "simd_target",
    "simd_targets",
    "with_layout",
]
