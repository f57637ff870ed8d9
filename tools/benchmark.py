"""Measures the training speed of the recipes. Each measurement runs in a new process, and the variants alternate.

    python tools/benchmark.py cifar10_cnn --data tfds
    python tools/benchmark.py cifar10_cnn --data tfds --precision mixed_bfloat16
    python tools/benchmark.py target --data tfds
    python tools/benchmark.py workers --data tfds
    python tools/benchmark.py strategy --data tfds

For a recipe, each round measures four things:
- the naive baseline: the same layers and batch size, NumPy arrays, pixels divided to float64, no augmentation, Adam
  with default arguments, float32, plain `fit`, TensorFlow's default for oneDNN, and none of this project's layers,
  optimizers and patches;
- the recipe;
- its PyTorch twin, with and without `torch.compile`, in the precision of the recipe (tools/pytorch_twin.py, if
  requirements-benchmark.txt is installed);
- products of large matrices in that precision, which give the peak FLOPS of the machine.

Examples per second exclude the first execution and validation. The share of callbacks is the part of this time that
Keras spends in them: TensorBoard, checkpoints, the record, and the preparation of logs. The time to the first execution
(one or several steps) starts with the process. The share of the peak counts, per example and layer with a kernel,

    2 x (parameters of the kernel) x (output positions)

operations for the forward pass, the same number for the gradient of the kernel unless it is frozen, and the same number
for the gradient of the input if an earlier layer is trained.

`target` compares the time to 70 % validation accuracy of cifar10_cnn with `--epochs 5` and of the naive script, which
uses batches of 32 and stops at the target or after --naive-epochs. `workers` compares cifar10_cnn on two workers of
scripts/launch.py with a single process on the same cores. `strategy` compares a strategy with one replica with no
strategy. Both train for two epochs.

Round n uses seed n. Ratios are reported as median, minimum and maximum over the rounds; with five rounds, the true
median lies between minimum and maximum in 94 % of cases. Writes results/benchmark-RECIPE-PRECISION-MACHINE.json or
results/WORD.json, and updates docs/.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import pathlib
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

from common.cli import Parser, UserError, run_script
from common.hardware import describe_machine
from common.records import provenance

from measure import TARGET
from publish import publish
from published import benchmark_name, code_sha256, read_records, recipe_paths, without_data_dir, write_record

ROOT = pathlib.Path(__file__).parent.parent
# The compared variants; the first one is the baseline.
DISTRIBUTED = {"workers": ["strategy none", "2 workers"], "strategy": ["strategy none", "strategy mirrored"]}
KERAS_VARIANTS = ("naive", "recipe")
TORCH_VARIANTS = {"PyTorch": [], "PyTorch compiled": ["--compile"]}
Variant = Callable[[int], dict[str, Any]]


def compare_speed(arguments: argparse.Namespace, folder: pathlib.Path) -> dict[str, Any]:
    """Runs the rounds for a recipe, and returns the record."""
    name = arguments.what

    def in_keras(variant: str, *flags: str) -> Variant:
        words = (name, variant, *data_flags(arguments), "--precision", arguments.precision, *flags)
        return lambda seed: run_measurement(
            ROOT / "tools" / "measure.py", *words, "--seed", str(seed), naive=variant == "naive"
        )

    in_keras("describe", "--folder", str(folder))(0)
    described = json.loads((folder / "network.json").read_text())
    variants = {variant: in_keras(variant) for variant in KERAS_VARIANTS}
    if importlib.util.find_spec("torch"):
        for variant, flags in TORCH_VARIANTS.items():
            variants[variant] = lambda seed, flags=flags: run_measurement(
                ROOT / "tools" / "pytorch_twin.py", str(folder), *flags, "--seed", str(seed)
            )
    else:
        print("PyTorch is not installed, so its twins are skipped; pip install -r requirements-benchmark.txt")
    rounds = alternate({"peak": in_keras("peak"), **variants}, arguments.rounds, "examples_per_second")
    flops, peak = described["training_flops_per_example"], statistics.median(run["peak"]["flops"] for run in rounds)

    def ratio_to(variant: str) -> dict[str, float] | None:
        if variant not in variants:
            return None
        return interval([run["recipe"]["examples_per_second"] / run[variant]["examples_per_second"] for run in rounds])

    speeds = {variant: statistics.median(run[variant]["examples_per_second"] for run in rounds) for variant in variants}
    best_torch = max(TORCH_VARIANTS, key=lambda variant: speeds.get(variant, 0))
    return {
        "recipe": name,
        "data": described["data"],
        "examples_per_second": speeds,
        "to_naive": ratio_to("naive"),
        "to_pytorch": ratio_to(best_torch),
        "better_pytorch": best_torch if best_torch in variants else None,
        "to_no_callbacks": interval([1 - run["recipe"]["callbacks"] for run in rounds]),
        "first_step_seconds": {
            variant: statistics.median(run[variant]["first_step_seconds"] for run in rounds) for variant in variants
        },
        "precision": described["precision"],
        "batch_size": described["batch_size"],
        "parameters": described["parameters"],
        "training_flops_per_example": flops,
        "peak_flops": peak,
        "share_of_peak": flops * speeds["recipe"] / peak,
        "rounds": rounds,
    }


def run_measurement(script: pathlib.Path, *words: str, naive: bool = False) -> dict[str, Any]:
    """Runs a script and parses its last line as JSON. Converts `first_step`, a time, to seconds since the start."""
    # common/startup.py sets this variable; an empty value restores TensorFlow's default.
    environment = {**os.environ, "TF_ENABLE_ONEDNN_OPTS": ""} if naive else None
    start = time.time()
    run = run_program(str(script), *words, stdout=subprocess.PIPE, text=True, env=environment)
    figures = json.loads(run.stdout.splitlines()[-1])
    if "first_step" in figures:
        figures["first_step_seconds"] = figures.pop("first_step") - start
    return figures


def run_program(*words: str, **options: Any) -> subprocess.CompletedProcess:
    """Runs a Python program. If it fails, exits with its exit code; its own error message is enough."""
    run = subprocess.run([sys.executable, *words], check=False, **options)
    if run.returncode:
        sys.exit(run.returncode)
    return run


def alternate(variants: dict[str, Variant], rounds: int, metric: str) -> list[dict[str, dict[str, Any]]]:
    """Runs all variants `rounds` times, in reverse order every other time. Prints `metric` and returns all figures."""
    results = []
    for number in range(rounds):
        order = list(variants) if number % 2 == 0 else list(reversed(variants))
        figures = {variant: variants[variant](number) for variant in order}
        results.append({variant: figures[variant] for variant in variants})
        lines = [
            f"{variant} {results[-1][variant][metric]:,.1f}" for variant in variants if metric in results[-1][variant]
        ]
        print(f"round {number + 1}, {metric.replace('_', ' ')}: {', '.join(lines)}", flush=True)
    return results


def interval(values: list[float]) -> dict[str, float]:
    """Returns median, minimum and maximum."""
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}


def run_recipe(arguments: argparse.Namespace, *flags: str, launcher: tuple[str, ...] = ()) -> dict[str, Any]:
    """Runs cifar10_cnn from the command line, and returns its result.json."""
    with tempfile.TemporaryDirectory() as folder:
        directory = pathlib.Path(folder, "run")
        command = [*launcher, "recipes/cifar10_cnn.py", *(["--"] if launcher else []), *data_flags(arguments)]
        command += ["--no-baseline", "--quiet", "--run-dir", str(directory), *flags]
        run_program(*command, cwd=ROOT)
        return json.loads((directory / "result.json").read_text())


def common_fields(result: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields of a result that are copied to the record."""
    return {"parameters": result["parameters"], "data": result["data"]}


