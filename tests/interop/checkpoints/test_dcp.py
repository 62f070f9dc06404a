"""Directories of torch.distributed.checkpoint, as torch and accelerate write them, load as the live state, safely."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import save_fsdp_model, save_fsdp_optimizer
from helpers.checkpoint_models import CONFIGS, LORA, assert_same_state, make_tokenizer, train
from helpers.dcp_files import MaliciousPickle, save_dcp
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict
from transformers import AutoModelForCausalLM

from fx_influence.interop.checkpoints.dcp.read import has_values, read_values
from fx_influence.interop.checkpoints.load import load_checkpoint
from fx_influence.interop.checkpoints.optimizer_state import restore_optimizer
from fx_influence.interop.optimizers import adamw_state

pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.distributed is",  # written in one process
    "ignore:`is_gradient_checkpointing` is deprecated",  # peft reads it
)

FSDP2 = pytest.mark.skipif(torch.__version__ < (2, 6), reason="accelerate has it from torch 2.6")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory by architecture, each with a model and a tokenizer."""
    root = tmp_path_factory.mktemp("bases")
    for name, config in CONFIGS.items():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config()).save_pretrained(root / name)
        make_tokenizer().save_pretrained(root / name)
    return root


def trained(model: nn.Module, path: Path) -> torch.optim.AdamW:
    """The optimizer of transformers' Trainer after two steps, with its decay and no-decay groups."""
    return train(model, path).optimizer.optimizer


def assert_weights(loaded: nn.Module, live: nn.Module) -> None:
    assert [name for name, _ in loaded.named_parameters()] == [name for name, _ in live.named_parameters()]
    assert all(torch.equal(loaded.get_parameter(name), parameter) for name, parameter in live.named_parameters())


