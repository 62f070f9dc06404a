"""Read the held-out prompts of a live training run from any of the forms that users have."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

from fx_influence.attribution.cross_fitting import MIN_PROMPTS
from fx_influence.interop.trl.processes import is_sharded_training

BATCH = "batch"
"""``eval_prompts`` where the rollouts of the step are E, each without its own prompt."""

IMAGE_COLUMNS = ("image", "images")
"""Columns of a data set that trl shows to the policy beside the prompt."""


class HeldOutPrompts(NamedTuple):
    """Prompts of the evaluation batch E.

    Attributes:
        prompts: texts or conversations.
        note: a sentence that says which prompts were taken, where not all were; else None.
    """

    prompts: list[Any]
    note: str | None


def makes_several_steps(trainer: Any) -> bool:
    """Return whether a trainer makes several optimizer steps a generation, so that later ones are off-policy."""
    args = trainer.args
    return bool(args.steps_per_generation * getattr(args, "num_iterations", 1) > args.gradient_accumulation_steps)


def evaluation_prompts(
    trainer: Any, eval_prompts: Any, max_prompts: int, save_state: bool, pairwise: bool
) -> tuple[list[Any] | None, str | None]:
    """Return the prompts of E, None where the update batch is E, and a sentence for the user or None.

    Args:
        trainer: a ``GRPOTrainer`` or ``RLOOTrainer``.
        eval_prompts: ``"batch"``, or as for ``held_out_prompts``.
        max_prompts: as for ``held_out_prompts``.
        save_state: as for ``check_batch_is_evaluation``.
        pairwise: as for ``check_batch_is_evaluation``.
    """
    if not (isinstance(eval_prompts, str) and eval_prompts == BATCH):
        return held_out_prompts(trainer, eval_prompts, max_prompts)
    check_batch_is_evaluation(trainer, save_state, pairwise)
    return None, None


def check_batch_is_evaluation(trainer: Any, save_state: bool, pairwise: bool) -> None:
    """Raise ``ValueError`` unless the rollouts of every optimizer step can be E: none left out, of four prompts.

    They are the policy's own, or an older one's whose log-probabilities the trainer keeps by token.

    Args:
        trainer: a ``GRPOTrainer`` or ``RLOOTrainer``.
        save_state: whether the state before each step is stored.
        pairwise: whether a matrix of per-decision estimates is wanted.
    """
    args, remedy = trainer.args, "Pass held-out prompts as eval_prompts"
    if save_state:
        raise ValueError(
            f"save_state is True with eval_prompts={BATCH!r}; expected False, since a stored plan has an E of its own. "
            + remedy
        )
    if makes_several_steps(trainer):
        _check_older_policy(trainer, pairwise, remedy)
    if getattr(args, "mask_truncated_completions", False):
        raise ValueError(
            f"mask_truncated_completions is True with eval_prompts={BATCH!r}; expected False, since an E without "
            f"truncated completions is not the policy's. {remedy}"
        )
    rollouts = args.per_device_train_batch_size * args.gradient_accumulation_steps * trainer.accelerator.num_processes
    prompts = rollouts // trainer.num_generations
    if prompts < MIN_PROMPTS:
        raise ValueError(
            f"an optimizer step has {rollouts} rollouts of {prompts} prompts with eval_prompts={BATCH!r}; expected at "
            f"least {MIN_PROMPTS} prompts, since each rollout's influence is taken over the others. {remedy}, or use "
            "more prompts in a step"
        )


def _check_older_policy(trainer: Any, pairwise: bool, remedy: str) -> None:
    """Raise ``ValueError`` where rollouts of an older policy cannot be E."""
    several = f"several optimizer steps a generation with eval_prompts={BATCH!r}"
    if any(kind.__name__ == "RLOOTrainer" for kind in type(trainer).__mro__):
        raise ValueError(
            f"{type(trainer).__name__} makes {several}; expected one, since later steps have rollouts of an older "
            "policy, and it keeps no log-probabilities of their tokens. Set num_iterations=1 and "
            f"steps_per_generation=gradient_accumulation_steps. {remedy} otherwise"
        )
    if pairwise:
        raise ValueError(
            f"matrix is True and the trainer makes {several}; expected False, since no prompt can be left out of "
            f"weights that are normalised at each rank. Leave the matrix out. {remedy} otherwise"
        )


def check_images_measurable(trainer: Any, prompts: Sequence[Any] | None, matrix: bool) -> None:
    """Raise ``ValueError`` where the images of a step's rollouts cannot be carried into every pass.

    Args:
        trainer: a ``GRPOTrainer`` or ``RLOOTrainer`` of a policy that reads images.
        prompts: of E; None where E is the update batch.
        matrix: whether pairwise influences are wanted.
    """
    if prompts is not None:
        raise ValueError(
            f"E is {len(prompts)} held-out prompts and rollouts show images; expected the step's own rollouts, whose "
            f"images the trainer has. Pass eval_prompts={BATCH!r}"
        )
    if matrix:
        raise ValueError(
            "matrix is True and rollouts show images; expected False, since passes under vmap cannot tell whose image "
            "is whose. Leave the matrix out"
        )
    if is_sharded_training(trainer):
        raise ValueError(
            "FSDP shards the model and rollouts show images; expected the full model in every process, since processes "
            "with and without images would gather other weights. Train under DistributedDataParallel to measure"
        )


def held_out_prompts(trainer: Any, eval_prompts: Any, max_prompts: int) -> HeldOutPrompts:
    """Return the prompts of E: ``eval_prompts``, or those of the trainer's ``eval_dataset`` where it is None.

    Args:
        trainer: its ``eval_dataset`` is used where there are no ``eval_prompts``.
        eval_prompts: texts, conversations, or records with a ``prompt``, in any iterable; a data set with a column
            ``prompt``; or one text or one conversation.
        max_prompts: number taken of a trainer's data set, evenly, and of a stream, from its start; a stream is not read
            any further.

    Raises:
        ValueError: for anything else, no prompts, and prompts with images.
    """
    source = trainer.eval_dataset if eval_prompts is None else eval_prompts
    if source is None:
        raise ValueError("eval_prompts is None and the trainer has no eval_dataset; expected the held-out prompts of E")
    if isinstance(source, Mapping):
        raise ValueError(
            f"eval_dataset holds {sorted(source)}; expected one data set. Pass one of them as eval_prompts"
        )
    if isinstance(source, str) or _is_conversation(source):
        source = [source]
    if not isinstance(source, Iterable) and not hasattr(source, "__getitem__"):
        raise ValueError(
            f"eval_prompts is {source!r}; expected texts, conversations or a data set with a column prompt"
        )
    _check_columns(source)
    bound = max_prompts if eval_prompts is None or not _has_length(source) else None
    items, note = _take(source, bound)
    prompts = [item["prompt"] if isinstance(item, Mapping) and "prompt" in item else item for item in items]
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, (str, list)) or not prompt:
            raise ValueError(
                f"eval_prompts[{i}] is {prompt!r}; expected a text or a conversation as a list of messages"
            )
        if any(_has_image(message) for message in prompt):
            raise ValueError(f"eval_prompts[{i}] shows an image; expected text, since influences do not see images")
    if not prompts:
        raise ValueError("eval_prompts is empty; expected the held-out prompts of E")
    return HeldOutPrompts(prompts, note)


def _is_conversation(source: Any) -> bool:
    return isinstance(source, list) and bool(source) and all(isinstance(x, Mapping) and "role" in x for x in source)


def _has_length(source: Any) -> bool:
    try:
        len(source)
    except (TypeError, NotImplementedError):
        return False
    return True


def _check_columns(source: Any) -> None:
    columns = getattr(source, "column_names", None)
    if columns is None:
        return
    if "prompt" not in columns:
        raise ValueError(
            f"eval_prompts has the columns {columns}; expected prompt. Rename the one that holds the prompts"
        )
    for name in IMAGE_COLUMNS:
        if name in columns:
            raise ValueError(
                f"eval_prompts has the column {name!r}; expected text alone, since influences do not see images. "
                "Give prompts of text, and train on text, to measure"
            )


def _take(source: Any, bound: int | None) -> tuple[list[Any], str | None]:
    """Return at most ``bound`` items and, where there are more, a sentence that says so."""
    if not _has_length(source):
        # One item beyond the bound tells whether there are more, without reading on.
        items = list(islice(_items(source), bound + 1 if bound is not None else None))
        more = bound is not None and len(items) > bound
        return items[:bound], f"E has the first {bound} prompts of a stream; max_prompts takes more" if more else None
    count = len(source)
    if bound is None or count <= bound:
        # Only the one column of a data set is read, because the others may be costly to decode.
        return list(source["prompt"] if hasattr(source, "column_names") else _items(source)), None
    items = [source[k * count // bound] for k in range(bound)]
    return items, f"E has {bound} of the {count} prompts of eval_dataset, chosen evenly; max_prompts takes more"


def _items(source: Any) -> Iterator[Any]:
    return iter(source) if isinstance(source, Iterable) else (source[k] for k in range(len(source)))


def _has_image(message: Any) -> bool:
    content = message.get("content") if isinstance(message, Mapping) else None
    return isinstance(content, list) and any(
        isinstance(part, Mapping) and part.get("type") == "image" for part in content
    )
