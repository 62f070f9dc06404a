"""The command line, ``fx-influence``: what can be asked. Nothing heavy is imported before something is to be done."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from fx_influence import __version__

COMMENTED_PLAN = Path(__file__).parent / "demo" / "plan.yaml"
"""The embedded default with every field and its meaning."""

BEGINNING = """begin with
  fx-influence run                          the embedded demo, into runs/demo
  fx-influence plan > plan.yaml             a plan with every field explained; it runs as it stands
  fx-influence run plan.yaml --out DIR      a plan of your own

a plan of your own checkpoint needs at least
  checkpoint: checkpoints/step-500          # config.json, weights, tokenizer files, optimizer.pt
  reward: my_rewards:exact                  # module:function, called as in TRL
  loss: grpo                                # or bnpo, dapo, dr_grpo, prompt_max
  max_new_tokens: 256
  update: {prompts: train.jsonl, num_prompts: 16, completions_per_prompt: 8}
  evaluations: [{prompts: held_out.jsonl, num_prompts: 64, completions_per_prompt: 2}]
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0 done, 1 refused or bad input, 130 interrupted.

    Started several times by torchrun the processes share the work, and the first prints; a refusal is printed once.
    """
    arguments = _parser().parse_args(argv)
    try:
        if arguments.command == "plan":
            print(COMMENTED_PLAN.read_text(encoding="utf-8"), end="", flush=True)
            return 0
        from fx_influence.lab.commands import carry_out

        return carry_out(arguments)
    except KeyboardInterrupt:
        print("fx-influence: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever read the output, such as head, has seen enough; Python would complain once more when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fx-influence",
        description="Which rollouts and tokens of an optimizer step change a model's entropy, and by how much.",
        epilog=BEGINNING,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"fx-influence {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, what, ending in (
        ("run", "sample, attribute, check, store and print one step", ""),
        ("fisher", "how one step's rollouts move the log-probability of others: kernel and prediction", "-fisher"),
    ):
        command = commands.add_parser(name, help=what)
        command.add_argument("plan", nargs="?", type=Path, help="a YAML plan (default: the embedded demo)")
        command.add_argument("--out", type=Path, help=f"run directory (default: runs/ and the plan's name{ending})")
        command.add_argument("--seed", type=int, help="instead of the plan's seed")
        command.set_defaults(ending=ending)
    commands.add_parser("plan", help="print a plan with every field explained, to be changed and run")
    command = commands.add_parser("report", help="print a finished run again, and write its page report/index.html")
    command.add_argument("directory", type=Path, help="a run directory")
    command = commands.add_parser("analyze", help="what a finished run's influences go with; tables and CSV files")
    command.add_argument("directory", type=Path, help="a run directory; the files go into its folder analysis")
    return parser


if __name__ == "__main__":
    sys.exit(main())