def by_name(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {"model": get_model_state_dict(model), "optim": get_optimizer_state_dict(model, optimizer)}


def flattened(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    return {"model": get_model_state_dict(model), "optim": get_optimizer_state_dict(model, optimizer, options=options)}


def by_id(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}


class App:
    """As in torch's tutorial."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.saved = by_name(model, optimizer)

    def state_dict(self) -> dict[str, Any]:
        return self.saved

    def load_state_dict(self, saved: dict[str, Any]) -> None: ...


def in_app(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {"app": App(model, optimizer), "epoch": 3}


@pytest.mark.parametrize("layout", [by_name, flattened, by_id, in_app])
@pytest.mark.parametrize("architecture", CONFIGS)
def test_a_full_directory_is_the_live_state(architecture: str, layout: Any, bases: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(bases / architecture)
    optimizer = trained(model, tmp_path / "trainer")
    save_dcp(layout(model, optimizer), tmp_path / "dcp")
    loaded = load_checkpoint(tmp_path / "dcp", base=bases / architecture)
    live = adamw_state(optimizer, model)
    assert_same_state(loaded.optimizer_state, live)
    assert {hyper.weight_decay for hyper in live.hyper.values()} == {0.0, 0.1}
    assert_weights(loaded.model, model)
    assert not loaded.model.training
    assert loaded.eos_token_ids == load_checkpoint(bases / architecture, optimizer=False).eos_token_ids


@pytest.mark.parametrize("kind", LORA)
def test_a_peft_directory_is_the_live_state(kind: str, bases: Path, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(bases / "llama")
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=2, **LORA[kind]))
    optimizer = trained(model, tmp_path / "trainer")
    save_dcp(by_name(model, optimizer), tmp_path / "dcp")
    shutil.copy(tmp_path / "trainer" / "checkpoint-2" / "adapter_config.json", tmp_path / "dcp")
    loaded = load_checkpoint(tmp_path / "dcp", base=bases / "llama")
    assert_same_state(loaded.optimizer_state, adamw_state(optimizer, model))
    assert_weights(loaded.model, model)
    assert {n for n, p in loaded.model.named_parameters() if p.requires_grad} == set(loaded.optimizer_state.step)


@FSDP2
@pytest.mark.parametrize("kind", [None, *LORA])
def test_load_accelerate_fsdp_matches_live_state(kind: str | None, bases: Path, tmp_path: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(bases / "llama")
    if kind is not None:
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, **LORA[kind]))
    optimizer = trained(model, tmp_path / "trainer")
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type="SHARDED_STATE_DICT")
    path = tmp_path / "checkpoint-2"
    # as Trainer calls them
    save_fsdp_model(plugin, Accelerator(cpu=True), model, str(path), adapter_only=True)
    save_fsdp_optimizer(plugin, Accelerator(cpu=True), optimizer, model, str(path))
    assert sorted(entry.name for entry in path.iterdir()) == ["optimizer_0", "pytorch_model_fsdp_0"]
    if kind is not None:
        shutil.copy(tmp_path / "trainer" / "checkpoint-2" / "adapter_config.json", path)
    loaded = load_checkpoint(path, base=bases / "llama")
    assert_same_state(loaded.optimizer_state, adamw_state(optimizer, model))
    assert_weights(loaded.model, model)


TWO_PROCESSES = """
import os, sys, torch
from torch import distributed
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM
rank, base, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
distributed.init_process_group("gloo", init_method=f"file://{out}.store", rank=rank, world_size=2)
model = AutoModelForCausalLM.from_pretrained(base)
fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
groups = [{"params": [p for p in model.parameters() if (p.ndim == 1) == flat], "lr": lr}
          for flat, lr in ((False, 0.01), (True, 0.02))]
optimizer = torch.optim.AdamW(groups)
ids = torch.randint(3, 12, (2, 6), generator=torch.Generator().manual_seed(rank))
for _ in range(2):
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
dcp.save({"model": get_model_state_dict(model), "optim": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=out)
whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
weights, state = (get_model_state_dict(model, options=whole), get_optimizer_state_dict(model, optimizer, options=whole))
if rank == 0:
    torch.save({"model": weights, "optim": state}, f"{out}.pt")
distributed.destroy_process_group()
os._exit(0)  # as ranks.end_rank, and for its reason
"""


@FSDP2
def test_load_joins_shards_of_two_processes(tmp_path: Path) -> None:
    config = CONFIGS["qwen2"]()
    config.vocab_size = 13  # rows that two processes cannot share evenly
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    out = tmp_path / "dcp"
    command = [sys.executable, "-c", TWO_PROCESSES]
    processes = [subprocess.Popen([*command, str(rank), tmp_path / "base", out]) for rank in range(2)]
    assert [process.wait(timeout=300) for process in processes] == [0, 0]
    assert {file.name for file in out.iterdir()} == {".metadata", "__0_0.distcp", "__1_0.distcp"}
    live = torch.load(f"{out}.pt")
    loaded = load_checkpoint(out, base=tmp_path / "base")
    assert all(torch.equal(loaded.model.state_dict()[name], value) for name, value in live["model"].items())
    assert_same_state(loaded.optimizer_state, adamw_state(restore_optimizer(live["optim"], loaded.model), loaded.model))
    assert {hyper.lr_scale for hyper in loaded.optimizer_state.hyper.values()} == {1.0, 2.0}


@pytest.fixture
def directory(bases: Path, tmp_path: Path) -> Path:
    """A full directory with everything beside, of weights that are not those of the safetensors beside."""
    path = shutil.copytree(bases / "qwen2", tmp_path / "dcp")
    model = AutoModelForCausalLM.from_pretrained(path)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    save_dcp(by_name(model, optimizer), path)
    return path


def test_load_prefers_dcp_to_files(directory: Path, bases: Path) -> None:
    torch.save(torch.optim.SGD(nn.Linear(1, 1).parameters()).state_dict(), directory / "optimizer.pt")
    loaded = load_checkpoint(directory)
    beside = load_checkpoint(bases / "qwen2", optimizer=False).model
    assert all(not torch.equal(p, beside.get_parameter(name)) for name, p in loaded.model.named_parameters())
    assert set(loaded.optimizer_state.step.values()) == {1}


def test_load_reads_optimizer_file_beside_dcp_weights(directory: Path) -> None:
    model = load_checkpoint(directory, optimizer=False).model
    save_dcp({"model": get_model_state_dict(model)}, directory)
    torch.save(torch.optim.AdamW(model.parameters(), lr=0.25).state_dict(), directory / "optimizer.pt")
    loaded = load_checkpoint(directory)
    assert loaded.optimizer_state.lr == 0.25
    assert_weights(loaded.model, model)


def test_load_dcp_optimizer_before_first_step(directory: Path) -> None:
    model = load_checkpoint(directory, optimizer=False).model
    save_dcp({"optimizer": torch.optim.AdamW(model.parameters(), lr=0.5).state_dict()}, directory)
    loaded = load_checkpoint(directory)
    assert (loaded.optimizer_state.lr, set(loaded.optimizer_state.step.values())) == (0.5, {0})
    assert not any(value.any() for value in loaded.optimizer_state.exp_avg.values())


def test_load_reads_no_moments_without_optimizer(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    real = torch.load
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: read.append("") or real(*args, **kwargs))
    model = load_checkpoint(directory, optimizer=False).model
    assert len(read) == len(model.state_dict())


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_dtype_is_as_in_the_shards_or_as_asked(dtype: torch.dtype | None, directory: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64)
    save_dcp({"model": get_model_state_dict(model)}, directory)
    loaded = load_checkpoint(directory, dtype=dtype, optimizer=False)
    assert {p.dtype for p in loaded.model.parameters()} == {dtype or torch.float64}


def test_every_id_that_ends_a_completion_is_listed(directory: Path) -> None:
    config = json.loads((directory / "generation_config.json").read_text())
    (directory / "generation_config.json").write_text(json.dumps(config | {"eos_token_id": [2, 1]}))
    assert load_checkpoint(directory).eos_token_ids == (2, 1)


def test_a_missing_config_is_named(directory: Path) -> None:
    (directory / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no config\.json; .*pass base="):
        load_checkpoint(directory)


def test_load_names_missing_dcp_key(directory: Path, bases: Path) -> None:
    (directory / "model.safetensors").unlink()
    save_dcp({"network": AutoModelForCausalLM.from_pretrained(bases / "qwen2").state_dict()}, directory)
    with pytest.raises(FileNotFoundError, match=r"or \{'model': \.\.\.\} with torch\.distributed\.checkpoint\.save"):
        load_checkpoint(directory, optimizer=False)
    with pytest.raises(FileNotFoundError, match=r"or \{'optim': \.\.\.\} with torch\.distributed\.checkpoint\.save"):
        load_checkpoint(shutil.copytree(bases / "qwen2", directory, dirs_exist_ok=True))


def test_load_refuses_dcp_without_tensors(directory: Path) -> None:
    save_dcp({"model": {"epoch": 3}}, directory)
    with pytest.raises(ValueError, match=r"do not fit .*config\.json: missing"):
        load_checkpoint(directory, optimizer=False)


def test_weights_that_do_not_fit_the_config_are_refused(directory: Path) -> None:
    weights = load_checkpoint(directory, optimizer=False).model.state_dict()
    save_dcp({"model": {f"module.{name}": value for name, value in weights.items()}}, directory)
    with pytest.raises(ValueError, match=r"do not fit .*config\.json: missing or of another shape are \['lm_head"):
        load_checkpoint(directory, optimizer=False)


def test_an_adapter_with_a_missing_weight_is_refused(bases: Path, tmp_path: Path) -> None:
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(bases / "llama"), LoraConfig(task_type="CAUSAL_LM", **LORA["lora"])
    )
    model.peft_config["default"].save_pretrained(tmp_path)
    weights = model.state_dict()
    del weights["base_model.model.model.layers.1.self_attn.q_proj.lora_B.default.weight"]
    save_dcp({"model": weights}, tmp_path)
    with pytest.raises(ValueError, match=r"do not fit its adapter_config\.json: missing are \['base_model"):
        load_checkpoint(tmp_path, base=bases / "llama", optimizer=False)


@pytest.mark.parametrize("layout", [by_name, flattened, by_id])
def test_another_optimizer_is_refused_before_the_weights_are_read(
    layout: Callable[..., dict[str, Any]], directory: Path
) -> None:
    model = load_checkpoint(directory, optimizer=False).model
    optimizer = torch.optim.RMSprop(model.parameters())
    save_dcp(layout(model, optimizer) | {"model": {"nothing": torch.zeros(1)}}, directory)
    with pytest.raises(TypeError, match=r"seems to be of torch\.optim\.RMSprop; supported are torch\.optim\.AdamW"):
        load_checkpoint(directory)


def _rewrite(directory: Path, change: Callable[[Any], Any]) -> None:
    """The metadata as the real classes, changed."""
    metadata = pickle.loads((directory / ".metadata").read_bytes())
    (directory / ".metadata").write_bytes(pickle.dumps(change(metadata) or metadata))


@pytest.mark.parametrize("protocol", [2, 4])
def test_metadata_is_never_unpickled(protocol: int, directory: Path, tmp_path: Path) -> None:
    metadata = pickle.loads((directory / ".metadata").read_bytes())
    metadata.planner_data["extra"] = MaliciousPickle(tmp_path / "ran")
    (directory / ".metadata").write_bytes(pickle.dumps(metadata, protocol=protocol))
    with pytest.raises(ValueError, match=r"\.metadata is damaged or no metadata .*names posix\.mkdir, which"):
        load_checkpoint(directory)
    assert not (tmp_path / "ran").exists()
    # it is a live one: torch's own reader sets it off
    dcp.FileSystemReader(directory).read_metadata()
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["eval", "__import__", "setattr"])
def test_metadata_admits_only_known_classes(name: str, directory: Path) -> None:
    _rewrite(
        directory,
        lambda metadata: metadata.planner_data.update(extra=getattr(__builtins__, name, None) or __builtins__[name]),
    )
    with pytest.raises(ValueError, match=rf"names builtins\.{name}, which no such metadata holds"):
        read_values(directory, ["model"])


def test_metadata_ignores_getattr_of_python_3_11(directory: Path) -> None:
    class Member:
        def __reduce__(self) -> tuple[Any, ...]:
            return getattr, (torch.Size([1]), "__class__")

    def as_written_there(metadata: Any) -> None:
        metadata.storage_meta = Member()

    expected = read_values(directory, ["model"])
    _rewrite(directory, as_written_there)
    assert list(read_values(directory, ["model"])) == list(expected)


def test_dcp_values_are_never_unpickled(directory: Path, tmp_path: Path) -> None:
    save_dcp(
        {
            "model": {"weight": torch.zeros(1)},
            "optim": {"state": {}, "param_groups": [{"lr": MaliciousPickle(tmp_path / "ran")}]},
        },
        directory,
    )
    with pytest.raises(ValueError, match=r"optim\.param_groups\.0\.lr in .*never unpickled"):
        load_checkpoint(directory)
    assert not (tmp_path / "ran").exists()


def test_metadata_of_torch_before_2_4_is_read(directory: Path) -> None:
    from torch.distributed._shard.sharded_tensor.metadata import TensorProperties

    def older(metadata: Any) -> None:
        for field in ("storage_meta", "version"):
            vars(metadata).pop(field, None)
        for stored in metadata.state_dict_metadata.values():
            if hasattr(stored, "properties"):
                stored.properties = TensorProperties(dtype=stored.properties.dtype)

    expected = read_values(directory, ["model"])
    _rewrite(directory, older)
    found = read_values(directory, ["model"])
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def _first_spot(metadata: Any) -> Any:
    return next(iter(metadata.storage_data.values()))


DAMAGE: dict[str, Callable[[Any], Any]] = {
    "elsewhere": lambda metadata: setattr(_first_spot(metadata), "relative_path", "../dcp/__0_0.distcp"),
    "transformed": lambda metadata: setattr(_first_spot(metadata), "transform_descriptors", ["stream.zstd"]),
    "no place": lambda metadata: metadata.storage_data.clear(),
    "no metadata": lambda metadata: {"state_dict_metadata": {}},
    "no tensor": lambda metadata: metadata.state_dict_metadata.update(extra=3),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_metadata_refuses_damage(damage: str, directory: Path) -> None:
    _rewrite(directory, DAMAGE[damage])
    with pytest.raises(ValueError, match=r"\.metadata is damaged or no metadata of torch\.distributed\.checkpoint"):
        read_values(directory, ["model"])


def test_read_values_refuses_truncated_files(directory: Path) -> None:
    data = (directory / "__0_0.distcp").read_bytes()
    (directory / "__0_0.distcp").write_bytes(data[:100])
    with pytest.raises(ValueError, match=r"in .*__0_0\.distcp is damaged"):
        read_values(directory, ["model"])
    (directory / "__0_0.distcp").unlink()
    with pytest.raises(FileNotFoundError, match=r"__0_0\.distcp"):
        read_values(directory, ["model"])
    (directory / ".metadata").write_bytes((directory / ".metadata").read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"\.metadata is damaged"):
        has_values(directory, ["model"])


def test_read_values_refuses_incomplete_tensor(directory: Path) -> None:
    def halved(metadata: Any) -> None:
        stored = metadata.state_dict_metadata["model.model.norm.weight"]
        stored.size = torch.Size([16])

    _rewrite(directory, halved)
    with pytest.raises(ValueError, match=r"model\.model\.norm\.weight of shape \(16,\) is not all in"):
        read_values(directory, ["model"])


def test_has_values_is_false_without_metadata(tmp_path: Path) -> None:
    assert not has_values(tmp_path, ["model"])
