"""Values and metadata of torch.distributed.checkpoint are read without unpickling, and damage is named."""

from __future__ import annotations

import builtins
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.dcp_files import MaliciousPickle, rewrite_metadata, save_dcp
from torch.distributed import checkpoint as dcp

from fx_influence.interop.checkpoints.dcp.read import has_values, read_values
from fx_influence.interop.checkpoints.load import load_checkpoint

pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.distributed is",  # written in one process
    "ignore:`is_gradient_checkpointing` is deprecated",  # peft reads it
)


@pytest.mark.parametrize("protocol", [2, 4])
def test_metadata_is_never_unpickled(protocol: int, dcp_directory: Path, tmp_path: Path) -> None:
    metadata = pickle.loads((dcp_directory / ".metadata").read_bytes())
    metadata.planner_data["extra"] = MaliciousPickle(tmp_path / "ran")
    (dcp_directory / ".metadata").write_bytes(pickle.dumps(metadata, protocol=protocol))
    with pytest.raises(ValueError, match=r"\.metadata is damaged or of another kind .*names posix\.mkdir, which"):
        load_checkpoint(dcp_directory)
    assert not (tmp_path / "ran").exists()
    # it is a live one: torch's own reader sets it off
    dcp.FileSystemReader(dcp_directory).read_metadata()
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["eval", "__import__", "setattr"])
def test_metadata_admits_only_known_classes(name: str, dcp_directory: Path) -> None:
    rewrite_metadata(
        dcp_directory,
        lambda metadata: metadata.planner_data.update(extra=getattr(builtins, name)),
    )
    with pytest.raises(ValueError, match=rf"names builtins\.{name}, which no such metadata holds"):
        read_values(dcp_directory, ["model"])


def test_metadata_ignores_getattr_of_python_3_11(dcp_directory: Path) -> None:
    class Member:
        def __reduce__(self) -> tuple[Any, ...]:
            return getattr, (torch.Size([1]), "__class__")

    def as_written_there(metadata: Any) -> None:
        metadata.storage_meta = Member()

    expected = read_values(dcp_directory, ["model"])
    rewrite_metadata(dcp_directory, as_written_there)
    assert list(read_values(dcp_directory, ["model"])) == list(expected)


def test_dcp_values_are_never_unpickled(dcp_directory: Path, tmp_path: Path) -> None:
    save_dcp(
        {
            "model": {"weight": torch.zeros(1)},
            "optim": {"state": {}, "param_groups": [{"lr": MaliciousPickle(tmp_path / "ran")}]},
        },
        dcp_directory,
    )
    with pytest.raises(ValueError, match=r"optim\.param_groups\.0\.lr in .*never unpickled"):
        load_checkpoint(dcp_directory)
    assert not (tmp_path / "ran").exists()


def test_metadata_of_torch_before_2_4_is_read(dcp_directory: Path) -> None:
    from torch.distributed._shard.sharded_tensor.metadata import TensorProperties

    def older(metadata: Any) -> None:
        for field in ("storage_meta", "version"):
            vars(metadata).pop(field, None)
        for stored in metadata.state_dict_metadata.values():
            if hasattr(stored, "properties"):
                stored.properties = TensorProperties(dtype=stored.properties.dtype)

    expected = read_values(dcp_directory, ["model"])
    rewrite_metadata(dcp_directory, older)
    values = read_values(dcp_directory, ["model"])
    assert list(values) == list(expected)
    assert all(torch.equal(values[name], value) for name, value in expected.items())


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
def test_metadata_refuses_damage(damage: str, dcp_directory: Path) -> None:
    rewrite_metadata(dcp_directory, DAMAGE[damage])
    with pytest.raises(
        ValueError,
        match=r"\.metadata is damaged or of another kind .*; expected metadata of torch\.distributed\.checkpoint",
    ):
        read_values(dcp_directory, ["model"])


def test_read_values_refuses_truncated_files(dcp_directory: Path) -> None:
    data = (dcp_directory / "__0_0.distcp").read_bytes()
    (dcp_directory / "__0_0.distcp").write_bytes(data[:100])
    with pytest.raises(ValueError, match=r"in .*__0_0\.distcp is damaged"):
        read_values(dcp_directory, ["model"])
    (dcp_directory / "__0_0.distcp").unlink()
    with pytest.raises(FileNotFoundError, match=r"__0_0\.distcp"):
        read_values(dcp_directory, ["model"])
    (dcp_directory / ".metadata").write_bytes((dcp_directory / ".metadata").read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"\.metadata is damaged"):
        has_values(dcp_directory, ["model"])


@pytest.mark.parametrize(
    ("contents", "cause"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "a pointer of git-lfs.*Run git lfs pull"),
        (b"<!DOCTYPE html><html>", "an HTML or XML page.*Download it again"),
    ],
)
@pytest.mark.parametrize("file", [".metadata", "__0_0.distcp"])
def test_read_values_names_what_stands_for_a_file(file: str, contents: bytes, cause: str, dcp_directory: Path) -> None:
    (dcp_directory / file).write_bytes(contents)
    with pytest.raises(ValueError, match=rf"{file} is damaged: {cause}"):
        read_values(dcp_directory, ["model"])


def test_read_values_refuses_incomplete_tensor(dcp_directory: Path) -> None:
    def halved(metadata: Any) -> None:
        stored = metadata.state_dict_metadata["model.model.norm.weight"]
        stored.size = torch.Size([16])

    rewrite_metadata(dcp_directory, halved)
    with pytest.raises(ValueError, match=r"model\.model\.norm\.weight of shape \(16,\) is not complete in"):
        read_values(dcp_directory, ["model"])


def test_has_values_is_false_without_metadata(tmp_path: Path) -> None:
    assert not has_values(tmp_path, ["model"])
