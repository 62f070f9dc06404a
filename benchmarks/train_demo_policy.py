"""Train the demo policy that ships with the package: a tiny Qwen2 doing sums, stopped in the middle of a GRPO run.

Two phases. A supervised warm-up on written-out chains ("3+14+9=" -> "17+9=26") and on bare answers ("26"), stopped
while the policy is still often wrong; then GRPO on the exact-match reward with a fresh AdamW. What is saved is a
training state: weights, tokenizer and the optimizer as it stands before its next step.

    python benchmarks/train_demo_policy.py --out fx_influence/lab/demo
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from transformers.trainer_pt_utils import get_parameter_names

from fx_influence.interop.prompts import Prompt
from fx_influence.interop.restore import NO_DECAY
from fx_influence.interop.rewards import exact_match
from fx_influence.interop.rollouts import Rollout, collate
from fx_influence.interop.sampling import sample_rewarded
from fx_influence.losses import coefficients
from fx_influence.types import Batch

MAX_NEW_TOKENS = 20
LARGEST = 19
WRITTEN_OUT = 0.8
PROMPTS_PER_STEP, COMPLETIONS = 16, 8


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, with distinct padding and end-of-sequence tokens."""
    # Qwen2's tokenizer class, which a Qwen2 checkpoint is loaded with, adds this very token where there is none.
    eos = "<|endoftext|>"
    vocabulary = {token: i for i, token in enumerate(["<pad>", eos, *"0123456789+-="])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token=eos)


def build_model(tokenizer: PreTrainedTokenizerFast) -> Qwen2ForCausalLM:
    """A Qwen2 of under 240k parameters, tied embeddings, randomly initialised."""
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    return Qwen2ForCausalLM(config)


def draw_chain(rng: random.Random) -> tuple[str, str, str]:
    """(prompt, chain that reduces it one operation at a time, answer); every partial result is within 0..99."""
    while True:
        numbers = [rng.randint(1, LARGEST) for _ in range(rng.choice((3, 4)))]
        signs = [rng.choice("+-") for _ in numbers[1:]]
        total, states = numbers[0], []
        for k, (sign, number) in enumerate(zip(signs, numbers[1:], strict=True), 1):
            total += number if sign == "+" else -number
            rest = "".join(s + str(n) for s, n in zip(signs[k:], numbers[k + 1 :], strict=True))
            states.append((total, f"{total}{rest}"))
        if all(0 <= value <= 99 for value, _ in states):
            prompt = str(numbers[0]) + "".join(s + str(n) for s, n in zip(signs, numbers[1:], strict=True)) + "="
            return prompt, "=".join(text for _, text in states), str(total)


def draw_prompts(rng: random.Random, count: int, taken: set[str], prefix: str) -> list[Prompt]:
    """``count`` new prompts, none of them in ``taken``, to which they are added."""
    prompts: list[Prompt] = []
    while len(prompts) < count:
        text, _, answer = draw_chain(rng)
        if text not in taken:
            taken.add(text)
            prompts.append(Prompt(f"{prefix}{len(prompts):03d}", text, {"answer": answer}))
    return prompts


def supervised_batch(rng: random.Random, tokenizer: Any, size: int, held_out: set[str]) -> Batch:
    """Correct completions of fresh prompts: mostly written out, else the bare answer."""
    rows: list[Rollout] = []
    while len(rows) < size:
        text, chain, answer = draw_chain(rng)
        if text in held_out:
            continue
        target = chain if rng.random() < WRITTEN_OUT else answer
        ids = (*tokenizer(target)["input_ids"], tokenizer.eos_token_id)
        rows.append(Rollout("", "", 0, text, target, tuple(tokenizer(text)["input_ids"]), ids, True, (0.0,) * len(ids)))
    return collate(rows, tokenizer.pad_token_id)


