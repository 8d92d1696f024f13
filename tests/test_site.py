"""The site of the documentation: it is built without warnings and loads nothing from elsewhere."""

import functools
import http.server
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import ROOT
from support.browser import CONTRAST, OVERFLOW, browsing, needs_browser

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("material") is None, reason="the extra `docs` is not installed"),
]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site, from this working tree and without a network."""
    folder = tmp_path_factory.mktemp("site")
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "HTTPS_PROXY": "http://127.0.0.1:9"}
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr + done.stdout
    return folder


def test_every_page_is_built_and_loads_nothing_from_elsewhere(site: Path) -> None:
    pages = {path.name for path in site.glob("*.html")}
    assert pages >= {path.with_suffix(".html").name for path in (ROOT / "docs").glob("*.md")}
    for page in site.rglob("*.html"):
        html = page.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|img|iframe|source)[^>]+?src=[\"']?([^\"' >]+)", html)
        loaded += re.findall(r"<link[^>]+?href=[\"']?([^\"' >]+)", html)
        assert loaded
        away = [url for url in loaded if re.match(r"(https?:)?//", url)]
        assert not away, f"{page.name}: {away}"
        for url in loaded:
            start = site if url.startswith("/") else page.parent
            path = start / url.split("#")[0].split("?")[0].lstrip("/")
            assert url.startswith("data:") or path.exists(), f"{page.name}: {url}"
    for style in site.rglob("*.css"):
        assert not re.findall(r"url\([\"']?(?:https?:)?//", style.read_text(encoding="utf-8"))


def test_every_public_name_is_described(site: Path) -> None:
    import lora_domains

    text = (site / "api.html").read_text(encoding="utf-8")
    for name in lora_domains.__all__:
        assert re.search(rf'id="lora_domains\.[a-z_.]*\b{name}"', text), name
    assert "Returns the card, which has no verdict before" in text  # a docstring of a method


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None: ...


@pytest.fixture(scope="module")
def served(site: Path) -> Iterator[str]:
    handler = functools.partial(Quiet, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@needs_browser
def test_pages_are_readable_in_a_browser(served: str, site: Path, tmp_path: Path) -> None:
    pictures = Path(os.environ.get("SCREENSHOTS", tmp_path))
    names = ("index", "first-five-minutes", "verdict", "api")
    with browsing() as seen:
        for scheme, size in (("light", "desktop"), ("dark", "phone")):
            for name in names:
                page = seen.open(f"{served}/{name}.html", size, scheme)
                page.wait_for_selector("article h1")
                page.wait_for_timeout(200)
                page.screenshot(path=pictures / f"site-{name}-{size}-{scheme}.png")
                assert page.evaluate(OVERFLOW) <= 0, (name, size)
                ratio, which = page.evaluate(CONTRAST, "article p, article li, article td")
                assert ratio >= 4.5, which
                page.context.close()
        page = seen.open(f"{served}/index.html")
        page.get_by_placeholder("Search").first.press_sequentially("prevalence")
        page.wait_for_selector(".md-search-result__item")
        assert "The verdict" in page.locator(".md-search-result").inner_text()
        assert not seen.elsewhere(served)
        assert not seen.errors
