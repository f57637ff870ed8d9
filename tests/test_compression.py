"""Distillation, pruning and quantization: what each promises beyond what every recipe does."""

import dataclasses
import errno
import functools
import json

from common import artefacts
from common.cli import UserError
from common.runs import with_class_names

import export
import keras
import numpy as np
import pytest
import tensorflow as tf
from ai_edge_litert.interpreter import Interpreter
from conftest import load_recipe, smoke_config, smoke_data


def weight_matrices(model):
    """Kernels and biases of the layers that have some."""
    return [layer.get_weights() for layer in model.layers if layer.get_weights()]


def share_of_zeros(model):
    kernels = np.concatenate([kernel.ravel() for kernel, _ in weight_matrices(model)])
    return np.mean(kernels == 0)


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    """Gives a finished run of a kind of pruning: its directory and its metrics."""
    recipe = load_recipe("pruning")

    @functools.cache
    def run_of(remove, sparsity):
        directory = tmp_path_factory.mktemp(remove) / "run"
        config = smoke_config(recipe, directory, remove=remove, sparsity=sparsity, smoke=False, data="sample")
        return directory, recipe.train(config, smoke_data("pruning"))

    return run_of


@pytest.mark.parametrize("form", ["keras", pytest.param("litert", marks=pytest.mark.long)])
def test_removed_weights_are_zeros_wherever_the_model_goes(pruned, tmp_path, form):
    directory, metrics = pruned("weights", 0.9)
    result, model = artefacts.load_run(directory)
    assert share_of_zeros(model) == pytest.approx(0.9, abs=1e-4)
    kept = sum(np.count_nonzero(part) for layer in weight_matrices(model) for part in layer)
    assert metrics["nonzero_weights"] == kept
    path = tmp_path / f"model{export.SUFFIXES[form]}"
    export.save(model, artefacts.describe(result, model), form, path)
    if form == "keras":
        assert share_of_zeros(artefacts.load_keras(path)) == share_of_zeros(model)
    else:
        interpreter = Interpreter(str(path))
        interpreter.allocate_tensors()
        sizes = {kernel.size: np.count_nonzero(kernel) for kernel, _ in weight_matrices(model)}
        found = {}
        for each in interpreter.get_tensor_details():
            if np.prod(each["shape"]) in sizes and len(each["shape"]) > 1:
                found[int(np.prod(each["shape"]))] = np.count_nonzero(interpreter.get_tensor(each["index"]))
        assert found == sizes


def test_zeros_stay_zero_and_all_else_learns_as_with_adamw():
    recipe, start = load_recipe("pruning"), np.array([[0.0, 1.0], [2.0, 0.0]], np.float32)
    ends = []
    for kind in (recipe.ZerosStay, keras.optimizers.AdamW):
        variable, optimizer = keras.Variable(start), kind(0.1, weight_decay=0.01)
        for step in range(3):
            optimizer.apply([tf.constant([[1.0, -1.0], [step, 1.0]])], [variable])
        ends.append(variable.numpy())
    np.testing.assert_array_equal(ends[0] == 0, start == 0)
    np.testing.assert_allclose(ends[0][start != 0], ends[1][start != 0], rtol=1e-5)
    assert (ends[1] != 0).all()


@pytest.mark.parametrize(("epoch", "share"), [(0, 0.0), (2, 0.8 * (1 - 0.5**3)), (4, 0.8), (9, 0.8)])
def test_the_share_rises_along_a_cubic_curve(epoch, share):
    recipe = load_recipe("pruning")
    model = recipe.build_model(recipe.Config(), smoke_data("pruning"))
    before = [kernel for kernel, _ in weight_matrices(model)]
    callback = recipe.Pruning("weights", 0.8, epochs=4)
    callback.set_model(model)
    callback.on_epoch_begin(epoch)
    assert share_of_zeros(model) == pytest.approx(share, abs=1e-5)
    after = [kernel for kernel, _ in weight_matrices(model)]
    largest_removed = max((np.abs(old[new == 0]).max(initial=0) for old, new in zip(before, after, strict=True)))
    smallest_kept = min(np.abs(new[new != 0]).min() for new in after)
    assert largest_removed < smallest_kept
    callback.on_epoch_begin(epoch)  # Done again it changes nothing.
    for once, twice in zip(after, weight_matrices(model), strict=True):
        np.testing.assert_array_equal(once, twice[0])


