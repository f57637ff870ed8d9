import errno
import io
import json
import zipfile

from common import artefacts
from common.cli import UserError
from common.records import file_sha256

import export
import keras
import numpy as np
import predict
import pytest
import tensorflow as tf
from conftest import load_recipe, short_set, smoke_config
from PIL import Image
from programs import run_program

pytest.importorskip("ai_edge_litert", reason="the extra `export` is not installed")


@pytest.fixture
def run_of(finished_run, large_vocabulary):
    """A finished run of a recipe."""
    return lambda name: large_vocabulary if name == "text_classifier" else finished_run(name)[1]


@pytest.fixture(scope="module")
def large_vocabulary(tmp_path_factory):
    """Of the few words in a smoke run's texts, the network would be too small to be made smaller."""
    folder = tmp_path_factory.mktemp("text_classifier") / "run"
    recipe = load_recipe("text_classifier")
    recipe.train(smoke_config(recipe, folder, smoke=False))
    return folder


def outputs_of(model: keras.Model, inputs: np.ndarray) -> dict[str, tf.Tensor]:
    outputs = model(tf.nest.map_structure(tf.constant, inputs), training=False)
    return outputs if isinstance(outputs, dict) else {"probabilities": outputs}


@short_set("mnist_cnn", "text_classifier")
def test_each_format_answers_as_the_model(run_of, recipe, tmp_path):
    name = recipe.__name__
    result, model = artefacts.load_run(run_of(name))
    with zipfile.ZipFile(run_of(name) / "model.keras") as archive:  # Which loads without this project.
        assert b'"module": "common.' not in archive.read("config.json")
    data = export.run_data(result)
    inputs = export.first_inputs(data, export.COMPARED)
    assert len(tf.nest.flatten(inputs)[0]) == min(export.COMPARED, sum(data.counts().values()))
    wanted = outputs_of(model, inputs)["probabilities"].numpy()
    for form, suffix in export.SUFFIXES.items():
        path = tmp_path / (form + suffix)
        parity = export.export(model, result, form, path, inputs, tolerance=1e-4)
        assert parity["passed"], parity
        assert json.loads(path.with_name(path.name + ".parity.json").read_text()) == parity
        kept = artefacts.load(path, threads=1)
        np.testing.assert_allclose(kept.answer(inputs), wanted, rtol=1e-3, atol=1e-4 * abs(wanted).max())
        assert kept.description["class_names"] == result["class_names"] == list(data.class_names)
        assert kept.description["columns"] == result["columns"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        each for form, suffix in export.SUFFIXES.items() for each in (form + suffix, form + suffix + ".parity.json")
    )


@pytest.mark.parametrize("name", ["dense_regression", "mnist_cnn", "text_classifier"])
@pytest.mark.long
def test_fewer_bits_are_smaller_files_of_nearly_the_same_answers(run_of, name, tmp_path):
    result, model = artefacts.load_run(run_of(name))
    data, sizes = export.run_data(result), {}
    inputs, examples = export.first_inputs(data, 200), data.train.arrays(slice(export.EXAMPLES))[0]
    kinds = [("keras", "int8")] * (name != "mnist_cnn") + [("litert", each) for each in export.QUANTIZATIONS["litert"]]
    for form, kind in kinds:
        path = tmp_path / (form + kind + export.SUFFIXES[form])
        parity = export.export(model, result, form, path, inputs, 0.2, kind, examples)
        assert parity["passed"], (form, parity)
        assert parity["quantization"] == kind
        # The encoder of texts or of a thousand columns is larger than the network.
        with zipfile.ZipFile(path) as archive:
            parts = {part.filename: part.compress_size for part in archive.infolist()}
        sizes[form, kind] = path.stat().st_size - parts.get(artefacts.ENCODER, 0)
    for kind in ("dynamic", "int8"):
        # The network of texts is a few kilobytes, of which the weights are not the most.
        assert sizes["litert", kind] < (0.5 if name == "text_classifier" else 0.35) * sizes["litert", "none"], kind
    assert 0.45 < sizes["litert", "float16"] / sizes["litert", "none"] < 0.75
    if name == "dense_regression":
        saved = (run_of(name) / "model.keras").stat().st_size - sizes["keras", "int8"]
        assert saved > 0.65 * sizes["litert", "none"]


