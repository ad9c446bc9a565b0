"""What the launchers of the Triton kernels pass compiles, without a GPU: tuples, strides, optional tensors.

benchmarks.static compiles with types written down by hand; here Triton reads them off the arguments.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OLD_TRITON = ROOT / "build" / "triton-3.6.0"  # `make check` puts it there

CODE = """
from types import SimpleNamespace

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

driver.set_active(
    SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda device=None: 0,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
    )
)

from bbqrec_kernels.similarity_attention import api, triton_kernels as tk
from bbqrec_kernels.testing.similarity_attention import random_inputs, random_packed_inputs


def compile_only(kernel, grid, *arguments, **constants):
    if kernel is not tk._table_gradients_kernel:
        constants["COMPILED"] = True
    kernel.warmup(*arguments, grid=grid, **constants, **tk.OPTIONS)
    print(kernel.__name__)


tk._launch = compile_only
padded = random_inputs(width=64, kinds=("prefix", "gap", "cosine"), channels=1, is_causal=True)
packed = random_packed_inputs([3, 4], kinds=(), width=60)
for inputs, dtype in ((padded, torch.bfloat16), (packed, torch.float16)):
    inputs = inputs.to(dtype)
    query, key, value = (inputs.tensors[name] for name in ("query", "key", "value"))
    arguments = (query, key, value, *api._flatten(tuple(inputs.terms()), query))
    forward, backward = tk.similarity_attention, tk.similarity_attention_backward
    masks = torch.tensor([3, 4]), None, True, 0.1
    if inputs.cu_seqlens is not None:
        forward, backward = tk.similarity_attention_varlen, tk.similarity_attention_varlen_backward
        masks = inputs.cu_seqlens, 4, True, 0.1
    output, logsumexp = forward(*arguments, *masks)
    backward(output, output, logsumexp, *arguments, *masks, True, True, True, True)
"""


@pytest.mark.check
@pytest.mark.parametrize("version", ["installed", "oldest"])
def test_launched_arguments_of_attention_compile(version: str) -> None:
    if not importlib.util.find_spec("triton"):
        pytest.skip("no Triton: pip install triton")
    if version == "oldest" and not (OLD_TRITON / "triton").is_dir():
        pytest.skip(f"no Triton 3.6 at {OLD_TRITON.relative_to(ROOT)}; `make check` installs it where pip has it")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    first = [str(OLD_TRITON)] if version == "oldest" else []
    environment["PYTHONPATH"] = os.pathsep.join([*first, str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, "-c", CODE], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows, keys, tables = "_backward_rows_kernel", "_backward_keys_kernel", "_table_gradients_kernel"
    # Three tables of 4, 7 and 7 buckets have 15 sums: one pass. No tables: no sums.
    assert done.stdout.split() == ["_forward_kernel", rows, tables, keys, "_forward_kernel", rows, keys]
