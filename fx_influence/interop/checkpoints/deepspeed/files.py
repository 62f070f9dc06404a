"""Files of a DeepSpeed checkpoint: where they are, and which ranks wrote them.

Source: deepspeedai/DeepSpeed, deepspeed/runtime/engine.py (``_get_rank_zero_ckpt_name``, ``_get_ckpt_name``) at commit
edaa722.
"""

from __future__ import annotations

import re
from pathlib import Path

_OPTIMIZER = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_?optim_states\.pt")
_MODEL = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
_TAG = re.compile(r"global_step(\d+)")


def zero_directory(path: Path) -> Path | None:
    """Return the directory of ZeRO's files: ``path``, the one that ``latest`` names, or else the last ``global_step``.

    Returns:
        None if there is none.
    """
    if _files(path, _OPTIMIZER):
        return path
    latest = path / "latest"
    tag = latest.read_text().strip() if latest.is_file() else ""
    if tag and Path(tag).name == tag and (path / tag).is_dir() and _files(path / tag, _OPTIMIZER):
        return path / tag
    tagged = [(int(m[1]), entry) for entry in path.iterdir() if entry.is_dir() and (m := _TAG.fullmatch(entry.name))]
    return next((entry for _, entry in sorted(tagged, reverse=True) if _files(entry, _OPTIMIZER)), None)


def optimizer_files(directory: Path) -> list[Path]:
    """Return the optimizer's files in the order of the ranks.

    Raises:
        FileNotFoundError: naming the first missing rank.
        ValueError: for tensor parallelism.
    """
    return _in_order(directory, _OPTIMIZER)


def model_files(directory: Path) -> list[Path]:
    """Return the model's files in the order of the ranks: one below ZeRO-3, then one a rank.

    Raises:
        FileNotFoundError: if there is none, or naming the first missing rank.
        ValueError: for tensor parallelism.
    """
    return _in_order(directory, _MODEL)


def _files(directory: Path, pattern: re.Pattern[str]) -> list[tuple[int, int, Path]]:
    """Return the rank, the model-parallel rank and the path of each file."""
    matches = [(match, file) for file in directory.iterdir() if (match := pattern.fullmatch(file.name))]
    return sorted((int(match[1] or 0), int(match[2]), file) for match, file in matches)


def _in_order(directory: Path, pattern: re.Pattern[str]) -> list[Path]:
    entries = _files(directory, pattern)
    if not entries:
        raise FileNotFoundError(
            f"{directory} has no file {pattern.pattern}; expected those of all ranks. Copy the complete directory"
        )
    if any(model_rank for _, model_rank, _ in entries):
        raise ValueError(
            f"{entries[-1][2]} is of tensor parallelism; expected data parallelism alone. Convert the checkpoint by "
            "deepspeed's ds_to_universal.py, and save its weights with save_pretrained; its optimizer state is not read"
        )
    ranks = [rank for rank, _, _ in entries]
    if ranks != list(range(len(ranks))):
        missing = min(set(range(max(ranks) + 1)) - set(ranks), default=max(ranks))
        raise FileNotFoundError(
            f"{directory} has {pattern.pattern} of the ranks {ranks}, without {missing}; expected one of each rank. "
            "Copy them there: on several nodes each may have saved its own"
        )
    return [file for _, _, file in entries]
