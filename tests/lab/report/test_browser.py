"""The page of a run in Chromium: it shows the stored values, by mouse and by keyboard, and executes no text.

The tests fail without Chromium; deselect them by ``-m "not browser"``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.run_files import write_plan
from playwright.sync_api import expect

from benchmarks.costs.bench_report import Size, chromium, synthetic
from fx_influence.lab.cli import main
from fx_influence.lab.console.column_table import printable
from fx_influence.lab.report import write_report
from fx_influence.lab.results import EntropyInfluenceResults, load_run

pytestmark = pytest.mark.browser

PLAN = {
    "update": {"prompts": "demo/train", "num_prompts": 5, "completions_per_prompt": 4},
    "evaluations": [
        {"prompts": "demo/eval", "num_prompts": 8, "completions_per_prompt": 2},
        {"prompts": "demo/eval", "num_prompts": 3, "completions_per_prompt": 3},
    ],
    "directions": ["full"],
    "eta_multiples": [1.0],
    "scaled_eta_multiples": [],
    "auto_scale": None,
    "seed": 1,
}
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


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as running:
        yield running


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    assert main(["run", write_plan(folder, PLAN), "--out", str(folder / "out")]) == 0
    return folder / "out"


class Watched:
    """A page, and a record of everything that it must not do."""

    def __init__(self, browser: Any, path: Path, **options: Any) -> None:
        self.context = browser.new_context(viewport={"width": 1280, "height": 900}, reduced_motion="reduce", **options)
        self.page = self.context.new_page()
        self.complaints: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(f"console: {message.text}"))
        self.page.on("pageerror", lambda error: self.complaints.append(f"error: {error}"))
        self.page.on("dialog", self._dialog)
        self.page.on("popup", lambda _: self.complaints.append("popup"))
        self.page.on("request", self._request)
        self.page.goto(path.as_uri())
        self.page.wait_for_selector("#rows tbody [data-rollout]")

    def _dialog(self, dialog: Any) -> None:
        self.complaints.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    def _request(self, request: Any) -> None:
        if not request.url.startswith(("file://", "data:")):
            self.complaints.append(f"request: {request.url}")


@pytest.fixture
def visit(browser: Any) -> Iterator[Any]:
    """Open pages; at the end, fail if any of them logged, requested or opened something."""
    visits: list[Watched] = []

    def go(path: Path, **options: Any) -> Any:
        visits.append(Watched(browser, path, **options))
        return visits[-1].page

    yield go
    for watched in visits:
        watched.context.close()
    assert [complaint for watched in visits for complaint in watched.complaints] == []


@pytest.fixture
def page(visit: Any, finished: Path) -> Any:
    return visit(finished / "report" / "index.html")


@pytest.fixture
def run(finished: Path) -> EntropyInfluenceResults:
    return load_run(finished)


def listed(page: Any) -> list[int]:
    """Return the rollouts in the table, in their order."""
    rows = page.locator("#rows tbody [data-rollout]")
    return [int(x) for x in rows.evaluate_all("rows => rows.map(row => row.dataset.rollout)")]


def readout(page: Any) -> dict[str, str]:
    fields = page.locator(".readout [data-field]")
    return dict(fields.evaluate_all("nodes => nodes.map(n => [n.dataset.field, n.textContent])"))


def number(text: str) -> float:
    return float(text.replace("−", "-").replace("+", "").removesuffix("%"))


def opened(page: Any, i: int) -> None:
    page.click(f"#rows tbody [data-rollout='{i}']")
    page.wait_for_selector(f"#detail .card[data-rollout='{i}'] .token")


def test_table_is_sorted_by_the_selected_column(page: Any, run: EntropyInfluenceResults) -> None:
    delta = run.evaluations[0].arrays["per_sequence"]
    assert np.abs(delta[listed(page)]).tolist() == sorted(np.abs(delta).tolist(), reverse=True)
    page.click("[data-sort=influence]")
    assert delta[listed(page)].tolist() == sorted(delta.tolist(), reverse=True)
    assert page.get_attribute("th.c-influence", "aria-sort") == "descending"
    page.keyboard.press("Enter")
    assert delta[listed(page)].tolist() == sorted(delta.tolist())
    assert page.get_attribute("th.c-influence", "aria-sort") == "ascending"
    page.click("[data-sort=completion]")
    completions = [record["completion"] for record in run.sequences]
    assert [completions[i] for i in listed(page)] == sorted(completions)
    assert page.get_attribute("th.c-influence", "aria-sort") == "none"


def test_table_cells_match_the_run(page: Any, run: EntropyInfluenceResults) -> None:
    for i in (0, 7, 13):
        record, row = run.sequences[i], page.locator(f"#row-{i}")
        cell = {name: row.locator(f".c-{name}").inner_text() for name in ("id", "prompt", "completion", "length")}
        assert cell == {
            **{name: record[name] for name in ("id", "prompt", "completion")},
            "length": str(len(record["tokens"])),
        }
        influence = number(row.locator(".c-influence").inner_text())
        assert influence == pytest.approx(
            record["influence"], abs=1e-3 * abs(run.sequences[listed(page)[0]]["influence"])
        )
        assert number(row.locator(".c-advantage").inner_text()) == pytest.approx(record["advantage"], abs=0.005)


def test_filters_and_search_select_rollouts(page: Any, run: EntropyInfluenceResults) -> None:
    delta, stderr = (run.evaluations[0].arrays[name] for name in ("per_sequence", "stderr"))
    advantage = np.array([record["advantage"] for record in run.sequences])
    for name, choice, wanted in (
        ("#sign", "up", delta > 0),
        ("#sign", "down", delta < 0),
        ("#sign", "sure", np.abs(delta) > 2 * stderr),
        ("#sign", "noise", np.abs(delta) <= 2 * stderr),
        ("#advantage", "up", advantage > 0),
        ("#advantage", "zero", advantage == 0),
    ):
        page.select_option(name, choice)
        assert sorted(listed(page)) == np.flatnonzero(wanted).tolist()
        assert page.inner_text("#count") in (f"{wanted.sum()} of 20 rollouts", "20 rollouts")
        page.select_option(name, "")
    page.select_option("#prompt", label=f"{run.sequences[4]['prompt_id']}: {run.sequences[4]['prompt']}")
    assert sorted(listed(page)) == [4, 5, 6, 7]
    page.fill("#search", run.sequences[5]["completion"][:4].upper())
    matching = [i for i in range(4, 8) if run.sequences[5]["completion"][:4] in run.sequences[i]["completion"]]
    assert sorted(listed(page)) == matching
    page.fill("#search", "no such text")
    assert listed(page) == []
    assert page.inner_text("#count") == "0 of 20 rollouts"
    page.click("text=Clear")
    expect(page.locator("#count")).to_have_text("20 rollouts")
    assert len(listed(page)) == 20


def test_readout_matches_the_values_of_each_token(page: Any, run: EntropyInfluenceResults) -> None:
    arrays, lr = run.evaluations[0].arrays, run.summary["lr"]
    i = int(np.abs(arrays["per_sequence"]).argmax())
    record = run.sequences[i]
    opened(page, i)
    tokens = page.locator(f".compare > section:first-child .card[data-rollout='{i}'] .token")
    assert tokens.all_text_contents() == record["tokens"]
    columns = record["prompt_length"] + np.arange(len(record["tokens"]))
    total = np.abs(arrays["per_token"][i, columns]).sum()
    for k, column in enumerate(columns):
        tokens.nth(k).hover()
        texts, delta = readout(page), arrays["per_token"][i, column]
        assert texts["token"] == record["tokens"][k]
        assert texts["position"] == f"{k + 1} of {len(columns)}"
        assert number(texts["influence"]) == pytest.approx(delta, rel=1e-5, abs=1e-30)
        assert number(texts["step"]) == pytest.approx(delta * lr, rel=1e-3, abs=1e-30)
        assert number(texts["share"]) == pytest.approx(100 * abs(delta) / total, abs=0.051)
        for field, name in (("logprob", "logprobs"), ("entropy", "entropies"), ("coefficient", "coefficients")):
            assert number(texts[field]) == pytest.approx(run.tokens[name][i, column], rel=1e-5)


def test_shading_encodes_sign_and_magnitude(page: Any, run: EntropyInfluenceResults) -> None:
    arrays = run.evaluations[0].arrays
    i, column = np.unravel_index(np.abs(arrays["per_token"]).argmax(), arrays["per_token"].shape)
    opened(page, int(i))
    first, values = run.sequences[i]["prompt_length"], arrays["per_token"][i]
    largest = abs(values[column])
    for k, classes in enumerate(
        page.locator(".compare > section:first-child .token").evaluate_all("nodes => nodes.map(n => [...n.classList])")
    ):
        x = values[first + k]
        level = round(5 * np.sqrt(abs(x) / largest))
        assert f"l{level}" in classes
        assert ("up" in classes) == (level > 0 and x > 0)
        assert ("down" in classes) == (level > 0 and x < 0)
    legend = page.locator(".legend tr").nth(1).locator("td").all_inner_texts()
    assert number(legend[-1]) == pytest.approx(largest, rel=0.01)
    assert number(legend[0]) == pytest.approx(-largest, rel=0.01)
    assert number(legend[-2]) == pytest.approx(0.64 * largest, rel=0.02)


def test_other_completions_of_the_prompt_can_be_opened(page: Any, run: EntropyInfluenceResults) -> None:
    opened(page, 4)
    links = page.locator(".beside .link")
    assert sorted(links.all_inner_texts()) == sorted(run.sequences[i]["id"] for i in (5, 6, 7))
    assert page.locator(".compare h4").nth(1).inner_text() == "3 other completions of this prompt"
    page.click(f".beside .link >> text={run.sequences[6]['id']}")
    expect(page.locator("#detail-title")).to_have_text(run.sequences[6]["id"])
    assert page.get_attribute("#row-6", "aria-selected") == "true"


def test_most_affected_rollouts_match_the_matrix(page: Any, run: EntropyInfluenceResults) -> None:
    [matrix, e] = run.evaluations[0].matrix, run.evaluations[0].rollouts
    i = listed(page)[0]
    opened(page, i)
    order = np.argsort(-matrix[:, i], kind="stable")
    rows = page.locator(".affected tbody tr")
    assert rows.count() == 10
    wanted = sorted(matrix[[*order[:5], *order[-5:]], i])[::-1]
    unit = {"nats per unit lr": 1.0, "10⁻³ nats per unit lr": 1e-3, "10⁻⁶ nats per unit lr": 1e-6}
    scale = unit[page.locator(".affected th").nth(3).inner_text()]
    values = [scale * number(rows.nth(k).locator("td").nth(3).inner_text()) for k in range(10)]
    assert values == pytest.approx(wanted, abs=1e-3 * float(np.abs(wanted).max()))
    assert rows.nth(0).locator("td").nth(0).inner_text() == e[order[0]].id


def test_page_is_usable_by_keyboard(page: Any, run: EntropyInfluenceResults) -> None:
    order = listed(page)
    page.focus("#filters button")
    page.keyboard.press("Tab")
    expect(page.locator("#rows")).to_be_focused()
    for key in ("ArrowDown", "ArrowDown", "ArrowDown", "ArrowUp"):
        page.keyboard.press(key)
    assert page.get_attribute("#rows", "aria-activedescendant") == f"row-{order[2]}"
    page.keyboard.press("Enter")
    expect(page.locator("#detail-title")).to_be_focused()
    assert page.inner_text("#detail-title") == run.sequences[order[2]]["id"]
    page.focus("#detail .tokens")
    for key in ("ArrowRight", "ArrowRight", "ArrowRight", "ArrowLeft"):
        page.keyboard.press(key)
    assert readout(page)["position"].startswith("2 of ")
    page.keyboard.press("End")
    length = len(run.sequences[order[2]]["tokens"])
    assert readout(page)["position"] == f"{length} of {length}"
    page.keyboard.press("Escape")
    assert page.is_hidden("#detail")
    assert page.evaluate("document.activeElement.id") == "rows"
    page.keyboard.press("End")
    assert page.get_attribute("#rows", "aria-activedescendant") == f"row-{order[-1]}"


def test_selecting_an_evaluation_updates_the_page(page: Any, run: EntropyInfluenceResults) -> None:
    first = page.inner_text("h1 >> visible=true")
    opened(page, 3)
    page.select_option("#evaluation", "1")
    assert page.inner_text("h1 >> visible=true") != first
    delta = run.evaluations[1].arrays["per_sequence"]
    assert np.abs(delta[listed(page)]).tolist() == sorted(np.abs(delta).tolist(), reverse=True)
    expect(page.locator(".affected .hint")).to_contain_text("all 9 rollouts")
    page.locator("#detail .tokens .token").nth(0).hover()
    column = run.sequences[3]["prompt_length"]
    wanted = run.evaluations[1].arrays["per_token"][3, column]
    assert number(readout(page)["influence"]) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_enough_contrast(visit: Any, finished: Path, scheme: str) -> None:
    page = visit(finished / "report" / "index.html", color_scheme=scheme)
    opened(page, listed(page)[0])
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
    opened(page, listed(page)[0])
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_printed_page_has_all_tokens_and_no_controls(visit: Any, tmp_path: Path) -> None:
    page = visit(write_report(synthetic(Size(100, 16, 900), tmp_path), figures=False))
    opened(page, listed(page)[0])
    page.set_viewport_size({"width": 700, "height": 900})
    page.emulate_media(media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert len(listed(page)) == 60
    assert page.locator(".compare > section:first-child .token").count() == 900
    assert page.is_hidden("#filters")
    assert page.evaluate("rows.scrollHeight <= rows.clientHeight + 1")
    assert page.evaluate("document.documentElement.scrollWidth") <= 700
    assert page.locator("#rows tbody .c-completion").nth(1).bounding_box()["width"] > 60


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run in which every text, and its name, is an attack."""
    folder = tmp_path_factory.mktemp("hostile") / "<img src=x onerror=alert(1)>"
    folder.mkdir()
    results = synthetic(Size(len(HOSTILE), len(HOSTILE), 2), folder)
    texts = [dict.fromkeys(("id", "prompt_id", "prompt", "completion"), text) for text in HOSTILE]
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
        assert page.locator("#detail .card >> nth=0").locator(".token").all_text_contents() == [literal] * 2
        page.locator("#detail .tokens .token").nth(0).dispatch_event("pointerover")
        assert readout(page)["token"] == printable(text[:40])
        page.fill("#search", "y")
        page.fill("#search", "")
    affected = page.locator(".affected td:nth-child(3)").all_text_contents()
    assert set(affected) <= {printable(text[:300]) + ("…" if len(text) > 300 else "") for text in HOSTILE}
    made = "img:not([src^='data:']), svg, iframe, link, a:not(.skip), b[onmouseover], #explorer script, #explorer style"
    assert page.locator(made).count() == 0
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


def test_large_run_keeps_few_nodes_in_the_document(visit: Any, tmp_path: Path) -> None:
    results = synthetic(Size(1500, 16, 900), tmp_path)
    page = visit(write_report(results, figures=False))
    delta = results.evaluations[0].arrays["per_sequence"]
    order = np.argsort(-np.abs(delta), kind="stable").tolist()
    assert listed(page) == order[: len(listed(page))]
    assert len(listed(page)) < 60
    page.evaluate("rows.scrollTop = rows.scrollHeight")
    page.wait_for_selector(f"#row-{order[-1]}")
    assert len(listed(page)) < 60
    page.focus("#rows")
    page.keyboard.press("Home")
    page.wait_for_selector(f"#row-{order[0]}")
    page.keyboard.press("Enter")
    page.wait_for_selector("#detail .token")
    assert page.locator("#detail .token").count() < 16 * 900 / 2
    page.focus("#detail .tokens")
    page.keyboard.press("End")
    assert page.locator(".compare > section:first-child .token").count() == 900
    column = results.sequences[order[0]]["prompt_length"] + 899
    wanted = results.evaluations[0].arrays["per_token"][order[0], column]
    assert number(readout(page)["influence"]) == pytest.approx(wanted, rel=1e-5)
