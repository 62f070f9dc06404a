"""Numbers that are not finite in rollout files: read past where none counts, refused by name where one does."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
from helpers.rollout_writers import PAD, ids, make_tokenizer, write_nemo_rl

from fx_influence.interop.rollouts.batch import collate
from fx_influence.interop.rollouts.native_format import write_rollouts
from fx_influence.interop.rollouts.read import read_rollouts
from fx_influence.interop.rollouts.record import Rollout

TOKENIZER = make_tokenizer()
NAN = math.nan
OWN = Rollout("p/0", "p", 0, "1+1=", "2", ids("1+1="), ids("222"), True, (-0.5, -0.25, -1.0), 1.0, 0.5)
VERL = {"input": "1+1=", "output": "2", "gts": "2", "score": 1.0, "step": 5}
PRIME = {
    "schema_version": 1,
    "step": 6,
    "rank": 1,
    "export_sequence_idx": 0,
    "token_ids": [4, 5, 6, 7],
    "loss_mask": [False, False, True, True],
    "advantages": [0.5] * 4,
    "inference_logprobs": [0.0, 0.0, -0.5, -0.25],
    "trainer_logprobs": [0.0] * 4,
    "rewards": [1.0] * 4,
}
NEMO: dict[str, list[Any]] = {
    "rewards": [1.0],
    "input_lengths": [4],
    "token_ids": [[4, 5, 6, 7, 0]],
    "token_loss_mask": [[0, 0, 1, 1, 0]],
    "sample_loss_mask": [1.0],
    "advantages": [[0.5] * 5],
    "generation_logprobs": [[0.0, 0.0, -0.5, -0.25, 0.0]],
    "prev_logprobs": [[0.0] * 5],
}
TRL = {"step": [3], "prompt": ["1+1="], "completion": ["2"], "advantage": [0.5], "exact": [1.0]}


def written(path: Path, kind: str, changes: dict[str, Any]) -> Path:
    if kind == "nemo_rl":
        return write_nemo_rl(path / "r.jsonl", {**NEMO, **changes})
    if kind == "trl":
        import pyarrow
        import pyarrow.parquet

        # not by pandas, which writes NaN as null
        pyarrow.parquet.write_table(pyarrow.table({**TRL, **changes}), path / "r.parquet")
        return path / "r.parquet"
    record = {"own": dataclasses.asdict(OWN), "verl": VERL, "prime_rl": PRIME}[kind]
    (path / "r.jsonl").write_text(json.dumps({**record, **changes}))
    return path / "r.jsonl"


UNREAD: dict[str, tuple[str, dict[str, Any]]] = {
    "another field of ours": ("own", {"note": NAN}),
    "a nested one": ("own", {"note": {"of": [1.0, NAN]}}),
    "log-prob of a tool's token": (
        "own",
        {"completion_mask": [True, False, True], "behaviour_logprobs": [-0.5, NAN, -1.0]},
    ),
    "reward beside an advantage": ("own", {"reward": NAN}),
    "extra of verl's reward": ("verl", {"format_score": NAN}),
    "prime-rl's prompt": ("prime_rl", {"inference_logprobs": [NAN, -math.inf, -0.5, -0.25]}),
    "prime-rl's advantage there": ("prime_rl", {"advantages": [NAN, NAN, 0.5, 0.5]}),
    "prime-rl's weight there": ("prime_rl", {"rl_weights": [NAN, NAN, 1.0, 1.0]}),
    "prime-rl's rewards": ("prime_rl", {"rewards": [NAN] * 4}),
    "prime-rl's other log-probs": ("prime_rl", {"trainer_logprobs": [NAN] * 4}),
    "NeMo-RL's padding": ("nemo_rl", {"generation_logprobs": [[0.0, 0.0, -0.5, -0.25, NAN]]}),
    "NeMo-RL's padding of another type": ("nemo_rl", {"token_ids": [[4, 5, 6, 7, None]]}),
    "NeMo-RL's prompt": ("nemo_rl", {"advantages": [[NAN, NAN, 0.5, 0.5, NAN]]}),
    "NeMo-RL's reward": ("nemo_rl", {"rewards": [NAN]}),
    "NeMo-RL's other log-probs": ("nemo_rl", {"prev_logprobs": [[NAN] * 5]}),
    "another column of TRL": ("trl", {"other": [NAN]}),
    "a text beside it": ("trl", {"note": ["x"], "other": [-math.inf]}),
    "TRL's reward": ("trl", {"exact": [NAN]}),
}


@pytest.mark.parametrize("case", UNREAD)
def test_not_finite_is_accepted_where_it_does_not_count(tmp_path: Path, case: str) -> None:
    kind, changes = UNREAD[case]
    (rollout,) = read_rollouts(written(tmp_path, kind, changes), TOKENIZER)
    plain = tmp_path / "plain"
    plain.mkdir()
    (expected,) = read_rollouts(written(plain, kind, {}), TOKENIZER)
    # Rewards that are not numbers are none, and so are TRL's where two columns may be it.
    unjudged = "reward" in case or kind == "trl"
    if case == "log-prob of a tool's token":
        expected = dataclasses.replace(
            expected, completion_mask=(True, False, True), behaviour_logprobs=(-0.5, 0.0, -1.0)
        )
    assert rollout == (dataclasses.replace(expected, reward=None) if unjudged and rollout.reward is None else expected)
    write_rollouts(tmp_path / "again.jsonl", [rollout])
    assert read_rollouts(tmp_path / "again.jsonl") == [rollout]
    assert collate([rollout], PAD).completion_mask.any()


COUNTS: dict[str, tuple[str, dict[str, Any], str]] = {
    "reward of nobody's advantage": ("own", {"reward": NAN, "advantage": None}, "field 'reward' holds the number NaN"),
    "our advantage": ("own", {"advantage": -math.inf}, "field 'advantage' holds the number -Infinity"),
    "our sampled log-prob": (
        "own",
        {"behaviour_logprobs": [-0.5, NAN, -1.0]},
        "field 'behaviour_logprobs' holds the number NaN",
    ),
    "our coefficient": ("own", {"coefficients": [0.5, NAN, 1.0]}, "field 'coefficients' holds the number NaN"),
    "verl's score": ("verl", {"score": NAN}, "field 'score' holds the number NaN"),
    "prime-rl's sampled log-prob": (
        "prime_rl",
        {"inference_logprobs": [0.0, 0.0, NAN, -0.25]},
        "field 'inference_logprobs' holds the number NaN",
    ),
    "prime-rl's advantage": ("prime_rl", {"advantages": [0.5, 0.5, NAN, NAN]}, "field 'advantages' holds the number"),
    "NeMo-RL's advantage": ("nemo_rl", {"advantages": [[0.5, 0.5, NAN, NAN, 0.5]]}, "field 'advantages' holds the num"),
    "TRL's advantage": ("trl", {"advantage": [NAN]}, "column 'advantage' holds nan; expected finite"),
    "TRL's infinite reward": ("trl", {"exact": [math.inf]}, "column 'exact' holds inf; expected finite"),
}


@pytest.mark.parametrize("case", COUNTS)
def test_not_finite_is_refused_where_it_counts(tmp_path: Path, case: str) -> None:
    kind, changes, message = COUNTS[case]
    with pytest.raises(ValueError, match=message):
        read_rollouts(written(tmp_path, kind, changes), TOKENIZER)


@pytest.mark.parametrize("names", [{"exact": 1.0}, {"exact": 1.0, "other": 2.0}])
def test_trl_rewards_leave_out_nan_like_null(tmp_path: Path, names: dict[str, float]) -> None:
    path = written(tmp_path, "trl", {"other": [NAN]})
    (rollout,) = read_rollouts(path, TOKENIZER, reward_weights=names)
    assert rollout.reward == 1.0


def test_format_is_detected_when_first_record_has_nan(tmp_path: Path) -> None:
    lines = [{**VERL, "acc": NAN}, VERL]
    (tmp_path / "5.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert len(read_rollouts(tmp_path / "5.jsonl", TOKENIZER)) == 2
