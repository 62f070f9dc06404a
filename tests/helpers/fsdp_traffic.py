"""Record of the collectives of an FSDP pass: what is sent, in which order, and how many bytes are held."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from fx_influence.distributed import fsdp_gather, fsdp_units


class RecordedGather:
    """All-gather whose buffers and results are reported to a ``TrafficRecorder``."""

    def __init__(self, recorder: TrafficRecorder, gather: fsdp_gather.PendingGather) -> None:
        self.recorder, self.gather = recorder, gather
        self.wait = gather.wait
        # Until this object ends, because a worker of gloo drops a buffer a little later than its user.
        recorder.add_buffers(self, sum(x.nbytes for x in gather.buffers.values()))

    def result(self) -> list[Tensor]:
        out = self.gather.result()
        self.recorder.add_results(out)
        return out


class TrafficRecorder:
    """Record collectives, their order among the runs of units, and the peak bytes of gathered tensors.

    ``sent``: kind and bytes of each collective. ``order``: g where an all-gather starts, r where a unit runs forward, s
    where a unit's gradient is scattered. ``peak``: the most bytes alive at once.
    """

    def __init__(self) -> None:
        self.sent: list[tuple[str, int]] = []
        self.order = ""
        self.peak = 0
        self._results: dict[int, tuple[StorageWeakRef, int]] = {}
        self._buffer_bytes = 0

    def add_buffers(self, owner: object, size: int) -> None:
        self._buffer_bytes += size
        weakref.finalize(owner, self._drop_buffers, size)
        self.peak = max(self.peak, self.bytes_alive())

    def _drop_buffers(self, size: int) -> None:
        self._buffer_bytes -= size

    def add_results(self, tensors: list[Tensor]) -> None:
        for x in tensors:
            storage = x.untyped_storage()
            self._results[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, self.bytes_alive())

    def bytes_alive(self) -> int:
        return self._buffer_bytes + sum(size for ref, size in self._results.values() if not ref.expired())

    @contextmanager
    def recording(self) -> Iterator[TrafficRecorder]:
        def record(kind: str, collective: Callable[..., Any]) -> Callable[..., Any]:
            def call(out: Tensor, local: Tensor, **kwargs: Any) -> Any:
                self.sent.append((kind, max(out.nbytes, local.nbytes)))
                self.order += kind[0]
                return collective(out, local, **kwargs)

            return call

        def run(*args: Any) -> Any:
            self.order += "r"
            return unit_weights(*args)

        def start_all_gather(shards: Any) -> Any:
            return RecordedGather(self, fsdp_gather.start_all_gather(shards))

        unit_weights = fsdp_units.unit_weights
        all_gather, scatter = fsdp_gather.all_gather_into, fsdp_gather.reduce_scatter_into
        with (
            mock.patch.object(fsdp_units, "start_all_gather", start_all_gather),
            mock.patch.object(fsdp_units, "unit_weights", run),
            mock.patch.object(fsdp_gather, "all_gather_into", record("gather", all_gather)),
            mock.patch.object(fsdp_gather, "reduce_scatter_into", record("scatter", scatter)),
        ):
            yield self
