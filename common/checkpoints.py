"""Exact resume: checkpoints that hold all that the next step depends on, written whole or not at all."""

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
from common.records import file_sha256, read_json, rename

import keras
import numpy as np
import tensorflow as tf

_SHARE = 0.01  # of the time, which checkpoints may take
_GUESS = 0.05  # seconds that a checkpoint takes, until there was one
_STATE = ("epoch", "batch", "step", "stopped", "variables", "metrics", "callbacks")
# The value of `model.stop_training` that ends an epoch, but not the training.
EPOCH_OVER = "the epoch is over"


def _checkpoints(folder: pathlib.Path) -> list[pathlib.Path]:
    """The checkpoints in a folder, the newest first."""
    return sorted((path for path in folder.glob("epoch-??????-batch-?????????") if path.is_dir()), reverse=True)


def newest_checkpoint(folder: pathlib.Path) -> tuple[pathlib.Path, dict[str, Any]] | None:
    """The newest undamaged checkpoint in `folder`, and its state; None without any. Warns of those that are damaged."""
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
    """A value as JSON, in which arrays are numbers of those appended to `arrays`; a TypeError if it can't be kept."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "biufcSU":
        arrays.append(np.asarray(value))
        return {"array" if isinstance(value, np.ndarray) else "scalar": len(arrays) - 1}
    if type(value) is dict:
        return {"dict": [[_encoded(part, arrays) for part in pair] for pair in value.items()]}
    if type(value) in (list, tuple, set, frozenset):
        return {type(value).__name__: [_encoded(part, arrays) for part in value]}
    raise TypeError(type(value).__name__)


def _decoded(content: Any, arrays: list[np.ndarray]) -> Any:
    """The value that was given to `_encoded`."""
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
    """Saves and restores a training, and stops it when asked to; the last in the list of callbacks.

    It stops on a loss that is not finite, and on SIGTERM and SIGINT: when the running execution is done and saved. A
    validation that takes longer than a second is left; then the steps since the last checkpoint are repeated.

    A checkpoint is a folder `epoch-E-batch-B`: all variables of model and optimizer, the seeds of dropout among them,
    the metrics of the epoch so far, the state of other callbacks, and the number of the step. It is written at the end,
    and before as often as takes a hundredth of the time. The last two are kept. Keras' own `BackupAndRestore` keeps
    neither seeds nor metrics nor callbacks.

    A training that is resumed within an epoch runs its remaining steps only: other callbacks see its batches numbered
    from 0 again, and the progress bar counts the remaining ones.

    Args:
        folder: where the checkpoints are.
        every: steps from one checkpoint to the next; 0: as often as takes a hundredth of the time.
        others: the callbacks whose state is kept: the attributes that neither begin with _ nor are named like a
            parameter of the constructor, if they are numbers, texts or arrays, also in lists, tuples, sets and
            dictionaries. A warning names others.
        about: returns what else to store with each checkpoint.
        resumed: the checkpoint to resume from and its state, by `newest_checkpoint`.
        cluster: the workers of the training, of which only the chief writes.
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
        self.cluster, self.progress_bar = cluster, keras.callbacks.ProgbarLogger()
        self._signal, self._handlers, self._step, self._saved_step, self._due = math.inf, {}, 0, 0, False
        self._failed, self._unkept, self._last_loss = False, set(), "none before it was finite"
        self._offset = 0  # Of a resumed epoch, the batches before its first one.

    def on_train_begin(self, logs=None):
        if self.resumed:
            self._prepare(*self.resumed)
        self._saved, self._took = time.monotonic(), _GUESS
        if threading.current_thread() is threading.main_thread():  # Only there, Python allows it.
            for number in STOPPING:
                self._handlers[number] = signal.signal(number, self._remember)

    def _remember(self, number: int, frame: Any) -> None:
        self._signal, before = time.monotonic(), self._handlers[number]
        # The first execution traces the graph, which can take long, and there is nothing to save yet.
        if self._step == self._saved_step and callable(before) and len(self.cluster.workers) == 1:
            self._clean_up()
            before(number, frame)
        elif number == signal.SIGINT:  # The second one ends the program at once; in a notebook, the cell.
            signal.signal(number, before if before is signal.default_int_handler else signal.SIG_DFL)

    def on_epoch_begin(self, epoch, logs=None):
        self._epoch = epoch
        self.progress_bar.target = self.params["steps"] - self._offset
        if self._offset:
            self._restore()

    def on_train_batch_end(self, batch, logs=None):
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
        self._due |= save  # Else it is lost at the end of an epoch.
        if (stop or save) and done < steps and not self.model.stop_training:
            self._save(self._metrics())
            self._stop_if(stop)

    def on_test_batch_end(self, batch, logs=None):
        stop, leave = self._agreed(time.monotonic() - self._signal >= 1)  # By the flag that saves in training.
        self._stop_if(stop and leave)

    def on_epoch_end(self, epoch, logs=None):
        self._offset = 0
        stop, _ = self._agreed()
        ended = epoch + 1 == self.params["epochs"] or self.model.stop_training or stop
        if ended or self._due:
            self._save([])
        self._stop_if(stop)

    def on_train_end(self, logs=None):
        self._clean_up()
        # The last epoch is saved, but the signal came later.
        self._stop_if(self.cluster.agree_to_stop(self._signal < math.inf))

    def _clean_up(self) -> None:
        self.model._initial_epoch = None  # Else the next `fit` of this model would begin there.
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

    def _parts(self, variable: keras.Variable) -> Sequence[tf.Variable]:
        """A metric's variable on each replica of this worker: their sum is its value."""
        return self.model.distribute_strategy.experimental_local_results(variable.value)

    def _metrics(self) -> list[np.ndarray]:
        """Of each variable of the metrics its parts on all replicas, [replicas, ...]; on the chief only."""
        parts = [np.stack([part.numpy() for part in self._parts(each)]) for each in self.model.metrics_variables]
        workers = zip(*self.cluster.gather(parts), strict=True)
        return [np.concatenate(each, dtype=each[0].dtype, casting="unsafe") for each in workers]

    def _states(self, arrays: list[np.ndarray]) -> list[dict[str, Any]]:
        """Class and state of each of the other callbacks, as JSON; its arrays are appended to `arrays`."""
        states = []
        for callback in self.others:
            states.append({"class": type(callback).__name__, "state": {}})
            # `EarlyStopping` negates the `min_delta` that it was given in each process.
            given = {"params", *inspect.signature(type(callback).__init__).parameters}
            for name, value in vars(callback).items():
                if name.startswith("_") or name in given or callable(value):
                    continue
                try:
                    states[-1]["state"][name] = _encoded(value, arrays)
                except TypeError as error:
                    place = f"{type(callback).__name__}.{name}"
                    if place not in self._unkept:
                        warn(f"{place}: holds a {error}, which no checkpoint keeps; --resume starts without it")
                    self._unkept.add(place)
        return states

    def _save(self, metrics: list[np.ndarray]) -> None:
        """Writes a checkpoint. Warns if it can't be written; then the one before stays."""
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
            shutil.rmtree(checkpoint, ignore_errors=True)  # A damaged one that was reached again.
            rename(part, checkpoint)
            before = [path for path in _checkpoints(self.folder) if path < checkpoint][:1]
            for path in _checkpoints(self.folder):
                if path not in (checkpoint, *before):
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
        """Path, shape and type of each variable, without the numbers that Keras counts in a process, as in `muon_1`."""
        return [[re.sub(r"_\d+/", "/", each.path), list(each.shape), str(each.dtype)] for each in self._variables()]

    def _prepare(self, checkpoint: pathlib.Path, state: dict[str, Any]) -> None:
        """Reads a checkpoint, and restores it unless it is one within an epoch: see `on_epoch_begin`."""
        was = [*state["variables"], *(each["class"] for each in state["callbacks"])]
        now = [*self._shapes(), *(type(callback).__name__ for callback in self.others)]
        for there, here in itertools.zip_longest(was, now):
            if there != here:
                raise UserError(f"{checkpoint}: holds {there} where this training has {here}; start a new run")
        arrays = []
        if self.cluster.chief:
            with np.load(checkpoint / "arrays.npz") as file:
                arrays = [file[name] for name in file.files]
        count = self.cluster.from_chief(len(arrays))
        self._arrays = [self.cluster.from_chief(arrays[number] if arrays else None) for number in range(count)]
        # Keras' own way to let a callback choose the first epoch; `BackupAndRestore` has no other.
        self.model._initial_epoch = self.params["epochs"] if state["stopped"] else state["epoch"]
        self._offset, self._step, self._saved_step = state["batch"], state["step"], state["step"]
        if not self._offset:
            self._restore()

    def _restore(self) -> None:
        """Restores variables, metrics and callbacks: after what `fit` and other callbacks do before the first batch."""
        state, variables = self.resumed[1], self._variables()
        # As the variables' types: NumPy's files do not know bfloat16.
        for variable, values in zip(variables, self._arrays, strict=False):
            variable.assign(values.view(tf.as_dtype(variable.dtype).as_numpy_dtype))
        # Keras has built the metrics before the first step, see `common/upstream.py`.
        metrics = self.model.metrics_variables if state["metrics"] else []
        for variable, values in zip(metrics, self._arrays[len(variables) :][: state["metrics"]], strict=True):
            parts = self._parts(variable)
            for replica, part in enumerate(parts, start=self.cluster.index * len(parts)):
                part.assign(values[replica])
        for callback, kept in zip(self.others, state["callbacks"], strict=True):
            vars(callback).update({name: _decoded(value, self._arrays) for name, value in kept["state"].items()})
