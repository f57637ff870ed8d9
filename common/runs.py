"""One run: its directory, its TensorBoard logs, its clock, and the true record of its result."""

import dataclasses
import datetime
import inspect
import json
import math
import os
import pathlib
import shlex
import sys
import time
from typing import Any

from common.batches import Augment, BatchRandom
from common.cli import SharedConfig, TrainingFailedError, UserError
from common.data import Data
from common.evaluation import Report, curves_figure, figure_png, picture_figure, text_table
from common.hardware import apply, choose, describe_machine
from common.records import provenance, weights_sha256, write_json

import keras
import numpy as np
import rich
import tensorflow as tf
from rich.table import Table
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.custom_scalar import summary as custom_scalar
from tensorboard.plugins.hparams import api as hparams

# What TensorBoard's HParams tab shows of every run; the same in all runs, or it would show some runs only.
_COLUMNS = hparams.hparams_config_pb(
    hparams=[hparams.HParam(name) for name in ("recipe", "data", "seed", "epochs", "learning_rate")],
    metrics=[hparams.Metric(f"test/{name}") for name in ("accuracy", "f1", "loss", "mse", "mae", "r2")],
)
# The Custom Scalars tab: train and validation of a metric in one chart, for all recipes and runs.
_CHARTS = ("loss", "accuracy", "mae", "learning_rate", "examples_per_second")


def start_run(config: SharedConfig) -> "Run":
    """Sets up hardware and seeds as `config` says, and chooses the run directory.

    Until training begins, a mistake in the data can still end the run, and that shall leave nothing behind:
    so the directory is only made then, by `Run.callbacks`.

    Args:
        config: the whole configuration. The file its class stands in gives the recipe's name.

    Raises:
        UserError: a hardware flag that does not fit the machine, or a directory that can't be used.
    """
    started = time.perf_counter()
    try:
        recipe = pathlib.Path(inspect.getfile(type(config))).stem
    except (OSError, TypeError):  # A class typed into a notebook has no file.
        recipe = "notebook"
    machine = describe_machine()
    choices = choose(machine, config)
    moment = datetime.datetime.now().strftime("%Y%m%d-%H%M%S-%f")
    directory = pathlib.Path(config.run_dir or pathlib.Path("runs", recipe, moment))
    problem = None
    try:
        there = next(place for place in (directory, *directory.absolute().parents) if place.exists())
        if not there.is_dir():
            problem = f"{there} is a file"
        elif not os.access(there, os.W_OK | os.X_OK):
            problem = f"{there} may not be written to"
        elif there == directory and any(directory.iterdir()):
            problem = "holds a run already" if (directory / "config.json").exists() else "is not empty"
    except OSError as error:
        problem = error.strerror
    if problem:
        raise UserError(f"--run-dir {directory}: {problem}; choose an empty or a new folder")
    # The same layer names in the second run of a process as in the first; before `apply`, as it also
    # forgets the precision.
    keras.utils.clear_session()
    strategy = apply(choices, config)
    keras.utils.set_random_seed(config.seed)
    if not config.quiet:
        gpus = ", ".join(name for name, _ in machine.gpus) or "no GPU"
        chosen = ", ".join(f"{name} {value} ({reason})" for name, (value, reason) in choices.items())
        print(f"hardware: {machine.processor}, {machine.cores} cores, {gpus}: {chosen}")
    hardware = dataclasses.asdict(machine) | {name: value for name, (value, _) in choices.items()}
    return Run(recipe, config, directory, strategy, hardware, started)


