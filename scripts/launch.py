"""Trains a recipe with several worker processes on this machine, and restarts them when one of them dies.

    python scripts/launch.py --workers 2 recipes/cifar10_cnn.py -- --epochs 2
    python scripts/launch.py --workers 2 --max-restarts 10 recipes/cifar10_cnn.py -- --run-dir runs/my_run

Flags behind `--` go to the recipe. Each line that a worker prints begins with its number. The workers share the
cores of this machine, and its GPUs if it has some. When one dies, the others end; then all start again from the
last checkpoint. Ctrl-C and SIGTERM save, end all workers, and exit with 75; a second Ctrl-C ends them at once.
Exit codes are those of the recipe, and 76 when the restarts are used up. After an error of its own (exit code 1),
a worker would fail again, so none is restarted.

On several machines this script is not needed: Slurm or Kubernetes starts the workers.
"""

import argparse
import contextlib
import datetime
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from typing import TextIO

# As in common/, which would import TensorFlow and delay the answer to signals.
EXIT_INTERRUPTED, EXIT_WORKER_LOST = 75, 76
# Seconds from the end of the first worker until all have ended: whoever is left then hangs, and is killed.
PATIENCE = 15


def main() -> None:
    own, flags = own_and_recipe_flags(sys.argv[1:])
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.error = lambda message: parser.exit(2, f"error: {message.removeprefix('argument ')}\n")
    parser.add_argument("recipe", type=pathlib.Path, help="its file")
    parser.add_argument("--workers", type=int, required=True, help="how many processes")
    parser.add_argument("--max-restarts", type=int, default=3, help="how often all start again (default: 3)")
    arguments, others = parser.parse_known_args(own)
    if others:
        parser.error(f"{' '.join(others)}: no flags of the launcher; put those of the recipe behind a --")
    if not arguments.recipe.is_file():
        parser.error(f"{arguments.recipe}: no such file; name a recipe, as recipes/mnist_cnn.py")
    if arguments.workers < 1 or arguments.max_restarts < 0:
        parser.error("--workers: give 1 or more, and --max-restarts 0 or more")
    gpus = gpu_count()
    if 0 < gpus < arguments.workers:
        parser.error(f"--workers {arguments.workers}: this machine has {gpus} GPU(s), and each worker needs its own")
    sys.exit(Launcher(arguments.recipe, arguments.workers, gpus, flags).run(arguments.max_restarts))


def own_and_recipe_flags(words: list[str]) -> tuple[list[str], list[str]]:
    """The words before the first `--`, and those behind it."""
    place = words.index("--") if "--" in words else len(words)
    return words[:place], words[place + 1 :]


