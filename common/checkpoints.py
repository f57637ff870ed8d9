"""Exact resume: all that the next step depends on, written whole or not at all, and checked when it is read."""

import contextlib
import inspect
import json
import math
import os
import pathlib
import re
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from common.cli import STOPPING, TrainingFailedError, UserError, warn
from common.multiworker import Cluster
from common.records import file_sha256, read_sealed, sealed, write_file

import keras
import numpy as np
import tensorflow as tf


def _checkpoints(folder: pathlib.Path) -> list[pathlib.Path]:
    """The checkpoints in a folder, the newest first; whatever else there is does not count."""
    found = [each for each in folder.glob("epoch-*") if re.fullmatch(r"epoch-\d{6}-batch-\d{9}", each.name)]
    return sorted((each for each in found if each.is_dir()), reverse=True)


def newest_checkpoint(folder: pathlib.Path) -> tuple[pathlib.Path, dict[str, Any]] | None:
    """The newest checkpoint in `folder` whose files are those that were written, and its state; None without any."""
    for checkpoint in _checkpoints(folder):
        try:
            state = read_sealed(checkpoint / "state.json")
            for name, digest in state["files"].items():
                if not (checkpoint / name).is_file() or file_sha256(checkpoint / name) != digest:
                    raise UserError(f"{checkpoint / name}: damaged")
            return checkpoint, state
        except UserError as error:
            warn(f"{str(error).split(';')[0]}; going on from the one before it, or from the beginning")
        except OSError as error:
            warn(f"{checkpoint}: {error.strerror}; going on from the one before it, or from the beginning")
    return None


def _key(kind: str, number: int) -> str:
    """The name of a tensor in a checkpoint, as `tf.train.Checkpoint` gives it to lists of variables."""
    return f"{kind}/{number}/.ATTRIBUTES/VARIABLE_VALUE"


def _tensors(checkpoint: pathlib.Path) -> dict[str, np.ndarray]:
    with tempfile.TemporaryDirectory() as folder:
        # TensorFlow would take a [ in a path for a pattern.
        link = pathlib.Path(folder, "checkpoint")
        link.symlink_to(checkpoint.resolve())
        reader = tf.train.load_checkpoint(str(link / "variables"))
        names = [name for name in reader.get_variable_to_shape_map() if name.endswith("VARIABLE_VALUE")]
        return {name: np.asarray(reader.get_tensor(name)) for name in names}


def _unnumbered(variable: list) -> list:
    """Path, shape and type of a variable, less what Keras counts in a process: `muon_1` is its second optimizer."""
    return [re.sub(r"_\d+/", "/", variable[0]), *variable[1:]]


# How much of the time checkpoints at the ends of epochs may take: where epochs are over in no time, not each has one.
_SHARE = 0.01
_GUESS = 0.05  # seconds that a checkpoint takes, until there was one


