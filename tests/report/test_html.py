"""The HTML page: its content, and how a browser renders it."""

import copy
import json
import os
import re
import shutil
import socketserver
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from support.folders import CARD, EVALUATIONS, FAILS, PASSES, UNSURE, folder, items, seeds

from lora_domains.analysis.regressions import regressions
from lora_domains.report.card import Report, read_items
from lora_domains.report.html import page
from lora_domains.report.report import combine, save_report
from lora_domains.tasks import KINDS, task_record

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
                None)  # fmt: skip
browser = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium on this machine (Debian: apt-get install chromium)"
)
HOSTILE = "<script>document.title = 'run'</script><img src=x onerror=\"document.title='run'\">"
VOID = {"meta", "link", "br", "img", "hr", "input"}


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """Three adapters with everything a page can show, and hostile text in every text field."""
    there = tmp_path_factory.mktemp("adapters")
    made = []
    for name, counts in (("medical", PASSES), ("legal", FAILS), ("finance", UNSURE)):
        rows = items(counts)
        for n, item in enumerate(rows):
            if item["set"] == "test":
                item["text"] = f"row {n} " + HOSTILE
                item["slices"] = {"ward": HOSTILE if n % 2 else "south"}
                said = item["scores"]["adapter"]
                said["positive"] = abs(1 - said["prediction"] - said["confidence"])
                item["others"] = dict.fromkeys({"medical", "legal", "finance"} - {name},
                                               item["scores"]["base"])  # fmt: skip
        made.append(folder(there, name, rows, evaluations=EVALUATIONS, seeds=seeds(HOSTILE)))
    found = combine(made, show_text=True)
    found.base = replace(found.base, id="base " + HOSTILE)
    found.adapters[0].domain = HOSTILE
    older = {path.name: path for path in made} | {"legal": made[0]}  # since then one got worse
    rows_of = {path.name: read_items(path) for path in made}
    found.since = regressions(found, rows_of.__getitem__, older, "main")
    return found


