"""The ledger of a training loop: its measured steps as entries, with the texts of their rollouts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fx_influence.interop.ledger.file import LEDGER, append_entry, read_ledger, with_window
from fx_influence.interop.ledger.step import measured_entry
from fx_influence.interop.live.metrics import MeasuredStep
from fx_influence.interop.live.step import CapturedStep
from fx_influence.interop.rollouts.record import Rollout


class LoopLedger(NamedTuple):
    """The file that a loop's measured steps are appended to, and their form.

    Attributes:
        directory: of the ledger.
        decode: turns tokens into a text; None writes their numbers.
        preconditioner: of the influences.
        normalize: of the entropy.
    """

    directory: Path
    decode: Callable[[Sequence[int]], str] | None
    preconditioner: str
    normalize: str

    def append(self, measured: MeasuredStep, model: nn.Module, window: Mapping[str, Any] | None = None) -> None:
        """Append a measured step of the model's training, with the account of the window that it ends."""
        ends = end_tokens(model)
        rollouts = captured_rollouts(measured.captured, self.decode or numbers, ends or frozenset())
        settings = {"preconditioner": self.preconditioner, "normalize": self.normalize}
        # E is U.
        figures = {"evaluation_count": float(len(rollouts))}
        entry = measured_entry(measured, rollouts, figures, settings, ends_known=ends is not None)
        append_entry(self.directory, with_window(entry, window))


def check_directory(directory: Path, steps_made: int) -> None:
    """Raise ``ValueError`` for a ledger of another training run.

    Args:
        directory: of the ledger.
        steps_made: by the optimizer; one that has made steps continues a training run that was interrupted.
    """
    if (directory / LEDGER).is_file() and not steps_made and read_ledger(directory):
        raise ValueError(
            f"directory is {str(directory)!r}, which has the ledger of another training run; expected none, since the "
            "optimizer has made no step. Choose another one, or attach after the optimizer's state is loaded"
        )


def end_tokens(model: nn.Module) -> frozenset[int] | None:
    """Return the end-of-sequence tokens in a Hugging Face model's configurations, None where it names none.

    Example:
        >>> end_tokens(nn.Linear(1, 1)) is None
        True
    """
    known: set[int] = set()
    for config in (getattr(model, "generation_config", None), getattr(model, "config", None)):
        value = getattr(config, "eos_token_id", None)
        known |= {value} if isinstance(value, int) else set(value or ())
    return frozenset(known) or None


def numbers(tokens: Sequence[int]) -> str:
    """Return tokens as a text of their numbers.

    Example:
        >>> numbers([4, 17])
        '4 17'
    """
    return " ".join(map(str, tokens))


def captured_rollouts(
    captured: CapturedStep, decode: Callable[[Sequence[int]], str], ends: frozenset[int]
) -> list[Rollout]:
    """Return U as records, in the order of the batch.

    Args:
        captured: the step.
        decode: turns tokens into a text.
        ends: end-of-sequence tokens; a completion that ends by one of them is finished.
    """
    assert captured.batch.group is not None
    count_by_prompt: Counter[int] = Counter()
    rollouts = []
    for i, group in enumerate(captured.batch.group.tolist()):
        rollouts.append(_rollout(captured, i, f"{group}/{count_by_prompt[group]}", decode, ends))
        count_by_prompt[group] += 1
    return rollouts


def _rollout(
    captured: CapturedStep, i: int, name: str, decode: Callable[[Sequence[int]], str], ends: frozenset[int]
) -> Rollout:
    batch = captured.batch
    attended = batch.attention_mask[i].bool()
    is_completion = torch.arange(len(attended), device=attended.device) >= captured.prompt_widths[i]

    def tokens(mask: Tensor) -> tuple[int, ...]:
        return tuple(batch.input_ids[i][mask].tolist())

    prompt, completion = tokens(attended & ~is_completion), tokens(attended & is_completion)
    prompt_id, reward = name.partition("/")[0], float(captured.rewards[i])
    texts: dict[str, Any] = {"prompt": str(decode(prompt)), "completion": str(decode(completion))}
    return Rollout(
        id=name,
        prompt_id=prompt_id,
        group=int(prompt_id),
        prompt_ids=prompt,
        completion_ids=completion,
        finished=bool(completion) and completion[-1] in ends,
        completion_mask=tuple(batch.completion_mask[i][attended & is_completion].tolist()),
        reward=None if reward != reward else reward,
        advantage=float(captured.advantages[i]),
        source=captured.sources[i],
        **texts,
    )
