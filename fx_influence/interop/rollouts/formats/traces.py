"""Traces of verifiers and prime-rl: graphs of messages with the tokens that each adds."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fx_influence.interop.rollouts.formats.token_formats import NUMBER, TokenRecord, recorded_rollout
from fx_influence.interop.rollouts.jsonl import field, fields, read_json_lines
from fx_influence.interop.rollouts.record import Rollout, number_prompts, source_of


def read_traces(files: Sequence[Path], tokenizer: Any = None) -> list[Rollout]:
    """Read rollouts of ``rollouts/step_<n>/train/<subset>/traces.jsonl``: exact tokens, masks, log-probs, advantages.

    A line is an episode with ``traces``, or one trace. Each path from a root of its ``nodes`` to a leaf is a rollout;
    traces of agents that are not ``trainable`` are left out. The prompt ends at the first sampled token. Episodes of
    one ``group``, or else of one task, are one prompt. ``advantages`` that nobody assigned leave the advantage None.
    The name of the environment is the source.

    Raises:
        ValueError: by line, for nodes without tokens (of an API) and advantages that differ between tokens.

    Source: PrimeIntellect-ai/prime-rl, src/prime_rl/monitors/file.py at commit 559b447; PrimeIntellect-ai/verifiers,
    verifiers/v1/episode.py, trace.py and graph.py at a60a606 (``to_record``, ``Branch``).
    """

    def parse(index: int, record: dict[str, Any]) -> list[tuple[Rollout, Any]]:
        group = (record.get("group") or {}).get("id")
        env = record.get("env") or {}
        parsed = []
        for trace in record.get("traces", [record]):
            if not (trace.get("agent") or {}).get("trainable", True):
                continue
            task = trace.get("task") or {}
            prompt = group or task.get("key") or task.get("hash")
            rewards = [
                r["score"] * r.get("weight", 1.0) for r in (trace.get("rewards") or {}).values() if r is not None
            ]
            name = field(trace, "id", (str,), "a string")
            for branch, nodes in enumerate(_branches(field(trace, "nodes", (list,), "a list of nodes"))):
                rollout, prompt_ids = recorded_rollout(f"{name}/{branch}", _record(nodes), tokenizer)
                source = source_of({"environment": env.get("name") or env.get("id")})
                reward = float(sum(rewards)) if rewards else None
                parsed.append((dataclasses.replace(rollout, reward=reward, source=source), prompt or prompt_ids))
        return parsed

    return number_prompts(pair for pairs in read_json_lines(files, parse) for pair in pairs)


def _branches(nodes: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Yield the nodes from the root to each leaf."""
    parents = [node.get("parent") for node in nodes]
    for leaf in range(len(nodes)):
        if leaf in parents:
            continue
        path: list[int] = []
        place: int | None = leaf
        while place is not None:
            if place in path or not 0 <= place < len(nodes):
                raise ValueError(f"field 'parent' of node {path[-1]} is {place}; expected an earlier node. Drop this")
            path.append(place)
            place = parents[place]
        yield [nodes[index] for index in reversed(path)]


def _record(nodes: list[dict[str, Any]]) -> TokenRecord:
    """Return the tokens of a path, and the values of sampled ones at their places."""
    tokens: list[int] = []
    sampled: list[bool] = []
    logprobs: list[float | None] = []
    advantages: list[float | None] = []
    for node in nodes:
        ids = fields(node, "token_ids", (int,), "integers") if node.get("token_ids") else []
        mask = fields(node, "mask", (bool,), "booleans") if ids else []
        if not ids and node.get("sampled"):
            raise ValueError(
                "a sampled node has no token_ids, as from an API; expected the tokens. Read the messages of a "
                "results.jsonl, or record with prime-rl's own inference server"
            )
        if len(mask) != len(ids):
            raise ValueError(f"field 'mask' of a node has {len(mask)} values; expected {len(ids)}, one for each token")
        tokens += ids
        sampled += mask
        logprobs += _spread(node, "logprobs", mask)
        advantages += _spread(node, "advantages", mask)
    scored = any(node.get("advantages") is not None for node in nodes)
    return TokenRecord(tokens, sampled, logprobs, advantages if scored else None, None)


def _spread(node: dict[str, Any], name: str, mask: list[bool]) -> list[float | None]:
    """Return one value a token: those of the node at its sampled tokens, 0 where nobody gave it any."""
    values = node.get(name)
    if not values:
        return [0.0] * len(mask)
    given = iter(fields(node, name, NUMBER, "numbers"))
    if len(values) != sum(mask):
        raise ValueError(
            f"field {name!r} of a node has {len(values)} values; expected {sum(mask)}, one a sampled token"
        )
    return [float(next(given)) if sampled else 0.0 for sampled in mask]
