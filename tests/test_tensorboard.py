"""The event files hold every documented tag, and TensorBoard serves them."""

import collections
import contextlib
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
from common.cli import RUNTIME_FLAGS, SharedConfig

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import load_recipe, smoke_config, smoke_data
from programs import ROOT
from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer
from tensorboard.plugins.custom_scalar import layout_pb2

# Tags as the documentation explains them; {} stands for the recipe's metric.
EVERY_RECIPE = {
    *("run_card", "_hparams_/session_start_info", "custom_scalars__config__", "learning_curves", "keras"),
    *("train/loss", "train/{}", "train/learning_rate", "train/examples_per_second"),
    *("validation/loss", "validation/{}", "test/{}"),
}
PLUGINS = {
    "run_card": "text",
    "learning_curves": "images",
    "train/loss": "scalars",
    "custom_scalars__config__": "custom_scalars",
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


def tags(events: EventMultiplexer) -> set[str]:
    return set(events.Runs()["."]["tensors"])


def test_a_training_is_one_run_with_every_documented_tag(recipe, runs):
    events = read(runs(recipe))
    assert set(events.Runs()) == {"."}
    classes = bool(smoke_data(recipe.__name__).class_names)
    expected = {tag.format("accuracy") for tag in EVERY_RECIPE if classes or "{}" not in tag}
    if classes:
        expected |= {"confusion_matrix", "test/precision", "test/recall", "test/f1"}
    else:
        expected |= {"predictions", "test/mse", "test/mae", "test/r2"}
    if recipe.__name__ in ("mnist_cnn", "cifar10_cnn", "text_classifier"):
        expected |= {"examples"}
        if json.loads((runs(recipe) / "result.json").read_text())["metrics"]["accuracy"] < 1:
            expected |= {"worst_mistakes"}
    if recipe.__name__ in ("mnist_cnn", "cifar10_cnn"):
        expected |= {"examples_augmented"}
    if recipe.__name__ == "distillation":
        expected -= {"keras"}  # Keras draws functional models, and the distiller is not one.
    assert expected <= tags(events), expected - tags(events)
    for name in expected & set(PLUGINS):
        assert events.SummaryMetadata(".", name).plugin_data.plugin_name == PLUGINS[name]


def test_the_scalars_are_those_of_the_result(recipe, runs):
    events, result = read(runs(recipe)), json.loads((runs(recipe) / "result.json").read_text())
    for prefix, split in (("", "train"), ("val_", "validation")):
        points = [
            (event.step, float(tf.make_ndarray(event.tensor_proto))) for event in events.Tensors(".", f"{split}/loss")
        ]
        assert points == [(n, pytest.approx(epoch[f"{prefix}loss"])) for n, epoch in enumerate(result["history"])]
    for name, value in result["metrics"].items():
        (event,) = events.Tensors(".", f"test/{name}")
        assert float(tf.make_ndarray(event.tensor_proto)) == pytest.approx(value, rel=1e-6)
        assert event.step == result["steps"]


def test_custom_scalars_show_train_and_validation_in_one_chart(runs):
    (event,) = read(runs(load_recipe("mnist_cnn"))).Tensors(".", "custom_scalars__config__")
    (category,) = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0]).category
    charts = {chart.title: list(chart.multiline.tag) for chart in category.chart}
    assert charts == {name: [f"^(train|validation)/{name}$"] for name in ("accuracy", "loss")}


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
        sizes.append(sum(file.stat().st_size for file in tmp_path.iterdir()))
    first, second, third = np.diff(sizes)
    assert first > 0
    assert second == 0
    assert third > 0


def test_a_resumed_training_stays_one_run_without_doubled_points(tmp_path):
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    sizes = {}
    for epochs in ((0, 1), (1, 2, 3)):  # The epoch after the checkpoint is repeated.
        logs = tensorboard.Logs(tmp_path / "tensorboard", SharedConfig(), sizes)
        logs.set_model(model)
        for epoch in epochs:
            logs.on_epoch_end(epoch, {"loss": 1.0, "val_loss": float(len(epochs))})
            sizes = sizes or logs.sizes()
        logs.on_train_end()
    events = read(tmp_path)
    assert set(events.Runs()) == {"."}
    for split, values in (("train", [1, 1, 1, 1]), ("validation", [2, 3, 3, 3])):
        points = events.Tensors(".", f"{split}/loss")
        assert [event.step for event in points] == [0, 1, 2, 3]
        assert [float(tf.make_ndarray(event.tensor_proto)) for event in points] == values


