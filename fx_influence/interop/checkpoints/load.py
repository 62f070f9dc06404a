"""A saved training state from a checkpoint directory: policy, tokenizer and AdamW's state by name.

Nothing is downloaded, and of pickled files nothing is read but tensors and plain values.
"""

from __future__ import annotations

import functools
import json
import pickle
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor

from fx_influence.core.display import record_line
from fx_influence.interop.checkpoints.dcp import has_part, load_values, read_part
from fx_influence.interop.checkpoints.optimizer_state import require_adamw_state_dict, restore_optimizer
from fx_influence.interop.optimizers import adamw_state
from fx_influence.types import AdamWState

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model")
OPTIMIZER = ("optimizer.pt", "optimizer.bin")
PARAM_NAMES = "optimizer_param_names.json"

# keys of the dict that was saved, and the sub-directories that accelerate saves them in
MODEL_PART, MODEL_SHARDS = ("model",), "pytorch_model_fsdp_0"
OPTIMIZER_PART, OPTIMIZER_SHARDS = ("optim", "optimizer"), "optimizer_0"


class Checkpoint(NamedTuple):
    """A saved training state.

    ``model``: the causal LM or ``PeftModel``, in eval mode. ``tokenizer``: its tokenizer.
    ``optimizer_state``: AdamW's state by parameter name, None where ``optimizer=False`` was asked.
    ``eos_token_ids``: every id that ends a completion. ``path``: the directory that was read.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase
    optimizer_state: AdamWState | None
    eos_token_ids: tuple[int, ...]
    path: Path

    def __repr__(self) -> str:
        return record_line(self)


def load_checkpoint(
    path: str | Path,
    base: str | Path | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    *,
    optimizer: bool = True,
    param_names: Sequence[Sequence[str]] | None = None,
) -> Checkpoint:
    """Load a checkpoint directory, without the network: full or PEFT, of one process or many.

    ``path``: a directory with ``config.json``, tokenizer files, and each of these in the first place that has it:

    - weights: a directory of ``torch.distributed.checkpoint`` with the key ``model``, in ``pytorch_model_fsdp_0``,
      where accelerate and ``Trainer`` put it, or in ``path``; or ``model.safetensors``, its shards, or
      ``pytorch_model.bin``. Where ``adapter_config.json`` is, they are the adapter's (``adapter_model.safetensors`` or
      ``.bin``), and only the adapter is trainable.
    - optimizer: such a directory with the key ``optim`` or ``optimizer``, in ``optimizer_0`` or in ``path``; or
      ``optimizer.pt`` (or ``optimizer.bin``, of accelerate), the optimizer's ``state_dict()``.

    ``base``: the directory of an adapter's base model, by default the adapter's ``base_model_name_or_path`` where that
    is a local directory. Tokenizer files missing from ``path`` are taken from it, and so is ``config.json`` for weights
    of ``torch.distributed.checkpoint``, which saves none.
    ``dtype``: of the parameters, by default as saved. The optimizer state is cast to it, as torch does.
    ``optimizer``: False loads the policy alone.
    ``param_names``: the parameters' names group by group, where an optimizer state without names does not follow from
    the rules of ``restore_optimizer``; by default those in ``optimizer_param_names.json``, if there is one.

    Raises ``FileNotFoundError`` for what is missing, ``ValueError`` for files that disagree with each other or that
    hold more than tensors, ``TypeError`` for the state of another optimizer; all but a disagreement with the weights
    before any weights are read.

    Example:
        >>> from importlib.resources import files
        >>> checkpoint = load_checkpoint(str(files("fx_influence") / "lab" / "demo" / "policy"))
        >>> checkpoint.model.config.model_type, checkpoint.optimizer_state.lr, checkpoint.eos_token_ids
        ('qwen2', 0.0001, (1,))
    """
    path = directory_of("path", path)
    is_adapter = (path / "adapter_config.json").is_file()
    base = _base_directory(path, base) if is_adapter or base is not None else None
    shards = shards_in(path, MODEL_SHARDS, MODEL_PART)
    elsewhere = is_adapter or (shards is not None and not (path / "config.json").is_file())
    model_path = base if elsewhere and base is not None else path
    _require_files(model_path, path, is_adapter, shards)
    tokenizer = _tokenizer(path, base)
    _check_vocabulary(tokenizer, model_path)
    state_dict = _optimizer_state_dict(path) if optimizer else None
    param_names = param_names_in(path) if param_names is None else param_names
    model = _causal_lm(model_path, None if is_adapter else shards, dtype)
    if is_adapter:
        model = _adapter(model, path, shards, dtype)
    model = model.to(device).eval()
    state = None if state_dict is None else adamw_state(restore_optimizer(state_dict, model, param_names), model)
    return Checkpoint(model, tokenizer, state, _eos_token_ids(model, tokenizer), path)


def load_tokenizer(path: str | Path, *, base: str | Path | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer that ``load_checkpoint`` gives, without the weights; arguments and errors as there.

    Example:
        >>> from importlib.resources import files
        >>> load_tokenizer(str(files("fx_influence") / "lab" / "demo" / "policy")).eos_token
        '<|endoftext|>'
    """
    path = directory_of("path", path)
    needs_base = base is not None or (path / "adapter_config.json").is_file()
    return _tokenizer(path, _base_directory(path, base) if needs_base else None)


