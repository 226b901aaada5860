"""The page in a real browser: on a phone, on a desk, in the dark and on paper: nothing cut off, nothing loaded."""

import html
import json
import re
import shutil
import struct
import subprocess
import zlib
from pathlib import Path

import pytest
from toys.reports import NASTY, make_run, merge_record, texts

from hf_contmerge.report.write import write_report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="needs Chromium or Chrome"),
]
MEASURE = """<script>addEventListener('load', () => {
  const f = document.querySelector('iframe'), d = f.contentDocument, e = d.documentElement
  const wide = [...d.querySelectorAll('body *')].filter(x => !x.closest('.scroll, pre') && !x.matches('pre')
    && x.getBoundingClientRect().right > f.clientWidth + 1).map(x => x.tagName)
  const drawn = [...d.querySelectorAll('.picture svg')]
  const blank = drawn.filter(x => !x.getBoundingClientRect().height).length
  const cut = drawn.flatMap(x => [...x.querySelectorAll('text')].filter(t => {
    const a = x.getBoundingClientRect(), b = t.getBoundingClientRect()
    return b.left < a.left - 1 || b.right > a.right + 1 || b.top < a.top - 1 || b.bottom > a.bottom + 1
  })).map(t => t.textContent)
  const box = d.querySelector('#show-2'), line = d.querySelector('.panels .line-2')
  const before = f.contentWindow.getComputedStyle(line).display
  box.click()
  const after = f.contentWindow.getComputedStyle(line).display
  document.title = JSON.stringify([e.scrollWidth, f.clientWidth, wide, blank, cut, [before, after], drawn.length])
  document.body.append(document.title)
})</script>"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = make_run(tmp_path_factory.mktemp("browser") / "toy")
    texts(run.base)
    for t in run.stage_numbers():
        for entry in run.recipe.merge:
            run.merged(t, entry).finish("merge", merge_record(t))
    return write_report(run).parent / "index.html"


def browse(home: Path, *arguments: str) -> str:
    assert BROWSER
    command = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
               "--hide-scrollbars", "--allow-file-access-from-files", f"--user-data-dir={home / 'profile'}",
               *arguments]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout


def screenshot(page: Path, home: Path, *arguments: str, size: tuple[int, int]) -> list[bytes]:
    """Return the rows of a screenshot, RGB."""
    file = home / "shot.png"
    browse(home, f"--window-size={size[0]},{size[1]}", f"--screenshot={file}", *arguments, page.as_uri())
    return rows_of(file.read_bytes())


def rows_of(png: bytes) -> list[bytes]:
    """Return the rows of a PNG of 8 bits a channel, as a browser writes it."""
    width, height = struct.unpack(">II", png[16:24])
    channels, data, at = {2: 3, 6: 4}[png[25]], b"", 8
    while at < len(png):
        (length,) = struct.unpack(">I", png[at : at + 4])
        data += png[at + 8 : at + 8 + length] if png[at + 4 : at + 8] == b"IDAT" else b""
        at += 12 + length
    raw, rows, before = zlib.decompress(data), [], bytes(width * channels)
    for y in range(height):
        kind, *line = raw[y * (width * channels + 1) : (y + 1) * (width * channels + 1)]
        row = bytearray(line)
        for i in range(len(row)):
            left = row[i - channels] if i >= channels else 0
            up, corner = before[i], before[i - channels] if i >= channels else 0
            row[i] = (row[i] + (0, left, up, (left + up) // 2, paeth(left, up, corner))[kind]) % 256
        rows.append(bytes(row))
        before = rows[-1]
    return [bytes(v for i, v in enumerate(row) if i % channels < 3) for row in rows]


def paeth(a: int, b: int, c: int) -> int:
    """Return PNG's predictor of a byte."""
    distances = [(abs(a + b - c - x), i, x) for i, x in enumerate((a, b, c))]
    return min(distances)[2]


@pytest.mark.parametrize("width", [360, 390, 1280])
def test_nothing_is_wider_than_the_screen(page, tmp_path, width):
    frame = tmp_path / "frame.html"
    frame.write_text(f'<iframe src="{page.as_uri()}" style="width:{width}px;height:800px;border:0"></iframe>{MEASURE}')
    found = browse(tmp_path, "--virtual-time-budget=10000", "--window-size=1400,900", "--dump-dom", frame.as_uri())
    told = re.search(r"<title>(\[.*?\])</title>", found)
    assert told, found[-500:]
    scroll, client, wide, blank, cut, shown, pictures = json.loads(html.unescape(told.group(1)))
    assert (scroll, client, wide, blank, cut) == (width, width, [], 0, [])
    assert shown == ["inline", "none"], "a line that is not chosen is still there"
    assert pictures == 6


def test_it_is_dark_in_the_dark(page, tmp_path):
    light = screenshot(page, tmp_path, size=(600, 120))
    dark = screenshot(page, tmp_path, "--blink-settings=preferredColorScheme=0", size=(600, 120))
    assert sum(map(sum, light)) > 0.8 * 255 * 3 * 600 * 120
    assert sum(map(sum, dark)) < 0.35 * 255 * 3 * 600 * 120


def test_it_prints(page, tmp_path):
    file = tmp_path / "page.pdf"
    browse(tmp_path, "--no-pdf-header-footer", f"--print-to-pdf={file}", page.as_uri())
    assert file.read_bytes().startswith(b"%PDF")
    assert len(file.read_bytes()) > 50_000


def test_no_script_runs_and_nothing_is_fetched(page, tmp_path):
    """The documents' own text holds a script, which must stay a text."""
    log = tmp_path / "log"
    dom = browse(tmp_path, "--dump-dom", f"--log-net-log={log}", page.as_uri())
    assert NASTY.split()[0].replace("<", "&lt;").replace(">", "&gt;")[:10] in dom
    asked = {a for a in re.findall(r'"url":"([a-z]+://[^"]*)"', log.read_text()) if not a.startswith("file://")}
    ours = {a for a in asked if not re.search(r"google|gstatic|gvt\d|chromium", a)}  # the browser's own errands
    assert ours == set()
