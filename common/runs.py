"""A training run: setup, callbacks, timing and results."""

import dataclasses
import math
import os
import pathlib
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from common import console, upstream
from common.batches import Augment, steps_per_epoch
from common.checkpoints import EPOCH_OVER, Checkpoints, newest_checkpoint
from common.cli import RUNTIME_FLAGS, SharedConfig, UserError, warn
from common.console import say, status
from common.data import Data, imbalance
from common.evaluation import Report, curves_figure, figure_png, majority_accuracy
from common.hardware import apply, choose, describe_machine
from common.layers import with_stock_layers
from common.multiworker import Cluster, current_cluster, described_cluster
from common.records import code_sha256, file_sha256, provenance, rename, weights_sha256, write_file, write_json
from common.run_directory import IGNORED_FILES, choose_directory, is_used, lock, resumed_settings, unlock
from common.tensorboard import Logs

import keras
import tensorflow as tf


def start_run(config: SharedConfig, **files: str) -> "Run":
    """Sets up hardware and seeds according to `config`, and chooses the run directory.

    Does not create the directory: a run that fails because of its data must leave no files. `Run.callbacks` creates it
    when training begins.

    Args:
        config: the full configuration. The recipe is named after the file that defines the class.
        files: paths of other files that training reads, such as a teacher model, by flag name. A path may be empty.

    Raises:
        UserError: a flag does not fit the machine; with `--resume`, the configuration or the content of `files` differs
            from that of the run.
        AlreadyFinishedError: the run to resume is finished.
    """
    started = time.perf_counter()
    workers, index = described_cluster(os.environ) if config.strategy in ("auto", "multi-worker") else ((), 0)
    # A class defined in a notebook has no file.
    recipe = pathlib.Path(getattr(sys.modules[type(config).__module__], "__file__", "notebook")).stem
    machine = describe_machine()
    choices = choose(machine, config, len(workers))
    chosen = {name: value for name, (value, _) in choices.items()}
    settings = {"recipe": recipe, "config": dataclasses.asdict(config), "chosen": chosen, "resumed": 0, "files": {}}
    for name, path in files.items():
        try:
            settings["files"][name] = path and file_sha256(pathlib.Path(path))
        except OSError as error:
            raise UserError(f"--{name} {path}: can't be read ({error.strerror}); give another file") from error
    cluster = (current_cluster or [Cluster(workers, index)])[0] if chosen["strategy"] == "multi-worker" else Cluster()
    console.shown = cluster.chief and not config.quiet
    # Layer names must not depend on earlier runs in this process. Before `apply`, because it also resets the dtype
    # policy.
    keras.utils.clear_session()
    strategy = apply(choices, config, cluster)
    shared = {"workers": list(workers), "tensorflow": tf.__version__, "keras": keras.__version__, "code": code_sha256()}
    shared |= {"recipe": recipe, **settings["config"], **chosen, **settings["files"]}
    ignored = {*RUNTIME_FLAGS, "threads", "data", "test_data"} - {"baseline"}
    cluster.compare({key: value for key, value in shared.items() if key not in ignored})

    def find_run() -> tuple:
        directory = choose_directory(recipe, config)
        if not is_used(directory, config.resume):
            return str(directory), settings, None
        return str(directory), resumed_settings(directory, settings), newest_checkpoint(directory / "checkpoints")

    directory, settings, checkpoint = cluster.from_chief(find_run() if cluster.chief else None)
    keras.utils.set_random_seed(config.seed)
    gpus = ", ".join(name for name, _ in machine.gpus) or "no GPU"
    reasons = ", ".join(f"{name} {value} ({reason})" for name, (value, reason) in choices.items())
    say(f"hardware: {machine.processor}, {machine.cores} cores, {gpus}: {reasons}")
    hardware = dataclasses.asdict(machine) | chosen
    return Run(recipe, config, pathlib.Path(directory), strategy, hardware, started, settings, checkpoint, cluster)


