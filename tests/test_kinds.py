"""Made-up recipes of kinds that the collection does not have yet, from training to prediction and export.

Masks of pictures, series from a dictionary of inputs to one of outputs, and texts from texts.
"""

import dataclasses
import time

from common import artefacts
from common.batches import Split, evaluation_batches, evaluation_steps, steps_per_epoch, training_batches
from common.cli import SharedConfig, UserError
from common.data import Data, _cut
from common.evaluation import Report
from common.runs import start_run

import export
import keras
import numpy as np
import predict
import pytest
import tensorflow as tf
from conftest import smoke_data
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


@dataclasses.dataclass(frozen=True)
class Config(SharedConfig):
    epochs: int = 10
    batch_size: int = 16
    learning_rate: float = 0.03
    quiet: bool = True
    strategy: str = "none"
    threads: int = 2


def masks(config: Config) -> tuple[Data, keras.Model]:
    """A bright square on a dark ground; which pixels are of the square."""
    random = np.random.default_rng(0)
    inputs = random.integers(0, 90, (240, 8, 12, 3)).astype(np.uint8)
    targets = np.zeros([240, 8, 12], np.int32)
    for image, mask, (top, left) in zip(inputs, targets, random.integers(0, 5, (240, 2)), strict=True):
        image[top : top + 3, left : left + 3] += 120
        mask[top : top + 3, left : left + 3] = 1
    task = {"input": "image", "output": "mask"}
    arrays = {"train": (inputs[:200], targets[:200]), "test": (inputs[200:], targets[200:])}
    data = _cut("squares", "generated", task, arrays, config, time.perf_counter(), class_names=("ground", "square"))
    images = keras.Input([8, 12, 3], dtype="uint8", name="image")
    x = keras.layers.Conv2D(8, 3, padding="same", activation="relu")(keras.layers.Rescaling(1 / 255)(images))
    return data, keras.Model(images, keras.layers.Conv2D(2, 1, activation="softmax")(x))


def series(config: Config) -> tuple[Data, keras.Model]:
    """Two columns over time and a level; their difference, and the sum of it and the level."""
    random = np.random.default_rng(0)
    past, level = random.normal(size=(240, 10, 2)).astype(np.float32), random.integers(0, 3, 240).astype(np.int32)
    difference = past[..., :1] - past[..., 1:]
    inputs = {"past": past, "level": level[:, None]}
    targets = {"difference": difference, "raised": difference + level[:, None, None]}
    task = {"input": "series", "output": "series"}
    data = _cut("two columns", "generated", task, {"train": (inputs, targets)}, config, time.perf_counter())
    past, level = keras.Input([10, 2], name="past"), keras.Input([1], dtype="int32", name="level")
    difference = keras.layers.Conv1D(1, 1, name="difference")(past)
    raised = keras.layers.Add(name="raised")([difference, keras.layers.Embedding(3, 1)(level)])
    return data, keras.Model({"past": past, "level": level}, {"raised": raised, "difference": difference})


def texts(config: Config) -> tuple[Data, keras.Model]:
    """Six letters; the same in capitals."""
    letters = np.random.default_rng(0).choice(list("abc"), (240, 6))
    inputs = np.array(["".join(row).encode() for row in letters], object)
    targets = np.searchsorted(list("abc"), letters).astype(np.int32)
    task = {"input": "text", "output": "text"}
    data = _cut("letters", "generated", task, {"train": (inputs, targets)}, config, time.perf_counter())
    tokens = keras.layers.TextVectorization(split="character", vocabulary=[*"abc"], output_sequence_length=6)
    strings = keras.Input([], dtype="string", name="text")
    tokenizer = keras.Model(strings, tokens(strings))
    numbers = keras.Input([6], dtype="int64", name="tokens")
    x = keras.layers.Embedding(5, 3)(numbers)
    network = keras.Model(numbers, keras.layers.Activation("softmax")(x))
    return data, keras.Model(strings, network(tokenizer(strings)))


def mirrored(inputs, targets, random):
    return tf.nest.map_structure(lambda part: part[:, :, ::-1], (inputs, targets))


