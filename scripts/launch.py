"""Trains a recipe with several worker processes on this machine, and starts them again when one of them dies.

    python scripts/launch.py --workers 2 recipes/cifar10_cnn.py -- --epochs 2
    python scripts/launch.py --workers 2 --max-restarts 10 recipes/cifar10_cnn.py -- --run-dir runs/my_run

Flags behind `--` go to the recipe. Each line that a worker prints begins with its number. The workers share the
cores of this machine, and its GPUs where it has some. When one dies, the others end; then all start again, from the
last checkpoint. Ctrl-C and SIGTERM save, end all workers, and exit with 75; a second Ctrl-C ends them at once.
Exit codes are those of the recipe, and 76 when the restarts are used up. After an error of its own (exit code 1), a
worker would come to the same end again: then none is started.

On several machines nothing needs this script: there, Slurm or Kubernetes starts the workers.
"""

import argparse
import contextlib
import ctypes
import datetime
import itertools
import json
import math
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

# As in common/, which would bring TensorFlow along, and make the launcher slow to answer to signals.
EXIT_INTERRUPTED, EXIT_WORKER_LOST = 75, 76
# Seconds: when a worker ends badly, the others hear of it at once; when one is stopped, they notice within 10.
PATIENCE_AFTER_END, PATIENCE_AFTER_STOP = 10, 15
MOST_WORKERS = 1000
# What the launcher sends itself when its output is closed.
NOBODY_READS = signal.SIGUSR1
_LIBC, _PR_SET_PDEATHSIG = ctypes.CDLL(None), 1


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
    if not 1 <= arguments.workers <= MOST_WORKERS:
        parser.error(f"--workers {arguments.workers}: give 1 to {MOST_WORKERS}")
    if arguments.max_restarts < 0:
        parser.error(f"--max-restarts {arguments.max_restarts}: give 0 or more")
    words = " ".join(flags).replace("=", " ").split()
    for before, after in itertools.pairwise(words):
        if before == "--strategy" and after not in ("auto", "multi-worker"):
            parser.error(f"--strategy {after}: several workers train by one of their own; leave it out")
    gpus = gpu_count()
    if 0 < gpus < arguments.workers:
        parser.error(f"--workers {arguments.workers}: this machine has {gpus} GPU(s), and each worker needs its own")
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # The launcher was started without one.
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        getattr(sys, name).reconfigure(errors="backslashreplace")
    launcher = Launcher(arguments.recipe, arguments.workers, gpus, flags)
    try:
        sys.exit(launcher.run(arguments.max_restarts))
    except OSError as error:  # Of ports, files or processes there are too few for so many.
        launcher.signal_all(signal.SIGKILL)
        parser.error(f"--workers {arguments.workers}: can't be started ({error.strerror}); start fewer")


def own_and_recipe_flags(words: list[str]) -> tuple[list[str], list[str]]:
    """The words before the first `--`, and those behind it."""
    place = words.index("--") if "--" in words else len(words)
    return words[:place], words[place + 1 :]


