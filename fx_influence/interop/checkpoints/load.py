"""Saved training states of a checkpoint directory: policy, tokenizer and AdamW's state by parameter name.

Nothing is downloaded, and of pickled files nothing is read but tensors and plain values.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from fx_influence.core.display import record_line
from fx_influence.interop.checkpoints.adapter import load_adapter
from fx_influence.interop.checkpoints.files.directory import (
    TOKENIZER,
    base_directory,
    read_param_names,
    reporting_damage,
    require_directory,
    require_model_files,
)
from fx_influence.interop.checkpoints.fsdp.lora import split_weights
from fx_influence.interop.checkpoints.layout import SavedWeights, find_layout
from fx_influence.interop.checkpoints.model import load_causal_lm
from fx_influence.interop.checkpoints.optimizer_state import restore_optimizer
from fx_influence.interop.checkpoints.saved_optimizer import read_optimizer_state_dict
from fx_influence.interop.optimizers import adamw_state
from fx_influence.types import AdamWState

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Checkpoint(NamedTuple):
    """A saved training state.

    Attributes:
        model: the causal LM or ``PeftModel``, in eval mode.
        tokenizer: its tokenizer.
        optimizer_state: AdamW's state by parameter name; None if ``optimizer=False`` was passed.
        eos_token_ids: every id that ends a completion.
        path: the directory that was read.
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
    """Load a checkpoint directory, without the network: full or PEFT, saved by one process or many.

    ``path`` holds ``config.json``, tokenizer files (or has them in ``huggingface`` or ``tokenizer``), and each of these
    in the first form that it has:

    - weights: ``model_world_size_<N>_rank_<R>.pt`` of verl and SkyRL, with LoRA too (whose rank
      and alpha verl puts in ``lora_train_meta.json``); ``global_step<N>`` of DeepSpeed's ZeRO, whose float32 masters
      they are; a directory of ``torch.distributed.checkpoint`` with the key ``model``, in ``pytorch_model_fsdp_0``
      (accelerate), ``weights`` (NeMo-RL) or ``path``, or with the weights beside its keys (torchtitan);
      ``pytorch_model_fsdp.bin``; ``model.safetensors``, its shards, or ``pytorch_model.bin``. Beside an
      ``adapter_config.json`` they are the adapter's (``adapter_model.safetensors`` or ``.bin``), and only the adapter
      is trainable.
    - optimizer: ``optim_world_size_<N>_rank_<R>.pt``; ``global_step<N>``; such a directory with the key ``optim``,
      ``optimizer`` or ``optimizers``, in ``optimizer_0``, ``optimizer`` or ``path``; or ``optimizer.pt`` (or
      ``optimizer.bin``, of accelerate), the optimizer's ``state_dict()``.

    If ``path`` has none of these, or weights without the optimizer, the checkpoint is looked for below it: the last
    ``checkpoint-<N>``, ``global_step_<N>`` or ``step_<N>``, and ``actor``, ``policy`` or ``trainer`` in that.

    Args:
        path: the directory.
        base: directory of an adapter's base model, by default the adapter's ``base_model_name_or_path`` if that is a
            local directory. Tokenizer files missing from ``path`` are taken from it, and so is ``config.json`` for
            weights that are in other files than those of transformers.
        dtype: of the parameters, by default as saved. The optimizer state is cast to it, as torch does.
        device: of the model.
        optimizer: False loads only the policy.
        param_names: the parameters' names group by group, if an optimizer state without names does not follow the rules
            of ``restore_optimizer``; by default those in ``optimizer_param_names.json``, if there is one.

    Returns:
        ``Checkpoint``: model, tokenizer, AdamW's state by parameter name, and end-of-sequence ids.

    Raises:
        FileNotFoundError: for missing files, those of single ranks by name.
        ValueError: for files that are damaged or disagree with each other, and for a format that is known by name and
            is not read, with the conversion to make.
        TypeError: for the state of another optimizer. All errors but a disagreement with the weights are raised before
            any weights are read.

    Example:
        >>> from importlib.resources import files
        >>> checkpoint = load_checkpoint(str(files("fx_influence") / "lab" / "demo" / "policy"))
        >>> checkpoint.model.config.model_type, checkpoint.optimizer_state.lr, checkpoint.eos_token_ids
        ('qwen2', 0.0001, (1,))
    """
    layout = find_layout(require_directory("path", path), optimizer)
    path, weights = layout.path, layout.weights
    adapter = weights.adapter() if weights is not None else None
    needs_base = (path / "adapter_config.json").is_file() if adapter is None else adapter.alone
    base = base_directory(path, base) if needs_base or base is not None else None
    config_in_base = needs_base or (weights is not None and not (layout.config / "config.json").is_file())
    model_path = base if config_in_base and base is not None else layout.config
    layout = layout._replace(config=model_path)
    require_model_files(model_path, path, needs_base, weights is not None)
    tokenizer = _load_tokenizer(layout.tokenizer, base)
    _check_vocabulary(tokenizer, model_path)
    state_dict = read_optimizer_state_dict(layout) if optimizer else None
    param_names = read_param_names(path) if param_names is None else param_names
    if weights is not None and adapter is not None and not adapter.alone:
        model = _load_with_adapter(model_path, weights, adapter.config, dtype)
    else:
        model = load_causal_lm(model_path, None if needs_base else weights, dtype)
        if needs_base:
            model = load_adapter(model, path, weights, dtype, None if adapter is None else adapter.config)
    model = model.to(device).eval()
    state = None if state_dict is None else adamw_state(restore_optimizer(state_dict, model, param_names), model)
    return Checkpoint(model, tokenizer, state, _eos_token_ids(model, tokenizer), path)


