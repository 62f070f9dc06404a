"""Rollouts as records: what was asked, what was sampled and how it was judged, in memory, as a batch and as a file."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Iterable
from dataclasses import dataclass

from fx_influence.core.display import record_line


@dataclass(frozen=True, repr=False)
class Rollout:
    """One prompt with one sampled completion.

    ``id``: unique among the rollouts it is stored with. ``prompt_id``, ``group``: the prompt, by name and by number.
    ``prompt``, ``completion``: texts, the completion without special tokens.
    ``prompt_ids``, ``completion_ids``: the tokens that the policy saw and sampled, a sampled end of sequence included.
    ``finished``: the completion ended by an end-of-sequence token rather than by the length limit.
    ``behaviour_logprobs``: log pi of each completion token under the policy that sampled it, at its temperature; None
    where nobody recorded them. ``reward``, ``advantage``: ``None`` until judged.
    ``completion_mask``: False at tokens that the policy did not sample, such as a tool's output; None: all count.
    ``coefficients``, ``entropy_coefficients``: c and b of each completion token, as a trainer's own loss gave them;
    None: they follow from the advantage. ``approximate``: tokens or advantage were recomputed, not recorded.
    ``question``: of a conversation what its last user message asks, which is what people are shown; None for a text.

    Raises ``ValueError`` if a value that is given for each token and ``completion_ids`` differ in length.

    Example:
        >>> Rollout("0/0", "0", 0, "1+1=", "2", (4, 9, 4, 10), (5, 1), True, (-0.5, -0.25)).finished
        True
    """

    id: str
    prompt_id: str
    group: int
    prompt: str
    completion: str
    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    finished: bool
    behaviour_logprobs: tuple[float, ...] | None = None
    reward: float | None = None
    advantage: float | None = None
    completion_mask: tuple[bool, ...] | None = None
    coefficients: tuple[float, ...] | None = None
    entropy_coefficients: tuple[float, ...] | None = None
    approximate: bool = False
    question: str | None = None

    @property
    def display_prompt(self) -> str:
        """Return what people are shown as the prompt: the question of a conversation, or else the text itself."""
        return self.question or self.prompt

    def __post_init__(self) -> None:
        for name in PER_TOKEN:
            values = getattr(self, name)
            if values is not None and len(values) != len(self.completion_ids):
                raise ValueError(
                    f"{name} of rollout {self.id!r} has {len(values)} values for {len(self.completion_ids)} completion "
                    "tokens; give one for each token"
                )

    def __repr__(self) -> str:
        return record_line(self, {f.name: f.default for f in dataclasses.fields(self)})


PER_TOKEN = ("behaviour_logprobs", "completion_mask", "coefficients", "entropy_coefficients")
"""Fields with a value for each completion token, or None."""


def number_prompts(rollouts: Iterable[tuple[Rollout, Hashable]]) -> list[Rollout]:
    """Rollouts, each given with what tells its prompt from others, with the prompts numbered as they first appear."""
    numbers: dict[Hashable, int] = {}
    groups = [(rollout, numbers.setdefault(prompt, len(numbers))) for rollout, prompt in rollouts]
    return [dataclasses.replace(rollout, prompt_id=str(group), group=group) for rollout, group in groups]
