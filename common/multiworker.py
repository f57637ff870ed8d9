"""Multi-worker training: cluster membership, configuration checks and failure detection."""

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
SILENCE = 10  # seconds without a heartbeat after which a worker counts as lost
# Key of the reason to exit. TensorFlow sets it too, if it receives SIGTERM while it waits for other workers.
_END = "TF_DEFAULT_PREEMPTION_NOTICE_KEY"
# The cluster that this process has joined; empty if none.
current_cluster: list["Cluster"] = []


class Cluster:
    """The workers of a training run, including this process. Worker 0, the chief, decides and writes for all.

    `Cluster()`, without `join`, is a process that trains alone: all methods work, and none waits.
    """

    def __init__(self, workers: tuple[str, ...] = ("this process",), index: int = 0):
        self.workers, self.index, self.chief, self.strategy = workers, index, index == 0, None
        self._store, self._round, self._asked = context.context(), 0, (False, False)
        # Whether all workers exit by themselves, whether this one has left, and the exit code and line it has sent.
        self._all_end, self._left, self._sent = False, False, None

    def name(self, index: int) -> str:
        """Returns the name of a worker in messages."""
        return f"worker {index} at {self.workers[index]}"

    def join(self, strategy: tf.distribute.MultiWorkerMirroredStrategy) -> None:
        """Joins the cluster of `strategy`, to which all workers are connected."""
        # The requests of this worker, and the mean over all workers: see common/upstream.py.
        self.strategy, strategy.flags = strategy, (tf.Variable([0.0, 0.0]), tf.Variable([0.0, 0.0]))
        self._set("here", True)
        current_cluster.append(self)
        exit_hooks.append(self.leave)
        atexit.register(self.leave)
        sys.excepthook = self._report_exception
        threading.Thread(target=self._watch, daemon=True).start()

    def ask(self, stop: bool, save: bool) -> None:
        """Requests that all workers stop or save a checkpoint after an execution of `fit` or `evaluate`."""
        if self._asked != (stop, save):
            self._asked = stop, save
            if self.strategy:
                self.strategy.flags[0].assign([stop, save])

    def agreed(self) -> tuple[bool, bool]:
        """Returns whether to stop and to save: if any worker requested it before the last execution. Same on all."""
        stop, save = (self.strategy.flags[1].numpy() > 0).tolist() if self.strategy else self._asked
        self._all_end |= stop
        if save:  # A request to save is sent once.
            self.ask(self._asked[0], False)
        return stop, save

    def agree_to_stop(self, stop: bool) -> bool:
        """Returns whether any worker requests to stop. All workers must call it."""
        self._all_end |= self.from_chief(any(self.gather(stop)))
        return self._all_end

    def _set(self, key: str, value: Any) -> None:
        text = json.dumps(value, default=lambda part: part.tolist() if isinstance(part, np.ndarray) else str(part))
        with contextlib.suppress(tf.errors.OpError):  # The key exists, or the chief is lost: see `_watch`.
            self._store.set_config_key_value(key, text)

    def _get(self, key: str) -> Any:
        while True:  # Short timeouts, because Python handles signals only in between.
            with contextlib.suppress(tf.errors.DeadlineExceededError):
                return json.loads(self._store.get_config_key_value(key, 200))

    def gather(self, value: Any) -> list[Any]:
        """Returns the JSON values of all workers on the chief, elsewhere an empty list. All workers must call it."""
        self._round += 1
        if self.chief:
            return [value, *(self._get(f"{self._round}/{index}") for index in range(1, len(self.workers)))]
        self._set(f"{self._round}/{self.index}", value)
        return []

    def from_chief(self, value: Any = None) -> Any:
        """Broadcasts the value of the chief, an array or a JSON value. All workers must call it."""
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
        content = np.frombuffer(array.tobytes() + bytes(4 - array.nbytes % 4), np.float32)  # Bytes of any dtype.
        with self.strategy.scope():  # Broadcasts initial values.
            content = tf.Variable(content, trainable=False).numpy().tobytes()
        return np.frombuffer(content[: array.nbytes], array.dtype).reshape(array.shape).copy()

    def compare(self, values: dict[str, Any]) -> None:
        """Raises a `UserError` on all workers if values differ from those of the chief. All workers must call it."""
        problems = []
        for index, other in enumerate(self.gather(values)):
            for key in [key for key in values if other.get(key) != values[key]]:
                problems.append(f"{self.name(index)}: {key} is {other.get(key)!r}, but {values[key]!r} on worker 0")
        if problem := self.from_chief(problems[:1]):
            self._all_end = True
            raise UserError(f"{problem[0]}; start all workers with the same command, code and data")

    def _watch(self) -> None:
        """Exits this process if all workers must exit or one is lost, even while the main thread is blocked."""
        while not (end := self._poll()):
            if os.environ.get("LAUNCHER_PID", str(os.getppid())) != str(os.getppid()):  # The launcher was killed.
                os.kill(os.getpid(), signal.SIGTERM)
        if not self._left and end != self._sent:
            time.sleep(2 if self.chief else 0)  # The service ends with the chief, so wait until all have read.
            os.write(2, (" ".join(end[1].split()) + "\n").encode())
            os._exit(end[0])

    def _poll(self) -> tuple[int, str] | None:
        """Waits a second, then returns the exit code and the last line if this process must exit, else None."""
        lost = 0
        try:
            with contextlib.suppress(tf.errors.DeadlineExceededError):
                end = self._store.get_config_key_value(_END, 1000)
                return tuple(json.loads(end)) if end.startswith("[") else (EXIT_INTERRUPTED, "interrupted: by SIGTERM")
            self._store.get_config_key_value("here", 1000 * SILENCE)  # A suspended chief does not answer.
            states = self._store.get_task_states([("worker", len(self.workers))])
            lost = next((index for index, error in enumerate(states) if error), None)
        except tf.errors.OpError:  # The service ends with the chief.
            pass
        line = f"error: {self.name(lost or 0)} is lost; continue by the same commands with --resume"
        return None if lost is None else (EXIT_WORKER_LOST, line)

    def leave(self, code: int = 0, line: str = "") -> None:
        """Exits with all workers after training, an agreed stop or a failed comparison; else makes them exit."""
        if not self.strategy or self._left:
            return
        if (code == 0 and not line) or self._all_end:
            self.gather(True)
            self.from_chief(True)
            self._left = not self.chief  # The chief stays until the others no longer need it.
            self.gather(True)
        else:
            self._sent = code, line
            self._set(_END, self._sent)
            time.sleep(2 if self.chief else 0)
        self._left = True

    def _report_exception(self, kind: type[BaseException], error: BaseException, trace: Any) -> None:
        if issubclass(kind, tf.errors.OpError):  # Probably a worker is lost: wait until `_watch` finds out which.
            time.sleep(SILENCE + 5)
        sys.__excepthook__(kind, error, trace)
        self._all_end = False
        self.leave(EXIT_WORKER_LOST, f"error: {self.name(self.index)} ended by the exception that it shows")
        os._exit(1)


