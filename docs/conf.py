"""Turns docs/ into a site: `make docs`, in the root of the repository. A warning is an error, and nothing is fetched,
neither now nor by a reader.

What exists elsewhere is not written again in a page:

`<!-- table: NAME -->`   becomes a table of TABLES, made from the code or from committed measurements;
`<!-- page: PATH -->`    makes the page that file of the repository;
a name in backticks      becomes a link to its entry in the reference, in pages and in docstrings, where it has one.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError
from sphinx.transforms import SphinxTransform
from sphinx.util import logging

import bbqrec
import bbqrec_kernels
from bbqrec.config import DEFAULTS_OF_MODEL, ModelConfig, TokenizerConfig, TrainingConfig
from bbqrec_kernels import testing
from benchmarks import static, summary
from benchmarks.accuracy import reweighting, runs, table

DOCS = Path(__file__).parent
ROOT = DOCS.parent
RESULTS = ROOT / "benchmarks" / "results"

project = "BBQRec"
version = release = bbqrec_kernels.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
myst_heading_anchors = 3
highlight_language = "none"
smartquotes_action = "D"  # dashes; quotes stay as they are
nitpicky = True
# Types of other projects: linking to them would take a download of their list of names.
nitpick_ignore_regex = [("py:.*", r"(torch|numpy|np|nn|polars|pathlib|collections)\..*|typing\.Literal\[.*|Tensor")]
# Inside of the models: what they are is no promise. Options have a table.
nitpick_ignore_regex += [("py:class", r"bbqrec\.(models|config)\..*")]

html_theme = "furo"
html_title = f"BBQRec {version}"
html_static_path, html_css_files = ["static"], ["site.css"]
html_show_sourcelink = html_copy_source = html_show_copyright = False

default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
napoleon_numpy_docstring = napoleon_use_rtype = False
napoleon_use_ivar = True

PUBLIC = {
    f"{module.__name__}.{name}": getattr(module, name)
    for module in (bbqrec_kernels, bbqrec, testing)
    for name in module.__all__
    if not name.startswith("_")
}
SHORT = {name.rpartition(".")[2]: name for name in PUBLIC}
PAGE = re.compile(r"<!-- page: (\S+) -->")
TABLE = re.compile(r"^<!-- table: (\S+) -->$", re.MULTILINE)
LINK = re.compile(r"\[([^\]\n]*)\]\((?!https?:)([^)#\s]*)(#[^)\s]*)?\)")
FETCHED = re.compile(r"<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)=\"(?:https?:)?//|@import|url\([\"']?http")


# ---- Tables


def speed() -> str:
    """Ours against the peers: the tables of README.md."""
    return summary.tables(sorted(RESULTS.glob("*_cpu_*.csv")))


def provenance() -> str:
    """Where, with what and from which commit each file of measurements comes."""
    lines = ["| file | device | versions | commit |", "|---|---|---|---|"]
    for path in sorted(RESULTS.glob("*_cpu_*.csv")):
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        said = (", ".join(dict.fromkeys(row[key] for row in rows)) for key in ("device", "versions", "commit"))
        lines.append(f"| [{path.name}](../benchmarks/results/{path.name}) | {' | '.join(said)} |")
    return "\n".join(lines)


def static_costs() -> str:
    """What `python -m benchmarks.static` prints, from the rows that it wrote."""
    return f"```text\n{static.render(static.read())}\n```"


def accuracy() -> str:
    """How good the models are, by data set: what `python -m benchmarks.accuracy --table` prints."""
    return table.tables(map(runs.Runs.load, runs.NAMES))


def grid() -> str:
    """Dropout and weight decay of each model: what `python -m benchmarks.accuracy --table --grid` prints."""
    return table.grid_table(map(runs.Runs.load_grid, runs.NAMES))


def reweighted() -> str:
    """What reweighting attention is worth, from all rows there are."""
    return reweighting.table_of(sorted((RESULTS / "reweighting").glob("*.csv")))


def options() -> str:
    """Every option of a run, by section."""
    parts = []
    for section, model in (("tokenizer", TokenizerConfig), ("model", ModelConfig), ("training", TrainingConfig)):
        lines = [f"| `{section}.` | takes | default | meaning |", "|---|---|---|---|"]
        for name, field in model.model_fields.items():
            default = _yaml(field.get_default())
            for other, sections in DEFAULTS_OF_MODEL.items():
                if name in sections.get(section, {}):
                    default += f"; {other}: {_yaml(sections[section][name])}"
            if not field.description:
                raise ExtensionError(f"bbqrec.config: {section}.{name} has no description")
            lines.append(f"| `{name}` | {_takes(field)} | {default} | {field.description} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value).splitlines()[0]


def _takes(field: Any) -> str:
    """The kind of an option's values, and their limits."""
    kinds = {"bool": "true or false", "int": "whole number", "float": "number", "list[str]": "list of names"}
    kind = str(getattr(field.annotation, "__name__", field.annotation)).replace(" | None", "")
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    limits = [f"{signs[s]} {getattr(rule, s):,}" for rule in field.metadata for s in signs if hasattr(rule, s)]
    return " ".join([kinds[kind], ", ".join(limits)]).strip()


