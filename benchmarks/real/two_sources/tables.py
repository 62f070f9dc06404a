"""The table of a training run on two sources: what its page says first, and what that is checked with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def markdown(report: dict[str, Any]) -> str:
    """Return the table of the page, without checks that have not been made."""
    settings, screen, levels, sampled = (report[name] for name in ("settings", "first_screen", "levels", "sampled"))
    rollouts = settings["prompts"] * settings["completions"]
    lines = [
        f"| {report['model']} | LoRA in {len(settings['layers'])} layers, {rollouts} rollouts a step |",
        "| --- | --- |",
        f"| steps measured, seconds each of attributing | {report['measured_steps']}, {report['seconds']:.0f} |",
        *(
            f"| {source}: share of rollouts with a score, mean score, in the first and the second half "
            f"| {'; '.join(f'{above:.0%}, {mean:.3f}' for above, mean in (half.values() for half in halves))} |"
            for source, halves in report["scores"].items()
        ),
        *(
            f"| the page's sentence {number} | {_cell(text)} |"
            for number, text in enumerate(screen["sentences"], start=1)
        ),
        *(f"| the page's alert | {_cell(f'{name}: {text}')} |" for name, text in screen["alerts"].items()),
        *(f"| the page on {term[0]} | {_pair(term[1:3])} |" for term in (x["term"] for x in screen["sources"])),
        f"| mean H of the last {levels['steps']} steps less that of the first, by their rollouts; by the ledger "
        f"| {_pair(levels['change'])}; {_pair(levels['ledger'])} |",
        *_sampled(sampled, settings["sampled"]),
        "| correlation of ΔH measured − predicted with `self_influence`, over the steps "
        f"| {_number(report['second']['self_influence'])} |",
        *_second(report["second"]),
        *(line for run in report["apart"] for line in _alone(run)),
        f"| bytes a step: ledger, directory | {report['bytes']['ledger']:,.0f}, {report['bytes']['directory']:,.0f} |",
        f"| page: size, built in, opened in | {report['page']['bytes'] / 2**20:.2f} MiB, "
        f"{report['page']['build_seconds']:.1f} s, {report['page']['open_seconds']:.2f} s, at a load of "
        f"{report['page']['load']:.0f} on {report['page']['processors']} processors |",
    ]
    return "\n".join(lines)


def _sampled(changes: list[dict[str, Any]], rollouts: dict[str, int]) -> list[str]:
    count = rollouts["prompts"] * rollouts["completions"]
    return [
        f"| ΔH of steps {first} to {last}: by {count} fresh rollouts before and after; ledger's measured, predicted "
        f"| {_pair(change['sampled'])}; {_pair(change['measured'])}, {_pair(change['predicted'])} |"
        for change in changes
        for first, last in [change["steps"]]
    ]


def _second(second: dict[str, Any]) -> list[str]:
    steps, every = len(second["steps"]), second["all"]
    lines = [
        f"| second E, {steps} steps: sums compared, their correlation "
        f"| {every['count']}, {_number(every['correlation'])} |",
        "| slope of the second on the first, of the first on the second "
        f"| {_number(every['slope'])}, {_number(every['slope_back'])} |",
        f"| differences inside the 95% interval of both errors, of {every['with_error']} | {_share(every['inside'])} |",
        "| sum of ΔH predicted, by the first E and the second "
        f"| {', '.join(f'{x:+.4f}' for x in second['predicted'])} |",
        f"| sum of ΔH measured, the same | {', '.join(f'{x:+.4f}' for x in second['measured'])} |",
    ]
    return lines + [
        f"| sum of {row['label']}, the same | {_pair((row['first'], row['first_stderr']))}, "
        f"{_pair((row['second'], row['second_stderr']))} |"
        for kind in ("source", "region")
        for row in second["totals"].get(kind, [])
    ]


def _alone(run: dict[str, Any]) -> list[str]:
    name = f"{run['source']} alone, {run['steps']} steps"
    same = {"both": "the policy of both sources, to the last bit", "model": "the policy does not move"}
    alone = "" if run["alone"] is None else f"ΔH {_pair(run['alone'])} by fresh rollouts"
    return [
        f"| {name} | {same.get(run['same_policy'], alone)} |",
        "| the ledger of both on it: at once; over its lifetime; ΔH measured "
        f"| {_pair(run['ledger'][1:3])}; {_pair(run['ledger_lifetime'][1:3])}; {_pair(run['measured'][1:3])} |",
    ]


def _pair(values: Sequence[float | None]) -> str:
    value, stderr = values
    return f"{value:+.4f}" if stderr is None else f"{value:+.4f} ± {stderr:.4f}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
