"""The templates: short, without `common`, and what they save answers raw input."""

import ast
import json
import os
import re
import shutil
import sys

from common.cli import SharedConfig
from common.data import IMDB, MNIST, load_images, load_texts

import keras
import numpy as np
import pandas as pd
import pytest
import tensorflow as tf
from conftest import load_recipe
from PIL import Image
from programs import ROOT

TEMPLATES = sorted((ROOT / "templates").glob("*.py"))


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Runs a template below `tmp_path`, some settings replaced; returns what it printed and its saved model."""
    monkeypatch.chdir(tmp_path)

    def run_template(name, *arguments, **settings):
        source = (ROOT / "templates" / f"{name}.py").read_text()
        for setting, value in settings.items():
            names, values = re.search(rf"^(.*\b{setting}\b.*?) = (.*?)(?:  #.*)?$", source, re.MULTILINE).groups()
            before = ast.literal_eval(values)
            old = dict(zip(names.split(", "), before if ", " in names else [before], strict=True))
            new = ", ".join(repr(v) for v in {**old, setting: value}.values())
            source = source.replace(f"{names} = {values}", f"{names} = {new}")
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        keras.utils.clear_session()
        exec(compile(source, f"{name}.py", "exec"), {"__name__": "__main__"})  # noqa: S102
        saved = sorted(tmp_path.glob("runs/*/model.keras"))[-1]
        return capsys.readouterr().out.splitlines(), keras.models.load_model(saved)

    return run_template


def test_templates_are_short_and_stand_by_themselves():
    assert [path.stem for path in TEMPLATES] == ["image_classifier", "table", "text_classifier"]
    for path in TEMPLATES:
        lines = path.read_text().splitlines()
        assert len(lines) <= 90, path
        assert not re.search(r"^\s*(from|import) (common|scripts|recipes|tools)\b", path.read_text(), re.MULTILINE)
        assert any("pip install" in line for line in lines[:10])


def write_pictures(folder, count=12, size=(12, 12)):
    random = np.random.default_rng(0)
    for number, of_class in enumerate(["dark", "light"]):
        (folder / of_class).mkdir(parents=True)
        for index in range(count):
            pixels = random.integers(0, 60, (*size, 3)) + 180 * number
            Image.fromarray(pixels.astype("uint8")).save(folder / of_class / f"{index}.png")
    return folder


@pytest.mark.long
def test_image_classifier_without_a_folder(run):
    printed, model = run("image_classifier", IMAGE_SIZE=(8, 8), EPOCHS=2)
    assert re.fullmatch(r"test accuracy [01]\.\d{4}", printed[-1])
    assert model.predict(np.zeros([2, 8, 8, 1], "uint8"), verbose=0).shape == (2, 10)


def test_image_classifier_with_a_folder(run, tmp_path):
    folder = write_pictures(tmp_path / "pictures")
    (folder / "dark" / "notes.txt").write_text("no picture")
    printed, model = run("image_classifier", folder, IMAGE_SIZE=(10, 8), EPOCHS=8, BATCH_SIZE=4)
    assert printed[-1] == "test accuracy 1.0000"
    assert "unused: {'dark/*.txt': 1}" in printed
    pixels = np.stack([np.full([8, 10, 3], 20), np.full([8, 10, 3], 230)])  # Raw, from 0 to 255.
    assert model.predict(pixels, verbose=0).argmax(axis=1).tolist() == [0, 1]
    (classes,) = tmp_path.glob("runs/*/classes.csv")
    assert pd.read_csv(classes).iloc[:, 0].tolist() == ["dark", "light"]


@pytest.mark.long
def test_image_classifier_keeps_the_parts_it_is_given(run, tmp_path):
    for part in ("Train", "val", "more"):
        write_pictures(tmp_path / "pictures" / part, count=10)
    printed, _ = run("image_classifier", tmp_path / "pictures", EPOCHS=1)
    assert "unused: {'more/*.png': 20}" in printed
    assert [line.split() for line in printed if line.startswith("dark")] == [["dark", "9", "10", "1"]]


@pytest.fixture
def refused(run, capsys):
    """Runs a template that refuses its input; returns the line that says why."""

    def run_refused(name, *arguments):
        with pytest.raises(SystemExit) as exit_code:
            run(name, *arguments)
        assert exit_code.value.code == 2
        return capsys.readouterr().err.splitlines()[-1]

    return run_refused


@pytest.mark.parametrize("name", ["table", "text_classifier"])
def test_without_a_file_and_with_help_the_usage_is_shown(run, refused, capsys, name):
    assert "the following arguments are required" in refused(name)
    with pytest.raises(SystemExit, match="0"):
        run(name, "--help")
    assert capsys.readouterr().out.startswith(f"usage: {name}.py ")


def test_image_classifier_names_what_is_wrong(refused, tmp_path):
    assert "nothing: 0 pictures" in refused("image_classifier", tmp_path / "nothing")
    folder = write_pictures(tmp_path / "pictures")
    (folder / "dark" / "3.png").write_bytes(b"")
    Image.fromarray(np.full([8, 8], 1000, "uint16")).save(folder / "light" / "deep.png")
    assert "['dark/3.png', 'light/deep.png']" in refused("image_classifier", folder)
    (folder / "dark" / "3.png").unlink()
    (folder / "light" / "deep.png").unlink()
    (folder / "solo").mkdir()
    Image.new("RGB", (8, 8)).save(folder / "solo" / "1.png")
    assert "3 different pictures: ['solo']" in refused("image_classifier", folder)
    shutil.rmtree(folder / "solo")
    shutil.rmtree(folder / "light")
    assert "at least 2 classes are needed" in refused("image_classifier", folder)


def sentences(good, bad, fill, count=120, joint=" "):
    random = np.random.default_rng(0)
    rows = []
    for index in range(count):
        words = [*random.choice(fill, 5), random.choice([good, bad][index % 2])]
        rows.append((joint.join(random.permutation(words)), ["praise", "blame"][index % 2]))
    return pd.DataFrame(rows, columns=["text", "label"])


@pytest.mark.parametrize(
    ("good", "bad", "fill", "joint"),
    [
        pytest.param(
            ["fine", "great"], ["poor", "awful"], ["a", "film", "plot", "and", "by"], " ", marks=pytest.mark.long
        ),
        pytest.param(
            ["чудесно", "отлично"], ["скучно", "плохо"], ["фильм", "очень", "сюжет"], " ", marks=pytest.mark.long
        ),
        (["好看", "精彩"], ["难看", "无聊"], ["电影", "这部", "非常", "故事"], ""),
    ],
)
def test_text_classifier(run, tmp_path, good, bad, fill, joint):
    sentences(good, bad, fill, joint=joint).to_csv(tmp_path / "texts.csv", index=False)
    printed, model = run("text_classifier", tmp_path / "texts.csv", BATCH_SIZE=16)
    assert float(re.fullmatch(r"test accuracy ([01]\.\d{4})", printed[-1])[1]) > 0.9
    typeset = f"«{good[0]}»\u00a0{good[1]}…".upper()  # Neither case nor typography makes a difference.
    answers = model.predict(tf.constant([typeset, " ".join(good), joint.join(bad)]), verbose=0)
    assert answers.argmax(axis=1).tolist() == [1, 1, 0]
    np.testing.assert_array_equal(answers[0], answers[1])


@pytest.mark.long
def test_text_classifier_with_a_test_file(run, tmp_path):
    texts = sentences(["fine"], ["poor"], [f"word{n}" for n in range(30)])
    texts.to_csv(tmp_path / "texts.csv", index=False)
    texts[:20].assign(label=texts["label"][:20].map({"praise": "blame", "blame": "praise"})).to_csv(
        tmp_path / "test.csv", index=False
    )
    printed, _ = run("text_classifier", tmp_path / "texts.csv", tmp_path / "test.csv", BATCH_SIZE=16)
    assert printed[-1] == "test accuracy 0.0000"
    assert [line.split()[1:] for line in printed if line.startswith("praise")] == [["54", "6", "10"]]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("review,label\nfine,praise\n", "['text'] not in index"),
        ("text,label\nfine,praise\nfine,praise\nfine,praise\n", "3 different texts: ['praise']"),
        ("text,label\na,good\nb,good\nc,good\nd,good\n", "at least 2 classes are needed"),
        ("text,label\n", "at least 2 classes are needed"),
        ("text,label\nfine, good,praise\npoor, bad,blame\n", "Expected 2 columns, got 3"),
        ("text,label\n" + "".join(f"w{n}{label},{label}\n" for n in range(40) for label in "ab"), "share a word"),
        ("text,label\n" + "".join(f"{'!' * n},{label}\n" for n in range(1, 30) for label in "ab"), "share a word"),
    ],
)
def test_text_classifier_names_what_is_wrong(refused, tmp_path, text, reason):
    (tmp_path / "texts.csv").write_text(text)
    assert reason in refused("text_classifier", tmp_path / "texts.csv")


def mixed_table(rows=400):
    random = np.random.default_rng(0)
    mass, island = random.normal(4000, 500, rows).round(), random.choice(["north", "south", "Öland"], rows)
    table = pd.DataFrame(
        {
            "mass (g)": np.where(random.uniform(size=rows) < 0.05, np.nan, mass),
            "island": np.where(random.uniform(size=rows) < 0.05, "", island),
            "tagged": random.choice(["True", "False"], rows),
            "seen": pd.Timestamp("2024-01-01") + pd.to_timedelta(random.integers(0, 700, rows), "D"),
            "station": "main",
            "time": 1_700_000_000 + random.integers(0, 120, rows),
        }
    )
    return table.assign(species=np.where(table["time"] >= 1_700_000_060, "nigra", "alba"), weight=table["time"] - 7e8)


@pytest.mark.parametrize("separator", [",", pytest.param(";", marks=pytest.mark.long)])
def test_table_with_classes(run, tmp_path, separator):
    table = mixed_table().drop(columns="weight")
    table.to_csv(tmp_path / "table.csv", index=False, sep=separator, decimal="." if separator == "," else ",")
    printed, model = run("table", tmp_path / "table.csv", "species", EPOCHS=15, BATCH_SIZE=32)
    assert float(re.fullmatch(r"test accuracy ([01]\.\d{4})", printed[-1])[1]) > 0.9
    assert "species is a class" in printed
    kinds = dict(re.findall(r"^(.+): (\w+), \d+ values", "\n".join(printed), re.MULTILINE))
    assert kinds == {
        **{"mass (g)": "number", "island": "category", "tagged": "category"},
        **{"seen": "date", "station": "category", "time": "number"},
    }
    raw = {
        "mass (g)": np.array([4000, np.nan]),
        "island": np.array(["", "elsewhere"]),
        "tagged": np.array(["True", ""]),
    }
    raw |= {"seen": np.array([19800, np.nan]), "time": np.array([1_700_000_043.0, 1_700_000_077])}
    assert model(raw).numpy().argmax(axis=1).tolist() == [0, 1]


@pytest.mark.long
def test_table_with_a_large_number(run, tmp_path):
    table = mixed_table().drop(columns="species")
    table.loc[table.index % 10 > 0, "station"] = "other"
    table.to_csv(tmp_path / "table.csv", index=False)
    printed, model = run("table", tmp_path / "table.csv", "weight", BATCH_SIZE=16)
    assert "weight is a number" in printed
    # The variance is 1,200; float32 would keep only one number in 64 of 1e9.
    assert float(re.fullmatch(r"test mse ([\d.]+)", printed[-1])[1]) < 100
    assert model.output.dtype == "float64"


@pytest.mark.long
def test_table_survives_a_column_that_varies_outside_train_only(run, tmp_path):
    random = np.random.default_rng(0)
    x = random.normal(size=300)
    rare = np.zeros(300)
    rare[:4] = 1
    pd.DataFrame({"x": x, "rare": rare, "y": 3 * x}).to_csv(tmp_path / "table.csv", index=False)
    printed, model = run("table", tmp_path / "table.csv", "y", EPOCHS=10, BATCH_SIZE=32)
    assert float(printed[-1].split()[-1]) < 1
    assert abs(model({"x": np.zeros(1), "rare": np.full(1, 1e9)})) < 100


@pytest.mark.long
def test_table_of_small_numbers_and_names_with_slashes(run, tmp_path):
    x = np.random.default_rng(0).normal(size=300)
    table = pd.DataFrame({"a/b": x, "a_b": -x, "y/t": 1e-6 * (x + 0.01)})
    table.to_csv(tmp_path / "table.csv", index=False)
    printed, model = run("table", tmp_path / "table.csv", "y/t", EPOCHS=10)
    assert 0 < float(printed[-1].removeprefix("test mse ")) < 1e-13  # The variance is 1e-12.
    assert abs(model({"a|b": np.ones(1), "a_b": -np.ones(1)}).numpy() - 1.01e-6) < 3e-7


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "No such file"),
        ("a,b\n1,x\n", "target"),
        ("a,target\n1,x\n2,y\n3,y\n4,y\n", "3 different rows of each class are needed: ['x']"),
        ("a,target\n" + "".join(f"{n},5.5\n" for n in range(30)), "at least 2 values of target"),
        ("a,target\n", "at least 2 values of target"),
        ("a,target\n1,5,2\n2,5,4\n3,5,6\n", "Expected 2 columns, got 3"),
    ],
)
def test_table_names_what_is_wrong(refused, tmp_path, text, reason):
    if text:
        (tmp_path / "table.csv").write_text(text)
    assert reason in refused("table", tmp_path / "table.csv", "target")


# As good as the recipe of the kind: three seeds, on the recipe's data and epochs.

REAL = pytest.mark.skipif("TFDS_DATA_DIR" not in os.environ, reason="TFDS_DATA_DIR names no prepared data")


def of_recipe(record, metric):
    """The recipe's mean over its seeds."""
    runs = json.loads((ROOT / "results" / f"{record}.json").read_text())["runs"]
    return np.mean([each["metrics"][metric] for each in runs])


