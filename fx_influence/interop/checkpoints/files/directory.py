"""Files of a checkpoint directory: their names, the places where they are looked for, and errors that name them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from fx_influence.core.checks import capitalized
from fx_influence.interop.checkpoints.dcp.read import has_values
from fx_influence.interop.checkpoints.files.damage import first_damaged_file

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model")
OPTIMIZER = ("optimizer.pt", "optimizer.bin")
PARAM_NAMES = "optimizer_param_names.json"

# Keys of the dict that was saved, and the subdirectories that accelerate and NeMo-RL save their values in.
MODEL_KEYS, MODEL_SUBDIRECTORIES = ("model",), ("pytorch_model_fsdp_0", "weights", "weights/model")
OPTIMIZER_KEYS = ("optim", "optimizer", "optimizers")
OPTIMIZER_SUBDIRECTORIES = ("optimizer_0", "optimizer", "optimizer/optim")


def require_directory(field: str, path: str | Path) -> Path:
    """Return ``path`` as a ``Path``; raise ``FileNotFoundError``, naming ``field``, if it is not a directory."""
    if not Path(path).is_dir():
        raise FileNotFoundError(f"{field} is {str(path)!r}; expected a local checkpoint directory")
    return Path(path)


@contextmanager
def reporting_damage(subject: str, path: Path) -> Iterator[None]:
    """Raise errors of file readers inside the block as a ``ValueError`` that names the damaged file and its directory.

    Readers in Rust raise bare ``Exception``, and ``json`` names no file. Errors that name a file stay unchanged, and so
    do errors about pickles, which do not mean damage. A file that is visibly no checkpoint is named with the cause.
    """
    try:
        yield
    except Exception as error:
        if cause := first_damaged_file(path):
            raise ValueError(f"{subject} in {path} cannot be read: {cause}") from error
        _raise_damage(subject, path, error)
        raise


def _raise_damage(subject: str, path: Path, error: Exception) -> None:
    """Raise an error of a file reader as one that names subject and directory, unless it names its file."""
    if isinstance(error, (SafetensorError, json.JSONDecodeError, EOFError)):
        message = f"{subject} in {path} is damaged: {error}; expected a complete file. Copy or save it there again"
        raise ValueError(message) from error
    if type(error) in (Exception, TypeError, KeyError) or "PytorchStreamReader" in str(error):
        message = f"{subject} in {path} cannot be read: {error}; expected a complete file. Copy or save it there again"
        raise ValueError(message) from error


def base_directory(path: Path, base: str | Path | None) -> Path:
    """Return the directory of an adapter's base model, by default the one that ``adapter_config.json`` names."""
    if base is not None:
        return require_directory("base", base)
    config = path / "adapter_config.json"
    if not config.is_file():
        raise FileNotFoundError(
            f"base is None, and {path} has the weights of an adapter alone; expected a local directory. Pass base=, "
            "the directory of the base model"
        )
    name = json.loads(config.read_text()).get("base_model_name_or_path")
    if not name or not Path(name).is_dir():
        raise FileNotFoundError(
            f"base_model_name_or_path in {config} is {name!r}; expected a local directory, since nothing is "
            "downloaded. Pass base=, the directory of the base model"
        )
    return Path(name)


def read_adapter_config(path: Path) -> Any:
    """Return peft's config of a directory, for an adapter that is to be trained, on any base model."""
    from peft import PeftConfig

    config = PeftConfig.from_pretrained(str(path), local_files_only=True)
    # peft would warn of a base model that has moved since.
    config.inference_mode, config.base_model_name_or_path = False, None
    return config


def find_dcp_directory(path: Path, subdirectories: Sequence[str], names: Sequence[str]) -> Path | None:
    """Return the directory in which ``torch.distributed.checkpoint`` saved a value, None if there is none.

    Args:
        path: a checkpoint directory.
        subdirectories: of ``path``, where it is looked for first; then in ``path`` itself.
        names: keys of the saved dict, any of which counts.
    """
    directories = (*(path / name for name in subdirectories), path)
    return next((directory for directory in directories if has_values(directory, names)), None)


def read_param_names(path: Path) -> list[list[str]] | None:
    """Return the parameters' names group by group, None if they are not saved beside the state."""
    return json.loads((path / PARAM_NAMES).read_text()) if (path / PARAM_NAMES).is_file() else None


def require_model_files(model_path: Path, path: Path, is_adapter: bool, elsewhere: bool) -> None:
    """Require the config and the weights of a checkpoint.

    Args:
        model_path: directory of the model's ``config.json``, and of its weights unless they are ``elsewhere``.
        path: directory of the adapter's weights, if there is one.
        is_adapter: whether ``path`` is a PEFT directory.
        elsewhere: whether the weights, of the adapter if there is one, are in other files than those of transformers.

    Raises:
        FileNotFoundError: for a missing config, or weights that are in none of their files.
    """
    remedy = "save the model there with save_pretrained, or {'model': ...} with torch.distributed.checkpoint.save"
    if elsewhere and not is_adapter:
        require_any_file(model_path, ("config.json",), "save it there with model.config.save_pretrained, or pass base=")
        return
    require_any_file(model_path, ("config.json",), "save the model there with save_pretrained")
    require_any_file(model_path, WEIGHTS, remedy)
    if is_adapter and not elsewhere:
        require_any_file(path, ADAPTER_WEIGHTS, "save the adapter there with save_pretrained")


def require_any_file(path: Path, files: tuple[str, ...], remedy: str) -> None:
    """Require any of some files in a directory.

    Args:
        path: the directory.
        files: names of the files.
        remedy: what to do, a sentence without its full stop.

    Raises:
        FileNotFoundError: if there is none of them.
    """
    if not any((path / file).is_file() for file in files):
        expected = "it" if len(files) == 1 else "one of them"
        raise FileNotFoundError(f"{path} has no {' or '.join(files)}; expected {expected}. {capitalized(remedy)}")
