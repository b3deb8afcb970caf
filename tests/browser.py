"""Opens a page in a headless Chromium, for the tests."""

import html
import json
import os
import pathlib
import re
import shutil
import subprocess

_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
_FRAME = """<!DOCTYPE html><style>body {{ margin: 0 }}</style>
<iframe style="border: 0; width: {width}px; height: {height}px" srcdoc="{page}"></iframe>
<script>onload = () => {{
  const root = document.querySelector("iframe").contentDocument.documentElement;
  const size = [root.scrollWidth, root.scrollHeight];
  document.body.dataset.size = JSON.stringify(size);
}}</script>"""


def find() -> str | None:
    """Returns the browser: that of the environment's CHROMIUM, or one on the PATH."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, _NAMES)), None)


def open_page(page: str, width: int, dark: bool, picture: pathlib.Path) -> int:
    """Writes a screenshot of a whole page and returns the width that its content needs.

    Args:
      page: the HTML. It is shown in a frame, since the window of Chromium cannot be as narrow as a
        phone.
      width: width of the frame in pixels.
      dark: whether the reader prefers dark pages.
      picture: PNG to write; the page with its frame is written beside it.
    """

    def run(height: int, *flags: str) -> str:
        file = picture.with_suffix(".html")
        file.write_text(_FRAME.format(width=width, height=height, page=html.escape(page)))
        scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
        fixed = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", scheme)
        window = f"--window-size={max(width, 500)},{height}"
        profile = f"--user-data-dir={picture.parent / 'profile'}"
        command = [str(find()), *fixed, window, profile, *flags, file.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=1200, check=True)
        return done.stdout

    found = re.search(r'data-size="([^"]*)"', run(800, "--dump-dom"))
    assert found is not None
    needed, height = json.loads(html.unescape(found[1]))
    run(height, f"--screenshot={picture}")
    return needed
