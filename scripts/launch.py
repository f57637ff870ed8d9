"""Trains a recipe with several workers on this machine; restarts all if one dies.

    python scripts/launch.py --workers 2 recipes/cifar10_cnn.py -- --epochs 2
    python scripts/launch.py --workers 2 --max-restarts 10 \\
        recipes/cifar10_cnn.py -- --run-dir runs/my_run

Flags after `--` are passed to the recipe. Every line of output is prefixed
with the index of the worker. The workers share the CPU cores and GPUs of this
machine. When a worker dies, the others exit, and the launcher restarts all of
them from the last checkpoint. Ctrl-C and SIGTERM save a checkpoint, end all
workers and exit with 75; a second Ctrl-C kills them. The exit code is that of
the recipe, or 76 if the maximum number of restarts is reached. A worker that
exits with an error of its own (exit code 1) would fail again, so nothing is
restarted.

You don't need this script on several machines: Slurm or Kubernetes starts the
workers there.
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

# Copied from common/: importing it would import TensorFlow, and signals would be ignored until that is done.
EXIT_INTERRUPTED, EXIT_WORKER_LOST = 75, 76
# Seconds to wait for the other workers after the first one exits. A worker that still runs then hangs and is killed.
PATIENCE = 15


def main() -> None:
    own_flags, recipe_flags = own_and_recipe_flags(sys.argv[1:])
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.error = lambda message: parser.exit(2, f"error: {message.removeprefix('argument ')}\n")
    parser.add_argument("recipe", type=pathlib.Path, help="path of the recipe")
    parser.add_argument("--workers", type=int, required=True, help="number of processes")
    parser.add_argument(
        "--max-restarts", type=int, default=3, help="number of restarts after a worker was lost (default: 3)"
    )
    arguments, unknown = parser.parse_known_args(own_flags)
    if unknown:
        parser.error(f"{' '.join(unknown)}: not flags of the launcher; put the flags of the recipe after --")
    if not arguments.recipe.is_file():
        parser.error(f"{arguments.recipe}: no such file; give the path of a recipe, such as recipes/mnist_cnn.py")
    if arguments.workers < 1 or arguments.max_restarts < 0:
        parser.error("--workers: give 1 or more, and --max-restarts 0 or more")
    gpus = gpu_count()
    if 0 < gpus < arguments.workers:
        parser.error(f"--workers {arguments.workers}: this machine has {gpus} GPU(s), and each worker needs its own")
    sys.exit(Launcher(arguments.recipe, arguments.workers, gpus, recipe_flags).run(arguments.max_restarts))


def own_and_recipe_flags(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Splits command-line arguments at the first `--`, which is dropped."""
    separator = arguments.index("--") if "--" in arguments else len(arguments)
    return arguments[:separator], arguments[separator + 1 :]


class Launcher:
    """Starts, watches and ends a group of workers."""

    def __init__(self, recipe: pathlib.Path, workers: int, gpus: int, flags: list[str]):
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        # argparse uses the last value of a repeated flag, so --threads can be overridden.
        self.flags = ["--threads", str(max(1, cores // workers)), *flags]
        if "--resume" not in flags:  # A restart needs the same run directory.
            run_dir = pathlib.Path("runs", recipe.stem, datetime.datetime.now().strftime("%Y%m%d-%H%M%S-%f"))
            self.flags = ["--run-dir", str(run_dir), *self.flags]
        self.recipe, self.workers, self.gpus, self.signals = recipe, workers, gpus, 0
        self.processes: list[subprocess.Popen] = []

    def run(self, max_restarts: int) -> int:
        """Runs the group until it succeeds, is interrupted or exceeds `max_restarts`. Returns the exit code."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP.
                signal.signal(number, self.pass_on)
        for restarts in range(max_restarts + 1):
            # Temporary files of the workers are deleted even if the workers are killed.
            with tempfile.TemporaryDirectory() as folder:
                codes = self.run_once(folder)
            if not any(codes):
                return 0
            if self.signals or {-signal.SIGTERM, -signal.SIGINT} & set(codes):  # Killed before it handles signals.
                return EXIT_INTERRUPTED
            # One worker reports the cause. The others may only report that this worker is lost.
            for code in (2, 3, EXIT_INTERRUPTED):
                if code in codes:
                    return code
            if own_errors := [code for code in codes if code > 0 and code != EXIT_WORKER_LOST]:
                self.say("not restarted: a worker failed with an error, see above")
                return own_errors[0]
            if restarts < max_restarts:
                self.say(f"restart {restarts + 1} of at most {max_restarts}")
                self.flags.append("--resume")
        self.say(f"workers died, and --max-restarts is {max_restarts}; add --resume after the -- to continue")
        return EXIT_WORKER_LOST

    def run_once(self, temporary: str) -> list[int]:
        """Starts all workers, waits until they exit, and returns their exit codes."""
        addresses = [f"127.0.0.1:{port}" for port in free_ports(self.workers)]
        self.say(f"{self.workers} workers on {', '.join(addresses)}: TensorFlow opens these ports to all networks, "
            "not to this machine alone; keep them behind a firewall")  # fmt: skip
        self.processes, readers, environment = [], [], {**os.environ, "TMPDIR": temporary}
        environment["LAUNCHER_PID"] = str(os.getpid())  # Workers exit when this process is gone.
        for index in range(self.workers):
            tf_config = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
            environment["TF_CONFIG"] = json.dumps(tf_config)
            if self.gpus:
                environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, range(index, self.gpus, self.workers)))
            process = subprocess.Popen(
                [sys.executable, "-u", str(self.recipe), *self.flags],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                start_new_session=True,  # Otherwise Ctrl-C would reach the workers twice.
            )
            self.processes.append(process)
            self.say(f"worker {index} is process {process.pid}")
            for source, target in ((process.stdout, sys.stdout), (process.stderr, sys.stderr)):
                readers.append(threading.Thread(target=self.repeat, args=(source, target, f"[{index}] "), daemon=True))
                readers[-1].start()
        if self.signals:  # The signal arrived before the workers were started.
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
        """Forwards a signal: the first one asks the workers to save and exit, the second one kills them."""
        if number == signal.SIGHUP and self.signals:
            return
        self.signals += 1
        self.signal_all(signal.SIGTERM if self.signals == 1 else signal.SIGKILL)

    def signal_all(self, number: int) -> None:
        """Sends a signal to all running workers."""
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(number)

    def say(self, line: str) -> None:
        """Prints a message of the launcher."""
        self.write(sys.stdout, f"[launch] {line}\n")

    def repeat(self, source: TextIO, target: TextIO, prefix: str) -> None:
        """Copies lines from `source` to `target` and prefixes each one."""
        for line in source:
            self.write(target, prefix + line)

    def write(self, target: TextIO | None, text: str) -> None:
        """Writes without buffering. If that fails (closed pipe, full disk), asks the workers to save and exit."""
        try:
            if target:  # Else the process has no such stream.
                os.write(target.fileno(), text.encode(target.encoding, "backslashreplace"))
        except OSError:
            if not self.signals:
                self.pass_on(signal.SIGTERM, None)


def free_ports(count: int) -> list[int]:
    """Returns currently unused ports of the loopback interface."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [server.getsockname()[1] for server in sockets]


def gpu_count() -> int:
    """Returns the number of NVIDIA GPUs that the driver lists."""
    try:
        listing = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return 0
    return sum(line.startswith("GPU ") for line in listing.splitlines())


if __name__ == "__main__":
    main()
