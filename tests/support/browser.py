"""A headless browser that reaches this machine only, and what its pages did."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
                None)  # fmt: skip
needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium on this machine (Debian: apt-get install chromium)"
)
SIZES = {"desktop": (1280, 900), "phone": (390, 844)}
OVERFLOW = "document.documentElement.scrollWidth - window.innerWidth"
CONTRAST = """(selector) => {
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const over = (colours) => { canvas.clearRect(0, 0, 1, 1);
    for (const one of colours) { canvas.fillStyle = one; canvas.fillRect(0, 0, 1, 1); }
    return [...canvas.getImageData(0, 0, 1, 1).data.slice(0, 3)]; };
  const light = (rgb) => { const [r, g, b] = rgb.map((v) => { v /= 255;
    return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  let worst = [99, ''];
  for (const element of document.querySelectorAll(selector)) {
    const own = [...element.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    if (!own || !element.offsetParent) continue;
    const behind = [];
    for (let e = element; e; e = e.parentElement)
      behind.unshift(getComputedStyle(e).backgroundColor);
    const back = over(['white', ...behind]);
    const front = over(['white', ...behind, getComputedStyle(element).color]);
    const [a, b] = [light(back), light(front)].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < worst[0]) worst = [ratio, element.className + ': ' + element.textContent.trim()];
  }
  return worst;
}"""
"""The least contrast of a text that a selector finds with what is behind it, and which (WCAG 2)."""


@dataclass
class Seen:
    """What the pages of a browser asked for and complained about."""

    browser: Any
    requests: list[str] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)

    def open(self, url: str, size: str = "desktop", scheme: str = "light") -> Any:
        """A page in a context of its own."""
        width, height = SIZES[size]
        context = self.browser.new_context(
            color_scheme=scheme, viewport={"width": width, "height": height}, accept_downloads=True
        )
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("console", lambda message: self.messages.append(f"{message.type} {message.text}"))
        page.on("pageerror", lambda error: self.messages.append(f"error {error}"))
        page.goto(url)
        return page

    def elsewhere(self, url: str) -> set[str]:
        """The requests that did not go to ``url``."""
        own = (url, "data:", "blob:")
        return {request for request in self.requests if not request.startswith(own)}

    @property
    def errors(self) -> list[str]:
        return [message for message in self.messages if message.startswith("error")]


@contextmanager
def browsing() -> Iterator[Seen]:
    """A headless Chromium for which no other machine has a name."""
    pytest.importorskip("playwright", reason="playwright is not installed")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as started:
        browser = started.chromium.launch(
            executable_path=CHROMIUM,
            args=["--no-sandbox", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"],
        )
        yield Seen(browser)
        browser.close()
