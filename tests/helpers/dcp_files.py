"""Directories of torch.distributed.checkpoint, and a pickle that must never run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch.distributed import checkpoint as dcp


def save_dcp(saved: dict[str, Any], path: Path) -> None:
    """Save over any older checkpoint, about which torch would warn otherwise."""
    (path / ".metadata").unlink(missing_ok=True)
    dcp.save(saved, checkpoint_id=path)


class MaliciousPickle:
    """An object whose unpickling creates a directory, which tests assert not to exist."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)