@pytest.mark.parametrize("form", sorted(export.SUFFIXES))
@pytest.mark.long
def test_an_export_that_answers_otherwise_is_refused(run_of, form, tmp_path, monkeypatch, capsys):
    """One weight of the exported model is another; what an earlier export left stays as it is."""
    run, save, suffix = run_of("mnist_cnn"), export.save, export.SUFFIXES[form]
    path = tmp_path / f"exported{suffix}"
    words = ["export.py", str(run), "--format", form, "-o", str(path)]
    monkeypatch.setattr("sys.argv", words)
    export.main()
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    assert "1,000 inputs" not in capsys.readouterr().out  # The smoke run has fewer.

    def save_perturbed(model, *others):
        perturbed = keras.models.clone_model(model)
        weights = model.get_weights()
        weights[0][0, 0, 0, 0] += 3
        perturbed.set_weights(weights)
        save(perturbed, *others)

    monkeypatch.setattr(export, "save", save_perturbed)
    with pytest.raises(SystemExit) as ended:
        export.main()
    assert ended.value.code == 3
    error = capsys.readouterr().err
    assert error.startswith("parity failed")
    assert error.endswith("the file there is from an earlier export\n")
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before
    monkeypatch.setattr("sys.argv", [*words[:-1], str(tmp_path / "new" / "place" / path.name)])
    with pytest.raises(SystemExit):
        export.main()
    assert capsys.readouterr().err.endswith(f"{path.name} is not written\n")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("form", sorted(export.SUFFIXES))
def test_predict_takes_an_artefact(run_of, form, tmp_path, capfd):
    """Pictures and texts: the answers are those of the run, by name; and nothing else is told."""
    picture = tmp_path / "new.png"
    Image.fromarray(np.arange(28 * 28, dtype=np.uint8).reshape(28, 28)).save(picture)
    (tmp_path / "new.txt").write_text("a fine film\nnot a dull moment\n")
    for name, file in (("mnist_cnn", picture), ("text_classifier", tmp_path / "new.txt")):
        run = run_of(name)
        result, model = artefacts.load_run(run)
        path = tmp_path / (name + export.SUFFIXES[form])
        export.save(model, artefacts.describe(result, model), form, path)
        capfd.readouterr()
        answers, wanted = predict.predict(path, [str(file)]), predict.predict(run, [str(file)])
        assert capfd.readouterr().err == ""
        assert [answer["class"] for answer in answers] == [answer["class"] for answer in wanted]
        for answer, other in zip(answers, wanted, strict=True):
            assert answer["probabilities"] == pytest.approx(other["probabilities"], abs=1e-5)


def test_the_saved_model_serves_what_people_send(run_of, tmp_path):
    """Bytes of picture files of any size, and raw texts; names and probabilities come back."""
    for name in ("mnist_cnn", "text_classifier"):
        result, model = artefacts.load_run(run_of(name))
        export.save(model, artefacts.describe(result, model), "saved_model", tmp_path / name)
    digits = np.random.default_rng(0).integers(0, 256, (2, 28, 28, 1)).astype(np.uint8)
    served = tf.saved_model.load(tmp_path / "mnist_cnn")
    files = [io.BytesIO() for _ in range(3)]
    for digit, file in zip(digits, files, strict=False):
        Image.fromarray(digit.squeeze()).save(file, "png")
    Image.new("RGB", (60, 40), "grey").save(files[2], "jpeg")
    answers = served.signatures["serving_default"](image_bytes=tf.constant([file.getvalue() for file in files]))
    _, model = artefacts.load_run(run_of("mnist_cnn"))
    wanted = outputs_of(model, digits)
    np.testing.assert_allclose(answers["probabilities"][:2], wanted["probabilities"], atol=1e-6)
    assert answers["class"].numpy()[:2].tolist() == wanted["class"].numpy().tolist()
    assert answers["class"].shape == (3,)

    texts, served = tf.constant(["a fine film", "not a dull moment"]), tf.saved_model.load(tmp_path / "text_classifier")
    answers = served.signatures["serving_default"](text=texts)
    result, model = artefacts.load_run(run_of("text_classifier"))
    np.testing.assert_allclose(answers["probabilities"], outputs_of(model, texts)["probabilities"], atol=1e-6)
    assert {name.decode() for name in answers["class"].numpy()} <= set(result["class_names"])


