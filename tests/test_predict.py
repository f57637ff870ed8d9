"""Own data, from training to prediction, each in a process of its own."""

import dataclasses
import io
import json
import os
import pathlib
import re
import subprocess
import sys

import keras
import numpy as np
import pandas as pd
import pytest
import rich.cells
import rich.console
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
        (["empty"], "empty: a folder without files for a model of images; give files, or another folder"),
        (["-", "-"], "give - once"),
        (["nowhere.png"], "nowhere.png: no such file"),
        (["broken.png"], "broken.png: not a readable image"),
    ],
)
def test_what_cannot_be_predicted_is_named(picture_run, tmp_path, monkeypatch, files, named):
    (tmp_path / "broken.png").write_text("none")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").touch()
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


@pytest.fixture
def some_pictures(tmp_path, monkeypatch):
    """A folder with 31 pictures, two broken ones, and a file of another kind; a name is not UTF-8."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "new" / "more").mkdir(parents=True)
    for number in range(30):
        path = tmp_path / "new" / ("more" if number % 2 else "") / f"{number:02}.{('png', 'tif', 'webp')[number % 3]}"
        Image.new("L", (30, 30), 8 * number).save(path)
    (tmp_path / "new" / os.fsdecode(b"caf\xe9.png")).hardlink_to(tmp_path / "new" / "00.png")
    for name in ("new/broken.png", "new/more/.hidden.png", "new/more/cut.JPG", "new/notes.md"):
        (tmp_path / name).write_text("none")
    return tmp_path


def run_main(monkeypatch, *words):
    """Calls the program in this process; returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["predict.py", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        predict.run_script(predict.main)
    return ended.value.code


def test_a_folder_is_predicted_past_what_is_broken(picture_run, some_pictures, monkeypatch, capsys):
    monkeypatch.setattr(predict.artefacts, "BATCH", 7)  # Several batches; the last one is smaller.
    assert run_main(monkeypatch, picture_run, "new", "nowhere.png", "--json") == 2
    printed = capsys.readouterr()
    answers = [json.loads(line) for line in printed.out.splitlines()]
    names = [f"new/{number:02}.{('png', 'tif', 'webp')[number % 3]}" for number in range(30)]
    more = [name.replace("new", "new/more") for name in names[1::2]]
    assert [answer["input"] for answer in answers] == [*names[::2], "new/caf\\udce9.png", *more]
    for answer in (answers[0], answers[20]):
        (alone,) = predict.predict(picture_run, [answer["input"]])
        assert alone["probabilities"] == pytest.approx(answer["probabilities"], abs=1e-6)
    *warnings, last = printed.err.splitlines()
    assert warnings[0] == "warning: new: files with other suffixes are left out: .md (1)"
    assert [line.split(": ")[1] for line in warnings[1:]] == ["new/broken.png", "new/more/cut.JPG", "nowhere.png"]
    assert last == "error: 3 inputs can't be predicted; repair or remove them"


def test_answers_as_csv(picture_run, some_pictures, monkeypatch, capsys):
    (some_pictures / "answers.csv").write_text("of before")
    assert run_main(monkeypatch, picture_run, "new", "-o", "answers.csv", "--top", "3") == 2
    assert capsys.readouterr().out == "predictions: 31 rows in answers.csv\n"
    table = pd.read_csv("answers.csv")
    names = [f"{name}{rank}" for rank in ("", "_2", "_3") for name in ("class", "probability")]
    assert [*table.columns] == ["input", *names, *(f"probability of {digit}" for digit in range(10))]
    ranked = np.sort(table[[name for name in table if " of " in name]].to_numpy(), axis=1)[:, ::-1]
    np.testing.assert_allclose(ranked[:, :3], table[["probability", "probability_2", "probability_3"]], atol=1e-7)
    np.testing.assert_allclose(ranked.sum(axis=1), 1, atol=1e-5)
    second = table[[f"probability of {digit}" for digit in range(10)]].to_numpy().argsort(axis=1)[:, -2]
    assert (table["class_2"] == second).all()
    assert not list(some_pictures.glob("*.part"))


def test_without_answers_an_earlier_csv_stays(picture_run, some_pictures, monkeypatch, capsys):
    (some_pictures / "answers.csv").write_text("of before")
    assert run_main(monkeypatch, picture_run, "new/broken.png", "-o", "answers.csv") == 2
    assert (some_pictures / "answers.csv").read_text() == "of before"
    assert not list(some_pictures.glob("*.part"))
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["-o", "answers.txt"], r"error: --output answers\.txt: the name must end in \.csv"),
        (["-o", "nowhere/answers.csv"], r"error: --output nowhere/answers\.csv: No such file or directory; write to"),
        (["-o", "answers.csv", "--json"], "error: --json: not allowed with argument -o/--output; --help lists"),
        (["--top", "0"], "error: --top 0: must be at least 1"),
    ],
)
def test_flags_that_do_not_fit(picture_run, some_pictures, monkeypatch, capsys, flags, named):
    assert run_main(monkeypatch, picture_run, "new/00.png", *flags) == 2
    assert re.match(named, capsys.readouterr().err)


def test_only_ten_of_many_problems_are_printed(capsys):
    with pytest.raises(predict.UserError, match=r"^15 inputs can't be predicted \(the first 10 of 15 are above\)"):
        predict.raise_for([f"{number}: broken" for number in range(15)])
    assert len(capsys.readouterr().err.splitlines()) == 10


@pytest.mark.parametrize("letter", ["x", "\u4e2d"])
def test_texts_are_shortened_to_the_width_of_the_table(letter):
    answers = [{"input": f"{letter * 5000}\nand more [b]", "class": name, "probability": 0.5} for name in ("a", "[c]")]
    table = predict.as_table(answers, 79)
    console = rich.console.Console(width=200, file=io.StringIO())
    console.print(table)
    lines = console.file.getvalue().splitlines()
    assert max(map(rich.cells.cell_len, lines)) in (78, 79)
    assert len(lines) == 6
    assert "[c]" in lines[4]
    whole = predict.as_table([{"input": "long/" * 40 + "name.png", "class": "a"}])
    console.print(whole)
    assert "name.png" in console.file.getvalue(), "paths stay whole"
