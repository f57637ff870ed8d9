"""One run: its directory, its TensorBoard logs, its clock, and the true record of its result."""

import dataclasses
import datetime
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
import tensorflow as tf
from rich.console import Console
from rich.table import Table
from tensorboard.plugins.hparams import api as hparams

# What TensorBoard's HParams tab shows of every run; the same in all runs, or it would show some runs only.
_COLUMNS = hparams.hparams_config_pb(
    hparams=[hparams.HParam(name) for name in ("recipe", "data", "seed", "epochs", "learning_rate")],
    metrics=[hparams.Metric(f"test/{name}") for name in ("accuracy", "f1", "loss", "mse", "mae", "r2")],
)


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
    # A class typed into a notebook stands in no file.
    recipe = pathlib.Path(getattr(sys.modules[type(config).__module__], "__file__", "notebook")).stem
    machine = describe_machine()
    choices = choose(machine, config)
    moment = datetime.datetime.now().strftime("%Y%m%d-%H%M%S-%f")
    directory = pathlib.Path(config.run_dir or pathlib.Path("runs", recipe, moment))
    try:
        free = not os.path.exists(directory) or not os.listdir(directory)
    except OSError:  # A file, or a folder that can't be read.
        free = False
    if not free:
        raise UserError(f"--run-dir {directory}: is not an empty folder; choose an empty or a new one")
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
            raise UserError(f"--run-dir {self.directory}: {error.strerror}; choose an empty or a new one") from error
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
                _write_picture(name, png)
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
            "seconds": {
                "data": data.seconds,
                "compile": watch.traced - watch.begin,
                "train": watch.end - watch.traced,
                "evaluate": time.perf_counter() - watch.end,
                "total": time.perf_counter() - self.started,
            },
            "examples_per_second": watch.examples / watch.seconds if watch.examples else None,
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
            for name, value in (("parameters", result["parameters"]), ("training seconds", result["seconds"]["train"])):
                table.add_row(name, f"{value:,.0f}")
            table.add_row("examples per second", f"{result['examples_per_second'] or math.nan:,.0f}")
            Console(markup=False).print(table)  # A path may hold brackets.
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

    The first execution traces the graph, so it counts as compiling and not into the throughput, which is
    `examples` in `seconds`. Validation counts as training, but not into the throughput either. `history`
    holds the logs of each epoch, and the seconds from the start of training to its end.
    """

    def __init__(self, examples_per_epoch: int):
        super().__init__()
        self.examples_per_epoch, self.steps, self.examples, self.seconds = examples_per_epoch, 0, 0.0, 0.0
        self.history: list[dict[str, float]] = []
        self.traced = None

    def on_train_begin(self, logs=None):
        self.begin = time.perf_counter()

    def on_epoch_begin(self, epoch, logs=None):
        self._from, self._untimed = time.perf_counter(), 0

    def on_train_batch_end(self, batch, logs=None):
        # With several steps per execution, `batch` is the last one of them.
        self.end, self._batches = time.perf_counter(), batch + 1
        if self.traced is None:
            self.traced, self._from, self._untimed = self.end, self.end, batch + 1
        if not math.isfinite(logs["loss"]):
            raise TrainingFailedError(
                f"the loss is {logs['loss']} at step {self.steps + batch + 1}; "
                "try a smaller --learning-rate, and inputs of a sensible scale"
            )

    def on_epoch_end(self, epoch, logs=None):
        examples, seconds = self.examples_per_epoch * (1 - self._untimed / self._batches), self.end - self._from
        self.steps, self.examples, self.seconds = (
            self.steps + self._batches,
            self.examples + examples,
            self.seconds + seconds,
        )
        if examples:
            logs["examples_per_second"] = examples / seconds
        self.end = time.perf_counter()
        self.history.append({name: float(value) for name, value in logs.items()} | {"seconds": self.end - self.begin})


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
            _write_picture(tag, figure_png(picture_figure(np.asarray(images), names)))


def _write_picture(tag: str, png: bytes) -> None:
    tf.summary.image(tag, tf.image.decode_png(png, channels=3)[None])
