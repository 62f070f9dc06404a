"""Trainers whose processes share the model in a way that no pass follows are refused, with the remedy."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from helpers.trl_runs import HELD_OUT, PLAIN, assert_detached

from benchmarks.trl.variants import trainer
from fx_influence.interop.trl import EntropyInfluence

# The warnings that trl, transformers and accelerate give about themselves.
pytestmark = [pytest.mark.filterwarnings("ignore")]


def accelerator(kind: DistributedType, processes: int = 1, **plugin: Any) -> dict[str, Any]:
    """Return the attributes of a trainer that accelerate has set up in this way."""
    fsdp = FullyShardedDataParallelPlugin(**plugin) if kind is DistributedType.FSDP else None
    fields = {"num_processes": processes, "distributed_type": kind, "state": SimpleNamespace(fsdp_plugin=fsdp)}
    return {"accelerator": SimpleNamespace(**fields), "is_fsdp_enabled": fsdp is not None}


def deepspeed(stage: int, zero: dict[str, Any] | None = None, **parallelism: int) -> dict[str, Any]:
    change = {**accelerator(DistributedType.DEEPSPEED, 2), "is_deepspeed_enabled": True}
    plugin = SimpleNamespace(deepspeed_config={"zero_optimization": {"stage": stage, **(zero or {})}})
    change["accelerator"].state.deepspeed_plugin = plugin
    change["accelerator"].mixed_precision = "no"
    change["accelerator"].parallelism_config = SimpleNamespace(**parallelism)
    return change


def with_parallelism(field: str) -> dict[str, Any]:
    change = accelerator(DistributedType.FSDP, 4, fsdp_version=2)
    change["accelerator"].parallelism_config = SimpleNamespace(**{field: 2})
    return change


def compiled() -> dict[str, Any]:
    return {**accelerator(DistributedType.FSDP, 2, fsdp_version=2), "args": SimpleNamespace(torch_compile=True)}


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "MiCS": (deepspeed(3, {"mics_shard_size": 2}), "mics_shard_size is 2 in DeepSpeed's configuration; expected -1"),
    "sequence parallel": (deepspeed(2, sp_size=2), "sp_size is 2 in parallelism_config; expected 1"),
    "XLA": (accelerator(DistributedType.XLA, 8), "in 8 processes under XLA; "),
    "FSDP1": (accelerator(DistributedType.FSDP, 2, fsdp_version=1), "fsdp_version 1; expected 2, .*fsdp_version: 2"),
    "offload": (accelerator(DistributedType.FSDP, 2, fsdp_version=2, cpu_offload=True), "cpu_offload is on; "),
    "compiled": (compiled(), "torch_compile is True and FSDP shards the model; expected False"),
    "context parallel": (with_parallelism("cp_size"), "cp_size is 2 in parallelism_config; expected 1"),
    "tensor parallel": (with_parallelism("tp_size"), "tp_size is 2 in parallelism_config; expected 1"),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_attach_rejects_processes(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    training = trainer(PLAIN, str(tmp_path), 1)
    vars(training).update(change)
    with pytest.raises(ValueError, match=message):
        EntropyInfluence(1).attach(training)
    assert_detached(training)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"matrix": True}, "matrix is True and FSDP shards the model; expected False"),
        ({"eval_prompts": HELD_OUT}, "E is 3 held-out prompts and FSDP shards the model; .*eval_prompts='batch'"),
    ],
)
def test_attach_rejects_what_no_sharded_model_has(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    training = trainer(PLAIN, str(tmp_path), 1, per_device_train_batch_size=12)
    training.accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    training.is_fsdp_enabled = True
    try:
        with pytest.raises(ValueError, match=message):
            EntropyInfluence(1, **settings).attach(training)
    finally:
        del training.accelerator.state.fsdp_plugin
    assert_detached(training)


def test_training_warns_of_a_model_sharded_otherwise(tmp_path: Path) -> None:
    """Accelerate shards a model when training begins, so its shards cannot be looked at before."""
    training = trainer(PLAIN, str(tmp_path), 1, per_device_train_batch_size=12)
    influence = EntropyInfluence(1).attach(training)
    training.create_optimizer()
    # As torch's tensor parallelism leaves a parameter, for all that is looked at.
    vars(training.model.lm_head.weight).update(placements=["_StridedShard"], device_mesh=None)
    with pytest.warns(UserWarning, match=r"no step .* is measured: model parameter .* as tensor parallelism makes"):
        influence.on_train_begin(training.args, training.state, training.control)
