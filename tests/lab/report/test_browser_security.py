"""The page of a run in Chromium: no text of a run is executed, hidden or loaded.

The tests fail without Chromium; deselect them by ``-m "not browser"``.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from helpers.run_page import Watched, listed, readout

from benchmarks.costs.bench_report import Size, synthetic
from fx_influence.core.display import printable
from fx_influence.lab.report import write_report

pytestmark = pytest.mark.browser

HOSTILE = [
    "<script>window.ran = 1; alert(1)</script>",
    "</script><script>window.ran = 1; alert(1)</script>",
    "<img src=x onerror='window.ran = 1; alert(1)'>",
    "<svg onload='window.ran = 1'><style>*{display:none}</style>",
    "<iframe src='https://example.com/'></iframe><link rel=stylesheet href='https://example.com/x.css'>",
    "<a href='javascript:alert(1)'>x</a> javascript:alert(1)",
    "\"'><b onmouseover=alert(1)>&lt;b&gt; &amp;",
    "<!-- ]]> {{ 7 * 7 }} {% raw %} ${alert(1)} \\u003cscript\\u003e",
    "abc\u202egnp.exe\u2066\u2069\u200f",
    "a\u2028b\u2029c\x85d\u00a0e",
    "nul\x00nul\x1b[31mred\x1b[0m\x1b]0;title\x07\x7f\ufeff",
    "lone \ud800 and \udfff and \udc00\ud800",
    "عربي and עברית, 漢字, 🙂, e\u0301",
    "__proto__",
    "x" * 100_000,
    "<b>" * 33_334,
]


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run in which every text, and its name, is an attack."""
    folder = tmp_path_factory.mktemp("hostile") / "<img src=x onerror=alert(1)>"
    folder.mkdir()
    results = synthetic(Size(len(HOSTILE), len(HOSTILE), 2), folder)
    names = ("id", "prompt_id", "prompt", "completion", "source")
    texts: list[dict[str, Any]] = [dict.fromkeys(names, text) for text in HOSTILE]
    records = [
        {**record, **text, "tokens": [text["id"]] * 2} for record, text in zip(results.sequences, texts, strict=True)
    ]
    [e] = results.evaluations
    rollouts = [dataclasses.replace(r, **text) for r, text in zip(e.rollouts, texts, strict=True)]
    changed = dataclasses.replace(results, sequences=records, evaluations=(dataclasses.replace(e, rollouts=rollouts),))
    return write_report(changed, figures=False)


def test_hostile_texts_are_literal_and_inert(visit: Any, hostile: Path) -> None:
    page = visit(hostile)
    before = page.evaluate("Object.getOwnPropertyNames(window).length")
    assert sorted(listed(page)) == list(range(len(HOSTILE)))
    for i, text in enumerate(HOSTILE):
        literal, short = printable(text), printable(text[:120]) + ("…" if len(text) > 120 else "")
        assert page.locator(f"#row-{i} .c-completion").text_content() == short
        page.evaluate(f"document.querySelector(\"#rows [data-rollout='{i}']\").click()")
        page.wait_for_selector(f"#detail .card[data-rollout='{i}'] .token")
        assert page.locator("#detail .prompt").text_content() == literal
        assert short in page.locator("#detail .quantities dd").all_text_contents()
        assert page.locator("#detail .card >> nth=0").locator(".token").all_text_contents() == [literal] * 2
        page.locator("#detail .tokens .token").nth(0).dispatch_event("pointerover")
        assert readout(page)["token"] == printable(text[:40])
        page.fill("#search", "y")
        page.fill("#search", "")
    affected = page.locator(".affected td:nth-child(3)").all_text_contents()
    assert set(affected) <= {printable(text[:300]) + ("…" if len(text) > 300 else "") for text in HOSTILE}
    made = "img:not([src^='data:']), svg svg, iframe, link, b[onmouseover], #explorer script, #explorer style"
    assert page.locator(made).count() == 0
    assert page.locator("svg").count() == page.locator(".waterfall tr > .graph > svg").count()
    # The page's own links lead to its rollouts, whatever these are called.
    assert page.locator("a:not(.skip):not([href^='#rollout='])").count() == 0
    assert page.locator(".strongest a").count() == 10
    for k in range(10):
        page.locator(".strongest a").nth(k).dispatch_event("click")
        i = int(page.locator("[data-strongest]").nth(k).get_attribute("data-strongest"))
        page.wait_for_selector(f"#detail .card[data-rollout='{i}'] .token")
    assert page.evaluate("window.ran") is None
    assert page.evaluate("Object.getOwnPropertyNames(window).length") == before
    assert not page.evaluate("/[\\u202a-\\u202e\\u2066-\\u2069\\0\\x1b]/.test(document.body.innerText)")


def test_right_to_left_text_is_isolated(visit: Any, hostile: Path) -> None:
    page = visit(hostile)
    page.locator("#rows [data-rollout]").nth(0).dispatch_event("click")
    page.wait_for_selector("#detail .tokens .token")
    for node in (
        "#rows td.c-prompt",
        "#rows td.c-completion",
        "#detail .prompt",
        "#detail .tokens .token",
        ".affected td",
    ):
        assert page.locator(node).first.evaluate("n => getComputedStyle(n).unicodeBidi") == "isolate"


def test_policy_blocks_injected_markup(browser: Any, finished: Path) -> None:
    watched = Watched(browser, finished / "report" / "index.html")
    answers: list[str] = []
    watched.page.on("requestfailed", lambda request: answers.append(request.failure))
    watched.page.on("response", lambda response: answers.append(response.url))
    refused = watched.page.evaluate(
        """async () => {
            const refused = [];
            addEventListener("securitypolicyviolation", (event) => refused.push(event.effectiveDirective));
            try { document.body.innerHTML = "<b>x</b>"; } catch { refused.push("innerHTML"); }
            const image = document.createElement("img");
            image.src = "https://example.invalid/x.png";
            try { image.setAttribute("onerror", "window.ran = 1"); } catch { refused.push("onerror"); }
            document.body.append(image);
            const style = document.createElement("style");
            style.textContent = "* { display: none }";
            document.body.append(style);
            await fetch("https://example.invalid/").catch(() => 0);
            await new Promise((done) => setTimeout(done, 100));
            return refused;
        }"""
    )
    assert {"innerHTML", "img-src", "style-src-elem", "connect-src", "onerror"} <= set(refused)
    assert watched.page.evaluate("window.ran") is None
    # The browser reports that the policy blocked the image before it reached the network.
    assert answers == ["csp"]
    assert [x for x in watched.complaints if x.startswith("dialog")] == []
    watched.context.close()
