"""Multi-worker training, on the coordination service and the collectives of `MultiWorkerMirroredStrategy`."""

import atexit
import contextlib
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

from common.cli import EXIT_INTERRUPTED, UserError, exit_hooks

import numpy as np
import tensorflow as tf
from tensorflow.python.eager import context

EXIT_WORKER_LOST = 76
SILENCE = 10  # seconds without a sign of life, after which a worker counts as lost
# Why all end. TensorFlow writes this key itself when it gets a SIGTERM while it waits for the other workers.
_END = "TF_DEFAULT_PREEMPTION_NOTICE_KEY"
# The cluster that this process has joined; empty if none.
current_cluster: list["Cluster"] = []


class Cluster:
    """The workers of a training, one of which is this process. Worker 0, the chief, decides and writes for all.

    A cluster that was not joined is a process that trains alone: each method works, and waits for nobody.
    """

    def __init__(self, workers: tuple[str, ...] = ("this process",), index: int = 0):
        self.workers, self.index, self.chief, self.strategy = workers, index, index == 0, None
        self._store, self._round, self._asked = context.context(), 0, (False, False)
        # Whether all workers end by themselves, whether this one has, and what it has told the others.
        self._all_end, self._left, self._told = False, False, None

    def name(self, index: int) -> str:
        """How a worker is called in messages."""
        return f"worker {index} at {self.workers[index]}"

    def join(self, strategy: tf.distribute.MultiWorkerMirroredStrategy) -> None:
        """Begins the training as a worker of `strategy`, for which all workers have come together."""
        # What this worker asks for, and what all have agreed on: see common/upstream.py.
        self.strategy, strategy.flags = strategy, (tf.Variable([0.0, 0.0]), tf.Variable([0.0, 0.0]))
        self._set("here", True)
        current_cluster.append(self)
        exit_hooks.append(self.leave)
        atexit.register(self.leave)
        sys.excepthook = self._report_exception
        threading.Thread(target=self._watch, daemon=True).start()

    def ask(self, stop: bool, save: bool) -> None:
        """Asks all workers to stop, and to save a checkpoint, after an execution of `fit` or `evaluate`."""
        if self._asked != (stop, save):
            self._asked = stop, save
            if self.strategy:
                self.strategy.flags[0].assign([stop, save])

    def agreed(self) -> tuple[bool, bool]:
        """Whether to stop and to save: what any worker had asked for before the last execution, the same on all."""
        stop, save = (self.strategy.flags[1].numpy() > 0).tolist() if self.strategy else self._asked
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
            array = [value.shape, str(value.dtype)] if isinstance(value, np.ndarray) else None
            self._set(f"{self._round}", (array, None if array else value))
        array, message = self._get(f"{self._round}")
        if not array:
            return value if self.chief else message
        array = value if self.chief else np.zeros(*array)
        content = np.frombuffer(array.tobytes() + bytes(4 - array.nbytes % 4), np.float32)  # Whatever it holds.
        with self.strategy.scope():  # Which broadcasts initial values.
            content = tf.Variable(content, trainable=False).numpy().tobytes()
        return np.frombuffer(content[: array.nbytes], array.dtype).reshape(array.shape).copy()

    def compare(self, values: dict[str, Any]) -> None:
        """Raises a `UserError` on all workers if one has other values than the chief. All must call it."""
        problems = []
        for index, theirs in enumerate(self.gather(values)):
            for key in [key for key in values if theirs.get(key) != values[key]]:
                problems.append(f"{self.name(index)}: {key} is {theirs.get(key)!r}, but {values[key]!r} on worker 0")
        if problem := self.from_chief(problems[:1]):
            self._all_end = True
            raise UserError(f"{problem[0]}; start all workers with the same command, code and data")

    def _watch(self) -> None:
        """Ends this process when all are told to end or a worker is lost, whatever the main thread waits for."""
        while not (end := self._news()):
            if os.environ.get("LAUNCHER_PID", str(os.getppid())) != str(os.getppid()):  # The launcher was killed.
                os.kill(os.getpid(), signal.SIGTERM)
        if not self._left and end != self._told:
            time.sleep(2 if self.chief else 0)  # The service ends with the chief: all must have heard.
            os.write(2, (" ".join(end[1].split()) + "\n").encode())
            os._exit(end[0])

    def _news(self) -> tuple[int, str] | None:
        """The exit code and the line to end with, if any; after a second."""
        lost = 0
        try:
            with contextlib.suppress(tf.errors.DeadlineExceededError):
                end = self._store.get_config_key_value(_END, 1000)
                return tuple(json.loads(end)) if end.startswith("[") else (EXIT_INTERRUPTED, "interrupted: by SIGTERM")
            self._store.get_config_key_value("here", 1000 * SILENCE)  # A chief that was stopped does not answer.
            states = self._store.get_task_states([("worker", len(self.workers))])
            lost = next((index for index, error in enumerate(states) if error), None)
        except tf.errors.OpError:  # Without a chief, there is no service.
            pass
        line = f"error: {self.name(lost or 0)} is lost; continue by the same commands with --resume"
        return None if lost is None else (EXIT_WORKER_LOST, line)

    def leave(self, code: int = 0, line: str = "") -> None:
        """Ends together with all after a training, an agreed stop or a failed comparison; else tells them to end."""
        if not self.strategy or self._left:
            return
        if (code == 0 and not line) or self._all_end:
            self.gather(True)
            self.from_chief(True)
            self._left = not self.chief  # The chief waits until the others need it no longer.
            self.gather(True)
        else:
            self._told = code, line
            self._set(_END, self._told)
            time.sleep(2 if self.chief else 0)
        self._left = True

    def _report_exception(self, kind: type[BaseException], error: BaseException, trace: Any) -> None:
        if issubclass(kind, tf.errors.OpError):  # Most likely a worker is lost: `_watch` finds out which.
            time.sleep(SILENCE + 5)
        sys.__excepthook__(kind, error, trace)
        self._all_end = False
        self.leave(EXIT_WORKER_LOST, f"error: {self.name(self.index)} ended by the exception that it shows")
        os._exit(1)


