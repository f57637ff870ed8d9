"""tools/ship.py on a small trained model."""

import shutil
import sys

from common import artefacts

import keras
import numpy as np
import pictures
import published
import pytest
import ship
import tables
from conftest import load_recipe, smoke_config

pytestmark = pytest.mark.long
VARIANTS = [("keras", "none"), ("saved_model", "none"), ("litert", "none"), ("litert", "int8"), ("onnx", "none")]


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    """A run and the record of all that was made of it."""
    recipe, directory = load_recipe("pruning"), tmp_path_factory.mktemp("ship") / "run"
    recipe.train(smoke_config(recipe, directory, sparsity=0.5))
    with pytest.MonkeyPatch.context() as patch:  # One of each reader; tests/test_export.py writes all of them.
        patch.setattr(ship, "variants_of", lambda model: VARIANTS)
        return directory, ship.ship(directory, "", rounds=1)


def test_all_variants_are_shipped():
    model = keras.Sequential([keras.Input((8, 8, 1)), keras.layers.Conv2D(2, 3)])
    assert [form if kind == "none" else f"{form} {kind}" for form, kind in ship.variants_of(model)] == [
        *("keras", "saved_model", "litert", "litert dynamic", "litert float16", "litert int8", "onnx")
    ]


def test_the_record_says_what_each_file_is(shipped):
    directory, record = shipped
    result, model = artefacts.load_run(directory)
    data = ship.export.run_data(result)
    images, labels = data.test.inputs.numpy(), data.test.targets.numpy().argmax(axis=1)
    assert list(record["variants"]) == ["keras", "saved_model", "litert", "litert int8", "onnx"]
    for name, found in record["variants"].items():
        form, _, quantization = name.partition(" ")
        path = directory / "exported" / (quantization or "none") / f"pruning{ship.export.SUFFIXES[form]}"
        files = [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]
        assert found["bytes"] == sum(len(file.read_bytes()) for file in files)
        assert found["accuracy"] == np.mean(artefacts.load(path).answer(images).argmax(axis=1) == labels)
        assert found["parameters"] == model.count_params() == 225_034
        assert 0.49 < found["nonzero"] / 225_034 < 0.51
        assert list(found["seconds"]) == [
            f"batch {batch}, {threads}" for threads in ("one thread", "all threads") for batch in (1, 64)
        ]
        assert all(seconds > 0 for seconds in found["seconds"].values())
        assert found["parity"]["inputs"] == sum(data.counts().values())
    assert record["weights_sha256"] == result["weights_sha256"]


def test_the_tables_show_the_record(shipped, tmp_path, monkeypatch):
    _, record = shipped
    command = "python recipes/pruning.py --data tfds --remove filters --quiet"
    monkeypatch.setattr(published, "ROOT", tmp_path)
    published.write_record("ship-pruning", {**record, "trained_by": command})
    lines = tables.shipped_tables().splitlines()
    assert lines[0].startswith("`pruning --remove filters`, seed 0, 100 test examples of ")
    assert len(lines) == 6 + len(record["variants"])
    row = next(line for line in lines if line.startswith("| litert int8 "))
    found = record["variants"]["litert int8"]
    assert f"| {found['bytes'] / 1024:,.0f} | 225,034 | {found['nonzero']:,} |" in row
    assert ship.as_table(record).row_count == len(record["variants"])
    before, timed = record["variants"]["litert"], "batch 1, one thread"
    ratio, share = before["seconds"][timed] / found["seconds"][timed], 100 * found["bytes"] / before["bytes"]
    assert lines[-1].startswith(
        f"At batch 1, one thread, `litert int8` is {ratio:.1f} times as fast as `litert`, with "
    )
    assert f"with {share:.1f} % of its bytes" in lines[-1]
    published.write_record("ship-mnist_cnn", {**record, "recipe": "mnist_cnn"})
    assert tables.shipped_tables().endswith(
        "`litert` is 1.0 times as fast at batch 1, one thread, and 1.0 times at batch 64."
    )