def directory_of(field: str, path: str | Path) -> Path:
    if not Path(path).is_dir():
        raise FileNotFoundError(f"{field} is {str(path)!r}, not a directory; pass a local checkpoint directory")
    return Path(path)


@contextmanager
def _undamaged(what: str, path: Path) -> Iterator[None]:
    """Raise what readers of files say inside as ``ValueError`` that names what is damaged, and where it lies.

    Readers in Rust raise bare ``Exception``, and ``json`` names no file; errors that do name one stay as they are, and
    so does what is said of pickles, which is no damage.
    """
    try:
        yield
    except (SafetensorError, json.JSONDecodeError, EOFError) as error:
        raise ValueError(f"{what} in {path} is damaged: {error}; copy or save it there again") from error
    except Exception as error:
        if type(error) not in (Exception, TypeError, KeyError) and "PytorchStreamReader" not in str(error):
            raise
        raise ValueError(f"{what} in {path} cannot be read: {error}; copy or save it there again") from error


def _base_directory(path: Path, base: str | Path | None) -> Path:
    if base is not None:
        return directory_of("base", base)
    config = path / "adapter_config.json"
    name = json.loads(config.read_text()).get("base_model_name_or_path")
    if not name or not Path(name).is_dir():
        raise FileNotFoundError(
            f"base_model_name_or_path in {config} is {name!r}, which is not a local directory; "
            "pass base=, the directory of the base model (nothing is downloaded)"
        )
    return Path(name)


def shards_in(path: Path, subdirectory: str, part: Sequence[str]) -> Path | None:
    """Where ``torch.distributed.checkpoint`` saved a part."""
    return next((directory for directory in (path / subdirectory, path) if has_part(directory, part)), None)


def param_names_in(path: Path) -> list[list[str]] | None:
    """The parameters' names group by group, where they are saved beside the state."""
    return json.loads((path / PARAM_NAMES).read_text()) if (path / PARAM_NAMES).is_file() else None


def _require_files(model_path: Path, path: Path, is_adapter: bool, shards: Path | None) -> None:
    remedy = "save the model there with save_pretrained, or {'model': ...} with torch.distributed.checkpoint.save"
    if shards is not None and not is_adapter:
        _require_any(model_path, ("config.json",), "save it there with model.config.save_pretrained, or pass base=")
        return
    _require_any(model_path, ("config.json",), "save the model there with save_pretrained")
    _require_any(model_path, WEIGHTS, remedy)
    if is_adapter and shards is None:
        _require_any(path, ADAPTER_WEIGHTS, "save the adapter there with save_pretrained")


def _require_any(path: Path, files: tuple[str, ...], remedy: str) -> None:
    if not any((path / file).is_file() for file in files):
        raise FileNotFoundError(f"{path} has no {' or '.join(files)}; {remedy}")


def _tokenizer(path: Path, base: Path | None) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    for directory in (path, base):
        if directory is not None and any((directory / file).is_file() for file in TOKENIZER):
            with _undamaged("the tokenizer or config.json", directory):
                tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                    directory, local_files_only=True, trust_remote_code=False
                )
            return tokenizer
    raise FileNotFoundError(
        f"no tokenizer in {path}{f' nor in {base}' if base else ''} (none of {', '.join(TOKENIZER)}); "
        "save it there with tokenizer.save_pretrained"
    )


def _check_vocabulary(tokenizer: PreTrainedTokenizerBase, model_path: Path) -> None:
    from transformers import AutoConfig

    with _undamaged("config.json", model_path):
        config = AutoConfig.from_pretrained(model_path, local_files_only=True, trust_remote_code=False)
    rows = config.get_text_config().vocab_size
    if len(tokenizer) > rows:
        raise ValueError(
            f"vocabulary mismatch: the tokenizer has {len(tokenizer)} tokens, the model in {model_path} {rows} "
            "embedding rows; take the tokenizer of its training, or save the model after resize_token_embeddings"
        )


def _optimizer_state_dict(path: Path) -> dict[str, Any]:
    shards = shards_in(path, OPTIMIZER_SHARDS, OPTIMIZER_PART)
    if shards is not None:
        return optimizer_state_dict_in(shards, read_part)
    remedy = "{'optim': ...} with torch.distributed.checkpoint.save, or pass optimizer=False for the policy alone"
    _require_any(path, OPTIMIZER, f"save optimizer.state_dict() there, or {remedy}")
    file = next(path / file for file in OPTIMIZER if (path / file).is_file())
    state_dict: dict[str, Any] = load_values(file, str(file))
    require_adamw_state_dict(state_dict)
    return state_dict