class Checkpoints(keras.callbacks.Callback):
    """Saves and restores a training, and ends it in time; the last in the list of callbacks.

    It ends on SIGTERM and SIGINT, when the running execution is done and saved, and on a loss that is not finite.

    A checkpoint is a folder `epoch-E-batch-B`: all variables of model and optimizer (the seeds of dropout are among
    them), the metrics of the epoch so far, the state of other callbacks, and the number of the step. It is written
    as `part` and renamed; after an epoch, unless the last one is too short a time ago and none is due. The last two
    stay, and the one with the lowest validation loss (without validation: loss). Keras' own `BackupAndRestore` keeps
    neither seeds nor metrics nor callbacks.

    Args:
        folder: where the checkpoints are.
        every: save within an epoch too: so many steps, as "500", or minutes, as "10min"; "" for neither.
        others: the callbacks whose state belongs to the training: their public numbers, texts and arrays, but
            for what their constructors were given.
        about: gives what else is to be stored with each checkpoint.
        resumed: the checkpoint to go on from and its state, by `newest_checkpoint`.
        cluster: the workers of the training, of which only the chief writes.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        every: str,
        others: Sequence[keras.callbacks.Callback],
        about: Callable[[], dict[str, Any]],
        resumed: tuple[pathlib.Path, dict[str, Any]] | None,
        cluster: Cluster,
    ):
        super().__init__()
        self.folder, self.every, self.others, self.about, self.resumed = folder, every, others, about, resumed
        self.cluster = cluster
        self._signal, self._passed_over, self._last_step, self._due, self._handlers = 0, 0, 0, False, {}
        self._failed, self._best, self._last_loss = False, None, "none before it was finite"

    def on_train_begin(self, logs=None):
        if self.resumed:
            self._restore(*self.resumed)
        self._saved, self._took = time.monotonic(), _GUESS
        if threading.current_thread() is threading.main_thread():  # Only there, Python allows it.
            for number in STOPPING:
                self._handlers[number] = signal.signal(number, self._remember)

    def _remember(self, number: int, frame: Any) -> None:
        self._signal = number
        if number == signal.SIGINT:  # The second one ends the program at once; in a notebook, the cell.
            default = self._handlers[number] is signal.default_int_handler
            signal.signal(number, signal.default_int_handler if default else signal.SIG_DFL)

    def on_epoch_begin(self, epoch, logs=None):
        self._epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        done, steps = batch + 1, self.params["steps"]
        if done <= self._passed_over:
            if done == self._passed_over:
                for callback, own in self._deaf:
                    del callback.on_train_batch_begin, callback.on_train_batch_end
                    vars(callback).update(own)
            return
        step = self._epoch * steps + done
        if not math.isfinite(logs["loss"]):
            self._fail(f"the loss is {logs['loss']} at step {step} ({self._last_loss})")
        self._last_loss = f"the last finite one was {logs['loss']:.6g}"
        due = False
        if self.every.endswith("min"):
            due = time.monotonic() - self._saved >= 60 * int(self.every.removesuffix("min"))
        elif self.every:
            due = step // int(self.every) > self._last_step // int(self.every)
        self._last_step = step
        self._due = due and done == steps  # Then it is time once the epoch is over.
        due, cluster = (self._asked_to_stop() or due) and done < steps, self.cluster
        if due and cluster.chief and step != cluster.save_at and not self.model.stop_training:
            cluster.agree_to_save(step)
        if step == cluster.save_at:
            self._save(self._epoch, done, self._metrics())
            self._stop_if_asked()

    def on_test_begin(self, logs=None):
        self._before_validation = self._metrics()

    def on_test_batch_end(self, batch, logs=None):
        if self._asked_to_stop() and not self.model.stop_training:  # Else the epoch comes to its end first.
            self._save(self._epoch, self.params["steps"], self._before_validation)
            self._stop_if_asked()

    def on_epoch_end(self, epoch, logs=None):
        self._passed_over = 0
        ended = epoch + 1 == self.params["epochs"] or self.model.stop_training or self._asked_to_stop()
        if ended or self._due or time.monotonic() - self._saved >= self._took / _SHARE:
            self._save(epoch + 1, 0, [], logs.get("val_loss", logs["loss"]))
        self._stop_if_asked()

    def on_train_end(self, logs=None):
        self.model._initial_epoch = None
        self._give_signals_back()
        self._stop_if_asked()  # The last epoch is saved, but the signal came later.

    def _give_signals_back(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _asked_to_stop(self) -> bool:
        if self._signal and not self.cluster.chief:
            self.cluster.ask_to_stop()
        return bool(self._signal or self.cluster.stop_asked)

    def _stop_if_asked(self) -> None:
        if self._asked_to_stop() and self.cluster.chief:  # With it, all workers end.
            self._give_signals_back()
            raise KeyboardInterrupt(f"saved in {self.folder}; the same command with --resume goes on")

    def _fail(self, problem: str) -> NoReturn:
        self._give_signals_back()
        raise TrainingFailedError(f"{problem}; try a smaller --learning-rate, and inputs of a sensible scale")

    def _variables(self) -> list:
        return [*self.model.variables, *self.model.optimizer.variables]

    def _parts(self, variable: keras.Variable) -> Sequence[tf.Variable]:
        """A metric's variable on each replica of this worker: their sum is its value."""
        return self.model.distribute_strategy.experimental_local_results(variable.value)

    def _metrics(self) -> list[np.ndarray]:
        """Of each variable of the metrics its parts on all replicas, [replicas, ...]; on the chief only."""

        def read(part: tf.Variable) -> np.ndarray:  # `np.asarray(part)` takes more than twice as long.
            return tf.raw_ops.ReadVariableOp(resource=part.handle, dtype=part.dtype).numpy()

        parts = [np.stack(list(map(read, self._parts(each)))) for each in self.model.metrics_variables]
        return [np.concatenate(workers) for workers in zip(*self.cluster.gather(parts), strict=True)]

    def _save(self, epoch: int, batch: int, metrics: list[np.ndarray], value: float | None = None) -> None:
        """Writes a checkpoint; one that can't be written is warned of, and the one before stays."""
        if not self.cluster.chief:
            return
        began, variables, step = time.monotonic(), self._variables(), epoch * self.params["steps"] + batch
        tensors = {_key("variables", number): tf.convert_to_tensor(each) for number, each in enumerate(variables)}
        for variable, tensor in zip(variables, tensors.values(), strict=True):
            if tensor.dtype.is_floating and not np.isfinite(tensor.numpy()).all():
                self._fail(f"{variable.path} is not finite after step {step}")
        arrays, callbacks = list(metrics), []
        for callback in self.others:
            callbacks.append({"class": type(callback).__name__, "plain": {}, "arrays": {}})
            # `EarlyStopping` turns the sign of its `min_delta` in each process: what was given is no state.
            given = {"params", *inspect.signature(type(callback).__init__).parameters}
            for name, content in vars(callback).items():
                if name.startswith("_") or name in given:
                    continue
                content = content.item() if isinstance(content, np.generic) else content
                if isinstance(content, list) and content and all(isinstance(each, np.ndarray) for each in content):
                    callbacks[-1]["arrays"][name] = list(range(len(arrays), len(arrays) + len(content)))
                    arrays += content
                else:
                    with contextlib.suppress(TypeError, ValueError):  # What JSON can't hold is no state: a function.
                        json.dumps(content)
                        callbacks[-1]["plain"][name] = content
        part, checkpoint = self.folder / "part", self.folder / f"epoch-{epoch:06}-batch-{batch:09}"
        best = self._best
        if value is not None and (best is None or value <= best[0]):
            best = [value, checkpoint.name]
        try:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            tensors |= {_key("arrays", number): tf.constant(each) for number, each in enumerate(arrays)}
            # As `tf.train.Checkpoint` does, which builds and traces a graph before.
            tf.raw_ops.SaveV2(
                prefix=str(part / "variables"),
                tensor_names=list(tensors),
                shape_and_slices=[""] * len(tensors),
                tensors=list(tensors.values()),
            )
            state = {
                "epoch": epoch,
                "batch": batch,
                "step": step,
                "stopped": self.model.stop_training,
                "best": best,
                "variables": self._shapes(),
                "metrics": len(metrics),
                "callbacks": callbacks,
                "files": {file.name: file_sha256(file) for file in sorted(part.iterdir())},
                **self.about(),
            }
            write_file(part / "state.json", sealed(state))
            shutil.rmtree(checkpoint, ignore_errors=True)  # A damaged one that was reached again.
            os.rename(part, checkpoint)
            self._best = best
            self._delete_old(checkpoint)
            self._failed = False
        except (OSError, tf.errors.OpError) as error:
            shutil.rmtree(part, ignore_errors=True)
            if not self._failed:
                warn(f"{checkpoint}: can't be written ({error}); the checkpoint before it stays")
            self._failed = True
        self._saved = time.monotonic()
        self._took = self._saved - began

    def _shapes(self) -> list[list]:
        return [[each.path, list(each.shape), str(each.dtype)] for each in self._variables()]

    def _delete_old(self, newest: pathlib.Path) -> None:
        others = [each for each in _checkpoints(self.folder) if each != newest]
        before = [each for each in others if each.name < newest.name]
        kept = {*before[:1], self.folder / (self._best[1] if self._best else newest.name)}
        for each in others:
            if each not in kept:
                shutil.rmtree(each, ignore_errors=True)

    def _restore(self, checkpoint: pathlib.Path, state: dict[str, Any]) -> None:
        for there, here in zip(state["variables"], self._shapes(), strict=False):
            if _unnumbered(there) != _unnumbered(here):
                raise UserError(f"{checkpoint}: holds {there} where this model has {here}; start a new run")
        names = [type(callback).__name__ for callback in self.others]
        if len(state["variables"]) != len(self._shapes()) or [each["class"] for each in state["callbacks"]] != names:
            raise UserError(f"{checkpoint}: of another model or with other callbacks; start a new run")
        tensors = self.cluster.from_chief(_tensors(checkpoint) if self.cluster.chief else None)

        def stored(kind: str, number: int) -> np.ndarray:
            return tensors[_key(kind, number)]

        for number, variable in enumerate(self._variables()):
            variable.assign(stored("variables", number))
        for callback, kept in zip(self.others, state["callbacks"], strict=True):
            vars(callback).update(kept["plain"])
            for name, numbers in kept["arrays"].items():
                setattr(callback, name, [stored("arrays", number) for number in numbers])
        # Keras' own way to let a callback choose the first epoch; `BackupAndRestore` has no other.
        self.model._initial_epoch = self.params["epochs"] if state["stopped"] else state["epoch"]
        self._last_step, self._best = state["step"], state["best"]
        if state["batch"]:
            self._pass_over(state["batch"], [stored("arrays", number) for number in range(state["metrics"])])

    def _pass_over(self, batches: int, metrics: list[np.ndarray]) -> None:
        """Lets the epoch go on behind its first batches: Keras counts them, but nothing is computed."""
        self._passed_over, compute, left = batches, self.model.train_function, [batches]

        def go_on(iterator: Any) -> Any:
            if left[0] == batches:
                # `fit` has just reset the metrics; those of `compile` may not even be built.
                self.model._symbolic_build(data_batch=iterator.element_spec)
                for variable, content in zip(self.model.metrics_variables, metrics, strict=True):
                    parts = self._parts(variable)
                    for replica, part in enumerate(parts, start=self.cluster.index * len(parts)):
                        part.assign(content[replica])
            if left[0] > 0:
                left[0] -= self.model.steps_per_execution
                return self.model.get_metrics_result()
            self.model.train_function = compute
            return compute(iterator)

        self.model.train_function = go_on
        # The other callbacks have seen these batches.
        hooks = ("on_train_batch_begin", "on_train_batch_end")
        self._deaf = [
            (callback, {name: vars(callback)[name] for name in hooks if name in vars(callback)})
            for callback in self.others
        ]
        for callback in self.others:
            vars(callback).update(dict.fromkeys(hooks, lambda batch, logs=None: None))
