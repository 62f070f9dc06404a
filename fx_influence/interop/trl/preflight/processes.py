"""Check how a trainer's processes share its model: all of it in each, sharded by FSDP2, or under DeepSpeed's ZeRO."""

from __future__ import annotations

from typing import Any

from torch.distributed.device_mesh import DeviceMesh

from fx_influence.distributed.collectives import propagate_failures
from fx_influence.functional import make_functional
from fx_influence.interop.live.guard import preserve_random_state
from fx_influence.interop.optimizers import require_adamw
from fx_influence.interop.trl.processes import is_sharded_training, sharder
from fx_influence.interop.trl.prompts import BATCH
from fx_influence.interop.zero.partitions import zero_optimizer
from fx_influence.interop.zero.settings import check_config, check_partitions

PARALLELISM = ("tp_size", "cp_size", "sp_size")
"""Fields of accelerate's ``ParallelismConfig`` that divide a layer or a row among processes."""


def check_processes(trainer: Any) -> None:
    """Raise ``ValueError`` for processes that share the model otherwise than by one of the supported ways.

    These are DistributedDataParallel, FSDP2, and DeepSpeed's ZeRO.
    """
    accelerator = trainer.accelerator
    if trainer.is_deepspeed_enabled:
        check_config(accelerator.state.deepspeed_plugin.deepspeed_config, accelerator.mixed_precision)
        _check_parallelism(accelerator)
        return
    if trainer.is_fsdp_enabled:
        _check_fsdp(trainer, accelerator.state.fsdp_plugin)
        return
    kind = str(accelerator.distributed_type.value)
    if kind != "NO" and not kind.startswith("MULTI_"):
        raise _shared_otherwise(trainer, kind)


def check_sharded_settings(trainer: Any, prompts: list[Any] | None, matrix: bool, save_state: bool) -> None:
    """Raise ``ValueError`` for what cannot be measured of a sharded model, or stored of a partitioned optimizer.

    Args:
        trainer: a ``GRPOTrainer`` or ``RLOOTrainer``.
        prompts: of E; None where E is the update batch.
        matrix: whether pairwise influences are wanted.
        save_state: whether the state before each step is stored.
    """
    if save_state and trainer.is_deepspeed_enabled:
        raise ValueError(
            "save_state is True and DeepSpeed partitions the optimizer; expected False, since no process has the state "
            "to store. Leave it out, or train under DistributedDataParallel"
        )
    if not is_sharded_training(trainer):
        return
    if matrix:
        raise ValueError(
            f"matrix is True and {sharder(trainer)} shards the model; expected False, since pairwise influences need "
            "the gradient of every rollout. Leave the matrix out, or train under DistributedDataParallel"
        )
    if prompts is not None:
        raise ValueError(
            f"E is {len(prompts)} held-out prompts and {sharder(trainer)} shards the model; expected the step's own "
            "rollouts, since a generation that fails in one process would leave the others waiting. Pass "
            f"eval_prompts={BATCH!r}"
        )


def check_prepared(trainer: Any, mesh: DeviceMesh | None) -> None:
    """Check what the trainer has made since ``attach``: its optimizer, and the shards of its model.

    Args:
        trainer: a ``GRPOTrainer`` or ``RLOOTrainer`` that is about to train.
        mesh: of its processes, None for a single process; what one of them refuses all refuse.

    Raises:
        TypeError: for another optimizer than AdamW.
        ValueError: for a model that is sharded in another way than by FSDP2 alone, and for an optimizer that DeepSpeed
            does not partition as ZeRO does.
    """
    with propagate_failures(mesh), preserve_random_state(trainer.accelerator.device):
        require_adamw(trainer.optimizer)
        if trainer.is_deepspeed_enabled:
            check_partitions(zero_optimizer(trainer.optimizer))
        if is_sharded_training(trainer):
            make_functional(trainer.model, position_ids=False)


def _check_fsdp(trainer: Any, plugin: Any) -> None:
    """Raise ``ValueError`` for settings of FSDP under which the library has no passes."""
    from torch.distributed.fsdp import CPUOffloadPolicy

    if plugin.fsdp_version != 2:
        raise ValueError(
            f"the trainer runs under FSDP with fsdp_version {plugin.fsdp_version}; expected 2, since the flat "
            "parameters of version 1 have no forward mode. Set fsdp_version: 2 in accelerate's configuration, or "
            "'version': 2 in fsdp_config"
        )
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        raise ValueError(
            "FSDP's cpu_offload is on; expected off, since the passes run where the shards are. Leave out "
            "fsdp_offload_params (cpu_offload in fsdp_config)"
        )
    if getattr(trainer.args, "torch_compile", False):
        raise ValueError(
            "torch_compile is True and FSDP shards the model; expected False, since FSDP then shards the compiled "
            "model and not its layers. Leave torch_compile out to measure"
        )
    _check_parallelism(trainer.accelerator)


def _check_parallelism(accelerator: Any) -> None:
    """Raise ``ValueError`` for processes that divide a layer or a row among them."""
    parallelism = getattr(accelerator, "parallelism_config", None)
    for field in PARALLELISM:
        if (getattr(parallelism, field, None) or 1) > 1:
            raise ValueError(
                f"{field} is {getattr(parallelism, field)} in parallelism_config; expected 1, since influences are of "
                "complete rows and layers. Measure with data parallelism alone"
            )


def _shared_otherwise(trainer: Any, kind: str) -> ValueError:
    count = trainer.accelerator.num_processes
    processes = "one process" if count == 1 else f"{count} processes"
    remedy = (
        f"Launch it without {kind}"
        if count == 1
        else "Launch with FSDP2 (accelerate launch --use_fsdp --fsdp_version 2), or with DistributedDataParallel "
        "(--multi_gpu) where the model fits each device"
    )
    return ValueError(
        f"the trainer runs in {processes} under {kind}; expected the full model in every process, or FSDP2. {remedy}"
    )