def test_sixteen_bits_are_for_training_only():
    policy = keras.DTypePolicy("mixed_bfloat16")
    inputs, normalize = keras.Input([4]), keras.layers.Normalization(dtype="float32")
    normalize.adapt(np.float32([[-3] * 4, [-1] * 4]))  # Mean -2, deviation 1: of ones it makes threes.
    x = keras.ops.cast(normalize(inputs), "bfloat16")
    model = keras.Model(inputs, keras.layers.Dense(3, dtype=policy)(x))
    same = export.in_float32(model)
    assert "float16" not in same.to_json()
    assert same(np.ones([1, 4], np.float32)).dtype == tf.float32
    expected = 3 * np.ones([1, 4]) @ model.get_weights()[-2]
    np.testing.assert_allclose(same(np.ones([1, 4], np.float32)), expected, rtol=1e-6)
    assert abs(np.float32(model(np.ones([1, 4], np.float32))) - expected).max() > 1e-6
    assert export.in_float32(same) is same


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("--format", "litert", "-o", "model.onnx"), "model.onnx: the name must end in .tflite"),
        (("--format", "saved_model", "-o", "full"), "full: exists and is not a SavedModel; name a new folder"),
        (("--format", "litert", "-o", "kept.tflite"), "kept.tflite: is a folder; remove it or name a file"),
        (("--format", "litert", "--tolerance", "nan"), "--tolerance nan: give a finite number, at least 0"),
        (("--format", "litert", "--tolerance", "-1"), "--tolerance -1.0: give a finite number, at least 0"),
        (
            ("--format", "onnx", "-o", "full/x/model.onnx"),
            "full/x: File exists; free some space there, or choose another place",
        ),
    ],
)
def test_places_that_can_not_be_written(run_of, words, line, tmp_path, monkeypatch):
    run = run_of("mnist_cnn")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("mine")
    (tmp_path / "kept.tflite").mkdir()
    monkeypatch.setattr("sys.argv", ["export.py", str(run), *words])
    with pytest.raises(UserError) as refused:
        export.main()
    assert str(refused.value) == line
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["full", "kept.tflite", "x"]


def test_what_is_there_already_is_not_lost(run_of, tmp_path, monkeypatch):
    """The run's own model, and what somebody put beside a SavedModel."""
    run = run_of("mnist_cnn")
    digest = file_sha256(run / "model.keras")
    monkeypatch.setattr("sys.argv", ["export.py", str(run), "--format", "keras", "-o", f"{run}/plots/../model.keras"])
    with pytest.raises(UserError, match=r"model\.keras: is the run's own model; name another file$"):
        export.main()
    assert file_sha256(run / "model.keras") == digest
    (tmp_path / "variables").mkdir()
    (tmp_path / "saved_model.pb").write_bytes(b"")
    assert export.is_saved_model(tmp_path)
    (tmp_path / "thesis.txt").write_text("mine")
    assert not export.is_saved_model(tmp_path)


