"""One run: its directory, its TensorBoard logs, its clock, and the true record of its result."""

import dataclasses
import datetime
import inspect
import math
import os
import pathlib
import shlex
import sys
import time
from typing import Any

from common.cli import SharedConfig, TrainingFailedError, UserError
from common.data import Data
from common.evaluation import Report, curves_figure, excerpt, figure_png, picture_figure
from common.hardware import apply, choose, describe_machine, hardware_record
from common.records import command, commit, peak_memory_bytes, versions, weights_sha256, write_json

import keras
import numpy as np
import tensorflow as tf
from rich.console import Console
from rich.table import Table
from tensorboard.plugins.hparams import api as hparams


def start_run(config: SharedConfig) -> "Run":
    """Sets up hardware and seeds as `config` says, and chooses the run directory.

    Args:
        config: the whole configuration. The file its class stands in gives the recipe's name.

    Raises:
        UserError: a hardware flag that does not fit the machine, or a directory that can't be used.
    """
    started = time.perf_counter()
    recipe = _recipe_name(config)
    machine = describe_machine()
    choices = choose(machine, config)
    directory = _choose_directory(recipe, config)
    # The same layer names in the second run of a process as in the first; before `apply`, as it also
    # forgets the precision.
    keras.utils.clear_session()
    strategy = apply(choices, config.deterministic)
    keras.utils.set_random_seed(config.seed)
    if not config.quiet:
        print(choices.line(machine))
    return Run(recipe, config, directory, strategy, hardware_record(machine, choices), started)


def _recipe_name(config: SharedConfig) -> str:
    try:
        return pathlib.Path(inspect.getfile(type(config))).stem
    except (OSError, TypeError):  # A class typed into a notebook has no file.
        return "notebook"


def _choose_directory(recipe: str, config: SharedConfig) -> pathlib.Path:
    """The run directory, once it is clear that it can be made; it is made when training begins.

    Until then a mistake in the data can still end the run, and that shall leave nothing behind.
    """
    moment = datetime.datetime.now().strftime("%Y%m%d-%H%M%S-%f")
    directory = pathlib.Path(config.run_dir or pathlib.Path("runs", recipe, moment))
    try:
        there = next(place for place in (directory, *directory.absolute().parents) if place.exists())
        if not there.is_dir():
            problem = f"{there} is a file"
        elif not os.access(there, os.W_OK | os.X_OK):
            problem = f"{there} may not be written to"
        elif there == directory and (directory / "config.json").exists():
            problem = "holds a run already"
        elif there == directory and any(directory.iterdir()):
            problem = "is not empty"
        else:
            return directory
    except OSError as error:
        problem = str(error.strerror)
    raise UserError(f"--run-dir {directory}: {problem}; choose an empty or a new folder")


