"""The event files hold every documented tag, and TensorBoard serves them."""

import json
import pathlib
import re
import shutil
import socket
import subprocess
import sys
import time
import types
import urllib.request

from common import tensorboard
from common.cli import SharedConfig

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import load_recipe, smoke_config, smoke_data
from programs import ROOT
from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer

# Tag by TensorBoard run, as docs/tensorboard.md explains them; {} stands for the recipe's metric.
EVERY_RECIPE = {
    ".": {"run_card", "_hparams_/session_start_info", "_hparams_/experiment", "test/{}", "learning_curves"},
    "train": {"epoch_loss", "epoch_{}", "epoch_learning_rate", "epoch_examples_per_second", "keras"},
    "validation": {"epoch_loss", "epoch_{}"},
}
PLUGINS = {
    "run_card": "text",
    "learning_curves": "images",
    "epoch_loss": "scalars",
    "keras": "graph_keras_model",
    "confusion_matrix": "images",
    "_hparams_/session_start_info": "hparams",
    "examples_augmented": "images",
}


@pytest.fixture
def runs(finished_run):
    return lambda recipe: finished_run(recipe.__name__)[1]


def read(directory: pathlib.Path) -> EventMultiplexer:
    events = EventMultiplexer().AddRunsFromDirectory(str(directory / "tensorboard"))
    return events.Reload()


def tags(events: EventMultiplexer, run: str) -> set[str]:
    return set(events.Runs()[run]["tensors"])


def test_every_documented_tag_is_written(recipe, runs):
    events = read(runs(recipe))
    classes = bool(smoke_data(recipe.__name__).class_names)
    metric = "accuracy" if classes else "mae"
    expected = {run: {tag.format(metric) for tag in names} for run, names in EVERY_RECIPE.items()}
    if classes:
        expected["."] |= {"confusion_matrix", "test/precision", "test/recall", "test/f1"}
    else:
        expected["."] |= {"predictions", "test/mse", "test/r2"}
    if recipe.__name__ in ("mnist_cnn", "cifar10_cnn", "text_classifier"):
        expected["."] |= {"examples"}
        if json.loads((runs(recipe) / "result.json").read_text())["metrics"]["accuracy"] < 1:
            expected["."] |= {"worst_mistakes"}
    if recipe.__name__ in ("mnist_cnn", "cifar10_cnn"):
        expected["."] |= {"examples_augmented"}
    if recipe.__name__ == "distillation":
        expected["train"] -= {"keras"}  # Keras draws functional models, and the distiller is none.
    for run, names in expected.items():
        assert names <= tags(events, run), names - tags(events, run)
        for name in names & set(PLUGINS):
            assert events.SummaryMetadata(run, name).plugin_data.plugin_name == PLUGINS[name]


def test_the_scalars_are_those_of_the_result(recipe, runs):
    events, result = read(runs(recipe)), json.loads((runs(recipe) / "result.json").read_text())
    for prefix, run in (("", "train"), ("val_", "validation")):
        logged = [float(tf.make_ndarray(event.tensor_proto)) for event in events.Tensors(run, "epoch_loss")]
        assert logged == pytest.approx([epoch[f"{prefix}loss"] for epoch in result["history"]], rel=1e-6)
    for name, value in result["metrics"].items():
        (event,) = events.Tensors(".", f"test/{name}")
        assert float(tf.make_ndarray(event.tensor_proto)) == pytest.approx(value, rel=1e-6)
        assert event.step == result["steps"]


def test_the_run_card_says_what_was_run(recipe, runs):
    (event,) = read(runs(recipe)).Tensors(".", "run_card")
    text = event.tensor_proto.string_val[0].decode()
    card = json.loads(text.removeprefix("```\n").removesuffix("\n```"))
    data = smoke_data(recipe.__name__)
    assert card["data"] == {"name": data.name, "source": data.source, **data.counts()}
    assert (card["config"]["epochs"], card["hardware"]["strategy"]) == (2, "none")
    assert card["versions"]["keras"] == keras.__version__
    assert card["command"].startswith("python ")


def test_epochs_reach_the_disk_once_a_second(tmp_path, monkeypatch):
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    logs = tensorboard.Logs(tmp_path, SharedConfig(), {})
    logs.set_model(model)
    sizes = [0]
    for epoch, now in enumerate([100.0, 100.9, 101.0]):
        monkeypatch.setattr(tensorboard, "time", types.SimpleNamespace(monotonic=lambda now=now: now))
        logs.on_epoch_end(epoch, {"loss": 1.0})
        sizes.append(sum(file.stat().st_size for file in (tmp_path / "train").iterdir()))
    first, second, third = np.diff(sizes)
    assert first > 0
    assert second == 0
    assert third > 0


def test_histograms_are_written_where_asked_for(runs):
    asked, not_asked = (tags(read(runs(load_recipe(name))), "train") for name in ("mnist_cnn", "cifar10_cnn"))
    assert "dense/kernel/histogram" in asked
    assert not [tag for tag in not_asked if "histogram" in tag]


def test_a_profile_is_written_where_asked_for(tmp_path):
    recipe = load_recipe("linear_regression")
    recipe.train(smoke_config(recipe, tmp_path, profile=True), smoke_data("linear_regression"))
    assert list((tmp_path / "tensorboard").rglob("*.xplane.pb"))


def test_the_documentation_explains_every_tag():
    page = (ROOT / "docs" / "tensorboard.md").read_text()
    explained = set(re.findall(r"^\| `([^`]+)` \|", page, flags=re.MULTILINE))
    written = {tag.replace("{}", "*") for names in EVERY_RECIPE.values() for tag in names}
    written = {re.sub("^_hparams_/.*", "_hparams_/*", tag) for tag in written}
    written |= {"confusion_matrix", "worst_mistakes", "examples", "examples_augmented", "predictions", "*/histogram"}
    assert written <= explained, written - explained


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.long
def test_tensorboard_serves_the_runs(runs):
    """The command of the README, on loopback: its scalars over HTTP."""
    directory = runs(load_recipe("mnist_cnn"))
    runs(load_recipe("cifar10_cnn"))
    port = free_port()
    program = shutil.which("tensorboard", path=pathlib.Path(sys.executable).parent)
    command = [program, "--logdir", str(directory.parent.parent), "--host", "127.0.0.1", "--port", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        found = {}
        while len(found) < 2 and server.poll() is None:
            time.sleep(0.5)
            try:
                address = f"http://127.0.0.1:{port}/data/plugin/scalars/tags"
                with urllib.request.urlopen(address) as answer:
                    found = {run: names for run, names in json.load(answer).items() if run.endswith("/validation")}
            except OSError:
                continue  # Not listening yet.
        assert set(found) >= {f"{name}/run/tensorboard/validation" for name in ("mnist_cnn", "cifar10_cnn")}
        query = f"scalars?run={directory.parent.name}%2Frun%2Ftensorboard%2Fvalidation&tag=epoch_accuracy"
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/data/plugin/scalars/{query}") as answer:
            points = json.load(answer)
        history = json.loads((directory / "result.json").read_text())["history"]
        assert [step for _, step, _ in points] == [0, 1]
        assert [value for *_, value in points] == pytest.approx([epoch["val_accuracy"] for epoch in history])
    finally:
        server.kill()
        server.wait()
