"""Measures how fast the recipes train, in alternating fresh processes.

    python tools/benchmark.py cifar10_cnn --data tfds
    python tools/benchmark.py cifar10_cnn --data tfds --precision mixed_bfloat16
    python tools/benchmark.py target --data tfds
    python tools/benchmark.py workers --data tfds
    python tools/benchmark.py strategy --data tfds

For a recipe, each round runs: the naive way (the same layers and batches, arrays from NumPy, pixels divided to float64,
no augmentation, Adam as it comes, float32, plain `fit`, none of this project's layers, optimizers and patches, oneDNN
where TensorFlow uses it by itself); the recipe; its twin in PyTorch, as it is and with `torch.compile`
(tools/pytorch_twin.py, where
requirements-benchmark.txt is installed), in the precision of the recipe; and products of large matrices in that
precision, for the peak of the machine. Examples per second leave out the first execution, and validation. Of the same
time, the recipe's process counts what Keras spends in callbacks: TensorBoard, checkpoints, the record, and logs made
ready for them. The first execution, of one step or of several, counts from the start of the process. The share of the
peak takes from each layer with a kernel, for each example,

    2 x (numbers in the kernel) x (places where it is applied)

operations forwards, as many for the gradient of the kernel unless it is frozen, and as many for the gradient of the
input if a layer before it is trained.

`target` compares the time to 70 % validation accuracy of cifar10_cnn with `--epochs 5` and of the naive script: batches
of 32, until there or given up. `workers` compares cifar10_cnn as two workers of scripts/launch.py with one process,
on the same cores; `strategy` in a strategy with a single replica with no strategy at all; two epochs each.

Round n has seed n. Ratios are given as the median over the rounds, with the lowest and the highest: of five rounds,
these hold the true median between them in 94 % of the cases. Writes results/benchmark-RECIPE-PRECISION-MACHINE.json
or results/WORD.json, and brings README.md in step.
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
from published import benchmark_name, code_sha256, read_records, recipe_paths, without_places, write_record

ROOT = pathlib.Path(__file__).parent.parent
# What is compared with what: the first is the measure.
DISTRIBUTED = {"workers": ["strategy none", "2 workers"], "strategy": ["strategy none", "strategy mirrored"]}
KERAS_WAYS = ("naive", "recipe")
TORCH_WAYS = {"PyTorch": [], "PyTorch compiled": ["--compile"]}
Way = Callable[[int], dict[str, Any]]


def compare_speed(arguments: argparse.Namespace, folder: pathlib.Path) -> dict[str, Any]:
    """Runs the rounds for a recipe, and returns the record that is written."""
    name = arguments.what

    def in_keras(way: str, *flags: str) -> Way:
        words = (name, way, *data_flags(arguments), "--precision", arguments.precision, *flags)
        return lambda seed: printed(ROOT / "tools" / "measure.py", *words, "--seed", str(seed), naive=way == "naive")

    in_keras("describe", "--folder", str(folder))(0)
    described = json.loads((folder / "network.json").read_text())
    ways = {way: in_keras(way) for way in KERAS_WAYS}
    if importlib.util.find_spec("torch"):
        for way, flags in TORCH_WAYS.items():
            ways[way] = lambda seed, flags=flags: printed(
                ROOT / "tools" / "pytorch_twin.py", str(folder), *flags, "--seed", str(seed)
            )
    else:
        print("no PyTorch: its twins are left out; pip install -r requirements-benchmark.txt")
    rounds = alternate({"peak": in_keras("peak"), **ways}, arguments.rounds, "examples_per_second")
    flops, peak = described["training_flops_per_example"], statistics.median(each["peak"]["flops"] for each in rounds)

    def ratio_to(way: str) -> dict[str, float] | None:
        if way not in ways:
            return None
        return interval([each["recipe"]["examples_per_second"] / each[way]["examples_per_second"] for each in rounds])

    speeds = {way: statistics.median(each[way]["examples_per_second"] for each in rounds) for way in ways}
    best_torch = max(TORCH_WAYS, key=lambda way: speeds.get(way, 0))
    return {
        "recipe": name,
        "data": described["data"],
        "examples_per_second": speeds,
        "to_naive": ratio_to("naive"),
        "to_pytorch": ratio_to(best_torch),
        "better_pytorch": best_torch if best_torch in ways else None,
        "to_no_callbacks": interval([1 - each["recipe"]["callbacks"] for each in rounds]),
        "first_step_seconds": {
            way: statistics.median(each[way]["first_step_seconds"] for each in rounds) for way in ways
        },
        "precision": described["precision"],
        "batch_size": described["batch_size"],
        "parameters": described["parameters"],
        "training_flops_per_example": flops,
        "peak_flops": peak,
        "share_of_peak": flops * speeds["recipe"] / peak,
        "rounds": rounds,
    }


def printed(script: pathlib.Path, *words: str, naive: bool = False) -> dict[str, Any]:
    """Runs a script, whose last line is JSON; `first_step`, a point in time, becomes seconds from its start."""
    # Empty, the variable that common/startup.py sets leaves TensorFlow its own choice.
    environment = {**os.environ, "TF_ENABLE_ONEDNN_OPTS": ""} if naive else None
    began = time.time()
    run = run_program(str(script), *words, stdout=subprocess.PIPE, text=True, env=environment)
    figures = json.loads(run.stdout.splitlines()[-1])
    if "first_step" in figures:
        figures["first_step_seconds"] = figures.pop("first_step") - began
    return figures


def run_program(*words: str, **options: Any) -> subprocess.CompletedProcess:
    """Runs a Python program; one that fails has said why, and ends this one with its exit code."""
    run = subprocess.run([sys.executable, *words], check=False, **options)
    if run.returncode:
        sys.exit(run.returncode)
    return run


def alternate(ways: dict[str, Way], rounds: int, shown: str) -> list[dict[str, dict[str, Any]]]:
    """Runs all ways in turn, `rounds` times, every other time backwards; prints and returns their figures."""
    done = []
    for number in range(rounds):
        order = list(ways) if number % 2 == 0 else list(reversed(ways))
        figures = {way: ways[way](number) for way in order}
        done.append({way: figures[way] for way in ways})
        lines = [f"{way} {done[-1][way][shown]:,.1f}" for way in ways if shown in done[-1][way]]
        print(f"round {number + 1}, {shown.replace('_', ' ')}: {', '.join(lines)}", flush=True)
    return done


def interval(values: list[float]) -> dict[str, float]:
    """Median, lowest and highest."""
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}


def run_recipe(arguments: argparse.Namespace, *flags: str, launcher: tuple[str, ...] = ()) -> dict[str, Any]:
    """Runs cifar10_cnn as a user would; what its result.json says."""
    with tempfile.TemporaryDirectory() as folder:
        directory = pathlib.Path(folder, "run")
        command = [*launcher, "recipes/cifar10_cnn.py", *(["--"] if launcher else []), *data_flags(arguments)]
        command += ["--no-baseline", "--quiet", "--run-dir", str(directory), *flags]
        run_program(*command, cwd=ROOT)
        return json.loads((directory / "result.json").read_text())


def kept(result: dict[str, Any]) -> dict[str, Any]:
    """What a record repeats of a result."""
    return {"parameters": result["parameters"], "data": result["data"]}


def compare_target(arguments: argparse.Namespace, _: pathlib.Path) -> dict[str, Any]:
    """Runs the rounds of `target`. Where the naive way gave up, the time it spent counts: its true time is longer."""

    def naive(seed: int) -> dict[str, Any]:
        flags = [*data_flags(arguments), "--naive-epochs", str(arguments.naive_epochs), "--seed", str(seed)]
        return printed(ROOT / "tools" / "measure.py", "cifar10_cnn", "target", *flags, naive=True)

    def recipe(seed: int) -> dict[str, Any]:
        result = run_recipe(arguments, "--epochs", "5", "--seed", str(seed))
        reached = [epoch["seconds"] for epoch in result["history"] if epoch["val_accuracy"] >= TARGET]
        if not reached and not arguments.smoke:
            raise UserError(f"cifar10_cnn missed {TARGET:.0%} in 5 epochs at seed {seed}")
        seconds = min(reached, default=result["history"][-1]["seconds"])
        return {"seconds_to_target": seconds, "reached": bool(reached), **kept(result)}

    rounds = alternate({"naive": naive, "recipe": recipe}, arguments.rounds, "seconds_to_target")
    spent = [each["recipe"]["seconds_to_target"] / each["naive"]["seconds_to_target"] for each in rounds]
    missed = sum(not each["naive"]["reached"] for each in rounds)
    return {"target_validation_accuracy": TARGET, "to_naive": interval(spent), "naive_missed": missed, "rounds": rounds}


def compare_distributed(arguments: argparse.Namespace, _: pathlib.Path) -> dict[str, Any]:
    """Runs the rounds of `workers` or `strategy`."""

    def trained(way: str) -> Way:
        launcher = ("scripts/launch.py", "--workers", way.split()[0]) if "workers" in way else ()
        flags = () if launcher else ("--strategy", way.split()[-1])

        def train(seed: int) -> dict[str, Any]:
            result = run_recipe(arguments, *flags, "--epochs", "2", "--seed", str(seed), launcher=launcher)
            return {name: result[name] for name in ("examples_per_second", "metrics")} | kept(result)

        return train

    one, other = DISTRIBUTED[arguments.what]
    rounds = alternate({one: trained(one), other: trained(other)}, arguments.rounds, "examples_per_second")
    speed = [each[other]["examples_per_second"] / each[one]["examples_per_second"] for each in rounds]
    points = [100 * (each[other]["metrics"]["accuracy"] - each[one]["metrics"]["accuracy"]) for each in rounds]
    return {
        "ways": [one, other],
        "median_ratio_images_per_second": statistics.median(speed),
        "largest_difference_of_test_accuracy_in_points": max(map(abs, points)),
        "pairs": rounds,
    }


def data_flags(arguments: argparse.Namespace) -> list[str]:
    """The flags for the data, as the recipes and this script have them."""
    flags = ["--data", arguments.data, "--data-dir", arguments.data_dir]
    return [*flags, "--smoke"] if arguments.smoke else flags


def main() -> None:
    recipes = [path.stem for path in recipe_paths()]
    parser = Parser(__doc__)
    parser.add_argument("what", choices=[*recipes, "target", *DISTRIBUTED], help="a recipe, or a comparison: see above")
    parser.add_argument("--data", default="auto", help="as for the recipe")
    parser.add_argument("--data-dir", default="", help="as for the recipe")
    parser.add_argument("--precision", choices=("float32", "mixed_bfloat16"), default="float32", help="of the recipe")
    parser.add_argument("--rounds", type=int, help="how often each way is run (default: 5, or 1 with --smoke)")
    parser.add_argument("--naive-epochs", type=int, default=20, help="when the naive script gives up (default: 20)")
    parser.add_argument("--smoke", action="store_true", help="a few examples and epochs; writes no record")
    arguments = parser.parse_args()
    if arguments.rounds is None:
        arguments.rounds = 1 if arguments.smoke else 5
    if min(arguments.rounds, arguments.naive_epochs) < 1:
        parser.error("--rounds and --naive-epochs: give 1 or more")
    if arguments.what not in recipes and arguments.precision != "float32":
        parser.error("--precision: goes with a recipe")
    read_records("*")  # One that is damaged shall show now, not after hours.
    # The code as it is now, when it begins.
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
        del record["peak_memory_bytes"]  # This process trains nothing.
        record["command"] = shlex.join(["python", "tools/benchmark.py", *without_places(sys.argv[1:])])
        write_record(arguments.what if arguments.what in kinds else benchmark_name(record), record)
        publish()


if __name__ == "__main__":
    run_script(main)