class Run:
    """A training run, between `start_run` and `finish`.

    Attributes:
        directory: holds everything that the run writes.
        strategy: the `tf.distribute.Strategy` to build and compile the model under.
        verbose: the value for `fit`: a progress bar for people, a line per epoch for files.
    """

    def __init__(
        self,
        recipe: str,
        config: SharedConfig,
        directory: pathlib.Path,
        strategy: tf.distribute.Strategy,
        hardware: dict[str, Any],
        started: float,
    ):
        self.directory, self.strategy = directory, strategy
        self.verbose = 0 if config.quiet else 1 if sys.stdout.isatty() else 2
        self._recipe, self._config, self._hardware, self._started = recipe, config, hardware, started
        self._watch = _Watch()

    def callbacks(self, data: Data) -> list[keras.callbacks.Callback]:
        """Makes the run directory and gives the callbacks for `fit`: the watch first, then TensorBoard.

        Also writes what TensorBoard can show from the start: the run card and examples of the data.
        """
        try:
            for part in ("tensorboard", "plots"):
                (self.directory / part).mkdir(parents=True, exist_ok=True)
            configuration = {"recipe": self._recipe, **dataclasses.asdict(self._config)}
            write_json(self.directory / "config.json", configuration)
        except OSError as error:
            raise UserError(
                f"--run-dir {self.directory}: can't be written ({error.strerror}); choose another folder"
            ) from error
        self._writer = tf.summary.create_file_writer(str(self.directory / "tensorboard"))
        if not self._config.quiet:
            counts = ", ".join(f"{len(getattr(data, split)):,} {split}" for split in _SPLITS)
            print(f"data: {data.name} ({data.source}): {counts}")
        with self._writer.as_default(step=0):
            tf.summary.text("run_card", self._run_card(data))
            hparams.hparams(self._hyperparameters(data))
            _show_examples(data)
        self._writer.flush()
        self._watch.examples_per_epoch = len(data.train)
        return [
            self._watch,
            keras.callbacks.TensorBoard(
                str(self.directory / "tensorboard"),
                histogram_freq=int(self._config.histograms),
                profile_batch=(2, 4) if self._config.profile else 0,
            ),
        ]

    def _hyperparameters(self, data: Data) -> dict[str, Any]:
        chosen = dataclasses.asdict(self._config)
        for name in ("data_dir", "run_dir", "quiet"):
            del chosen[name]
        return {"recipe": self._recipe, **chosen, "data": data.name}

    def _run_card(self, data: Data) -> str:
        card = {
            "command": command(),
            "data": f"{data.name} ({data.source})",
            **{split: f"{len(getattr(data, split)):,} examples" for split in _SPLITS},
            **{f"config: {name}": value for name, value in dataclasses.asdict(self._config).items()},
            **{f"hardware: {name}": value for name, value in self._hardware.items()},
            **{f"version: {name}": value for name, value in versions().items()},
        }
        return "\n".join(
            [
                "| | |",
                "|---|---|",
                *(f"| {name} | {excerpt(str(value).encode())} |" for name, value in card.items()),
            ]
        )

    def finish(
        self, model: keras.Model, data: Data, report: Report, beside: dict[str, float]
    ) -> dict[str, float]:
        """Saves the model, the plots and `result.json`, and prints the result.

        Args:
            model: the trained model, which takes what a user has.
            data: what it was trained on.
            report: its test metrics.
            beside: figures to compare them with, such as a baseline's.

        Returns:
            All metrics: those of the report and those beside it.
        """
        metrics = {**report.metrics, **beside}
        figures = {"learning_curves": curves_figure(self._watch.history), **report.figures}
        with self._writer.as_default(step=self._watch.steps):
            for name, value in metrics.items():
                tf.summary.scalar(f"test/{name}", value)
            for name, figure in figures.items():
                png = figure_png(figure)
                (self.directory / "plots" / f"{name}.png").write_bytes(png)
                _write_figure(name, png)
            for name, text in report.texts.items():
                tf.summary.text(name, text)
        self._writer.close()
        _save_model(model, self.directory / "model.keras")
        result = {
            "recipe": self._recipe,
            "data": {
                "source": data.source,
                "name": data.name,
                "digest": data.digest(),
                **{split: len(getattr(data, split)) for split in _SPLITS},
            },
            "metrics": metrics,
            "parameters": sum(math.prod(weight.shape) for weight in model.trainable_weights),
            "seed": self._config.seed,
            "epochs": len(self._watch.history),
            "steps": self._watch.steps,
            "seconds": {
                "data": data.seconds,
                **self._watch.seconds(),
                "total": time.perf_counter() - self._started,
            },
            "examples_per_second": self._watch.examples_per_second(),
            "peak_memory_bytes": peak_memory_bytes(),
            "weights_sha256": weights_sha256(model),
            "hardware": self._hardware,
            "versions": versions(),
            "commit": commit(),
            "command": command(),
            "class_names": data.class_names,
            "history": self._watch.history,
            "evaluation": report.details,
        }
        write_json(self.directory / "result.json", result)
        if not self._config.quiet:
            self._print(result)
        return metrics

    def _print(self, result: dict[str, Any]) -> None:
        table = Table(
            title=f"{self._recipe}: test split of {result['data']['name']} ({result['data']['source']})"
        )
        table.add_column("figure")
        table.add_column("value", justify="right")
        for name, value in result["metrics"].items():
            table.add_row(name.replace("_", " "), f"{value:.4f}")
        table.add_row("parameters", f"{result['parameters']:,}")
        table.add_row("training seconds", f"{result['seconds']['train']:.1f}")
        if result["examples_per_second"]:
            table.add_row("examples per second", f"{result['examples_per_second']:,.0f}")
        Console().print(table)
        print(f"run directory: {self.directory}")
        print(f"watch it: tensorboard --logdir {shlex.quote(str(self.directory))}")


