"""The progress of training as a line per epoch."""

import contextlib
import math
import sys
import time
from collections.abc import Callable

from common.console import columns, elapsed, is_terminal, say, status_line

import keras


class EpochLine(keras.callbacks.ProgbarLogger):
    """Prints a line per epoch. In a terminal, the status line shows the current epoch.

    Replaces Keras' progress bar, which does not fit in 80 columns if there are several metrics.

    Args:
        name: describes the training in the first line.
    """

    def __init__(self, name: str = "training"):
        super().__init__()
        # `skipped` counts the batches of a resumed epoch that were trained before.
        self.name, self.skipped, self._phase, self._logs = name, 0, "", {}
        self._status = contextlib.ExitStack()

    def show(self, text: Callable[[], str]) -> None:
        """Shows `text()` in the status line until training begins or ends."""
        self._status.close()
        self._status.enter_context(status_line(text))

    def on_train_begin(self, logs=None):
        self._status.close()
        if self.verbose:
            say(f"{self.name}: epochs {self.epochs:,}, steps per epoch {self.target:,}")
            self._phase, self._epoch, self._began = "compiling", 0, time.monotonic()
            self.show(lambda: self._line(columns(), self._phase))

    def on_epoch_begin(self, epoch, logs=None):
        self._epoch, self._began, self._logs = epoch, time.monotonic(), {}

    def on_train_batch_end(self, batch, logs=None):
        self._phase, self._logs = f"{self.skipped + batch + 1}/{self.target}", logs or {}

    def on_test_begin(self, logs=None):
        self._phase = "validating"

    def on_test_batch_end(self, batch, logs=None):
        """Does nothing: Keras would show the metrics of this batch."""

    def on_test_end(self, logs=None):
        """Does nothing: `on_epoch_end` shows the validation metrics."""

    def on_epoch_end(self, epoch, logs=None):
        self._phase, self._logs = "", logs or {}
        if self.verbose:
            say(self._line(columns() if is_terminal(sys.stdout) else math.inf))

    def on_train_end(self, logs=None):
        self._status.close()

    def _line(self, space: float, phase: str = "") -> str:
        """Formats an epoch. If there is too little space, omits the least important values.

        In order of importance: loss, validation and training value of each metric, speed, validation loss.
        """
        logs = self._logs  # The status line is drawn by another thread.
        parts = {name: f"{name} {_number(value)}" for name, value in logs.items()}
        if "examples_per_second" in logs:
            parts["examples_per_second"] = f"{logs['examples_per_second']:,.0f}/s"
        metrics = list(dict.fromkeys(name.removeprefix("val_") for name in parts))

        def importance(name: str) -> tuple:
            metric = name.removeprefix("val_")
            return name == "val_loss", metric != "loss", metrics.index(metric), name == metric

        def place(name: str) -> tuple:
            return name == "examples_per_second", name.startswith("val_"), not name.endswith("loss")

        begin, end = [f"epoch {self._epoch + 1}/{self.epochs}", *filter(None, [phase])], elapsed(self._began)
        line = "  ".join([*begin, end])
        kept: list[str] = []
        for name in sorted(parts, key=importance):
            more = sorted([*kept, name], key=place)
            longer = "  ".join([*begin, *(parts[metric] for metric in more), end])
            if len(longer) <= space:
                kept, line = more, longer
        return line


def _number(value: float) -> str:
    return f"{value:.4f}" if value == 0 or 1e-3 <= abs(value) < 1e4 else f"{value:.3e}"
