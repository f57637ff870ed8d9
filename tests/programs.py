"""Programs of this project, started by tests.

A process needs 3 s of CPU to import TensorFlow. So all programs are forked from one process that has done this.
"""

import multiprocessing
import os
import pathlib
import runpy
import subprocess
import sys
import tempfile

import tensorflow as tf

ROOT = pathlib.Path(__file__).parent.parent
NO_NETWORK = {"HTTPS_PROXY": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9"}

READ_LATE = {"COLUMNS", "TFDS_DATA_DIR", *NO_NETWORK}  # Variables that none of the imports below reads.

FORK_SERVER = multiprocessing.get_context("forkserver")
FORK_SERVER.set_forkserver_preload(["common.data", "common.evaluation", "common.runs", "sklearn.linear_model"])


def run_program(
    *words: str | pathlib.Path, cwd: pathlib.Path = ROOT, **environment: str
) -> subprocess.CompletedProcess:
    """Runs a Python program as a user would, and returns what it printed.

    `words` begin with a path, `-c` or `-m`. Scripts of this project are forked, if `environment` lets them; not where
    there is a GPU, as CUDA does not work in a fork of a process that has looked for GPUs.
    """
    words = tuple(map(str, words))
    script = pathlib.Path(cwd, words[0]).resolve()
    can_fork = script.is_file() and script.is_relative_to(ROOT) and not tf.config.list_physical_devices("GPU")
    if not can_fork or environment.keys() - READ_LATE:
        return subprocess.run(
            [sys.executable, *words],
            cwd=cwd,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            check=False,
        )
    with tempfile.TemporaryDirectory() as folder:
        files = [str(pathlib.Path(folder, name)) for name in ("stdout", "stderr")]
        process = FORK_SERVER.Process(target=be_program, args=(words, str(cwd), {**os.environ, **environment}, files))
        process.start()
        process.join()
        output, errors = (pathlib.Path(file).read_text() for file in files)
    return subprocess.CompletedProcess(words, process.exitcode, output, errors)


def be_program(words: tuple[str, ...], cwd: str, environment: dict[str, str], files: list[str]) -> None:
    """Becomes `python *words`, with its output in two files."""
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    for descriptor, path in enumerate(files, start=1):
        with open(path, "wb") as file:
            os.dup2(file.fileno(), descriptor)
    sys.argv = list(words)
    sys.path.insert(0, os.path.dirname(os.path.abspath(words[0])))
    runpy.run_path(words[0], run_name="__main__")
