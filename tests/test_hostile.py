"""Files made to do harm: nothing in them runs, nothing outside is read or written. The payloads here are harmless."""

import io
import json
import pathlib
import zipfile

from common.artefacts import load_run
from common.cli import UserError
from common.records import file_sha256

import h5py
import keras
import numpy as np
import pytest
from programs import run_program

CANARY = 42.0


@pytest.fixture(scope="module")
def finished(finished_run):
    """A finished run of linear_regression, whose model has a kernel of two weights."""
    _, directory = finished_run("linear_regression")
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


def with_lambda(members, canary):
    layer = {
        "module": "keras.layers",
        "class_name": "Lambda",
        "config": {"name": "line", "function": {"class_name": "__lambda__", "config": {"code": "4wEAAAA="}}},
    }
    change_config(members, lambda config: config["config"]["layers"][1].update(layer))


def with_a_function_of_python(members, canary):
    call = {"module": "os", "class_name": "system", "config": f"touch {canary}", "registered_name": "system"}
    change_config(members, lambda config: config["config"]["layers"][1].update(call))


def with_a_path_as_a_layer_name(members, canary):
    text = members["config.json"].decode().replace('"line"', '"../../../line"')
    members["config.json"] = text.encode()


def with_members_outside(members, canary):
    members["../outside.txt"] = b"written"
    members[str(canary.parent / "absolute.txt")] = b"written"
    change_weights(members, lambda variables: variables.pop("0"))


def with_an_external_link(members, canary):
    with h5py.File(canary.with_suffix(".h5"), "w") as file:
        file["0"] = np.full((2, 1), CANARY, np.float32)

    def link(variables):
        del variables["0"]
        variables["0"] = h5py.ExternalLink(str(canary.with_suffix(".h5")), "/0")

    change_weights(members, link)


def with_external_storage(members, canary):
    canary.with_suffix(".bin").write_bytes(np.full(2, CANARY, np.float32).tobytes())

    def store(variables):
        del variables["0"]
        variables.create_dataset("0", (2, 1), np.float32, external=[(str(canary.with_suffix(".bin")), 0, 8)])

    change_weights(members, store)


def with_a_zip_bomb(members, canary):
    members["model.weights.h5"] = bytes(200_000_000)


def with_a_pickle(members, canary):
    class Touch:
        def __reduce__(self):
            return pathlib.Path.touch, (canary,)

    arrays = io.BytesIO()
    np.savez(arrays, kernel=np.array([Touch()], object))
    del members["model.weights.h5"]
    members["model.weights.npz"] = arrays.getvalue()


def without_a_configuration(members, canary):
    del members["config.json"]


def change_config(members, change):
    config = json.loads(members["config.json"])
    change(config)
    members["config.json"] = json.dumps(config).encode()


def change_weights(members, change):
    file = io.BytesIO(members["model.weights.h5"])
    with h5py.File(file, "r+") as weights:
        names = []
        weights.visit(names.append)
        (name,) = (name for name in names if name.endswith("dense/vars"))
        change(weights[name])
    members["model.weights.h5"] = file.getvalue()


CORPUS = [
    with_lambda,
    with_a_function_of_python,
    with_a_path_as_a_layer_name,
    with_members_outside,
    with_an_external_link,
    with_external_storage,
    with_a_zip_bomb,
    with_a_pickle,
    without_a_configuration,
]


def hostile_run(finished, folder, make, digests):
    """A run directory whose model `make` has changed; with digests that fit, or the old ones."""
    canary = folder / "canary"
    run = folder / "run"
    run.mkdir(parents=True)
    with zipfile.ZipFile(io.BytesIO(finished["model.keras"])) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    make(members, canary)
    for name, content in finished.items():
        (run / name).write_bytes(content)
    with zipfile.ZipFile(run / "model.keras", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    if digests == "forged":
        result = json.loads(finished["result.json"])
        (run / "result.json").write_text(json.dumps({**result, "model_sha256": file_sha256(run / "model.keras")}))
    return run, canary


@pytest.mark.parametrize("digests", ["old", "forged"])
@pytest.mark.parametrize("make", CORPUS, ids=lambda make: make.__name__)
@pytest.mark.filterwarnings("ignore:Skipping invalid path", "ignore:Skipping nested container")
def test_a_hostile_model_does_no_harm(finished, tmp_path, make, digests):
    run, canary = hostile_run(finished, tmp_path / "inner", make, digests)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"model\.keras: can't be read") as refused:
        load_run(run)
    assert ("not the file that the training wrote" in str(refused.value)) == (digests == "old")
    assert str(CANARY) not in str(refused.value)
    assert not canary.exists()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_the_corpus_is_made_from_a_model_that_loads(finished, tmp_path):
    """Otherwise, all of it might be refused for another reason."""
    run, _ = hostile_run(finished, tmp_path, lambda members, canary: None, "forged")
    _, model = load_run(run)
    assert isinstance(model, keras.Model)


def test_predict_tells_of_it_in_one_line(finished, tmp_path):
    run, _ = hostile_run(finished, tmp_path, with_lambda, "forged")
    (tmp_path / "rows.csv").write_text("a,b\n1,2\n")
    told = run_program("scripts/predict.py", str(run), str(tmp_path / "rows.csv"))
    assert (told.returncode, told.stdout, told.stderr.count("\n")) == (2, "", 1)
    assert "Lambda" in told.stderr


@pytest.mark.parametrize("recipe", ["dense_classifier", "text_classifier", "mnist_cnn"])
def test_a_pickle_as_data_is_not_unpickled(tmp_path, recipe):
    class Touch:
        def __reduce__(self):
            return pathlib.Path.touch, (tmp_path / "canary",)

    np.savez(tmp_path / "data.npz", inputs=np.array([Touch()], object))
    command = (f"recipes/{recipe}.py", "--data", str(tmp_path / "data.npz"), "--run-dir", str(tmp_path / "run"))
    told = run_program(*command, "--quiet")
    assert (told.returncode, told.stderr.count("\n")) == (2, 1)
    assert "data.npz" in told.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.npz"]
