"""Kills a training repeatedly, resumes it each time, and compares the result with that of an uninterrupted run.

    python tools/torture.py mnist_cnn --kills 20
    python tools/torture.py mnist_cnn --kills 20 --signal TERM
    python tools/torture.py mnist_cnn --kills 20 --signal INT
    python tools/torture.py mnist_cnn --kills 3 -- --smoke --batch-size 64
    python tools/torture.py mnist_cnn --kills 10 --signal STOP --workers 3
    python tools/torture.py linear_regression --workers 2 --cases

KILL is `kill -9`, sent at random times between start and exit; a quarter of the kills falls within a checkpoint write.
TERM and INT (Ctrl-C) are sent at random times after the recipe's first line of output; the exit code must be 75. The
script compares the digest of the weights, the optimizer's step counter, the test metrics, the losses of all epochs, and
every step of every TensorBoard curve. Flags after `--` are passed to the recipe.

With --workers, the training is a group of processes under scripts/launch.py. KILL and STOP are sent to one worker at
random times, half of them during training, which takes less time than startup. The other workers must exit within 20
seconds, and the launcher restarts the group. TERM is sent to the launcher.
The result is compared with that of an uninterrupted group. With --cases, each way in which a multi-worker training can
end is tested three times, without the launcher, and a table shows the exit times.
"""

import argparse
import collections
import contextlib
import json
import os
import pathlib
import random
import re
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable

from common.cli import EXIT_INTERRUPTED, Parser, run_script
from common.multiworker import EXIT_WORKER_LOST
from common.records import load_program

import numpy as np
import tensorflow as tf
from worker_cases import CASES, LIMIT, Group

ROOT = pathlib.Path(__file__).parent.parent
STANDARD_FLAGS = ["--data", "sample", "--epochs", "4", "--checkpoint-every", "5"]
FIXED_FLAGS = ["--deterministic", "--no-baseline"]
WRITTEN = "torture: a checkpoint is written"


def main(popen: Callable = subprocess.Popen) -> None:
    """Runs the test; `popen` starts the trainings of a single process."""
    own_flags, recipe_flags = load_program(ROOT / "scripts" / "launch.py").own_and_recipe_flags(sys.argv[1:])
    parser = Parser(__doc__)
    parser.add_argument("recipe", choices=sorted(path.stem for path in (ROOT / "recipes").glob("*.py")))
    parser.add_argument("--kills", type=int, default=20, help="number of signals (default: 20)")
    parser.add_argument("--signal", choices=("KILL", "TERM", "INT", "STOP"), default="KILL")
    parser.add_argument("--workers", type=int, default=0, help="number of worker processes (default: a single process)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random times")
    parser.add_argument("--cases", action="store_true", help="test every end of a multi-worker training, three times")
    arguments = parser.parse_args(own_flags)
    if arguments.cases:
        if arguments.workers < 2:
            parser.error("--cases: needs --workers 2 or more")
        sys.exit(run_cases(str(ROOT / "recipes" / f"{arguments.recipe}.py"), arguments.workers, arguments.seed))
    if arguments.signal == "STOP" and not arguments.workers:
        parser.error("--signal STOP: a single process has no other worker that notices it; add --workers")
    with tempfile.TemporaryDirectory() as folder:
        test = KillTest(arguments, [*(recipe_flags or STANDARD_FLAGS), *FIXED_FLAGS], pathlib.Path(folder), popen)
        sys.exit(test.run())


def run_cases(recipe: str, workers: int, seed: int) -> int:
    """Runs all cases and prints a table. Returns 1 if a case failed, else 0."""
    print(
        f"{'case':24} | workers | seconds to the last exit\n{'-' * 24}-|---------|--------------------------",
        flush=True,
    )
    failures = 0
    for name, run_case in CASES.items():
        durations = []
        for number in range(3):
            with tempfile.TemporaryDirectory() as folder:
                seconds, problem = run_case(Group(recipe, workers, pathlib.Path(folder), seed + number))
            if seconds > LIMIT and not problem:
                problem = f"after {seconds:.1f} s"
            durations.append(f"WRONG: {problem}" if problem else f"{seconds:.1f}")
            failures += bool(problem)
        print(f"{name:24} | {workers:7} | {', '.join(durations)}", flush=True)
    return int(failures > 0)


