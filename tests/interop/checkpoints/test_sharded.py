"""AdamW's state of sharded models, and checkpoints of which every rank reads its own shards."""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.dcp_files import MaliciousPickle, save_dcp
from helpers.ranks import run_on_ranks
from helpers.versions import TORCH
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Qwen2Config

from fx_influence.interop.checkpoints.dcp.read import locate_values, read_slice, read_values
from fx_influence.interop.checkpoints.optimizer_state import restore_optimizer
from fx_influence.interop.optimizers import adamw_state

FSDP2 = pytest.mark.skipif(TORCH < (2, 6), reason="fully_shard is of torch 2.6")
if TORCH >= (2, 6):
    from helpers.ranks_states import by_name, tiny, trained

    from fx_influence.interop.checkpoints.sharded import load_sharded_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")  # written in one process


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("states")


@pytest.fixture(scope="module")
def written(directory: Path) -> dict[str, Any]:
    """Train on two ranks and return the live state; unusable states are saved in the same directory."""
    (directory / "out").mkdir()
    return run_on_ranks(2, "ranks_states.py", directory / "out", "write", directory)[0]


@pytest.fixture(scope="module")
def single_process(directory: Path) -> tuple[nn.Module, torch.optim.AdamW]:
    """Train in one process, and save with full tensors."""
    model = tiny()
    optimizer = trained(model)
    save_dcp(by_name(model, optimizer), directory / "by name")
    save_dcp({"model": model.state_dict(), "optim": named_groups(model, optimizer)}, directory / "by id")
    return model, optimizer


def named_groups(model: nn.Module, optimizer: torch.optim.AdamW) -> dict[str, Any]:
    """Return the state by ids, which DCP turns into strings, with the names of each group."""
    names = {p: name for name, p in model.named_parameters()}
    saved = optimizer.state_dict()
    for group, live in zip(saved["param_groups"], optimizer.param_groups, strict=True):
        group["param_names"] = [names[p] for p in live["params"]]
    return saved


@pytest.fixture(scope="module")
def unusable(directory: Path, written: dict[str, Any]) -> None:
    for name in ("truncated", "missing file"):
        shutil.copytree(directory / "sharded", directory / name)
    file = directory / "truncated" / "__1_0.distcp"
    file.write_bytes(file.read_bytes()[:200])
    (directory / "missing file" / "__1_0.distcp").unlink()
    model = tiny()
    weights = {"model": model.state_dict()}
    save_dcp(
        {**weights, "optim": {"state": {}, "param_groups": [{"lr": MaliciousPickle(directory / "ran")}]}},
        directory / "bomb",
    )
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    save_dcp({**weights, "optim": sgd.state_dict()}, directory / "sgd")
    save_dcp(weights, directory / "model alone")


@pytest.fixture(scope="module")
def three_ranks(directory: Path, written: Any, single_process: Any, unusable: None) -> list[dict[str, Any]]:
    """Return what three ranks read of all saved states."""
    (directory / "read").mkdir()
    return run_on_ranks(3, "ranks_states.py", directory / "read", "read", directory)


def same(actual: Any, expected: Any) -> None:
    assert type(actual) is type(expected)
    if isinstance(expected, Tensor):
        assert torch.equal(actual, expected)
    elif isinstance(expected, (dict, list)):
        assert len(actual) == len(expected)
        keys = expected if isinstance(expected, dict) else range(len(expected))
        for key in keys:
            same(actual[key], expected[key])
    else:
        assert actual == expected


@pytest.mark.slow
@FSDP2
def test_load_sharded_from_two_ranks_on_three(written: dict[str, Any], three_ranks: list[dict[str, Any]]) -> None:
    for answer in three_ranks:
        same(answer["sharded"]["weights"], written["weights"])
        same(answer["sharded"]["state"], written["state"])


@pytest.mark.slow
@FSDP2
@pytest.mark.parametrize("layout", ["by name", "by id"])
def test_load_sharded_from_one_process_on_three_ranks(
    layout: str, single_process: tuple[nn.Module, torch.optim.AdamW], directory: Path, three_ranks: list[dict[str, Any]]
) -> None:
    model, optimizer = single_process
    expected = full_state(adamw_state(optimizer, model))
    assert any(x.any() for x in expected[2].values())  # amsgrad's
    for answer in three_ranks:
        same(answer[layout]["weights"], {name: p.detach() for name, p in model.named_parameters()})
        same(answer[layout]["state"], expected)
    # and it is what one process reads
    plain = tiny()
    plain.load_state_dict(read_values(directory / layout, ["model"]))
    again = restore_optimizer(read_values(directory / layout, ["optim"]), plain)
    same(full_state(adamw_state(again, plain)), expected)


def full_state(state: Any) -> list[Any]:
    return [*state[:3], state.step, {name: dataclasses.astuple(hyper) for name, hyper in state.hyper.items()}, state.lr]


@pytest.mark.slow
@FSDP2
@pytest.mark.parametrize("layout", ["sharded", "by name", "by id"])
def test_load_sharded_allocates_no_more_than_a_shard(layout: str, three_ranks: list[dict[str, Any]]) -> None:
    largest = max(p.nbytes for p in tiny().parameters())
    for answer in three_ranks:
        assert answer[layout]["placed"]
        assert 0 < answer[layout]["largest made"] <= answer[layout]["largest shard"] <= largest / 2


