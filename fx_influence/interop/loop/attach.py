"""``fx.attach``: measure the steps of any training loop with AdamW."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from fx_influence.attribution.result import Influence
from fx_influence.core.checks import check_count, check_options
from fx_influence.core.dtensor import is_sharded
from fx_influence.distributed.consistency import check_consistent
from fx_influence.functional import make_functional
from fx_influence.interop.live.measurement import MeasurementSettings
from fx_influence.interop.live.model_checks import active_dropout, check_not_quantised, embedding_noise
from fx_influence.interop.live.policy_checks import check_measured_objective
from fx_influence.interop.live.processes import count_and_rank
from fx_influence.interop.loop.capture import LoopTraining, StepCapture, steps_made
from fx_influence.interop.loop.ledger import LoopLedger, check_directory
from fx_influence.interop.loop.window import LoopWindow
from fx_influence.interop.optimizers import adamw_state, require_adamw
from fx_influence.interop.window.checks import check_window_ledger, check_window_settings
from fx_influence.interop.zero.partitions import zero_optimizer
from fx_influence.objectives import Entropy
from fx_influence.policy.model.template import unwrap_model
from fx_influence.types import Preconditioner


def attach(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    *,
    every: int = 10,
    temperature: float = 1.0,
    objective: Entropy = Entropy(),
    preconditioner: Preconditioner = "frozen",
    autocast: torch.dtype | None = None,
    position_ids: bool = True,
    chunk_size: int | None = None,
    memory_budget: int | None = None,
    region_stderr: bool = True,
    log: Callable[[dict[str, float]], object] | None = None,
    on_step: Callable[[int, Influence], object] | None = None,
    directory: str | Path | None = None,
    decode: Callable[[Sequence[int]], str] | None = None,
    window: int | None = None,
    window_ratio: bool | None = None,
) -> StepCapture:
    """Measure every ``every``-th step of a training loop's optimizer, and return what its rollouts are added to.

    The loop calls ``capture.add(...)`` once for each micro-batch, before its backward pass. Hooks on the optimizer's
    ``step`` then do the rest: before the step ``fx.influence`` attributes it, with the coefficients that the loop's own
    loss gave, the gradient as the optimizer receives it, and the step's rollouts as E, each without its own prompt, of
    which a step needs four; after the step the change of entropy is measured on the same rollouts.

    The factor by which the gradient was clipped is its norm at the step over its norm after the last backward pass, so
    that the loop states no ``max_grad_norm``. A gradient changed otherwise, by another factor for each parameter, is
    refused. What the rollouts do not explain of it is ``unattributed``: another loss in the same step, rounding.

    The training run stays as without it, to the last bit. A failure while measuring is one warning with the step's
    number and the reason, and the step is missing from ``history``. Steps are numbered as the optimizer counts them;
    those that a loss scaler skips are not counted.

    With several processes (DistributedDataParallel, a model sharded by FSDP2, DeepSpeed's ZeRO) every one makes
    the same calls with its own micro-batches, and the loss is the mean of theirs. All have the ``history``; the first
    one warns and logs. Under DeepSpeed the gradient and the norm to which it is clipped are its optimizer's own, and
    whatever ``engine.backward`` divides the loss by is in the coefficients.

    Args:
        optimizer: a ``torch.optim.AdamW``, or as for ``fx.adamw_state``; its hooks are called by ``step``. Under
            DeepSpeed ``engine.optimizer``.
        model: the policy, or a wrapper of it, whose parameters the optimizer holds; without dropout.
        every: steps n, 2n, ... are measured.
        temperature: divides the logits, in the rollouts' sampling and in the loop's log-probabilities.
        objective: how the entropy is estimated, as for ``fx.influence``.
        preconditioner: as for ``fx.influence``.
        autocast: dtype of the ``torch.autocast`` around the loop's forward, or of FSDP2's mixed precision; None without
            one, as with DeepSpeed's weights in bfloat16. Under autocast alone the passes of a sharded model stay in its
            shards' dtype, and the difference is ``unattributed``.
        position_ids: whether the loop's forward counts positions from the first real token. False where it passes no
            ``position_ids``, which matters with padding on the left.
        chunk_size: rows per forward, as for ``fx.influence``.
        memory_budget: bytes, as for ``fx.influence``.
        region_stderr: also give the sums over the four regions of tokens standard errors, at the cost of two reverse
            passes.
        log: called with at most 16 figures of each measured step, named ``entropy_influence/...``, in nats.
        on_step: called with the number of each measured step and its ``Influence``, on the CPU, rows in the order they
            were added.
        directory: of the training run's ledger, to which each measured step is appended; ``fx.load_training`` and
            ``fx-influence report`` read it. A training run that is resumed, its optimizer's state loaded before
            ``attach``, appends to its own. A fault while writing is a warning. None writes nothing.
        decode: turns a prompt's or a completion's tokens into a text, as ``tokenizer.decode`` does, for the ledger;
            None writes their numbers.
        window: K, to attribute the entropy after K steps to each of them too, by ``fx.influence_over_steps``; the
            ledger's entry of the measured step that ends them has both accounts, so it needs a ``directory``, and one
            process. ``interop/window`` says what is recorded and what is exact. Rollouts are then added in every step
            of a window: in all steps, since steps outside of windows ignore them.
        window_ratio: whether the loss has pi / pi_behaviour of each token as a factor, so that coefficients follow the
            policy through the ratio; to be told where windows have ``behaviour_logprobs``.

    Returns:
        ``StepCapture``: ``add`` names rollouts, ``history`` has the metrics of every measured step, ``detach`` ends it.

    Raises:
        TypeError: for another optimizer than AdamW, or options under which its step is not AdamW's.
        ValueError: for a parameter of the optimizer that is not the model's; for a model with dropout, noise on its
            embeddings or quantised weights other than frozen 4-bit ones of bitsandbytes, or that ``make_functional``
            refuses; for numbers out of range; for a directory with the ledger of another training run; and if
            processes attach with different settings.

    Example:
        >>> model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5))
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        >>> capture = attach(optimizer, model, every=1)
        >>> ids = torch.tensor([[k, 2, 3] for k in range(4)])
        >>> logprobs = model(ids)[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
        >>> mask = torch.ones(4, 2, dtype=torch.bool)
        >>> capture.add(logprobs=logprobs, input_ids=ids, completion_mask=mask)
        >>> (torch.tensor([[1.0], [-1.0], [1.0], [-1.0]]) * logprobs).mean().backward()
        >>> optimizer.step()
        >>> [step["step"] for step in capture.history], capture.step
        ([1], 1)
    """
    check_count("every", every, "pass 1 to measure every step")
    check_options(temperature, chunk_size, memory_budget)
    if autocast not in (None, torch.bfloat16, torch.float16):
        raise ValueError(f"autocast is {autocast!r}; expected torch.bfloat16, torch.float16 or None. Pass the dtype")
    check_measured_objective(objective)
    adamw = require_adamw(optimizer)
    # Only read, and dropped again: it checks that the parameters are the model's and that the state can be AdamW's.
    adamw_state(optimizer, model, copy=False)
    inner = unwrap_model(model)
    _check_exact(inner)
    make_functional(inner, position_ids=position_ids)
    partitioned = zero_optimizer(optimizer)
    hooked = adamw if partitioned is None else partitioned
    training = LoopTraining(inner, hooked, temperature, position_ids, autocast)
    settings = MeasurementSettings(objective, preconditioner, False, chunk_size, memory_budget, region_stderr)
    mesh = _mesh_of(inner)
    if mesh is not None:
        check_consistent(mesh, {"every": every, "temperature": temperature, **settings._asdict()})
    ledger = None
    if directory is not None:
        check_directory(Path(directory), steps_made(hooked))
        ledger = LoopLedger(Path(directory), decode, preconditioner, objective.normalize)
    windows = None
    if window is not None:
        check_window_settings(window, preconditioner, count_and_rank(mesh)[0], partitioned is not None)
        check_window_ledger(window, directory)
        windows = LoopWindow(window, window_ratio)
    return StepCapture(training, settings, every, log, on_step, mesh, ledger, windows)


def _mesh_of(model: nn.Module) -> DeviceMesh | None:
    """Return the mesh of the training run's processes, over which a sharded model is; None for a single process."""
    meshes = [cast(Any, p).device_mesh for p in model.parameters() if is_sharded(p)]
    if meshes:
        return cast(DeviceMesh, meshes[0])
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return None
    world = dist.group.WORLD
    assert world is not None
    return DeviceMesh.from_group(world, next(model.parameters()).device.type)


def _check_exact(model: nn.Module) -> None:
    """Raise ``ValueError`` for a model whose gradients are random or inexact, naming the remedy."""
    check_not_quantised(model)
    for name, p in active_dropout(model):
        raise ValueError(
            f"{name or 'the model'} has dropout {p}; expected 0, since it makes every gradient random. Set the "
            "dropouts of the model's config and of LoRA to 0"
        )
    for name, alpha in embedding_noise(*model.modules()):
        raise ValueError(
            f"{name} is {alpha}; expected None, since noise on the embeddings makes every gradient one of another "
            "policy than the one that samples. Leave it out to measure"
        )