@dataclasses.dataclass
class Run:
    """A training run, between `start_run` and `finish`.

    The run writes all files to `directory`. Build and compile the model in the scope of `strategy`. `settings` is the
    content of `config.json`; `checkpoint` is the checkpoint to resume from and its state, or None. Only the chief of
    `cluster` writes and prints.
    """

    recipe: str
    config: SharedConfig
    directory: pathlib.Path
    strategy: tf.distribute.Strategy
    hardware: dict[str, Any]
    started: float
    settings: dict[str, Any]
    checkpoint: tuple[pathlib.Path, dict[str, Any]] | None
    cluster: Cluster

    @property
    def verbose(self) -> int:
        """The value to pass to `fit`: 1, or 0 with `--quiet` and on workers other than the chief."""
        return int(self.cluster.chief and not self.config.quiet)

    @property
    def start_step(self) -> int:
        """The number of the first step; 0 unless the run is resumed."""
        return self.checkpoint[1]["step"] if self.checkpoint else 0

    def callbacks(
        self, data: Data, augment: Augment | None = None, more: Sequence[keras.callbacks.Callback] = ()
    ) -> list[keras.callbacks.Callback]:
        """Creates the run directory and returns the callbacks for `fit`: timing, logs, `more`, checkpoints.

        Args:
            data: the training data.
            augment: the augmentation of training batches; TensorBoard shows augmented examples.
            more: your own callbacks, such as `EarlyStopping`. Checkpoints save their state.
        """
        state = self.checkpoint[1] if self.checkpoint else {}
        self.data_digest, earlier = data.digest(), state.get("seconds", {})
        self.cluster.compare({"data": self.data_digest})
        self.seconds = {"data": data.seconds + earlier.get("data", 0.0), "total": earlier.get("total", 0.0)}
        batch_size = min(self.config.batch_size, len(data.train))
        self.watch = _Watch(steps_per_epoch(data.train, batch_size) * batch_size)
        checkpoints = Checkpoints(
            self.directory / "checkpoints",
            self.config.checkpoint_every,
            [self.watch, *more],
            lambda: {"seconds": self._seconds(), "logs": self.logs.sizes()},
            self.checkpoint,
            self.cluster,
        )
        if not self.cluster.chief:
            return [self.watch, *more, checkpoints]
        self._write_settings(data)
        counts = ", ".join(f"{count:,} {split}" for split, count in data.counts().items())
        say(f"data: {data.name} ({data.source}): {counts}")
        if data.task["output"] == "class" and (line := imbalance(data)):
            say(line, bold=True)
        if self.settings["resumed"]:
            say(f"resumed: {self.directory}, from step {self.start_step}")
        checkpoints.progress_bar.show(lambda: "preparing")
        self.logs = Logs(self.directory / "tensorboard", self.config, state.get("logs", {}))
        code = provenance()  # Before training: later commits do not affect this run.
        if not state:
            summary = {"name": data.name, "source": data.source, **data.counts()}
            card = {"recipe": self.recipe, "data": summary, "config": dataclasses.asdict(self.config)}
            card |= {"hardware": self.hardware, **code}
            self.logs.attempt(self.logs.begin, f"{self.recipe}/{self.directory.name}", card, data, augment)
        return [self.watch, self.logs, *more, checkpoints, checkpoints.progress_bar]

    def _seconds(self) -> dict[str, float]:
        return {**self.seconds, "total": self.seconds["total"] + time.perf_counter() - self.started}

    def _write_settings(self, data: Data) -> None:
        """Creates the directory and `config.json`; leaves no new directory behind if that fails."""
        new = not self.directory.exists()
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            lock(self.directory)
            if self.settings.setdefault("data_digest", self.data_digest) != self.data_digest:
                raise UserError(f"{data.name}: not the data this run began with; restore it, or start a new run")
            if not self.settings["resumed"] and set(os.listdir(self.directory)) - IGNORED_FILES:
                raise UserError(f"--run-dir {self.directory}: another process uses it now; choose a new folder")
            write_json(self.directory / "config.json", self.settings)
            for name in ("plots", "checkpoints"):
                (self.directory / name).mkdir(exist_ok=True)
        except (OSError, UserError) as error:
            if unlock(self.directory) and new:
                shutil.rmtree(self.directory, ignore_errors=True)
            if isinstance(error, UserError):
                raise
            problem = f"{error.filename or self.directory}: {error.strerror}"
            raise UserError(f"--run-dir {problem}; choose an empty or a new one") from error

    @status("saving the model")
    def finish(
        self,
        model: keras.Model,
        data: Data,
        report: Report,
        extra: dict[str, float] | None = None,
        baselines: dict[str, float] | None = None,
    ) -> dict[str, float]:
        """Saves the model, the plots and `result.json`, prints the result, and returns all metrics.

        Args:
            model: the trained model, with raw data as input. A classifier is saved with a second output: the name of
                the most probable class.
            data: the training data.
            report: the test metrics.
            extra: additional metrics that are only shown, such as a lower bound of the error.
            baselines: test metrics of baselines, such as `naive_accuracy`: a name, then that of a metric of `report`.
                If the model is worse, the output says so. The most frequent class of train is one for every classifier.
        """
        if data.task["output"] == "class":
            baselines = {"majority_accuracy": majority_accuracy(data), **(baselines or {})}
        metrics, watch = {**report.metrics, **(extra or {}), **(baselines or {})}, self.watch
        if not self.cluster.chief:
            return metrics
        self.logs.attempt(self.logs.end, watch.steps, metrics, report.texts)
        result = {
            "recipe": self.recipe,
            "data": {"source": data.source, "name": data.name, "digest": self.data_digest, **data.counts()},
            "metrics": metrics,
            "parameters": sum(math.prod(weight.shape) for weight in model.trainable_weights),
            "seed": self.config.seed,
            "epochs": len(watch.history),
            "steps": watch.steps,
            "resumed": self.settings["resumed"],
            "seconds": {
                "compile": watch.compile_seconds,
                "train": watch.elapsed - watch.compile_seconds,
                "evaluate": time.perf_counter() - watch._end,
                **self._seconds(),
            },
            "examples_per_second": watch.examples / watch.seconds if watch.examples else None,
            "weights_sha256": weights_sha256(model),
            "hardware": self.hardware,
            "patches": upstream.applied,
            "files": self.settings["files"],
            **provenance(),
            "task": data.task,
            "class_names": data.class_names,
            "columns": data.columns,
            "history": watch.history,
            "evaluation": report.details,
        }
        part = self.directory / "part.keras"  # Keras requires the suffix.
        try:
            saved = with_stock_layers(model)
            (with_class_names(saved, data.class_names) if data.task["output"] == "class" else saved).save(part)
            rename(part, self.directory / "model.keras")
            result["model_sha256"] = file_sha256(self.directory / "model.keras")
            write_json(self.directory / "result.json", result)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise UserError(f"--run-dir {self.directory}: {error}; make room, then continue with --resume") from error
        self._draw(report, data)
        unlock(self.directory)
        shown = {name: shown_number(value) for name, value in metrics.items()}
        shown |= {"parameters": f"{result['parameters']:,}", "training seconds": f"{result['seconds']['train']:,.0f}"}
        if result["examples_per_second"]:
            shown["examples per second"] = f"{result['examples_per_second']:,.0f}"
        say(f"{self.recipe}: test split of {data.name} ({data.source})")
        for name, value in shown.items():
            say(f"  {name.replace('_', ' '):<32} {value:>12}")
        for line in below_baseline(report.metrics, baselines or {}):
            say(line, bold=True)
        say(f"run directory: {self.directory}")
        program = pathlib.Path(sys.executable).with_name("tensorboard")
        shorter = min(str(program), os.path.relpath(program), key=len)
        command = [shorter] if program.exists() else [sys.executable, "-m", "tensorboard.main"]
        say("watch it:")
        say(f"  {shlex.join([*command, '--logdir', str(self.directory)])}")
        return metrics

    @status("drawing plots")
    def _draw(self, report: Report, data: Data) -> None:
        """Writes figures to `plots` and to TensorBoard. Warns about figures that fail."""
        for name in ("learning_curves", *report.figures):
            path = self.directory / "plots" / f"{name}.png"
            shown = f"{'test split of ' * (name in report.figures)}{data.name} ({data.source})"
            try:
                figure = report.figures.get(name) or curves_figure(self.watch.history)
                png = figure_png(figure, f"{self.recipe}: {name.replace('_', ' ')}, {shown}")
                write_file(path, png)
                self.logs.attempt(self.logs.show, self.watch.steps, name, png)
            except Exception as error:  # Matplotlib raises errors of many types.
                warn(f"{path}: can't be written ({error})")