@pytest.mark.slow
@FSDP2
def test_restore_slices_full_state_for_shards(
    single_process: tuple[nn.Module, torch.optim.AdamW], three_ranks: list[dict[str, Any]]
) -> None:
    expected = full_state(adamw_state(single_process[1], single_process[0]))
    for answer in three_ranks:
        same(answer["restored"]["state"], expected)


@pytest.mark.slow
@FSDP2
@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("truncated", r"ValueError: on rank \d: .*__1_0\.distcp is damaged"),
        ("missing file", r"FileNotFoundError: on rank \d: .*__1_0\.distcp"),
        ("bomb", r"ValueError: on rank 0: optim\.param_groups\.0\.lr in .*never unpickled"),
        ("sgd", r"TypeError: on rank 0: .*torch\.optim\.SGD; expected torch\.optim\.AdamW"),
        (
            "model alone",
            r"FileNotFoundError: on rank 0: neither .*model alone nor .*optimizer_0.*key optim or optimizer",
        ),
        ("nowhere", r"FileNotFoundError: on rank 0: path is .*nowhere'; expected a local checkpoint directory"),
        ("another shape", r"token\.weight has shape \(41, 4\) there and \(41, 8\) in the model;.*\(\d+ in all\)"),
        ("on meta", r"ValueError: on rank 0: .*token\.weight is on the meta device"),
        ("one bad value", r"ValueError: on rank 0: optimizer state exp_avg of head.bias holds nan \(1 such values\)"),
        (
            "whole state",
            r"ValueError: on rank 0: optimizer state exp_avg of \S+ and the parameter are a DTensor and a plain tensor",
        ),
    ],
)
def test_load_sharded_raises_errors_on_all_ranks(
    mistake: str, message: str, three_ranks: list[dict[str, Any]], directory: Path
) -> None:
    for answer in three_ranks:
        assert re.search(message, answer["refusals"][mistake]), answer["refusals"][mistake]
    assert not (directory / "ran").exists()


@FSDP2
def test_load_sharded_adapter_leaves_base_weights(tmp_path: Path) -> None:
    def adapted(seed: int) -> nn.Module:
        torch.manual_seed(0)
        config = Qwen2Config(vocab_size=11, hidden_size=8, intermediate_size=8, num_hidden_layers=1, pad_token_id=0)
        config.num_attention_heads = config.num_key_value_heads = 2
        base = AutoModelForCausalLM.from_config(config)
        model = get_peft_model(base, LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj"]))
        torch.manual_seed(seed)
        for p in model.parameters():
            if p.requires_grad:
                nn.init.normal_(p)
        return model

    saved, model = adapted(1), adapted(2)
    save_dcp({"model": get_peft_model_state_dict(saved)}, tmp_path)
    assert load_sharded_checkpoint(tmp_path, model, optimizer=False) is None
    assert all(torch.equal(p, model.get_parameter(name)) for name, p in saved.named_parameters())
    del (weights := get_peft_model_state_dict(saved))[next(iter(weights))]
    save_dcp({"model": weights}, tmp_path)
    with pytest.raises(ValueError, match=r"q_proj.lora_A.default.weight of shape \(2, 8\) is missing \(1 in all\)"):
        load_sharded_checkpoint(tmp_path, model, optimizer=False)


KINDS = {
    "float32": torch.arange(105, dtype=torch.float32).view(7, 5, 3),
    "bfloat16": torch.arange(105, dtype=torch.bfloat16).view(7, 5, 3),
    "integers, read whole": torch.arange(105).view(7, 5, 3),
    "transposed, read whole": torch.arange(105.0).view(5, 7, 3).transpose(0, 1),
}


@pytest.mark.parametrize("max_read_bytes", [1, 70, 2**24])
@pytest.mark.parametrize("kind", KINDS)
def test_read_slice_matches_indexing(kind: str, max_read_bytes: int, tmp_path: Path) -> None:
    tensor = KINDS[kind]
    save_dcp({"model": {"w": tensor, "other": torch.zeros(1000)}}, tmp_path)
    stored = locate_values(tmp_path, ["model"])["w"]
    for box in [(slice(0, 7), slice(0, 5), slice(0, 3)), (slice(2, 6), slice(1, 4), slice(2, 3)), (slice(7, 7),) * 3]:
        out = torch.full_like(tensor[box], 99, dtype=torch.float64)
        read_slice(stored, [index.start for index in box], out, max_read_bytes)
        assert torch.equal(out, tensor[box].double())


def test_read_slice_refuses_incomplete_slice(tmp_path: Path) -> None:
    save_dcp({"model": {"w": torch.zeros(4, 3)}}, tmp_path)
    stored = locate_values(tmp_path, ["model"])["w"]
    with pytest.raises(ValueError, match=r"model\.w of shape \(4, 3\) is not complete in"):
        read_slice(stored, [2, 0], torch.empty(3, 3))
