"""The built book in a browser: quiet, self-contained, described, readable on a phone, in light and dark."""

import functools
import http.server
import os
import shutil
import threading
from pathlib import Path

import pytest
import yaml
from test_house import ROOT, toc_pages

HTML = ROOT / "_build/html"
PAGES = toc_pages(yaml.safe_load((ROOT / "book/_toc.yml").read_text(encoding="utf-8")))
SCREENS = {"desktop": (1280, 900), "phone": (390, 844)}
TIMEOUT_MS = 20_000
ALONE = [
    "--no-sandbox",  # containers run as root
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]
LOOK = """() => {
  const images = [...document.querySelectorAll("main img")];
  return {
    headings: [...document.querySelectorAll("h1")].filter(heading => heading.checkVisibility()).length,
    overflow: document.scrollingElement.scrollWidth - window.innerWidth,
    theme: document.documentElement.dataset.theme,
    nameless: images.filter(image => !image.alt.trim()).map(image => image.src),
    broken: images.filter(image => !image.complete || !image.naturalWidth).map(image => image.src),
  };
}"""


def find_chromium() -> str | None:
    """Return the browser to use: the variable CHROMIUM, else the first one on the path."""
    names = [os.environ.get("CHROMIUM"), "chromium", "chromium-browser", "google-chrome"]
    return next((found for name in names if name and (found := shutil.which(name))), None)


class Quiet(http.server.SimpleHTTPRequestHandler):
    """A file server that does not log to the terminal."""

    def log_message(self, *args):
        """Say nothing."""


@pytest.fixture(scope="module")
def site():
    """Serve the built book on this machine alone; yield its address."""
    if not (HTML / "index.html").is_file():
        pytest.skip("the book is not built: `make book` builds it")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(HTML)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def browser(site):
    """Start a browser, or skip and say what is missing."""
    executable = find_chromium()
    if executable is None:
        pytest.skip("no chromium here: install it, or name one in the variable CHROMIUM")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as engine:
        instance = engine.chromium.launch(executable_path=executable, args=ALONE, timeout=2 * TIMEOUT_MS)
        yield instance
        instance.close()


def visit(browser, address: str, origin: str, size: tuple[int, int], scheme: str) -> tuple[dict, list[str]]:
    """Open a page and return what it looks like, and what went wrong on the way."""
    width, height = size
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    context.set_default_timeout(TIMEOUT_MS)
    complaints: list[str] = []
    try:
        page = context.new_page()
        page.on("console", lambda m: m.type == "error" and complaints.append(f"console: {m.text}"))
        page.on("pageerror", lambda error: complaints.append(f"script: {error}"))
        page.on(
            "request",
            lambda r: r.url.startswith((origin, "data:", "blob:")) or complaints.append(f"asks {r.url}"),
        )
        page.on("response", lambda r: r.status >= 400 and complaints.append(f"{r.status}: {r.url}"))
        page.goto(address, wait_until="load")
        page.wait_for_load_state("networkidle")
        page.wait_for_function("window.MathJax?.startup?.promise?.then(() => true) ?? true")
        return page.evaluate(LOOK), complaints
    finally:
        context.close()


def test_contents_were_found():
    assert "intro" in PAGES


@pytest.mark.parametrize("page", PAGES)
def test_page(browser, site, page):
    assert Path(HTML, f"{page}.html").is_file(), f"{page} is in the contents, not in the built book"
    for screen, size in SCREENS.items():
        for scheme in ("light", "dark"):
            seen, complaints = visit(browser, f"{site}{page}.html", site, size, scheme)
            where = f"{page}, {screen}, {scheme}"
            assert not complaints, f"{where}: {complaints}"
            assert seen["theme"] == scheme, f"{where}: the page is {seen['theme']}"
            assert seen["headings"] == 1, f"{where}: {seen['headings']} main headings"
            assert not seen["nameless"], f"{where}: images without alternative text: {seen['nameless']}"
            assert not seen["broken"], f"{where}: images that do not load: {seen['broken']}"
            assert seen["overflow"] <= 0, f"{where}: {seen['overflow']} px wider than the screen"