def compare_target(arguments: argparse.Namespace, _: pathlib.Path) -> dict[str, Any]:
    """Runs the rounds of `target`. If the naive script misses the target, its elapsed time is used as a lower bound."""

    def naive(seed: int) -> dict[str, Any]:
        flags = [*data_flags(arguments), "--naive-epochs", str(arguments.naive_epochs), "--seed", str(seed)]
        return run_measurement(ROOT / "tools" / "measure.py", "cifar10_cnn", "target", *flags, naive=True)

    def recipe(seed: int) -> dict[str, Any]:
        result = run_recipe(arguments, "--epochs", "5", "--seed", str(seed))
        reached = [epoch["seconds"] for epoch in result["history"] if epoch["val_accuracy"] >= TARGET]
        if not reached and not arguments.smoke:
            raise UserError(f"cifar10_cnn missed {TARGET:.0%} in 5 epochs at seed {seed}")
        seconds = min(reached, default=result["history"][-1]["seconds"])
        return {"seconds_to_target": seconds, "reached": bool(reached), **common_fields(result)}

    rounds = alternate({"naive": naive, "recipe": recipe}, arguments.rounds, "seconds_to_target")
    ratios = [times["recipe"]["seconds_to_target"] / times["naive"]["seconds_to_target"] for times in rounds]
    missed = sum(not times["naive"]["reached"] for times in rounds)
    return {
        "target_validation_accuracy": TARGET,
        "to_naive": interval(ratios),
        "naive_missed": missed,
        "rounds": rounds,
    }


