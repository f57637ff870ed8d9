"""Trains one variant of a recipe for tools/benchmark.py, and prints one line of JSON.

    python tools/measure.py cifar10_cnn recipe --data tfds
    python tools/measure.py cifar10_cnn naive --data tfds
    python tools/measure.py cifar10_cnn describe --data tfds --folder FOLDER
    python tools/measure.py cifar10_cnn peak
    python tools/measure.py cifar10_cnn target --data tfds

See tools/benchmark.py for the variants. `describe` does not train: it writes the input files of tools/pytorch_twin.py.
`peak` multiplies large matrices. `target` trains the naive script until it reaches the target accuracy.
"""

import argparse
import contextlib
import dataclasses
import inspect
import itertools
import json
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

from common import hardware
from common.batches import Split
from common.cli import Parser, SharedConfig, run_script
from common.data import CIFAR10, Data, load_images
from common.hardware import describe_machine
from common.layers import with_stock_layers
from common.records import load_program, write_file
from common.runs import Run

import keras
import numpy as np

ROOT = pathlib.Path(__file__).parent.parent
TARGET = 0.70
# The slower recipes are measured for fewer epochs than they train.
MEASURED_EPOCHS = dict.fromkeys(("cifar10_cnn", "distillation", "mnist_cnn", "pruning", "quantization"), 2) | {
    "cifar10_fast": 1
}
MEASURED_EXAMPLES = {"cifar10_fast": 20_000}  # The slowest recipe uses fewer examples.


class Clock(keras.callbacks.Callback):
    """Measures `fit` after its first execution: examples per second, and the share of time spent in callbacks."""

    def __init__(self, batch_size: int):
        super().__init__()
        self.batch_size = batch_size
        self.first_step, self.executed, self.batches, self.callbacks_seconds = 0.0, 0, 0, 0.0

    def timed(self, callback: keras.callbacks.Callback) -> keras.callbacks.Callback:
        """Wraps the hooks of a callback to add up their durations."""

        def timed_hook(hook: Callable) -> Callable:
            def call(*args: Any, **kwargs: Any) -> None:
                is_timed, start = bool(self.first_step), time.perf_counter()
                hook(*args, **kwargs)
                self.callbacks_seconds += is_timed * (time.perf_counter() - start)

            return call

        for name in [name for name in dir(callback) if name.startswith("on_")]:
            setattr(callback, name, timed_hook(getattr(callback, name)))
        return callback

    def on_train_batch_end(self, batch, logs=None):
        if not self.first_step:
            self.first_step, self.start = time.time(), time.perf_counter()
        else:
            self.batches += batch + 1 - self.executed
        self.executed = batch + 1

    def on_epoch_end(self, epoch, logs=None):
        self.executed = 0

    def on_train_end(self, logs=None):
        self.seconds = time.perf_counter() - self.start
        raise MeasuredError

    def figures(self) -> dict[str, float]:
        """Returns examples per second, the end time of the first execution, and the time share of callbacks."""
        share = self.callbacks_seconds / self.seconds
        speed = self.batches * self.batch_size / self.seconds
        return {"examples_per_second": speed, "first_step": self.first_step, "callbacks": share}


class MeasuredError(Exception):
    """Raised to stop a recipe after `fit` was measured."""


class BuiltError(Exception):
    """Raised to stop a recipe when `fit` starts; the argument is the model."""


class StopWhenBuilt(keras.callbacks.Callback):
    """Raises `BuiltError` with the model when training starts."""

    def on_train_begin(self, logs=None):
        raise BuiltError(self.model)


def measure(arguments: argparse.Namespace, folder: pathlib.Path) -> dict[str, Any]:
    """Trains a recipe in this process, or describes its network for PyTorch in `folder`."""
    name, way = arguments.recipe, arguments.way
    recipe = load_program(ROOT / "recipes" / f"{name}.py")
    settings = {
        "data": arguments.data,
        "data_dir": arguments.data_dir,
        "smoke": arguments.smoke,
        "seed": arguments.seed,
    }
    settings["precision"] = "float32" if way == "naive" else arguments.precision
    config = recipe.Config(**settings, quiet=True, baseline=False, run_dir=str(folder / "run"))
    config = dataclasses.replace(config, epochs=2 if arguments.smoke else MEASURED_EPOCHS.get(name, config.epochs))
    full = recipe.load_data(config)
    empty = Split.from_arrays(*full.validation.arrays(slice(0)))
    train = Split.from_arrays(*full.train.arrays(slice(MEASURED_EXAMPLES.get(name))))
    data = dataclasses.replace(full, train=train, validation=empty)
    training_batches, start_run, train_splits = recipe.training_batches, recipe.start_run, []
    clock = Clock(min(config.batch_size, len(train)))

    def remember_split(split: Split, *args: Any, **kwargs: Any) -> Any:
        train_splits.append(split)
        return training_batches(split, *args, **kwargs)

    def start_measured_run(*args: Any, **kwargs: Any) -> Run:
        run = start_run(*args, **kwargs)
        create_callbacks = run.callbacks
        run.callbacks = lambda *args, **kwargs: [*map(clock.timed, create_callbacks(*args, **kwargs)), clock]
        if way != "recipe":
            run.callbacks = lambda *args, **kwargs: [StopWhenBuilt()]
        return run

    recipe.training_batches, recipe.start_run = remember_split, start_measured_run
    if way == "naive":  # The baseline does not use the patches of this project.
        hardware.apply_patch = lambda *name, **options: None
    try:
        recipe.train(config, data)
    except MeasuredError:
        return clock.figures()
    except BuiltError as built:
        (model,) = built.args
    if way == "describe":
        describe(model, train_splits[-1], full, config, folder)
        return {}
    with contextlib.suppress(MeasuredError):
        fit_naively(model, train_splits[-1], config, clock)
    return clock.figures()


