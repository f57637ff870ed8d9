"""The run directory: selection, locking, and checks before a run is resumed."""

import contextlib
import datetime
import fcntl
import os
import pathlib
import platform
from typing import Any, BinaryIO

from common.cli import RUNTIME_FLAGS, AlreadyFinishedError, SharedConfig, UserError
from common.records import RESULT, file_sha256, read_json

# Files that may exist before a run begins: the lock, and an incomplete file.
IGNORED_FILES = {"lock", "config.json.part"}
_locks: dict[pathlib.Path, BinaryIO] = {}


def choose_directory(recipe: str, config: SharedConfig) -> pathlib.Path:
    """Returns `--run-dir`; else, with `--resume`, the latest unfinished run; else a new folder named by the time."""
    if config.run_dir:
        return pathlib.Path(config.run_dir)
    runs = []
    if config.resume:
        found = sorted(pathlib.Path("runs").rglob("config.json"), key=os.path.getmtime)
        runs = [file.parent for file in found if _recipe_of(file.parent) == recipe]
    unfinished = [run for run in runs if not (run / "result.json").exists()]
    new = pathlib.Path("runs", recipe, datetime.datetime.now().strftime("%Y%m%d-%H%M%S-%f"))
    return (unfinished or runs or [new])[-1]


def _recipe_of(directory: pathlib.Path) -> str:
    with contextlib.suppress(UserError):  # `resumed_settings` reports a damaged file.
        return read_json(directory / "config.json", "recipe")["recipe"]
    return directory.parent.name


def is_used(directory: pathlib.Path, resume: bool) -> bool:
    """Returns whether `directory` contains a run. Raises a `UserError` if it can't be used."""
    try:
        found = set(os.listdir(directory)) - IGNORED_FILES
    except FileNotFoundError:
        return False
    except OSError as error:
        raise UserError(f"--run-dir {directory}: {error.strerror}; choose an empty or a new one") from error
    if found and not resume:
        raise UserError(f"--run-dir {directory}: is not empty; choose a new folder, or continue its run with --resume")
    return bool(found)


def lock(directory: pathlib.Path) -> None:
    """Locks a run directory against other processes, until `unlock` or the end of this process.

    The lock file is never deleted: otherwise two processes could lock different files of the same name. Raises a
    `UserError` that names the process that holds the lock, or says why the file can't be written.
    """
    unlock(directory)  # An earlier run of this process may have locked it.
    path = (directory / "lock").resolve()
    try:
        file = open(path, "a+b", buffering=0)  # noqa: SIM115
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        with file:  # pyright: ignore[reportGeneralTypeIssues]: it is open, because only `flock` raises this
            holder = path.read_text(errors="replace") or "another process"
        raise UserError(f"--run-dir {directory}: in use by {holder}; wait for it, or choose another") from error
    except OSError as error:
        raise UserError(f"--run-dir {directory}: {error.strerror}; choose an empty or a new one") from error
    _locks[path] = file
    with contextlib.suppress(OSError):  # Ignore a full disk: the content is only used in the error above.
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}".encode())


def unlock(directory: pathlib.Path) -> bool:
    """Unlocks a run directory. Returns whether this process held the lock."""
    file = _locks.pop((directory / "lock").resolve(), None)
    if file:
        file.close()
    return file is not None


def resumed_settings(directory: pathlib.Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Locks the run in `directory` and returns its settings, with `resumed` incremented.

    Raises:
        UserError: there is no run, the run is damaged or in use, or its settings differ from `settings`.
        AlreadyFinishedError: the run is finished.
    """
    if not (directory / "config.json").exists():
        raise UserError(f"--run-dir {directory}: holds no run; choose a new folder, or that of a run to resume")
    saved = read_json(directory / "config.json", "recipe", "config", "chosen", "files", "resumed")
    if saved["recipe"] != (recipe := settings["recipe"]):
        raise UserError(f"--run-dir {directory}: a run of {saved['recipe']}, not of {recipe}; choose another")
    may_change = RUNTIME_FLAGS if settings["config"]["deterministic"] else {*RUNTIME_FLAGS, "threads"}
    changes = {}
    for section, ignored in (("config", RUNTIME_FLAGS), ("chosen", may_change), ("files", ())):
        for name in [name for name in {**saved[section], **settings[section]} if name not in ignored]:
            old, new = saved[section].get(name), settings[section].get(name)
            if old != new:
                changes[name] = f"{name} was {old!r} and is {new!r}"
    if changes:
        run = f"{directory}{', a finished run' * (directory / 'result.json').exists()}"
        raise UserError(f"--resume: in {run}, {'; '.join(changes.values())}; give the same flags, or start a new run")
    lock(directory)
    if (directory / "result.json").exists():
        unlock(directory)
        result, model = read_json(directory / "result.json", *RESULT), directory / "model.keras"
        if not model.is_file() or file_sha256(model) != result["model_sha256"]:
            raise UserError(f"{model}: missing or changed since the training; restore it, or start a new run")
        more = f"to train its model further, start a new run with --init-from {directory}"
        raise AlreadyFinishedError(f"{directory}: finished already; {more}")
    return {**saved, "resumed": saved["resumed"] + 1}