def of_template(run, name, *arguments, **settings):
    return np.mean([float(run(name, *arguments, SEED=seed, **settings)[0][-1].split()[-1]) for seed in range(3)])


@pytest.mark.slow
@pytest.mark.real_data
@REAL
def test_image_classifier_is_as_good_as_the_recipe(run, tmp_path):
    data = load_images(MNIST, SharedConfig(data="tfds"), (28, 28))
    for part in ("train", "validation", "test"):
        split = getattr(data, part)
        for index, (pixels, target) in enumerate(zip(np.asarray(split.inputs), np.asarray(split.targets), strict=True)):
            path = tmp_path / "mnist" / part / str(target.argmax()) / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels[..., 0]).save(path)
    accuracy = of_template(run, "image_classifier", tmp_path / "mnist", EPOCHS=3)
    assert accuracy > of_recipe("mnist_cnn-3-epochs", "accuracy") - 0.01


@pytest.mark.slow
@pytest.mark.real_data
@REAL
def test_text_classifier_is_as_good_as_the_recipe(run, tmp_path):
    data = load_texts(IMDB, SharedConfig(data="tfds"), "", "")
    for name, parts in {"train": (data.train, data.validation), "test": (data.test,)}.items():
        texts = [text.decode() for part in parts for text in part.inputs.numpy()]
        labels = [data.class_names[label] for part in parts for label in np.asarray(part.targets).argmax(axis=1)]
        pd.DataFrame({"text": texts, "label": labels}).to_csv(tmp_path / f"{name}.csv", index=False)
    accuracy = of_template(run, "text_classifier", tmp_path / "train.csv", tmp_path / "test.csv")
    assert accuracy > of_recipe("text_classifier", "accuracy") - 0.01


def generated_table(recipe, path):
    arrays = load_recipe(recipe).generate()
    inputs, targets = (np.concatenate([arrays["train"][i], arrays["test"][i]]) for i in range(2))
    pd.DataFrame(inputs).add_prefix("column ").assign(target=targets).to_csv(path, index=False)
    return path


@pytest.mark.slow
def test_table_is_as_good_as_the_recipe_of_classes(run, tmp_path):
    path = generated_table("dense_classifier", tmp_path / "table.csv")
    assert of_template(run, "table", path, "target") > of_recipe("dense_classifier", "accuracy") - 0.01


@pytest.mark.slow
def test_table_is_as_good_as_the_recipe_of_numbers(run, tmp_path):
    path = generated_table("dense_regression", tmp_path / "table.csv")
    assert of_template(run, "table", path, "target") < 1.1 * of_recipe("dense_regression", "mse")
