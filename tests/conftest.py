import functools
import importlib.util
import pathlib
import signal
import sys
import types

from common.cli import SharedConfig
from common.data import Data
from common.hardware import apply, choose, describe_machine

import pytest
import tensorflow as tf
from programs import ROOT
from worker import SMALL

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
    """The slowest file first, so that no worker is left alone with it at the end."""
    items.sort(key=lambda item: item.path.stem != "test_torture")


@pytest.fixture(autouse=True)
def signal_handlers():
    """What a recipe does on SIGINT and SIGTERM is not for the tests that follow."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def smoke_config(recipe: types.ModuleType, run_dir: pathlib.Path, **settings):
    """A small deterministic configuration for runs inside the test process."""
    standard = {"data": "sample", "smoke": True, "epochs": 2, "strategy": "none", "quiet": True}
    standard |= {"threads": 2, "deterministic": True, "baseline": False, "run_dir": str(run_dir)}
    return recipe.Config(**{**standard, **SMALL.get(recipe.__name__, {}), **settings})
