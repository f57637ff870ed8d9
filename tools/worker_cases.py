"""Drives each way in which a training with several workers can end; for `torture.py --cases` and the tests."""

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

from common.cli import EXIT_INTERRUPTED
from common.multiworker import EXIT_WORKER_LOST
from common.records import load_program

free_ports = load_program(pathlib.Path(__file__).parent.parent / "scripts" / "launch.py").free_ports
ENDLESS = ("--data", "sample", "--no-baseline", "--epochs", "100000", "--run-dir", "run")
SHORT = ("--smoke", "--data", "sample", "--run-dir", "run")
# Seconds: until all must have ended after what happened; until a test gives up; how long a slow chief writes.
LIMIT, PATIENCE, SLOW = 20, 120, 15


class Group:
    """Workers of a recipe, started without the launcher; what they print goes to files in `folder`."""

    def __init__(self, recipe: str, workers: int, folder: pathlib.Path, seed: int):
        self.recipe, self.workers, self.folder, self.random = recipe, workers, folder, random.Random(seed)
        self.addresses = [f"127.0.0.1:{port}" for port in free_ports(workers)]
        self.processes: dict[int, subprocess.Popen] = {}
        self.happened = 0.0

    def start(self, index: int, *flags: str, mischief: str = "") -> None:
        """Starts a worker, which with `mischief` raises an exception in training or, as chief, writes slowly."""
        task = {"cluster": {"worker": self.addresses}, "task": {"type": "worker", "index": index}}
        environment = {**os.environ, "TF_CONFIG": json.dumps(task), "PYTHONUNBUFFERED": "1"}
        command = [sys.executable, *([__file__, mischief] if mischief else []), self.recipe, *flags]
        command += ["--batch-size", str(32 * self.workers)]
        with open(self.folder / f"{index}.out", "w") as out, open(self.folder / f"{index}.err", "w") as errors:
            process = subprocess.Popen(command, cwd=self.folder, env=environment, stdout=out, stderr=errors)
        self.processes[index], self.happened = process, time.monotonic()

    def printed(self, index: int, kind: str = "err") -> str:
        """What a worker has printed so far."""
        return (self.folder / f"{index}.{kind}").read_text()

    def wait_for(self, index: int, text: str) -> None:
        """Waits until a worker has printed `text`."""
        while text not in self.printed(index, "out"):
            if self.processes[index].poll() is not None:
                raise SystemExit(f"worker {index} ended: {self.printed(index)}")
            time.sleep(0.02)

    def wait_for_imports(self) -> None:
        """Waits until all that were started look for the others: what happens from then on is timed."""
        for index in self.processes:
            self.wait_for(index, "cluster: ")
        self.happened = time.monotonic()

    def strike(self, index: int, number: int) -> None:
        """Sends a signal to a worker, after up to a second."""
        time.sleep(self.random.random())
        self.processes[index].send_signal(number)
        self.happened = time.monotonic()

    def end(self, expected: dict[int, int], named: str) -> tuple[float, str]:
        """Waits for the end of the workers in `expected`, with these exit codes, and kills the others.

        Returns:
            Seconds from what happened to the last end, and what is wrong; nothing is wrong if all but those that were
            killed or raised an exception print `named` in a single line.
        """
        with contextlib.suppress(subprocess.TimeoutExpired):
            for index in expected:
                self.processes[index].wait(max(0.1, self.happened + PATIENCE - time.monotonic()))
        seconds, codes = time.monotonic() - self.happened, {i: self.processes[i].poll() for i in expected}
        for process in self.processes.values():
            process.kill()
            process.wait()
        if codes != expected:
            return seconds, f"exit codes {codes} instead of {expected}: {[self.printed(index) for index in codes]}"
        told = {index: self.printed(index) for index, code in codes.items() if code > 1}
        wrong = {index: text for index, text in told.items() if named not in text or text.count("\n") != 1}
        return seconds, f"{named!r} is not all that is printed: {wrong}" if wrong else ""


