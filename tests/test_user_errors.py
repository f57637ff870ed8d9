"""What a user can get wrong: exit code 2, and one line on stderr that names the thing and the remedy."""

import dataclasses
import os
import pathlib
import sys

from common.cli import run_recipe
from common.records import write_json

import numpy as np
import pandas as pd
import pytest
from conftest import RECIPES, load_recipe
from PIL import Image
from programs import NO_NETWORK, ROOT, run_program


def pictures(folder: pathlib.Path, *names: str, count: int = 10) -> pathlib.Path:
    for name in names:
        (folder / name).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / name / f"{number}.png")
    return folder


def table(path: pathlib.Path, **columns) -> pathlib.Path:
    pd.DataFrame(columns).to_csv(path, index=False)
    return path


def no_images(folder):
    (folder / "notes.txt").write_text("none here")
    return folder


def empty_class(folder):
    pictures(folder, "cat", "dog")
    (folder / "mouse").mkdir()
    return folder


def folder_within_a_class(folder):
    pictures(folder, "cat", "dog")
    return pictures(folder, "dog/.thumbnails", "dog/puppies")


def one_class(folder):
    return pictures(folder, "cat")


def unreadable_image(folder):
    pictures(folder, "cat", "dog")
    (folder / "dog" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    return folder


def truncated_image(folder):
    pictures(folder, "cat", "dog")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(folder / "dog" / "cut.jpg")
    whole = (folder / "dog" / "cut.jpg").read_bytes()
    (folder / "dog" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    return folder


def several_broken_images(folder):
    pictures(folder, "cat", "dog")
    for number in range(3):
        (folder / "cat" / f"{number}.png").write_text("<html>404</html>")
    return folder


def class_only_in_test(folder):
    pictures(folder / "train", "cat", "dog")
    pictures(folder / "test", "cat", "mouse")
    return folder


def class_name_in_no_utf8(folder):
    return pictures(folder, "cat", os.fsdecode(b"caf\xe9"))


def too_few(folder):
    return pictures(folder, "cat", "dog", count=1)


def missing_column(folder):
    return table(folder / "table.csv", a=[1, 2], b=[1, 2])


def text_among_numbers(folder):
    values = [*range(1, 81, 2)]
    return table(folder / "table.csv", a=[*values[:2], "three", *values[3:]], target=[0, 1] * 20)


def missing_target(folder):
    return table(folder / "table.csv", a=[1, 5, 3, 4] * 5, target=[0, None, 1, "NA"] * 5)


def infinite_number(folder):
    return table(folder / "table.csv", a=[*range(1, 38, 2), "inf"], target=[0, 1] * 10)


def empty_file(folder):
    (folder / "empty.csv").touch()
    return folder / "empty.csv"


def header_only(folder):
    return table(folder / "table.csv", a=[], target=[])


def no_inputs(folder):
    return table(folder / "table.csv", target=[0, 1] * 10)


def one_label(folder):
    return table(folder / "table.csv", a=range(1, 40, 2), target=["same"] * 20)


def binary_file(folder):
    (folder / "table.csv").write_bytes(bytes(range(256)))
    return folder / "table.csv"


def text_without_label(folder):
    return table(folder / "texts.csv", text=["good", "bad"] * 10, label=["pos", ""] * 10)


def empty_text(folder):
    return table(folder / "texts.csv", text=["good", " "] * 10, label=["pos", "neg"] * 10)


def texts(folder, another: bytes):
    for name in ("neg", "pos"):
        (folder / name).mkdir()
        (folder / name / "a.txt").write_text("fine")
    (folder / "neg" / "b.txt").write_bytes(another)
    return folder


def no_text(folder):
    return texts(folder, b"\x00\x01\xff")


def blank_text(folder):
    return texts(folder, b" \n")


def huge_number(folder):
    return table(folder / "table.csv", a=[*range(1, 38, 2), 1e308], target=[0, 1] * 10)


def two_columns_of_one_name(folder):
    (folder / "table.csv").write_text("a,a,target\n" + "1,2,0\n" * 20)
    return folder / "table.csv"


def longer_rows(folder):
    (folder / "table.csv").write_text("a,target\n" + "1,2,0\n" * 20)
    return folder / "table.csv"


def empty_class_of_texts(folder):
    for name in ("neg", "pos"):
        (folder / name).mkdir()
    (folder / "neg" / "a.txt").write_text("fine")
    return folder


def no_words(folder):
    return table(folder / "texts.csv", text=["?" * number for number in range(1, 41)], label=["pos", "neg"] * 20)


def no_word_twice(folder):
    return table(folder / "texts.csv", text=[f"word{number}" for number in range(40)], label=["pos", "neg"] * 20)


def only_test_folder(folder):
    pictures(folder / "test", "cat", "dog")
    return folder


def unknown_split(folder):
    pictures(folder / "train", "cat", "dog")
    pictures(folder / "val", "cat", "dog")
    return folder


def row_numbers(folder):
    return table(folder / "table.csv", a=range(20), target=[0, 1] * 10)


def link_to_nowhere(folder):
    pictures(folder, "cat", "dog")
    (folder / "dog" / "gone.png").symlink_to(folder / "dog" / "nowhere.png")
    return folder


def text_target(folder):
    return table(folder / "table.csv", a=range(1, 40, 2), target=["same"] * 20)


def number_target(folder):
    return table(folder / "table.csv", a=[1, 2] * 30, target=np.arange(60) / 7)


def one_column_for_both(folder):
    (folder / "texts.csv").write_text("text,label\nfine,pos\n")
    return ["--data", str(folder / "texts.csv"), "--label-column", "text"]


def unquoted_commas(folder):
    (folder / "texts.csv").write_text("text,label\nfine,pos\nwell, well,pos\n")
    return folder / "texts.csv"


def a_folder(folder):
    return folder


def absent(folder):
    return folder / "nowhere"


def interrupted(folder, **changes):
    """A run of linear_regression before its first checkpoint, as `changes` have it."""
    module = load_recipe("linear_regression")
    settings = {
        "recipe": "linear_regression",
        "config": dataclasses.asdict(module.Config(resume=True, quiet=True)),
        "chosen": {"strategy": "none", "devices": 1, "precision": "float32"},
        "files": {},
        "resumed": 0,
        "data_digest": "of other data",
    }
    settings["config"] |= changes.pop("config", {})
    write_json(folder / "config.json", settings | changes)
    return ["--resume", "--run-dir", str(folder)]


def run_of_other_recipe(folder):
    return interrupted(folder, recipe="mnist_cnn")


def run_with_other_settings(folder):
    return interrupted(folder, config={"learning_rate": 0.5, "epochs": 7})


def run_with_other_precision(folder):
    return interrupted(folder, chosen={"strategy": "none", "devices": 1, "precision": "mixed_bfloat16"})


def run_with_other_data(folder):
    return interrupted(folder)


def run_without_settings(folder):
    (folder / "plots").mkdir()
    return ["--resume", "--run-dir", str(folder)]


def run_with_damaged_settings(folder):
    flags = interrupted(folder)
    (folder / "config.json").write_text((folder / "config.json").read_text()[:100])
    (folder / "checkpoints" / "epoch-000001-batch-000000000").mkdir(parents=True)
    return flags


def folder_of_another_program(folder):
    (folder / "config.json").write_text("# settings of another program")
    (folder / "main.js").touch()
    return ["--resume", "--run-dir", str(folder)]


def run_with_settings_of_a_stranger(folder):
    (folder / "config.json").write_text('{"recipe": "linear_regression"}')
    return ["--resume", "--run-dir", str(folder)]


def run_with_settings_that_are_a_folder(folder):
    (folder / "config.json").mkdir()
    return ["--resume", "--run-dir", str(folder)]


def run_with_damaged_result(folder):
    flags = interrupted(folder)
    (folder / "result.json").write_text("{}")
    return flags


def used_run(folder):
    return interrupted(folder)[1:]


def run_directory_that_is_a_file(folder):
    (folder / "file").touch()
    return ["--run-dir", str(folder / "file")]


def run_directory_with_a_long_name(folder):
    return ["--run-dir", str(folder / ("x" * 300))]


def lock_that_is_a_folder(folder):
    (folder / "lock").mkdir()
    return ["--run-dir", str(folder)]


def checkpoints_that_are_a_file(folder):
    digest = load_recipe("linear_regression").load_data(load_recipe("linear_regression").Config()).digest()
    flags = interrupted(folder, data_digest=digest)
    (folder / "plots").mkdir()
    (folder / "checkpoints").touch()
    return flags


@pytest.mark.parametrize(
    ("recipe", "make", "named"),
    [
        ("linear_regression", run_of_other_recipe, "a run of mnist_cnn, not of linear_regression; choose another"),
        ("linear_regression", run_with_other_settings, "epochs was 7 and is 100; learning_rate was 0.5 and is 0.01"),
        ("linear_regression", run_with_other_precision, "precision was 'mixed_bfloat16' and is 'float32'"),
        ("linear_regression", run_with_other_data, "noisy line: not the data this run began with; restore it"),
        ("linear_regression", run_without_settings, "holds no run; choose a new folder"),
        ("linear_regression", run_with_damaged_settings, "config.json: not written by a recipe, or damaged"),
        ("linear_regression", folder_of_another_program, "config.json: not written by a recipe, or damaged"),
        ("linear_regression", run_with_settings_of_a_stranger, "config.json: not written by a recipe, or damaged"),
        ("linear_regression", run_with_settings_that_are_a_folder, "config.json: can't be read (Is a directory)"),
        ("linear_regression", run_with_damaged_result, "result.json: not written by a recipe, or damaged"),
        ("linear_regression", used_run, "is not empty; choose a new folder, or continue its run with --resume"),
        ("linear_regression", run_directory_that_is_a_file, "Not a directory; choose an empty or a new one"),
        ("linear_regression", run_directory_with_a_long_name, "File name too long; choose an empty or a new one"),
        ("linear_regression", lock_that_is_a_folder, "Is a directory; choose an empty or a new one"),
        ("linear_regression", checkpoints_that_are_a_file, "File exists; choose an empty or a new one"),
        ("cifar10_cnn", no_images, "no folders of images; make one for each class"),
        ("mnist_cnn", several_broken_images, "3 files are not readable images: "),
        ("mnist_cnn", several_broken_images, "; repair or remove them, or give --skip-broken"),
        ("cifar10_fast", empty_class, "mouse: no images"),
        (
            "quantization",
            folder_within_a_class,
            "dog/puppies: a folder inside the folder of a class; move its files up",
        ),
        ("distillation", one_class, "only one class"),
        ("pruning", truncated_image, "dog/cut.jpg: not a readable image ("),
        ("quantization", class_only_in_test, "class 'mouse' is in test but not in train"),
        ("cifar10_cnn", unreadable_image, "dog/broken.png: not a readable image ("),
        ("cifar10_cnn", too_few, "too few different examples (2 to train and validate, 0 to test); add some"),
        ("mnist_cnn", absent, "nowhere: no such file or folder"),
        ("mnist_cnn", missing_column, "not a folder"),
        ("dense_classifier", missing_column, "no column 'target' among 'a', 'b'; name another with --target"),
        ("linear_regression", missing_column, "no column 'y'"),
        (
            "dense_regression",
            text_among_numbers,
            "column 'a': 1 of 40 cells are not numbers ('three' in row 4); correct",
        ),
        ("dense_classifier", missing_target, "column 'target' is empty in row 3, row 5, row 7"),
        ("dense_classifier", infinite_number, "column 'a': 1 of 20 cells are not numbers ('inf' in row 21)"),
        ("dense_classifier", empty_file, "empty.csv: not readable as a table (Empty CSV file); save it"),
        ("dense_classifier", header_only, "no rows below the column names"),
        ("dense_classifier", no_inputs, "'target' is the only column; add input columns"),
        ("dense_classifier", one_label, "only one class to train on, 'same'"),
        ("dense_classifier", binary_file, "table.csv: "),
        ("cifar10_cnn", only_test_folder, "has a folder 'test' but none called 'train'"),
        ("dense_classifier", huge_number, "column 'a': 1 of 20 cells are not numbers ('1e+308' in row 21"),
        ("dense_classifier", two_columns_of_one_name, "there are two columns 'a'"),
        ("dense_classifier", longer_rows, "the first line has 2 values, and row 2 has 3, row 3 has 3"),
        ("cifar10_cnn", unknown_split, "val: not a split; name the folder train, validation or test"),
        ("dense_classifier", row_numbers, "no columns to learn from (a: numbers the rows; to keep it, give --numbers)"),
        ("dense_regression", text_target, "holds texts ('same'), and this recipe predicts numbers; train dense_class"),
        ("dense_classifier", number_target, "holds 60 different numbers in 60 rows; train dense_regression to predict"),
        ("text_classifier", unquoted_commas, "row 3 has 3; correct them, or put values with ',' into quotes"),
        ("dense_regression", a_folder, "not readable as a table ("),
        ("text_classifier", no_words, "the training texts hold no words"),
        ("text_classifier", no_word_twice, "no two training texts share a word"),
        ("text_classifier", missing_column, "no column 'text'"),
        ("text_classifier", one_column_for_both, "--text-column text: also the --label-column; give another column"),
        ("text_classifier", text_without_label, "row 3, column 'label': empty"),
        ("text_classifier", empty_text, "row 3, column 'text': empty"),
        ("text_classifier", no_text, "neg/b.txt: not a text file; correct or remove it, or give --skip-broken"),
        ("text_classifier", blank_text, "neg/b.txt: no text in this file; correct or remove it"),
        ("mnist_cnn", link_to_nowhere, "dog/gone.png: not a readable image ("),
        ("mnist_cnn", class_name_in_no_utf8, "not a valid class name; rename the folder, in UTF-8"),
        ("text_classifier", empty_class_of_texts, "pos: no texts (.txt) in this folder"),
    ],
)
def test_bad_input(tmp_path, monkeypatch, capsys, recipe, make, named):
    (tmp_path / "data").mkdir()
    made = make(tmp_path / "data")
    flags = made if isinstance(made, list) else ["--data", str(made)]
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    assert_refused(monkeypatch, capsys, recipe, [*flags, "--quiet"], named)
    left = [path for path in sorted(tmp_path.rglob("*")) if path in before or path.name != "lock"]
    assert left == before, "nothing but the lock of a run is left behind"


def assert_refused(monkeypatch, capsys, recipe, flags, named):
    capsys.readouterr()  # Of what prepared the case.
    module = load_recipe(recipe)
    monkeypatch.setattr(sys, "argv", ["recipe.py", *flags])
    with pytest.raises(SystemExit) as left:
        run_recipe(module.train, module.Config, module.__doc__)
    printed = capsys.readouterr()
    assert left.value.code == 2
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert printed.err.startswith("error: ")
    assert named in printed.err
    if "not a readable image (" in named:
        assert printed.err.endswith("); repair or remove it\n")


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--no-such-flag"], "--no-such-flag; --help lists the flags"),
        (["--strategy", "multi-worker"], "--strategy multi-worker: neither TF_CONFIG nor Slurm names workers"),
        (["--strategy", "parameter-server"], "--strategy: 'parameter-server' must be one of auto, none, mirrored"),
        (["--strategy", "none", "--devices", "2"], "--strategy none: uses one device, not --devices 2"),
        (["--precision", "mixed_float16"], "--precision mixed_float16: a CPU computes it"),
        (["--data", "tfds", "--quiet"], "use --data auto, or a CSV file of your own"),
    ],
)
def test_bad_flags(tmp_path, monkeypatch, capsys, flags, named):
    monkeypatch.chdir(tmp_path)
    assert_refused(monkeypatch, capsys, "dense_classifier", flags, named)
    assert not list(tmp_path.rglob("*.json"))


