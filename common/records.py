"""Atomic file writes, reading of results and models, and the provenance of a result: code, weights and memory."""

import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import platform
import resource
import shlex
import subprocess
import sys
import types
import zipfile
from typing import Any

from common.cli import UserError

import keras
import numpy as np

# Keys of `result.json` that scripts read.
RESULT = (
    *("recipe", "data", "metrics", "parameters", "seconds", "examples_per_second", "history", "task", "class_names"),
    *("columns", "weights_sha256", "model_sha256"),
)


def rename(source: pathlib.Path, target: pathlib.Path) -> None:
    """Renames a file or a folder atomically: after a power failure, either name has the full content."""
    for path in (*source.rglob("*"), source):
        _flush(path)
    os.replace(source, target)
    _flush(target.parent)


def _flush(path: pathlib.Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():  # Some network file systems do not support fsync on folders.
            raise
    finally:
        os.close(descriptor)


def write_file(path: pathlib.Path, content: str | bytes) -> None:
    """Writes a file atomically."""
    part = path.with_name(path.name + ".part")
    part.write_bytes(content.encode() if isinstance(content, str) else content)
    rename(part, path)


def write_json(path: pathlib.Path, content: dict[str, Any]) -> None:
    """Writes a JSON file atomically."""
    write_file(path, json.dumps(content, indent=2) + "\n")


def read_json(path: pathlib.Path, *keys: str) -> dict[str, Any]:
    """Reads a JSON object from a file. Raises a `UserError` if it is unreadable or one of `keys` is missing."""
    try:
        content = json.loads(path.read_bytes())
        if isinstance(content, dict) and content.keys() >= set(keys):
            return content
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror}); name the folder of a run, below runs/") from error
    except (ValueError, RecursionError):
        pass
    raise UserError(f"{path}: not written by a recipe, or damaged; take another run, or train again")


def read_run(folder: pathlib.Path) -> dict[str, Any]:
    """Reads the result of a finished run, with its configuration as `config`. Raises a `UserError` if there is none."""
    if (folder / "config.json").exists() and not (folder / "result.json").exists():
        raise UserError(f"{folder}: a run that is not finished; continue it with --resume, or name another")
    result = read_json(folder / "result.json", *RESULT)
    return {**result, "config": read_json(folder / "config.json", "config")["config"]}


def load_keras(path: pathlib.Path) -> keras.Model:
    """Loads a model from its archive. Rejects zip bombs."""
    with zipfile.ZipFile(path) as archive:
        # Weights are almost incompressible.
        if sum(entry.file_size for entry in archive.infolist()) > 100 * path.stat().st_size:
            raise ValueError("unpacked, it would fill memory and disk")
    return keras.models.load_model(path, compile=False)


def load_program(path: pathlib.Path) -> types.ModuleType:
    """Imports a recipe or a script as a module named after its file. Raises a `UserError` if there is no file."""
    specification = importlib.util.spec_from_file_location(path.stem, path) if path.is_file() else None
    if not specification or not specification.loader:  # No such file, or not named *.py.
        raise UserError(f"{path}: no such program; give the name of one in that folder, or copy yours there")
    module = importlib.util.module_from_spec(specification)
    sys.modules[path.stem] = module  # Dataclasses look up their module.
    specification.loader.exec_module(module)
    return module


def file_sha256(path: pathlib.Path) -> str:
    """Returns the SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def code_sha256() -> str:
    """Returns the SHA-256 of the source files of the main program and of `common`."""
    modules = [module for name, module in sorted(sys.modules.items()) if name.split(".")[0] in ("__main__", "common")]
    files = [file for module in modules if (file := getattr(module, "__file__", None))]
    return hashlib.sha256(b"".join(pathlib.Path(file).read_bytes() for file in files)).hexdigest()


def weights_sha256(model: keras.Model) -> str:
    """Returns the SHA-256 of all weights, in the order of the model. Equal digests mean bit-identical weights."""
    sha256 = hashlib.sha256()
    for values in map(np.ascontiguousarray, model.get_weights()):
        sha256.update(f"{values.dtype}{values.shape}".encode() + values.tobytes())
    return sha256.hexdigest()


def provenance() -> dict[str, Any]:
    """Returns package versions, commits, the command line and the peak memory of this process in bytes.

    `commit` belongs to the repository of this package; `recipe_commit` to that of the program, if it is another one.
    Both are cached, so they describe the code at the first call.
    """
    packages = ("tensorflow", "keras", "tensorflow-datasets", "tensorboard", "numpy", "scikit-learn")
    package, recipe = (commit(pathlib.Path(file).parent) for file in (__file__, sys.argv[0]))
    unit = 1 if sys.platform == "darwin" else 1024  # macOS reports bytes, Linux KiB.
    versions = {name: importlib.metadata.version(name) for name in packages}
    return {
        "versions": {"python": platform.python_version(), **versions},
        "commit": package,
        **({} if recipe == package else {"recipe_commit": recipe}),
        "command": shlex.join(["python", *sys.argv]),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
    }


@functools.cache
def commit(folder: pathlib.Path) -> str | None:
    """Returns the commit of the repository of `folder`, with "-dirty" if files differ; None without repository."""
    command = ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
