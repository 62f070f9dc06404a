"""Linear layers with frozen 4-bit weights (QLoRA), as linear maps by the dequantised weights.

bitsandbytes' ``Linear4bit`` multiplies by a weight that it dequantises in the input's dtype, and has a reverse rule but
no forward-mode one and none under ``vmap``. In a template its place is taken by ``FourBitLinear``, which dequantises
the same weight by the same kernel, one layer at a time, so that all rules are those of a linear layer. The
backward pass of bitsandbytes dequantises in the dtype of the original weight, which may be coarser than the forward's;
the derivatives here are those of the forward.

Nothing of bitsandbytes is imported: its operators are known to torch once a model has such a layer. Source:
bitsandbytes 0.50.2, ``nn/modules.py`` and ``autograd/_functions.py``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fx_influence.policy.modes.reloaded_weights import reload_on_backward

_PACKED = (
    "packed for inference on this CPU by a forward in eval mode, their scales rounded again; expected them as they "
    "were loaded. Load the model again, and set support_avx512bf16_for_cpu = False on its Linear4bit layers"
)


def four_bit_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the ``Linear4bit`` layers of bitsandbytes in a model, by path."""
    return {path: module for path, module in model.named_modules() if _is_of_bitsandbytes(module, "Linear4bit")}


def four_bit_names(model: nn.Module) -> set[str]:
    """Return the names of the parameters that are 4-bit codes."""
    return {f"{path}.weight" if path else "weight" for path in four_bit_layers(model)}


def four_bit_dtypes(model: nn.Module) -> set[torch.dtype]:
    """Return the dtypes that the 4-bit layers of a model compute in, where these are set."""
    dtypes = (getattr(layer, "compute_dtype", None) for layer in four_bit_layers(model).values())
    return {dtype for dtype in dtypes if dtype is not None}


def check_quantised(model: nn.Module, compiled: bool, sharded: bool) -> None:
    """Raise ``ValueError`` for quantised layers of bitsandbytes that are no linear maps, or cannot be followed.

    Args:
        model: without wrappers.
        compiled: whether passes are compiled.
        sharded: whether the model is sharded by FSDP2 or ZeRO-3.
    """
    for path, module in model.named_modules():
        for kind in ("Linear8bitLt", "Embedding8bit", "Embedding4bit"):
            if _is_of_bitsandbytes(module, kind):
                raise ValueError(
                    f"model module {path!r} is {kind} of bitsandbytes; expected Linear4bit, since 8-bit layers round "
                    "their inputs and have no derivatives, and embeddings are left in full by QLoRA. Load the model "
                    "with load_in_4bit, or with its weights dequantised: model.dequantize()"
                )
    layers = four_bit_layers(model)
    for path, layer in layers.items():
        problem = _problem(cast(Any, layer))
        if problem:
            raise ValueError(f"model module {path!r} has 4-bit weights that are {problem}")
    if layers and compiled:
        raise ValueError("compiled is True for a model with 4-bit weights; expected False. Leave it out")
    if layers and sharded:
        raise ValueError(
            "model is sharded by FSDP2 or ZeRO-3 and has 4-bit weights; expected one of the two. Keep the 4-bit model "
            "whole on every process, or shard one whose weights are not quantised"
        )


def _problem(layer: Any) -> str | None:
    """Return why the weights of a 4-bit layer cannot be followed, with the remedy, or None."""
    state = _quant_state(layer)
    if layer.weight.requires_grad:
        return "trained; expected frozen ones. Train an adapter over them (peft.prepare_model_for_kbit_training)"
    if state is None:
        return "not quantised yet; expected codes. Move the model to its device first: model.to(device)"
    if getattr(state, "packing_format_for_cpu", False):
        return _PACKED
    if tuple(state.shape) != (layer.out_features, layer.in_features):
        return f"of shape {tuple(state.shape)}; expected (out, in). Quantise the model again"
    if not all(hasattr(torch.ops.bitsandbytes, name) for name in ("dequantize_4bit", "dequantize_blockwise")):
        return "of a bitsandbytes without operators of torch; expected version 0.46 at least. Update it"
    return None


def share_states(model: nn.Module) -> dict[int, Any]:
    """Return a memo under which ``deepcopy`` shares the scales of 4-bit weights, which are not parameters."""
    states = [_quant_state(layer) for layer in four_bit_layers(model).values()]
    attributes = [getattr(layer, "quant_state", None) for layer in four_bit_layers(model).values()]
    return {id(state): state for state in (*states, *attributes) if state is not None}


def replace_four_bit(module: nn.Module, model: nn.Module) -> None:
    """Make each 4-bit layer of ``module``, a copy of ``model``, a ``FourBitLinear`` of the weight of ``model``'s."""
    live = four_bit_layers(model)
    for path, layer in four_bit_layers(module).items():
        del layer._parameters["weight"]
        layer.__class__ = FourBitLinear
        bias = live[path].bias
        trains_bias = isinstance(bias, Tensor) and bias.requires_grad
        vars(layer).update(source=_Source(live[path]), min_dtype=None, trains_bias=trains_bias)


