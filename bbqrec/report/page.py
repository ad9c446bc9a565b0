"""`report.html`: the facts of a run as one page that needs nothing else, neither files nor a network."""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from bbqrec.data.files import write_text
from bbqrec.evaluation.ranking import METRICS
from bbqrec.report.charts import line_chart, point_colours, scatter

STRONG = math.log(2)  # log-weight that gets the full colour
MODELS = {"bbqrec": "BBQRec", "sasrec": "SASRec", "tiger": "TIGER"}


def save(path: str | Path, facts: dict[str, Any]) -> None:
    """Writes the page of `facts` (see `collect`) to `path`, whole or not at all."""
    write_text(Path(path), render(facts))


def render(facts: dict[str, Any]) -> str:
    """The page: HTML that depends on `facts` alone, with a section for each that is there."""
    sections = [(name, title, write(facts)) for name, title, write in SECTIONS if name in facts]
    run = facts["run"]
    title = f"{MODELS[run['model']]} on {run['data']}"
    links = "".join(f'<li><a href="#{name}">{escape(heading)}</a></li>' for name, heading, _ in sections)
    body = "".join(
        f'<section id="{name}" aria-labelledby="{name}-title"><h2 id="{name}-title">{escape(heading)}</h2>'
        f"{content}</section>"
        for name, heading, content in sections
    )
    colours = point_colours(len(_colours(facts["map"]["points"])))
    # Only this script may run: nothing that a title smuggles in could, and nothing is fetched from anywhere.
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="color-scheme" content="light dark">\n<title>{escape(title)}</title>\n'
        f"<style>{STYLE}{colours}</style>\n</head>\n<body>\n"
        f'<header><h1>{_text(title)}</h1>{_summary(facts)}<nav aria-label="Sections"><ul>{links}</ul></nav></header>\n'
        f"<main>\n{body}\n</main>\n<footer>{_versions(run)}</footer>\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def _summary(facts: dict[str, Any]) -> str:
    run, metrics = facts["run"], facts["metrics"]
    ours, popular = metrics["test"]["ndcg@10"], metrics["most_popular"]["test"]["ndcg@10"]
    tiles = [
        ("test NDCG@10", f"{ours:.4f}"),
        ("NDCG@10 of most popular", f"{popular:.4f}"),
        *((name, f"{run[name]:,}") for name in ("users", "items", "interactions") if run[name] is not None),
    ]
    if run["seconds"] is not None:
        tiles.append(("training", f"{run['seconds']:,.0f} s"))
    shown = '<dl class="tiles">' + "".join(f"<div><dt>{n}</dt><dd>{v}</dd></div>" for n, v in tiles) + "</dl>"
    return shown + (_paragraph(facts["left_out"]) if "left_out" in facts else "")


def _versions(run: dict[str, Any]) -> str:
    said = [f"{name} {version}" for name, version in run["versions"].items()]
    said += [run["device"]] if run["device"] else []
    said += [f"{run['peak_memory_mb']:,} MB of memory at most"] if run["peak_memory_mb"] else []
    return _paragraph(", ".join([*said, f"seed {run['seed']}"]) + ".")


def _metrics(facts: dict[str, Any]) -> str:
    metrics, model = facts["metrics"], MODELS[facts["run"]["model"]]
    rows = []
    for split in ("test", "validation"):
        both = ((model, metrics[split]), ("most popular items", metrics["most_popular"][split]))
        for prefix, suffix in (("", ""), ("cold/", ", cold targets")):
            for name, values in both:
                if values.get(f"{prefix}users"):
                    numbers = [f"{values[prefix + key]:.4f}" for key in METRICS]
                    rows.append([f"{split}: {name}{suffix}", f"{values[prefix + 'users']:,}", *numbers])
    has_cold = any("cold targets" in row[0] for row in rows)
    cold = " Cold targets are held-out items that training never saw." if has_cold else ""
    similarity = ""
    if added := facts["run"]["similarity"]:
        similarity = (
            f" Scores add how like the history's items an item's features are, {added['weight']:g} times, each item "
            f"further back {added['decay']:g} times as much; validation chose both, after the curves below."
        )
    return _paragraph(
        f"The last item of each user is the test, the last but one the validation; ranked are {metrics['candidates']}."
        + cold
        + similarity
    ) + _table("Metrics", ["", "users", *METRICS], rows, style="named")