@pytest.fixture(scope="module")
def shown(report: Report, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page on disk."""
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(page(report), encoding="utf-8")
    return path


class Page(HTMLParser):
    """The elements in order with their attributes; fails on badly nested tags."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in VOID and tag not in ("line", "circle", "rect", "polyline"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag, self.getpos()

    def all(self, *tags: str) -> list[dict[str, str | None]]:
        return [attrs for tag, attrs in self.found if tag in tags]


# ── The text of the page ────────────────────────────────────────────────────────────────────────


def test_nothing_is_loaded_and_nothing_runs(shown: Path) -> None:
    text = shown.read_text()
    found = Page(text)
    assert not found.all("script", "iframe", "object", "embed", "img", "form")
    for _, attrs in found.found:
        assert not [name for name in attrs if name.startswith("on")]
        for name in ("src", "href", "xlink:href", "action", "srcset"):
            assert (attrs.get(name) or "#").startswith(("#", "data:,"))
    style = text.split("<style>")[1].split("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style
    policy = next(a["content"] for a in found.all("meta") if a.get("http-equiv"))
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def test_headings_landmarks_and_tables_are_accessible(shown: Path) -> None:
    found = Page(shown.read_text())
    levels = [int(tag[1]) for tag, _ in found.found if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    assert [len(found.all(tag)) for tag in ("main", "header", "nav")] == [1, 1, 1]
    assert found.all("html")[0]["lang"] == "en"
    ids = [attrs["id"] for _, attrs in found.found if "id" in attrs]
    assert len(ids) == len(set(ids))
    for attrs in found.all("a"):
        assert (attrs["href"] or "")[1:] in ids
    for attrs in found.all("section"):
        assert attrs["aria-labelledby"] in ids
    for attrs in found.all("th"):
        assert attrs["scope"] in ("row", "col")
    regions = [a for a in found.all("div") if "scroll" in (a.get("class") or "")]
    assert regions
    assert all(a["tabindex"] == "0" and a["aria-label"] for a in regions)


def test_a_chart_has_a_text_alternative_or_is_beside_its_figures(shown: Path) -> None:
    text = shown.read_text()
    found = Page(text)
    kinds = {attrs["class"] for attrs in found.all("svg")}
    assert "chart" in kinds
    for attrs in found.all("svg"):
        if attrs["class"] == "chart":
            assert "table" in (attrs["aria-label"] or "")
        else:
            assert attrs["aria-hidden"] == "true"
    for of in (
        "every epoch", "risk and coverage", "precision and recall", "precision by prevalence",
    ):  # fmt: skip
        assert text.count(f"Figures of {of}") == 3
    # Loss, risk, prevalence and precision (on test rows only: no threshold was tuned here).
    assert text.count('class="line line0"') == 5 * 3
    assert text.count('class="line line1"') == 3 * 3
    assert text.count("Precision is 0.939 where 50\N{NO-BREAK SPACE}% of the rows are urgent") == 1
    assert not re.search(r"\d %", text)


def test_the_verdict_comes_first(report: Report) -> None:
    body = re.sub(r"<[^>]*>", " ", page(report).split("<main")[1])
    assert body.index("Do not ship: 1 of 3 fails") < 200
    assert body.index("the base (F1 0.203, +0.203)") < 900
    alone = page(replace(report, adapters=report.adapters[:1], since=None))
    assert "Ship medical</h1>" in alone


def test_optional_parts_are_shown_when_present(report: Report) -> None:
    text = page(report)
    for part in ("Slices", "Seeds", "<dt>evaluations</dt>", "Calibration", "Confusion",
                 "Precision against recall", "Per class", "since main",
                 "Each adapter on every domain"):  # fmt: skip
        assert part in text, part
    bare = copy.deepcopy(report)
    bare.since = None
    for entry in bare.adapters:
        for key in ("slices", "seeds", "evaluations", "calibration", "curve", "confusion",
                    "per_class", "mistakes"):  # fmt: skip
            setattr(entry, key, {})
        entry.training["history"] = []
    bare.matrix["values"] = [
        [v if r == c else None for c, v in enumerate(row)]
        for r, row in enumerate(bare.matrix["values"])
    ]
    text = page(bare)
    for part in ("Slices", "Seeds", "<dt>evaluations</dt>", "Calibration",
                 "Precision against recall", "Confusion", "since main"):  # fmt: skip
        assert part not in text, part
    assert "no matrix to show" in text


@pytest.mark.parametrize("kind", ["language_modelling", "generation", "multiple_choice"])
def test_every_kind_of_task_has_a_page_and_every_other_view(tmp_path: Path, kind: str) -> None:
    rows, judged = items(), copy.deepcopy(CARD["adapters"][0]["judged"])
    for item in rows:
        if item["set"] not in ("test", "train") or kind == "multiple_choice":
            continue
        item["target"] = -1
        for name, scores in item["scores"].items():
            worse = 1.0 if name == "base" else 0.0
            item["scores"][name] = {"nats": scores["nll"] + worse, "tokens": 4}
            if kind == "generation":
                item["scores"][name] |= {"f1": 0.9 - worse / 2, "exact": 1.0 - worse}
    metric = {"language_modelling": "nats_per_token", "generation": "token_f1"}
    judged |= {"metric": metric.get(kind, "accuracy"), "labels": [], "positive": None}
    settings = copy.deepcopy(CARD["adapters"][0]["settings"])
    settings["task"] = task_record(KINDS[kind]())
    found = combine([folder(tmp_path, "other", rows, judged=judged, settings=settings)])
    assert found.adapters[0].verdict in ("pass", "inconclusive")
    save_report(found, tmp_path / "out")
    text = (tmp_path / "out" / "report.html").read_text()
    assert judged["metric"].replace("_", " ").replace("f1", "F1") in text
    # The chart is in points, so it does not show gains in nats.
    assert ('class="chart" viewBox' in text.split("Gates")[0]) == (kind != "language_modelling")
    Page(text)


def test_names_of_counts_and_of_the_environment_are_words(report: Report) -> None:
    text = page(report)
    assert "supervised tokens <b>3200</b>" in text
    assert "<dt>world size</dt>" in text
    assert "_tokens" not in text
    assert "world_size" not in text


def test_many_classes_are_shown_as_their_most_frequent_confusions(report: Report) -> None:
    entry = copy.deepcopy(report.adapters[0])
    labels = [f"class {n}" for n in range(30)]
    table = [[100 if i == j else int(j == i + 1) * (i + 1) for j in range(30)] for i in range(30)]
    entry.confusion = {"labels": labels, "base": table, "adapter": table}
    text = page(replace(report, adapters=[entry]))
    rows = re.findall(r'<td class="n">(\d+)</td><td>(class \d+)</td><td>(class \d+)</td>', text)
    assert len(rows) == 12
    assert rows[0] == ("29", "class 28", "class 29")


# ── In a browser ────────────────────────────────────────────────────────────────────────────────

# A frame gives a page any width; the script measures the rendered page. The contrast of text and
# background is WCAG's ratio.
MEASURE = """<!doctype html><body><pre id="out"></pre><script>
const frames = {phone: 390, desk: 1280}, found = {};
const rgba = c => { const n = c.match(/[\\d.]+/g).map(Number);
  return c.startsWith('color(srgb') ? [...n.slice(0, 3).map(v => 255 * v), n[3] ?? 1]
                                    : [n[0], n[1], n[2], n[3] ?? 1]; };
const over = (top, under) => top.slice(0, 3).map((v, i) => v * top[3] + under[i] * (1 - top[3]));
const light = c => { const [r, g, b] = c.map(v => v / 255).map(
  v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
  return .2126 * r + .7152 * g + .0722 * b; };
function behind(element, view) {
  const layers = [];
  for (let e = element; e; e = e.parentElement)
    layers.push(rgba(view.getComputedStyle(e).backgroundColor));
  return layers.reverse().reduce((under, top) => over(top, under), [255, 255, 255]);
}
function measure(frame) {
  const doc = frame.contentDocument, view = frame.contentWindow, root = doc.documentElement;
  doc.querySelectorAll('details').forEach(d => d.open = true);
  let worst = [99, ''];
  for (const e of doc.body.querySelectorAll('*')) {
    const own = [...e.childNodes].some(n => n.nodeType == 3 && n.textContent.trim());
    if (!own || e.closest('svg') || e.closest('.skip')) continue;
    const back = behind(e, view), ink = over(rgba(view.getComputedStyle(e).color), back);
    const [a, b] = [light(ink), light(back)].sort((x, y) => y - x);
    const ratio = (a + .05) / (b + .05);
    if (ratio < worst[0]) worst = [ratio, e.className + ': ' + e.textContent.trim().slice(0, 40)];
  }
  const broken = [...doc.querySelectorAll('.scroll tbody th')].filter(e => {
    const line = doc.createRange(); line.selectNodeContents(e);
    return /^[\\w/:]+$/.test(e.textContent) && line.getClientRects().length > 1;
  }).map(e => e.textContent);
  const heading = doc.querySelector('h1').getBoundingClientRect();
  return {width: root.clientWidth, scroll: root.scrollWidth, contrast: worst,
          page: view.getComputedStyle(doc.body).backgroundColor, title: doc.title,
          broken, scripts: doc.scripts.length, images: doc.images.length, heading: heading.bottom,
          text: doc.body.innerText.includes("<script>document.title = 'run'")};
}
let left = 2;
for (const [name, width] of Object.entries(frames)) {
  const frame = document.createElement('iframe');
  frame.width = width; frame.height = 900; frame.style.border = 0; frame.src = 'report.html';
  frame.onload = () => { found[name] = measure(frame);
    if (!--left) document.getElementById('out').textContent = JSON.stringify(found); };
  document.body.append(frame);
}
</script>"""


def chromium(scratch: Path, *arguments: str) -> str:
    """What headless Chromium prints, started with an empty profile."""
    assert CHROMIUM
    quiet = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
             "--disable-background-networking", "--disable-component-update", "--disable-sync",
             f"--user-data-dir={scratch / 'profile'}"]  # fmt: skip
    done = subprocess.run([CHROMIUM, *quiet, *arguments], capture_output=True, text=True,
                          check=False, timeout=120)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@browser
@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True])
def test_it_is_readable_in_light_and_dark_on_desktop_and_phone(
    shown: Path, tmp_path: Path, dark: bool
) -> None:
    (shown.parent / "measure.html").write_text(MEASURE)
    dom = chromium(
        tmp_path, "--allow-file-access-from-files", "--hide-scrollbars", "--dump-dom",
        "--virtual-time-budget=10000", f"--blink-settings=preferredColorScheme={int(not dark)}",
        (shown.parent / "measure.html").as_uri(),
    )  # fmt: skip
    text = re.search(r'<pre id="out">(.*?)</pre>', dom, re.S)
    assert text, dom[-500:]
    found = json.loads(text[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    assert (found["phone"]["width"], found["desk"]["width"]) == (390, 1280)
    for name, seen in found.items():
        assert seen["scroll"] <= seen["width"], f"{name} scrolls sideways"
        assert seen["contrast"][0] >= 4.5, (name, seen["contrast"])
        assert seen["page"] == ("rgb(14, 18, 23)" if dark else "rgb(246, 247, 248)")
        # The planted script is shown as text and did not run.
        assert (seen["text"], seen["scripts"], seen["images"]) == (True, 0, 0)
        assert seen["title"].startswith("✘ Do not ship")
        assert not seen["broken"]  # no row heading of one word is on two lines
        assert seen["heading"] < 300, "the verdict is not in sight"


class Recorder(socketserver.StreamRequestHandler):
    """A proxy that records requests and answers none."""

    requests: list[str]

    def handle(self) -> None:
        type(self).requests.append(self.rfile.readline().decode("latin-1").strip())


@pytest.fixture
def proxy() -> Iterator[tuple[str, list[str]]]:
    Recorder.requests = []
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Recorder) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_address[1]}", Recorder.requests
        server.shutdown()


