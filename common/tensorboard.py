"""TensorBoard logs of a run. A failure to write logs never stops training."""

import functools
import json
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any

from common.batches import Augment, training_batches
from common.cli import RUNTIME_FLAGS, SharedConfig, warn
from common.data import Data
from common.evaluation import drawn_names, figure_png, picture_figure, text_table

import keras
import numpy as np
import tensorflow as tf
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.custom_scalar import summary as custom_scalars
from tensorboard.plugins.hparams import api as hparams
from tensorboard.plugins.scalar.summary import scalar_pb

_EVENT_FILES = "events.out.tfevents*"


class Logs(keras.callbacks.TensorBoard):
    """Keras' TensorBoard callback, with additional logs of a run. Warns about the first failure, then stops logging.

    Keras writes each training as two runs, `train` and `validation`. This callback writes one run, with tags such as
    `train/loss` and `validation/loss`, because TensorBoard selects no run by default if there are more than 40.

    Args:
        folder: the log directory.
        config: uses `histograms` and `profile`.
        sizes: the size in bytes of each log file when the checkpoint to resume from was saved, from `Logs.sizes`. Files
            are truncated to it, because a resumed run writes later logs again. Empty for a new run.
    """

    def __init__(self, folder: pathlib.Path, config: SharedConfig, sizes: dict[str, int]):
        self.folder, self.failed, self._flushed = folder, False, 0.0
        self.writer: Any = None  # until `_open`
        profile, histograms = (2, 4) if config.profile else 0, int(config.histograms)
        super().__init__(str(folder), histogram_freq=histograms, profile_batch=profile, write_graph=not sizes)
        for name in dir(keras.callbacks.TensorBoard):
            if name.startswith("on_") or name == "set_model":
                setattr(self, name, functools.partial(self.attempt, getattr(self, name)))
        self.attempt(self._open, sizes)

    def attempt(self, write: Callable[..., None], *arguments: Any, **named: Any) -> None:
        """Calls `write` unless logging has failed before. Turns errors into a warning."""
        if not self.failed:
            try:
                write(*arguments, **named)
            except (OSError, tf.errors.OpError) as error:
                self.failed = True
                warn(f"{self.folder}: no more logs ({error}); training continues without them")

    def _open(self, sizes: dict[str, int]) -> None:
        for file in self.folder.rglob(_EVENT_FILES):
            size = sizes.get(str(file.relative_to(self.folder)), 0)
            if size == 0:
                file.unlink()
            elif size < file.stat().st_size:
                os.truncate(file, size)
        self.writer = tf.summary.create_file_writer(str(self.folder))

    _train_writer = _val_writer = property(lambda self: self.writer)  # One run, not Keras' two.

    def set_model(self, model):
        """Traces the learning rate before training: eager evaluation of a schedule takes milliseconds each time."""
        super().set_model(model)
        self._train_dir = str(self.folder)  # For the profile.
        self._learning_rate = tf.function(lambda: tf.convert_to_tensor(model.optimizer.learning_rate), autograph=False)
        self._learning_rate()

    def on_epoch_end(self, epoch, logs=None):
        """Writes all metrics of an epoch in one operation. Keras uses one per metric, which is slow in short epochs.

        Flushes to disk at most once a second.
        """
        logs, summary = logs or {}, Summary()
        for name, value in {**logs, "learning_rate": float(self._learning_rate())}.items():
            split = "validation" if name.startswith("val_") else "train"
            summary.MergeFrom(scalar_pb(f"{split}/{name.removeprefix('val_')}", value))
        if epoch == 0:
            summary.MergeFromString(_charts([name for name in logs if f"val_{name}" in logs]))
        tf.raw_ops.WriteRawProtoSummary(
            writer=self.writer._resource,
            step=tf.constant(epoch, tf.int64),  # Python values make the operation ten times slower.
            tensor=tf.constant(summary.SerializeToString()),
        )
        if time.monotonic() - self._flushed >= 1:
            self._flush()
        super().on_epoch_end(epoch)  # Writes the histograms.

    def _flush(self) -> None:
        self.writer.flush()
        self._flushed = time.monotonic()

    _close_writers = _flush  # Keras calls it at the end of training; `end` and `show` write more.

    def on_train_batch_end(self, batch, logs=None):
        """Omits `logs`: Keras would create a summary of each metric, but writes only those of epochs."""
        super().on_train_batch_end(batch)

    def on_test_end(self, logs=None):
        """Does nothing: Keras would write the validation metrics here again, by step."""

    def sizes(self) -> dict[str, int]:
        """Flushes all logs and returns the size of each log file in bytes."""
        self.attempt(self._flush)
        files = self.folder.rglob(_EVENT_FILES)
        return {str(file.relative_to(self.folder)): file.stat().st_size for file in files}

    def begin(self, name: str, card: dict[str, Any], data: Data, augment: Augment | None) -> None:
        """Writes the run card, the hyperparameters and examples of the data, before training."""
        with self.writer.as_default(step=0):
            tf.summary.text("run_card", f"```\n{json.dumps(card, indent=2)}\n```")
            settings = {key: value for key, value in card["config"].items() if key not in RUNTIME_FLAGS}
            hparams.hparams({**settings, "recipe": card["recipe"], "data": data.name}, trial_id=name)
            _show_examples(data, augment)

    def end(self, step: int, metrics: dict[str, float], texts: dict[str, str]) -> None:
        """Writes the results on the test split."""
        with self.writer.as_default(step=step):
            for name, value in metrics.items():
                tf.summary.scalar(f"test/{name}", value)
            for name, text in texts.items():
                tf.summary.text(name, text)

    def show(self, step: int, name: str, png: bytes) -> None:
        """Writes an image, encoded as PNG."""
        with self.writer.as_default(step=step):
            _write_image(name, png)
        self._flush()


def _charts(names: list[str]) -> bytes:
    """Returns the layout of TensorBoard's Custom Scalars tab: a chart per metric, with train and validation."""
    charts = [layout_pb2.Chart(title=name, multiline={"tag": [f"^(train|validation)/{name}$"]}) for name in names]
    categories = [layout_pb2.Category(title="train and validation", chart=charts)]
    return custom_scalars.pb(layout_pb2.Layout(category=categories)).SerializeToString()


def _show_examples(data: Data, augment: Augment | None) -> None:
    """Writes training examples to TensorBoard: images before and after augmentation, or a table of texts."""
    augmentations = {"text": [None], "image": [None, augment] if augment else [None]}.get(data.task["input"], [])
    for tag, augmentation in zip(("examples", "examples_augmented"), augmentations, strict=False):
        inputs, targets = next(iter(training_batches(data.train, min(25, len(data.train)), 0, augmentation)))
        labels = np.argmax(targets, axis=1) if data.task["output"] == "class" else []
        text = data.task["input"] == "text"
        class_names = data.class_names if text else drawn_names(data.class_names)
        names = [class_names[label] for label in labels] or [""] * len(inputs)
        if text:
            tf.summary.text(tag, text_table(inputs.numpy(), names))
        else:
            title = f"{tag.replace('_', ' ')}, training split of {data.name} ({data.source})"
            _write_image(tag, figure_png(picture_figure(inputs.numpy(), names), title))


def _write_image(tag: str, png: bytes) -> None:
    tf.summary.image(tag, tf.image.decode_png(png, channels=3)[None])
