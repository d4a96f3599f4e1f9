"""Looks at every page of the site in a browser, as wide as a desk and as a phone: python scripts/site_check.py

Needs the extra ``docs``, `playwright` and a Chromium (``playwright install chromium``, or ``--browser PATH`` of an
installed one); CI does without. A page fails that is wider than its window, that breaks an identifier in a table over
two lines, whose commands run out of sight, or one of whose figures is missing or too small to read; so does a search
that finds nothing for one of `SOUGHT`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).parent.parent
WIDTHS = {"desk": (1400, 1000), "phone": (390, 844)}
SOUGHT = ("torchvision", "throughput", "VisionZip", "ToMe", "lmms-eval")
"""What people look for."""
FAULTS = """() => {
  const found = [];
  const wide = document.documentElement.scrollWidth - window.innerWidth;
  if (wide > 0) found.push(`the page is ${wide} px wider than its window`);
  for (const code of document.querySelectorAll('article table code'))
    if (code.getClientRects().length > 1) found.push(`broken over lines: ${code.textContent}`);
  for (const code of document.querySelectorAll('article .language-bash pre code'))
    if (window.innerWidth < 600 && code.scrollWidth > code.clientWidth + 1)
      found.push(`runs out of sight: ${code.textContent.trim().split('\\n')[0]}`);
  for (const figure of document.querySelectorAll('article img')) {
    if (!figure.naturalWidth) found.push(`no picture: ${figure.src}`);
    if (figure.clientWidth < Math.min(figure.naturalWidth, 600)) found.push(`too small to read: ${figure.src}`);
  }
  return found;
}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--browser", help="an installed Chromium; playwright's own when left out")
    parser.add_argument("--shots", type=Path, help="folder for a screenshot of each page")
    options = parser.parse_args()
    with TemporaryDirectory() as site:
        command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", site]
        subprocess.run(command, cwd=ROOT, check=True)
        server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=site))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        pages = sorted(path.parent.relative_to(site).as_posix() for path in Path(site).rglob("index.html"))
        faults = look(f"http://127.0.0.1:{server.server_port}", pages, options.browser, options.shots)
        server.shutdown()
    print("\n".join(faults) or f"{len(pages)} pages at {len(WIDTHS)} widths: nothing to find fault with")
    sys.exit(bool(faults))


def look(site: str, pages: list[str], browser: str | None, shots: Path | None) -> list[str]:
    """What is wrong with each page at each width, a line each."""
    from playwright.sync_api import sync_playwright

    faults = []
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        for name, (width, height) in WIDTHS.items():
            page: Any = chromium.new_page(viewport={"width": width, "height": height})
            for where in pages:
                page.goto(f"{site}/{where}/", wait_until="networkidle")
                faults += [f"{where} ({name}): {fault}" for fault in page.evaluate(FAULTS)]
                if shots is not None:
                    shots.mkdir(parents=True, exist_ok=True)
                    page.screenshot(path=shots / f"{where.replace('/', '-').strip('.') or 'home'}-{name}.png")
        page = chromium.new_page()
        for word in SOUGHT:
            page.goto(f"{site}/?q={word}", wait_until="networkidle")
            page.wait_for_selector(".md-search-result__meta:not(:text('Initializing search'))", state="attached")
            page.wait_for_timeout(500)
            if not page.locator(".md-search-result__item").count():
                faults.append(f"search: nothing found for {word!r}")
    return faults


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


if __name__ == "__main__":
    main()