@dataclasses.dataclass
class Run:
    """A training run, between `start_run` and `finish`.

    `directory` holds everything that it writes; `strategy` is the one to build and compile the model under.
    """

    recipe: str
    config: SharedConfig
    directory: pathlib.Path
    strategy: tf.distribute.Strategy
    hardware: dict[str, Any]
    started: float

    @property
    def verbose(self) -> int:
        """The value for `fit`: a progress bar for people, a line per epoch for files."""
        return 0 if self.config.quiet else 1 if sys.stdout.isatty() else 2

    def callbacks(self, data: Data, augment: Augment | None = None) -> list[keras.callbacks.Callback]:
        """Makes the run directory and gives the callbacks for `fit`: the watch first, then TensorBoard.

        Also writes what TensorBoard can show from the start: the run card, and examples of the data as
        they are and as `augment` makes them.
        """
        config = dataclasses.asdict(self.config)
        try:
            (self.directory / "plots").mkdir(parents=True, exist_ok=True)
            write_json(self.directory / "config.json", {"recipe": self.recipe, **config})
        except OSError as error:
            raise UserError(f"--run-dir {self.directory}: {error.strerror}; choose another folder") from error
        about = {"name": data.name, "source": data.source, **data.counts()}
        if not self.config.quiet:
            counts = ", ".join(f"{count:,} {split}" for split, count in data.counts().items())
            print(f"data: {data.name} ({data.source}): {counts}")
        card = {"data": about, "config": config, "hardware": self.hardware, **provenance()}
        self.writer = tf.summary.create_file_writer(str(self.directory / "tensorboard"))
        with self.writer.as_default(step=0):
            tf.summary.text("run_card", f"```\n{json.dumps(card, indent=2)}\n```")
            tf.summary.experimental.write_raw_pb(_COLUMNS.SerializeToString(), step=0)
            chosen = {name: value for name, value in config.items() if name not in ("data_dir", "run_dir", "quiet")}
            name = f"{self.recipe}/{self.directory.name}"
            hparams.hparams({**chosen, "recipe": self.recipe, "data": data.name}, trial_id=name)
            charts = [
                layout_pb2.Chart(title=name, multiline=layout_pb2.MultilineChartContent(tag=[f"^epoch_{name}$"]))
                for name in _CHARTS
            ]
            layout = layout_pb2.Layout(category=[layout_pb2.Category(title="train and validation", chart=charts)])
            tf.summary.experimental.write_raw_pb(custom_scalar.pb(layout).SerializeToString(), step=0)
            _show_examples(data, augment)
        self.writer.flush()
        self.watch = _Watch(len(data.train))
        profile = (2, 4) if self.config.profile else 0
        folder, histograms = str(self.directory / "tensorboard"), int(self.config.histograms)
        return [self.watch, keras.callbacks.TensorBoard(folder, histogram_freq=histograms, profile_batch=profile)]

    def finish(self, model: keras.Model, data: Data, report: Report, beside: dict[str, float]) -> dict[str, float]:
        """Saves the model, the plots and `result.json`, and prints the result.

        Args:
            model: the trained model, which takes what a user has. A classifier is saved with a second
                output, the name of the likeliest class.
            data: what it was trained on.
            report: its test metrics.
            beside: figures to compare them with, such as a baseline's.

        Returns:
            All metrics: those of the report and those beside it.
        """
        metrics, watch = {**report.metrics, **beside}, self.watch
        with self.writer.as_default(step=watch.steps):
            for name, value in metrics.items():
                tf.summary.scalar(f"test/{name}", value)
            for name, figure in {"learning_curves": curves_figure(watch.history), **report.figures}.items():
                png = figure_png(figure)
                (self.directory / "plots" / f"{name}.png").write_bytes(png)
                tf.summary.image(name, tf.image.decode_png(png, channels=3)[None])
            for name, text in report.texts.items():
                tf.summary.text(name, text)
        self.writer.close()
        part = self.directory / "part.keras"  # Renamed when whole; Keras wants the suffix.
        (with_class_names(model, data.class_names) if data.class_names else model).save(part)
        os.replace(part, self.directory / "model.keras")
        result = {
            "recipe": self.recipe,
            "data": {"source": data.source, "name": data.name, "digest": data.digest(), **data.counts()},
            "metrics": metrics,
            "parameters": sum(math.prod(weight.shape) for weight in model.trainable_weights),
            "seed": self.config.seed,
            "epochs": len(watch.history),
            "steps": watch.steps,
            "seconds": {"data": data.seconds, **watch.seconds(), "total": time.perf_counter() - self.started},
            "examples_per_second": watch.examples_per_second(),
            "weights_sha256": weights_sha256(model),
            "hardware": self.hardware,
            **provenance(),
            "class_names": data.class_names,
            "columns": data.columns,
            "history": watch.history,
            "evaluation": report.details,
        }
        write_json(self.directory / "result.json", result)
        if not self.config.quiet:
            table = Table("figure", "value", title=f"{self.recipe}: test split of {data.name} ({data.source})")
            for name, value in metrics.items():
                table.add_row(name.replace("_", " "), f"{value:.4f}")
            for name, value in (("parameters", result["parameters"]), ("training seconds", watch.seconds()["train"])):
                table.add_row(name, f"{value:,.0f}")
            table.add_row("examples per second", f"{result['examples_per_second'] or math.nan:,.0f}")
            rich.print(table)
            print(f"run directory: {self.directory}")
            print(f"watch it: tensorboard --logdir {shlex.quote(str(self.directory))}")
        return metrics