class Launcher:
    """A group of workers that start and end together."""

    def __init__(self, recipe: pathlib.Path, workers: int, gpus: int, flags: list[str]):
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        # Of a flag that is given twice, the last one counts.
        self.flags = ["--threads", str(max(1, cores // workers)), *flags]
        if "--resume" not in flags:  # A restart must find it again.
            run_dir = pathlib.Path("runs", recipe.stem, datetime.datetime.now().strftime("%Y%m%d-%H%M%S-%f"))
            self.flags = ["--run-dir", str(run_dir), *self.flags]
        self.recipe, self.workers, self.gpus, self.signals = recipe, workers, gpus, 0
        self.processes: list[subprocess.Popen] = []

    def run(self, max_restarts: int) -> int:
        """Runs the group until it ends well, was asked to stop, or has been restarted too often; its exit code."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # Ignored by nohup.
                signal.signal(number, self.pass_on)
        for restarts in range(max_restarts + 1):
            # What the workers leave in temporary files goes with it, however they end.
            with tempfile.TemporaryDirectory() as folder:
                codes = self.run_once(folder)
            if not any(codes):
                return 0
            if self.signals or {-signal.SIGTERM, -signal.SIGINT} & set(codes):  # The recipe may not answer yet.
                return EXIT_INTERRUPTED
            # The first to end said why; the others may only know that it is lost.
            for code in (2, 3, EXIT_INTERRUPTED):
                if code in codes:
                    return code
            if own_errors := [code for code in codes if code > 0 and code != EXIT_WORKER_LOST]:
                self.say("not started again: a worker ended by an error of its own, see above")
                return own_errors[0]
            if restarts < max_restarts:
                self.say(f"restart {restarts + 1} of at most {max_restarts}")
                self.flags.append("--resume")
        self.say(f"workers died, and --max-restarts is {max_restarts}; add --resume behind the -- to continue")
        return EXIT_WORKER_LOST

    def run_once(self, temporary: str) -> list[int]:
        """Starts all workers, waits for their end, and returns their exit codes."""
        addresses = [f"127.0.0.1:{port}" for port in free_ports(self.workers)]
        self.say(f"{self.workers} workers on {', '.join(addresses)}: TensorFlow opens these ports to all networks, "
            "not to this machine alone; keep it behind a firewall")  # fmt: skip
        self.processes, readers, environment = [], [], {**os.environ, "TMPDIR": temporary}
        environment["LAUNCHER_PID"] = str(os.getpid())  # When it is gone, the workers end.
        for index in range(self.workers):
            place = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
            environment["TF_CONFIG"] = json.dumps(place)
            if self.gpus:
                environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, range(index, self.gpus, self.workers)))
            process = subprocess.Popen(
                [sys.executable, "-u", str(self.recipe), *self.flags],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                start_new_session=True,  # Ctrl-C reaches this process alone, which passes it on once.
            )
            self.processes.append(process)
            self.say(f"worker {index} is process {process.pid}")
            for source, target in ((process.stdout, sys.stdout), (process.stderr, sys.stderr)):
                readers.append(threading.Thread(target=self.repeat, args=(source, target, f"[{index}] "), daemon=True))
                readers[-1].start()
        if self.signals:  # It came while there were no workers.
            self.signal_all(signal.SIGTERM)
        running, deadline = dict(enumerate(self.processes)), None
        while running:
            for index, process in list(running.items()):
                if (code := process.poll()) is not None:
                    del running[index]
                    self.say(f"worker {index} {'ended with' if code >= 0 else 'died of signal'} {abs(code)}")
                    deadline = deadline or time.monotonic() + PATIENCE
            if deadline and time.monotonic() > deadline:
                self.signal_all(signal.SIGKILL)
            time.sleep(0.05)
        for reader in readers:
            reader.join()
        return [process.returncode for process in self.processes]

    def pass_on(self, number: int, frame: object) -> None:
        """Passes a signal on to the workers: the first asks them to save and end, the second ends them."""
        if number == signal.SIGHUP and self.signals:
            return
        self.signals += 1
        self.signal_all(signal.SIGTERM if self.signals == 1 else signal.SIGKILL)

    def signal_all(self, number: int) -> None:
        """Sends a signal to all workers that still run."""
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(number)

    def say(self, line: str) -> None:
        """Prints a line of the launcher's own."""
        self.write(sys.stdout, f"[launch] {line}\n")

    def repeat(self, source: TextIO, target: TextIO, prefix: str) -> None:
        """Copies lines, with the number of the worker in front."""
        for line in source:
            self.write(target, prefix + line)

    def write(self, target: TextIO | None, text: str) -> None:
        """Writes at once; if nobody reads it, as behind `| head`, or the disk is full, the training is asked to end."""
        try:
            os.write(target.fileno(), text.encode(target.encoding, "backslashreplace"))
        except AttributeError:  # The launcher was started without this output.
            pass
        except OSError:
            if not self.signals:
                self.pass_on(signal.SIGTERM, None)


def free_ports(count: int) -> list[int]:
    """Ports of the loopback interface that nobody uses now."""
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [each.getsockname()[1] for each in sockets]


def gpu_count() -> int:
    """How many NVIDIA GPUs the driver lists."""
    try:
        listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return 0
    return sum(line.startswith("GPU ") for line in listed.splitlines())


if __name__ == "__main__":
    main()