@pytest.mark.parametrize(
    ("devices", "named"), [("50", "there are 40 training examples"), ("3", "leaves devices without")]
)
def test_more_devices_than_examples_in_a_batch(devices, named, tmp_path):
    """In a process of its own, for the number of devices."""
    path = table(tmp_path / "table.csv", a=[7 * row for row in range(50)], y=range(50))
    recipe = str(ROOT / "recipes" / "linear_regression.py")
    flags = ("--devices", devices, "--batch-size", devices, "--quiet", "--run-dir", str(tmp_path / "run"))
    run = run_program(recipe, "--data", str(path), *flags)
    assert (run.returncode, run.stdout) == (2, "")
    assert named in run.stderr
    assert run.stderr.count("\n") == 1


def test_a_shift_larger_than_the_picture(tmp_path, monkeypatch, capsys):
    flags = ["--data", "sample", "--smoke", "--shift", "40", "--quiet", "--run-dir", str(tmp_path / "run")]
    line = "error: --shift 40: the images have 28 pixels along that axis; shift by fewer\n"
    assert_refused(monkeypatch, capsys, "mnist_cnn", flags, line)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_run_directory_without_permission(tmp_path, monkeypatch, capsys):
    tmp_path.chmod(0o500)
    flags = ["--run-dir", str(tmp_path / "run"), "--quiet"]
    assert_refused(monkeypatch, capsys, "linear_regression", flags, "Permission denied; choose an empty or a new one")


def test_the_real_set_without_network_and_without_data(tmp_path):
    """As a process, with a proxy that refuses: nothing but the line, nothing left behind."""
    recipe = str(ROOT / "recipes" / "cifar10_cnn.py")
    run = run_program(recipe, "--data", "tfds", "--data-dir", str(tmp_path / "data"), cwd=tmp_path, **NO_NETWORK)
    assert (run.returncode, run.stderr.count("\n")) == (2, 1)
    assert "error: No CIFAR-10 in " in run.stderr
    assert "www.cs.toronto.edu can't be reached" in run.stderr
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_every_recipe_has_data_errors_tested():
    tested = {parameters[0] for parameters in test_bad_input.pytestmark[0].args[1]}
    assert tested == set(RECIPES)
