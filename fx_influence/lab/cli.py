"""Define the command line, ``fx-influence``; nothing heavy is imported before a command is carried out."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from fx_influence import __version__

COMMENTED_PLAN = Path(__file__).parent / "demo" / "plan.yaml"
"""The embedded default plan, with every field and its meaning."""

EXAMPLES = """begin with
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
    """Run the command line.

    If torchrun has started several processes, they share the work, and the first prints; an error is printed once.

    Args:
        argv: arguments; None: those of the process.

    Returns:
        The exit status: 0 done, 1 bad input, 130 interrupted.
    """
    arguments = _parser().parse_args(argv)
    try:
        if arguments.command == "plan":
            print(COMMENTED_PLAN.read_text(encoding="utf-8"), end="", flush=True)
            return 0
        from fx_influence.lab.commands import run_command

        return run_command(arguments)
    except KeyboardInterrupt:
        print("fx-influence: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of the output, such as head, has closed it; without this Python would complain when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fx-influence",
        description="Which rollouts and tokens of an optimizer step change a model's entropy, and by how much.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"fx-influence {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, description, suffix in (
        ("run", "sample, attribute, check, store and print one step", ""),
        ("fisher", "how one step's rollouts move the log-probability of others: kernel and prediction", "-fisher"),
    ):
        command = commands.add_parser(name, help=description)
        command.add_argument("plan", nargs="?", type=Path, help="a YAML plan (default: the embedded demo)")
        command.add_argument("--out", type=Path, help=f"run directory (default: runs/ and the plan's name{suffix})")
        command.add_argument("--seed", type=int, help="seed to use instead of the plan's")
        command.set_defaults(suffix=suffix)
    commands.add_parser("plan", help="print a plan with every field explained, to be changed and run")
    command = commands.add_parser("report", help="print a run or a training run, and write its page report/index.html")
    command.add_argument("directory", type=Path, help="a run directory, or a training run's directory of steps")
    command = commands.add_parser("bundle", help="pages of runs and training runs as a folder for any web server")
    command.add_argument("directory", type=Path, help="a run, a training run's directory of steps, or one with several")
    command.add_argument("out", type=Path, help="the folder, beside it; an earlier bundle in it is replaced")
    command = commands.add_parser("watch", help="follow a training run: its measured steps and their account")
    command.add_argument("directory", type=Path, help="a training run's directory of steps")
    command.add_argument("--once", action="store_true", help="print what there is now, and end")
    command = commands.add_parser("analyze", help="tables and CSV files of what a finished run's influences go with")
    command.add_argument("directory", type=Path, help="a run directory; the files go into its folder analysis")
    return parser


if __name__ == "__main__":
    sys.exit(main())
