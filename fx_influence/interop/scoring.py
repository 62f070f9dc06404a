"""Reward functions resolved by name, checked against the columns of prompts, and called."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import logging
import math
from collections.abc import Awaitable, Collection, Mapping, Sequence
from typing import Any

from fx_influence.interop.rewards import RESERVED, Reward, TextOrMessages, completion_text, math_verify

_log = logging.getLogger(__name__)


class RewardError(RuntimeError):
    """Raised when a reward function raises; the original exception is the ``__cause__``."""


def resolve_reward(spec: str) -> Reward:
    """Return the reward function that ``"module:function"`` names, importing the module as Python would.

    Raises:
        ValueError: for a text of another form, a module that cannot be imported, a name that it does not have, or one
            that cannot be called.

    Example:
        >>> resolve_reward("fx_influence.interop.rewards:exact_match")(["1+1="], ["2"], answer=["2"])
        [1.0]
    """
    module_name, colon, attribute = spec.partition(":")
    if not (module_name and colon and attribute):
        raise ValueError(f"reward is {spec!r}; expected 'module:function', such as 'my_rewards:exact'")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise ValueError(
            f"reward is {spec!r} and module {module_name!r} cannot be imported ({type(error).__name__}: {error}); "
            "expected one that can. Install it, or run from the folder that holds it"
        ) from error
    target: Any = module
    for name in attribute.split("."):
        if not hasattr(target, name):
            raise ValueError(
                f"reward is {spec!r} and {module_name!r} has no {attribute!r}; expected a function of that name. "
                "Check it"
            )
        target = getattr(target, name)
    reward: Reward | None = target if callable(target) else None
    if reward is None:
        raise ValueError(f"reward is {spec!r}, of type {type(target).__name__}; expected a function")
    return reward


def check_reward(reward: Reward, columns: Collection[str]) -> None:
    """Refuse, before anything is sampled, a reward that cannot be called with columns of these names.

    Raises:
        ValueError: for an argument that no column fills, a column that the function does not take, or a column named
            like an argument of every reward function; for ``math_verify`` also what it raises itself.

    Example:
        >>> from fx_influence.interop.rewards import exact_match
        >>> check_reward(exact_match, ["level"])
        Traceback (most recent call last):
        ValueError: reward fx_influence.interop.rewards:exact_match cannot be called with columns ['level']: missing a
        required argument: 'answer'; expected columns that it takes. Give the prompts the fields that it names, and let
        it take **columns
    """
    arguments = _arguments(reward, [], [], {name: [] for name in columns}, [])
    try:
        # Inspect the wrapper's own signature, not the wrapped function's.
        signature = inspect.signature(reward, follow_wrapped=False)
    except ValueError:
        return
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise ValueError(
            f"reward {_name(reward)} cannot be called with columns {sorted(columns)}: {error}; expected columns "
            "that it takes. Give the prompts the fields that it names, and let it take **columns"
        ) from error
    if reward is math_verify:
        math_verify(**arguments)


def check_columns(reward: Reward, records: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse records that all lack a column which ``reward`` requires, and log a warning if only some do.

    Required columns are the function's arguments without a default. A function may return None for prompts that it does
    not apply to, and so be called with records without its column; ``exact_match`` compares them with None, which
    scores 0.

    Args:
        reward: the function.
        records: the columns of each prompt, by the prompt's id; a value of None counts as missing.

    Raises:
        ValueError: if no record has a value for a column.

    Example:
        >>> from fx_influence.interop.rewards import exact_match
        >>> check_columns(exact_match, {"a": {"answer": None}, "b": {"answer": None}})
        Traceback (most recent call last):
        ValueError: answer is missing in 2 of 2 prompts, the first of them 'a'; expected it in each, since reward
        fx_influence.interop.rewards:exact_match needs it: without, most score 0. Add the field to these prompts
    """
    for name in _required_columns(reward):
        without = [prompt for prompt, columns in records.items() if columns.get(name) is None]
        if not without:
            continue
        text = (
            f"{name} is missing in {len(without)} of {len(records)} prompts, the first of them {without[0]!r}; "
            f"expected it in each, since reward {_name(reward)} needs it: without, most score 0. Add the field to "
            "these prompts"
        )
        if len(without) == len(records):
            raise ValueError(text)
        _log.warning(text)


