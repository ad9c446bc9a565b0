"""The page as a document: well-formed, on its own, escaped, legible, and the same every time."""

import base64
import copy
import hashlib
import json
import re
from html.parser import HTMLParser
from itertools import pairwise

import pytest

from bbqrec.report import collect, page, render, save

VOID = {"meta"}
CLOSES_ITSELF = {"line", "circle", "polyline"}  # of SVG
RUNS = ["bbqrec_run", "sasrec_run", "tiger_run", "hostile_run"]


class Document(HTMLParser):
    """Elements as (tag, attributes), texts as (tag, text); faults in nesting are assertions."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.elements, self.texts, self.open = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        names = [name for name, _ in attributes]
        assert len(set(names)) == len(names), (tag, names)
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        assert tag in CLOSES_ITSELF, tag
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        self.texts.append((self.open[-1] if self.open else "", text))

    def handle_comment(self, text):
        pytest.fail(f"a comment: {text}")

    def said(self, *tags):
        return [text for tag, text in self.texts if tag in tags]

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def text_of(run):
    return (run.folder / "report.html").read_text(encoding="utf-8")


@pytest.fixture(params=RUNS)
def document(request):
    return Document(text_of(request.getfixturevalue(request.param)))


def test_ids_are_unique_and_links_lead_to_them(document):
    ids = [attributes["id"] for _, attributes in document.elements if "id" in attributes]
    assert len(set(ids)) == len(ids)
    assert {link["href"] for link in document.all("a")} <= {f"#{name}" for name in ids}
    labels = [attributes["aria-labelledby"] for _, attributes in document.elements if "aria-labelledby" in attributes]
    assert labels
    assert set(labels) <= set(ids)


def test_the_page_needs_nothing_else(document):
    for tag, attributes in document.elements:
        assert tag not in {"link", "img", "image", "iframe", "object", "embed", "base", "form", "use"}, tag
        assert not attributes.keys() & {"src", "srcset", "xlink:href", "action", "data", "background"}, attributes
        assert not [name for name in attributes if name.startswith("on")], attributes
        assert "url(" not in attributes.get("style", "")
    for text in document.said("style", "script"):
        assert not re.search(r"url\(|@import|https?:|//\w|import\(|fetch|XMLHttp|eval|innerHTML", text)


def test_only_the_page_s_own_script_may_run(document):
    [policy] = [meta["content"] for meta in document.all("meta") if "http-equiv" in meta]
    [script] = document.said("script")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


def test_tables_have_headers_and_drawings_are_described(document):
    tables = document.all("table")
    assert len(document.all("caption")) == len(tables) > 0
    assert {th.get("scope") for th in document.all("th")} == {"col", "row"}
    for svg in document.all("svg"):
        assert svg.get("aria-hidden") == "true" or (svg["role"] == "img" and svg["aria-label"])
    assert document.all("html") == [{"lang": "en"}]
    headings = [int(tag[1]) for tag, _ in document.elements if re.fullmatch(r"h\d", tag)]
    assert headings[0] == 1
    assert headings.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(headings))


@pytest.mark.parametrize(
    ("name", "absent"),
    [
        ("bbqrec_run", set()),
        ("sasrec_run", {"groups", "codebooks", "collisions", "reweighting"}),
        ("tiger_run", {"reweighting"}),
    ],
)
def test_sections(name, absent, request):
    document = Document(text_of(request.getfixturevalue(name)))
    there = [section["id"] for section in document.all("section")]
    assert there == [name for name, _, _ in page.SECTIONS if name not in absent]
    assert [link["href"] for link in document.all("a")] == [f"#{name}" for name in there]
    columns = document.said("th")
    assert ("reweighted" in columns) == (name == "bbqrec_run")
    assert ("attention" in columns) == (name != "tiger_run")


def test_numbers_on_the_page(bbqrec_run):
    found = collect(bbqrec_run, bbqrec_run.metrics)
    cells = Document(text_of(bbqrec_run)).said("td", "dd", "th")
    for metrics in (found["metrics"]["test"], found["metrics"]["most_popular"]["validation"]):
        assert f"{metrics['ndcg@10']:.4f}" in cells
    for name in ("0 levels agree", "1 level agrees", "all 3 agree"):
        assert cells.count(name) == 4
    for value in found["codebooks"]["perplexity"]:
        assert f"{value:.1f}" in cells


def test_the_similarity_in_the_scores_is_told_where_there_is_some(bbqrec_run, sasrec_run):
    told = f"{bbqrec_run.model.similarity_weight.item():g} times, each item further back"
    assert told in " ".join(text_of(bbqrec_run).split())
    assert "further back" not in text_of(sasrec_run)


def test_weights_are_shown_as_factors():
    assert page._weight(0.0).text == "×1.00"
    assert page._weight(0.6931471805599453).text == "×2.00"
    assert page._weight(-0.6931471805599453).text == "×0.50"
    up, down, far = page._weight(0.3).style, page._weight(-0.3).style, page._weight(-9.0).style
    assert up != down
    assert float(re.search(r",([\d.]+)\)", far)[1]) == 0.55


def test_cold_targets_have_rows_where_there_are_any(bbqrec_run):
    found = copy.deepcopy(collect(bbqrec_run, bbqrec_run.metrics))
    test = found["metrics"]["test"]
    for metrics, value in ((test, 0.1234), (found["metrics"]["most_popular"]["test"], 0.0321)):
        metrics.update({f"cold/{name}": value for name in page.METRICS})
        metrics["cold/users"] = 7
    found["metrics"]["validation"]["cold/users"] = found["metrics"]["most_popular"]["validation"]["cold/users"] = 0
    cells = Document(render(found)).said("td", "th")
    assert cells.count("0.1234") == cells.count("0.0321") == len(page.METRICS)
    assert [cell for cell in cells if cell.endswith("cold targets")] == [
        "test: BBQRec, cold targets",
        "test: most popular items, cold targets",
    ]


def test_what_data_is_called_is_text_and_nothing_else(hostile_run, hostile_titles, bbqrec_run):
    document, harmless = Document(text_of(hostile_run)), Document(text_of(bbqrec_run))
    assert {tag for tag, _ in document.elements} == {tag for tag, _ in harmless.elements}
    assert len(document.all("script")) == 1
    allowed = {"class", "id", "style", "tabindex", "role", "href", "scope", "lang", "charset", "content", "name"}
    allowed |= {"http-equiv", "viewbox", "cx", "cy", "r", "x", "y", "x1", "x2", "y1", "y2", "points", "text-anchor"}
    for tag, attributes in document.elements:
        assert all(name in allowed or name.startswith("aria-") for name in attributes), (tag, attributes)
    said = document.said("title", "bdi")
    for title in hostile_titles:
        assert any(text.startswith(title[:60]) for text in said), title
    assert any(text.startswith("BBQRec on <i>shop</i> & \"sons'") for text in said)
    assert any(text.startswith("</h3><script>") for text in said)
    captions = document.said("caption")
    assert any(text.startswith("semantic IDs: </td><u>text</u> × im\"age'") for text in captions)


@pytest.mark.parametrize("name", RUNS)
def test_the_same_facts_are_the_same_bytes(name, request, tmp_path):
    run = request.getfixturevalue(name)
    written = (run.folder / "report.html").read_bytes()
    opened = type(run)(run.folder, run.data)  # the model comes from its file
    found = collect(opened, opened.metrics)
    save(tmp_path / "again.html", found)
    assert (tmp_path / "again.html").read_bytes() == written
    assert render(json.loads(json.dumps(found))).encode() == written


def colours(scheme):
    """Variables of the style sheet."""
    light, dark = re.findall(r":root\{(.*?)\}", page.STYLE, re.DOTALL)
    found = dict(re.findall(r"--([\w]+):(#\w+)", light))
    if scheme == "dark":
        found |= dict(re.findall(r"--([\w]+):(#\w+)", dark))
    return {name: rgb(value) for name, value in found.items()}


def rgb(text):
    digits = text[1:] if len(text) == 7 else "".join(2 * digit for digit in text[1:])
    return [int(digits[n : n + 2], 16) for n in (0, 2, 4)]


def contrast(a, b):
    """WCAG 2.2, contrast ratio."""

    def luminance(colour):
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in colour)]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted([luminance(a), luminance(b)])
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(scheme):
    found = colours(scheme)
    for ground in ("page", "card"):
        for name in ("ink", "soft", "link", "good"):
            assert contrast(found[name], found[ground]) >= 4.5, (name, ground)
        for n in range(8):
            assert contrast(found[f"s{n}"], found[ground]) >= 3, (n, ground)  # lines
    assert contrast(found["page"], found["ink"]) >= 4.5  # the tip
    for log_weight in (-9.0, 9.0):
        *colour, strength = map(float, re.findall(r"[\d.]+", page._weight(log_weight).style))
        ground = [strength * c + (1 - strength) * p for c, p in zip(colour, found["page"], strict=True)]
        assert contrast(found["ink"], ground) >= 4.5