def with_class_names(model: keras.Model, class_names: tuple[str, ...]) -> keras.Model:
    """The same model with the outputs `class`, the name of the likeliest class, and `probabilities`."""
    name_of = keras.layers.StringLookup(
        vocabulary=list(class_names), num_oov_indices=0, mask_token=None, invert=True, name="class_names"
    )
    likeliest = name_of(keras.ops.argmax(model.output, axis=-1))
    return keras.Model(model.inputs, {"class": likeliest, "probabilities": model.output}, name=model.name)


class _Watch(keras.callbacks.Callback):
    """Measures the time of training, keeps the history, and stops at a loss that is not finite.

    The first execution traces the graph, so it counts as `compile` and not into the throughput.
    Validation counts into the seconds of `train`, but not into the throughput. `history` holds the logs
    of each epoch, and the seconds from the start of training to its end.
    """

    def __init__(self, examples_per_epoch: int):
        super().__init__()
        self.examples_per_epoch, self.steps = examples_per_epoch, 0
        self.history: list[dict[str, float]] = []
        self._begin = self._traced = self._end = math.nan
        self._examples = self._seconds = 0.0

    def on_train_begin(self, logs=None):
        self._begin = time.perf_counter()

    def on_epoch_begin(self, epoch, logs=None):
        self._from, self._first = time.perf_counter(), 0

    def on_train_batch_end(self, batch, logs=None):
        # With several steps per execution, `batch` is the last one of them.
        self._until, self._epoch_steps = time.perf_counter(), batch + 1
        if math.isnan(self._traced):
            self._traced = self._from = self._until
            self._first = batch + 1
        if not math.isfinite(logs["loss"]):
            raise TrainingFailedError(
                f"the loss is {logs['loss']} at step {self.steps + batch + 1}; "
                "try a smaller --learning-rate, and inputs of a sensible scale"
            )

    def on_epoch_end(self, epoch, logs=None):
        self.steps += self._epoch_steps
        examples = self.examples_per_epoch * (1 - self._first / self._epoch_steps)
        self._examples += examples
        self._seconds += self._until - self._from
        if examples:
            logs["examples_per_second"] = examples / (self._until - self._from)
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
        return self._examples / self._seconds if self._examples else None


def _show_examples(data: Data, augment: Augment | None) -> None:
    """Writes the first training examples to TensorBoard: pictures before and after, texts as a table."""
    if not data.class_names:
        return
    inputs, targets = data.train.inputs[:25], data.train.targets[:25]
    names = [data.class_names[label] for label in targets.numpy().argmax(axis=1)]
    if inputs.dtype == tf.string:
        tf.summary.text("examples", text_table(inputs.numpy(), names))
    elif inputs.dtype == tf.uint8:
        shown = {"examples": inputs}
        if augment:
            count = tf.constant(len(names), tf.int64)
            first_draw = BatchRandom(tf.constant([0, 0], tf.int64), count, tf.constant(0, tf.int64), count)
            shown["examples_augmented"], _ = augment(inputs, targets, first_draw)
        for tag, images in shown.items():
            png = figure_png(picture_figure(np.asarray(images), names))
            tf.summary.image(tag, tf.image.decode_png(png, channels=3)[None])