def test_histograms_are_written_where_asked_for(runs):
    asked, not_asked = (tags(read(runs(load_recipe(name)))) for name in ("mnist_cnn", "cifar10_cnn"))
    assert "dense/kernel/histogram" in asked
    assert not [tag for tag in not_asked if "histogram" in tag]


def test_a_profile_is_written_where_asked_for(tmp_path):
    recipe = load_recipe("linear_regression")
    recipe.train(smoke_config(recipe, tmp_path, profile=True), smoke_data("linear_regression"))
    assert list((tmp_path / "tensorboard" / "plugins").rglob("*.xplane.pb"))


def test_the_documentation_explains_every_tag():
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    explained = set(re.findall(r"^\| `([^`]+)` \|", "".join(map(pathlib.Path.read_text, pages)), flags=re.MULTILINE))
    written = {tag.replace("{}", "*") for tag in EVERY_RECIPE}
    written = {re.sub("^_hparams_/.*", "_hparams_/*", tag) for tag in written}
    written |= {"confusion_matrix", "worst_mistakes", "examples", "examples_augmented", "predictions", "*/histogram"}
    assert written <= explained, written - explained


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


SERVED = ("cifar10_cnn", "mnist_cnn")


@pytest.fixture(scope="module")
def ask(finished_run, tmp_path_factory):
    """Asks a TensorBoard on loopback, started like that of the README, for JSON about the runs of two recipes."""
    folder = tmp_path_factory.mktemp("served")
    for name in SERVED:
        shutil.copytree(finished_run(name)[1] / "tensorboard", folder / name / "run" / "tensorboard")
    port = free_port()
    program = shutil.which("tensorboard", path=pathlib.Path(sys.executable).parent)
    command = [program, "--logdir", str(folder), "--host", "127.0.0.1", "--port", str(port)]

    def ask(path: str) -> dict:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/data/plugin/{path}") as answer:
            return json.load(answer)

    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        found = {}
        while len(found) < len(SERVED):
            assert server.poll() is None
            time.sleep(0.5)
            with contextlib.suppress(OSError):  # Not listening yet.
                found = ask("scalars/tags")
        assert set(found) == {f"{name}/run/tensorboard" for name in SERVED}
        yield ask
    finally:
        server.kill()
        server.wait()


@pytest.mark.long
def test_tensorboard_serves_the_runs(ask, runs):
    history = json.loads((runs(load_recipe("mnist_cnn")) / "result.json").read_text())["history"]
    points = ask("scalars/scalars?run=mnist_cnn%2Frun%2Ftensorboard&tag=validation/accuracy")
    assert [step for _, step, _ in points] == [0, 1]
    assert [value for *_, value in points] == pytest.approx([epoch["val_accuracy"] for epoch in history])


@pytest.mark.long
def test_hparams_begin_with_all_settings_that_differ(ask, runs):
    """Then come the metrics of the test split. Settings of one recipe only are there, too."""
    values = collections.defaultdict(set)
    for name in SERVED:
        config = json.loads((runs(load_recipe(name)) / "config.json").read_text())["config"]
        for key, value in {**config, "recipe": name, "data": smoke_data(name).name}.items():
            values[key].add(value)
    differ = {name for name in values.keys() - RUNTIME_FLAGS if len(values[name]) > 1}
    experiment = ask("hparams/experiment?request=%7B%7D")
    names = [info["name"] for info in experiment["hparamInfos"]]
    assert set(names[: len(differ)]) == differ >= {"recipe", "data", "learning_rate"}
    assert set(names) == values.keys() - RUNTIME_FLAGS
    assert all(info["name"]["tag"].startswith("test/") for info in experiment["metricInfos"][:5])
