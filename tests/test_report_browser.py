"""Reports of lens folders in a browser, opened as files: quiet, self-contained, readable on a phone, light and dark.

The variable AXE may name a file with the axe-core library: then its rules are checked too.
"""

import os
from pathlib import Path

import pytest
from prefdyn.book import report
from test_browser import ALONE, SCREENS, TIMEOUT_MS, find_chromium
from test_report import FOLDERS

LOOK = """() => {
  const wide = [...document.querySelectorAll("body *")].filter(e => {
    const box = e.getBoundingClientRect();
    return box.width && !e.closest("svg") && !e.parentElement.closest(".scroll") && box.right > window.innerWidth + 1;
  });
  const ink = document.querySelector("figure svg text");
  const out = (own, all) =>
    own.left < all.left - 1 || own.right > all.right + 1 || own.bottom > all.bottom + 1 || own.top < all.top - 1;
  return {
    overflow: document.scrollingElement.scrollWidth - window.innerWidth,
    wide: wide.slice(0, 3).map(e => e.outerHTML.slice(0, 120)),
    ground: getComputedStyle(document.body).backgroundColor,
    label: parseFloat(getComputedStyle(ink).fontSize) * ink.ownerSVGElement.getScreenCTM().a,
    clipped: [...document.querySelectorAll("figure svg text")].filter(
      e => out(e.getBoundingClientRect(), e.ownerSVGElement.getBoundingClientRect())
    ).map(e => e.textContent),
  };
}"""


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> dict[str, Path]:
    """The reports of all folders of tests/test_report.py."""
    root = tmp_path_factory.mktemp("reports")
    return {name: report.write(make(root / name)) for name, make in FOLDERS.items()}


@pytest.fixture(scope="module")
def browser():
    """Start a browser, or skip and say what is missing."""
    executable = find_chromium()
    if executable is None:
        pytest.skip("no chromium here: install it, or name one in the variable CHROMIUM")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as engine:
        instance = engine.chromium.launch(executable_path=executable, args=ALONE, timeout=2 * TIMEOUT_MS)
        yield instance
        instance.close()


def visit(browser, path: Path, screen: str, scheme: str) -> tuple[dict, list[str]]:
    """Open a report with all its parts unfolded; return what it looks like, and what went wrong on the way."""
    width, height = SCREENS[screen]
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    context.set_default_timeout(TIMEOUT_MS)
    complaints: list[str] = []
    try:
        page = context.new_page()
        page.on("console", lambda m: m.type in ("error", "warning") and complaints.append(f"console: {m.text}"))
        page.on("pageerror", lambda error: complaints.append(f"script: {error}"))
        page.on("request", lambda r: r.url in (path.as_uri(), "data:,") or complaints.append(f"asks {r.url}"))
        page.goto(path.as_uri(), wait_until="load")
        page.evaluate("document.querySelectorAll('details').forEach(part => { part.open = true; })")
        seen = page.evaluate(LOOK)
        if axe := os.environ.get("AXE"):
            page.evaluate(Path(axe).read_text(encoding="utf-8"))
            found = page.evaluate("axe.run().then(found => found.violations)")
            complaints += [f"axe {v['id']}: {[n['html'][:120] for n in v['nodes'][:3]]}" for v in found]
        if shots := os.environ.get("SHOTS"):
            page.screenshot(path=Path(shots, f"{path.parent.name}-{screen}-{scheme}.png"), full_page=True)
        return seen, complaints
    finally:
        context.close()


@pytest.mark.parametrize("name", FOLDERS)
def test_report(browser, reports, name):
    grounds = set()
    for screen in SCREENS:
        for scheme in ("light", "dark"):
            seen, complaints = visit(browser, reports[name], screen, scheme)
            where = f"{name}, {screen}, {scheme}"
            assert not complaints, f"{where}: {complaints}"
            assert seen["overflow"] <= 0 and not seen["wide"], (
                f"{where}: {seen['overflow']} px too wide: {seen['wide']}"
            )
            assert not seen["clipped"], f"{where}: texts of figures that leave them: {seen['clipped']}"
            assert seen["label"] >= 9.5, f"{where}: texts of figures are {seen['label']:.1f} px"
            grounds.add((scheme, seen["ground"]))
    assert len(grounds) == 2 and len({ground for _, ground in grounds}) == 2, f"light and dark are one: {grounds}"