def described_cluster(environment: Mapping[str, str]) -> tuple[tuple[str, ...], int]:
    """The addresses of all workers as "host:port", the chief's first, and the index of this process among them.

    They are in `TF_CONFIG`, as Kubernetes sets it, or in the variables of a Slurm step with several tasks. Without
    either, there are none. A `UserError` says what is malformed.
    """
    source, remedy = "TF_CONFIG", 'give {"cluster": {"worker": ["host:port"]}, "task": {"type": "worker", "index": 0}}'
    try:
        if environment.get("TF_CONFIG", "").strip():
            addresses, index = _from_tf_config(environment["TF_CONFIG"])
        elif environment.get("SLURM_STEP_NUM_TASKS", "1") != "1":
            source, remedy = "Slurm", "start with srun, or give --strategy none"
            addresses, index = _from_slurm(environment)
        else:
            return (), 0
        for address in addresses:
            if not re.fullmatch(r"[A-Za-z0-9._-]+:[1-9][0-9]{0,4}", str(address)) or addresses.count(address) > 1:
                raise ValueError(f"{address!r} is no host:port, or given twice")
        return tuple(addresses), index
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        problem = " ".join(str(error).split())
        raise UserError(f"{source}: can't be used ({type(error).__name__}: {problem}); {remedy}") from error


def _from_tf_config(text: str) -> tuple[list[str], int]:
    jobs, task = map(json.loads(text).__getitem__, ("cluster", "task"))
    if "ps" in jobs or task["type"] in ("ps", "evaluator"):
        raise UserError("TF_CONFIG: names parameter servers or an evaluator; Keras 3 trains with workers alone")
    workers = {(job, index): each for job in ("chief", "worker") for index, each in enumerate(jobs.get(job, []))}
    return list(workers.values()), list(workers).index((task["type"], int(task["index"])))


def _from_slurm(environment: Mapping[str, str]) -> tuple[list[str], int]:
    # Two jobs on one node take different ports. Slurm itself assigns the GPUs.
    first_port = 20_000 + int(environment.get("SLURM_JOB_ID", "0")) % 10_000
    resolver = tf.distribute.cluster_resolver.SlurmClusterResolver(
        port_base=first_port, gpus_per_node=10_000, gpus_per_task=1, auto_set_gpu=False
    )
    addresses = resolver.cluster_spec().job_tasks("worker")
    # The resolver sorts the nodes by name, which need not be Slurm's order: each task looks for its own node.
    own = f"{environment['SLURMD_NODENAME']}:{first_port + int(environment['SLURM_LOCALID'])}"
    return addresses, addresses.index(own)
