"""Exact resume: atomic checkpoints that store everything the next training step depends on."""

import inspect
import itertools
import json
import math
import pathlib
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from common.cli import STOPPING, TrainingFailedError, UserError, warn
from common.multiworker import Cluster
from common.progress import EpochLine
from common.records import file_sha256, read_json, rename

import keras
import numpy as np
import tensorflow as tf

_SHARE = 0.01  # maximum share of training time to spend on checkpoints
_GUESS = 0.05  # estimated seconds per checkpoint, until the first one has been measured
_STATE = ("epoch", "batch", "step", "stopped", "variables", "metrics", "callbacks")
# Value of `model.stop_training` that ends the current epoch, but not training.
EPOCH_OVER = "the epoch is over"


def _checkpoints(folder: pathlib.Path) -> list[pathlib.Path]:
    """Returns the checkpoints in a folder, newest first."""
    return sorted((path for path in folder.glob("epoch-??????-batch-?????????") if path.is_dir()), reverse=True)


def newest_checkpoint(folder: pathlib.Path) -> tuple[pathlib.Path, dict[str, Any]] | None:
    """Returns the newest intact checkpoint in `folder` and its state, or None. Warns about damaged checkpoints."""
    for checkpoint in _checkpoints(folder):
        try:
            for name, digest in read_json(checkpoint / "files.json", "state.json").items():
                if not (checkpoint / name).is_file() or file_sha256(checkpoint / name) != digest:
                    raise UserError(f"{checkpoint / name}: damaged")
            return checkpoint, read_json(checkpoint / "state.json", *_STATE)
        except (UserError, OSError) as error:
            problem = str(error).split(";")[0] if isinstance(error, UserError) else f"{checkpoint}: {error.strerror}"
            warn(f"{problem}; resuming from the one before it, or from the beginning")
    return None