TABLES: dict[str, Callable[[], str]] = {
    "speed": speed,
    "provenance": provenance,
    "static-costs": static_costs,
    "accuracy": accuracy,
    "grid": grid,
    "reweighting": reweighted,
    "options": options,
}


# ---- Pages


def read_page(app: Sphinx, docname: str, source: list[str]) -> None:
    """Puts in what a page says is elsewhere."""
    if page := PAGE.search(source[0]):
        source[0] = with_links_of_the_site(ROOT / page[1])
    source[0] = TABLE.sub(lambda found: TABLES[found[1]](), source[0])


def with_links_of_the_site(path: Path) -> str:
    """The text of a file, its links to what has a page led there, and links to what has none turned into words."""
    pages = {page.resolve(): page.relative_to(DOCS) for page in DOCS.rglob("*.md")}
    shown = {page: PAGE.search((DOCS / page).read_text()) for page in pages.values()}
    pages |= {(ROOT / found[1]).resolve(): page for page, found in shown.items() if found}

    def link(found: re.Match[str]) -> str:
        text, target, anchor = found[1], found[2], found[3] or ""
        if not target:
            return found[0]
        target = (path.parent / target).resolve()
        return f"[{text}]({pages[target].as_posix()}{anchor})" if target in pages else text

    parts = re.split(r"(^```.*?^```$)", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    return "".join(part if part.startswith("```") else LINK.sub(link, part) for part in parts)


# ---- References


class LinkNames(SphinxTransform):
    """Makes a reference of every public name in backticks; one without an entry is an unresolved reference."""

    default_priority = 500

    def apply(self, **_: Any) -> None:
        for literal in list(self.document.findall(nodes.literal)):
            target = SHORT.get(literal.astext())
            inside = (nodes.title, nodes.reference, addnodes.pending_xref, addnodes.desc_signature)
            ancestor: Any = literal.parent
            while ancestor is not None and not isinstance(ancestor, inside):
                ancestor = ancestor.parent
            if target is None or ancestor is not None:
                continue
            reference = addnodes.pending_xref(
                "", refdomain="py", reftype="obj", reftarget=target, refdoc=self.env.docname, refexplicit=True
            )
            reference.source, reference.line = literal.source, literal.line
            literal.replace_self(reference)
            reference += literal


def resolve_home(app: Sphinx, env: Any, node: Any, content: Any) -> Any:
    """Types are named by the module that defines them, and documented where users import them from."""
    package, _, name = node.get("reftarget", "").rpartition(".")
    domain = env.get_domain("py")
    found = [entry for entry in domain.objects if entry.endswith(f".{name}")]
    if not package.startswith("bbqrec") or len(found) != 1:
        return None
    return domain.resolve_xref(env, node["refdoc"], app.builder, "obj", found[0], node, content)


class Whole:
    """Docstrings of attributes as they are: napoleon would take what is before a colon for their type."""

    def __init__(self, app: Sphinx) -> None:
        self.lines: dict[str, list[str]] = {}
        app.connect("autodoc-process-docstring", self.keep, priority=400)
        app.connect("autodoc-process-docstring", self.put_back, priority=600)  # napoleon is at 500

    def keep(self, _app: Sphinx, what: str, name: str, _object: Any, _options: Any, lines: list[str]) -> None:
        if what in ("attribute", "property"):
            self.lines[name] = list(lines)

    def put_back(self, _app: Sphinx, what: str, name: str, _object: Any, _options: Any, lines: list[str]) -> None:
        lines[:] = self.lines.pop(name, lines)


def name_factories(
    _app: Sphinx, _what: str, _name: str, _object: Any, _options: Any, signature: str, returns: str
) -> Any:
    """What a dataclass makes anew for every instance has no value to show: `<factory>` is no Python."""
    return (signature and signature.replace("<factory>", "..."), returns)


def check_everything_is_documented(app: Sphinx, env: Any) -> None:
    missing = PUBLIC.keys() - env.get_domain("py").objects.keys()
    for name in sorted(missing):
        logging.getLogger(__name__).warning(f"{name} is public and has no entry in the reference")


def check_nothing_is_fetched(app: Sphinx, exception: Exception | None) -> None:
    """A page must be whole without a network."""
    if exception is not None:
        return
    for path in Path(app.outdir).rglob("*"):
        if path.suffix in (".html", ".css", ".svg") and (found := FETCHED.search(path.read_text(encoding="utf-8"))):
            raise ExtensionError(f"{path.relative_to(app.outdir)} fetches from the network: {found[0]}")


def setup(app: Sphinx) -> None:
    app.connect("source-read", read_page)
    app.connect("missing-reference", resolve_home)
    app.connect("autodoc-process-signature", name_factories)
    app.connect("env-updated", check_everything_is_documented)
    app.connect("build-finished", check_nothing_is_fetched)
    app.add_transform(LinkNames)
    Whole(app)
