"""What `bbqrec` imports is what its extras promise to install."""

import ast
import re
import sys
from pathlib import Path

import pytest

import bbqrec

ROOT = Path(__file__).parents[2]
DISTRIBUTIONS = {
    "yaml": "pyyaml",
    "sklearn": "scikit-learn",
    "PIL": "pillow",
    "sentence_transformers": "sentence-transformers",
}
BASE = {"torch", "numpy", "bbqrec", "bbqrec_kernels"}


def imported(path):
    """Distributions of the modules that a file imports, wherever in it, and by `_needs`."""
    text = path.read_text(encoding="utf-8")
    names = set(re.findall(r'_needs\("(\w+)', text))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.partition(".")[0])
    return {DISTRIBUTIONS.get(name, name) for name in names - BASE - sys.stdlib_module_names}


def extra(name):
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    table = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    return {re.split("[><=;]", line)[0].strip() for line in table[name]}


def test_every_import_is_promised():
    files = {path.name: imported(path) for path in Path(bbqrec.__file__).parent.rglob("*.py")}
    of_embed = files.pop("embedding.py")
    assert of_embed == extra("embed")
    found = set().union(*files.values())
    # TensorBoard is Lightning's to import.
    assert found == extra("models") - {"tensorboard"}
    assert extra("embed") <= extra("dev")
