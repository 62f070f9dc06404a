"""verl's own actor on CPUs: a platform for its registry of devices, and a module in the place of ray.

Ray's cluster takes no part in an actor's update: verl names its classes and decorators at import, so a module with
empty classes stands in for it. verl registers its FSDP engine for GPUs and NPUs; it runs on a CPU as it is, by way of
the platform below, which verl asks for the device, and ``VERL_ENGINE_DEVICE``.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch


class RayStandIn(ModuleType):
    """A module of ray whose decorator ``remote`` returns the class, and whose other names are empty classes."""

    __path__: Any = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = remote if name == "remote" else type(name, (), {})
        setattr(self, name, value)
        return value


def remote(*args: Any, **options: Any) -> Any:
    return args[0] if args else lambda decorated: decorated


class RayFinder:
    """Find every module of ray to be a stand-in."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.split(".")[0] == "ray" else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return RayStandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def prepare_verl() -> None:
    """Make verl importable without ray, and a CPU its device."""
    sys.meta_path.insert(0, RayFinder())  # type: ignore[arg-type]  # the methods that imports call
    importlib.import_module("ray.actor")
    os.environ["VERL_ENGINE_DEVICE"] = "cuda"
    importlib.import_module("verl.plugin.platform").set_platform(cpu_platform())
    # verl changes a class of trl that trl 1.16 no longer has, wherever trl is installed.
    patched = importlib.import_module("verl.models.transformers.monkey_patch")
    vars(patched)["is_trl_available"] = lambda: False


def cpu_platform() -> Any:
    """Return verl's platform of GPUs with the device, collectives and memory of a CPU."""
    base: Any = importlib.import_module("verl.plugin.platform.platform_cuda").PlatformCUDA
    device = ModuleType("torch.cpu of verl")
    readings = ("memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved")
    methods: dict[str, Callable[..., Any]] = {name: lambda *_: 0 for name in readings}
    vars(device).update(vars(torch.cpu), **methods, mem_get_info=lambda *_: (0, 0), get_device_name=lambda *_: "CPU")
    values = {"device_name": "cpu", "device_module": device}
    results = {"is_available": True, "current_device": "cpu", "communication_backend_name": "gloo"}
    answers = {name: answer(value) for name, value in results.items()}
    return type("PlatformCPU", (base,), {**values, **answers})()


def answer(value: object) -> Callable[[Any], object]:
    """Return a method that returns ``value``."""
    return lambda _: value
