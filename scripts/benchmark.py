"""Compares two ways to train the same network, in alternating pairs of fresh processes.

    python scripts/benchmark.py cifar10_cnn --data tfds
    python scripts/benchmark.py workers --data tfds
    python scripts/benchmark.py strategy --data tfds

A recipe is compared with the way tutorials write its network: pixels divided to float64 by NumPy, batches of 32,
Adam as it comes, plain `fit`. The recipe runs with `--epochs 5`. Of each, the training images per second (without the
first epoch, or the first execution) and the seconds from the start of `fit` to the end of the first epoch that reached
the target validation accuracy. Where the naive way gives up before, the time it spent counts: then its true time is
longer, and the ratio of the recipe's time to it smaller. A recipe that misses the target is an error. Pair n
has seed n. Prints the pairs and their medians, writes results/benchmark-RECIPE.json and brings README.md in step.

`workers` compares cifar10_cnn as two workers of scripts/launch.py with one process, on the same cores; `strategy`
compares it in a strategy with a single replica with no strategy at all. Both train for two epochs, and
write results/WORD.json.
"""

import argparse
import dataclasses
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

from common.cli import Parser, SharedConfig, run_script
from common.data import CIFAR10, MNIST, Dataset, load_images
from common.records import write_file

import keras
import numpy as np
from reproduce import publish