@pytest.mark.long
def test_without_its_filters_the_network_is_smaller_and_answers_the_same(pruned):
    recipe, data = load_recipe("pruning"), smoke_data("pruning")
    directory, metrics = pruned("filters", 0.5)
    _, model = artefacts.load_run(directory)
    assert [bias.size for _, bias in weight_matrices(model)] == [16, 32, 64, 10]
    assert share_of_zeros(model) < 0.01
    assert metrics["nonzero_weights"] < 225_034 / 3
    whole = recipe.build_model(recipe.Config(), data)
    callback = recipe.Pruning("filters", 0.7, epochs=0)
    callback.set_model(whole)
    callback.on_epoch_begin(0)
    smaller = recipe.without_removed(whole, recipe.Config(), data)
    images = data.test.inputs.numpy()
    np.testing.assert_allclose(smaller(images), whole(images), atol=1e-6)
    assert smaller.count_params() < whole.count_params() / 3


def test_what_the_teacher_says_is_kept_and_tied_to_teacher_and_data(tmp_path):
    recipe, data = load_recipe("distillation"), smoke_data("distillation")
    teacher = recipe.build_model(recipe.Config(), data)
    path = tmp_path / "teacher.keras"
    teacher.save(path)
    logits = recipe.teacher_logits(path, data)
    images = np.concatenate([data.train.inputs, data.validation.inputs])
    np.testing.assert_allclose(keras.ops.softmax(logits), teacher.predict(images, verbose=0), atol=1e-5)
    (kept,) = tmp_path.glob("logits-*.npz")
    np.savez(kept, logits=logits + 1)
    np.testing.assert_array_equal(recipe.teacher_logits(path, data), logits + 1)
    recipe.build_model(recipe.Config(), data).save(path)
    assert not np.array_equal(recipe.teacher_logits(path, data), logits + 1)
    assert len(list(tmp_path.glob("*"))) == 3, "the model and what either teacher said"


def test_on_a_full_disk_nothing_is_left_of_what_the_teacher_says(tmp_path, monkeypatch):
    recipe, data = load_recipe("distillation"), smoke_data("distillation")
    path = tmp_path / "teacher.keras"
    recipe.build_model(recipe.Config(), data).save(path)

    def savez(part, **arrays):
        part.write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "savez", savez)
    with pytest.raises(UserError, match=r"teacher.keras: .*No space left on device; make room$"):
        recipe.teacher_logits(path, data)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.long
def test_a_student_of_the_teacher_alone_comes_to_answer_as_it_does(tmp_path):
    """With a teacher that is sure of one class whatever the image, a student says nothing else."""
    recipe, data = load_recipe("distillation"), smoke_data("distillation")
    teacher = recipe.build_model(recipe.Config(), data)
    kernel, bias = teacher.get_layer("logits").get_weights()
    bias[3] = 9.0
    teacher.get_layer("logits").set_weights([0 * kernel, bias])
    teacher.save(tmp_path / "teacher.keras")
    config = smoke_config(
        recipe, tmp_path / "run", teacher=str(tmp_path / "teacher.keras"), label_weight=0.0, smoke=False, epochs=6
    )
    recipe.train(config, data)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    confusion = np.array(result["evaluation"]["confusion_matrix"])
    assert confusion[:, 3].sum() == confusion.sum()
    losses = [epoch["loss"] for epoch in result["history"]]
    assert losses[-1] < losses[0] / 3
    teacher.get_layer("logits").set_weights([kernel, bias])
    teacher.save(tmp_path / "teacher.keras")
    with pytest.raises(UserError, match=r"^--resume: .*teacher was '\w{64}' and is '\w{64}'; "):
        recipe.train(dataclasses.replace(config, resume=True), data)


@pytest.mark.long
def test_alone_the_student_begins_as_with_the_teacher_whether_that_has_spoken_before_or_not(tmp_path):
    recipe, data = load_recipe("distillation"), smoke_data("distillation")
    recipe.build_model(recipe.Config(), data).save(tmp_path / "teacher.keras")
    flags = {"teacher": str(tmp_path / "teacher.keras"), "baseline": True, "epochs": 1}
    first, second = (recipe.train(smoke_config(recipe, tmp_path / name, **flags), data) for name in ("first", "second"))
    assert first == second
    # One that learns nothing of either stays as both began.
    still = recipe.train(smoke_config(recipe, tmp_path / "still", learning_rate=1e-30, **flags), data)
    assert still["accuracy"] == still["alone_accuracy"]


def absent(folder, data):
    return folder / "nowhere.keras"