def load_tokenizer(path: str | Path, *, base: str | Path | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer that ``load_checkpoint`` returns, without the weights; arguments and errors are the same.

    Example:
        >>> from importlib.resources import files
        >>> load_tokenizer(str(files("fx_influence") / "lab" / "demo" / "policy")).eos_token
        '<|endoftext|>'
    """
    path = require_directory("path", path)
    layout = find_layout(path, optimizer=False)
    needs_base = base is not None or (layout.path / "adapter_config.json").is_file()
    return _load_tokenizer(layout.tokenizer, base_directory(layout.path, base) if needs_base else None)


def _load_tokenizer(path: Path, base: Path | None) -> PreTrainedTokenizerBase:
    """Load the tokenizer from the first of the two directories that has one."""
    from transformers import AutoTokenizer

    for directory in (path, base):
        if directory is not None and any((directory / file).is_file() for file in TOKENIZER):
            with reporting_damage("the tokenizer or config.json", directory):
                tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                    directory, local_files_only=True, trust_remote_code=False
                )
            return tokenizer
    raise FileNotFoundError(
        f"no tokenizer in {path}{f' nor in {base}' if base else ''}; expected one of {', '.join(TOKENIZER)}. Save it "
        "there with tokenizer.save_pretrained"
    )


def _check_vocabulary(tokenizer: PreTrainedTokenizerBase, model_path: Path) -> None:
    """Raise ``ValueError`` if the tokenizer has more tokens than the model's config has embedding rows."""
    from transformers import AutoConfig

    with reporting_damage("config.json", model_path):
        config = AutoConfig.from_pretrained(model_path, local_files_only=True, trust_remote_code=False)
    rows = config.get_text_config().vocab_size
    if len(tokenizer) > rows:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens; expected at most {rows}, the rows of the embedding of the "
            f"model in {model_path}. Take the tokenizer of its training, or save the model after "
            "resize_token_embeddings"
        )


def _load_with_adapter(model_path: Path, weights: SavedWeights, config: Any, dtype: torch.dtype | None) -> Any:
    """Load a model and the adapter on it from the same files.

    Args:
        model_path: directory of the model's ``config.json``.
        weights: of both.
        config: of the adapter.
        dtype: of all parameters; None leaves them as saved.
    """
    base, adapter = split_weights(weights.read())
    model = load_causal_lm(model_path, weights._replace(read=lambda: base), dtype)
    return load_adapter(model, model_path, weights._replace(read=lambda: adapter), dtype, config)


def _eos_token_ids(model: Any, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return every id that ends a completion, of the generation config or else the tokenizer."""
    configured = model.generation_config.eos_token_id
    ids = configured if isinstance(configured, (list, tuple)) else [configured, tokenizer.eos_token_id]
    return tuple(dict.fromkeys(int(i) for i in ids if i is not None))
