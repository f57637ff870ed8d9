"""The report of a run on labelled data of the user's own."""

import json
import shutil
import sys

from common.records import read_json

import numpy as np
import pandas as pd
import pytest
from conftest import load_recipe, smoke_config
from PIL import Image
from test_readme import load_script

evaluate = load_script("evaluate")


def run_main(monkeypatch, *words):
    """Calls the program in this process; returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        evaluate.run_script(evaluate.main)
    return ended.value.code


def pictures(folder, count, seed, levels=(("cat", 60), ("dog", 100), ("owl", 140))):
    random = np.random.default_rng(seed)
    for name, level in levels:
        (folder / name).mkdir(parents=True)
        for number in range(count):
            pixels = random.normal(level, 40, (9, 9)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).resize((40, 30)).save(folder / name / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def picture_run(tmp_path_factory):
    """A run on pictures with a test folder."""
    folder = tmp_path_factory.mktemp("pictures")
    for seed, split in enumerate(("train", "test")):
        pictures(folder / "data" / split, 20, seed)
    recipe = load_recipe("mnist_cnn")
    config = smoke_config(recipe, folder / "run", data=str(folder / "data"), batch_size=16, smoke=False)
    recipe.train(config)
    return folder / "run", folder / "data"


def test_the_report_is_that_of_the_training(picture_run, tmp_path, monkeypatch, capsys):
    run, data = picture_run
    assert run_main(monkeypatch, run, data, "-o", tmp_path / "report") == 0
    printed, errors = capsys.readouterr()
    assert errors == ""
    trained, found = read_json(run / "result.json"), read_json(tmp_path / "report" / "evaluation.json")
    for name, value in found["metrics"].items():
        if name != "cross_entropy":
            assert value == pytest.approx(trained["metrics"][name])
            assert f"  {name.replace('_', ' '):<32} {value:>12.4f}\n" in printed
    assert 0 < found["metrics"]["cross_entropy"] < 2
    assert found["confusion_matrix"] == trained["evaluation"]["confusion_matrix"]
    assert found["classes"] == trained["evaluation"]["classes"]
    assert found["examples"] == 60
    names = {path.name for path in (tmp_path / "report").iterdir()}
    assert names == {"evaluation.json", "confusion_matrix.png", "worst_mistakes.png"}
    for mistake in found["worst_mistakes"]:
        assert f"test/{mistake['true']}/" in mistake["input"]
        (answer,) = evaluate.predict.predict(run, [mistake["input"]])
        assert answer["class"] == mistake["predicted"]
        assert answer["probability"] == pytest.approx(mistake["probability"], abs=1e-6)
    assert "mistaken for" in printed
    assert run_main(monkeypatch, run, data, "-o", tmp_path / "report") == 2
    assert "exists and is not an empty folder; name a new one" in capsys.readouterr().err


def test_a_few_examples_of_one_class(picture_run, tmp_path, monkeypatch, capsys):
    """Colour pictures are read as the run takes them."""
    (tmp_path / "dog").mkdir()
    for number in range(2):
        Image.new("RGB", (20, 20), (10, 200, number)).save(tmp_path / "dog" / f"{number}.png")
    report = evaluate.evaluate(picture_run[0], tmp_path)
    answers = evaluate.predict.predict(picture_run[0], [str(tmp_path)])
    assert report.metrics["accuracy"] == np.mean([answer["class"] == "dog" for answer in answers])
    assert "no example of class 'cat', 'owl'; averages over classes leave it out" in capsys.readouterr().err


def test_what_is_wrong_with_the_data_is_named(picture_run, tmp_path):
    run, data = picture_run

    def problem(folder):
        with pytest.raises(evaluate.UserError) as refused:
            evaluate.evaluate(run, folder)
        return str(refused.value)

    crow = pictures(tmp_path / "crow", 1, 0, [("crow", 9), ("dog", 9)])
    assert (
        problem(crow) == f"{crow}: the run has no class 'crow', only 'cat', 'dog', 'owl'; rename or remove the examples"
    )
    (crow / "dog" / "bad.png").touch()
    assert problem(crow).startswith(f"{crow}/dog/bad.png: not a readable image")
    assert problem(tmp_path / "nowhere") == f"{tmp_path}/nowhere: no such file or folder; give labelled data"
    assert problem(crow / "dog").endswith("a class below " + f"{crow}/dog; move or remove it")
    shutil.copytree(data / "train", tmp_path / "parts" / "train")
    assert problem(tmp_path / "parts").endswith(
        "has a folder 'train' but none called 'test'; give the folder to evaluate"
    )


@pytest.mark.parametrize("name", ["dense_classifier", pytest.param("dense_regression", marks=pytest.mark.long)])
def test_tables(name, tmp_path, monkeypatch, capsys):
    random = np.random.default_rng(0)
    table = pd.DataFrame(random.uniform(-1, 1, (200, 2)), columns=["width", "height"])
    number = 1000 * table.width - table.height
    table["kind"] = np.where(number > 0, "flat", "tall") if name == "dense_classifier" else number
    table.to_csv(tmp_path / "table.csv", index=False)
    recipe = load_recipe(name)
    recipe.train(smoke_config(recipe, tmp_path / "run", data=str(tmp_path / "table.csv"), target="kind"))
    new = table[["height", "kind", "width"]].iloc[:50]
    new.to_csv(tmp_path / "new.csv", index=False)
    report = evaluate.evaluate(tmp_path / "run", tmp_path / "new.csv")
    answers = evaluate.predict.predict(tmp_path / "run", [str(tmp_path / "new.csv")])
    if name == "dense_classifier":
        right = [answer["class"] for answer in answers] == new.kind
        assert report.metrics["accuracy"] == pytest.approx(right.mean())
    else:
        errors = np.array([answer["value"] for answer in answers]) - new.kind
        assert report.metrics["mse"] == pytest.approx(np.mean(errors**2), rel=1e-5)
        assert set(report.metrics) == {"mse", "mae", "r2"}
    assert capsys.readouterr().err == ""
    evaluate.evaluate(tmp_path / "run", tmp_path / "table.csv")
    assert "the run was trained on most of these examples" in capsys.readouterr().err
    new.drop(columns="kind").to_csv(tmp_path / "bare.csv", index=False)
    assert run_main(monkeypatch, tmp_path / "run", tmp_path / "bare.csv") == 2
    assert "no column 'kind' among 'height', 'width'" in capsys.readouterr().err


@pytest.mark.long
def test_texts(tmp_path, monkeypatch, capsys):
    texts = [f"{('fine', 'poor')[number % 2]} film of day {number}" for number in range(80)]
    labels = ["good", "bad"] * 40
    pd.DataFrame({"review": texts, "verdict": labels}).to_csv(tmp_path / "texts.csv", index=False)
    recipe = load_recipe("text_classifier")
    settings = {"text_column": "review", "label_column": "verdict", "data": str(tmp_path / "texts.csv")}
    recipe.train(smoke_config(recipe, tmp_path / "run", **settings))
    new = pd.DataFrame({"review": ["the fine one", "one poor film", "how fine"], "verdict": ["good", "bad", "bad"]})
    new.to_csv(tmp_path / "new.csv", index=False)
    assert run_main(monkeypatch, tmp_path / "run", tmp_path / "new.csv", "-o", tmp_path / "report") == 0
    found = json.loads((tmp_path / "report" / "evaluation.json").read_text())
    assert found["metrics"]["accuracy"] == pytest.approx(2 / 3)
    assert [mistake["input"] for mistake in found["worst_mistakes"]] == ["how fine"]
    assert "how fine" in (tmp_path / "report" / "worst_mistakes.md").read_text()
    for name in ("good", "bad"):
        (tmp_path / "folders" / name).mkdir(parents=True)
        (tmp_path / "folders" / name / "1.txt").write_text(f"first line\n{'fine' if name == 'good' else 'poor'}")
    report = evaluate.evaluate(tmp_path / "run", tmp_path / "folders")
    assert (report.metrics["accuracy"], report.details["examples"]) == (1.0, 2)
