"""Checkpoints of formats that are known by name and not read, refused with the conversion to make."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

_MEGATRON = (
    "Convert the weights with the trainer (verl: `python -m verl.model_merger merge --backend megatron`; others: "
    "Megatron-Bridge's export_ckpt) and pass optimizer=False: its optimizer state is not read"
)
_RANK_FILES = "Save with SHARDED_STATE_DICT or FULL_STATE_DICT, and use_dcp=True"


def _any(*patterns: str) -> Callable[[Path], bool]:
    """Return a function that says whether a directory has a file of one of the patterns."""
    return lambda path: any(next(path.glob(pattern), None) is not None for pattern in patterns)


_FOREIGN: list[tuple[str, Callable[[Path], bool], str]] = [
    ("Megatron (torch_dist)", _any("dist_ckpt", "common.pt", "iter_*/common.pt", "iter_*/metadata.json"), _MEGATRON),
    ("Megatron", _any("mp_rank_*/model_optim_rng.pt", "iter_*/mp_rank_*", "mp_rank_*/distrib_optim.pt"), _MEGATRON),
    (
        "DeepSpeed's universal format",
        _any("zero/*/fp32.pt", "*_universal/zero"),
        "Pass the directory that it was converted from, global_step<N>",
    ),
    (
        "DeepSpeed's pipeline parallelism",
        _any("layer_*-model_states.pt", "layer_*-model_*_model_states.pt"),
        "Train without pipeline parallelism, or save the weights with save_pretrained and pass optimizer=False",
    ),
    (
        "DeepSpeed without ZeRO",
        _any("mp_rank_*_model_states.pt", "global_step*/mp_rank_*_model_states.pt"),
        "Train with zero_optimization.stage 1, 2 or 3, or save the weights with save_pretrained and pass "
        "optimizer=False",
    ),
    ("accelerate, one file a rank", _any("pytorch_model_fsdp*_rank*.bin", "optimizer*_rank*.bin"), _RANK_FILES),
    (
        "Orbax (JAX)",
        _any("_CHECKPOINT_METADATA", "default/_METADATA", "_METADATA", "*/_METADATA"),
        "Save the weights with save_pretrained and pass optimizer=False: its optimizer state is not read",
    ),
    (
        "GGUF",
        _any("*.gguf"),
        "Pass the directory in transformers' format that it was made from: it is quantised and has no optimizer state",
    ),
]
"""Name, test and remedy of each format."""


def refuse_foreign(path: Path) -> None:
    """Raise ``ValueError`` with the conversion to make if a directory is of one of these formats."""
    for name, matches, remedy in _FOREIGN:
        if matches(path):
            raise ValueError(
                f"{path} is a checkpoint of {name}; expected transformers, peft, accelerate, "
                f"torch.distributed.checkpoint, FSDP's files of ranks, or DeepSpeed's ZeRO. {remedy}"
            )
