"""The page of a run in Chromium: contrast, narrow windows, and paper.

The tests fail without Chromium; deselect them by ``-m "not browser"``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.run_page import listed, open_rollout

from benchmarks.costs.bench_report import Size, synthetic
from fx_influence.lab.report import write_report

pytestmark = pytest.mark.browser

CONTRAST = """() => {
    const numbers = (text) => text.match(/[\\d.]+/g).map(Number);
    const light = (c) => numbers(c).slice(0, 3).map((x) => x / 255)
        .map((x) => x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4)
        .reduce((sum, x, k) => sum + x * [0.2126, 0.7152, 0.0722][k], 0);
    const seen = (c) => (numbers(c)[3] ?? 1) > 0.99;
    const behind = (node) => {
        for (let n = node; n; n = n.parentElement) {
            const c = getComputedStyle(n).backgroundColor;
            if (seen(c)) return c;
        }
        return null;
    };
    const ratios = [];
    for (const node of document.body.querySelectorAll("*:not(script):not(option):not(noscript)")) {
        const hasText = [...node.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
        if (!hasText || !node.checkVisibility()) continue;
        const [a, b] = [getComputedStyle(node).color, behind(node)].map(light).sort((x, y) => y - x);
        ratios.push([(a + 0.05) / (b + 0.05), `${node.className} ${node.tagName} ${node.textContent.slice(0, 20)}`]);
    }
    return ratios.sort((x, y) => x[0] - y[0]);
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_enough_contrast(visit: Any, finished: Path, scheme: str) -> None:
    page = visit(finished / "report" / "index.html", color_scheme=scheme)
    open_rollout(page, listed(page)[0])
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
    assert dark == (scheme == "dark")
    contrasts = page.evaluate(CONTRAST)
    assert len(contrasts) > 200
    assert {"swatch"} <= {word for _, name in contrasts for word in name.split()}
    assert contrasts[0][0] >= 4.5, contrasts[:5]


@pytest.mark.parametrize("width", [360, 800])
def test_narrow_window_does_not_scroll_sideways(visit: Any, finished: Path, width: int) -> None:
    page = visit(finished / "report" / "index.html")
    page.set_viewport_size({"width": width, "height": 800})
    open_rollout(page, listed(page)[0])
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_printed_page_has_all_tokens_and_no_controls(visit: Any, tmp_path: Path) -> None:
    page = visit(write_report(synthetic(Size(100, 16, 900), tmp_path), figures=False))
    open_rollout(page, listed(page)[0])
    page.set_viewport_size({"width": 700, "height": 900})
    page.emulate_media(media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert len(listed(page)) == 60
    assert page.locator(".compare > section:first-child .token").count() == 900
    assert page.is_hidden("#filters")
    assert page.evaluate("rows.scrollHeight <= rows.clientHeight + 1")
    assert page.evaluate("document.documentElement.scrollWidth") <= 700
    assert page.locator("#rows tbody .c-completion").nth(1).bounding_box()["width"] > 60