RECIPES = {"masks": masks, "series": series, "texts": texts}


def train(config: Config, name: str) -> tuple[Data, keras.Model, dict[str, float]]:
    run, augment = start_run(config), mirrored if name == "masks" else None
    loss = "mse" if name == "series" else "sparse_categorical_crossentropy"
    with run.strategy.scope():
        data, model = RECIPES[name](config)
        model.compile(keras.optimizers.Adam(config.learning_rate), loss)
    examples, network = data.train, model
    if name == "texts":  # Tokenized once, not in every epoch.
        tokenizer, network = model.layers[1:]
        network.compile(keras.optimizers.Adam(config.learning_rate), loss)
        examples = Split.from_arrays(tokenizer(examples.inputs), examples.targets)
    network.fit(
        training_batches(examples, config.batch_size, config.seed, augment, run.strategy, run.start_step),
        steps_per_epoch=steps_per_epoch(examples, config.batch_size),
        epochs=config.epochs,
        shuffle=False,
        callbacks=run.callbacks(data, augment),
        verbose=0,
    )
    batches = evaluation_batches(data.test, config.batch_size, run.strategy)
    steps = evaluation_steps(data.test, config.batch_size)
    loss = model.evaluate(batches, steps=steps, return_dict=True, verbose=0)["loss"]
    return data, model, run.finish(model, data, Report({"loss": loss}), {})


@pytest.fixture(scope="module")
def run_of(tmp_path_factory):
    """The folder of a finished run, its data and its metrics, trained when first asked for."""
    runs = {}

    def trained(name: str) -> tuple:
        if name not in runs:
            directory = tmp_path_factory.mktemp("kinds") / name
            data, _, metrics = train(Config(run_dir=str(directory)), name)
            runs[name] = directory, data, metrics
        return runs[name]

    return trained


@pytest.mark.parametrize("name", ["masks", pytest.param("series", marks=pytest.mark.long)])
def test_two_devices_learn_as_one(name, tmp_path):
    found = []
    for strategy, devices in (("none", 0), ("mirrored", 2)):
        config = Config(run_dir=str(tmp_path / strategy), strategy=strategy, devices=devices, epochs=2)
        _, model, metrics = train(config, name)
        found.append([*model.get_weights(), metrics["loss"]])
    for one, two in zip(*found, strict=True):
        np.testing.assert_allclose(one, two, atol=1e-5)


@pytest.mark.parametrize("name", RECIPES)
def test_inputs_and_targets_stay_together(run_of, name):
    """The task is learned, from shuffled and augmented batches; and examples are cut as they are."""
    directory, data, metrics = run_of(name)
    assert metrics["loss"] < {"masks": 0.1, "series": 0.05, "texts": 0.1}[name]
    result, model = artefacts.load_run(directory)
    assert result["task"] == data.task
    assert isinstance(model.output, dict) == (name == "series")
    assert sum(data.counts().values()) == 240
    inputs, targets = data.train.arrays(slice(30))
    if name == "masks":
        assert targets.dtype == np.int32
        np.testing.assert_array_equal(inputs[..., 0] >= 120, targets == 1)
    elif name == "series":
        np.testing.assert_allclose(
            targets["raised"] - targets["difference"], np.repeat(inputs["level"][..., None], 10, 1), atol=1e-6
        )
    else:
        assert [text.decode() for text in inputs] == ["".join(np.array([*"abc"])[row]) for row in targets]


@pytest.mark.parametrize("form", export.SUFFIXES)
@pytest.mark.parametrize("name", RECIPES)
def test_every_format_answers_as_the_model(run_of, name, form, tmp_path):
    pytest.importorskip({"litert": "ai_edge_litert", "onnx": "tf2onnx"}.get(form, "keras"))
    directory, data, _ = run_of(name)
    result, model = artefacts.load_run(directory)
    inputs = export.first_inputs(data, 100)
    path = tmp_path / f"model{export.SUFFIXES[form]}"
    parity = export.export(model, result, form, path, inputs, 1e-4)
    assert (parity["passed"], parity["inputs"], parity["equal_answers"]) == (True, 100, pytest.approx(1, abs=0.01))
    description, answer = artefacts.load(path)
    assert description["task"] == data.task
    outputs, wanted = answer(inputs), artefacts.load(directory).answer(inputs)
    tf.nest.assert_same_structure(outputs, wanted)
    tf.nest.map_structure(lambda *pair: np.testing.assert_allclose(*pair, atol=1e-4), outputs, wanted)
    if name == "series":
        assert (description["shape"], description["dtype"]["level"]) == ({"level": [1], "past": [10, 2]}, "int32")
        assert {output: values.shape for output, values in outputs.items()} == {
            "difference": (100, 10, 1),
            "raised": (100, 10, 1),
        }


