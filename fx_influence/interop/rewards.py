"""Reward functions with the signature of TRL: ``fn(prompts, completions, **columns) -> list[float]``."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Reward = Callable[..., Sequence[float]]
"""``fn(prompts=[...], completions=[...], **columns)``: one number per completion; columns are lists as long."""


class RewardError(RuntimeError):
    """A reward function raised; the original exception is the ``__cause__``."""


def exact_match(
    prompts: Sequence[str], completions: Sequence[str], answer: Sequence[Any], **columns: Any
) -> list[float]:
    """1.0 where the text after the last ``=`` of a completion, stripped, is the answer, else 0.0.

    A completion without ``=`` is compared as a whole. All arguments are lists of one length, as is the result.

    Example:
        >>> exact_match(["3+14+9="] * 3, ["17+9=26", " 26 ", "17+9=27"], ["26", 26, "26"])
        [1.0, 1.0, 0.0]
    """
    pairs = zip(completions, answer, strict=True)
    return [float(completion.rsplit("=", 1)[-1].strip() == str(expected).strip()) for completion, expected in pairs]


def resolve_reward(spec: str) -> Reward:
    """The reward function that ``"module:function"`` names; the module is imported as Python would.

    Raises ``ValueError`` for a text of another form, a module that cannot be imported, a name that it does not have,
    or one that cannot be called.

    Example:
        >>> resolve_reward("fx_influence.interop.rewards:exact_match")(["1+1="], ["2"], answer=["2"])
        [1.0]
    """
    module_name, colon, attribute = spec.partition(":")
    if not (module_name and colon and attribute):
        raise ValueError(f"reward is {spec!r}; write it as 'module:function', such as 'my_rewards:exact'")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise ValueError(
            f"reward is {spec!r}, but module {module_name!r} cannot be imported ({type(error).__name__}: {error}); "
            "install it, or run from the folder that holds it"
        ) from error
    target: Any = module
    for part in attribute.split("."):
        if not hasattr(target, part):
            raise ValueError(f"reward is {spec!r}, but {module_name!r} has no {attribute!r}; check the function's name")
        target = getattr(target, part)
    reward: Reward | None = target if callable(target) else None
    if reward is None:
        raise ValueError(f"reward is {spec!r}, which is {type(target).__name__}, not a function; name a function")
    return reward


def score(
    reward: Reward, prompts: Sequence[str], completions: Sequence[str], columns: Mapping[str, Sequence[Any]]
) -> list[float]:
    """Call ``reward`` once on all completions and check what comes back: one finite number each.

    ``prompts``, ``completions`` and every column: lists of one length n. Returns n floats. Raises ``ValueError`` for
    columns that do not fit or rewards that are missing, not numbers or not finite, and ``RewardError``, with the
    cause, where the function itself raises.

    Example:
        >>> score(exact_match, ["1+1="], ["3"], {"answer": ["2"]})
        [0.0]
    """
    name = _name(reward)
    _check_columns(prompts, completions, columns)
    try:
        values = reward(
            prompts=list(prompts), completions=list(completions), **{key: list(value) for key, value in columns.items()}
        )
    except Exception as error:
        raise RewardError(
            f"reward {name} raised {type(error).__name__}: {error}; it was called with prompts, completions and "
            f"columns {sorted(columns)} for {len(completions)} completions"
        ) from error
    if not hasattr(values, "__len__") or len(values) != len(completions):
        got = f"{len(values)} values" if hasattr(values, "__len__") else type(values).__name__
        raise ValueError(f"reward {name} returned {got} for {len(completions)} completions; return one number for each")
    return [_number(value, name, i, completions[i]) for i, value in enumerate(values)]


def _check_columns(prompts: Sequence[str], completions: Sequence[str], columns: Mapping[str, Sequence[Any]]) -> None:
    for key, value in {"prompts": prompts, **columns}.items():
        if len(value) != len(completions):
            raise ValueError(f"{key} has {len(value)} values for {len(completions)} completions; give one for each")
    for key in ("prompts", "completions"):
        if key in columns:
            raise ValueError(f"columns holds {key!r}, an argument of every reward function; rename that field")


def _number(value: Any, name: str, index: int, completion: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(
            f"reward {name} returned {value!r} for completion {index} ({completion[:80]!r}); return a finite number"
        )
    return number


def _name(reward: Reward) -> str:
    module, name = getattr(reward, "__module__", None), getattr(reward, "__qualname__", None)
    return f"{module}:{name}" if module and name else repr(reward)
