"""Multi-worker training: comparison of settings, agreement to stop and to save, failure detection and a common end.

All of it uses the coordination service and the collective operations that `MultiWorkerMirroredStrategy` runs anyway.
"""

import atexit
import contextlib
import importlib.metadata
import json
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from common.cli import EXIT_INTERRUPTED, STOPPING, UserError, endings
from common.records import code_sha256

import numpy as np
import tensorflow as tf
from tensorflow.compiler.xla.tsl.protobuf.coordination_config_pb2 import CoordinatedJob
from tensorflow.python.eager import context

EXIT_WORKER_LOST = 76
_SILENCE = 10  # seconds without a sign of life, after which a worker counts as lost
_LAST_WORDS = 2  # seconds in which all hear of an end; the service ends with the chief
# Why all end. TensorFlow writes this key itself when it gets a SIGTERM while it waits for the other workers.
_END = "TF_DEFAULT_PREEMPTION_NOTICE_KEY"
# The cluster that this process has joined, if any.
joined: list["Cluster"] = []


class Cluster:
    """The workers of a training, one of which is this process. Worker 0, the chief, decides and writes for all.

    A cluster that was not joined is a process that trains alone: each method works, and waits for nobody.
    """

    def __init__(self, workers: tuple[str, ...] = ("this process",), index: int = 0):
        self.workers, self.index, self.chief = workers, index, index == 0
        self.strategy, self._store, self._asked, self._told = None, context.context(), (False, False), None
        self._round, self._all_end, self._left = 0, False, False

    def name(self, index: int) -> str:
        """How a worker is called in messages."""
        return f"worker {index} at {self.workers[index]}"

    def join(self, make_strategy: Callable[[], tf.distribute.Strategy], timeout: float) -> tf.distribute.Strategy:
        """Makes the strategy once all workers are there and run the same code; waits for up to `timeout` seconds.

        Raises:
            UserError: a worker did not come, runs other code, or can't have its port.
        """
        if self.strategy:
            return self.strategy
        deadline, handlers = time.monotonic() + timeout, {number: signal.getsignal(number) for number in STOPPING}
        try:
            self._wait_for_chief(deadline)
            self._store.configure_coordination_service(
                "standalone",
                "/job:worker/replica:0/task:0",
                coordinated_jobs=[CoordinatedJob(name="worker", num_tasks=len(self.workers))],
                cluster_register_timeout_in_ms=int(1000 * max(1, deadline - time.monotonic())),
                heartbeat_timeout_in_ms=1000 * _SILENCE,
            )
            # Otherwise the chief waits for an hour, whatever the limit.
            self._store.coordination_service.cluster_register_with_barrier = True
            # TensorFlow holds the interpreter lock while it waits: no handler runs, and it replaces that of SIGTERM.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            self.strategy = make_strategy()
        except tf.errors.DeadlineExceededError as error:
            absent = sorted({int(each) for each in re.findall(r"/job:worker/replica:0/task:(\d+)$", str(error), re.M)})
            names = ", ".join(map(self.name, absent or [0]))
            raise UserError(f"{names}: did not come within {timeout:.0f} s; start all workers") from error
        except (RuntimeError, tf.errors.OpError) as error:  # Such as a port in use, or an index given twice.
            raise UserError(f"{self.name(self.index)}: TensorFlow can't join the cluster ({error})") from error
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        # What this worker asks for, and what all have agreed on: see common/upstream.py.
        self.strategy.flags = self._flags = tf.Variable([0.0, 0.0]), tf.Variable([0.0, 0.0])
        if self.chief:
            self._set("chief", True)
        joined.append(self)
        endings.append(self.leave)
        atexit.register(self.leave)
        sys.excepthook = self._report_exception
        threading.Thread(target=self._watch, daemon=True).start()
        versions = {name: importlib.metadata.version(name) for name in ("tensorflow", "keras")}
        self.compare({"workers": list(self.workers), **versions, "code": code_sha256()})
        return self.strategy

    def _wait_for_chief(self, deadline: float) -> None:
        """Waits for the chief's port: here, signals are answered, and a name may resolve late."""
        host, port = self.workers[0].rsplit(":", 1)
        while not self.chief:
            with contextlib.suppress(OSError):
                return socket.create_connection((host, int(port)), timeout=2).close()
            if time.monotonic() > deadline:
                raise tf.errors.DeadlineExceededError(None, None, "")
            time.sleep(0.2)

    def ask(self, stop: bool, save: bool) -> None:
        """Asks all workers to stop, and to save a checkpoint, after an execution of `fit` or `evaluate`."""
        if self._asked != (stop, save):
            self._asked = stop, save
            if self.strategy:
                self._flags[0].assign([stop, save])

    def agreed(self) -> tuple[bool, bool]:
        """Whether to stop and whether to save, the same on all workers after each execution.

        A process alone does what it was asked. Several workers find after an execution what any of them had asked for
        before it: the flags are reduced together with the logs.
        """
        stop, save = (self._flags[1].numpy() > 0).tolist() if self.strategy else self._asked
        self._all_end |= stop
        if save:  # It is asked for once.
            self.ask(self._asked[0], False)
        return stop, save

    def agree_to_stop(self, stop: bool) -> bool:
        """Whether any worker asks to stop. All must call it."""
        self._all_end |= self.from_chief(any(self.gather(stop)))
        return self._all_end

    def _set(self, key: str, value: Any) -> None:
        text = json.dumps(value, default=lambda part: part.tolist() if isinstance(part, np.ndarray) else str(part))
        with contextlib.suppress(tf.errors.OpError):  # Another worker was first, or the chief is gone: see `_watch`.
            self._store.set_config_key_value(key, text)

    def _get(self, key: str) -> Any:
        while True:  # Signals are answered in between.
            with contextlib.suppress(tf.errors.DeadlineExceededError):
                return json.loads(self._store.get_config_key_value(key, 200))

    def gather(self, value: Any) -> list[Any]:
        """The values of all workers, as JSON holds them, on the chief; elsewhere an empty list. All must call it."""
        self._round += 1
        if self.chief:
            return [value, *(self._get(f"{self._round}/{index}") for index in range(1, len(self.workers)))]
        self._set(f"{self._round}/{self.index}", value)
        return []

    def from_chief(self, value: Any = None) -> Any:
        """The chief's value on all workers: an array, or what JSON can hold. All must call it."""
        if not self.strategy:
            return value
        self._round += 1
        if self.chief:
            array = isinstance(value, np.ndarray)
            self._set(f"{self._round}", {"array": [value.shape, str(value.dtype)]} if array else {"value": value})
        message = self._get(f"{self._round}")
        if "value" in message:
            return message["value"]
        array = value if self.chief else np.zeros(*message["array"])
        content = array.tobytes() + bytes(4 - array.nbytes % 4)  # As float32, whatever it holds.
        with self.strategy.scope():  # Which broadcasts initial values.
            content = tf.Variable(np.frombuffer(content, np.float32), trainable=False).numpy().tobytes()
        return np.frombuffer(content[: array.nbytes], array.dtype).reshape(array.shape).copy()

    def compare(self, values: dict[str, Any]) -> None:
        """Raises a `UserError` on all workers if one has other values than the chief. All must call it."""
        problems = [
            f"{self.name(index)}: {key} is {theirs.get(key)!r}, but {values[key]!r} on worker 0"
            for index, theirs in enumerate(self.gather(values))
            for key in values
            if theirs.get(key) != values[key]
        ]
        if problem := self.from_chief(problems[:1]):
            self._all_end = True
            raise UserError(f"{problem[0]}; start all workers with the same command, code and data")

    def _watch(self) -> None:
        """Ends this process when all are told to end or a worker is lost, whatever the main thread waits for."""
        launcher = os.environ.get("LAUNCHER_PID", str(os.getppid()))
        while not (end := self._news()):
            if launcher != str(os.getppid()):  # It was killed.
                os.kill(os.getpid(), signal.SIGTERM)
        if not self._left and end != self._told:
            if self.chief:
                time.sleep(_LAST_WORDS)
            os.write(2, (" ".join(end[1].split()) + "\n").encode())
            os._exit(end[0])

    def _news(self) -> tuple[int, str] | None:
        """The exit code and the line to end with, if any; after a second."""
        lost = 0
        try:
            with contextlib.suppress(tf.errors.DeadlineExceededError):
                said = self._store.get_config_key_value(_END, 1000)
                interrupted = EXIT_INTERRUPTED, "interrupted: a worker was asked to stop"
                return tuple(json.loads(said)) if said.startswith("[") else interrupted
            self._store.get_config_key_value("chief", 1000 * _SILENCE)  # A chief that was stopped does not answer.
            states = self._store.get_task_states([("worker", len(self.workers))])
            lost = next((index for index, error in enumerate(states) if error), None)
        except tf.errors.OpError:  # Without a chief, there is no service.
            pass
        line = "" if lost is None else f"error: {self.name(lost)} is lost; continue by the same commands with --resume"
        return (EXIT_WORKER_LOST, line) if line else None

    def leave(self, code: int = 0, line: str = "") -> None:
        """Ends the cluster: together with all, or telling the others to end by the same code and line.

        All must call it after a code of 0, a stop that was agreed and a comparison that failed.
        """
        if not self.strategy or self._left:
            return
        if code == 0 or self._all_end:
            self.gather(True)
            self.from_chief(True)
            self._left = not self.chief  # The chief waits until the others need it no longer.
            self.gather(True)
        else:
            self._told = code, line
            self._set(_END, self._told)
            time.sleep(_LAST_WORDS if self.chief else 0)
        self._left = True

    def _report_exception(self, kind: type[BaseException], error: BaseException, trace: Any) -> None:
        if issubclass(kind, tf.errors.OpError):  # Most likely a worker is lost: `_watch` finds out which.
            time.sleep(_SILENCE + 5)
        sys.__excepthook__(kind, error, trace)
        self._all_end = False
        self.leave(EXIT_WORKER_LOST, f"error: {self.name(self.index)} ended by the exception that it shows")
        os._exit(1)