def test_no_figure_is_cut(shipped, monkeypatch, capsys):
    directory, record = shipped
    monkeypatch.setattr(ship, "ship", lambda *_: record)
    monkeypatch.setattr(sys, "argv", ["ship.py", str(directory)])
    ship.main()
    printed = capsys.readouterr().out
    assert "litert int8" in printed
    assert f"{record['variants']['onnx']['bytes'] / 1024:,.0f}" in printed


@pytest.mark.parametrize(("source", "smoke"), [("tfds", True), ("sample", False), ("files", False)])
def test_only_runs_on_all_of_the_real_data_are_recorded(shipped, source, smoke, tmp_path, monkeypatch, capsys):
    directory, record = shipped
    record = {**record, "smoke": smoke, "data": {**record["data"], "source": source}}
    monkeypatch.setattr(published, "ROOT", tmp_path)
    monkeypatch.setattr(ship, "ship", lambda *_: record)
    monkeypatch.setattr(sys, "argv", ["ship.py", str(directory)])
    ship.main()
    assert f"not recorded: a run on {record['data']['name']} ({source})" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_a_file_that_answers_otherwise_ends_it(shipped, tmp_path, monkeypatch, capsys):
    directory, _ = shipped
    shutil.copytree(directory, tmp_path / "run", ignore=shutil.ignore_patterns("exported"))
    monkeypatch.setitem(ship.export.TOLERANCES, "int8", 0.0)
    with pytest.raises(SystemExit) as ended:
        ship.ship(tmp_path / "run", "", rounds=1)
    assert ended.value.code == 3
    assert capsys.readouterr().err.startswith("parity failed: litert int8 differs from the model")
    assert not list((tmp_path / "run").rglob("*int8*/*.tflite"))


def test_pruning_has_a_point_and_a_row_for_each_record(tmp_path, monkeypatch):
    monkeypatch.setattr(published, "ROOT", tmp_path)
    assert pictures.pruning_curve() is None
    for name, left, flags in (
        ("pruning", 20, ""),
        ("pruning-half", 110, "--sparsity=0.5"),
        ("pruning-filters", 40, "--remove filters --sparsity 0.75"),
    ):
        runs = [
            {
                "command": f"python recipes/pruning.py {flags}",
                "seed": seed,
                "metrics": {"nonzero_weights": left, "accuracy": accuracy, "unpruned_accuracy": 0.995},
            }
            for seed, accuracy in enumerate((0.98, 0.99))
        ]
        published.write_record(name, {"runs": runs})
    (axes,) = pictures.pruning_curve().axes
    filters, weights = (container.lines[0].get_xydata().tolist() for container in axes.containers)
    assert filters == [[40, pytest.approx(0.985)]]
    assert weights == [[20, pytest.approx(0.985)], [110, pytest.approx(0.985)]]
    assert tables.shipped_tables().splitlines()[2:5] == [
        "| 75 % of the filters | 40 | 98.50 ± 0.71 % | 1.00 | 0, 1 |",
        "| 50 % of the weights | 110 | 98.50 ± 0.71 % | 1.00 | 0, 1 |",
        "| 90 % of the weights | 20 | 98.50 ± 0.71 % | 1.00 | 0, 1 |",
    ]


def test_distillation_has_a_row_for_each_number_of_epochs(tmp_path, monkeypatch):
    monkeypatch.setattr(published, "ROOT", tmp_path)
    for name, epochs, accuracy in (("distillation-long", 40, 0.865), ("distillation", 8, 0.84)):
        metrics = {"accuracy": accuracy, "alone_accuracy": 0.82}
        published.write_record(name, {"runs": [{"epochs": epochs, "seed": 3, "metrics": metrics}]})
    without = [{"epochs": 4, "seed": 3, "metrics": {"accuracy": 0.8}}]  # Made with --no-baseline.
    published.write_record("distillation-alone", {"runs": without})
    assert tables.shipped_tables().splitlines()[2:] == [
        "| 8 | 84.00 % | 82.00 % | 2.00 | 3 |",
        "| 40 | 86.50 % | 82.00 % | 4.50 | 3 |",
    ]