def fit_naively(model: keras.Model, split: Split, config: SharedConfig, clock: Clock) -> None:
    """Trains the layers of `model` on NumPy arrays, like most tutorials."""
    (inputs, targets), loss, model = split.arrays(), model.loss, with_stock_layers(model)
    if inputs.dtype == np.uint8:
        inputs = inputs / 255.0
        preprocessing = keras.layers.InputLayer | keras.layers.Rescaling | keras.layers.Normalization
        layers = itertools.dropwhile(lambda layer: isinstance(layer, preprocessing), model.layers)
        model = keras.Sequential([keras.Input(inputs.shape[1:]), *layers])
    model.compile("adam", loss, metrics=["mae" if targets.shape[1] == 1 else "accuracy"])
    model.fit(inputs, targets, batch_size=config.batch_size, epochs=config.epochs, callbacks=[clock], verbose=0)


def describe(model: keras.Model, split: Split, data: Data, config: SharedConfig, folder: pathlib.Path) -> None:
    """Writes network.json and arrays.npz for tools/pytorch_twin.py."""
    layers, weights = [], []
    for layer in model.layers:
        settings = {
            setting: value
            for setting, value in layer.get_config().items()
            if isinstance(value, str | int | float | bool) and setting != "name"
        }
        layers.append({"kind": type(layer).__name__, "images": len(split.input_shape) == 3, **settings})
        weights += [np.asarray(weight) for weight in layer.get_weights()]
    optimizer, loss = model.optimizer, model.loss
    constants = {
        setting: value for setting, value in optimizer.get_config().items() if isinstance(value, int | float | None)
    }
    description = {
        "layers": layers,
        "weights": len(weights),
        "loss": loss if isinstance(loss, str) else "cross-entropy",
        "loss_weight": model.get_compile_config()["loss_weights"] or 1.0,
        "label_smoothing": getattr(config, "label_smoothing", 0.0),
        "optimizer": type(optimizer).__name__.replace("FusedAdam", "AdamW" if optimizer.weight_decay else "Adam"),
        "constants": {**constants, "learning_rate": config.learning_rate},
        "batch_size": config.batch_size,
        "epochs": config.epochs,
        "shift": getattr(config, "shift", 0),
        "mirror": "mirrored=" in inspect.getsource(sys.modules[type(config).__module__]),
        "threads": describe_machine().cores,
        "precision": keras.config.dtype_policy().name,
        "training_flops_per_example": training_flops(model, split.input_shape),
        "parameters": sum(int(np.prod(weight.shape)) for weight in model.trainable_weights),
        "data": {"source": data.source, "name": data.name, "digest": data.digest()},
    }
    write_file(folder / "network.json", json.dumps(description))
    arrays = {f"weight_{number}": weight for number, weight in enumerate(weights)}
    np.savez(folder / "arrays.npz", inputs=split.inputs.numpy(), targets=split.targets.numpy(), **arrays)


def training_flops(model: keras.Model, shape: tuple[int, ...]) -> int:
    """Returns the floating-point operations of a training step per example. See tools/benchmark.py for the formula."""
    total, trained = 0, False
    for layer in model.layers:
        kernel = getattr(layer, "kernel", None)
        if kernel is None:
            continue
        _, *positions, _ = keras.Model(model.inputs, layer.output).compute_output_shape((1, *shape))
        forward = 2 * int(np.prod(kernel.shape)) * int(np.prod(positions))
        total += forward * (1 + layer.trainable + trained)
        trained = trained or layer.trainable
    return total


class TargetClock(keras.callbacks.Callback):
    """Stops training when the validation accuracy reaches the target; `seconds` is the time since the start."""

    def __init__(self, target: float):
        super().__init__()
        self.target, self.reached, self.seconds = target, False, 0.0

    def on_train_begin(self, logs=None):
        self.start = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        self.seconds = time.perf_counter() - self.start
        self.reached = self.model.stop_training = logs["val_accuracy"] >= self.target


def train_naively(arguments: argparse.Namespace) -> dict[str, Any]:
    """Trains the naive script, which builds cifar10_cnn's network like most tutorials, until it reaches the target."""
    config = SharedConfig(data=arguments.data, data_dir=arguments.data_dir, smoke=arguments.smoke, seed=arguments.seed)
    data = load_images(CIFAR10, config, (32, 32))
    keras.utils.set_random_seed(arguments.seed)
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


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("recipe", help="name of the recipe, such as cifar10_cnn")
    parser.add_argument("way", choices=["naive", "recipe", "describe", "peak", "target"])
    parser.add_argument("--data", default="auto", help="the flag of the recipe")
    parser.add_argument("--data-dir", default="", help="the flag of the recipe")
    parser.add_argument("--smoke", action="store_true", help="a few examples and epochs")
    parser.add_argument("--seed", type=int, default=0, help="of weights and order (default: 0)")
    parser.add_argument("--precision", default="float32", help="the flag of the recipe (default: float32)")
    parser.add_argument("--naive-epochs", type=int, default=20, help="when the naive script gives up (default: 20)")
    parser.add_argument("--folder", type=pathlib.Path, help="folder for a description")
    arguments = parser.parse_args()
    if arguments.way == "target":
        figures = train_naively(arguments)
    elif arguments.way == "peak":
        doctor = load_program(ROOT / "scripts" / "doctor.py")
        figures = {"flops": doctor.measure_peak(arguments.precision)}
    else:
        with tempfile.TemporaryDirectory() as folder:
            figures = measure(arguments, arguments.folder or pathlib.Path(folder))
    print(json.dumps(figures))


if __name__ == "__main__":
    run_script(main)