def shown_number(value: float) -> str:
    """Formats a metric with four digits."""
    return f"{value:.4f}" if abs(value) < 1e6 else f"{value:.4e}"


def below_baseline(metrics: dict[str, float], baselines: dict[str, float]) -> list[str]:
    """Returns a line for each baseline that is better than the model: lower for errors and losses, else higher.

    Errors within 1 % count as equal: a baseline may be the exact solution, which no training can beat.
    """
    lines = []
    for name, value in baselines.items():
        metric = max((metric for metric in metrics if name.endswith(f"_{metric}")), key=len)
        own, lower = metrics[metric], metric in ("loss", "mse", "mae")
        if value < 0.99 * own if lower else value > own:
            sign, note = (">", " (lower is better)") if lower else ("<", "")
            other = f"{name.replace('_', ' ')} {shown_number(value)}"
            lines.append(f"below the baseline: {metric} {shown_number(own)} {sign} {other}{note}")
    return lines


def once(run: Run, make: Callable[[], Any]) -> Any:
    """Calls `make` on the chief only and broadcasts its result to all workers."""
    return run.cluster.from_chief(make() if run.cluster.chief else None)


def with_class_names(model: keras.Model, class_names: tuple[str, ...]) -> keras.Model:
    """Returns the model with outputs `class`, the name of the most probable class, and `probabilities`."""
    class_name = keras.layers.StringLookup(
        vocabulary=list(class_names), num_oov_indices=0, oov_token="", mask_token=None, invert=True, name="class_names"
    )
    predicted = class_name(keras.ops.argmax(model.output, axis=-1))
    return keras.Model(model.inputs, {"class": predicted, "probabilities": model.output}, name=model.name)


