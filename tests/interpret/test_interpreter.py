"""The Triton kernels in Triton's interpreter, on the CPU: the tests of every implementation, in their own process."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OPERATOR = "tests/bbqrec_kernels/residual_quantization"
ATTENTION = "tests/bbqrec_kernels/similarity_attention"
# Each with the least number of tests that must have passed: a selection that matches nothing would pass unseen.
MODULES = {
    f"{OPERATOR}/test_contract.py": 30,
    f"{OPERATOR}/test_decode_and_statistics.py": 90,
    f"{OPERATOR}/test_independence.py": 7,
    f"{OPERATOR}/test_values.py": 130,
    "tests/interpret/test_filter.py": 15,
    f"{ATTENTION}/test_accuracy.py": 105,
    f"{ATTENTION}/test_operators.py": 18,
    f"{ATTENTION}/test_terms.py": 45,
    "tests/interpret/test_attention.py": 40,
}


@pytest.mark.check
@pytest.mark.parametrize("module", MODULES)
def test_in_the_interpreter(module: str) -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("this process runs the interpreter already")
    if not importlib.util.find_spec("triton"):
        pytest.skip("no Triton: pip install triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    environment.pop("PYTEST_ADDOPTS", None)
    chosen = "triton and not every_call_gives_the_same_bits"  # it has one thread: nothing could differ
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-k", chosen, module]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, done.stdout
    passed = int(re.search(r"(\d+) passed", done.stdout)[1])
    assert passed >= MODULES[module], done.stdout


def test_named_triton_says_what_it_needs() -> None:
    code = """
import sys, torch, bbqrec_kernels
x, books = torch.ones(2, 4), torch.ones(1, 2, 4)
try:
    bbqrec_kernels.residual_quantize(x, books, impl="triton")
except ValueError as error:
    print(error)
try:
    bbqrec_kernels.similarity_attention(*[torch.ones(1, 1, 2, 4)] * 3, impl="triton")
except ValueError as error:
    print(error)
assert "triton" not in sys.modules or sys.modules["triton"] is None
"""
    blocked = "import sys, importlib.util as u, importlib.abc as a\n"
    blocked += "class Block(a.MetaPathFinder):\n    def find_spec(self, name, path, target=None):\n"
    blocked += "        if name == 'triton': raise ModuleNotFoundError(name)\n"
    blocked += "original = u.find_spec\n"
    blocked += "u.find_spec = lambda name, *rest: None if name == 'triton' else original(name, *rest)\n"
    blocked += "sys.meta_path.insert(0, Block())\n"
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", blocked + code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "impl: residual_quantize cannot run as 'triton': triton is not installed; choose another or 'auto'",
        "impl: similarity_attention cannot run as 'triton': triton is not installed; choose another or 'auto'",
    ]