def _curves(facts: dict[str, Any]) -> str:
    charts = []
    for stage, columns in facts["curves"].items():
        for prefix, what in (("train/", "training loss"), ("validation/", "validation")):
            lines = {name.removeprefix(prefix): line for name, line in columns.items() if name.startswith(prefix)}
            lines = {name: line for name, line in lines.items() if any(y is not None for y in line)}
            if lines:
                positive = all(y > 0 for line in lines.values() for y in line if y is not None)
                title = f"{stage.replace('_', ' ').capitalize()}: {what}"
                is_log = positive and what == "training loss"
                charts.append(line_chart(title, "epoch", columns["epoch"], lines, log=is_log))
    return _grid(charts)


def _codebooks(facts: dict[str, Any]) -> str:
    books = facts["codebooks"]
    levels = range(books["levels"])
    rows = [
        [f"level {n}", _percent(books["usage"][n]), f"{books['perplexity'][n]:.1f}"]
        + [_percent(rest[n]) for rest in books["residual"].values()]
        for n in levels
    ]
    header = ["", "codewords in use", "perplexity", *(f"{name} left" for name in books["residual"])]
    charts = [
        line_chart(
            f"Level {n}: items of each codeword",
            "codeword, by rank",
            range(1, books["size"] + 1),
            {name: counts[n] for name, counts in books["counts"].items()},
        )
        for n in levels
    ]
    kind = "shared by all modalities" if books["shared"] else "one set for each modality; figures are their means"
    rest = [
        f"{name}: {'nothing to explain' if share is None else _percent(share)}"
        for name, share in books["reconstruction"].items()
    ]
    said = [f"Share of the features that codes and specific part explain: {', '.join(rest)}."]
    if books["agreement"] is not None:
        share = _percent(books["agreement"])
        said.append(f"Items whose modalities agree on the first code: {share} of those that have every modality.")
    what = (
        f"{books['levels']} levels of {books['size']} codewords, {kind}. Perplexity: so many codewords, used alike, "
        "would be as hard to guess. Left: the share of a vector's squared length that codes up to this level leave."
    )
    return _paragraph(what) + _table("Codebooks", header, rows) + _paragraph(" ".join(said)) + _grid(charts, "of-small")


def _collisions(facts: dict[str, Any]) -> str:
    found = facts["collisions"]
    rows = [[f"{size:,}", f"{groups:,}", f"{size * groups:,}"] for size, groups in found["sizes"]]
    said = (
        f"{found['items']:,} items have {found['distinct']:,} different semantic IDs; {_percent(found['rate'])} of the "
        "items share theirs with another one. They still differ in their own number."
    )
    largest = ""
    if found["largest"]:
        named = "; ".join(_text(_cut(title)) for title in found["largest"])
        more = found["sizes"][-1][0] - len(found["largest"])
        largest = f"<p>Most items share one ID here: {named}{f'; and {more:,} more' if more else ''}</p>"
    return _paragraph(said) + _table("Collisions", ["items that share an ID", "such IDs", "items"], rows) + largest


def _map(facts: dict[str, Any]) -> str:
    chart = facts["map"]
    points, colours = chart["points"], _colours(chart["points"])
    shown = f"All {chart['items']:,} items"
    if len(points) < chart["items"]:
        shown = f"{len(points):,} of {chart['items']:,} items, evenly spaced in the catalogue"
    by_code = "Colour is the first code: pointing at an item names it, and brings out those of the same first code. "
    drawn = [
        {
            "x": point["x"],
            "y": point["y"],
            "colour": colours[point.get("code")],
            "name": _cut(point["title"]) + (f" ({point['semantic_id']})" if "semantic_id" in point else ""),
        }
        for point in points
    ]
    return _paragraph(
        f"{shown}, by t-SNE of {chart['of_what']}: near ones are alike, far ones say nothing by their distance. "
        + (by_code if "groups" in facts else "Pointing at an item names it.")
    ) + scatter(f"Map of {len(points):,} items in two dimensions", drawn)


def _groups(facts: dict[str, Any]) -> str:
    colours = _colours(facts["map"]["points"])
    rows = []
    for group in facts["groups"]:
        colour = colours.get(group["code"])
        swatch = (
            "" if colour is None else f'<svg class="swatch" viewBox="0 0 10 10" aria-hidden="true">{_dot(colour)}</svg>'
        )
        titles = "; ".join(_text(_cut(title, 48)) for title in group["titles"])
        rows.append([_Html(swatch + escape(group["code"])), f"{group['items']:,}", _Html(titles)])
    return _paragraph("The first codes that most items have, and the first of these items in the catalogue.") + _table(
        "First codes", ["first code", "items", "for instance"], rows, texts=(2,)
    )