def test_a_served_picture_gets_a_mask(run_of, tmp_path):
    directory, data, _ = run_of("masks")
    result, model = artefacts.load_run(directory)
    export.save(model, artefacts.describe(result, model), "saved_model", tmp_path / "served")
    images, _ = data.test.arrays(slice(2))
    files = [tf.io.encode_png(image).numpy() for image in images]
    served = tf.saved_model.load(tmp_path / "served")
    answers = served.signatures["serving_default"](image_bytes=tf.constant(files))
    assert answers["value"].shape == (2, 8, 12, 2)
    np.testing.assert_allclose(answers["value"], model(images), atol=1e-6)


def test_predict_needs_a_writer_for_each_kind_of_output(run_of, tmp_path, monkeypatch):
    """Pictures are read as for any recipe; a function more, and there are masks."""
    directory, data, _ = run_of("masks")
    images, _ = data.test.arrays(slice(2))
    files = [str(tmp_path / f"{number}.png") for number in range(2)]
    for image, file in zip(images, files, strict=True):
        Image.fromarray(image).save(file)
    with pytest.raises(
        UserError, match=r"the kind of its output is 'mask', and .* knows only of class, number;"
    ) as refused:
        predict.predict(directory, files)
    assert "\n" not in str(refused.value)

    def write_mask(description, probabilities):
        classes = probabilities.argmax(axis=-1)
        return {"shape": classes.shape, description["class_names"][1]: int(classes.sum())}

    monkeypatch.setitem(predict.WRITERS, "mask", write_mask)
    answers = predict.predict(directory, files)
    squares = artefacts.load(directory).answer(images).argmax(axis=-1).sum(axis=(1, 2)).tolist()
    assert answers == [
        {"input": file, "shape": (8, 12), "square": count} for file, count in zip(files, squares, strict=True)
    ]
    assert squares == pytest.approx([9, 9], abs=2)
    assert predict.as_table(answers).row_count == 2


def test_predict_needs_a_reader_for_each_kind_of_input(run_of, tmp_path, monkeypatch):
    directory, data, _ = run_of("series")
    with pytest.raises(UserError, match=r"the kind of its input is 'series', and .* knows only of image, text, table;"):
        predict.predict(directory, [__file__])
    inputs, targets = data.test.arrays(slice(3))
    np.savez(tmp_path / "new.npz", **inputs)

    def read_series(description, sources):
        ((title, path),) = sources
        with np.load(path) as kept:
            return [f"{title} {row}" for row in range(3)], {name: kept[name] for name in description["shape"]}

    monkeypatch.setitem(predict.READERS, "series", read_series)
    monkeypatch.setitem(
        predict.WRITERS, "series", lambda _, series: {key: each.tolist() for key, each in series.items()}
    )
    answers = predict.predict(directory, [str(tmp_path / "new.npz")])
    np.testing.assert_allclose([answer["raised"] for answer in answers], targets["raised"], atol=0.8)
    assert set(answers[0]) == {"input", "difference", "raised"}


def test_texts_from_texts(run_of, tmp_path, monkeypatch):
    directory, *_ = run_of("texts")
    letters = np.array([*"ABC"])
    monkeypatch.setitem(predict.WRITERS, "text", lambda _, each: {"text": "".join(letters[each.argmax(-1) % 3])})
    (tmp_path / "new.txt").write_text("abcabc\nccbbaa\n")
    answers = predict.predict(directory, [str(tmp_path / "new.txt")])
    assert [answer["text"] for answer in answers] == ["ABCABC", "CCBBAA"]


