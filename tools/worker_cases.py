"""Tests each way in which a multi-worker training can end; used by `torture.py --cases` and the tests."""

import contextlib
import json
import os
import pathlib
import random
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable

from common.cli import EXIT_INTERRUPTED
from common.multiworker import EXIT_WORKER_LOST
from common.records import load_program

free_ports = load_program(pathlib.Path(__file__).parent.parent / "scripts" / "launch.py").free_ports
ENDLESS = ("--data", "sample", "--no-baseline", "--epochs", "100000", "--run-dir", "run")
SHORT = ("--smoke", "--data", "sample", "--run-dir", "run")
# Seconds: limit from the event to the last exit; timeout of a test; how long a slow chief writes.
LIMIT, PATIENCE, SLOW = 20, 120, 15


class Group:
    """Workers of a recipe, started by `popen`, without the launcher. Their output goes to files in `folder`."""

    def __init__(self, recipe: str, workers: int, folder: pathlib.Path, seed: int, popen: Callable = subprocess.Popen):
        self.recipe, self.workers, self.folder, self.random = recipe, workers, folder, random.Random(seed)
        self.popen = popen
        self.addresses = [f"127.0.0.1:{port}" for port in free_ports(workers)]
        self.processes: dict[int, subprocess.Popen] = {}
        self.event_time = 0.0

    def start(self, index: int, *flags: str, fault: str = "") -> None:
        """Starts a worker. `fault` is "raise" (an exception during training) or "slow" (the chief writes slowly)."""
        task = {"cluster": {"worker": self.addresses}, "task": {"type": "worker", "index": index}}
        environment = {**os.environ, "TF_CONFIG": json.dumps(task), "PYTHONUNBUFFERED": "1"}
        command = [sys.executable, *([__file__, fault] if fault else []), self.recipe, *flags]
        command += ["--batch-size", str(32 * self.workers)]
        with open(self.folder / f"{index}.out", "w") as out, open(self.folder / f"{index}.err", "w") as errors:
            process = self.popen(command, cwd=self.folder, env=environment, stdout=out, stderr=errors)
        self.processes[index], self.event_time = process, time.monotonic()

    def printed(self, index: int, kind: str = "err") -> str:
        """Returns the output of a worker so far."""
        return (self.folder / f"{index}.{kind}").read_text()

    def wait_for(self, index: int, text: str) -> None:
        """Waits until a worker has printed `text`."""
        while text not in self.printed(index, "out"):
            if self.processes[index].poll() is not None:
                raise SystemExit(f"worker {index} ended: {self.printed(index)}")
            time.sleep(0.02)

    def wait_for_imports(self) -> None:
        """Waits until all started workers are looking for the others, and starts the clock."""
        for index in self.processes:
            self.wait_for(index, "cluster: ")
        self.event_time = time.monotonic()

    def send_signal(self, index: int, number: int) -> None:
        """Sends a signal to a worker after a random delay of up to a second."""
        time.sleep(self.random.random())
        self.processes[index].send_signal(number)
        self.event_time = time.monotonic()

    def end(self, expected: dict[int, int], message: str) -> tuple[float, str]:
        """Waits until the workers in `expected` exit, checks their exit codes and messages, and kills the others.

        A worker with an exit code above 1 must print `message` in a single line on stderr, and nothing else.

        Returns:
            Seconds from the event to the last exit, and a description of the problem, which is empty if there is none.
        """
        with contextlib.suppress(subprocess.TimeoutExpired):
            for index in expected:
                self.processes[index].wait(max(0.1, self.event_time + PATIENCE - time.monotonic()))
        seconds, codes = time.monotonic() - self.event_time, {i: self.processes[i].poll() for i in expected}
        for process in self.processes.values():
            process.kill()
            process.wait()
        if codes != expected:
            return seconds, f"exit codes {codes} instead of {expected}: {[self.printed(index) for index in codes]}"
        outputs = {index: self.printed(index) for index, code in codes.items() if code > 1}
        wrong = {index: text for index, text in outputs.items() if message not in text or text.count("\n") != 1}
        return seconds, f"{message!r} is not all that is printed: {wrong}" if wrong else ""


def absent(group: Group) -> tuple[float, str]:
    """A worker is never started."""
    missing = group.random.randrange(group.workers)
    others = [index for index in range(group.workers) if index != missing]
    for index in others:
        group.start(index, *SHORT, "--cluster-timeout", "8")
    group.wait_for_imports()
    return group.end(
        dict.fromkeys(others, 2), f"worker {missing} at {group.addresses[missing]}: did not come within 8 s"
    )