def optimizer_state_dict_in(shards: Path, read: Callable[[Path, Sequence[str]], Any]) -> dict[str, Any]:
    """What ``torch.distributed.checkpoint`` saved of AdamW; ``TypeError`` for the state of another optimizer."""
    state_dict: dict[str, Any] = read(shards, OPTIMIZER_PART)
    if "param_groups" in state_dict:
        # torch saves no empty dict, as the state is before the first step
        state_dict.setdefault("state", {})
    require_adamw_state_dict(state_dict)
    return state_dict


def _causal_lm(path: Path, shards: Path | None, dtype: torch.dtype | None) -> Any:
    from transformers import AutoModelForCausalLM

    loader: Any = AutoModelForCausalLM
    options = {"local_files_only": True, "weights_only": True, "ignore_mismatched_sizes": True}
    try:
        with _undamaged("the weights", path):
            if shards is None:
                model, report = loader.from_pretrained(
                    path, dtype=dtype or "auto", trust_remote_code=False, output_loading_info=True, **options
                )
            else:
                model, report = _from_shards(path, read_part(shards, MODEL_PART), dtype, options)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"the weights in {path} hold more than tensors, which are never unpickled; save the model as safetensors"
        ) from error
    # transformers fills what is missing or mismatched with random numbers and only warns
    bad = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
    if bad:
        raise ValueError(
            f"the weights in {shards or path} do not fit {path / 'config.json'}: missing or of another shape are "
            f"{bad[:5]} ({len(bad)} in all); save model and config together with save_pretrained"
        )
    return model


def _from_shards(
    path: Path, weights: dict[str, Any], dtype: torch.dtype | None, options: dict[str, Any]
) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    with torch.device("meta"):
        loader: Any = type(AutoModelForCausalLM.from_config(config))
    tensors = {name: value for name, value in weights.items() if isinstance(value, Tensor)}
    floats = [value.dtype for value in tensors.values() if value.is_floating_point()]
    dtype = dtype or functools.reduce(torch.promote_types, floats or [torch.float32])
    model, report = loader.from_pretrained(
        None, config=config, state_dict=tensors, dtype=dtype, output_loading_info=True, **options
    )
    if (path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(path, local_files_only=True)
    return model, report


def _adapter(model: Any, path: Path, shards: Path | None, dtype: torch.dtype | None) -> Any:
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise ImportError("a PEFT adapter needs peft: pip install 'fx-influence[peft]'") from error

    with warnings.catch_warnings():
        # a missing adapter weight is an error below, where peft only warns; the other is peft's own use of transformers
        warnings.filterwarnings("ignore", message="Found missing adapter keys")
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        try:
            with _undamaged("the adapter", path):
                adapted, saved = (
                    _adapter_of_files(model, path) if shards is None else _adapter_of_shards(model, path, shards)
                )
            misfit = _adapter_misfit(adapted, saved)
        except RuntimeError as error:
            misfit = str(error)
    if misfit:
        raise ValueError(
            f"the adapter's weights in {shards or path} do not fit its adapter_config.json: {misfit}; save adapter and "
            "config together with save_pretrained, or the weights with torch.distributed.checkpoint"
        )
    return adapted if dtype is None else adapted.to(dtype)


def _adapter_misfit(adapted: Any, saved: dict[str, Tensor]) -> str:
    """What the saved weights lack, by the model's names or by peft's."""
    from peft import get_peft_model_state_dict

    names, trained = set(saved), _trained(adapted)
    if trained <= names:
        return ""
    missing = sorted(set(get_peft_model_state_dict(adapted, save_embedding_layers=False)) - names)
    if missing:
        return f"missing are {missing[:5]} ({len(missing)} in all)"
    if len(names) < len(trained):
        return (
            f"{len(names)} tensors stand for {len(trained)} trained parameters (peft before 0.21 saves no biases of "
            "bias='lora_only')"
        )
    return ""


def _trained(model: Any) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def _adapter_of_files(model: Any, path: Path) -> tuple[Any, dict[str, Tensor]]:
    from peft import PeftModel
    from peft.utils import load_peft_weights

    adapted = PeftModel.from_pretrained(model, str(path), is_trainable=True, local_files_only=True)
    return adapted, load_peft_weights(str(path), device="cpu", local_files_only=True)


def _adapter_of_shards(model: Any, path: Path, shards: Path) -> tuple[Any, dict[str, Tensor]]:
    from peft import PeftConfig, get_peft_model, set_peft_model_state_dict

    config = PeftConfig.from_pretrained(str(path), local_files_only=True)
    # the base of the config may have moved, of which peft would warn
    config.inference_mode, config.base_model_name_or_path = False, None
    adapted = get_peft_model(model, config)
    saved = read_part(shards, MODEL_PART)
    if _trained(adapted) <= set(saved):
        # of the whole model, where accelerate saves the adapter alone, under peft's names
        adapted.load_state_dict(saved, strict=False)
    else:
        # a copy, as older peft renames in it
        set_peft_model_state_dict(adapted, dict(saved))
    return adapted, saved


def _eos_token_ids(model: Any, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    configured = model.generation_config.eos_token_id
    ids = configured if isinstance(configured, (list, tuple)) else [configured, tokenizer.eos_token_id]
    return tuple(dict.fromkeys(int(i) for i in ids if i is not None))