def test_tensorboard_shows_pictures_of_any_task(run_of):
    events = EventAccumulator(str(run_of("masks")[0] / "tensorboard"), {"tensors": 0}).Reload()
    assert {"examples", "examples_augmented"} <= {*events.Tags()["tensors"], *events.Tags()["images"]}


def test_what_a_format_has_no_operation_for_is_refused_in_one_line(tmp_path, capfd):
    """A recurrent network in LiteRT; it leaves nothing behind."""
    pytest.importorskip("ai_edge_litert")
    inputs = keras.Input([5, 2], name="series")
    model = keras.Model(inputs, keras.layers.GRU(3)(inputs))
    result = {"recipe": "x", "class_names": [], "columns": [], "weights_sha256": "", "config": {}}
    result["task"] = {"input": "series", "output": "series"}
    with pytest.raises(
        UserError, match=r"^litert does not support an operation of the model \('tf\.\w+' op"
    ) as refused:
        export.export(model, result, "litert", tmp_path / "x.tflite", np.zeros([3, 5, 2], np.float32), 1e-3)
    assert "\n" not in str(refused.value)
    assert capfd.readouterr().err == ""
    assert not list(tmp_path.iterdir())


def test_the_share_of_equal_answers_is_counted_per_pixel():
    """Where one pixel of eight is of another class, and where the difference is in one of several outputs."""
    wanted = np.tile(np.float32([0.6, 0.4]), (2, 2, 2, 1))
    found = wanted.copy()
    found[0, 0, 0] = [0.4, 0.6]
    checked = export.compare(lambda _: wanted, lambda _: found, None, 0.5, "mask")
    assert (checked["inputs"], checked["equal_answers"], checked["passed"]) == (2, 0.875, False)
    several = {"a": wanted, "b": np.uint8([1, 2])}
    other = {"a": wanted, "b": np.uint8([1, 1])}
    assert export.compare(lambda _: several, lambda _: several, None, 0.0, "boxes")["passed"]
    assert export.compare(lambda _: several, lambda _: other, None, 0.4, "boxes")["largest_difference"] == 1.0
    broken = {"a": wanted, "b": np.float32([np.nan, 2])}
    assert not export.compare(lambda _: several, lambda _: broken, None, 9.0, "boxes")["passed"]
    said = np.array([b"yes", b"no"], object)
    assert export.compare(lambda _: said, lambda _: said, None, 0.0, "text")["passed"]
    assert not export.compare(lambda _: said, lambda _: said[::-1], None, 0.5, "text")["passed"]


def test_rows_are_taken_in_main_memory(monkeypatch):
    """Though another device is the one to compute on, such as a GPU: here, the second part of the CPU."""
    devices, as_array = [], np.asarray

    def spy(values, *others, **named):
        devices.append(values.device)
        return as_array(values, *others, **named)

    split = smoke_data("mnist_cnn").train
    monkeypatch.setattr(np, "asarray", spy)
    with tf.device("CPU:1"):
        first, _ = split.arrays(slice(2))
        chosen, targets = split.arrays(as_array([1, 0, 1]))
        made = Split.from_arrays({"a": first}, targets[:2])
    assert {device.rpartition(":")[0][-3:] + device[-1] for device in devices} == {"CPU0"}
    assert made.inputs["a"].device.endswith("CPU:0")
    np.testing.assert_array_equal(chosen[:2], first[::-1])
    assert len(made) == 2


def test_the_digest_is_of_all_parts_and_their_names():
    def digest(inputs):
        split = Split.from_arrays(inputs, np.zeros([2, 1], np.float32))
        return Data("x", "files", {"input": "pair", "output": "score"}, split, split, split).digest()

    a, b = np.float32([1, 2]), np.float32([3, 4])
    assert digest({"a": a, "b": b}) == digest({"b": b, "a": a})
    assert len({digest(each) for each in ({"a": a, "b": b}, {"a": b, "b": a}, {"a": a, "c": b}, {"a": a}, a)}) == 5
