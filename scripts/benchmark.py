"""Measures how fast the recipes train, in alternating fresh processes.

    python scripts/benchmark.py cifar10_cnn --data tfds
    python scripts/benchmark.py target --data tfds
    python scripts/benchmark.py workers --data tfds
    python scripts/benchmark.py strategy --data tfds

For a recipe, each round runs: the naive way (the same layers and batches, arrays from NumPy, pixels divided to float64,
no augmentation, Adam as it comes, plain `fit`); the recipe; the recipe without TensorBoard, checkpoints and
its other callbacks; its twin in PyTorch, as it is and with `torch.compile` (scripts/pytorch_twin.py, where
requirements-benchmark.txt is installed); and products of large matrices, in the precision of the recipe, for
the peak of the machine. Examples per second leave out the first execution, and validation. The first step counts from
the start of the process. The share of the peak takes from each layer with a kernel, for each example,

    2 x (numbers in the kernel) x (places where it is applied)

operations forwards, as many for the gradient of the kernel unless it is frozen, and as many for the gradient of the
input if a layer before it is trained.

`target` compares the time to 70 % validation accuracy of cifar10_cnn with `--epochs 5` and of the naive script: batches
of 32, until there or given up. `workers` compares cifar10_cnn as two workers of scripts/launch.py with one process,
on the same cores; `strategy` in a strategy with a single replica with no strategy at all; two epochs each.

Round n has seed n. Ratios are given as the median over the rounds, with the lowest and the highest: of five rounds,
these hold the true median between them in 94 % of the cases. Writes results/benchmark-RECIPE.json or
results/WORD.json, and brings README.md in step.
"""

import argparse
import dataclasses
import importlib.util
import itertools
import json
import pathlib
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

from common.batches import Split
from common.cli import Parser, SharedConfig, UserError, run_script
from common.data import CIFAR10, Data, load_images
from common.hardware import describe_machine
from common.records import provenance, write_file

import keras
import numpy as np
import tensorflow as tf
from reproduce import publish, without_places

ROOT = pathlib.Path(__file__).parent.parent
TARGET = 0.70
# What is compared with what: the first is the measure.
DISTRIBUTED = {"workers": ["strategy none", "2 workers"], "strategy": ["strategy none", "strategy mirrored"]}
KERAS_WAYS = ("naive", "recipe", "recipe without callbacks")
TORCH_WAYS = {"PyTorch": [], "PyTorch compiled": ["--compile"]}
# Enough of the slower recipes to measure them; of the others, all their epochs.
MEASURED_EPOCHS = {"cifar10_cnn": 2, "mnist_cnn": 2}
Way = Callable[[int], dict[str, Any]]


class Clock(keras.callbacks.Callback):
    """Measures the examples per second behind the first execution, without validation, and when that ended."""

    def __init__(self, examples_per_epoch: int):
        super().__init__()
        self.examples_per_epoch = examples_per_epoch
        self.first_step, self.executed, self.batches = 0.0, 0, 0

    def on_train_batch_end(self, batch, logs=None):
        if not self.first_step:
            self.first_step, self.began = time.time(), time.perf_counter()
        else:
            self.batches += batch + 1 - self.executed
        self.executed = batch + 1

    def on_epoch_end(self, epoch, logs=None):
        self.executed = 0

    def on_train_end(self, logs=None):
        self.seconds = time.perf_counter() - self.began

    def figures(self) -> dict[str, float]:
        """What a way of `measure` prints."""
        examples = self.batches * self.examples_per_epoch / self.params["steps"]
        return {"examples_per_second": examples / self.seconds, "first_step": self.first_step}


class MeasuredError(Exception):
    """Ends a recipe when its `fit` was measured."""