def _reweighting(facts: dict[str, Any]) -> str:
    said = (
        "What attention learned to make of what two items have in common. An entry multiplies the weight of a pair of "
        "items, before the weights of all items are made to sum to one: ×1 changes nothing (orange is above, blue "
        "below), and only the ratios within a column count. In “text × image” the text of the item that attends is "
        "compared with the image of the one attended to; an item that lacks a modality agrees in no level."
    )
    return _paragraph(said) + _grid([_heat_map(table) for table in facts["reweighting"]], "of-tables")


def _heat_map(table: dict[str, Any]) -> str:
    columns = [
        (f"layer {n + 1}, head {h + 1}", weights)
        for n, heads in enumerate(table["log_weights"])
        for h, weights in enumerate(heads)
    ]
    rows = [[bucket, *(_weight(weights[n]) for _, weights in columns)] for n, bucket in enumerate(table["buckets"])]
    note = ""
    if table["kind"] != "semantic IDs":
        kept = [row for n, row in enumerate(rows) if any(weights[n] != 0 for _, weights in columns)]
        if table["kind"] == "time" and len(kept) < len(rows):
            rows, note = kept, " Distances that training never met are left out."
        unit = "Distance in places." if table["kind"] == "position" else "Time in the unit of the data set."
        note = _paragraph(unit + note)
    caption = f"{table['kind']}: {table['channel']}"
    return (
        _table(
            caption,
            ["agreement" if table["kind"] == "semantic IDs" else "distance", *(name for name, _ in columns)],
            rows,
            shown=True,
            style="heat",
        )
        + note
    )


def _weight(log_weight: float) -> _Cell:
    strength = min(abs(log_weight) / STRONG, 1) * 0.55
    colour = "214,100,20" if log_weight > 0 else "30,110,210"
    return _Cell(f"×{math.exp(log_weight):.2f}", f"background:rgba({colour},{strength:.2f})")


def _examples(facts: dict[str, Any]) -> str:
    examples = facts["examples"]
    said = ["Users evenly spaced over the test, chosen without a look at the outcome."]
    columns = [name for name in ("attention", "reweighting") if name in examples[0]["history"][0]]
    if "attention" in columns:
        said.append(
            "Attention is the weight that the latest item gives to each item of the history in the last layer, the "
            "mean over heads; of all items that the model reads, weights sum to one."
        )
    if "reweighting" in columns:
        said.append(
            "Reweighted is the quotient of this weight and what it would be without the tables above, for the same "
            "queries and keys: above ×1 the tables weighted an item up."
        )
    return _paragraph(" ".join(said)) + "".join(_example(example, columns) for example in examples)


def _example(example: dict[str, Any], columns: Sequence[str]) -> str:
    history = []
    for row in reversed(example["history"]):
        cells: list[Any] = [_Html(_text(_cut(row["title"])))]
        if "attention" in columns:
            cells.append(_Cell(_percent(row["attention"]), _bar(row["attention"])))
        if "reweighting" in columns:
            cells.append(_weight(math.log(max(row["reweighting"], 1e-30))))
        history.append(cells)
    shown, all_items, read = len(history), example["interactions"], example["read"]
    extent = f"latest first, {shown} of {all_items}" if shown < all_items else "latest first"
    if read < all_items:
        extent += f"; the model reads the latest {read}"
    names = {"attention": "attention", "reweighting": "reweighted"}
    recommended = []
    for row in example["recommended"]:
        mark = ' <strong class="hit">held out</strong>' if row["is_target"] else ""
        recommended.append([_Html(_text(_cut(row["title"])) + mark), f"{row['score']:.3f}"])
    target = example["target"]
    place = "not among the items that the search found" if target["rank"] is None else f"rank {target['rank']:,}"
    heading = f"<h3>User {_text(example['user'])}</h3>"
    outcome = f"<p>Took next (held out): {_text(_cut(target['title']))}, {place}.</p>"
    tables = [
        _table(f"History, {extent}", ["item", *(names[c] for c in columns)], history, shown=True, texts=(0,)),
        _table("Recommended", ["item", "score"], recommended, shown=True, texts=(0,), numbered=True),
    ]
    return f"<article>{heading}{outcome}{_grid(tables, 'of-tables')}</article>"


def _bar(share: float) -> str:
    width = f"{100 * min(max(share, 0), 1):.1f}%"
    return f"background:linear-gradient(to right,rgba(120,130,150,.35) {width},transparent {width})"


class _Html(str):
    """Text that is HTML already."""


class _Cell:
    """A number with a style of its own."""

    def __init__(self, text: str, style: str):
        self.text, self.style = text, style