ROOT = pathlib.Path(__file__).parent.parent


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is compared for one recipe: the layers of its network, and the accuracy to reach."""

    data: Dataset
    size: tuple[int, int]
    filters: tuple[int, ...]
    dense: int
    target: float


SUBJECTS = {
    "cifar10_cnn": Subject(CIFAR10, (32, 32), (32, 64, 64), 64, 0.69),
    "mnist_cnn": Subject(MNIST, (28, 28), (32, 64), 128, 0.99),
}


# What is compared with what: the first is the measure.
DISTRIBUTED = {"workers": ["strategy none", "2 workers"], "strategy": ["strategy none", "strategy mirrored"]}


class Clock(keras.callbacks.Callback):
    """Times each epoch with epoch hooks alone, and stops at the target."""

    def __init__(self, target: float):
        super().__init__()
        self.target, self.reached = target, False
        self.training_seconds: list[float] = []

    def on_train_begin(self, logs=None):
        self.begin = time.perf_counter()

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch_begin = time.perf_counter()

    def on_test_begin(self, logs=None):
        self.training_seconds.append(time.perf_counter() - self.epoch_begin)

    def on_epoch_end(self, epoch, logs=None):
        if logs["val_accuracy"] >= self.target:
            if not self.reached:
                self.reached, self.seconds = True, time.perf_counter() - self.begin
            self.model.stop_training = epoch >= 1  # One epoch more, where the first alone was enough.

    def on_train_end(self, logs=None):
        if not self.reached:
            self.seconds = time.perf_counter() - self.begin


def naive_network(subject: Subject, shape: tuple[int, int, int]) -> keras.Model:
    """The network of the recipe, as tutorials write it."""
    model = keras.Sequential([keras.Input(shape)])
    for number, filters in enumerate(subject.filters):
        model.add(keras.layers.Conv2D(filters, 3, activation="relu"))
        if number < 2:
            model.add(keras.layers.MaxPooling2D())
    model.add(keras.layers.Flatten())
    model.add(keras.layers.Dense(subject.dense, activation="relu"))
    model.add(keras.layers.Dense(10, activation="softmax"))
    return model


def train_naively(subject: Subject, config: SharedConfig, epochs: int) -> dict[str, float]:
    """Trains the naive way until the target or `epochs`; images per second and seconds to the target."""
    data = load_images(subject.data, config, subject.size)
    keras.utils.set_random_seed(config.seed)
    x_train, x_validation = (np.asarray(split.inputs) / 255.0 for split in (data.train, data.validation))
    y_train, y_validation = (np.asarray(split.targets).argmax(1) for split in (data.train, data.validation))
    model = naive_network(subject, x_train.shape[1:])
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    clock = Clock(subject.target)
    model.fit(
        x_train,
        y_train,
        batch_size=32,
        epochs=epochs,
        validation_data=(x_validation, y_validation),
        callbacks=[clock],
        verbose=2,
    )
    later = clock.training_seconds[1:]
    return {
        "images_per_second": len(x_train) * len(later) / sum(later),
        "seconds_to_target": clock.seconds,
        "reached": clock.reached,
        "parameters": model.count_params(),
    }


def train_recipe(recipe: str, subject: Subject, arguments: argparse.Namespace, seed: int) -> dict[str, float]:
    """Runs the recipe as a user would and reads the same figures off its result.json."""
    with tempfile.TemporaryDirectory() as folder:
        directory = pathlib.Path(folder, "run")
        command = [sys.executable, str(ROOT / "recipes" / f"{recipe}.py"), *data_flags(arguments), "--no-baseline"]
        command += ["--epochs", str(arguments.recipe_epochs), "--seed", str(seed), "--run-dir", str(directory)]
        subprocess.run(command, check=True)
        result = json.loads((directory / "result.json").read_text())
    reached = [logs["seconds"] for logs in result["history"] if logs["val_accuracy"] >= subject.target]
    if not reached and not arguments.smoke:
        raise SystemExit(f"error: {recipe} missed {subject.target:.0%} in {arguments.recipe_epochs} epochs")
    return {
        "images_per_second": result["examples_per_second"],
        "seconds_to_target": min(reached, default=result["history"][-1]["seconds"]),
        "reached": bool(reached),
        "parameters": result["parameters"],
        "versions": result["versions"],
        "hardware": result["hardware"],
        "data": result["data"],
        "commit": result["commit"],
    }


def train_distributed(arguments: argparse.Namespace, way: str, seed: int) -> dict:
    """Trains cifar10_cnn in one of the ways of `DISTRIBUTED`; what its result.json says."""
    with tempfile.TemporaryDirectory() as folder:
        directory = pathlib.Path(folder, "run")
        launch = ["scripts/launch.py", "--workers", way.split()[0], "recipes/cifar10_cnn.py", "--"]
        command = launch if "workers" in way else ["recipes/cifar10_cnn.py", "--strategy", way.split()[-1]]
        command = [sys.executable, *command, *data_flags(arguments), "--no-baseline", "--epochs", "2"]
        subprocess.run([*command, "--seed", str(seed), "--run-dir", str(directory)], check=True, cwd=ROOT)
        result = json.loads((directory / "result.json").read_text())
    kept = ("examples_per_second", "metrics", "versions", "hardware", "data", "commit")
    return {name: result[name] for name in kept}


def compare_distributed(arguments: argparse.Namespace) -> dict:
    """Runs the pairs of `workers` or `strategy` and returns the record that is written."""
    ways, pairs = DISTRIBUTED[arguments.recipe], []
    for number in range(arguments.pairs):
        pair = {way: train_distributed(arguments, way, number) for way in ways}
        pairs.append(pair)
        shown = [f"{way}: {run['examples_per_second']:,.0f} images/s" for way, run in pair.items()]
        print(f"pair {number + 1}: {'; '.join(shown)}", flush=True)
    one, other = ways
    speed = [pair[other]["examples_per_second"] / pair[one]["examples_per_second"] for pair in pairs]
    points = [100 * (pair[other]["metrics"]["accuracy"] - pair[one]["metrics"]["accuracy"]) for pair in pairs]
    return {
        "ways": ways,
        "median_ratio_images_per_second": statistics.median(speed),
        "largest_difference_of_test_accuracy_in_points": max(map(abs, points)),
        "pairs": pairs,
    }


def data_flags(arguments: argparse.Namespace) -> list[str]:
    flags = ["--data", arguments.data, "--data-dir", arguments.data_dir]
    return [*flags, "--smoke"] if arguments.smoke else flags


def compare(arguments: argparse.Namespace) -> dict:
    """Runs the pairs and returns the record that is written."""
    subject = SUBJECTS[arguments.recipe]
    pairs = []
    for number in range(arguments.pairs):
        command = [sys.executable, __file__, arguments.recipe, *data_flags(arguments), "--naive-only"]
        command += ["--naive-epochs", str(arguments.naive_epochs), "--seed", str(number)]
        printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        naive = json.loads(printed.splitlines()[-1])
        recipe = train_recipe(arguments.recipe, subject, arguments, number)
        pairs.append({"naive": naive, "recipe": recipe})
        print(f"pair {number + 1}: naive {shown(naive)}; recipe {shown(recipe)}", flush=True)
    speed = [pair["recipe"]["images_per_second"] / pair["naive"]["images_per_second"] for pair in pairs]
    spent = [pair["recipe"]["seconds_to_target"] / pair["naive"]["seconds_to_target"] for pair in pairs]
    return {
        "recipe": arguments.recipe,
        "target_validation_accuracy": subject.target,
        "recipe_epochs": arguments.recipe_epochs,
        "median_ratio_images_per_second": statistics.median(speed),
        "median_ratio_seconds_to_target": statistics.median(spent),
        "pairs": pairs,
    }


def shown(figures: dict[str, float]) -> str:
    what = "to the target" if figures["reached"] else "without reaching the target"
    return f"{figures['images_per_second']:,.0f} images/s, {figures['seconds_to_target']:.1f} s {what}"


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("recipe", choices=[*SUBJECTS, *DISTRIBUTED])
    parser.add_argument("--data", default="auto", help="as for the recipe")
    parser.add_argument("--data-dir", default="", help="as for the recipe")
    parser.add_argument("--pairs", type=int, default=3, help="how often each is run (default: 3)")
    parser.add_argument("--recipe-epochs", type=int, default=5, help="length of the recipe's schedule (default: 5)")
    parser.add_argument("--naive-epochs", type=int, default=10, help="the naive way gives up then (default: 10)")
    parser.add_argument("--smoke", action="store_true", help="a few images and epochs; writes no record")
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--naive-only", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.naive_only:
        config = SharedConfig(
            data=arguments.data, data_dir=arguments.data_dir, smoke=arguments.smoke, seed=arguments.seed
        )
        print(json.dumps(train_naively(SUBJECTS[arguments.recipe], config, arguments.naive_epochs)))
        return
    if arguments.recipe in DISTRIBUTED:
        record = compare_distributed(arguments)
        print(
            f"images per second, {' / '.join(reversed(record['ways']))}: {record['median_ratio_images_per_second']:.2f}"
        )
        print(f"test accuracy: {record['largest_difference_of_test_accuracy_in_points']:.2f} points apart at most")
        write(arguments, arguments.recipe, record)
        return
    record = compare(arguments)
    print(f"images per second, recipe / naive: {record['median_ratio_images_per_second']:.2f}")
    target = record["target_validation_accuracy"]
    spent = record["median_ratio_seconds_to_target"]
    print(f"seconds to {target:.0%} validation accuracy, recipe / naive: {spent:.2f}")
    write(arguments, f"benchmark-{arguments.recipe}", record)


def write(arguments: argparse.Namespace, name: str, record: dict) -> None:
    """Writes a record below results/, and brings README.md in step with it."""
    if not arguments.smoke:
        results = ROOT / "results"
        results.mkdir(exist_ok=True)
        write_file(results / f"{name}.json", json.dumps(record, indent=2) + "\n")
        publish()


if __name__ == "__main__":
    run_script(main)
