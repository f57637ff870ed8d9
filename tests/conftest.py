import fcntl
import functools
import importlib.util
import json
import os
import pathlib
import signal
import subprocess
import sys
import types
from collections.abc import Callable, Sequence

from common import console
from common.cli import SharedConfig
from common.data import Data
from common.hardware import apply, choose, describe_machine

import pytest
import tensorflow as tf
from programs import ROOT, run_program
from worker import SMALL

SHARED = {"mnist_cnn": ("--histograms",)}  # More flags of the runs that tests share.
RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("*.py"))

# The tests of this process run on the CPU, also where there are GPUs: tests/test_gpu.py is for these.
tf.config.set_visible_devices([], "GPU")
# Two logical CPU devices for all tests of this process, so that `none` and `mirrored` can both run in it.
TWO_DEVICES = SharedConfig(devices=2, threads=2, deterministic=True)
apply(choose(describe_machine(), TWO_DEVICES), TWO_DEVICES)


@functools.cache
def load_recipe(name: str) -> types.ModuleType:
    specification = importlib.util.spec_from_file_location(name, ROOT / "recipes" / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module  # Dataclasses look their module up.
    specification.loader.exec_module(module)
    return module


@functools.cache
def smoke_data(name: str) -> Data:
    """A recipe's sample, cut small."""
    module = load_recipe(name)
    return module.load_data(module.Config(data="sample", smoke=True))


@pytest.fixture(params=RECIPES)
def recipe(request) -> types.ModuleType:
    return load_recipe(request.param)


def pytest_collection_modifyitems(items):
    """The slowest tests first, so that no worker is left alone with one at the end."""
    items.sort(key=lambda item: item.path.stem != "test_torture" and item.name != "test_commands_and_programs_run")


def short_set(*names: str, slow: Sequence[str] = ()) -> pytest.MarkDecorator:
    """Runs a test for all recipes; for those that are not named, only with `scripts/test.sh --all`.

    `slow` names those that train as another does, and take long: they run with `-m slow` only.
    """
    marks = {name: () if name in names else pytest.mark.slow if name in slow else pytest.mark.long for name in RECIPES}
    return pytest.mark.parametrize("recipe", [pytest.param(name, marks=marks[name]) for name in RECIPES], indirect=True)


def pytest_report_header(config):
    """Says what is run, and how long that takes about."""
    if config.option.markexpr.startswith("not long"):
        return "the short set: about six minutes on two cores; scripts/test.sh --all: about twenty-five"
    return None


@pytest.fixture(autouse=True)
def process_state(monkeypatch):
    """A recipe's signal handlers, and its --quiet, are not for the tests that follow."""
    monkeypatch.setattr(console, "shown", True)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def smoke_config(recipe: types.ModuleType, run_dir: pathlib.Path, **settings):
    """A small deterministic configuration for runs inside the test process."""
    standard = {"data": "sample", "smoke": True, "epochs": 2, "strategy": "none", "quiet": True}
    standard |= {"threads": 2, "deterministic": True, "baseline": False, "run_dir": str(run_dir)}
    return recipe.Config(**{**standard, **SMALL.get(recipe.__name__, {}), **settings})


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory) -> Callable[[str], tuple[subprocess.CompletedProcess, pathlib.Path]]:
    """Gives a smoke run of a recipe: what its program printed, and the run directory, NAME/run.

    A run is trained when a test first asks for it, once for all test processes. It is not to be changed.
    """
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "finished"

    @functools.cache
    def run_of(name: str) -> tuple[subprocess.CompletedProcess, pathlib.Path]:
        place = folder / name
        place.mkdir(parents=True, exist_ok=True)
        printed = place / "printed.json"
        with open(place / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not printed.exists():
                run = run_smoke(name, place, *SHARED.get(name, ()), "--run-dir", "run")
                printed.write_text(json.dumps([run.args, run.returncode, run.stdout, run.stderr]))
        return subprocess.CompletedProcess(*json.loads(printed.read_text())), place / "run"

    return run_of


def run_smoke(name: str, directory: pathlib.Path, *flags: str) -> subprocess.CompletedProcess:
    """Starts a recipe from a foreign directory; no file of this repository is in the way of its imports."""
    path = os.path.relpath(ROOT / "recipes" / f"{name}.py", directory)
    return run_program(
        path, "--smoke", "--data", "sample", "--deterministic", *small_flags(name), *flags, cwd=directory
    )


def small_flags(name: str) -> list[str]:
    """The settings of `SMALL` as flags of the recipe."""
    return [f"--{key.replace('_', '-')}={value}" for key, value in SMALL.get(name, {}).items()]