def differing(group: Group) -> tuple[float, str]:
    """One worker has a different setting, which does not affect the training but decides whether to run a baseline."""
    for index in range(group.workers):
        group.start(index, *SHORT, *(["--no-baseline"] if index == group.workers - 1 else []))
    group.wait_for_imports()
    return group.end(dict.fromkeys(range(group.workers), 2), "baseline is False, but True on worker 0")


def start_training(group: Group, faulty: int = -1) -> int:
    """Starts all workers, waits until they train, and returns the index of a random worker."""
    for index in range(group.workers):
        group.start(index, *ENDLESS, fault="raise" if index == faulty else "")
    group.wait_for(0, "epoch 1/")
    return group.random.randrange(group.workers)


def interrupted(group: Group) -> tuple[float, str]:
    """A worker receives SIGTERM or SIGINT during training."""
    group.send_signal(start_training(group), group.random.choice([signal.SIGTERM, signal.SIGINT]))
    seconds, problem = group.end(
        dict.fromkeys(range(group.workers), EXIT_INTERRUPTED),
        "interrupted: the same command with --resume continues run",
    )
    return seconds, problem or ("" if list(group.folder.glob("run/checkpoints/epoch-*")) else "nothing is saved")


def interrupted_early(group: Group) -> tuple[float, str]:
    """A worker receives SIGTERM while it waits for the others, which may start later."""
    index = group.random.randrange(group.workers)
    group.start(index, *ENDLESS)
    group.wait_for(index, "cluster: ")
    group.send_signal(index, signal.SIGTERM)
    if index > 0:
        return group.end({index: EXIT_INTERRUPTED}, "interrupted: ")
    for other in range(1, group.workers):
        group.start(other, *ENDLESS)
    return group.end(dict.fromkeys(range(group.workers), EXIT_INTERRUPTED), "interrupted: ")


def _lost(group: Group, number: int, chief: bool) -> tuple[float, str]:
    start_training(group)
    lost = 0 if chief else group.random.randrange(1, group.workers)
    group.send_signal(lost, number)
    others = [index for index in range(group.workers) if index != lost]
    return group.end(dict.fromkeys(others, EXIT_WORKER_LOST), f"worker {lost} at {group.addresses[lost]} is lost")


def raising(group: Group) -> tuple[float, str]:
    """A worker raises an exception during training."""
    index = group.random.randrange(group.workers)
    start_training(group, index)
    group.processes[index].wait(PATIENCE)
    group.event_time = time.monotonic()
    codes = dict.fromkeys(range(group.workers), EXIT_WORKER_LOST) | {index: 1}
    return group.end(codes, f"worker {index} at {group.addresses[index]} ended by the exception that it shows")


def slow_chief(group: Group) -> tuple[float, str]:
    """The chief writes slowly at the end, after the other workers have finished."""
    for index in range(group.workers):
        group.start(index, *SHORT, fault="" if index else "slow")
    group.wait_for(0, "the chief writes")
    group.event_time = time.monotonic()
    seconds, problem = group.end(dict.fromkeys(range(group.workers), 0), "")
    return seconds - SLOW, problem


CASES = {
    "absent": absent,
    "other settings": differing,
    "SIGTERM or SIGINT": interrupted,
    "SIGTERM while waiting": interrupted_early,
    "kill -9 of a worker": lambda group: _lost(group, signal.SIGKILL, chief=False),
    "kill -9 of the chief": lambda group: _lost(group, signal.SIGKILL, chief=True),
    "SIGSTOP of a worker": lambda group: _lost(group, signal.SIGSTOP, chief=False),
    "SIGSTOP of the chief": lambda group: _lost(group, signal.SIGSTOP, chief=True),
    "exception": raising,
    "slow chief": slow_chief,
}


def run_with_fault(fault: str, recipe: str) -> None:
    """Runs a recipe that raises an exception after ten epochs, or that writes slowly."""
    from common.checkpoints import Checkpoints
    from common.runs import Run

    begin, finish = Checkpoints.on_epoch_begin, Run.finish

    def raise_later(self, epoch, logs=None):
        if epoch == 10:
            raise RuntimeError("on purpose")
        begin(self, epoch, logs)

    def finish_slowly(*arguments):
        print("the chief writes", flush=True)
        time.sleep(SLOW)
        return finish(*arguments)

    if fault == "raise":
        Checkpoints.on_epoch_begin = raise_later
    else:
        Run.finish = finish_slowly
    runpy.run_path(recipe, run_name="__main__")


if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    fault, sys.argv = sys.argv[0], sys.argv[1:]
    run_with_fault(fault, sys.argv[0])
