"""The page in a browser: headless Chromium, at the widths of a desk and of a phone, light and dark."""

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess

import numpy as np
import pytest
from matplotlib.image import imread

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = [
    pytest.mark.check,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH (Debian: apt-get install chromium)"),
]
SCHEMES = {"dark": 0, "light": 1}  # as Blink counts them
WIDTHS = {"desk": 1280, "phone": 390, "narrow phone": 320}
RUNS = ["bbqrec_run", "sasrec_run", "tiger_run", "hostile_run"]

# Put into a copy of the page, which is shown in a frame: a window of Chromium cannot be as narrow as a phone.
MEASURE = """
const spilled = [...document.querySelectorAll("body *")].filter(element => {
  if (element.closest(".wide, svg, .unseen, script")) return false;  // tables scroll in frames of their own
  const box = element.getBoundingClientRect();
  return box.width > 0 && (box.right > innerWidth + 0.5 || box.left < -0.5);
});
const svg = document.querySelector(".map svg"), circle = svg.querySelectorAll("circle")[7];
const tip = document.querySelector(".tip");
const before = tip.hidden;
circle.dispatchEvent(new PointerEvent("pointerover", {bubbles: true}));
const box = tip.getBoundingClientRect(), frame = svg.parentElement.getBoundingClientRect();
const shown = {text: tip.textContent, hidden: tip.hidden, dimmed: svg.classList.contains("dim"),
  inside: box.left >= frame.left - 0.5 && box.right <= frame.right + 0.5,
  same: svg.querySelectorAll(".same").length, colour: svg.querySelectorAll("." + circle.classList[0]).length};
svg.dispatchEvent(new PointerEvent("pointerleave"));
parent.postMessage({
  inner: innerWidth, scroll: document.documentElement.scrollWidth, spilled: spilled.map(e => e.outerHTML.slice(0, 99)),
  dark: matchMedia("(prefers-color-scheme: dark)").matches, title: document.title, before, shown,
  after: tip.hidden, dimmed: svg.classList.contains("dim"), circles: svg.querySelectorAll("circle").length,
  injected: document.querySelectorAll("img, script:not(#measure)").length,
}, "*");
"""
FRAME = """<!DOCTYPE html><body style="margin:0"><iframe style="border:0;width:{width}px;height:900px" src="{page}">
</iframe><script>addEventListener("message", event => document.body.dataset.found = JSON.stringify(event.data))</script>
"""


def chromium(folder, scheme, *arguments):
    command = [
        CHROMIUM,
        "--headless",
        "--disable-gpu",
        "--hide-scrollbars",
        "--virtual-time-budget=5000",
        f"--user-data-dir={folder / 'profile'}",
        f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}",
        *(["--no-sandbox"] if os.geteuid() == 0 else []),
        *arguments,
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout


def measured(page, folder, scheme, width):
    text = page.read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(MEASURE.encode()).digest()).decode()
    assert text.count("script-src ") == 1
    text = text.replace("script-src ", f"script-src 'sha256-{digest}' ")  # beside the page's own, which has to be right
    copy, frame = folder / "copy.html", folder / "frame.html"
    copy.write_text(text.replace("</body>", f'<script id="measure">{MEASURE}</script></body>'), encoding="utf-8")
    frame.write_text(FRAME.format(width=width, page=copy.name))
    document = chromium(folder, scheme, "--window-size=1400,900", "--dump-dom", frame.as_uri())
    [found] = re.findall(r'data-found="([^"]*)"', document)
    return json.loads(found.replace("&quot;", '"').replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">"))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", RUNS)
def test_layout_and_hover(name, width, scheme, request, tmp_path):
    run = request.getfixturevalue(name)
    found = measured(run.folder / "report.html", tmp_path, scheme, WIDTHS[width])
    assert found["inner"] == WIDTHS[width]
    assert found["dark"] == (scheme == "dark")
    assert found["scroll"] <= found["inner"], found["spilled"]
    assert found["spilled"] == []
    assert found["title"] != "stolen"
    assert found["injected"] == 1  # the page's own script
    assert found["circles"] == 60
    shown = found["shown"]
    assert (found["before"], shown["hidden"], found["after"]) == (True, False, True)
    assert shown["text"].startswith(run.items["title"][7][:119])
    assert shown["inside"]
    assert shown["same"] == (0 if name == "sasrec_run" else shown["colour"])
    assert shown["dimmed"] == (name != "sasrec_run")
    assert not found["dimmed"]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", ["desk", "phone"])
def test_it_can_be_seen(width, scheme, bbqrec_run, tmp_path):
    picture = tmp_path / "page.png"
    size = f"--window-size={WIDTHS[width]},2400"
    chromium(tmp_path, scheme, size, f"--screenshot={picture}", (bbqrec_run.folder / "report.html").as_uri())
    pixels = (imread(picture)[:, :, :3] * 255).round().astype(int)
    assert pixels.shape[1] == WIDTHS[width]
    ground = pixels[0, 0]
    assert ground.tolist() == ([0x14, 0x17, 0x1B] if scheme == "dark" else [255, 255, 255])
    drawn = np.abs(pixels - ground).max(2) > 60
    assert 0.01 < drawn.mean() < 0.5
    assert drawn.any(1).reshape(24, 100).any(1).sum() > 18  # from top to bottom, not in one place
    vivid = pixels[pixels.max(2) - pixels.min(2) > 90]
    hues = {tuple(colour // 32) for colour in vivid}
    assert len(hues) >= 6  # of lines and first codes