def _required_columns(reward: Reward) -> list[str]:
    """Return the names of the arguments without a default that a column has to fill."""
    try:
        parameters = inspect.signature(reward, follow_wrapped=False).parameters.values()
    except ValueError:
        return []
    nameable = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [p.name for p in parameters if p.kind in nameable and p.default is p.empty and p.name not in RESERVED]


def score(
    reward: Reward,
    prompts: Sequence[TextOrMessages],
    completions: Sequence[TextOrMessages],
    columns: Mapping[str, Sequence[Any]],
    completion_ids: Sequence[Sequence[int]] | None = None,
) -> list[float | None]:
    """Call ``reward`` once on all completions and check its values: one finite number, or None, each.

    Args:
        reward: the function, also an asynchronous one.
        prompts: n texts or conversations.
        completions: n texts or lists of one message.
        columns: lists of n values, by name.
        completion_ids: n sequences of token ids; None if there are none to pass.

    Returns:
        n rewards.

    Raises:
        ValueError: for columns that do not fit, or rewards that are missing, not numbers or not finite.
        RewardError: with the cause, if the function itself raises.

    Example:
        >>> from fx_influence.interop.rewards import exact_match
        >>> score(exact_match, ["1+1="], ["3"], {"answer": ["2"]})
        [0.0]
    """
    name = _name(reward)
    arguments = _arguments(reward, prompts, completions, columns, completion_ids)
    try:
        values = reward(**arguments)
        if inspect.isawaitable(values):
            values = asyncio.run(_await(values))
    except Exception as error:
        kind = "texts" if all(isinstance(completion, str) for completion in completions) else "lists of messages"
        raise RewardError(
            f"reward {name} raised {type(error).__name__}: {error}; it was called with prompts and completions as "
            f"{kind} (chat and the form of the prompts decide) and columns {sorted(columns)} for {len(completions)} "
            "completions"
        ) from error
    if not hasattr(values, "__len__") or len(values) != len(completions):
        got = f"{len(values)} values" if hasattr(values, "__len__") else type(values).__name__
        raise ValueError(f"reward {name} returned {got}; expected {len(completions)} numbers, one for each completion")
    return [None if value is None else _number(value, name, i, completions[i]) for i, value in enumerate(values)]


def _arguments(
    reward: Reward,
    prompts: Sequence[TextOrMessages],
    completions: Sequence[TextOrMessages],
    columns: Mapping[str, Sequence[Any]],
    completion_ids: Sequence[Sequence[int]] | None,
) -> dict[str, list[Any]]:
    """Return the keyword arguments of the call, each a list of one length."""
    for key in RESERVED:
        if key in columns:
            raise ValueError(
                f"columns holds {key!r}, an argument of every reward function; expected other names. Rename that field"
            )
    arguments = {"prompts": prompts, "completions": completions, **columns}
    if completion_ids is not None and _takes(reward, "completion_ids"):
        arguments["completion_ids"] = completion_ids
    for key, value in arguments.items():
        if len(value) != len(completions):
            raise ValueError(f"{key} has {len(value)} values; expected {len(completions)}, one for each completion")
    return {key: list(value) for key, value in arguments.items()}


def _takes(reward: Reward, argument: str) -> bool:
    """Return whether a function, and the function that it wraps, accept an argument."""
    try:
        # The wrapper has to accept it, and so does the wrapped function, which a bare **kwargs passes it to.
        signatures = [inspect.signature(reward, follow_wrapped=follow) for follow in (False, True)]
    except ValueError:
        return False
    return all(
        any(p.name == argument or p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
        for signature in signatures
    )


def _number(value: Any, name: str, index: int, completion: TextOrMessages) -> float:
    """Return a reward as a float; refuse one that is not a finite number."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(
            f"reward {name} returned {value!r} for completion {index} ({completion_text(completion)[:80]!r}); "
            "expected a finite number, or None where it does not apply"
        )
    return number


def _name(reward: Reward) -> str:
    """Return ``module:function``, or the repr of a callable without a name."""
    module = getattr(reward, "__module__", None)
    name = getattr(reward, "__qualname__", None) or getattr(reward, "__name__", None)
    return f"{module}:{name}" if module and name else repr(reward)


async def _await(values: Awaitable[Sequence[float | None]]) -> Sequence[float | None]:
    return await values