def _table(
    caption: str,
    header: Sequence[str],
    rows: Iterable[Sequence[str | _Html | _Cell]],
    *,
    shown: bool = False,
    texts: Sequence[int] = (),
    numbered: bool = False,
    style: str = "",
) -> str:
    """A table whose first column heads its rows; the others are numbers, but for those in `texts`.

    `shown`: whether eyes see the caption too. `numbered`: whether rows get numbers, from 1.
    """
    header = ["rank", *header] if numbered else list(header)
    texts = [n + 1 for n in texts] if numbered else list(texts)

    def cell(n: int, value: str | _Html | _Cell) -> str:
        tag, scope = ("th", ' scope="row"') if n == 0 else ("td", "")
        if isinstance(value, _Cell):
            return f'<{tag}{scope}{kind(n)} style="{value.style}">{escape(value.text)}</{tag}>'
        return f"<{tag}{scope}{kind(n)}>{value if isinstance(value, _Html) else escape(value)}</{tag}>"

    def kind(n: int) -> str:
        return ' class="text"' if n in texts else ""

    body = []
    for place, row in enumerate(rows, start=1):
        values = [str(place), *row] if numbered else row
        body.append("<tr>" + "".join(cell(n, value) for n, value in enumerate(values)) + "</tr>")
    head = "".join(
        f'<th scope="col"{kind(n)}>{escape(name)}</th>' if name else "<td></td>" for n, name in enumerate(header)
    )
    hidden = "" if shown else ' class="unseen"'
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{escape(caption)}"><table class="{style}">'
        f"<caption{hidden}>{escape(caption)}</caption><thead><tr>{head}</tr></thead>"
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _grid(parts: Sequence[str], style: str = "") -> str:
    return f'<div class="grid {style}">{"".join(f"<div>{part}</div>" for part in parts)}</div>'


def _paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>"


def _text(text: str) -> str:
    """A name from the data: whatever direction it is written in, what stands around it stays in place."""
    return f"<bdi>{escape(text)}</bdi>"


def _cut(text: str, length: int = 120) -> str:
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


def _percent(share: float) -> str:
    return f"{share:.1%}"


def _dot(colour: int) -> str:
    return f'<circle class="c{colour}" cx="5" cy="5" r="5"/>'


def _colours(points: Sequence[dict[str, Any]]) -> dict[str | None, int]:
    """A colour for each first code on the map, the most used first; one for all where there are no codes."""
    counts: dict[str | None, int] = {}
    for point in points:
        counts[point.get("code")] = counts.get(point.get("code"), 0) + 1
    return {code: n for n, code in enumerate(sorted(counts, key=lambda code: -counts[code]))}


SECTIONS: list[tuple[str, str, Callable[[dict[str, Any]], str]]] = [
    ("metrics", "Metrics", _metrics),
    ("curves", "Training", _curves),
    ("map", "Map of the items", _map),
    ("groups", "What first codes stand for", _groups),
    ("codebooks", "Codebooks", _codebooks),
    ("collisions", "Collisions", _collisions),
    ("reweighting", "Reweighting of attention", _reweighting),
    ("examples", "Examples", _examples),
]

