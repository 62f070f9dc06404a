"""The page of a run in Chromium: it shows the stored values, by mouse and by keyboard.

The tests fail without Chromium; deselect them by ``-m "not browser"``.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.present import present
from helpers.run_page import listed, number, open_rollout, readout
from playwright.sync_api import expect

from benchmarks.costs.bench_report import Size, synthetic
from fx_influence.lab.report import figures, write_report
from fx_influence.lab.results import EntropyInfluenceResults

pytestmark = pytest.mark.browser


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
    delta, told = run.evaluations[0].arrays["per_sequence"], run.evaluations[0].told()
    advantage = np.array([record["advantage"] for record in run.sequences])
    for name, choice, wanted in (
        ("#sign", "up", delta > 0),
        ("#sign", "down", delta < 0),
        ("#sign", "sure", told),
        ("#sign", "noise", ~told),
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
    open_rollout(page, i)
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
    open_rollout(page, int(i))
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
    open_rollout(page, 4)
    links = page.locator(".beside .link")
    assert sorted(links.all_inner_texts()) == sorted(run.sequences[i]["id"] for i in (5, 6, 7))
    assert page.locator(".compare h4").nth(1).inner_text() == "3 other completions of this prompt"
    page.click(f".beside .link >> text={run.sequences[6]['id']}")
    expect(page.locator("#detail-title")).to_have_text(run.sequences[6]["id"])
    assert page.get_attribute("#row-6", "aria-selected") == "true"


def test_most_affected_rollouts_match_the_matrix(page: Any, run: EntropyInfluenceResults) -> None:
    [matrix, e] = run.evaluations[0].matrix, run.evaluations[0].rollouts
    i = listed(page)[0]
    open_rollout(page, i)
    order = np.argsort(-present(matrix)[:, i], kind="stable")
    rows = page.locator(".affected tbody tr")
    assert rows.count() == 10
    wanted = sorted(present(matrix)[[*order[:5], *order[-5:]], i])[::-1]
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
    open_rollout(page, 3)
    page.select_option("#evaluation", "1")
    assert page.inner_text("h1 >> visible=true") != first
    delta = run.evaluations[1].arrays["per_sequence"]
    assert np.abs(delta[listed(page)]).tolist() == sorted(np.abs(delta).tolist(), reverse=True)
    expect(page.locator(".affected .hint")).to_contain_text("all 9 rollouts")
    page.locator("#detail .tokens .token").nth(0).hover()
    column = run.sequences[3]["prompt_length"]
    wanted = run.evaluations[1].arrays["per_token"][3, column]
    assert number(readout(page)["influence"]) == pytest.approx(wanted, rel=1e-5)


def test_click_opens_rollout_when_rows_are_repainted(page: Any) -> None:
    row = page.locator("#row-3")
    row.scroll_into_view_if_needed()
    box = present(row.bounding_box())
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.evaluate("dispatchEvent(new Event('resize'))")
    page.mouse.up()
    expect(page.locator("#detail .card[data-rollout='3'] .token").first).to_be_visible(timeout=5000)


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


def test_first_screen_has_sentence_waterfall_and_rollouts(page: Any, run: EntropyInfluenceResults) -> None:
    bottoms = page.evaluate(
        """() => [...document.querySelectorAll("h1, .waterfall, .strongest table, .passed > summary")]
            .filter((node) => node.checkVisibility()).map((node) => node.getBoundingClientRect().bottom)"""
    )
    assert len(bottoms) == 5
    assert max(bottoms) < 900, bottoms


def test_strongest_rollouts_match_the_run(page: Any, run: EntropyInfluenceResults) -> None:
    arrays, lr = run.evaluations[0].arrays, run.summary["lr"]
    delta, stderr, told = arrays["per_sequence"], arrays["stderr"], run.evaluations[0].told()
    order = np.argsort(-delta, kind="stable")
    raising, lowering = [i for i in order if delta[i] > 0][:5], [i for i in order[::-1] if delta[i] < 0][:5]
    rows = page.locator(".strongest >> visible=true").locator("tbody tr")
    assert rows.count() == len(raising) + len(lowering)
    unit = {"nats": 1.0, "10⁻³ nats": 1e-3, "10⁻⁶ nats": 1e-6, "10⁻⁹ nats": 1e-9}
    scale = unit[page.locator(".strongest th >> nth=1").inner_text()]
    for k, i in enumerate([*raising, *lowering]):
        row = rows.nth(k)
        cells = row.locator("td").all_inner_texts()
        assert scale * number(cells[0]) == pytest.approx(delta[i] * lr, abs=1e-2 * lr * np.abs(delta).max())
        assert scale * number(cells[1].removeprefix("± ")) == pytest.approx(stderr[i] * lr, rel=0.1, abs=scale / 100)
        assert (row.get_attribute("class") == "unsure") == (not told[i])
        assert cells[2].startswith(run.sequences[i]["prompt"])
    rows.nth(0).locator("a").click()
    expect(page.locator("#detail-title")).to_have_text(run.sequences[raising[0]]["id"])


def test_waterfall_matches_the_run(page: Any, run: EntropyInfluenceResults) -> None:
    summary, lr = run.evaluations[0].summary, run.summary["lr"]
    rows = page.locator(".waterfall >> visible=true").locator("tbody tr")
    names = rows.locator("th").all_inner_texts()
    values = [number(text) for text in rows.locator("td:nth-child(3)").all_inner_texts()]
    first = names.index("predicted, first order")
    rounding = 0.5 * len(values) * 10.0 ** -len(rows.locator("td:nth-child(3)").first.inner_text().partition(".")[2])
    assert sum(values[:first]) == pytest.approx(values[first], abs=rounding)
    assert values[first] / values[0] == pytest.approx(summary["total"] / summary["momentum"], rel=1e-2)
    assert names[-1] == "measured"
    assert values[-1] / values[first] == pytest.approx(
        float(run.evaluations[0].arrays["full"][0]) / (summary["total"] * lr), rel=1e-2
    )
    # A bar ends where the next one begins, and its width is proportional to its value.
    bars = rows.locator("rect").evaluate_all("nodes => nodes.map((n) => [n.x.baseVal.value, n.width.baseVal.value])")
    largest = max(range(len(values)), key=lambda k: abs(values[k]))
    for (_, width), value in zip(bars, values, strict=True):
        assert width / bars[largest][1] == pytest.approx(abs(value / values[largest]), abs=0.01)


def test_address_has_the_rollout_filters_and_order(visit: Any, page: Any, run: EntropyInfluenceResults) -> None:
    page.select_option("#sign", "down")
    page.click("[data-sort=influence]")
    first = listed(page)[0]
    open_rollout(page, first)
    expect(page).to_have_url(re.compile("rollout="))
    fields = page.evaluate("Object.fromEntries(new URLSearchParams(location.hash.slice(1)))")
    assert fields == {"rollout": run.sequences[first]["id"], "sign": "down", "sort": "-influence"}
    again = visit(Path(run.path) / "report" / "index.html")
    again.goto(page.url)
    again.reload()
    expect(again.locator("#detail-title")).to_have_text(run.sequences[first]["id"])
    assert listed(again) == listed(page)
    again.keyboard.press("Escape")
    expect(again).not_to_have_url(re.compile("rollout="))
    again.evaluate("location.hash = 'rollout=nothing&sign=nothing&sort=-nothing&evaluation=9&prompt=99'")
    expect(again.locator("#count")).to_have_text("20 rollouts")
    assert again.is_hidden("#detail")
    again.evaluate("location.hash = 'evaluation=1'")
    expect(again.locator("#evaluation")).to_have_value("1")
    delta = run.evaluations[1].arrays["per_sequence"]
    expect(again.locator("#rows tbody [data-rollout] >> nth=0")).to_have_attribute(
        "data-rollout", str(np.abs(delta).argmax())
    )


def test_figures_are_enlarged_by_a_click(visit: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = figures.Figures([figures.Figure(f"figure {k}", "data:image/svg+xml;base64,PHN2Zy8+") for k in (1, 2)], "")
    monkeypatch.setattr("fx_influence.lab.report.page.draw_figures", lambda *_: drawn)
    page = visit(write_report(synthetic(Size(8, 8, 4), tmp_path)))
    shown = page.locator(".gallery figure")
    small = shown.nth(0).bounding_box()["width"]
    page.locator(".gallery img").nth(0).click()
    assert shown.nth(0).bounding_box()["width"] > 2 * small
    page.locator(".gallery input").nth(1).focus()
    page.keyboard.press("Space")
    assert shown.nth(1).bounding_box()["width"] > 2 * small
    page.locator(".gallery img").nth(0).click()
    assert shown.nth(0).bounding_box()["width"] == small


def test_conversation_shows_the_users_message_first(visit: Any, tmp_path: Path) -> None:
    results = synthetic(Size(8, 8, 4), tmp_path)
    records = [
        {**r, "prompt": f"<|user|>{r['prompt']}<|assistant|>", "question": r["prompt"]} for r in results.sequences
    ]
    page = visit(write_report(dataclasses.replace(results, sequences=records), figures=False))
    open_rollout(page, 0)
    assert page.locator("#detail .prompt >> visible=true").all_text_contents() == [results.sequences[0]["prompt"]]
    page.click("#detail summary")
    assert page.locator("#detail .prompt").nth(1).text_content() == records[0]["prompt"]