class Launcher:
    """A group of workers that live and die together."""

    def __init__(self, recipe: pathlib.Path, workers: int, gpus: int, flags: list[str]):
        # Of a flag that is given twice, the last one counts.
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.flags = ["--threads", str(max(1, cores // workers)), *flags]
        if "--resume" not in flags:  # A restart must find it again.
            run_dir = pathlib.Path("runs", recipe.stem, datetime.datetime.now().strftime("%Y%m%d-%H%M%S-%f"))
            self.flags = ["--run-dir", str(run_dir), *self.flags]
        self.recipe, self.workers, self.gpus = recipe, workers, gpus
        self.signals, self.temporary = 0, ""
        self.processes: list[subprocess.Popen] = []

    def run(self, max_restarts: int) -> int:
        """Runs the group until it ends well, was asked to stop, or has been restarted too often; its exit code."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, NOBODY_READS):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # Ignored by nohup.
                signal.signal(number, self.pass_on)
        for restarts in range(max_restarts + 1):
            # Whichever way the workers end, what they leave in temporary files goes with it.
            with tempfile.TemporaryDirectory() as folder:
                self.temporary = folder
                codes = self.run_once()
            if not any(codes):
                return 0
            if self.signals:
                return EXIT_INTERRUPTED
            # What a worker said itself, and the others only repeated.
            for code in (2, 3, EXIT_INTERRUPTED):
                if code in codes:
                    return code
            if {-signal.SIGTERM, -signal.SIGINT} & set(codes):  # Before the recipe could answer to them.
                return EXIT_INTERRUPTED
            if own_errors := [code for code in codes if code > 0 and code != EXIT_WORKER_LOST]:
                say("not started again: a worker ended by an error of its own, see above")
                return own_errors[0]
            if restarts < max_restarts:
                say(f"restart {restarts + 1} of at most {max_restarts}")
                self.flags.append("--resume")
        say(f"workers died, and --max-restarts is {max_restarts}; the same command with --resume behind the -- goes on")
        return EXIT_WORKER_LOST

    def run_once(self) -> list[int]:
        """Starts all workers, waits for their end, and returns their exit codes."""
        addresses = [f"127.0.0.1:{port}" for port in free_ports(self.workers)]
        say(f"{self.workers} workers on {', '.join(addresses)}: TensorFlow opens these ports to all networks, "
            "not to this machine alone; keep it behind a firewall")  # fmt: skip
        self.processes, readers = [], []
        for index in range(self.workers):
            process = subprocess.Popen(
                # What the result is compared with, the chief alone needs to train.
                [sys.executable, "-u", str(self.recipe), *self.flags, *(["--no-baseline"] if index else [])],
                env=self.environment(addresses, index),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                start_new_session=True,  # Ctrl-C reaches this process alone, which passes it on once.
                preexec_fn=_die_with_parent if sys.platform == "linux" else None,
            )
            self.processes.append(process)
            say(f"worker {index} is process {process.pid}")
            for source, target in ((process.stdout, sys.stdout), (process.stderr, sys.stderr)):
                readers.append(threading.Thread(target=repeat, args=(source, target, f"[{index}] "), daemon=True))
                readers[-1].start()
        if self.signals:  # It came between two lives of the group.
            self.signal_all(signal.SIGTERM)
        deadline, stopped = None, {}
        running = dict(enumerate(self.processes))
        while running:
            for index, process in list(running.items()):
                code = process.poll()
                if code is None:
                    if is_stopped(process.pid):  # It does not end by itself, but may be continued.
                        stopped.setdefault(index, time.monotonic() + PATIENCE_AFTER_STOP)
                    else:
                        stopped.pop(index, None)
                    continue
                del running[index]
                say(f"worker {index} ended with {code}" if code >= 0 else f"worker {index} died of signal {-code}")
                if code and deadline is None:
                    deadline = time.monotonic() + PATIENCE_AFTER_END
            if time.monotonic() > min([deadline or math.inf, *stopped.values()]):
                self.signal_all(signal.SIGKILL)
            time.sleep(0.05)
        for reader in readers:
            reader.join()
        return [process.returncode for process in self.processes]

    def environment(self, addresses: list[str], index: int) -> dict[str, str]:
        """The variables of a worker: its place in the cluster, its share of the GPUs, and where temporary files go."""
        cluster = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
        environment = {**os.environ, "TF_CONFIG": json.dumps(cluster), "TMPDIR": self.temporary}
        if self.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, range(index, self.gpus, self.workers)))
        return environment

    def pass_on(self, number: int, frame: object) -> None:
        """Passes a signal on to the workers: the first asks them to save and end, the second ends them."""
        if number in (signal.SIGHUP, NOBODY_READS) and self.signals:  # Nobody is in a hurry.
            return
        self.signals += 1
        self.signal_all(signal.SIGTERM if self.signals == 1 else signal.SIGKILL)

    def signal_all(self, number: int) -> None:
        """Sends a signal to all workers that are still there."""
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(number)


def say(line: str) -> None:
    """Prints a line of the launcher's own."""
    write(sys.stdout, f"[launch] {line}\n")


def repeat(source: TextIO, target: TextIO, prefix: str) -> None:
    """Copies lines, with the number of the worker in front."""
    for line in source:
        write(target, prefix + line)


def write(target: TextIO, text: str) -> None:
    """Writes at once; if it can't, as behind `| head` or on a full disk, the training is asked to end."""
    try:
        target.write(text)
        target.flush()
    except OSError:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), target.fileno())
        os.kill(os.getpid(), NOBODY_READS)


def is_stopped(pid: int) -> bool:
    """Whether a child process has been stopped, as by SIGSTOP, and not continued."""
    with contextlib.suppress(ChildProcessError):  # It has ended meanwhile.
        return os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOHANG | os.WNOWAIT) is not None
    return False


def free_ports(count: int) -> list[int]:
    """Ports of the loopback interface that nobody uses now."""
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def gpu_count() -> int:
    """How many NVIDIA GPUs the driver lists."""
    try:
        listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return 0
    return sum(line.startswith("GPU ") for line in listed.splitlines())


def _die_with_parent() -> None:
    # Even a launcher that is killed leaves no worker behind.
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    main()
