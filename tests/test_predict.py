"""Own data, from training to prediction, each in a process of its own."""

import dataclasses
import io
import json
import pathlib
import subprocess
import sys

import keras
import numpy as np
import pandas as pd
import pytest
from conftest import load_recipe, smoke_config
from PIL import Image, ImageDraw
from programs import ROOT, run_program
from test_readme import load_script

CLASSES = ("circle", "cross", "empty", "square")
predict = load_script("predict")


def draw(name: str, mode: str, random: np.random.Generator) -> Image.Image:
    """A bright shape on a dark ground; of any size and aspect."""
    width, height = random.integers(24, 90, 2).tolist()
    image = Image.new(mode, (width, height), 20 if mode == "L" else tuple(random.integers(0, 60, 3).tolist()))
    ink = 230 if mode == "L" else tuple(random.integers(180, 255, 3).tolist())
    pen, (x, y), r = ImageDraw.Draw(image), (width // 2, height // 2), min(width, height) // 2 - 4
    if name == "circle":
        pen.ellipse([x - r, y - r, x + r, y + r], fill=ink)
    elif name == "cross":
        pen.line([x - r, y - r, x + r, y + r], fill=ink, width=4)
        pen.line([x - r, y + r, x + r, y - r], fill=ink, width=4)
    elif name == "square":
        pen.rectangle([x - r, y - r, x + r, y + r], outline=ink, width=4)
    return image


def draw_all(folder: pathlib.Path, mode: str, count: int, seed: int) -> dict[pathlib.Path, str]:
    random, truth = np.random.default_rng(seed), {}
    for name in CLASSES:
        (folder / name).mkdir(parents=True)
        for number in range(count):
            path = folder / name / f"{number}.{('png', 'jpg', 'bmp', 'gif')[number % 4]}"
            draw(name, mode, random).save(path)
            truth[path] = name
    return truth


@pytest.mark.parametrize("mode", [pytest.param("L", marks=pytest.mark.long), "RGB"])
def test_pictures_from_training_to_prediction(tmp_path, mode):
    draw_all(tmp_path / "pictures", mode, 100, seed=0)
    held_out = draw_all(tmp_path / "new", mode, 10, seed=1)
    flags = ["--epochs", "8", "--batch-size", "32", "--no-baseline", "--quiet", "--run-dir", str(tmp_path / "run")]
    trained = run_program(str(ROOT / "recipes/mnist_cnn.py"), "--data", str(tmp_path / "pictures"), *flags)
    assert (trained.returncode, trained.stdout, trained.stderr) == (0, "", "")
    model = keras.models.load_model(tmp_path / "run" / "model.keras")
    assert model.input_shape == (None, 28, 28, 3 if mode == "RGB" else 1)
    run = run_program("scripts/predict.py", str(tmp_path / "run"), *map(str, held_out), "--json")
    assert (run.returncode, run.stderr) == (0, "")
    answers = [json.loads(line) for line in run.stdout.splitlines()]
    assert [answer["input"] for answer in answers] == [str(path) for path in held_out]
    assert np.mean([answer["class"] == held_out[pathlib.Path(answer["input"])] for answer in answers]) >= 0.95
    for answer in answers:
        assert tuple(answer["probabilities"]) == CLASSES
        assert (
            answer["probability"] == max(answer["probabilities"].values()) == answer["probabilities"][answer["class"]]
        )
        assert sum(answer["probabilities"].values()) == pytest.approx(1, abs=1e-5)


@pytest.mark.long
def test_three_classes_of_texts_from_training_to_prediction(tmp_path):
    words = {"fruit": ["apple", "pear", "plum"], "metal": ["iron", "zinc", "lead"], "sea": ["wave", "tide", "salt"]}
    random = np.random.default_rng(0)
    labels = random.choice(list(words), 600)
    texts = [f"the {random.choice(words[label])} is {random.choice(['here', 'gone', 'big'])}" for label in labels]
    pd.DataFrame({"said": texts, "about": labels}).to_csv(tmp_path / "texts.csv", index=False)
    config = smoke_config(load_recipe("text_classifier"), tmp_path / "run", data=str(tmp_path / "texts.csv"), epochs=6)
    config = dataclasses.replace(config, text_column="said", label_column="about", smoke=False)
    load_recipe("text_classifier").train(config)
    command = [sys.executable, "scripts/predict.py", str(tmp_path / "run"), "-", "--json"]
    new = "a plum in the morning\n\nsome zinc, at last!\nTIDE and time\n"
    run = subprocess.run(command, cwd=ROOT, input=new, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (0, "")
    answers = [json.loads(line) for line in run.stdout.splitlines()]
    assert [answer["class"] for answer in answers] == ["fruit", "metal", "sea"]
    assert answers[1]["input"] == "some zinc, at last!"
    assert tuple(answers[0]["probabilities"]) == tuple(words)
    # From a CSV, the text column alone; from a file with a byte order mark, the text alone.
    pd.DataFrame({"said": ["a pear, a\nplum"], "about": ["metal"]}).to_csv(tmp_path / "new.csv", index=False)
    (tmp_path / "new.txt").write_text("zinc", encoding="utf-8-sig")
    answers = predict.predict(tmp_path / "run", [str(tmp_path / "new.csv"), str(tmp_path / "new.txt")])
    assert [(answer["input"], answer["class"]) for answer in answers] == [
        ("a pear, a\nplum", "fruit"),
        ("zinc", "metal"),
    ]


@pytest.mark.parametrize("name", ["dense_classifier", pytest.param("linear_regression", marks=pytest.mark.long)])
def test_rows_from_training_to_prediction(tmp_path, name):
    """The columns are found by name, in whatever order, whatever else is in the file."""
    random = np.random.default_rng(0)
    table = pd.DataFrame(random.uniform(-1, 1, (400, 2)), columns=["width", "height"])
    number = 2 * table.width - table.height
    table["kind"] = np.where(number > 0, "flat", "tall") if name == "dense_classifier" else number
    table.to_csv(tmp_path / "table.csv", index=False)
    recipe = load_recipe(name)
    settings = {"smoke": False, "target": "kind", "epochs": 30, "learning_rate": 0.05, "batch_size": 32}
    recipe.train(smoke_config(recipe, tmp_path / "run", data=str(tmp_path / "table.csv"), **settings))
    new = pd.DataFrame({"note": ["x", "y"], "height": [0.9, -0.9], "width": [-0.5, 0.5]})
    new.to_csv(tmp_path / "new.csv", index=False)
    answers = predict.predict(tmp_path / "run", [str(tmp_path / "new.csv")])
    assert [answer["input"] for answer in answers] == [f"{tmp_path}/new.csv, row 2", f"{tmp_path}/new.csv, row 3"]
    if name == "dense_classifier":
        assert [answer["class"] for answer in answers] == ["tall", "flat"]
    else:
        np.testing.assert_allclose([answer["value"] for answer in answers], [-1.9, 1.9], atol=0.05)
    pd.DataFrame({"a": [1], "b": [2]}).to_csv(tmp_path / "other.csv", index=False)
    with pytest.raises(predict.UserError, match=r"no column 'width', 'height' among 'a', 'b'; the model takes"):
        predict.predict(tmp_path / "run", [str(tmp_path / "other.csv")])


@pytest.fixture
def picture_run(finished_run):
    return finished_run("mnist_cnn")[1]


def test_a_picture_through_standard_input_and_the_table(picture_run, tmp_path):
    png = io.BytesIO()
    Image.new("L", (50, 40), 90).save(png, "PNG")
    command = [sys.executable, "scripts/predict.py", str(picture_run), "-"]
    run = subprocess.run(command, cwd=ROOT, input=png.getvalue(), capture_output=True, check=False)
    assert (run.returncode, run.stderr) == (0, b"")
    assert [word in run.stdout.decode() for word in ("input", "class", "probability")] == [True] * 3


def test_what_is_wrong_with_standard_input_is_said_of_it(picture_run, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"no picture")))
    with pytest.raises(predict.UserError, match=r"^standard input: not a readable image"):
        predict.predict(picture_run, ["-"])


def test_without_a_standard_input(picture_run, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(predict.UserError, match=r"^-: there is no standard input; give files"):
        predict.predict(picture_run, ["-"])


@pytest.mark.parametrize(
    ("files", "named"),
    [
        (["."], "a folder; give files"),
        (["-", "-"], "give - once"),
        (["nowhere.png"], "nowhere.png: no such file"),
        (["broken.png"], "broken.png: not a readable image"),
    ],
)
def test_what_cannot_be_predicted_is_named(picture_run, tmp_path, monkeypatch, files, named):
    (tmp_path / "broken.png").write_text("none")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(predict.UserError, match=named):
        predict.predict(picture_run, files)


def test_a_folder_that_is_no_run(tmp_path):
    run = run_program("scripts/predict.py", str(tmp_path), "x.png")
    assert (run.returncode, run.stdout, run.stderr.count("\n")) == (2, "", 1)
    assert "result.json: can't be read (No such file or directory)" in run.stderr


def test_a_result_that_is_none(picture_run, tmp_path):
    for name in ("result.json", "config.json"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(predict.UserError, match="not written by a recipe, or damaged"):
        predict.predict(tmp_path, ["x.png"])
