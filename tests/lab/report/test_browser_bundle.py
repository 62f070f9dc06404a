"""A bundle on a web server, in Chromium: its links work, and no text of a run is executed.

The tests fail without Chromium; deselect them by ``-m "not browser"``.
"""

from __future__ import annotations

import functools
import json
import shutil
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.made_trainings import made_entry
from helpers.run_page import Watched, listed
from playwright.sync_api import expect

from fx_influence.core.display import printable
from fx_influence.interop.ledger.file import append_entry
from fx_influence.interop.runtime.run_files import SEQUENCES
from fx_influence.lab.cli import main

pytestmark = pytest.mark.browser

HOSTILE = (
    "</bdi></td><script>window.ran = 1; alert(1)</script>",
    "<img src=x onerror='window.ran = 1; alert(1)'>",
    "<a href='javascript:alert(1)'>x</a>\u202egnp.exe\x00 \ud800",
    "#rollout=0/1&sign=up?%2f../..%00",
)
NAME = "<img src=x onerror=alert(1)> #?%2e&"


class QuietHandler(SimpleHTTPRequestHandler):
    """A handler that logs nothing."""

    def log_message(self, *_: Any) -> None:
        """Log nothing."""


@pytest.fixture
def serve() -> Iterator[Any]:
    """Serve folders on this machine, each at an address that the function returns."""
    servers: list[ThreadingHTTPServer] = []

    def start(folder: Path) -> str:
        server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(QuietHandler, directory=str(folder)))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/index.html"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def runs(finished: Path, tmp_path: Path) -> Path:
    """Return a directory with a run and a training run, whose name and rollouts' texts are attacks."""
    directory = tmp_path / "runs"
    training = directory / NAME
    entry = made_entry(10, np.random.default_rng(0), 0.8, HOSTILE)
    for k, rollout in enumerate(entry["strongest"]):
        rollout["id"] = HOSTILE[k % len(HOSTILE)]
    shutil.copytree(finished, directory / "plain", ignore=shutil.ignore_patterns("report"))
    shutil.copytree(directory / "plain", training / "step_000010")
    file = training / "step_000010" / SEQUENCES
    records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    for record, text in zip(records, HOSTILE, strict=False):
        record |= dict.fromkeys(("id", "prompt", "completion", "source"), text)
        record["tokens"] = [text] * len(record["tokens"])
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    append_entry(training, entry)
    return directory


def test_bundle_of_hostile_runs_is_inert_and_its_links_work(
    browser: Any, serve: Any, runs: Path, tmp_path: Path
) -> None:
    out = tmp_path / "public"
    assert main(["bundle", str(runs), str(out)]) == 0
    watched = Watched(browser, serve(out), ready="main a")
    page = watched.page
    answers: list[int] = []
    page.on("response", lambda response: answers.append(response.status))
    assert page.locator(".runs a").all_text_contents() == [printable(NAME), "plain"]
    page.locator(".runs a").nth(1).click()
    page.wait_for_selector("#rows tbody [data-rollout]")
    page.go_back()
    page.locator(".runs a").nth(0).click()
    page.wait_for_selector(".rollouts a")
    links = page.locator(".rollouts a")
    assert links.count() == 6
    for k in range(4):
        text = page.locator(".rollouts tr:has(a) td:nth-child(2)").nth(k).text_content()
        links.nth(k).click()
        page.wait_for_selector("#detail .token")
        expect(page.locator("#detail-title")).to_have_text(text)
        assert text in {printable(x) for x in HOSTILE}
        assert page.locator("#detail .prompt").first.text_content() == text
        assert len(listed(page)) == 20
        assert page.evaluate("window.ran") is None
        page.go_back()
        page.wait_for_selector(".rollouts a")
    assert page.evaluate("window.ran") is None
    assert page.locator("script, iframe, link, .rollouts img, .rollouts b").count() == 0
    assert set(answers) == {200}
    watched.context.close()
    assert watched.complaints == []


def test_bundle_of_a_run_opens_from_disk(browser: Any, finished: Path, tmp_path: Path) -> None:
    assert main(["bundle", str(finished), str(tmp_path / "public")]) == 0
    watched = Watched(browser, tmp_path / "public" / "index.html", ready="main a")
    watched.page.locator(".runs a").click()
    watched.page.wait_for_selector("#rows tbody [data-rollout]")
    watched.context.close()
    assert watched.complaints == []
