"""Run the tests on other versions than those of constraints.txt, each set in a separate virtual environment.

    python -m benchmarks.versions [SET ...] [--folder DIR] [--out FILE]

Three sets have the oldest versions that pyproject.toml claims, read from there and pinned. They divide the tests and
the docstrings' examples by what they import: ``mathematics`` needs torch, numpy and einops, ``trl`` TRL, ``models``
the rest. The other sets install the project with its development packages, as pip resolves them today, and run all
tests: on every other Python that the project supports, and with a newer torch. A set uses the Python that it names,
which has to be on the PATH as ``python3.10`` or similar. If there is no CPU wheel of torch, pip takes the one for CUDA,
some gigabytes each. Warnings are not errors here, because other versions of libraries warn of other things.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
OUT = ROOT / "benchmarks" / "results" / "versions.json"
CORE = {"torch", "numpy", "einops", "pytest", "hypothesis"}
ROOMS = {"core", "estimators", "optim", "batching", "policy", "autodiff", "distributed", "testing"}
"""Rooms of the mathematics, beside the modules at the top."""
FAST = "not slow and not browser and not extra"
NOT_RUN = {"mypy", "pdoc", "pytest-xdist", "ruff", "setuptools", "trl", "bitsandbytes", "torchao"}
"""Packages of pyproject.toml that the oldest sets leave out; those of quantised optimizers need newer torch."""
WITH_TRL = {"trl", "datasets"}
"""Packages that the set of TRL alone has."""
CALL_TRL = {"test_readme.py", "test_scoring.py", "test_benchmarks.py"}
"""Test files that run what imports TRL, and do not import it."""
NO_FSDP2 = "FSDP2 is torch.distributed.fsdp.fully_shard, which torch 2.6 brought"


class Set(NamedTuple):
    """A set of versions to test.

    ``packages``: those pinned to their lower bounds, None for all but NOT_RUN. ``instead``: versions pinned in place of
    the lower bounds. ``left_out``: tests, or whole files, that do not pass, by reason. ``today``: the sets whose tests
    this one runs with nothing else pinned.
    """

    python: str
    packages: set[str] | None = None
    instead: Mapping[str, str] = {}
    left_out: Mapping[str, tuple[str, ...]] = {}
    today: tuple[str, ...] = ()


SETS = {
    "mathematics": Set(
        "3.10",
        CORE,
        left_out={
            NO_FSDP2: ("tests/distributed/test_sharded_policy.py",),
            "torch.distributed.tensor is of torch 2.5": ("tests/distributed/zero/test_flat_partition.py",),
            "torch 2.1 has no layer norm of float16 on the CPU": (
                "tests/autodiff/test_token_values.py::test_token_jvp_takes_directions_beyond_float16",
                "tests/test_tolerances.py::test_policy_terms_bounds_policy_and_gradients[dtype1]",
            ),
            "torch 2.1 has no autocast to float16 on the CPU": (
                "tests/policy/test_precision.py::test_autocast_applies_to_update_batch_only[dtype1-4096.0]",
                "tests/policy/test_precision.py::test_loss_scale_preserves_tiny_float16_gradients",
            ),
            "bitsandbytes and FSDP2, which reload weights on backward, need newer torch": (
                "fx_influence/policy/modes/reloaded_weights.py",
            ),
            "torch 2.1 has no rms_norm": (
                "tests/autodiff/test_layer_io_uses.py::test_row_gradients_are_exact_for_unsupported_uses[norm]",
            ),
            "torch 2.1 takes no saved-tensor hooks inside vmap, and raises": (
                "tests/autodiff/test_layer_io_uses.py::test_supported_names_excludes_uses_inside_vmap",
            ),
            "torch 2.1 hides indexing from modes, so that directions are cast before the pass": (
                "tests/policy/modes/test_deferred_tangents.py::test_at_most_one_cast_copy_exists",
            ),
        },
    ),
    # Below torch 2.5, transformers 4.56 makes its masks by vmap, which torch forbids where graphs are kept.
    "models": Set(
        "3.10",
        instead={"torch": "2.5"},
        left_out={
            NO_FSDP2: ("tests/distributed/test_engine.py", "tests/interop/low_bit/test_steps.py"),
            "torch 2.5 takes no backend written in Python": ("tests/test_simulated_device.py",),
            "peft 0.17 has no activated adapters": (
                "tests/policy/model/test_structure.py::test_activated_lora_is_not_prefix_shareable",
            ),
            "transformers 4.56 lets nobody choose the experts' implementation": (
                "tests/policy/model/test_wrapped_models.py::test_passes_choose_experts_with_derivatives[grouped_mm]",
                "tests/policy/model/test_wrapped_models.py::test_passes_choose_experts_with_derivatives[eager]",
            ),
            "transformers 4.56 notices a damaged config later, and the file is named by another message": (
                "tests/interop/checkpoints/test_damaged.py::test_load_names_damaged_file[config.json-[]",
            ),
            "pytest 8.1 imports the module before its package, which imports it": (
                "fx_influence/interop/trl/callback.py",
            ),
            "the counts are those of newer versions": (
                "tests/benchmarks/test_gpu.py::test_methods_create_tensors_on_the_inputs_device[error_bars]",
                "tests/benchmarks/test_gpu.py::test_operations_match_counted_flops_of_more_rows",
            ),
            "U's reverse pass takes the plain kernel there": (
                "tests/policy/test_split.py::test_only_reverse_passes_use_fused_attention[sdpa]",
            ),
            "torch 2.5 compiles an embedding's gradient wrongly on some CPUs, which the identity tells": (
                "tests/policy/test_split.py::test_compiled_policy_matches_plain_influences[full]",
            ),
            "transformers 4.56 leaves Gemma 2's cap on the scores out of fused attention": (
                "tests/policy/test_split.py::test_cut_model_keeps_head_when_logits_are_scaled_or_capped[capped]",
            ),
            "the test reads the ids as transformers 5 gives them": (
                "tests/interop/test_sampling.py::test_sample_renders_conversation_by_chat_template",
            ),
            "float32 rounds a log weight by 1.6e-5, where the test allows 1e-5": (
                "tests/lab/experiment/test_finite_steps.py::test_sweep_equals_snis_delta_along_every_direction",
            ),
        },
    ),
    # TRL has higher lower bounds than this project, and needs Python 3.11.
    "trl": Set(
        "3.11",
        instead={
            "torch": "2.5",
            "trl": "1.16",
            "accelerate": "1.10.1",
            "datasets": "4.7",
            "numpy": "1.26",
            "pandas": "2.1.1",
            "pyarrow": "21.0",
            "pyyaml": "6.0.1",
            "transformers": "4.56.2",
        },
        left_out={
            NO_FSDP2: (
                "tests/interop/trl/preflight/test_processes.py",
                "tests/benchmarks/test_benchmarks.py::test_tables_match_the_stored_figures[sharding]",
                "tests/benchmarks/test_benchmarks.py::test_main_lists_benchmarks_and_names_an_unknown_one",
            ),
            "transformers 4.56 does not know the option": (
                "tests/interop/trl/preflight/test_generation.py::test_attach_rejects_biased_generation_kwargs"
                "[settings8-top_h]",
            ),
            "other rollouts are sampled there, on which the tests' bounds do not hold": (
                "tests/interop/trl/store/test_step.py::test_stored_step_is_a_readable_run",
                "tests/interop/trl/test_callback.py::test_logged_metrics_add_up_and_predict_the_change",
            ),
            "the tokenizer of transformers 4 makes token_type_ids, which its model refuses": (
                "tests/interop/trl/test_callback.py::test_eval_dataset_of_conversations_gives_the_prompts",
            ),
            "TRL itself asks for transformers 5.8": (
                "tests/interop/trl/preflight/test_generation.py::test_attach_rejects_biased_options"
                "[continuous_batching]",
            ),
        },
    ),
    # No test of TRL runs on Python 3.10, since TRL 1.16 needs 3.11.
    "python3.10": Set(
        "3.10",
        instead={"torch": "2.13.0"},
        left_out={
            "transformers 5.20, the last for Python 3.10, leaves Gemma 2's cap on the scores out of fused attention": (
                "tests/policy/test_split.py::test_cut_model_keeps_head_when_logits_are_scaled_or_capped[capped]",
            ),
        },
        today=("mathematics", "models"),
    ),
    "python3.12": Set("3.12", instead={"torch": "2.13.0"}, today=("mathematics", "models", "trl")),
    "python3.13": Set("3.13", instead={"torch": "2.13.0"}, today=("mathematics", "models", "trl")),
    "torch2.14": Set("3.13", instead={"torch": "2.14.1"}, today=("mathematics", "models", "trl")),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the sets, write their versions and results; return 1 if a test failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.versions", description=__doc__.splitlines()[0])
    parser.add_argument("sets", nargs="*", metavar="SET", help=f"of {', '.join(SETS)}; all by default")
    parser.add_argument("--folder", type=Path, help="folder in which the environments are kept and reused")
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args(argv)
    names = arguments.sets or list(SETS)
    if unknown := set(names) - set(SETS):
        parser.error(f"SET is {', '.join(sorted(unknown))}; expected some of {', '.join(SETS)}")
    results = json.loads(arguments.out.read_text()) if arguments.out.is_file() else {}
    with tempfile.TemporaryDirectory() as temporary:
        for name in names:
            results[name] = run(name, arguments.folder or Path(temporary))
            arguments.out.write_text(json.dumps(results, indent=2) + "\n")
    return int(any(results[name]["tests"]["failed"] for name in names))


def run(name: str, folder: Path) -> dict[str, Any]:
    """Run the tests of a set; return its versions and results."""
    chosen, start = SETS[name], time.monotonic()
    python = environment(folder / name, chosen)
    excluded = {test for tests in chosen.left_out.values() for test in tests}
    files = [str(file.relative_to(ROOT)) for file in candidates() if set_of(file) in (chosen.today or (name,))]
    files = [file for file in files if file not in excluded]
    print(f"{name}: {len(files)} files on {versions(python, chosen)}", flush=True)
    report = folder / f"{name}.xml"
    options = ["-q", "-p", "no:cacheprovider", "-W", "default", "-m", FAST, "--tb=short"]
    options += ["-n", "2", "--dist", "loadscope"] if chosen.today else []
    left_out = [f"--deselect={test}" for test in sorted(excluded)]
    ended = subprocess.run([python, "-m", "pytest", *options, *left_out, f"--junitxml={report}", *files], cwd=ROOT)
    if ended.returncode not in (0, 1):
        raise SystemExit(
            f"exit status of pytest for {name} is {ended.returncode}; expected 0 or 1. See what it printed"
        )
    counts = {key: int(ET.parse(report).getroot()[0].attrib[key]) for key in ("tests", "failures", "errors", "skipped")}
    failed = counts["failures"] + counts["errors"]
    return {
        "versions": versions(python, chosen),
        "tests": {
            "passed": counts["tests"] - failed - counts["skipped"],
            "failed": failed,
            "skipped": counts["skipped"],
        },
        "left_out": dict(chosen.left_out),
        "files": files,
        "seconds": round(time.monotonic() - start),
    }


def environment(folder: Path, chosen: Set) -> Path:
    """Return the Python of a virtual environment with the set's versions."""
    python = folder / "bin" / "python"
    if not python.is_file():
        subprocess.run([interpreter(chosen.python), "-m", "venv", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--upgrade", "pip"], check=True)
    pins = pinned(chosen)
    print(f"{folder.name}: installing {', '.join(pins)}", flush=True)
    project = ["--editable", f"{ROOT}[dev]"] if chosen.today else []
    subprocess.run([python, "-m", "pip", "install", "--quiet", *pins, *project], check=True)
    return python


def interpreter(version: str) -> str:
    """Return the path of the interpreter of a version such as ``3.10``; raise ``SystemExit`` if none works."""
    path = shutil.which(f"python{version}")
    if path is None or subprocess.run([path, "--version"], capture_output=True).returncode != 0:
        raise SystemExit(f"python{version} is not on the PATH or does not start; expected Python {version}. Install it")
    return path


def claims() -> dict[str, str]:
    """Return the lower bounds of pyproject.toml by package, extras included."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return dict(re.findall(r'"([\w.-]+(?:\[\w+\])?)>=([\d.]+)"', text))


def pinned(chosen: Set) -> list[str]:
    """Return the pinned requirements of the set."""
    if chosen.today:
        return [f"{name}=={version}" for name, version in chosen.instead.items()]
    bounds = {name: bound for name, bound in claims().items() if name in (chosen.packages or {*claims()} - NOT_RUN)}
    return [f"{name}=={version}" for name, version in sorted({**bounds, **chosen.instead}.items())]


def versions(python: Path, chosen: Set) -> dict[str, str]:
    """Return the installed versions of the pinned packages, and of Python."""
    listed = subprocess.run([python, "-m", "pip", "list", "--format=json"], capture_output=True, check=True).stdout
    installed = {package["name"].lower(): package["version"] for package in json.loads(listed)}
    interpreter_version = subprocess.run(
        [python, "-c", "import platform; print(platform.python_version())"], capture_output=True, text=True
    )
    names = sorted({re.sub(r"\[.*", "", name) for name in claims()} if chosen.today else map(package, pinned(chosen)))
    return {
        "python": interpreter_version.stdout.strip(),
        **{name: installed[name.lower()] for name in names if name.lower() in installed},
    }


def package(requirement: str) -> str:
    """Return the name of the package that a requirement asks for."""
    return re.split(r"[\[=]", requirement)[0]


def candidates() -> Iterator[Path]:
    """Yield the test files, and the modules whose docstrings have examples."""
    yield from sorted((ROOT / "tests").rglob("test_*.py"))
    yield from (file for file in sorted((ROOT / "fx_influence").rglob("*.py")) if ">>>" in file.read_text("utf-8"))


def set_of(file: Path) -> str:
    """Return the set that has all packages that a file needs.

    Only the mathematics imports at its top all that it uses; the other rooms may import more inside functions.
    """
    packages = imported(file, set())
    folder = file.relative_to(ROOT).parts[1:-1][:1]
    core = set(folder) <= ROOMS and packages <= CORE
    return "trl" if packages & WITH_TRL or file.name in CALL_TRL else "mathematics" if core else "models"


def imported(file: Path, seen: set[Path]) -> set[str]:
    """Return the packages that a file and its imports within the project import; inside functions only in tests."""
    seen.add(file)
    tree = ast.parse(file.read_text(encoding="utf-8"))
    packages = set()
    for node in ast.walk(tree) if file.is_relative_to(ROOT / "tests") else tree.body:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            for local in project_files(name):
                packages |= set() if local in seen else imported(local, seen)
            root = name.partition(".")[0]
            packages |= set() if project_files(root) else {root} - set(sys.stdlib_module_names)
    return packages


def project_files(name: str) -> list[Path]:
    """Return the files of this project that importing ``name`` runs."""
    parts = name.split(".")
    stems = [base.joinpath(*parts[:k]) for base in (ROOT, ROOT / "tests") for k in range(1, len(parts) + 1)]
    return [file for stem in stems for file in (stem.with_suffix(".py"), stem / "__init__.py") if file.is_file()]


if __name__ == "__main__":
    sys.exit(main())