class KillTest:
    """Compares an uninterrupted reference run with runs that are killed and resumed."""

    def __init__(self, arguments: argparse.Namespace, flags: list[str], folder: pathlib.Path, popen: Callable):
        self.recipe = str(ROOT / "recipes" / f"{arguments.recipe}.py")
        self.name, self.kills, self.signal = arguments.recipe, arguments.kills, arguments.signal
        self.flags, self.folder, self.random = flags, folder, random.Random(arguments.seed)
        self.popen = popen
        self.workers, self.slowest_exit = arguments.workers, 0.0
        self.graceful = arguments.signal in ("TERM", "INT")

    def command(self, run_dir: pathlib.Path, *more: str) -> list[str]:
        """Returns the command that starts the training."""
        prefix = [sys.executable, self.recipe]
        if self.workers:
            launcher = str(ROOT / "scripts" / "launch.py")
            prefix = [sys.executable, launcher, "--workers", str(self.workers), "--max-restarts", "1000"]
            prefix += [self.recipe, "--"]
        return [*prefix, *self.flags, "--run-dir", str(run_dir), *more]

    def run(self) -> int:
        """Runs the test and prints the comparison. Returns 0 if all results are identical, else 1."""
        start = time.monotonic()
        command = self.command(self.folder / "alone")
        if not self.workers:
            command[:1] = [sys.executable, __file__, "victim", "0"]
        reference = self.popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        output, errors = reference.communicate()
        if reference.returncode:
            print(errors, file=sys.stderr)
            return reference.returncode
        self.writes = output.count(WRITTEN)
        # Random kill times are chosen relative to these durations.
        seconds = json.loads((self.folder / "alone" / "result.json").read_text())["seconds"]
        self.overhead = (time.monotonic() - start if not self.graceful or self.workers else seconds["total"]) - seconds[
            "train"
        ]
        self.training, self.compiling = seconds["train"], seconds["compile"]
        expected, counts, runs = outcome(self.folder / "alone"), collections.Counter(), 0
        while counts["kills"] < self.kills:
            runs += 1
            run_dir = self.folder / f"victim-{runs}"
            if self.workers and not self.graceful:
                self.run_group(run_dir, counts)
            else:
                while not self.run_until_exit(run_dir, counts):
                    pass
            actual = outcome(run_dir)
            for key in expected:
                if actual[key] != expected[key]:
                    print(f"{self.name}: {key} differs\n  alone: {expected[key]}\n  killed: {actual[key]}")
                    return 1
        if self.slowest_exit > 20:
            print(f"{self.name}: a worker took {self.slowest_exit:.1f} s to notice that another was lost")
            return 1
        kind = f"of {self.workers} workers" if self.workers else f"{counts['in write']} inside a checkpoint write"
        print(
            f"{self.name}: {counts['kills']} x {self.signal} ({kind}), "
            f"{runs} runs finished, {counts['resumed']} times from a checkpoint: identical to the run left alone"
            + (f"; slowest exit {self.slowest_exit:.1f} s" if self.slowest_exit else "")
        )
        return 0

    def run_until_exit(self, run_dir: pathlib.Path, counts: collections.Counter) -> bool:
        """Starts or resumes a run, and may send it a signal. Returns True if the run finished."""
        command = self.command(run_dir, "--resume")
        if counts["kills"] >= self.kills:
            delay = None
        elif self.signal == "KILL" and counts["in write"] * 4 <= counts["kills"]:
            delay = None
            command[:1] = [sys.executable, __file__, "victim", str(self.random.randint(1, min(4, self.writes)))]
        else:
            # Half of the signals are sent early in training, so that a run is resumed many times.
            early = self.random.uniform(0.3 * self.overhead, self.overhead + 2 * self.training / self.kills)
            delay = self.random.choice([early, self.random.uniform(0, self.overhead + self.training)])
        process = self.popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        first_line = process.stdout.readline() if self.graceful else ""
        if delay is not None:
            threading.Thread(target=self.send_signal_after, args=(process, delay), daemon=True).start()
        other_lines, errors = process.communicate()
        counts["resumed"] += "resumed: " in first_line + other_lines and "from step 0\n" not in other_lines
        if process.returncode == 0:
            return True
        if process.returncode != (EXIT_INTERRUPTED if self.graceful else -signal.SIGKILL):
            raise SystemExit(f"{self.name}: exit code {process.returncode}\n{errors}")
        self.slowest_exit = max(self.slowest_exit, time.monotonic() - getattr(process, "signal_time", time.monotonic()))
        counts["kills"] += 1
        counts["in write"] += "victim" in command
        return False

    def run_group(self, run_dir: pathlib.Path, counts: collections.Counter) -> None:
        """Runs a group of workers to completion. The launcher restarts the group after each signal."""
        command = self.command(run_dir, "--resume")
        launcher = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        lines, pids, last_signal, timers = [], {}, {}, []
        in_training = False  # True if the next signal must wait until training has started.

        def send_signal(index: int) -> None:
            last_signal.update(index=index, time=time.monotonic())
            with contextlib.suppress(ProcessLookupError):
                os.kill(pids[index], signal.SIGKILL if self.signal == "KILL" else signal.SIGSTOP)

        def send_signal_within(seconds: float) -> None:
            arguments = [self.random.randrange(self.workers)]
            timers.append(threading.Timer(self.random.uniform(0, seconds), send_signal, arguments))
            timers[-1].daemon = True
            timers[-1].start()

        for line in launcher.stdout:
            lines.append(line)
            counts["resumed"] += "resumed: " in line and "from step 0\n" not in line
            if started := re.match(r"\[launch] worker (\d+) is process (\d+)", line):
                pids[int(started[1])] = int(started[2])
                if int(started[1]) == self.workers - 1 and counts["kills"] < self.kills:
                    # If a worker is stopped during startup, the others report that it is missing, not that it is lost.
                    in_training = self.signal == "STOP" or self.random.random() < 0.5
                    if not in_training:
                        send_signal_within(self.overhead + self.training)
            elif in_training and line.startswith("[0] training: "):
                in_training = False
                send_signal_within(self.compiling + self.training)
            elif ended := re.match(r"\[launch] worker (\d+) (ended with|died of signal) (\d+)", line):
                if ended[2] == "ended with" and int(ended[3]) not in (0, EXIT_WORKER_LOST):
                    launcher.terminate()
                if last_signal and last_signal["index"] != int(ended[1]):
                    self.slowest_exit = max(self.slowest_exit, time.monotonic() - last_signal["time"])
            elif line.startswith("[launch] restart"):
                counts["kills"] += 1
                last_signal.clear()
        for timer in timers:
            timer.cancel()
        if launcher.wait():
            raise SystemExit(f"{self.name}: exit code {launcher.returncode}\n{''.join(lines[-40:])}")

    def send_signal_after(self, process: subprocess.Popen, delay: float) -> None:
        """Sends the signal after `delay` seconds."""
        time.sleep(delay)
        process.signal_time = time.monotonic()
        process.send_signal(getattr(signal, f"SIG{self.signal}"))