def token_scores(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies (B, T) of the tokens, column 0 zero."""
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask.long()).logits[:, :-1]
    logp = logits.log_softmax(-1)
    chosen = logp.gather(-1, batch.input_ids[:, 1:, None]).squeeze(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    return nn.functional.pad(chosen, (1, 0)), nn.functional.pad(entropy, (1, 0))


def draw(model: nn.Module, tokenizer: Any, prompts: Sequence[Prompt], completions: int, seed: int) -> list[Rollout]:
    """On-policy rollouts with exact-match rewards and group advantages."""
    return sample_rewarded(
        model,
        tokenizer,
        prompts,
        exact_match,
        completions_per_prompt=completions,
        max_new_tokens=MAX_NEW_TOKENS,
        temperature=1.0,
        seed=seed,
        batch_size=256,
    )


def measure(
    model: nn.Module, tokenizer: Any, prompts: Sequence[Prompt], completions: int, seed: int
) -> dict[str, float]:
    """Accuracy, entropy per token, completion length and the share of prompts with a nonzero advantage."""
    rollouts = draw(model, tokenizer, prompts, completions, seed)
    batch = collate(rollouts, tokenizer.pad_token_id)
    with torch.no_grad():
        _, entropy = token_scores(model, batch)
    return {
        "accuracy": sum(r.reward or 0.0 for r in rollouts) / len(rollouts),
        "entropy": entropy[batch.completion_mask].mean().item(),
        "mean_length": sum(len(r.completion_ids) for r in rollouts) / len(rollouts),
        "finished": sum(r.finished for r in rollouts) / len(rollouts),
        "groups_with_advantage": len({r.group for r in rollouts if r.advantage}) / len(prompts),
    }


def warm_up(model: nn.Module, tokenizer: Any, args: argparse.Namespace, held_out: set[str]) -> None:
    """Supervised steps until the accuracy on fresh prompts reaches ``args.stop_at``."""
    rng = random.Random(args.seed + 1)
    probe = draw_prompts(rng, 128, set(held_out), "probe")
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.warmup_lr, weight_decay=0.01)
    for step in range(args.warmup_steps):
        optimizer.param_groups[0]["lr"] = args.warmup_lr * min((step + 1) / 100, 1 - step / args.warmup_steps)
        batch = supervised_batch(rng, tokenizer, 128, held_out)
        logp, _ = token_scores(model, batch)
        loss = -logp[batch.completion_mask].mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 100 == 0:
            figures = measure(model, tokenizer, probe, 4, args.seed)
            print(f"warm-up {step + 1:5d}  loss {loss.item():.3f}  {_line(figures)}", flush=True)
            if figures["accuracy"] >= args.stop_at:
                return


def fresh_optimizer(model: nn.Module, lr: float) -> torch.optim.AdamW:
    """AdamW with the two parameter groups of the Hugging Face Trainer: norms and biases are not decayed."""
    decay = set(get_parameter_names(model, [nn.LayerNorm], NO_DECAY))
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in trainable if name in decay], "weight_decay": 0.01},
        {"params": [p for name, p in trainable if name not in decay], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.99))


def reinforce(
    model: nn.Module,
    tokenizer: Any,
    optimizer: torch.optim.Optimizer,
    prompts: Sequence[Prompt],
    args: argparse.Namespace,
) -> list[dict[str, float]]:
    """GRPO steps, one on-policy batch each; returns what each step saw before its update."""
    rng = random.Random(args.seed + 2)
    log: list[dict[str, float]] = []
    for step in range(args.steps):
        rollouts = draw(
            model, tokenizer, rng.sample(prompts, PROMPTS_PER_STEP), COMPLETIONS, args.seed * 100_003 + step
        )
        batch = collate(rollouts, tokenizer.pad_token_id)
        advantages = torch.tensor([r.advantage or 0.0 for r in rollouts])
        c = coefficients("dr_grpo", advantages, batch.completion_mask, max_completion_length=MAX_NEW_TOKENS)
        logp, entropy = token_scores(model, batch)
        optimizer.zero_grad()
        (-(c * logp).sum()).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        log.append(
            {
                "step": step + 1,
                "learning_rate": optimizer.param_groups[0]["lr"],
                "reward": sum(r.reward or 0.0 for r in rollouts) / len(rollouts),
                "entropy": entropy[batch.completion_mask].mean().item(),
                "grad_norm": norm.item(),
                "completion_length": sum(len(r.completion_ids) for r in rollouts) / len(rollouts),
                "groups_with_advantage": len({r.group for r in rollouts if r.advantage}) / PROMPTS_PER_STEP,
            }
        )
        print(f"grpo {step + 1:4d}  {_line(log[-1])}", flush=True)
    return log


def save(out: Path, model: Any, tokenizer: Any, optimizer: torch.optim.Optimizer, log: list[dict[str, float]]) -> None:
    """The checkpoint in the Hugging Face layout, with the training log beside it."""
    policy = out / "policy"
    model.save_pretrained(policy)
    tokenizer.save_pretrained(policy)
    torch.save(optimizer.state_dict(), policy / "optimizer.pt")
    (policy / "training_log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))


def save_prompts(path: Path, prompts: Sequence[Prompt]) -> None:
    """One ``{"id", "prompt", "answer"}`` a line."""
    path.write_text("".join(json.dumps({"id": p.id, "prompt": p.text, **p.columns}) + "\n" for p in prompts))


def _line(figures: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in figures.items() if name != "step")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for policy/ and the prompt files")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=60, help="GRPO steps")
    parser.add_argument("--lr", type=float, default=1e-4, help="learning rate of the GRPO steps")
    parser.add_argument("--warmup-steps", type=int, default=2400, help="most supervised steps")
    parser.add_argument("--warmup-lr", type=float, default=4e-3)
    parser.add_argument("--stop-at", type=float, default=0.4, help="accuracy at which the warm-up ends")
    parser.add_argument("--quick", action="store_true", help="a few steps of each phase, to try the script")
    args = parser.parse_args()
    if args.quick:
        args.warmup_steps, args.steps = min(args.warmup_steps, 20), min(args.steps, 2)
    return args


def main() -> None:
    """Train, measure before and after the GRPO steps on the evaluation prompts, save."""
    args = _arguments()
    started = time.perf_counter()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    rng, taken = random.Random(args.seed), set[str]()
    train = draw_prompts(rng, 256, taken, "train-")
    evaluation = draw_prompts(rng, 256, taken, "eval-")
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    print(f"{sum(p.numel() for p in model.parameters())} parameters", flush=True)
    warm_up(model, tokenizer, args, taken)
    before = measure(model, tokenizer, evaluation, 8, args.seed)
    optimizer = fresh_optimizer(model, args.lr)
    log = reinforce(model, tokenizer, optimizer, train, args)
    after = measure(model, tokenizer, evaluation, 8, args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    save(args.out, model, tokenizer, optimizer, log)
    save_prompts(args.out / "train_prompts.jsonl", train)
    save_prompts(args.out / "eval_prompts.jsonl", evaluation)
    print(f"before  {_line(before)}\nafter   {_line(after)}\nseconds {time.perf_counter() - started:.0f}")


if __name__ == "__main__":
    main()