def absent(group: Group) -> tuple[float, str]:
    """A worker does not come."""
    missing = group.random.randrange(group.workers)
    others = [index for index in range(group.workers) if index != missing]
    for index in others:
        group.start(index, *SHORT, "--cluster-timeout", "8")
    group.wait_for_imports()
    return group.end(
        dict.fromkeys(others, 2), f"worker {missing} at {group.addresses[missing]}: did not come within 8 s"
    )


def differing(group: Group) -> tuple[float, str]:
    """A worker has another setting: one that changes nothing of the training, but whether all train a baseline."""
    for index in range(group.workers):
        group.start(index, *SHORT, *(["--no-baseline"] if index == group.workers - 1 else []))
    group.wait_for_imports()
    return group.end(dict.fromkeys(range(group.workers), 2), "baseline is False, but True on worker 0")


def start_training(group: Group, mischievous: int = -1) -> int:
    """Starts all workers, waits until they train, and returns one of them."""
    for index in range(group.workers):
        group.start(index, *ENDLESS, mischief="raise" if index == mischievous else "")
    group.wait_for(0, "Epoch 2")
    return group.random.randrange(group.workers)


def interrupted(group: Group) -> tuple[float, str]:
    """A worker gets SIGTERM or SIGINT in training."""
    group.strike(start_training(group), group.random.choice([signal.SIGTERM, signal.SIGINT]))
    seconds, problem = group.end(
        dict.fromkeys(range(group.workers), EXIT_INTERRUPTED),
        "interrupted: the same command with --resume continues run",
    )
    return seconds, problem or ("" if list(group.folder.glob("run/checkpoints/epoch-*")) else "nothing is saved")


def interrupted_early(group: Group) -> tuple[float, str]:
    """A worker gets SIGTERM while it waits for the others, of which the last one comes later."""
    index = group.random.randrange(group.workers)
    group.start(index, *ENDLESS)
    group.wait_for(index, "cluster: ")
    group.strike(index, signal.SIGTERM)
    if index > 0:
        return group.end({index: EXIT_INTERRUPTED}, "interrupted: ")
    for other in range(1, group.workers):
        group.start(other, *ENDLESS)
    return group.end(dict.fromkeys(range(group.workers), EXIT_INTERRUPTED), "interrupted: ")


def _lost(group: Group, number: int, chief: bool) -> tuple[float, str]:
    start_training(group)
    lost = 0 if chief else group.random.randrange(1, group.workers)
    group.strike(lost, number)
    others = [index for index in range(group.workers) if index != lost]
    return group.end(dict.fromkeys(others, EXIT_WORKER_LOST), f"worker {lost} at {group.addresses[lost]} is lost")


def raising(group: Group) -> tuple[float, str]:
    """A worker ends by an exception in training."""
    index = group.random.randrange(group.workers)
    start_training(group, index)
    group.processes[index].wait(PATIENCE)
    group.happened = time.monotonic()
    codes = dict.fromkeys(range(group.workers), EXIT_WORKER_LOST) | {index: 1}
    return group.end(codes, f"worker {index} at {group.addresses[index]} ended by the exception that it shows")


def slow_chief(group: Group) -> tuple[float, str]:
    """The chief writes for long at the end, while the others have nothing more to do."""
    for index in range(group.workers):
        group.start(index, *SHORT, mischief="" if index else "slow")
    group.wait_for(0, "the chief writes")
    group.happened = time.monotonic()
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


def run_with_mischief(mischief: str, recipe: str) -> None:
    """Runs a recipe that raises an exception after the second epoch, or that writes slowly."""
    from common.checkpoints import Checkpoints
    from common.runs import Run

    begin, finish = Checkpoints.on_epoch_begin, Run.finish

    def raise_later(self, epoch, logs=None):
        if epoch == 10:
            raise RuntimeError("on purpose")
        begin(self, epoch, logs)

    def finish_late(*arguments):
        print("the chief writes", flush=True)
        time.sleep(SLOW)
        return finish(*arguments)

    if mischief == "raise":
        Checkpoints.on_epoch_begin = raise_later
    else:
        Run.finish = finish_late
    runpy.run_path(recipe, run_name="__main__")


if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    mischief, sys.argv = sys.argv[0], sys.argv[1:]
    run_with_mischief(mischief, sys.argv[0])
