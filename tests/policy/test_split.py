"""Policies split into backbone and LM head: what is cut, what reaches the vocabulary, which kernels a pass takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.cases import assert_close, random_batch
from helpers.hf_models import VOCAB, WIDTH, adapters, families, make_model, setup
from helpers.present import present
from helpers.reweighted import reweighted_gradient
from helpers.tolerances import assert_close_to_rounding, policy_terms
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, Gemma2Config, GraniteConfig, PretrainedConfig

import fx_influence as fx
from fx_influence.autodiff import gradients as derivatives
from fx_influence.autodiff.directional import token_jvp
from fx_influence.autodiff.gradients import batch_gradient, graphs_within_budget
from fx_influence.autodiff.gram import gradient_gram
from fx_influence.batching.microbatch import micro_batches
from fx_influence.policy.split import split_policy

pytestmark = pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*` is deprecated")
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 2 * WIDTH,
    "initializer_range": 0.3,
}
AFTER_THE_HEAD: dict[str, PretrainedConfig] = {
    "scaled": GraniteConfig(**SHAPE, logits_scaling=0.5),
    "capped": Gemma2Config(**SHAPE, final_logit_softcapping=2.0, attn_logit_softcapping=1.0),
}


class Watch(TorchDispatchMode):
    """The operations of a pass, and the largest tensor whose last axis is the vocabulary."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.names.add(func.overloadpacket.__name__)
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, Tensor) and x.dim() and x.shape[-1] == VOCAB:
                self.rows = max(self.rows, x.untyped_storage().nbytes() // x.element_size() // VOCAB)
        return out


@families
@adapters
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_split_policy_composes_to_policy(family: str, lora: bool, tied: bool, attention: str) -> None:
    apply, state = setup(make_model(family, lora=lora, tied=tied, attention=attention))
    policy, e = split_policy(apply), state.batch_e
    assert policy.vocab_size == VOCAB
    assert policy.left_alignable
    [part] = micro_batches(e, len(e.input_ids), left_alignable=False)
    inputs = state.params, e.input_ids, e.attention_mask
    with torch.no_grad():
        logits = apply(*inputs)
        for features in (
            policy.backbone(state.params, part),
            policy.backbone_eager(*inputs),
            policy.backbone_vmap(state.params, part),
        ):
            actual = policy.head(state.params, features)
            terms = policy_terms(state.params, WIDTH, 1)
            assert_close_to_rounding(actual[e.attention_mask], logits[e.attention_mask], terms=terms)


@pytest.mark.parametrize("kind", AFTER_THE_HEAD)
def test_cut_model_keeps_head_when_logits_are_scaled_or_capped(kind: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AFTER_THE_HEAD[kind]).double()
    apply, params = fx.make_functional(model)
    assert split_policy(apply).vocab_size is None
    batch = random_batch(torch.Generator().manual_seed(0), 3, WIDTH, VOCAB)
    plain = lambda *inputs: apply(*inputs)  # noqa: E731
    tangent = {name: torch.randn_like(p) for name, p in params.items()}
    for value, expected in zip(
        token_jvp(params, tangent, batch, apply), token_jvp(params, tangent, batch, plain), strict=True
    ):
        assert_close(value, expected)
    actual, expected_g = (batch_gradient(params, batch, f) for f in (apply, plain))
    for name, g in expected_g.items():
        actual_g = actual[name]
        assert g is not None
        assert actual_g is not None
        assert_close(actual_g, g)


def works(apply: fx.Policy, state: Any) -> dict[str, Callable[[], object]]:
    ones = {name: torch.ones_like(p) for name, p in state.params.items()}
    u, e = state.batch_u, state.batch_e
    return {
        "reverse": lambda: batch_gradient(state.params, u, apply),
        "forward mode": lambda: token_jvp(state.params, ones, u, apply),
        "influence": lambda: fx.influence(*state, apply=apply),
        "matrix": lambda: gradient_gram(state.params, e, u, ones, apply, chunk_size=1),
    }


@pytest.mark.slow
@pytest.mark.parametrize("work", ["reverse", "forward mode", "influence", "matrix"])
@pytest.mark.parametrize("at_once", [3, 10**6])
@adapters
def test_only_completion_tokens_reach_vocabulary_in_chunks(lora: bool, at_once: int, work: str) -> None:
    apply, state = setup(make_model("qwen2", lora=lora, tied=False))
    apply = apply.replace(max_logits=at_once * VOCAB)
    with Watch() as watch:
        works(apply, state)[work]()
    masks = [batch.completion_mask for batch in (state.batch_u, state.batch_e)]
    # The layer IO of a trained head is made for the completion tokens of one micro-batch at once.
    head_layer_io = not lora and work in ("influence", "matrix")
    largest = max(int(m.sum(-1).max()) * (len(m) if work == "influence" else 1) for m in masks)
    allowed = largest if head_layer_io else min(at_once, max(int(m.sum()) for m in masks))
    # The probes of the model have two or three rows of four tokens; the weights themselves have 16.
    assert 0 < watch.rows <= max(allowed, 12, 16)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_only_reverse_passes_use_fused_attention(attention: str) -> None:
    apply, state = setup(make_model("qwen2", attention=attention))
    seen = {}
    for name, work in works(apply, state).items():
        with Watch() as watch:
            work()
        seen[name] = any("flash_attention" in op for op in watch.names)
    fused = attention == "sdpa"
    assert seen == {"reverse": fused, "forward mode": False, "influence": fused, "matrix": fused}


@pytest.mark.parametrize("budget", [0, 10**9])
def test_reweighted_gradient_keeps_graphs_within_budget(budget: int) -> None:
    apply, state = setup(make_model("qwen2"))
    calls = []

    def counting(params: fx.Params, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        calls.append(torch.is_grad_enabled())
        return apply(params, input_ids, attention_mask)

    e = state.batch_e

    def coefficients_fn(values: fx.TokenValues) -> fx.Batch:
        return e._replace(coefficients=values.entropies, entropy_coefficients=values.logprobs)

    weighted, g = reweighted_gradient(state.params, e, counting, coefficients_fn, 1.0, 2, budget)
    count = -(-len(e.input_ids) // 2)
    assert count > 2
    # The first micro-batch keeps its graph in any case.
    assert calls == ([True] * count if budget else [True] + [False] * (count - 1) + [True] * (count - 1))
    expected = batch_gradient(state.params, weighted, apply)
    largest = max(float(g.abs().max()) for g in expected.values() if g is not None)
    for name, value in expected.items():
        actual_g = g[name]
        assert value is not None
        assert actual_g is not None
        assert_close_to_rounding(actual_g, value, terms=policy_terms(state.params, WIDTH), scale=largest, name=name)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True])
def test_recompute_reuses_cached_linear_outputs(lora: bool) -> None:
    apply, state = setup(make_model("qwen2", lora=lora))
    e = state.batch_e._replace(coefficients=state.batch_e.completion_mask.float())
    flops: list[int] = []
    gradients: list[Any] = []
    sizes = [0, 0, 0]

    def record_sizes(micro_batches: int, graph: int, cache: int, budget: int) -> int:
        sizes[:] = micro_batches, graph, cache
        return graphs_within_budget(micro_batches, graph, cache, budget)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(derivatives, "graphs_within_budget", record_sizes)
        for budget_of in (lambda: 10**9, lambda: sizes[0] * sizes[2], lambda: 0):
            with FlopCounterMode(display=False) as counter:
                gradients.append(reweighted_gradient(state.params, e, apply, lambda _: e, 1.0, 2, budget_of())[1])
            flops.append(counter.get_total_flops())
    everything, caches, nothing = flops
    largest = max(float(g.abs().max()) for g in gradients[0].values())
    # Micro-batches come longest first, so the caches of all fit; attention is recomputed.
    assert caches - everything < 0.2 * (nothing - everything)
    for other in gradients[1:]:
        for name, g in gradients[0].items():
            assert_close_to_rounding(other[name], g, terms=policy_terms(state.params, WIDTH), scale=largest, name=name)


@pytest.mark.parametrize(("budget", "graphs"), [(1000, 10), (999, 9), (460, 1), (459, 0), (400, 0), (0, 0)])
def test_graphs_within_budget_leaves_bytes_for_caches(budget: int, graphs: int) -> None:
    assert graphs_within_budget(10, 100, 40, budget) == graphs
    assert graphs_within_budget(10, 100, 0, budget) == budget // 100, "a model without linear maps"


def test_backbone_holds_no_live_tensor() -> None:
    apply, _ = setup(make_model("qwen2"))
    live = [x for x in vars(apply.templates.backbone.module).values() if isinstance(x, Tensor) and not x.is_meta]
    assert not live
    assert all(p.is_meta for p in apply.templates.backbone.module.parameters())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit")
@adapters
def test_compiled_policy_matches_plain_influences(lora: bool) -> None:
    # Compiling takes a time in proportion to the layers.
    model = make_model("qwen2", lora=lora, attention="sdpa", layers=1)
    plain, state = setup(model)
    compiled, _ = fx.make_functional(model, compiled=True)
    one, other = (fx.influence(*state, apply=apply, matrix=True) for apply in (compiled, plain))
    terms, size = policy_terms(state.params, WIDTH), present(other.matrix).abs().sum()
    for field in ("per_sequence", "per_token", "stderr"):
        assert_close_to_rounding(
            getattr(one, field), getattr(other, field), terms=terms, scale=size, dtype=torch.float32, name=field
        )
    assert_close_to_rounding(one.residual, 0.0, terms=terms, scale=size, dtype=torch.float32)