def _encoded(value: Any, arrays: list[np.ndarray]) -> Any:
    """Encodes a value as JSON. Appends arrays to `arrays` and stores their index; TypeError for unsupported types."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if type(value) is dict:
        return {"dict": [[_encoded(part, arrays) for part in pair] for pair in value.items()]}
    if type(value) in (list, tuple, set, frozenset):
        return {type(value).__name__: [_encoded(part, arrays) for part in value]}
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "biufcSU":
        arrays.append(np.asarray(value))
        return {"array" if isinstance(value, np.ndarray) else "scalar": len(arrays) - 1}
    raise TypeError(type(value).__name__)


def _decoded(content: Any, arrays: list[np.ndarray]) -> Any:
    """Inverse of `_encoded`."""
    if not isinstance(content, dict):
        return content
    ((kind, parts),) = content.items()
    if kind in ("array", "scalar"):
        return arrays[parts].copy() if kind == "array" else arrays[parts][()]
    if kind == "dict":
        return {_decoded(key, arrays): _decoded(value, arrays) for key, value in parts}
    make = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}[kind]
    return make(_decoded(part, arrays) for part in parts)


class Checkpoints(keras.callbacks.Callback):
    """Saves checkpoints, restores one, and stops training on signals; must be the last callback in the list.

    Stops on a loss that is not finite. On SIGTERM and SIGINT, saves and stops after the current execution. If a
    validation takes longer than a second, aborts it; a resumed run then repeats the steps since the last checkpoint.

    A checkpoint is a folder `epoch-E-batch-B`. It holds all variables of the model and the optimizer, including dropout
    seeds, the metrics of the current epoch, the state of other callbacks, and the step number. Saves at the end of
    training, and before that as often as costs 1 % of training time. Keeps the last two checkpoints. Keras'
    `BackupAndRestore` saves neither seeds, metrics nor callbacks.

    A run resumed in the middle of an epoch trains only the remaining steps: other callbacks see batch numbers that
    start at 0.

    Args:
        folder: the folder of the checkpoints.
        every: steps between checkpoints; 0: as often as costs 1 % of training time.
        others: callbacks whose state to save. Saves public attributes that are not constructor arguments, if they are
            numbers, strings or arrays, or lists, tuples, sets and dictionaries of them. Warns about other attributes.
        about: returns additional data to store with each checkpoint.
        resumed: the checkpoint to resume from and its state, from `newest_checkpoint`.
        cluster: the workers; only the chief writes checkpoints.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        every: int,
        others: Sequence[keras.callbacks.Callback],
        about: Callable[[], dict[str, Any]],
        resumed: tuple[pathlib.Path, dict[str, Any]] | None,
        cluster: Cluster,
    ):
        super().__init__()
        self.folder, self.every, self.others, self.about, self.resumed = folder, every, others, about, resumed
        self.cluster, self.progress_bar = cluster, EpochLine()
        self._signal, self._handlers, self._step, self._saved_step, self._due = math.inf, {}, 0, 0, False
        self._failed, self._unsaved, self._last_loss = False, set(), "none before it was finite"
        self._offset = 0  # Batches of a resumed epoch that were trained before.

    def on_train_begin(self, logs=None):
        if self.resumed:
            self._prepare(*self.resumed)
        self._saved, self._took = time.monotonic(), _GUESS
        if threading.current_thread() is threading.main_thread():  # Python sets handlers in the main thread only.
            for number in STOPPING:
                self._handlers[number] = signal.signal(number, self._remember)

    def _remember(self, number: int, frame: Any) -> None:
        self._signal, before = time.monotonic(), self._handlers[number]
        # There is nothing to save yet. Stop at once: the first execution traces the graph, which can take minutes.
        if self._step == self._saved_step and callable(before) and len(self.cluster.workers) == 1:
            self._clean_up()
            before(number, frame)
        elif number == signal.SIGINT:  # A second Ctrl-C ends the program (in a notebook, the cell) at once.
            signal.signal(number, before if before is signal.default_int_handler else signal.SIG_DFL)

    def on_epoch_begin(self, epoch, logs=None):
        self._epoch = epoch
        self.progress_bar.skipped = self._offset
        if self._offset:
            self._restore()

    def on_train_batch_end(self, batch, logs: Any = None):
        done, steps = self._offset + batch + 1, self.params["steps"]
        if self._offset and done == steps and not self.model.stop_training:
            self.model.stop_training = EPOCH_OVER
        self._step = self._epoch * steps + done
        if not math.isfinite(logs["loss"]):
            self._fail(f"the loss is {logs['loss']} at step {self._step} ({self._last_loss})")
        self._last_loss = f"the last finite one was {logs['loss']:.6g}"
        steps_due = self._step - self._saved_step >= self.every > 0
        time_due = not self.every and time.monotonic() - self._saved >= self._took / _SHARE
        self._due = self.cluster.chief and (steps_due or time_due)
        stop, save = self._agreed(self._due and done < steps)
        self._due |= save  # Else `on_epoch_end` would ignore the request.
        if (stop or save) and done < steps and not self.model.stop_training:
            self._save(self._metrics())
            self._stop_if(stop)

    def on_test_batch_end(self, batch, logs=None):
        stop, abort = self._agreed(time.monotonic() - self._signal >= 1)  # Reuses the `save` flag.
        self._stop_if(stop and abort)

    def on_epoch_end(self, epoch, logs=None):
        self._offset = 0
        stop, _ = self._agreed()
        ended = epoch + 1 == self.params["epochs"] or self.model.stop_training or stop
        if ended or self._due:
            self._save([])
        self._stop_if(stop)

    def on_train_end(self, logs=None):
        self._clean_up()
        # A signal may have arrived after the last epoch was saved.
        self._stop_if(self.cluster.agree_to_stop(self._signal < math.inf))

    def _clean_up(self) -> None:
        self.progress_bar.on_train_end()  # Keras does not call it after an exception.
        self.model._initial_epoch = None  # Else the next `fit` would start at this epoch.
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _agreed(self, save: bool = False) -> tuple[bool, bool]:
        self.cluster.ask(self._signal < math.inf, save)
        return self.cluster.agreed()

    def _stop_if(self, stop: bool) -> None:
        if stop:
            self._clean_up()
            raise KeyboardInterrupt(f"the same command with --resume continues {self.folder.parent}")

    def _fail(self, problem: str) -> NoReturn:
        self._clean_up()
        raise TrainingFailedError(f"{problem}; try a smaller --learning-rate, and inputs of a sensible scale")

    def _variables(self) -> list:
        optimizer = self.model.optimizer
        if not optimizer.built:
            with self.model.distribute_strategy.scope():
                optimizer.build(self.model.trainable_variables)
        return [*self.model.variables, *optimizer.variables]

    def _local_values(self, variable: keras.Variable) -> Sequence[tf.Variable]:
        """Returns a metric's variable on each replica of this worker; the metric is the sum over replicas."""
        return self.model.distribute_strategy.experimental_local_results(variable.value)

    def _metrics(self) -> list[np.ndarray]:
        """Returns the metric variables of all replicas, each [replicas, ...]; an empty list if not on the chief."""
        local = [np.stack([v.numpy() for v in self._local_values(metric)]) for metric in self.model.metrics_variables]
        by_metric = zip(*self.cluster.gather(local), strict=True)
        return [np.concatenate(values, dtype=values[0].dtype, casting="unsafe") for values in by_metric]

    def _states(self, arrays: list[np.ndarray]) -> list[dict[str, Any]]:
        """Returns class and state of the other callbacks as JSON. Appends their arrays to `arrays`."""
        states = []
        for callback in self.others:
            states.append({"class": type(callback).__name__, "state": {}})
            # Not constructor arguments: `EarlyStopping` negates `min_delta` in each process, a restored one twice.
            constructor_arguments = {"params", *inspect.signature(type(callback).__init__).parameters}
            for name, value in vars(callback).items():
                if name.startswith("_") or name in constructor_arguments or callable(value):
                    continue
                try:
                    states[-1]["state"][name] = _encoded(value, arrays)
                except TypeError as error:
                    attribute = f"{type(callback).__name__}.{name}"
                    if attribute not in self._unsaved:
                        warn(f"{attribute}: holds a {error}, which no checkpoint keeps; --resume starts without it")
                    self._unsaved.add(attribute)
        return states

    def _save(self, metrics: list[np.ndarray]) -> None:
        """Writes a checkpoint. If that fails, warns and keeps the previous one."""
        if not self.cluster.chief:
            return
        began, variables, (epoch, batch) = time.monotonic(), self._variables(), divmod(self._step, self.params["steps"])
        arrays = [keras.ops.convert_to_numpy(variable) for variable in variables]
        for variable, values in zip(variables, arrays, strict=True):
            if "float" in str(values.dtype) and not np.isfinite(values).all():
                self._fail(f"{variable.path} is not finite after step {self._step}")
        arrays += metrics
        state = {"epoch": epoch, "batch": batch, "step": self._step, "stopped": bool(self.model.stop_training)}
        state |= {"variables": self._shapes(), "metrics": len(metrics), "callbacks": self._states(arrays)}
        part, checkpoint = self.folder / "part", self.folder / f"epoch-{epoch:06}-batch-{batch:09}"
        try:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            np.savez(part / "arrays.npz", *arrays)
            (part / "state.json").write_text(json.dumps(state | self.about()))
            digests = {file.name: file_sha256(file) for file in part.iterdir()}
            (part / "files.json").write_text(json.dumps(digests))
            shutil.rmtree(checkpoint, ignore_errors=True)  # A damaged checkpoint of the same step.
            rename(part, checkpoint)
            previous = [path for path in _checkpoints(self.folder) if path < checkpoint][:1]
            for path in _checkpoints(self.folder):
                if path not in (checkpoint, *previous):
                    shutil.rmtree(path, ignore_errors=True)
            self._failed = False
        except OSError as error:
            shutil.rmtree(part, ignore_errors=True)
            if not self._failed:
                warn(f"{checkpoint}: can't be written ({error}); the checkpoint before it stays")
            self._failed = True
        self._saved, self._saved_step = time.monotonic(), self._step
        self._took = self._saved - began

    def _shapes(self) -> list[list]:
        """Returns path, shape and dtype of all variables, without the suffixes of Keras' counters (`muon_1`)."""
        return [[re.sub(r"_\d+/", "/", v.path), list(v.shape), str(v.dtype)] for v in self._variables()]

    def _prepare(self, checkpoint: pathlib.Path, state: dict[str, Any]) -> None:
        """Reads a checkpoint. Restores it, unless it is from the middle of an epoch: then `on_epoch_begin` does."""
        saved = [*state["variables"], *(callback["class"] for callback in state["callbacks"])]
        current = [*self._shapes(), *(type(callback).__name__ for callback in self.others)]
        for old, new in itertools.zip_longest(saved, current):
            if old != new:
                raise UserError(f"{checkpoint}: holds {old} where this training has {new}; start a new run")
        self._state, arrays = state, []
        if self.cluster.chief:
            with np.load(checkpoint / "arrays.npz") as file:
                arrays = [file[name] for name in file.files]
        count = self.cluster.from_chief(len(arrays))
        self._arrays = [self.cluster.from_chief(arrays[number] if arrays else None) for number in range(count)]
        # Keras lets a callback choose the first epoch only by this attribute; `BackupAndRestore` sets it too.
        self.model._initial_epoch = self.params["epochs"] if state["stopped"] else state["epoch"]
        self._offset, self._step, self._saved_step = state["batch"], state["step"], state["step"]
        if not self._offset:
            self._restore()

    def _restore(self) -> None:
        """Restores variables, metrics and callbacks, after `fit` and other callbacks have initialized them."""
        state, variables = self._state, self._variables()
        # View as the dtype of the variable: NumPy files have no bfloat16.
        for variable, values in zip(variables, self._arrays, strict=False):
            variable.assign(values.view(tf.as_dtype(variable.dtype).as_numpy_dtype))
        # Keras has built the metrics before the first step: see `common/upstream.py`.
        metrics = self.model.metrics_variables if state["metrics"] else []
        for variable, values in zip(metrics, self._arrays[len(variables) :][: state["metrics"]], strict=True):
            local = self._local_values(variable)
            for replica, value in enumerate(local, start=self.cluster.index * len(local)):
                value.assign(values[replica])
        for callback, saved in zip(self.others, state["callbacks"], strict=True):
            vars(callback).update({name: _decoded(value, self._arrays) for name, value in saved["state"].items()})