def measure(name: str, way: str, arguments: argparse.Namespace, seed: int, folder: pathlib.Path) -> dict[str, Any]:
    """Trains a recipe in this process in one of `KERAS_WAYS`, or describes its network for PyTorch in `folder`."""
    recipe = load_recipe(name)
    shared = {"data": arguments.data, "data_dir": arguments.data_dir, "smoke": arguments.smoke, "seed": seed}
    config = recipe.Config(**shared, quiet=True, baseline=False, run_dir=str(folder / "run"))
    config = dataclasses.replace(config, epochs=2 if arguments.smoke else MEASURED_EPOCHS.get(name, config.epochs))
    data = recipe.load_data(config)
    nothing = Split(data.validation.inputs[:0], data.validation.targets[:0])
    data = dataclasses.replace(data, validation=nothing)
    batches_of, fit, dealt, figures = recipe.training_batches, keras.Model.fit, [], {}

    def remember_split(split: Split, *others: Any, **named: Any) -> Any:
        dealt.append(split)
        return batches_of(split, *others, **named)

    def measured_fit(model: keras.Model, batches: Any, callbacks: list, **named: Any) -> None:
        if way == "describe":
            describe(model, dealt[0], data, config, folder)
            raise MeasuredError
        clock = Clock(len(dealt[0]))
        if way == "naive":
            fit_naively(fit, model, dealt[0], config, clock)
        else:
            fit(model, batches, callbacks=[clock, *(callbacks if way == "recipe" else [])], **named)
        figures.update(clock.figures())
        raise MeasuredError

    recipe.training_batches, keras.Model.fit = remember_split, measured_fit
    try:
        recipe.train(config, data)
    except MeasuredError:
        return figures
    raise UserError(f"{name}: never called fit")


