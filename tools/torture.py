"""Kills a training again and again, resumes it by the same command, and compares the end with a run left alone.

    python tools/torture.py mnist_cnn --kills 20
    python tools/torture.py mnist_cnn --kills 20 --signal TERM
    python tools/torture.py mnist_cnn --kills 20 --signal INT
    python tools/torture.py mnist_cnn --kills 3 -- --smoke --batch-size 64
    python tools/torture.py mnist_cnn --kills 10 --signal STOP --workers 3
    python tools/torture.py linear_regression --workers 2 --cases

KILL is `kill -9`, at random moments from the start of the process to its end; a quarter of the kills falls inside
the writing of a checkpoint. TERM and INT (Ctrl-C) come at any moment after the recipe's first line: the exit code must
be 75 each time. Compared are the digest of the weights, the step counter of the optimizer, the test metrics, the
losses of all epochs, and each step of each curve in TensorBoard. Flags behind `--` go to the recipe.

With --workers, the training is a group of processes under scripts/launch.py. KILL and STOP strike one of them, at
random moments, half of them within the training, which is shorter than its start; the others must be gone within 20
seconds, and the launcher starts all again. TERM strikes the launcher.
The end is compared with that of an equal group left alone. With --cases, each way in which several workers can end is
driven three times, without the launcher, and a table shows the exit times.
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


def main() -> None:
    own, flags = load_program(ROOT / "scripts" / "launch.py").own_and_recipe_flags(sys.argv[1:])
    parser = Parser(__doc__)
    parser.add_argument("recipe", choices=sorted(path.stem for path in (ROOT / "recipes").glob("*.py")))
    parser.add_argument("--kills", type=int, default=20, help="how often (default: 20)")
    parser.add_argument("--signal", choices=("KILL", "TERM", "INT", "STOP"), default="KILL")
    parser.add_argument("--workers", type=int, default=0, help="train with so many processes (default: one)")
    parser.add_argument("--seed", type=int, default=0, help="decides the moments, as far as a clock can")
    parser.add_argument("--cases", action="store_true", help="every way in which several workers can end, three times")
    arguments = parser.parse_args(own)
    if arguments.cases:
        if arguments.workers < 2:
            parser.error("--cases: for several workers; add --workers 2 or more")
        sys.exit(run_cases(str(ROOT / "recipes" / f"{arguments.recipe}.py"), arguments.workers, arguments.seed))
    if arguments.signal == "STOP" and not arguments.workers:
        parser.error("--signal STOP: a process alone has nobody to notice it; add --workers")
    with tempfile.TemporaryDirectory() as folder:
        torture = Torture(arguments, [*(flags or STANDARD_FLAGS), *FIXED_FLAGS], pathlib.Path(folder))
        sys.exit(torture.run())


def run_cases(recipe: str, workers: int, seed: int) -> int:
    """Prints a table of the cases; 1 if one went wrong, else 0."""
    print(
        f"{'case':24} | workers | seconds to the last exit\n{'-' * 24}-|---------|--------------------------",
        flush=True,
    )
    wrong = 0
    for name, drive in CASES.items():
        took = []
        for number in range(3):
            with tempfile.TemporaryDirectory() as folder:
                seconds, problem = drive(Group(recipe, workers, pathlib.Path(folder), seed + number))
            if seconds > LIMIT and not problem:
                problem = f"after {seconds:.1f} s"
            took.append(f"WRONG: {problem}" if problem else f"{seconds:.1f}")
            wrong += bool(problem)
        print(f"{name:24} | {workers:7} | {', '.join(took)}", flush=True)
    return int(wrong > 0)


class Torture:
    """A reference run, and victims that are killed until there were enough kills."""

    def __init__(self, arguments: argparse.Namespace, flags: list[str], folder: pathlib.Path):
        self.recipe = str(ROOT / "recipes" / f"{arguments.recipe}.py")
        self.name, self.kills, self.signal = arguments.recipe, arguments.kills, arguments.signal
        self.flags, self.folder, self.random = flags, folder, random.Random(arguments.seed)
        self.workers, self.slowest_exit = arguments.workers, 0.0
        self.asks = arguments.signal in ("TERM", "INT")

    def command(self, run_dir: pathlib.Path, *more: str) -> list[str]:
        """The training, as a user would start it."""
        start = [sys.executable, self.recipe]
        if self.workers:
            launcher = str(ROOT / "scripts" / "launch.py")
            start = [sys.executable, launcher, "--workers", str(self.workers), "--max-restarts", "1000"]
            start += [self.recipe, "--"]
        return [*start, *self.flags, "--run-dir", str(run_dir), *more]

    def run(self) -> int:
        """Prints the comparison; 0 if all is identical, else 1."""
        began = time.monotonic()
        command = self.command(self.folder / "alone")
        if not self.workers:
            command[:1] = [sys.executable, __file__, "victim", "0"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            print(done.stderr, file=sys.stderr)
            return done.returncode
        self.writes = done.stdout.count(WRITTEN)
        # What comes before and behind the training, and the training itself.
        seconds = json.loads((self.folder / "alone" / "result.json").read_text())["seconds"]
        self.around = (time.monotonic() - began if not self.asks or self.workers else seconds["total"]) - seconds[
            "train"
        ]
        self.training, self.tracing = seconds["train"], seconds["compile"]
        expected, counts, victims = outcome(self.folder / "alone"), collections.Counter(), 0
        while counts["kills"] < self.kills:
            victims += 1
            victim = self.folder / f"victim-{victims}"
            if self.workers and not self.asks:
                self.live_as_group(victim, counts)
            else:
                while not self.live(victim, counts):
                    pass
            found = outcome(victim)
            for what in expected:
                if found[what] != expected[what]:
                    print(f"{self.name}: {what} differs\n  alone: {expected[what]}\n  killed: {found[what]}")
                    return 1
        if self.slowest_exit > 20:
            print(f"{self.name}: a worker took {self.slowest_exit:.1f} s to notice that another was lost")
            return 1
        kind = f"of {self.workers} workers" if self.workers else f"{counts['in write']} inside a checkpoint write"
        print(
            f"{self.name}: {counts['kills']} x {self.signal} ({kind}), "
            f"{victims} runs finished, {counts['resumed']} times from a checkpoint: identical to the run left alone"
            + (f"; slowest exit {self.slowest_exit:.1f} s" if self.slowest_exit else "")
        )
        return 0

    def live(self, victim: pathlib.Path, counts: collections.Counter) -> bool:
        """One life of a victim, to its end or to its death; whether it came to the end."""
        command = self.command(victim, "--resume")
        if counts["kills"] >= self.kills:
            moment = None
        elif self.signal == "KILL" and counts["in write"] * 4 <= counts["kills"]:
            moment = None
            command[:1] = [sys.executable, __file__, "victim", str(self.random.randint(1, min(4, self.writes)))]
        else:
            # Half of them early enough in training that it takes many lives, the others at any moment.
            early = self.random.uniform(0.3 * self.around, self.around + 2 * self.training / self.kills)
            moment = self.random.choice([early, self.random.uniform(0, self.around + self.training)])
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        printed = process.stdout.readline() if self.asks else ""
        if moment is not None:
            threading.Thread(target=self.strike, args=(process, moment), daemon=True).start()
        rest, errors = process.communicate()
        counts["resumed"] += "resumed: " in printed + rest and "from step 0\n" not in rest
        if process.returncode == 0:
            return True
        if process.returncode != (EXIT_INTERRUPTED if self.asks else -signal.SIGKILL):
            raise SystemExit(f"{self.name}: exit code {process.returncode}\n{errors}")
        self.slowest_exit = max(self.slowest_exit, time.monotonic() - getattr(process, "struck", time.monotonic()))
        counts["kills"] += 1
        counts["in write"] += "victim" in command
        return False

    def live_as_group(self, victim: pathlib.Path, counts: collections.Counter) -> None:
        """The whole life of a group of workers, whose launcher starts it again after each strike."""
        command = self.command(victim, "--resume")
        launcher = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        printed, pids, struck, timers = [], {}, {}, []
        in_training = False  # Whether the next strike waits until the training has begun.

        def strike(index: int) -> None:
            struck.update(index=index, moment=time.monotonic())
            with contextlib.suppress(ProcessLookupError):
                os.kill(pids[index], signal.SIGKILL if self.signal == "KILL" else signal.SIGSTOP)

        def strike_within(seconds: float) -> None:
            strikes = [self.random.randrange(self.workers)]
            timers.append(threading.Timer(self.random.uniform(0, seconds), strike, strikes))
            timers[-1].daemon = True
            timers[-1].start()

        for line in launcher.stdout:
            printed.append(line)
            counts["resumed"] += "resumed: " in line and "from step 0\n" not in line
            if started := re.match(r"\[launch] worker (\d+) is process (\d+)", line):
                pids[int(started[1])] = int(started[2])
                if int(started[1]) == self.workers - 1 and counts["kills"] < self.kills:
                    # Of a worker that is stopped earlier, the others would say that it did not come.
                    in_training = self.signal == "STOP" or self.random.random() < 0.5
                    if not in_training:
                        strike_within(self.around + self.training)
            elif in_training and line.startswith("[0] Epoch "):
                in_training = False
                strike_within(self.tracing + self.training)
            elif ended := re.match(r"\[launch] worker (\d+) (ended with|died of signal) (\d+)", line):
                if ended[2] == "ended with" and int(ended[3]) not in (0, EXIT_WORKER_LOST):
                    launcher.terminate()
                if struck and struck["index"] != int(ended[1]):
                    self.slowest_exit = max(self.slowest_exit, time.monotonic() - struck["moment"])
            elif line.startswith("[launch] restart"):
                counts["kills"] += 1
                struck.clear()
        for timer in timers:
            timer.cancel()
        if launcher.wait():
            raise SystemExit(f"{self.name}: exit code {launcher.returncode}\n{''.join(printed[-40:])}")

    def strike(self, process: subprocess.Popen, moment: float) -> None:
        """Sends the signal after so many seconds."""
        time.sleep(moment)
        process.struck = time.monotonic()
        process.send_signal(getattr(signal, f"SIG{self.signal}"))


def outcome(run_dir: pathlib.Path) -> dict[str, object]:
    """What must be the same, however often a run was interrupted."""
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
    """Folder, tag and step of everything in the event files, sorted."""
    found = []
    for file in folder.rglob("events.out.tfevents*"):
        for record in tf.data.TFRecordDataset(str(file)):
            event = tf.compat.v1.Event.FromString(record.numpy())
            run = str(file.parent.relative_to(folder))
            # Pictures come after the result: a kill between the two costs them.
            values = [each for each in event.summary.value if each.metadata.plugin_data.plugin_name != "images"]
            found += [(run, value.tag, event.step) for value in values]
    return sorted(found)


def be_victim(write: int, recipe: str) -> None:
    """Runs a recipe that dies inside the given checkpoint write, counted from 1; 0: none, but says when one is done."""
    from common.checkpoints import Checkpoints

    save, writes = Checkpoints._save, 0

    def save_and_die(*arguments):
        nonlocal writes
        writes += 1
        if writes == write:
            # A write takes some 10 ms: all its stages are met.
            timer = threading.Timer(random.uniform(0, 0.015), os.kill, (os.getpid(), signal.SIGKILL))
            timer.start()
            save(*arguments)
            os.kill(os.getpid(), signal.SIGKILL)
        save(*arguments)
        if write == 0:
            print(WRITTEN, flush=True)

    Checkpoints._save = save_and_die
    runpy.run_path(recipe, run_name="__main__")


if __name__ == "__main__":
    if sys.argv[1:2] == ["victim"]:
        write, recipe = int(sys.argv[2]), sys.argv[3]
        sys.argv = sys.argv[3:]
        be_victim(write, recipe)
    else:
        run_script(main)