def test_answers_of_most_other_classes_are_refused_however_unsure_the_model_is():
    wanted = np.full([8, 4], 0.24) + 0.04 * np.eye(4)[np.arange(8) % 4]
    found = export.compare(lambda inputs: wanted, lambda inputs: np.full([8, 4], 0.25), np.zeros(8), 0.5, "class")
    assert (found["equal_answers"], found["passed"]) == (0.25, False)
    found = export.compare(lambda inputs: wanted, lambda inputs: wanted + 0.001, np.zeros(8), 0.5, "class")
    assert (found["equal_answers"], found["passed"]) == (1.0, True)


@pytest.mark.parametrize(("first", "enough"), [(50, 75), (70, 85), (100, 90)])
def test_always_the_same_answer_is_no_parity(first, enough):
    """Out of 100 of which `first` are of class 0; half way from what always saying that would reach to all, or 90."""
    wanted = np.where(np.arange(100)[:, None] < first, [[0.6, 0.4]], [[0.4, 0.6]])
    for equal in range(101):
        found = np.where(np.arange(100)[:, None] < equal, wanted, wanted[:, ::-1])
        checked = export.compare(lambda _: wanted, lambda _, found=found: found, np.zeros(100), 0.5, "class")
        assert checked["passed"] == (equal >= enough), equal
    constant = np.full([100, 2], [0.6, 0.4])
    assert export.compare(lambda _: wanted, lambda _: constant, np.zeros(100), 0.5, "class")["passed"] == (first == 100)


def test_a_folder_that_can_not_be_written_to_is_not_named_by_what_is_temporary(run_of, tmp_path, monkeypatch):
    def no_folder(dir):
        raise OSError(errno.EROFS, "Read-only file system", f"{dir}/temporary")

    result, model = artefacts.load_run(run_of("linear_regression"))
    monkeypatch.setattr(export.tempfile, "TemporaryDirectory", no_folder)
    path = tmp_path / "model.tflite"
    with pytest.raises(
        UserError, match=rf"^{path}: Read-only file system; free some space there, or choose another place$"
    ):
        export.export(model, result, "litert", path, np.zeros([1, 2], np.float32), 0.0)


def test_a_missing_package_is_named(run_of, tmp_path, monkeypatch):
    result, model = artefacts.load_run(run_of("mnist_cnn"))
    monkeypatch.setitem(__import__("sys").modules, "tf2onnx", None)
    with pytest.raises(
        UserError, match=r"^the package tf2onnx is missing; run \.venv/bin/pip install -e '\.\[export\]'$"
    ):
        export.save(model, artefacts.describe(result, model), "onnx", tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_files_that_are_no_artefact(run_of, tmp_path):
    for name in ("model.keras", "model.tflite", "model.onnx"):
        (tmp_path / name).write_bytes(b"nothing of the kind")
        with pytest.raises(UserError, match=rf"{name}: can't be read \(.*\); export it again"):
            artefacts.load(tmp_path / name)
    with pytest.raises(UserError, match=r"model\.keras: not written by scripts/export\.py; give the folder of its run"):
        artefacts.load(run_of("mnist_cnn") / "model.keras")
    _, model = artefacts.load_run(run_of("mnist_cnn"))
    artefacts.without_class_names(model).export(tmp_path / "bare.tflite", format="litert", verbose=False)
    with pytest.raises(UserError, match=r"bare\.tflite: not written by scripts/export\.py; give the folder of its run"):
        artefacts.load(tmp_path / "bare.tflite")


def test_a_run_of_an_unknown_recipe_has_no_data():
    with pytest.raises(UserError, match=r"my_train\.py: no such program; give the name of one in that folder"):
        export.run_data({"recipe": "my_train"})


def test_the_command(run_of, tmp_path):
    run = run_program("scripts/export.py", str(run_of("linear_regression")), "--format", "onnx")
    assert run.returncode == 0, run.stderr
    path = run_of("linear_regression") / "exported" / "linear_regression.onnx"
    assert run.stdout.splitlines()[-1] == f"exported: {path}"
    assert path.exists()
