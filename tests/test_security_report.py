"""A report in a browser: no script of its texts runs, and nothing is loaded from anywhere."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from local_http import QuietHandler, serving
from potstill.data.show import ShownRow, ShownToken
from potstill.evaluate.report.page import write_report, write_rows
from test_report import full_summary, metrics

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="there is no Chromium: apt-get install chromium")
RAN = "document.documentElement.setAttribute('data-ran', '1')"


@pytest.fixture
def web_server() -> Iterator[Any]:
    """A server on this machine that records the paths that a page requests."""

    class Handler(QuietHandler):
        def do_GET(self) -> None:  # noqa: N802
            self.server.paths.append(self.path)
            self.send_response(404)
            self.end_headers()

    with serving(Handler, paths=[]) as http:
        yield http


def payload(url: str) -> str:
    """Text that would run in a page, or load something, from within text, an attribute, a script or a style."""
    return (
        f"""<script>{RAN}</script></script><script>{RAN}</script>"><img src=x onerror="{RAN}"><svg onload="{RAN}">"""
        f"""' autofocus onfocus='{RAN}' x='</pre></style></title></textarea><script>{RAN}</script>"""
        f"""<img src="{url}/image"><link rel=stylesheet href="{url}/style"><iframe srcdoc="<script>{RAN}</script>">"""
        f"""<style>@import '{url}/import';</style><meta http-equiv=refresh content="0;url={url}/refresh">]]>--><body>"""
    )


def dom(page: Path, folder: Path) -> str:
    """The page as it is once its scripts have run."""
    assert BROWSER is not None
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", f"--user-data-dir={folder}"]
    command = [BROWSER, *options, "--virtual-time-budget=2000", "--dump-dom", page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=240).stdout


@needs_browser
@pytest.mark.skipif(sys.platform != "linux", reason="the options are those of Chromium on Linux")
def test_no_text_of_a_report_runs(tmp_path: Path, web_server: Any) -> None:
    text = payload(web_server.url)
    summary = full_summary() | {
        "name": text,
        "objective": text,
        "notes": [text],
        "models": dict.fromkeys(("teacher", "student"), text),
    }
    summary["continuations"] = [dict.fromkeys(("prompt", "truth", "teacher", "baseline", "student"), text)]
    summary["data"] |= {"train": text, "eval": text}
    summary["versions"] = {text: text}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    (tmp_path / "metrics.jsonl").write_text(metrics((text, "student")))
    (tmp_path / "recipe.yaml").write_text(text)
    write_rows([ShownRow(text, [ShownToken(1, text, True, 1.0)])], tmp_path)
    shown = dom(write_report(tmp_path), tmp_path / "browser")
    assert "document.documentElement.setAttribute" in shown  # as text
    assert 'data-ran="1"' not in shown
    assert web_server.paths == []


@needs_browser
@pytest.mark.skipif(sys.platform != "linux", reason="the options are those of Chromium on Linux")
def test_the_same_text_runs_in_a_page_that_does_not_escape_it(tmp_path: Path, web_server: Any) -> None:
    """Else the test above would prove nothing."""
    (tmp_path / "page.html").write_text(
        f"<!doctype html><html><body>{payload(web_server.url).partition('<meta')[0]}</html>"
    )
    assert 'data-ran="1"' in dom(tmp_path / "page.html", tmp_path / "browser")
    assert "/image" in web_server.paths