@browser
@pytest.mark.slow
def test_the_browser_sends_no_request(
    shown: Path, tmp_path: Path, proxy: tuple[str, list[str]]
) -> None:
    address, requests = proxy
    loud = shown.parent / "loud.html"
    loud.write_text('<img src="http://example.test/pixel.png">')
    through = (f"--proxy-server={address}", "--dump-dom")
    chromium(tmp_path, *through, shown.as_uri())
    assert not [line for line in requests if "example.test" in line]
    quiet = list(requests)
    chromium(tmp_path, *through, loud.as_uri())
    # The control: a page with an external image does send a request.
    assert [line for line in requests if "example.test" in line]
    # Requests of the browser itself occur with either page.
    hosts = {line.split(" ")[1].split("/")[2] for line in quiet if line.startswith("GET http")}
    assert not {h for h in hosts if not h.endswith(("google.com", "gstatic.com"))}


@browser
@pytest.mark.slow
@pytest.mark.parametrize(("width", "scheme"), [(1280, 1), (1280, 0)])
def test_a_screenshot_is_drawn(shown: Path, tmp_path: Path, width: int, scheme: int) -> None:
    picture = Path(os.environ.get("SCREENSHOTS", tmp_path)) / f"report-{width}-{scheme}.png"
    chromium(tmp_path, f"--window-size={width},1400", "--hide-scrollbars",
             f"--blink-settings=preferredColorScheme={scheme}", f"--screenshot={picture}",
             shown.as_uri())  # fmt: skip
    # Compressed, a blank page of this size takes some 10 kB.
    assert picture.stat().st_size > 40_000