STYLE = """
:root{--ink:#1c2127;--soft:#59626d;--page:#fff;--card:#f5f6f8;--line:#d5d9df;--link:#0b57c2;--good:#17692f;
--s0:#0b62b8;--s1:#b8500a;--s2:#12744f;--s3:#a3216b;--s4:#6846b5;--s5:#7a6100;--s6:#1b7486;--s7:#5b6470;--l0:48%;--l1:36%;--l2:58%}
@media (prefers-color-scheme:dark){:root{--ink:#e8eaed;--soft:#a7b0bb;--page:#14171b;--card:#1d2127;--line:#363d46;
--link:#8ab8ff;--good:#7fd598;--s0:#6cb2ff;--s1:#ff9d57;--s2:#5fd0a2;--s3:#ff86c3;--s4:#b9a1ff;--s5:#e0c04c;
--s6:#67cfe3;--s7:#aab3bf;--l0:58%;--l1:68%;--l2:48%}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0 auto;max-width:1200px;padding:16px;background:var(--page);color:var(--ink);overflow-wrap:anywhere;
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
h1{font-size:1.7rem;line-height:1.2;margin:.3em 0 .6em}
h2{font-size:1.25rem;margin:2.2em 0 .4em;padding-top:.8em;border-top:1px solid var(--line)}
h3{font-size:1.05rem;margin:1.6em 0 .2em}
p{margin:.4em 0 .9em;max-width:75ch}
a{color:var(--link)}
nav ul{display:flex;flex-wrap:wrap;gap:.2em 1.1em;list-style:none;margin:1em 0 0;padding:0}
nav a{display:inline-block;padding:.3em 0}
footer{color:var(--soft);border-top:1px solid var(--line);margin-top:2.5em;padding-top:.6em;font-size:.9rem}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(130px,1fr));gap:10px;margin:0}
.tiles div{background:var(--card);border-radius:8px;padding:10px 12px}
.tiles dt{color:var(--soft);font-size:.85rem}
.tiles dd{margin:0;font-size:1.3rem;font-weight:600;font-variant-numeric:tabular-nums}
.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,330px),1fr));gap:18px;align-items:start}
.grid>div{min-width:0}
.of-small{grid-template-columns:repeat(auto-fit,minmax(min(100%,250px),1fr))}
.of-tables{grid-template-columns:repeat(auto-fit,minmax(min(100%,440px),1fr))}
figure{margin:0;background:var(--card);border-radius:8px;padding:10px}
figcaption,caption{font-weight:600;text-align:left;padding:0 0 .4em}
svg{display:block;width:100%;height:auto}
svg text{fill:var(--soft);font-size:13px}
svg .grid{stroke:var(--line)}
.line{fill:none;stroke-width:1.8;stroke:currentColor}
.dot{fill:currentColor}
.s0{color:var(--s0)}.s1{color:var(--s1)}.s2{color:var(--s2)}.s3{color:var(--s3)}
.s4{color:var(--s4)}.s5{color:var(--s5)}.s6{color:var(--s6)}.s7{color:var(--s7)}
.legend{display:flex;flex-wrap:wrap;gap:.1em 1em;list-style:none;margin:.4em 0 0;padding:0;font-size:.85rem}
.key{display:inline-block;width:1.2em;height:3px;margin-right:.4em;vertical-align:middle;background:currentColor}
.wide{overflow-x:auto;margin:.4em 0 1em}
.wide:focus-visible{outline:2px solid var(--link);outline-offset:2px}
table{border-collapse:separate;border-spacing:0;overflow-wrap:normal;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{padding:.32em .6em;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
thead th{color:var(--soft);font-weight:600;vertical-align:bottom;white-space:normal}
thead th:first-child{text-align:left}
tbody th{font-weight:400;text-align:left;white-space:normal;position:sticky;left:0;background:var(--page)}
th.text,td.text{text-align:left;white-space:normal;overflow-wrap:anywhere;min-width:11em}
.named tbody th{min-width:9em}
.heat tbody th{white-space:nowrap}
.heat td{text-align:center;min-width:4.2em}
.heat thead th+th{text-align:center}
.hit{color:var(--good);white-space:nowrap}
.unseen{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%)}
.swatch{display:inline-block;width:.8em;height:.8em;margin-right:.5em}
.map{position:relative;background:var(--card);border-radius:8px;max-width:820px}
.map circle{fill-opacity:.85}
.map .dim circle{fill-opacity:.13}
.map .dim circle.same{fill-opacity:1}
.tip{position:absolute;pointer-events:none;max-width:min(20rem,80%);padding:.3em .6em;border-radius:6px;
background:var(--ink);color:var(--page);font-size:.85rem}
.tip[hidden]{display:none}
@media print{.wide{overflow:visible}section{break-inside:avoid-page}}
"""

SCRIPT = """
for (const map of document.querySelectorAll(".map")) {
  const svg = map.firstElementChild, tip = document.createElement("div"), names = new Map();
  tip.className = "tip";
  tip.hidden = true;
  map.append(tip);
  for (const circle of svg.querySelectorAll("circle")) {
    names.set(circle, circle.textContent);
    circle.textContent = "";  // the browser's own tip would be a second one
  }
  const leave = () => {
    tip.hidden = true;
    svg.classList.remove("dim");
    svg.querySelectorAll(".same").forEach(circle => circle.classList.remove("same"));
  };
  const point = event => {
    leave();
    const name = names.get(event.target);
    if (name === undefined) return;
    const many = svg.querySelectorAll("." + event.target.classList[0]);
    if (many.length < names.size) {
      svg.classList.add("dim");
      many.forEach(circle => circle.classList.add("same"));
    }
    tip.textContent = name;
    tip.hidden = false;
    const box = map.getBoundingClientRect(), at = event.target.getBoundingClientRect();
    const left = at.left - box.left + 12, top = at.bottom - box.top + 6;
    tip.style.left = Math.max(0, Math.min(left, box.width - tip.offsetWidth)) + "px";
    tip.style.top = (top + tip.offsetHeight > box.height ? top - tip.offsetHeight - 24 : top) + "px";
  };
  svg.addEventListener("pointerover", point);
  svg.addEventListener("pointerdown", point);
  svg.addEventListener("pointerleave", leave);
}
"""
