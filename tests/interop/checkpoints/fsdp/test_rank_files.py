"""Files of ranks that are missing, damaged or do not belong together: each is named."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.dcp_files import MaliciousPickle
from torch import Tensor
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor import Shard, init_from_local_shards

from fx_influence.interop.checkpoints.files.unpickle import Inert, LocalShard, load_inert
from fx_influence.interop.checkpoints.fsdp.flat_parameters import module_units
from fx_influence.interop.checkpoints.fsdp.rank_files import RankValues, join, rank_files, read_rank_weights


def names(world_size: int) -> list[str]:
    return [f"model_world_size_{world_size}_rank_{rank}.pt" for rank in range(world_size)]


def write(directory: Path, world_size: int, *ranks: Any) -> list[Path]:
    for name, value in zip(names(world_size), ranks, strict=False):
        torch.save(value, directory / name)
    return [directory / name for name in names(world_size)]


def shard(values: Tensor, coordinate: int | None, length: int = 3, axis: int = 0) -> LocalShard:
    return LocalShard(values, (length, 2), axis, coordinate)


def joined(*shards: LocalShard) -> Tensor:
    value: Tensor = join(RankValues("w.", [Path(name) for name in names(len(shards))], list(shards)))
    return value


def test_join_orders_shards_by_coordinate() -> None:
    rows = torch.arange(6.0).view(3, 2)
    assert torch.equal(joined(shard(rows[2:], 1), shard(rows[:2], 0)), rows)
    # two replicas of two shards each, and a rank without rows
    assert torch.equal(joined(*(shard(rows[:2], 0), shard(rows[2:], 1)) * 2), rows)
    assert torch.equal(joined(shard(rows[:2], 0), shard(rows[2:], 1), shard(rows[3:], 2)), rows)
    assert torch.equal(joined(shard(rows[:2], None), shard(rows[2:], None)), rows)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (shard(torch.zeros(2, 2), 1), r"w of shape \(3, 2\) has shards of the shapes \[\(2, 2\), \(2, 2\)\]"),
        (shard(torch.zeros(1, 2), 2), "has shards of the shapes"),
        (shard(torch.zeros(1, 3), 1), "has shards of the shapes"),
        (shard(torch.zeros(1, 2), 1, length=4), r"rank_1\.pt is of shape \(4, 2\)"),
        (torch.zeros(1, 2), r"w in model_world_size_2_rank_1\.pt is a Tensor; expected a LocalShard"),
        (Inert(), "which is not read; expected a DTensor or ShardedTensor"),
    ],
)
def test_join_refuses_shards_that_do_not_fit(second: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        joined(shard(torch.zeros(2, 2), 0), second)


def test_join_refuses_plain_tensors_that_differ(tmp_path: Path) -> None:
    files = write(tmp_path, 2, {"w": torch.zeros(2)}, {"w": torch.ones(2)})
    with pytest.raises(ValueError, match=r"w in .*rank_1\.pt differs from .*rank_0\.pt, and is not marked as a shard"):
        read_rank_weights(files)


def test_rank_files_name_missing_ranks(tmp_path: Path) -> None:
    write(tmp_path, 3, {}, {})
    with pytest.raises(FileNotFoundError, match=r"has no model_world_size_3_rank_2\.pt \(1 of 3 ranks\)"):
        rank_files(tmp_path, "model")
    write(tmp_path, 1, {})
    with pytest.raises(ValueError, match=r"model files of the world sizes \[1, 3\]; expected one"):
        rank_files(tmp_path, "model")
    assert rank_files(tmp_path, "optim") == []


@pytest.mark.parametrize(("first", "second", "who"), [({"w": 1}, {}, "rank_1"), ({}, {"w": 1}, "rank_1")])
def test_read_names_rank_with_other_keys(first: Any, second: Any, who: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"{who}\.pt has (no )?w"):
        read_rank_weights(write(tmp_path, 2, first, second))


def test_load_runs_nothing_that_a_file_names(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2), "harm": MaliciousPickle(tmp_path / "made")}, tmp_path / "file.pt")
    loaded = load_inert(tmp_path / "file.pt")
    assert torch.equal(loaded["w"], torch.ones(2))
    assert (repr(loaded["harm"]), isinstance(loaded["harm"], Inert)) == ("posix.mkdir", True)
    assert not (tmp_path / "made").exists()


@pytest.fixture
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group")
@pytest.mark.filterwarnings("ignore:Please use DTensor instead:FutureWarning")  # of what is saved
def test_load_refuses_two_shards_on_a_rank(tmp_path: Path) -> None:
    rows = torch.arange(4.0).view(2, 2)
    shards = [Shard(rows[k : k + 1], ShardMetadata([k, 0], [1, 2], "rank:0/cpu")) for k in range(2)]
    torch.save({"w": init_from_local_shards(shards[:1], 1, 2)}, tmp_path / "file.pt")
    assert torch.equal(load_inert(tmp_path / "file.pt")["w"].local, rows[:1])
    torch.save({"w": init_from_local_shards(shards, 2, 2)}, tmp_path / "file.pt")
    with pytest.raises(ValueError, match=r"a ShardedTensor of shape \(2, 2\) has 2 shards here, divided along \[0\]"):
        load_inert(tmp_path / "file.pt")


@pytest.mark.parametrize("size", [0, 100, -1])
def test_load_names_truncated_file(size: int, tmp_path: Path) -> None:
    file = tmp_path / "file.pt"
    torch.save({"w": torch.ones(1000)}, file)
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"file\.pt is damaged: (empty|cut off)"):
        load_inert(file)


def test_units_take_tied_parameters_once() -> None:
    model = torch.nn.Sequential(torch.nn.Embedding(3, 2), torch.nn.Linear(2, 2), torch.nn.Linear(2, 3, bias=False))
    model[2].weight = model[0].weight
    units = module_units(model, lambda module: isinstance(module, torch.nn.Linear))
    assert [list(unit.shapes) for unit in units] == [["0.weight"], ["1.weight", "1.bias"]]
    assert [unit.numel for unit in units] == [6, 6]