def raise_compute_dtype(module: nn.Module, dtype: torch.dtype) -> None:
    """Make the 4-bit layers of a template compute in at least ``dtype``, outside autocast."""
    for layer in module.modules():
        if isinstance(layer, FourBitLinear):
            layer.min_dtype = dtype


class _Source:
    """The live layer whose weight a template's layer reads; shared, never copied."""

    def __init__(self, layer: nn.Module) -> None:
        self._layer: Any = layer

    def __deepcopy__(self, memo: object) -> _Source:
        return self

    @property
    def compute_dtype(self) -> torch.dtype | None:
        """The dtype that the live layer is set to compute in, None for that of its input."""
        return cast("torch.dtype | None", self._layer.compute_dtype)

    @property
    def original_dtype(self) -> torch.dtype:
        """The dtype of the weight before it was quantised."""
        return cast(torch.dtype, _quant_state(self._layer).dtype)

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """Return the live weight (out, in), dequantised by the layer's own kernel.

        Args:
            dtype: of the result; float64 is made from float32.
        """
        state = _quant_state(self._layer)
        if getattr(state, "packing_format_for_cpu", False):
            raise ValueError(f"model has 4-bit weights that are {_PACKED}")
        ops: Any = torch.ops.bitsandbytes
        scales = state.absmax
        if state.nested:
            second = state.state2
            scales = state.offset + ops.dequantize_blockwise(
                scales, second.absmax, second.code, second.blocksize, torch.float32
            )
        narrow = torch.float32 if dtype == torch.float64 else dtype
        codes = self._layer.weight.data.view(-1, 1)
        weight: Tensor = ops.dequantize_4bit(
            codes, scales.float(), state.blocksize, state.quant_type, tuple(state.shape), narrow
        )
        return weight.to(dtype)


class FourBitLinear(nn.Linear):
    """x W^T + b in a template, with W dequantised from a live ``Linear4bit`` at each call, and again in backward.

    Attributes:
        source: reads the live layer.
        min_dtype: the least dtype to compute in outside autocast; None leaves the layer's.
        trains_bias: whether the bias is a trained parameter.
    """

    source: _Source
    min_dtype: torch.dtype | None
    trains_bias: bool

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The dequantised weight, for code that reads it, such as PEFT's DoRA."""
        return self.source.dequantised(self.source.original_dtype)

    def forward(self, input: Tensor) -> Tensor:
        """Return the output in the input's dtype, computed in the dtype that the live layer computes in."""
        narrow = self.source.compute_dtype or input.dtype
        dtype = self._dtype_of_products(input, narrow)
        bias: Tensor | None = self.bias

        def weight() -> Tensor:
            return self.source.dequantised(narrow).to(dtype)

        # Weight and frozen bias keep the values that the live layer rounds them to, also where more is computed; what
        # watches the dtypes of a forward takes no notice of that.
        with torch.no_grad(), torch._C.DisableTorchFunction():
            now = weight()
            if bias is not None and not self.trains_bias:
                bias = bias.to(narrow).to(dtype)
        with _unsaved(now, weight):
            out = F.linear(input.to(dtype), now, None if bias is None else bias.to(dtype))
        return out.to(input.dtype)

    def _dtype_of_products(self, input: Tensor, narrow: torch.dtype) -> torch.dtype:
        """Return the dtype to multiply in: autocast's, as bitsandbytes calls a linear layer inside, else ``narrow``.

        With float64 inputs it is float64, as casts from that are left out.
        """
        if input.dtype == torch.float64:
            return input.dtype
        if torch.is_autocast_enabled(input.device.type):
            return torch.get_autocast_dtype(input.device.type)
        return narrow if self.min_dtype is None else torch.promote_types(narrow, self.min_dtype)


def _unsaved(weight: Tensor, reload: Callable[[], Tensor]) -> contextlib.AbstractContextManager[None]:
    """Return hooks under which a graph does not save ``weight``, where torch.func allows hooks."""
    if not (torch.is_grad_enabled() and cast(Any, torch._C._autograd)._saved_tensors_hooks_is_enabled()):
        return contextlib.nullcontext()
    return reload_on_backward({"weight": weight}, lambda _: reload())


def _is_of_bitsandbytes(module: nn.Module, kind: str) -> bool:
    return any(x.__module__ == "bitsandbytes.nn.modules" and x.__name__ == kind for x in type(module).__mro__)


def _quant_state(layer: Any) -> Any:
    state = getattr(layer.weight, "quant_state", None)
    return getattr(layer, "quant_state", None) if state is None else state
