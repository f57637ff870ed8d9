"""Files that are written whole or not at all, and what a result states of its code, weights and memory."""

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
from typing import Any

from common.cli import UserError

import keras
import numpy as np

# What scripts read of a result.
RESULT = (
    *("recipe", "data", "metrics", "parameters", "seconds", "examples_per_second", "history", "task", "class_names"),
    *("columns", "weights_sha256", "model_sha256"),
)


def rename(source: pathlib.Path, target: pathlib.Path) -> None:
    """Renames a file or a folder so that a power cut leaves the whole content under the new name, or the old."""
    for path in (*source.rglob("*"), source):
        _flush(path)
    os.replace(source, target)
    _flush(target.parent)


def _flush(path: pathlib.Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():  # Some network file systems refuse that of folders.
            raise
    finally:
        os.close(descriptor)


def write_file(path: pathlib.Path, content: str | bytes) -> None:
    """Writes a file whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_bytes(content.encode() if isinstance(content, str) else content)
    rename(part, path)


def write_json(path: pathlib.Path, content: dict[str, Any]) -> None:
    """Writes a JSON file whole or not at all."""
    write_file(path, json.dumps(content, indent=2) + "\n")


def read_json(path: pathlib.Path, *keys: str) -> dict[str, Any]:
    """Reads a JSON file that holds an object with these keys; a `UserError` if it can't be read or holds others."""
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
    """The result of a finished run, and under `config` its configuration; a `UserError` if there is none."""
    if (folder / "config.json").exists() and not (folder / "result.json").exists():
        raise UserError(f"{folder}: a run that is not finished; continue it with --resume, or name another")
    result = read_json(folder / "result.json", *RESULT)
    return {**result, "config": read_json(folder / "config.json", "config")["config"]}


def load_program(path: pathlib.Path) -> types.ModuleType:
    """Imports a recipe or a script from its file, under the name of that file; a `UserError` if there is none."""
    if not path.is_file():
        raise UserError(f"{path}: no such program; give the name of one in that folder, or copy yours there")
    specification = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(specification)
    sys.modules[path.stem] = module  # Dataclasses look their module up.
    specification.loader.exec_module(module)
    return module


def file_sha256(path: pathlib.Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def code_sha256() -> str:
    """Digest of the program's own modules, wherever they lie."""
    own = [module for name, module in sorted(sys.modules.items()) if name.split(".")[0] in ("__main__", "common")]
    files = [module.__file__ for module in own if getattr(module, "__file__", None)]
    return hashlib.sha256(b"".join(pathlib.Path(file).read_bytes() for file in files)).hexdigest()


def weights_sha256(model: keras.Model) -> str:
    """SHA-256 over the weights in the model's order: equal digests, bit-identical weights."""
    sha256 = hashlib.sha256()
    for values in map(np.ascontiguousarray, model.get_weights()):
        sha256.update(f"{values.dtype}{values.shape}".encode() + values.tobytes())
    return sha256.hexdigest()


def provenance() -> dict[str, Any]:
    """Which code with which packages gave a result, and the most memory it held at any one time, in bytes.

    `commit` is that of the repository of this package, `recipe_commit` that of the program's, where it is another; each
    as the process found it first.
    """
    packages = ("tensorflow", "keras", "tensorflow-datasets", "tensorboard", "numpy", "scikit-learn")
    package, recipe = (commit(pathlib.Path(file).parent) for file in (__file__, sys.argv[0]))
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts in bytes, Linux in KiB.
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
    """The commit of the repository around `folder`, marked where files differ from it; None if there is none."""
    command = ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
