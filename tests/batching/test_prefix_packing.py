"""Prefix packing: prompts that rows share pass through the model once, with the same results from fewer tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.cases import TinyPolicy
from helpers.hf_models import VOCAB, WIDTH, adapters, families, make_model, warm_state
from helpers.present import present
from helpers.reweighted import reweighted_gradient
from helpers.tolerances import assert_close_to_rounding, policy_terms
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, MistralConfig, Qwen2Config

import fx_influence as fx
from fx_influence.autodiff.directional import token_jvp
from fx_influence.autodiff.gradients import batch_gradient, gradient_with_cache
from fx_influence.autodiff.perturbed_values import perturbed_token_values
from fx_influence.autodiff.token_values import all_token_values
from fx_influence.batching.microbatch import MicroBatch
from fx_influence.batching.packed_layout import LengthBucket, PackedLayout
from fx_influence.batching.prefix_packing import MIN_BUCKET, MIN_LENGTH_RATIO, packed_micro_batches
from fx_influence.policy.modes.packed_attention import PackedAttention
from fx_influence.policy.split import split_policy
from fx_influence.types import Apply, Batch, Params, TokenValues

pytestmark = pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*` is deprecated")


def group_batch(seed: int, prompts: int, rows: int, width: int = WIDTH, gaps: bool = False) -> Batch:
    """Return rows in random order, each one of the prompts at a random column and a random completion."""
    generator = torch.Generator().manual_seed(seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    texts = [torch.randint(VOCAB, (number(1, width // 2),), generator=generator) for _ in range(prompts)]
    ids = torch.randint(VOCAB, (rows, width), generator=generator)
    attention, completion = (torch.zeros(rows, width, dtype=torch.bool) for _ in range(2))
    group = torch.randint(prompts, (rows,), generator=generator)
    for i, k in enumerate(group.tolist()):
        begin = number(0, width // 4)
        first = begin + len(texts[k])
        end = number(first + 1, width)
        ids[i, begin:first] = texts[k]
        attention[i, begin:end] = completion[i, first:end] = True
        if gaps:
            completion[i, first + 1 : end - 1] &= torch.rand(end - first, generator=generator)[2:] < 0.6
    c, b = (completion * torch.randn(rows, width, generator=generator, dtype=torch.float64) for _ in range(2))
    return Batch(ids, attention, completion, c, b, group)


@given(
    seed=st.integers(0, 10_000),
    prompts=st.integers(1, 4),
    rows=st.integers(2, 30),
    chunk=st.sampled_from([None, 1, 3, 8]),
    tokens=st.sampled_from([1, 40, 2048]),
    gaps=st.booleans(),
)
def test_packed_micro_batches_score_each_token_once(
    seed: int, prompts: int, rows: int, chunk: int | None, tokens: int, gaps: bool
) -> None:
    batch = group_batch(seed, prompts, rows, gaps=gaps)
    chunks = packed_micro_batches(batch, chunk, tokens)
    assume(chunks is not None)
    assert chunks is not None
    assert sorted(torch.cat([micro_batch.row_index for micro_batch in chunks]).tolist()) == list(range(rows))
    flat_index = torch.cat([micro_batch.flat_index for micro_batch in chunks])
    assert sorted(flat_index.tolist()) == batch.completion_mask.flatten().nonzero().flatten().tolist()
    for micro_batch in chunks:
        assert chunk is None or len(micro_batch.row_index) <= chunk
        assert chunk is not None or micro_batch.input_ids.numel() <= tokens or len(micro_batch.row_index) == 1
        assert len(micro_batch.row_index) < 2 or micro_batch.input_ids.numel() == packed_token_count(
            batch, micro_batch.row_index
        )
        assert torch.equal(micro_batch.targets, batch.input_ids.flatten()[micro_batch.flat_index])
        for column, index in zip(micro_batch.position.tolist(), micro_batch.flat_index.tolist(), strict=True):
            row, position = divmod(index, WIDTH)
            before = batch.input_ids[row, :position][batch.attention_mask[row, :position]].tolist()
            assert attended_by(micro_batch, column) == [(k, token) for k, token in enumerate(before)]


def packed_token_count(batch: Batch, members: torch.Tensor) -> int:
    """Return the tokens of each distinct prompt and of each completion but its last token, which scores nothing."""
    first = batch.completion_mask.float().argmax(1)
    begin = batch.attention_mask.float().argmax(1)
    prompts = {tuple(batch.input_ids[i, begin[i] : first[i]].tolist()) for i in members.tolist()}
    last = WIDTH - 1 - batch.completion_mask.flip(1).float().argmax(1)
    return sum(map(len, prompts)) + int((last - first)[members].sum())


def attended_by(micro_batch: MicroBatch, column: int) -> list[tuple[int, int]]:
    """Return position and token of everything that the token in a column attends to, itself last."""
    assert micro_batch.layout is not None
    index = int(micro_batch.layout.inverse_index[column])
    for bucket in micro_batch.layout.buckets:
        if index < bucket.queries.numel():
            s, i = divmod(index, bucket.queries.shape[1])
            assert int(bucket.queries[s, i]) == column
            keys = bucket.keys[s][bucket.mask[s, 0, i]]
            assert int(keys[-1]) == column
            return list(
                zip(
                    micro_batch.layout.position_ids[0, keys].tolist(),
                    micro_batch.input_ids[0, keys].tolist(),
                    strict=True,
                )
            )
        index -= bucket.queries.numel()
    raise AssertionError(f"column {column} is in no bucket")


@given(seed=st.integers(0, 10_000), rows=st.integers(20, 60))
def test_length_buckets_hold_similar_lengths(seed: int, rows: int) -> None:
    chunks = packed_micro_batches(group_batch(seed, 3, rows, width=40), None)
    assume(chunks is not None)
    for micro_batch in chunks or []:
        assert micro_batch.layout is not None
        queries_before = 0
        for bucket in micro_batch.layout.buckets:
            count, length = bucket.queries.shape
            places = micro_batch.layout.inverse_index[
                (micro_batch.layout.inverse_index >= queries_before)
                & (micro_batch.layout.inverse_index < queries_before + count * length)
            ]
            lengths = torch.bincount((places - queries_before) // length, minlength=count)
            assert lengths.min() > 0
            assert lengths.max() == length
            assert (lengths < MIN_LENGTH_RATIO * length).sum() < MIN_BUCKET
            queries_before += count * length


def without_packing(apply: Apply) -> Apply:
    """Return the same function without its split, so that every row passes through it in full."""
    return lambda params, ids, mask: apply(params, ids, mask)


def random_tangent(params: Params, seed: int) -> Params:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(p.shape, generator=generator, dtype=p.dtype) for name, p in params.items()}


def assert_values_close(actual: TokenValues, expected: TokenValues, params: Params) -> None:
    for x, y in zip(actual, expected, strict=True):
        assert_near(x, y, params)


def assert_near(actual: Tensor, expected: Tensor, params: Params, scale: Any = None, name: str = "") -> None:
    """Assert equality up to the rounding of float64 passes over rows of a prompt and a completion."""
    terms = policy_terms(params, WIDTH)
    assert_close_to_rounding(actual, expected, terms=terms, scale=scale, dtype=torch.float64, name=name)


@pytest.mark.slow
@families
@adapters
def test_packing_preserves_values_and_derivatives(family: str, lora: bool) -> None:
    apply, params = fx.make_functional(make_model(family, lora=lora, attention="sdpa").double())
    batch, unpacked = group_batch(1, 2, 12), without_packing(apply)
    assert [micro_batch.layout is not None for micro_batch in split_policy(apply).micro_batches(batch, 5)] == [True] * 3
    assert_values_close(all_token_values(params, batch, apply), all_token_values(params, batch, unpacked), params)
    expected = batch_gradient(params, batch, unpacked)
    grads, caches = gradient_with_cache(params, batch, apply, 0.7, 5, memory_budget=2**30)
    at_temperature = batch_gradient(params, batch, unpacked, 0.7)
    largest = max(float(present(g).abs().max()) for g in expected.values())
    for name in params:
        assert_near(present(batch_gradient(params, batch, apply)[name]), present(expected[name]), params, largest, name)
        assert_near(present(grads[name]), present(at_temperature[name]), params, largest, name)
    v = random_tangent(params, 3)
    assert_values_close(token_jvp(params, v, batch, apply), token_jvp(params, v, batch, unpacked), params)
    # A full GPT-2 has no plain linear layers.
    assert [cache is not None for cache in caches] == [lora or family != "gpt2"] * 3
    assert_values_close(
        token_jvp(params, v, batch, apply, 0.7, 5, caches), token_jvp(params, v, batch, unpacked, 0.7), params
    )
    block = {name: x.unsqueeze(0) for name, x in v.items()}
    for chunk in (None, 4):
        # Several directions in a pass, and one.
        given_ = params, block, 1e-3, batch
        assert_values_close(
            perturbed_token_values(*given_, apply, 1.0, chunk),
            perturbed_token_values(*given_, unpacked, 1.0, chunk),
            params,
        )


def test_packing_preserves_reweighted_gradient() -> None:
    apply, params = fx.make_functional(make_model("qwen2", attention="sdpa").double())
    batch = group_batch(2, 3, 20)

    def coefficients_fn(values: TokenValues) -> Batch:
        return batch._replace(coefficients=values.entropies - values.entropies.mean())

    for budget in (0, 2**14, 2**30):
        weighted, grads = reweighted_gradient(params, batch, apply, coefficients_fn, 1.0, 6, budget)
        as_whole, expected = reweighted_gradient(params, batch, without_packing(apply), coefficients_fn)
        assert_near(present(weighted.coefficients), present(as_whole.coefficients), params)
        largest = max(float(present(g).abs().max()) for g in expected.values())
        for name in params:
            assert_near(present(grads[name]), present(expected[name]), params, largest, name)


@pytest.mark.parametrize("options", [{}, {"matrix": True}, {"per_token": False}, {"memory_budget": 0}])
def test_packing_preserves_influences(options: dict[str, Any]) -> None:
    model = make_model("qwen2", attention="sdpa").double()
    apply, params = fx.make_functional(model)
    u, e, state = group_batch(3, 3, 12), group_batch(4, 4, 24), warm_state(model)
    actual = fx.influence(params, u, e, state, apply=apply, **options)
    expected = fx.influence(params, u, e, state, apply=without_packing(apply), **options)
    # Inner products over all weights are at most a tenth of their terms.
    size = 10 * expected.per_sequence.abs().sum()
    for name in ("per_sequence", "per_token", "stderr", "total", "total_stderr", "matrix"):
        x, y = getattr(actual, name), getattr(expected, name)
        assert (x is None) == (y is None)
        if x is not None:
            assert_near(x, y, params, size, name)


def test_packing_computes_prompt_once() -> None:
    apply, params = fx.make_functional(make_model("qwen2", attention="sdpa"))
    ids = torch.randint(VOCAB, (16, 24), generator=torch.Generator().manual_seed(0))
    other, index = ids.clone(), torch.arange(24)
    ids[:, :12] = ids[0, :12]
    costs = []
    for ids_case in (ids, other):
        batch = Batch(ids_case, torch.ones_like(ids_case, dtype=torch.bool), (index >= 12).expand(16, 24))
        with FlopCounterMode(display=False) as counter:
            all_token_values(params, batch, apply)
        costs.append(counter.get_total_flops())
    # Linear layers take 12 + 16 x 11 tokens in flat_index of 16 x 23; the head and attention save less.
    assert 0.5 < costs[0] / costs[1] < 0.6


@pytest.mark.parametrize(("tokens", "sizes"), [(28, [28, 28]), (25, [14] * 4)])
def test_packed_micro_batches_respect_token_limit(tokens: int, sizes: list[int]) -> None:
    prompt, index = torch.arange(8) // 2, torch.arange(13)
    ids = torch.where(index < 10, prompt.unsqueeze(1), 9)
    batch = Batch(ids, torch.ones(8, 13, dtype=torch.bool), (index >= 10).expand(8, 13))
    chunks = packed_micro_batches(batch, None, tokens)
    assert chunks is not None
    assert [micro_batch.input_ids.numel() for micro_batch in chunks] == sizes
    assert packed_micro_batches(batch, None, 13) is None, (
        "rows of a prompt that do not fit into one micro-batch share nothing"
    )


def test_packed_attention_repeats_key_heads_off_cpu() -> None:
    chunks = packed_micro_batches(group_batch(1, 2, 12), None)
    assert chunks is not None
    micro_batch = chunks[0]._replace(layout=layout_on(chunks[0].layout, "meta"))
    assert micro_batch.layout is not None
    q, k = (torch.ones(1, heads, micro_batch.input_ids.numel(), 4, device="meta") for heads in (4, 2))
    seen = []

    class Inside(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is F.scaled_dot_product_attention:
                seen.append(([x.shape[1] for x in args[:3]], kwargs))
            return func(*args, **(kwargs or {}))

    with Inside(), PackedAttention(micro_batch.layout):
        out = F.scaled_dot_product_attention(q, k, k, is_causal=True, scale=0.5, enable_gqa=True)
    assert seen == [([4, 4, 4], {"scale": 0.5})] * len(micro_batch.layout.buckets)
    assert out.shape == q.shape


def layout_on(layout: Any, device: str) -> Any:
    blocks = [LengthBucket(*(x.to(device) for x in block)) for block in layout.buckets]
    return PackedLayout(
        layout.position_ids.to(device), blocks, layout.inverse_index.to(device), layout.token_row.to(device)
    )


WINDOWS = {
    "by its width": MistralConfig(sliding_window=6),
    "by layers": Qwen2Config(use_sliding_window=True, sliding_window=6, max_window_layers=1),
}


@pytest.mark.parametrize("kind", WINDOWS)
def test_packing_is_off_when_attention_has_a_window(kind: str) -> None:
    config = WINDOWS[kind]
    small = {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    config.update({**small, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).double()
    apply, params = fx.make_functional(model)
    assert not split_policy(apply).prefix_shareable
    batch = group_batch(1, 2, 12)
    assert_values_close(
        all_token_values(params, batch, apply), all_token_values(params, batch, without_packing(apply)), params
    )


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_packing_is_off_when_attention_is_not_plain_sdpa() -> None:
    for model in (make_model("qwen2", attention="eager"), TinyPolicy(vocab=VOCAB, max_len=WIDTH)):
        assert not split_policy(fx.make_functional(model)[0]).prefix_shareable
    model = make_model("qwen2", attention="sdpa")
    assert not split_policy(fx.make_functional(model, position_ids=False)[0]).prefix_shareable
    assert not split_policy(fx.make_functional(model, compiled=True)[0]).prefix_shareable
    assert split_policy(fx.make_functional(model)[0]).prefix_shareable


def test_packing_is_off_when_eager_attention_outputs_zero() -> None:
    model = make_model("qwen2", attention="eager")
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
    assert not split_policy(fx.make_functional(model)[0]).prefix_shareable


def test_packed_micro_batches_is_none_when_rows_do_not_fit() -> None:
    batch = group_batch(1, 2, 12)
    assert packed_micro_batches(batch, None) is not None
    distinct = torch.randint(VOCAB, batch.input_ids.shape, generator=torch.Generator().manual_seed(0))
    assert packed_micro_batches(batch._replace(input_ids=distinct), None) is None, "nothing is saved"
    attention = batch.attention_mask.clone()
    attention[3, int(attention[3].float().argmax()) + 1] = False
    assert packed_micro_batches(batch._replace(attention_mask=attention), None) is None, "a gap"
    completion = batch.completion_mask.clone()
    completion[3] = False
    assert packed_micro_batches(batch._replace(completion_mask=completion), None) is None, "no completion"


@pytest.mark.parametrize("change", [{"is_causal": False}, {"attn_mask": torch.ones(4, 4)}, {"dropout_p": 0.1}])
def test_packed_attention_rejects_other_arguments(change: dict[str, Any]) -> None:
    chunks = packed_micro_batches(group_batch(1, 2, 12), None)
    assert chunks is not None
    assert chunks[0].layout is not None
    x = torch.ones(1, 2, chunks[0].input_ids.numel(), 4)
    with PackedAttention(chunks[0].layout), pytest.raises(NotImplementedError, match="attn_implementation='eager'"):
        F.scaled_dot_product_attention(x, x, x, **{"is_causal": True, **change})