class _Watch(keras.callbacks.Callback):
    """Measures training time and records the history: the logs of each epoch and the seconds until its end.

    The first execution traces the graph, so it counts as compile time. The throughput, `examples` / `seconds`, excludes
    it. It also excludes validation, which counts as training time.
    """

    def __init__(self, examples_per_epoch: int):
        super().__init__()
        # Checkpoints do not save attributes that begin with _.
        self._examples_per_epoch, self._traced = examples_per_epoch, False
        self.history: list[dict[str, float]] = []
        self.steps, self.elapsed, self.compile_seconds = 0, 0.0, 0.0
        self.examples, self.seconds, self.epoch_examples, self.epoch_seconds = 0.0, 0.0, 0.0, 0.0

    def _tick(self) -> float:
        now = time.perf_counter()
        took, self._end = now - self._end, now
        self.elapsed += took
        return took

    def on_train_begin(self, logs=None):
        self._end = time.perf_counter()

    def on_epoch_begin(self, epoch, logs=None):
        self._tick()
        self._done = 0

    def on_train_batch_end(self, batch, logs=None):
        # With several steps per execution, `batch` is the last of them. A resumed epoch counts from 0 again.
        took, batches, self._done = self._tick(), batch + 1 - self._done, batch + 1
        if self._traced:
            self.epoch_examples += batches * self._examples_per_epoch / self.params["steps"]
            self.epoch_seconds += took
        else:
            self._traced = True
            self.compile_seconds += took

    def on_epoch_end(self, epoch, logs: Any = None):
        self._tick()
        if self.model.stop_training == EPOCH_OVER:  # Reset here, so that later callbacks can stop training.
            self.model.stop_training = False
        examples, seconds = self.epoch_examples, self.epoch_seconds
        # If the only execution was the traced one, its time is the only measurement.
        rate = examples / seconds if examples else self._examples_per_epoch / self.compile_seconds
        logs["examples_per_second"] = rate
        self.examples, self.seconds = self.examples + examples, self.seconds + seconds
        self.epoch_examples = self.epoch_seconds = 0.0
        self.history.append({name: float(value) for name, value in logs.items()} | {"seconds": self.elapsed})
        self.steps = len(self.history) * self.params["steps"]