def outcome(run_dir: pathlib.Path) -> dict[str, object]:
    """Returns the results of a run that must not depend on interruptions."""
    result = json.loads((run_dir / "result.json").read_text())
    newest = max((run_dir / "checkpoints").glob("epoch-*"))
    names = [name for name, _, _ in json.loads((newest / "state.json").read_text())["variables"]]
    (iteration,) = [number for number, name in enumerate(names) if name.endswith("/iteration")]
    with np.load(newest / "arrays.npz") as arrays:
        iterations = arrays[f"arr_{iteration}"]
    timed = ("seconds", "examples_per_second")
    return {
        "weights": result["weights_sha256"],
        "iterations": int(iterations),
        "metrics": result["metrics"],
        "history": [{name: value for name, value in epoch.items() if name not in timed} for epoch in result["history"]],
        "curves": curves(run_dir / "tensorboard"),
    }


def curves(folder: pathlib.Path) -> list[tuple[str, str, int]]:
    """Returns the sorted (folder, tag, step) tuples of all values in the event files."""
    points = []
    for file in folder.rglob("events.out.tfevents*"):
        for record in tf.data.TFRecordDataset(str(file)):
            event = tf.compat.v1.Event.FromString(record.numpy())
            run = str(file.parent.relative_to(folder))
            # Skip images: they are written after the result, so a kill in between loses them.
            values = [value for value in event.summary.value if value.metadata.plugin_data.plugin_name != "images"]
            points += [(run, value.tag, event.step) for value in values]
    return sorted(points)


def run_and_kill(write: int, recipe: str) -> None:
    """Runs a recipe and kills it during checkpoint write number `write`. With 0, only reports each finished write."""
    from common.checkpoints import Checkpoints

    save, writes = Checkpoints._save, 0

    def save_and_kill(*arguments):
        nonlocal writes
        writes += 1
        if writes == write:
            # A write takes about 10 ms, so the kills hit all of its stages.
            timer = threading.Timer(random.uniform(0, 0.015), os.kill, (os.getpid(), signal.SIGKILL))
            timer.start()
            save(*arguments)
            os.kill(os.getpid(), signal.SIGKILL)
        save(*arguments)
        if write == 0:
            print(WRITTEN, flush=True)

    Checkpoints._save = save_and_kill
    runpy.run_path(recipe, run_name="__main__")


if __name__ == "__main__":
    if sys.argv[1:2] == ["victim"]:
        write, recipe = int(sys.argv[2]), sys.argv[3]
        sys.argv = sys.argv[3:]
        run_and_kill(write, recipe)
    else:
        run_script(main)
