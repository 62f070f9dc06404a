"""A saved training state from a Hugging Face checkpoint directory: policy, tokenizer and AdamW's state by name.

Nothing is downloaded and nothing is unpickled: pickled files go through ``torch.load(weights_only=True)``.
"""

from __future__ import annotations

import json
import pickle
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from fx_influence.interop.optim import adamw_state
from fx_influence.interop.restore import require_adamw_state_dict, restore_optimizer
from fx_influence.types import AdamWState

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model")
PARAM_NAMES = "optimizer_param_names.json"


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


def load_checkpoint(
    path: str | Path,
    base: str | Path | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    *,
    optimizer: bool = True,
    param_names: Sequence[Sequence[str]] | None = None,
) -> Checkpoint:
    """Load a checkpoint directory as transformers' ``Trainer`` and ``save_pretrained`` write it, without the network.

    ``path``: a directory with ``config.json``, weights (``model.safetensors``, its shards, or ``pytorch_model.bin``),
    tokenizer files and ``optimizer.pt``; or a PEFT one, with ``adapter_config.json`` and the adapter's weights, of
    which only the adapter is trainable then.
    ``base``: the directory of the adapter's base model, by default the adapter's ``base_model_name_or_path`` where
    that is a local directory. Tokenizer files missing from ``path`` are taken from it.
    ``dtype``: of the parameters, by default as saved. The optimizer state is cast to it, as torch does.
    ``optimizer``: False loads the policy alone.
    ``param_names``: the parameters' names group by group, where optimizer.pt does not follow from the rules of
    ``restore_optimizer``; by default those in ``optimizer_param_names.json``, if there is one.

    Raises ``FileNotFoundError`` for what is missing, ``ValueError`` for files that disagree with each other or that
    hold more than tensors, ``TypeError`` for the state of another optimizer; all but a disagreement with the weights
    before any weights are read.
    """
    path = _directory("path", path)
    is_adapter = (path / "adapter_config.json").is_file()
    base = _base_directory(path, base) if is_adapter or base is not None else None
    model_path = base if is_adapter and base is not None else path
    _require_files(model_path, path if is_adapter else None)
    tokenizer = _tokenizer(path, base)
    _check_vocabulary(tokenizer, model_path)
    state_dict = _optimizer_state_dict(path) if optimizer else None
    if param_names is None and (path / PARAM_NAMES).is_file():
        param_names = json.loads((path / PARAM_NAMES).read_text())
    model = _causal_lm(model_path, dtype)
    if is_adapter:
        model = _adapter(model, path, dtype)
    model = model.to(device).eval()
    state = None if state_dict is None else adamw_state(restore_optimizer(state_dict, model, param_names), model)
    return Checkpoint(model, tokenizer, state, _eos_token_ids(model, tokenizer), path)


def _directory(field: str, path: str | Path) -> Path:
    if not Path(path).is_dir():
        raise FileNotFoundError(f"{field} is {str(path)!r}, not a directory; pass a local checkpoint directory")
    return Path(path)


def _base_directory(path: Path, base: str | Path | None) -> Path:
    if base is not None:
        return _directory("base", base)
    config = path / "adapter_config.json"
    name = json.loads(config.read_text()).get("base_model_name_or_path")
    if not name or not Path(name).is_dir():
        raise FileNotFoundError(
            f"base_model_name_or_path in {config} is {name!r}, which is not a local directory; "
            "pass base=, the directory of the base model (nothing is downloaded)"
        )
    return Path(name)


def _require_files(model_path: Path, adapter: Path | None) -> None:
    _require_any(model_path, ("config.json",), "save the model there with save_pretrained")
    _require_any(model_path, WEIGHTS, "save the model there with save_pretrained")
    if adapter is not None:
        _require_any(adapter, ADAPTER_WEIGHTS, "save the adapter there with save_pretrained")


def _require_any(path: Path, files: tuple[str, ...], remedy: str) -> None:
    if not any((path / file).is_file() for file in files):
        raise FileNotFoundError(f"{path} has no {' or '.join(files)}; {remedy}")


def _tokenizer(path: Path, base: Path | None) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    for directory in (path, base):
        if directory is not None and any((directory / file).is_file() for file in TOKENIZER):
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

    config = AutoConfig.from_pretrained(model_path, local_files_only=True, trust_remote_code=False)
    rows = config.get_text_config().vocab_size
    if len(tokenizer) > rows:
        raise ValueError(
            f"vocabulary mismatch: the tokenizer has {len(tokenizer)} tokens, the model in {model_path} {rows} "
            "embedding rows; take the tokenizer of its training, or save the model after resize_token_embeddings"
        )


def _optimizer_state_dict(path: Path) -> dict[str, Any]:
    _require_any(
        path, ("optimizer.pt",), "save optimizer.state_dict() there, or pass optimizer=False for the policy alone"
    )
    try:
        state_dict: dict[str, Any] = torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        raise ValueError(
            f"{path / 'optimizer.pt'} is damaged or holds more than tensors and plain values, which are never "
            f"unpickled; save optimizer.state_dict() with torch.save ({str(error).splitlines()[0]})"
        ) from error
    require_adamw_state_dict(state_dict)
    return state_dict


def _causal_lm(path: Path, dtype: torch.dtype | None) -> Any:
    from transformers import AutoModelForCausalLM

    loader: Any = AutoModelForCausalLM
    try:
        model, report = loader.from_pretrained(
            path,
            dtype="auto" if dtype is None else dtype,
            local_files_only=True,
            trust_remote_code=False,
            weights_only=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"the weights in {path} hold more than tensors, which are never unpickled; save the model as safetensors"
        ) from error
    # transformers fills what is missing or mismatched with random numbers and only warns
    bad = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
    if bad:
        raise ValueError(
            f"the weights in {path} do not fit its config.json: missing or of another shape are {bad[:5]} "
            f"({len(bad)} in all); save model and config together with save_pretrained"
        )
    return model


def _adapter(model: Any, path: Path, dtype: torch.dtype | None) -> Any:
    try:
        from peft import PeftModel, get_peft_model_state_dict
    except ImportError as error:
        raise ImportError("a PEFT adapter needs peft: pip install 'fx-influence[peft]'") from error
    from peft.utils import load_peft_weights

    with warnings.catch_warnings():
        # a missing adapter weight is an error below, where peft only warns; the other is peft's own use of transformers
        warnings.filterwarnings("ignore", message="Found missing adapter keys")
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        adapted = PeftModel.from_pretrained(model, str(path), is_trainable=True, local_files_only=True)
    saved = load_peft_weights(str(path), device="cpu", local_files_only=True)
    missing = sorted(set(get_peft_model_state_dict(adapted, save_embedding_layers=False)) - set(saved))
    if missing:
        raise ValueError(
            f"the adapter's weights in {path} do not fit its adapter_config.json: missing are {missing[:5]} "
            f"({len(missing)} in all); save adapter and config together with save_pretrained"
        )
    return adapted if dtype is None else adapted.to(dtype)


def _eos_token_ids(model: Any, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    configured = model.generation_config.eos_token_id
    ids = configured if isinstance(configured, (list, tuple)) else [configured, tokenizer.eos_token_id]
    return tuple(dict.fromkeys(int(i) for i in ids if i is not None))
