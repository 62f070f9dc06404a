"""A simulated accelerator: tensors that compute on the CPU, report a device of another type and count host reads.

``register`` adds the device to the process it is called in, for good, and torch then takes it for the machine's
accelerator: call it in a process of its own, as ``tests/test_simulated_device.py`` does.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

import fx_influence

DEVICE_TYPE = "simulated"

PACKAGE = str(Path(fx_influence.__file__).parent)

READING = {
    f"aten::{name}"
    for name in (
        "_local_scalar_dense",  # item, float, int, bool
        "nonzero",
        "_unique2",
        "unique_dim",
        "unique_consecutive",
        "equal",
        "masked_select",
        "bincount",
        "repeat_interleave",
    )
}
"""Operations for which a host waits: it reads a value, or the size of a result follows from values."""

INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index"}
"""Operations that read the number of True entries where an index is a mask."""

FACTORIES = ("arange", "eye", "linspace", "logspace", "randperm", "tril_indices", "triu_indices")
"""Functions that torch composes of resizing an empty tensor, which a wrapper cannot follow."""


class Transfer(NamedTuple):
    """A wait of the host for the device: a "read" of values there, or a "write" of values from the host's memory."""

    kind: str
    operation: str
    line: str


class MixedDevices(RuntimeError):
    """Tensors of the simulated device and of the CPU were given to one operation."""


_transfers: list[Transfer] = []


class SimulatedTensor(torch.Tensor):
    """A tensor of the simulated device around a tensor of the CPU, ``value``."""

    value: Tensor

    @staticmethod
    def __new__(cls, value: Tensor) -> SimulatedTensor:
        make: Any = torch.Tensor._make_wrapper_subclass  # type: ignore[attr-defined]
        out: SimulatedTensor = make(
            cls,
            value.shape,
            strides=value.stride(),
            storage_offset=value.storage_offset(),
            dtype=value.dtype,
            device=torch.device(DEVICE_TYPE, 0),
        )
        out.value = value
        return out

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _dispatch(func, args, kwargs or {})

    def __repr__(self, **options: Any) -> str:  # type: ignore[override]
        return f"{type(self).__name__}({self.value})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            out: Any = SimulatedTensor(self.value.clone()).requires_grad_(self.requires_grad)
            if isinstance(self, torch.nn.Parameter):
                out._is_param = True
            memo[id(self)] = out
        copied: Tensor = memo[id(self)]
        return copied

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.value.untyped_storage()

    def data_ptr(self) -> int:
        return self.value.data_ptr()

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError(f"can't convert {DEVICE_TYPE} device type tensor to numpy. Use Tensor.cpu() first")


def register() -> None:
    """Add the simulated device to this process; once only."""
    _setup_privateuseone_for_python_backend(DEVICE_TYPE, _Backend())
    library = torch.library.Library("aten", "IMPL")
    # Kept alive by the module, since a library's kernels go with it.
    globals()["_library"] = library
    aten = torch.ops.aten
    for op in (aten.empty.memory_format, aten.empty_strided.default, aten.copy_.default):
        library.impl(op, _kernel(op), "PrivateUse1")
    library.impl(aten._efficientzerotensor.default, _factory(aten.zeros.default), "PrivateUse1")
    for packet in (getattr(aten, name) for name in FACTORIES):
        for op in (getattr(packet, overload) for overload in packet.overloads()):
            if "out" not in op._overloadname and "Tensor" not in op._overloadname:
                library.impl(op, _factory(op), "PrivateUse1")
    torch.Generator = _Generator  # type: ignore[misc]


@contextmanager
def count_transfers() -> Iterator[list[Transfer]]:
    """Yield the list of the transfers that the block makes, filled as it runs."""
    _transfers.clear()
    transfers: list[Transfer] = []
    try:
        yield transfers
    finally:
        transfers.extend(_transfers)


def to_device(x: Any) -> Any:
    """Return batches, states and dicts of tensors with every tensor on the simulated device."""
    if isinstance(x, Tensor):
        return x.to(DEVICE_TYPE)
    if isinstance(x, dict):
        return {key: to_device(value) for key, value in x.items()}
    return type(x)._make(map(to_device, x)) if hasattr(x, "_fields") else x