def load_recipe(name: str) -> Any:
    """The module of a recipe."""
    specification = importlib.util.spec_from_file_location(name, ROOT / "recipes" / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module  # Dataclasses look their module up.
    specification.loader.exec_module(module)
    return module


def fit_naively(fit: Callable, model: keras.Model, split: Split, config: SharedConfig, clock: Clock) -> None:
    """Trains the layers of `model` on arrays, as tutorials do."""
    inputs, targets, loss = split.inputs.numpy(), split.targets.numpy(), model.loss
    if inputs.dtype == np.uint8:
        inputs = inputs / 255.0
        preparing = keras.layers.InputLayer | keras.layers.Rescaling | keras.layers.Normalization
        layers = itertools.dropwhile(lambda layer: isinstance(layer, preparing), model.layers)
        model = keras.Sequential([keras.Input(inputs.shape[1:]), *layers])
    model.compile("adam", loss, metrics=["mae" if targets.shape[1] == 1 else "accuracy"])
    fit(model, inputs, targets, batch_size=config.batch_size, epochs=config.epochs, callbacks=[clock], verbose=0)


def describe(model: keras.Model, split: Split, data: Data, config: SharedConfig, folder: pathlib.Path) -> None:
    """Writes what scripts/pytorch_twin.py needs: network.json and arrays.npz."""
    layers, weights = [], []
    for layer in model.layers:
        about = {
            setting: value
            for setting, value in layer.get_config().items()
            if isinstance(value, str | int | float | bool) and setting != "name"
        }
        layers.append({"kind": type(layer).__name__, **about})
        weights += [np.asarray(weight) for weight in layer.get_weights()]
    optimizer, loss = model.optimizer, model.loss
    constants = {
        setting: value for setting, value in optimizer.get_config().items() if isinstance(value, int | float | None)
    }
    description = {
        "layers": layers,
        "weights": len(weights),
        "loss": loss if isinstance(loss, str) else "cross-entropy",
        "label_smoothing": getattr(config, "label_smoothing", 0.0),
        "optimizer": type(optimizer).__name__,
        "constants": {**constants, "learning_rate": config.learning_rate},
        "batch_size": config.batch_size,
        "epochs": config.epochs,
        "shift": getattr(config, "shift", 0),
        "mirror": hasattr(sys.modules[type(config).__module__], "random_mirror"),  # What the recipe imports, it uses.
        "threads": describe_machine().cores,
        "precision": keras.config.dtype_policy().compute_dtype,
        "training_flops_per_example": training_flops(model, split.inputs.shape[1:]),
        "parameters": sum(int(np.prod(weight.shape)) for weight in model.trainable_weights),
        "data": {"source": data.source, "name": data.name, "digest": data.digest()},
    }
    write_file(folder / "network.json", json.dumps(description))
    arrays = {f"weight_{number}": weight for number, weight in enumerate(weights)}
    np.savez(folder / "arrays.npz", inputs=split.inputs.numpy(), targets=split.targets.numpy(), **arrays)


def training_flops(model: keras.Model, shape: tuple[int, ...]) -> int:
    """Floating-point operations of a training step for each example of `shape`; formula: see the top."""
    total, trained = 0, False
    for layer in model.layers:
        kernel = getattr(layer, "kernel", None)
        if kernel is None:
            continue
        _, *places, _ = keras.Model(model.inputs, layer.output).compute_output_shape((1, *shape))
        forwards = 2 * int(np.prod(kernel.shape)) * int(np.prod(places))
        total += forwards * (1 + layer.trainable + trained)
        trained = trained or layer.trainable
    return total


def measure_peak(precision: str) -> dict[str, float]:
    """Operations per second of the product of two large matrices, at the best of ten tries."""
    size, took = 2048, []
    one = tf.cast(tf.random.normal([size, size]), precision)
    product = tf.function(lambda: tf.reduce_sum(tf.matmul(one, one)))
    for _ in range(11):  # The first one is traced.
        began = time.perf_counter()
        product().numpy()
        took.append(time.perf_counter() - began)
    return {"flops": 2 * size**3 / min(took[1:])}


def compare_speed(arguments: argparse.Namespace, folder: pathlib.Path) -> dict[str, Any]:
    """Runs the rounds for a recipe, and returns the record that is written."""
    name = arguments.what

    def in_keras(way: str) -> Way:
        flags = [*data_flags(arguments), "--way", way, "--folder", str(folder)]
        return lambda seed: printed(ROOT / "scripts" / "benchmark.py", name, *flags, "--seed", str(seed))

    in_keras("describe")(0)
    described = json.loads((folder / "network.json").read_text())
    ways = {way: in_keras(way) for way in KERAS_WAYS}
    if importlib.util.find_spec("torch"):
        for way, flags in TORCH_WAYS.items():
            ways[way] = lambda seed, flags=flags: printed(ROOT / "scripts" / "pytorch_twin.py", str(folder), *flags)
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
        "to_no_callbacks": ratio_to("recipe without callbacks"),
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


def printed(script: pathlib.Path, *words: str) -> dict[str, Any]:
    """Runs a script, whose last line is JSON; `first_step`, a point in time, becomes seconds from its start."""
    began = time.time()
    run = subprocess.run([sys.executable, str(script), *words], check=True, stdout=subprocess.PIPE, text=True)
    figures = json.loads(run.stdout.splitlines()[-1])
    if "first_step" in figures:
        figures["first_step_seconds"] = figures.pop("first_step") - began
    return figures


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


class TargetClock(keras.callbacks.Callback):
    """Stops at the first epoch whose validation accuracy reaches the target; `seconds` from the start of training."""

    def __init__(self, target: float):
        super().__init__()
        self.target, self.reached, self.seconds = target, False, 0.0

    def on_train_begin(self, logs=None):
        self.begin = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        self.seconds = time.perf_counter() - self.begin
        self.reached = self.model.stop_training = logs["val_accuracy"] >= self.target


def train_naively(arguments: argparse.Namespace, seed: int) -> dict[str, Any]:
    """The naive script: cifar10_cnn's network as tutorials write and train it, until it is at the target."""
    config = SharedConfig(data=arguments.data, data_dir=arguments.data_dir, smoke=arguments.smoke, seed=seed)
    data = load_images(CIFAR10, config, (32, 32))
    keras.utils.set_random_seed(seed)
    x_train, x_validation = (split.inputs.numpy() / 255.0 for split in (data.train, data.validation))
    y_train, y_validation = (split.targets.numpy().argmax(1) for split in (data.train, data.validation))
    model = keras.Sequential(
        [
            keras.Input((32, 32, 3)),
            keras.layers.Conv2D(32, 3, activation="relu"),
            keras.layers.MaxPooling2D(),
            keras.layers.Conv2D(64, 3, activation="relu"),
            keras.layers.MaxPooling2D(),
            keras.layers.Conv2D(64, 3, activation="relu"),
            keras.layers.Flatten(),
            keras.layers.Dense(64, activation="relu"),
            keras.layers.Dense(10, activation="softmax"),
        ]
    )
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    clock = TargetClock(TARGET)
    validation = (x_validation, y_validation)
    epochs = arguments.naive_epochs
    model.fit(x_train, y_train, batch_size=32, epochs=epochs, validation_data=validation, callbacks=[clock], verbose=0)
    return {"seconds_to_target": clock.seconds, "reached": clock.reached, "parameters": model.count_params()}


def run_recipe(arguments: argparse.Namespace, *flags: str, launcher: tuple[str, ...] = ()) -> dict[str, Any]:
    """Runs cifar10_cnn as a user would; what its result.json says."""
    with tempfile.TemporaryDirectory() as folder:
        directory = pathlib.Path(folder, "run")
        command = [*launcher, "recipes/cifar10_cnn.py", *(["--"] if launcher else []), *data_flags(arguments)]
        command += ["--no-baseline", "--quiet", "--run-dir", str(directory), *flags]
        subprocess.run([sys.executable, *command], check=True, cwd=ROOT)
        return json.loads((directory / "result.json").read_text())


def kept(result: dict[str, Any]) -> dict[str, Any]:
    """What a record repeats of a result."""
    return {"parameters": result["parameters"], "data": result["data"]}


def compare_target(arguments: argparse.Namespace, _: pathlib.Path) -> dict[str, Any]:
    """Runs the rounds of `target`. Where the naive way gave up, the time it spent counts: its true time is longer."""

    def naive(seed: int) -> dict[str, Any]:
        flags = [*data_flags(arguments), "--naive-epochs", str(arguments.naive_epochs), "--seed", str(seed)]
        return printed(ROOT / "scripts" / "benchmark.py", "target", *flags, "--way", "naive")

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
    recipes = sorted(path.stem for path in (ROOT / "recipes").glob("*.py"))
    parser = Parser(__doc__)
    parser.add_argument("what", choices=[*recipes, "target", *DISTRIBUTED])
    parser.add_argument("--data", default="auto", help="as for the recipe")
    parser.add_argument("--data-dir", default="", help="as for the recipe")
    parser.add_argument("--rounds", type=int, default=5, help="how often each way is run (default: 5)")
    parser.add_argument("--naive-epochs", type=int, default=20, help="the naive script gives up then (default: 20)")
    parser.add_argument("--smoke", action="store_true", help="a few examples and epochs; writes no record")
    parser.add_argument("--way", choices=["describe", "peak", *KERAS_WAYS], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=pathlib.Path, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way:
        print(json.dumps(run_way(arguments)))
        return
    kinds = {"target": compare_target, **dict.fromkeys(DISTRIBUTED, compare_distributed)}
    with tempfile.TemporaryDirectory() as folder:
        record = kinds.get(arguments.what, compare_speed)(arguments, pathlib.Path(folder))
    for name, value in record.items():
        if name not in ("rounds", "pairs"):
            print(f"{name.replace('_', ' ')}: {json.dumps(value)}")
    if not arguments.smoke:
        name = arguments.what if arguments.what in kinds else f"benchmark-{arguments.what}"
        results = ROOT / "results"
        results.mkdir(exist_ok=True)
        record |= {"hardware": dataclasses.asdict(describe_machine()), **provenance()}
        record["command"] = shlex.join(["python", "scripts/benchmark.py", *without_places(sys.argv[1:])])
        write_file(results / f"{name}.json", json.dumps(record, indent=2) + "\n")
        publish()


def run_way(arguments: argparse.Namespace) -> dict[str, Any]:
    """What a fresh process of `printed` does."""
    if arguments.what == "target":
        return train_naively(arguments, arguments.seed)
    if arguments.way == "peak":
        return measure_peak(json.loads((arguments.folder / "network.json").read_text())["precision"])
    with tempfile.TemporaryDirectory() as folder:
        place = arguments.folder if arguments.way == "describe" else pathlib.Path(folder)
        return measure(arguments.what, arguments.way, arguments, arguments.seed, place)


if __name__ == "__main__":
    run_script(main)