def compare_distributed(arguments: argparse.Namespace, _: pathlib.Path) -> dict[str, Any]:
    """Runs the rounds of `workers` or `strategy`."""

    def training(variant: str) -> Variant:
        launcher = ("scripts/launch.py", "--workers", variant.split()[0]) if "workers" in variant else ()
        flags = () if launcher else ("--strategy", variant.split()[-1])

        def train(seed: int) -> dict[str, Any]:
            result = run_recipe(arguments, *flags, "--epochs", "2", "--seed", str(seed), launcher=launcher)
            return {name: result[name] for name in ("examples_per_second", "metrics")} | common_fields(result)

        return train

    baseline, other = DISTRIBUTED[arguments.what]
    rounds = alternate({baseline: training(baseline), other: training(other)}, arguments.rounds, "examples_per_second")
    speed = [pair[other]["examples_per_second"] / pair[baseline]["examples_per_second"] for pair in rounds]
    points = [100 * (pair[other]["metrics"]["accuracy"] - pair[baseline]["metrics"]["accuracy"]) for pair in rounds]
    return {
        "ways": [baseline, other],
        "median_ratio_images_per_second": statistics.median(speed),
        "largest_difference_of_test_accuracy_in_points": max(map(abs, points)),
        "pairs": rounds,
    }


def data_flags(arguments: argparse.Namespace) -> list[str]:
    """Returns the data flags, which are the same for the recipes and this script."""
    flags = ["--data", arguments.data, "--data-dir", arguments.data_dir]
    return [*flags, "--smoke"] if arguments.smoke else flags


def main() -> None:
    recipes = [path.stem for path in recipe_paths()]
    parser = Parser(__doc__)
    parser.add_argument("what", choices=[*recipes, "target", *DISTRIBUTED], help="a recipe, or a comparison: see above")
    parser.add_argument("--data", default="auto", help="the flag of the recipe")
    parser.add_argument("--data-dir", default="", help="the flag of the recipe")
    parser.add_argument(
        "--precision", choices=("float32", "mixed_bfloat16"), default="float32", help="precision of the recipe"
    )
    parser.add_argument("--rounds", type=int, help="number of rounds (default: 5, or 1 with --smoke)")
    parser.add_argument("--naive-epochs", type=int, default=20, help="when the naive script gives up (default: 20)")
    parser.add_argument("--smoke", action="store_true", help="a few examples and epochs; writes no record")
    arguments = parser.parse_args()
    if arguments.rounds is None:
        arguments.rounds = 1 if arguments.smoke else 5
    if min(arguments.rounds, arguments.naive_epochs) < 1:
        parser.error("--rounds and --naive-epochs: give 1 or more")
    if arguments.what not in recipes and arguments.precision != "float32":
        parser.error("--precision: needs a recipe")
    read_records("*")  # Report a damaged record now, not after hours of training.
    # Hash the code before the measurements: it may be edited meanwhile.
    code = code_sha256(ROOT / "recipes" / f"{arguments.what if arguments.what in recipes else 'cifar10_cnn'}.py")
    made_by = {"code_sha256": code, **provenance()}
    kinds = {"target": compare_target, **dict.fromkeys(DISTRIBUTED, compare_distributed)}
    with tempfile.TemporaryDirectory() as folder:
        record = kinds.get(arguments.what, compare_speed)(arguments, pathlib.Path(folder))
    for name, value in record.items():
        if name not in ("rounds", "pairs"):
            print(f"{name.replace('_', ' ')}: {json.dumps(value)}")
    if not arguments.smoke:
        hardware = dataclasses.asdict(describe_machine())
        record |= {"recipe": record.get("recipe", "cifar10_cnn"), **made_by, "hardware": hardware}
        del record["peak_memory_bytes"]  # Meaningless here: this process does not train.
        record["command"] = shlex.join(["python", "tools/benchmark.py", *without_data_dir(sys.argv[1:])])
        write_record(arguments.what if arguments.what in kinds else benchmark_name(record), record)
        publish()


if __name__ == "__main__":
    run_script(main)