class _Backend(_DummyBackendModule):
    """The module ``torch.simulated``, whose random numbers are the CPU's."""

    def get_rng_state(self, device: Any = None) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


class _Generator(torch.Generator):
    """A generator whose simulated device draws on the CPU, as its tensors compute."""

    def __new__(cls, device: Any = "cpu") -> _Generator:
        on_device = torch.device(device).type == DEVICE_TYPE
        make: Any = super().__new__
        generator: _Generator = make(cls, device="cpu" if on_device else device)
        return generator


def _kernel(op: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: _dispatch(op, args, kwargs)


def _factory(op: Any) -> Callable[..., Tensor]:
    def create(*args: Any, dtype: torch.dtype | None = None, device: Any = None, **layout: Any) -> Tensor:
        return SimulatedTensor(op(*args, dtype=dtype, device="cpu"))

    return create


def _dispatch(func: Any, args: Any, kwargs: Any) -> Any:
    """Run an operation on the CPU's tensors and wrap what is on the device; raise ``MixedDevices``, note transfers."""
    name = func._schema.name
    given = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
    simulated = [x for x in given if isinstance(x, SimulatedTensor)]
    result_on_device = bool(simulated)
    device = kwargs.get("device")
    if device is not None:
        result_on_device = torch.device(device).type == DEVICE_TYPE
        kwargs = {**kwargs, "device": torch.device("cpu") if result_on_device else device}
    # Entries of a device's tensor may be chosen by indices of the host, which are sent there.
    indices = [x for x in args[1] if isinstance(x, Tensor) and _is_on_host(x)] if name in INDEXING and simulated else []
    for _ in indices:
        _note("write", name)
    placed = [x for x in given if not any(x is index for index in indices)]
    if name != "aten::copy_" and simulated and any(map(_is_on_host, placed)):
        raise MixedDevices(f"{func} was given tensors on {[str(x.device) for x in given]}; expected one device")
    kind = _kind(name, args, device)
    if kind is not None:
        _note(kind, name)
    kwargs = {key: value for key, value in kwargs.items() if key != "pin_memory"}
    values_args, values_kwargs = tree_map(lambda x: x.value if isinstance(x, SimulatedTensor) else x, (args, kwargs))
    wrappers = {id(x.value): x for x in simulated}

    def wrap(x: Any) -> Any:
        if not isinstance(x, Tensor) or any(x is y for y in given):
            return x
        if id(x) in wrappers:
            assert wrappers[id(x)].shape == x.shape, f"{func} resizes a tensor, which the simulation does not follow"
            return wrappers[id(x)]
        return SimulatedTensor(x) if result_on_device else x

    return tree_map(wrap, func(*values_args, **values_kwargs))


def _kind(name: str, args: Any, device: Any) -> str | None:
    """Return the kind of the transfer that an operation with tensors of the device is, or None."""
    if name == "aten::copy_":
        target, source = (isinstance(x, SimulatedTensor) for x in args[:2])
        return "write" if not source else "read" if not target else None
    by_mask = name in INDEXING and any(x is not None and x.dtype == torch.bool for x in args[1])
    to_host = name == "aten::_to_copy" and device is not None and torch.device(device).type == "cpu"
    return "read" if name in READING or by_mask or to_host else None


def _is_on_host(x: Tensor) -> bool:
    """Return whether ``x`` is a tensor of the CPU that an operation on a device does not take: one with dimensions."""
    return not isinstance(x, SimulatedTensor) and x.dim() > 0


def _note(kind: str, operation: str) -> None:
    """Add a transfer, with the innermost line of the package that asked for it."""
    frame: Any = sys._getframe(1)
    while frame is not None and not frame.f_code.co_filename.startswith(PACKAGE):
        frame = frame.f_back
    line = "" if frame is None else f"{frame.f_code.co_filename[len(PACKAGE) + 1 :]}:{frame.f_code.co_name}"
    _transfers.append(Transfer(kind, operation.removeprefix("aten::"), line))
