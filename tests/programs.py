"""Programs of this project, started by tests.

A process needs 3 s of CPU to import TensorFlow. So programs are forked from one process that has done this.
"""

import atexit
import multiprocessing
import os
import pathlib
import runpy
import subprocess
import sys
import tempfile
import threading

import tensorflow as tf

ROOT = pathlib.Path(__file__).parent.parent
NO_NETWORK = {"HTTPS_PROXY": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9"}
# Variables that none of the imports below reads. With any other, a program is started in the usual way.
READ_LATE = {"COLUMNS", "PYTHONPATH", "PYTHONUNBUFFERED", "TF_CONFIG", "TFDS_DATA_DIR", "TMPDIR", *NO_NETWORK}

FORK_SERVER = multiprocessing.get_context("forkserver")
FORK_SERVER.set_forkserver_preload(["common.data", "common.evaluation", "common.runs", "sklearn.linear_model"])


class ForkedProgram:
    """A Python program, forked. Has the methods of `subprocess.Popen` that tests use; the output is text."""

    def __init__(self, command, cwd=ROOT, env=None, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **_):
        self.args = list(map(str, command[1:]))
        with tempfile.TemporaryDirectory() as folder:
            targets = []
            for number, target in enumerate((stdout, stderr)):
                if target == subprocess.PIPE:
                    targets.append(os.path.join(folder, str(number)))
                    os.mkfifo(targets[-1])
                else:
                    targets.append(target if target == subprocess.STDOUT else target.name)
            environment = dict(os.environ if env is None else env)
            self.process = FORK_SERVER.Process(target=be_program, args=(self.args, str(cwd), environment, targets))
            self.process.start()
            # Opening a pipe waits for the program to open its end.
            self.stdout, self.stderr = (
                open(target) if given == subprocess.PIPE else None  # noqa: SIM115 (closed when it has been read)
                for given, target in zip((stdout, stderr), targets, strict=True)
            )
        self.pid = self.process.pid

    @property
    def returncode(self):
        return self.process.exitcode

    def poll(self):
        return self.process.exitcode

    def wait(self, timeout=None):
        self.process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode

    def communicate(self, timeout=None):
        """Raises `TimeoutExpired` also if the program keeps its output open: a thread reads each pipe."""
        files, texts = [file for file in (self.stdout, self.stderr) if file], {}
        readers = [threading.Thread(target=lambda file=file: texts.update({file: file.read()})) for file in files]
        for reader in readers:
            reader.daemon = True
            reader.start()
        for reader in readers:
            reader.join(timeout)
            if reader.is_alive():
                raise subprocess.TimeoutExpired(self.args, timeout)
        self.wait(timeout)
        for file in files:
            file.close()
        return texts.get(self.stdout), texts.get(self.stderr)

    def send_signal(self, number):
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self):
        self.process.kill()


def start_program(command: list[str | pathlib.Path], **options) -> subprocess.Popen | ForkedProgram:
    """Starts a program as `subprocess.Popen` does, with text as output. Forks it if it is a Python script.

    Not a script with a `common` of its own, nor the launcher, which does without TensorFlow; and none where there is a
    GPU, as CUDA does not work in a fork of a process that has looked for GPUs.
    """
    script = pathlib.Path(options.get("cwd") or ".", *command[1:2]).resolve()
    can_fork = command[0] == sys.executable and script.suffix == ".py" and script.is_file()
    own = [folder / "common" for folder in script.resolve().parents[:2] if (folder / "common").exists()]
    can_fork = can_fork and script.name != "launch.py" and own in ([], [ROOT / "common"])
    changed = dict(set((options.get("env") or os.environ).items()) ^ set(os.environ.items()))
    if not can_fork or changed.keys() - READ_LATE or tf.config.list_physical_devices("GPU"):
        return subprocess.Popen(list(map(str, command)), **{"text": True, **options})
    return ForkedProgram(command, **options)


def run_program(
    *words: str | pathlib.Path, cwd: pathlib.Path = ROOT, **environment: str
) -> subprocess.CompletedProcess:
    """Runs a Python program as a user would, and returns what it printed. `words` begin with a path, `-c` or `-m`."""
    words = tuple(map(str, words))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    program = start_program([sys.executable, *words], cwd=cwd, env={**os.environ, **environment}, **pipes)
    output, errors = program.communicate()
    return subprocess.CompletedProcess(words, program.returncode, output, errors)


def be_program(words: list[str], cwd: str, environment: dict[str, str], targets: list[str | int]) -> None:
    """Becomes `python *words`, with its output in two files or pipes."""
    os.setsid()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None  # It depends on TMPDIR.
    for descriptor, target in enumerate(targets, start=1):
        if target == subprocess.STDOUT:
            os.dup2(1, descriptor)
        else:
            with open(target, "ab") as file:
                os.dup2(file.fileno(), descriptor)
    sys.argv = list(words)
    sys.path[:0] = [
        os.path.dirname(os.path.abspath(words[0])),
        *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep)),
    ]
    try:
        runpy.run_path(words[0], run_name="__main__")
    except Exception:  # As Python itself: the hook of the program first, then the functions of atexit.
        sys.excepthook(*sys.exc_info())
        sys.exit(1)
    finally:
        atexit._run_exitfuncs()  # multiprocessing does not call them; AutoGraph removes its files in one.