def described_cluster(environment: Mapping[str, str]) -> tuple[tuple[str, ...], int]:
    """Returns the addresses "host:port" of all workers, chief first, and the index of this process.

    Reads `TF_CONFIG`, which Kubernetes operators set, or the environment variables of a Slurm step with several tasks.
    Without either, there are no addresses. Raises a `UserError` if they are malformed.
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
    workers = {(job, index): host for job in ("chief", "worker") for index, host in enumerate(jobs.get(job, []))}
    return list(workers.values()), list(workers).index((task["type"], int(task["index"])))


def _from_slurm(environment: Mapping[str, str]) -> tuple[list[str], int]:
    # Jobs on the same node need different ports. Slurm assigns the GPUs itself.
    first_port = 20_000 + int(environment.get("SLURM_JOB_ID", "0")) % 10_000
    resolver = tf.distribute.cluster_resolver.SlurmClusterResolver(
        port_base=first_port, gpus_per_node=10_000, gpus_per_task=1, auto_set_gpu=False
    )
    addresses = resolver.cluster_spec().job_tasks("worker")
    # The resolver sorts nodes by name, which may differ from Slurm's order: each task looks up its own node.
    own = f"{environment['SLURMD_NODENAME']}:{first_port + int(environment['SLURM_LOCALID'])}"
    return addresses, addresses.index(own)
