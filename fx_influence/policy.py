"""A model as a pure function of its trainable parameters."""

from __future__ import annotations

import copy
import inspect
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fx_influence.types import Params


class Policy:
    """The ``apply`` that ``functionalize`` returns: ``policy(params, input_ids, attention_mask) -> logits (B, T, V)``.

    It holds a template of the model on the meta device and references to the frozen weights and buffers, so a forward
    neither reads nor changes the model's own modules. ``vocab_size`` is the number of embedding rows where the model
    tells, else None. ``computes_in`` is the lowest precision among the model's weights. Hugging Face models cast to
    float32 in places whatever their weights are; float64 is left as it is there, see ``_StayFloat64``.
    """

    def __init__(self, model: nn.Module, position_ids: bool) -> None:
        self._template = _meta_template(model)
        self._frozen = {name: p.detach() for name, p in model.named_parameters() if not p.requires_grad}
        self._frozen |= {name: b.detach() for name, b in model.named_buffers()}
        parameters = _forward_parameters(self._template)
        self._mask_by_name = "attention_mask" in parameters
        self._mask_by_position = not self._mask_by_name and len(parameters) > 1
        self._position_ids = position_ids and "position_ids" in parameters
        self._extra: dict[str, Any] = {"use_cache": False} if "use_cache" in parameters else {}
        self._upcasts = _is_hugging_face(model)
        self.vocab_size = _vocab_size(model)
        self.computes_in = _lowest_precision(model)

    def __call__(self, params: Params, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        args: tuple[Tensor, ...] = (input_ids,)
        kwargs = dict(self._extra)
        if self._mask_by_name:
            kwargs["attention_mask"] = attention_mask
        elif self._mask_by_position:
            args += (attention_mask,)
        if self._position_ids:
            kwargs["position_ids"] = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        wide = self._upcasts and any(p.dtype == torch.float64 for p in params.values())
        with _math_attention(), _StayFloat64() if wide else nullcontext():
            out = torch.func.functional_call(self._template, {**self._frozen, **params}, args, kwargs)
        return out if isinstance(out, Tensor) else out.logits

    def widened(self, dtype: torch.dtype = torch.float32) -> Policy:
        """The same policy with its frozen weights in at least ``dtype``, copied where they are not.

        A finite step vanishes in the rounding of half precision, wherever in the model that is.
        """
        wide = copy.copy(self)
        wide._frozen = {
            name: x.to(torch.promote_types(x.dtype, dtype)) if x.is_floating_point() else x
            for name, x in self._frozen.items()
        }
        wide.computes_in = torch.promote_types(self.computes_in, torch.float32)
        return wide


def functionalize(model: nn.Module, position_ids: bool = True) -> tuple[Policy, Params]:
    """Split a model into a pure ``apply`` and its trainable parameters, as ``(apply, params)``.

    ``apply(params, input_ids, attention_mask)`` gives the logits, (B, T, V), of the model in eval mode with eager
    attention, gradient checkpointing off; ``model`` itself, its ``training`` flag included, is left as it is. The
    forward may return a tensor or an object with ``.logits``. Where it takes ``position_ids`` they are derived from
    the attention mask, so that padding on the left does not matter under absolute positions; ``position_ids=False``
    leaves them out, which reproduces a trainer that omits them.

    ``params`` holds the parameters with ``requires_grad`` by name, tied ones once, as detached aliases of the live
    tensors: clone them before an optimizer step if the values before the step are wanted after it.

    Raises ``ValueError`` for a model without trainable parameters or with parameters on the meta device.

    Example:
        >>> class Bigram(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.table = nn.Embedding(5, 5)
        ...     def forward(self, input_ids, attention_mask):
        ...         return self.table(input_ids)
        >>> apply, params = functionalize(Bigram())
        >>> ids = torch.tensor([[1, 2, 3]])
        >>> apply(params, ids, ids > 0).shape, list(params)
        (torch.Size([1, 3, 5]), ['table.weight'])
    """
    named = dict(model.named_parameters())
    params = {name: p.detach() for name, p in named.items() if p.requires_grad}
    if not params:
        raise ValueError(f"model has {len(named)} parameters, none with requires_grad; unfreeze what the step trains")
    meta = [name for name, p in named.items() if p.is_meta]
    if meta:
        raise ValueError(f"model parameter {meta[0]!r} is on the meta device; load its weights first")
    return Policy(model, position_ids), params


def _meta_template(model: nn.Module) -> nn.Module:
    # The memo makes deepcopy put meta tensors where the weights are, so no weight is copied and ties stay ties.
    memo: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False) for p in model.parameters()
    }
    memo |= {id(b): torch.empty_like(b, device="meta") for b in model.buffers()}
    template = copy.deepcopy(model, memo).eval()
    for module in template.modules():
        # accelerate and kernel patches replace `forward` on the instance; torch.func needs the class's own.
        module.__dict__.pop("forward", None)
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = False  # type: ignore[assignment]
        for key, hook in list(module._forward_hooks.items()):
            # Trainers with checkpointing hook the embedding's output with requires_grad_(), an error under torch.func.
            if getattr(hook, "__name__", "").startswith("make_inputs_require_grad"):
                del module._forward_hooks[key]
    if _is_hugging_face(template):
        _base(template).set_attn_implementation("eager")
    return template


def _base(model: nn.Module) -> Any:
    get_base_model: Any = getattr(model, "get_base_model", None)
    return model if get_base_model is None else get_base_model()


def _is_hugging_face(model: nn.Module) -> bool:
    return hasattr(_base(model), "set_attn_implementation")


def _vocab_size(model: nn.Module) -> int | None:
    get_input_embeddings: Any = getattr(model, "get_input_embeddings", None)
    return None if get_input_embeddings is None else getattr(get_input_embeddings(), "num_embeddings", None)


def _lowest_precision(model: nn.Module) -> torch.dtype:
    dtypes = [p.dtype for p in model.parameters() if p.is_floating_point()]
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


def _forward_parameters(model: nn.Module) -> list[str]:
    return list(inspect.signature(_base(model).forward).parameters)


class _StayFloat64(TorchFunctionMode):
    """Float64 stays float64 where a model casts to float32: in its norms, router and attention's softmax.

    Those casts protect half precision. In float64 they would round every forward to float32, and worse: eager attention
    masks with the dtype's lowest number, and to a float32 softmax float64's lowest is -inf, so a query that sees
    nothing, as padding on the left does, would be NaN, and through it every gradient.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        casts = func in (torch.Tensor.to, torch.Tensor.float, torch.nn.functional.softmax)
        if casts and args[0].dtype == torch.float64:
            if func is torch.Tensor.float or any(arg is torch.float32 for arg in args[1:]):
                return args[0]
            if kwargs.get("dtype") is torch.float32:
                kwargs = {**kwargs, "dtype": torch.float64}
        return func(*args, **kwargs)


def _math_attention() -> AbstractContextManager[None]:
    # The fused kernels have no forward-mode derivative and no vmap rule; this binds scaled_dot_product_attention only.
    if hasattr(torch.nn, "attention"):
        return torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    return torch.backends.cuda.sdp_kernel(enable_flash=False, enable_math=True, enable_mem_efficient=False)