def no_model(folder, data):
    (folder / "broken.keras").write_bytes(b"not a model")
    return folder / "broken.keras"


def of_other_classes(folder, data):
    images = keras.Input(data.train.input_shape)
    keras.Model(images, keras.layers.Dense(3)(keras.layers.Flatten()(images))).save(folder / "three.keras")
    return folder / "three.keras"


def of_other_images(folder, data):
    images = keras.Input([5, 5, 1])
    keras.Model(images, keras.layers.Dense(10)(keras.layers.Flatten()(images))).save(folder / "small.keras")
    return folder / "small.keras"


def of_as_many_other_classes(folder, data):
    recipe = load_recipe("distillation")
    with_class_names(recipe.build_model(recipe.Config(), data), tuple("abcdefghij")).save(folder / "other.keras")
    return folder / "other.keras"


def unsure_of_anything(folder, data):
    images = keras.Input(data.train.input_shape)
    flat = keras.layers.Rescaling(float("nan"))(keras.layers.Flatten()(images))
    keras.Model(images, keras.layers.Dense(10)(flat)).save(folder / "nan.keras")
    return folder / "nan.keras"


def a_byte_is_another(folder, data):
    recipe, path = load_recipe("distillation"), folder / "flipped.keras"
    recipe.build_model(recipe.Config(), data).save(path)
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 255
    path.write_bytes(content)
    return path


def what_it_said_is_damaged(folder, data):
    recipe, path = load_recipe("distillation"), folder / "good.keras"
    recipe.build_model(recipe.Config(), data).save(path)
    recipe.teacher_logits(path, data)
    (kept,) = folder.glob("logits-*")
    content = bytearray(kept.read_bytes())
    content[len(content) // 2] ^= 255
    kept.write_bytes(content)
    return path


def nothing_is_left_of_what_it_said(folder, data):
    path = what_it_said_is_damaged(folder, data)
    (kept,) = folder.glob("logits-*")
    kept.write_bytes(b"")
    return path


def what_it_said_is_of_other_images(folder, data):
    path = what_it_said_is_damaged(folder, data)
    (kept,) = folder.glob("logits-*")
    np.savez(kept, logits=np.zeros([7, 3]))
    return path


@pytest.mark.parametrize(
    "trouble",
    [
        *(absent, no_model, of_other_classes, of_other_images, of_as_many_other_classes, unsure_of_anything),
        *(a_byte_is_another, what_it_said_is_damaged, nothing_is_left_of_what_it_said),
        what_it_said_is_of_other_images,
    ],
)
def test_a_teacher_that_can_not_teach_is_named(tmp_path, trouble):
    recipe, data = load_recipe("distillation"), smoke_data("distillation")
    path = trouble(tmp_path, data)
    with pytest.raises(UserError, match=r"^--teacher .*\.keras: .*; give ") as raised:
        recipe.teacher_logits(path, data)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)
    with pytest.raises(UserError, match=r"^--teacher "):
        recipe.train(smoke_config(recipe, tmp_path / "run", teacher=str(path)), data)
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_the_files_of_fewer_bits_answer_as_measured(tmp_path):
    recipe, data = load_recipe("quantization"), smoke_data("quantization")
    metrics = recipe.train(smoke_config(recipe, tmp_path / "run"), data)
    sizes = {path.stem: path.stat().st_size for path in (tmp_path / "run").glob("*.tflite")}
    assert sizes["dynamic"] < sizes["int8"] * 1.2 < sizes["float16"] < sizes["float32"]
    assert metrics["int8_share_of_bytes"] == sizes["int8"] / sizes["float32"] < 0.3
    # LiteRT's own calculation in float32 is Keras'.
    assert metrics["float32_litert_accuracy"] == pytest.approx(metrics["accuracy"], abs=1e-6)
    for kind in ("dynamic", "int8"):  # One image at a time.
        interpreter = Interpreter(str(tmp_path / "run" / f"{kind}.tflite"))
        interpreter.allocate_tensors()
        right = []
        for image, label in zip(data.test.inputs.numpy(), data.test.targets.numpy().argmax(axis=1), strict=True):
            interpreter.set_tensor(interpreter.get_input_details()[0]["index"], image[None])
            interpreter.invoke()
            right.append(interpreter.get_tensor(interpreter.get_output_details()[0]["index"]).argmax() == label)
        assert metrics[f"{kind}_litert_accuracy"] == pytest.approx(np.mean(right), abs=1e-6)
