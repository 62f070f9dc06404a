"""A run's page in Chromium: what it shows, and a record of everything that it must not do."""

from __future__ import annotations

from pathlib import Path
from typing import Any


class Watched:
    """A page, and a record of everything that it must not do.

    Args:
        browser: Chromium.
        page: file of the page, or its address on a server, from which it may then load files.
        ready: selector of what is there once the page is.
        **options: of the browser's context.
    """

    def __init__(
        self, browser: Any, page: Path | str, ready: str = "#rows tbody [data-rollout]", **options: Any
    ) -> None:
        address = page.as_uri() if isinstance(page, Path) else page
        server = () if isinstance(page, Path) else ("/".join(address.split("/")[:3]) + "/",)
        self.allowed = ("data:", *(server or ("file://",)))
        self.context = browser.new_context(viewport={"width": 1280, "height": 900}, reduced_motion="reduce", **options)
        self.page = self.context.new_page()
        self.complaints: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(f"console: {message.text}"))
        self.page.on("pageerror", lambda error: self.complaints.append(f"error: {error}"))
        self.page.on("dialog", self._dialog)
        self.page.on("popup", lambda _: self.complaints.append("popup"))
        self.page.on("request", self._request)
        self.page.goto(address)
        self.page.wait_for_selector(ready)

    def _dialog(self, dialog: Any) -> None:
        self.complaints.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    def _request(self, request: Any) -> None:
        if not request.url.startswith(self.allowed):
            self.complaints.append(f"request: {request.url}")


def listed(page: Any) -> list[int]:
    """Return the rollouts in the table, in their order."""
    rows = page.locator("#rows tbody [data-rollout]")
    return [int(x) for x in rows.evaluate_all("rows => rows.map(row => row.dataset.rollout)")]


def readout(page: Any) -> dict[str, str]:
    fields = page.locator(".readout [data-field]")
    return dict(fields.evaluate_all("nodes => nodes.map(n => [n.dataset.field, n.textContent])"))


def number(text: str) -> float:
    return float(text.replace("−", "-").replace("+", "").removesuffix("%"))


def open_rollout(page: Any, i: int) -> None:
    page.click(f"#rows tbody [data-rollout='{i}']")
    page.wait_for_selector(f"#detail .card[data-rollout='{i}'] .token")