_SPLITS = ("train", "validation", "test")


class _Watch(keras.callbacks.Callback):
    """Measures the time of training, keeps the history, and stops at a loss that is not finite.

    The first execution traces the graph, so it counts as `compile` and not into the throughput.
    Validation counts into the seconds of `train`, but not into the throughput. `history` holds the logs
    of each epoch, and the seconds from the start of training to its end.
    """

    def __init__(self):
        super().__init__()
        self.examples_per_epoch = 0
        self.history: list[dict[str, float]] = []
        self.steps = 0
        self._begin = self._traced = self._end = math.nan
        self._measured_seconds = self._measured_steps = 0.0

    def on_train_begin(self, logs=None):
        self._begin = time.perf_counter()

    def on_epoch_begin(self, epoch, logs=None):
        self._epoch_begin = time.perf_counter()
        self._epoch_steps = 0

    def on_train_batch_end(self, batch, logs=None):
        # With several steps per execution, `batch` is the last one of them.
        now = time.perf_counter()
        if math.isnan(self._traced):
            self._traced = self._epoch_begin = now
            self._uncounted = batch + 1
        self._epoch_steps = batch + 1
        self._epoch_end = now
        if not math.isfinite(logs["loss"]):
            raise TrainingFailedError(
                f"the loss is {logs['loss']} at step {self.steps + batch + 1}; "
                "try a smaller --learning-rate, and inputs of a sensible scale"
            )

    def on_epoch_end(self, epoch, logs=None):
        counted = self._epoch_steps - (self._uncounted if not self.history else 0)
        seconds = self._epoch_end - self._epoch_begin
        share = self.examples_per_epoch / self._epoch_steps
        self.steps += self._epoch_steps
        self._measured_steps += counted
        self._measured_seconds += seconds
        if counted:
            logs["examples_per_second"] = counted * share / seconds
        self._examples_per_step = share
        logged = {name: float(value) for name, value in logs.items()}
        self.history.append({**logged, "seconds": time.perf_counter() - self._begin})

    def on_train_end(self, logs=None):
        self._end = time.perf_counter()

    def seconds(self) -> dict[str, float]:
        """The seconds of compiling (up to the end of the first execution), training, and all since."""
        return {
            "compile": self._traced - self._begin,
            "train": self._end - self._traced,
            "evaluate": time.perf_counter() - self._end,
        }

    def examples_per_second(self) -> float | None:
        """Training throughput without the first execution; None if that was all."""
        if not self._measured_steps:
            return None
        return self._measured_steps * self._examples_per_step / self._measured_seconds


def _show_examples(data: Data) -> None:
    """Writes the first training examples to TensorBoard: pictures as they are, texts as a table."""
    inputs = data.train.inputs[:25].numpy()
    if not data.class_names or inputs.dtype not in (np.uint8, object):
        return
    names = [data.class_names[label] for label in data.train.targets[:25].numpy().argmax(axis=1)]
    if inputs.dtype == np.uint8:
        _write_figure("examples", figure_png(picture_figure(inputs, names)))
        return
    rows = [f"| {name} | {excerpt(text)} |" for name, text in zip(names, inputs, strict=True)]
    tf.summary.text("examples", "\n".join(["| class | text |", "|---|---|", *rows]))


def _write_figure(tag: str, png: bytes) -> None:
    tf.summary.image(tag, tf.image.decode_png(png, channels=3)[None])


def _save_model(model: keras.Model, path: pathlib.Path) -> None:
    part = path.with_name("part." + path.name)  # Keras wants the suffix .keras.
    model.save(part)
    os.replace(part, path)
