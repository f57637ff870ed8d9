"""A project made by scripts/new_project.py stands by itself, and trains to the weights of its recipe."""

import ast
import importlib.metadata
import json
import pathlib
import re
import sys

from common.cli import run_script

import nbclient
import nbformat
import pytest
from conftest import RECIPES, load_recipe
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from programs import NO_NETWORK, ROOT, run_program
from test_readme import load_script

new_project = load_script("new_project")
FLAGS = ("--smoke", "--deterministic", "--data", "sample", "--no-baseline", "--threads", "2", "--run-dir", "run")


def make(recipe, folder, *flags):
    """Makes a project in this process, as the command does."""
    sys.argv[:] = ["new_project.py", recipe, str(folder), *flags]
    new_project.main()
    return folder


@pytest.fixture(autouse=True)
def arguments(monkeypatch):
    monkeypatch.setattr(sys, "argv", [])


SOME_IN_THE_SHORT_SET = [
    pytest.param(name, marks=() if name in ("cifar10_cnn", "text_classifier") else pytest.mark.long) for name in RECIPES
]


@pytest.mark.parametrize("name", SOME_IN_THE_SHORT_SET)
def test_a_project_holds_the_recipe_and_just_what_it_imports(name, tmp_path):
    folder = make(name, tmp_path / "project")
    text = (ROOT / "recipes" / f"{name}.py").read_text()
    assert (folder / "train.py").read_text() == text.replace(f"python recipes/{name}.py", "python train.py")
    assert "python train.py" in (folder / "train.py").read_text()
    copied = {f"common.{path.stem}" for path in (folder / "common").iterdir()} - {"common.__init__"}
    for path in (folder / "common").iterdir():
        assert path.read_bytes() == (ROOT / "common" / path.name).read_bytes()
    imported, packages = set(), set()
    for path in (folder / "train.py", *(folder / "common").iterdir()):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                modules = [node.module] if isinstance(node, ast.ImportFrom) else [each.name for each in node.names]
                imported |= {module for module in modules if module.startswith("common.")}
                packages |= {module.split(".")[0] for module in modules} - {"common"} - sys.stdlib_module_names
    assert copied - {"common.startup"} == imported - {"common.startup"}
    lines = [Requirement(line) for line in (folder / "requirements.txt").read_text().splitlines()]
    required = {canonicalize_name(line.name) for line in lines}
    distributions = importlib.metadata.packages_distributions()
    needed = {canonicalize_name(distributions[package][0]) for package in packages}
    undeclared = {"pytest", "tensorboard", "importlib-resources", *["ai-edge-litert"] * (name == "quantization")}
    assert required == needed | undeclared
    for line in lines:
        assert len(line.specifier) == 2, "the oldest version, and the one that was not tried any more"
        assert importlib.metadata.version(line.name) in line.specifier
    assert re.search(r"\n# .*: ", "\n" + (folder / "README.md").read_text())
    assert not re.findall(r"[{}]", (folder / "README.md").read_text())
    assert {path.name for path in folder.iterdir()} == {
        *("train.py", "common", "tests", "requirements.txt", "README.md", "LICENSE", ".gitignore", "pytest.ini")
    }


def check_training(name, tmp_path):
    """Trains in the project and here, and runs the project's own test."""
    folder = make(name, tmp_path / "project with spaces, ö")
    with open(folder / "common" / "__init__.py", "a") as file:
        file.write("\nprint('common from', __file__)\n")
    own = run_program("train.py", *FLAGS, cwd=folder, **NO_NETWORK)
    assert own.returncode == 0, own.stderr
    assert f"common from {folder / 'common' / '__init__.py'}\n" in own.stdout
    here = run_program(str(ROOT / "recipes" / f"{name}.py"), *FLAGS, cwd=tmp_path, **NO_NETWORK)
    assert here.returncode == 0, here.stderr
    results = [json.loads((place / "run" / "result.json").read_text()) for place in (folder, tmp_path)]
    assert results[0]["weights_sha256"] == results[1]["weights_sha256"]
    assert [result["recipe"] for result in results] == ["train", name]
    tested = run_program("-m", "pytest", "-s", "-p", "no:cacheprovider", cwd=folder, **NO_NETWORK)
    assert (tested.returncode, tested.stdout.count("1 passed")) == (0, 1), tested.stdout
    assert f"common from {folder / 'common' / '__init__.py'}\n" in tested.stdout


@pytest.mark.long
def test_a_project_trains_to_the_weights_of_the_recipe(tmp_path):
    check_training("linear_regression", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({*RECIPES} - {"linear_regression"}))
def test_the_project_of_each_recipe_trains_to_its_weights(name, tmp_path):
    check_training(name, tmp_path)


def notebook_of(name, tmp_path):
    folder = make(name, tmp_path / "project", "--notebook")
    notebook = nbformat.read(folder / "train.ipynb", as_version=4)
    nbformat.validate(notebook)
    return folder, notebook


@pytest.mark.parametrize("name", SOME_IN_THE_SHORT_SET)
def test_a_notebook_holds_the_recipe_without_main(name, tmp_path):
    folder, notebook = notebook_of(name, tmp_path)
    code = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    own = ast.parse((ROOT / "recipes" / f"{name}.py").read_text()).body
    kept = [ast.unparse(node) for node in own[1:-1] if getattr(node, "name", "") != "main"]
    assert [ast.unparse(node) for node in ast.parse(code).body][: len(kept)] == kept
    assert notebook.cells[0].source.startswith(f"# {load_recipe(name).__doc__.splitlines()[0]}\n")
    assert "ipykernel>=" in (folder / "requirements.txt").read_text()
    assert "train.ipynb" in (folder / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["linear_regression", "mnist_cnn", "text_classifier"])
def test_a_notebook_runs_from_top_to_bottom(name, tmp_path, monkeypatch):
    folder, notebook = notebook_of(name, tmp_path)
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    monkeypatch.delenv("PYTHONPATH", raising=False)  # Jupyter puts the folder of the notebook behind it.
    notebook.cells.append(nbformat.v4.new_code_cell("import common\ncommon.__file__"))
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()
    shown = [
        output.data["text/plain"]
        for cell in notebook.cells[-2:]
        for output in cell.outputs
        if output.output_type == "execute_result"
    ]
    assert re.search("'(mse|accuracy)'", shown[0])
    assert shown[1] == repr(str(folder / "common" / "__init__.py"))
    assert list(folder.glob("runs/notebook/*/result.json"))


def test_a_recipe_of_ones_own_brings_what_it_needs(tmp_path):
    """Imports inside functions, modules of common/ by another form of import, a package that the project lacks."""
    recipe = tmp_path / "my_task.py"
    imports = "    import common.optimizers as o\n    from common import artefacts\n    import scipy.stats\n"
    text = (ROOT / "recipes" / "mnist_cnn.py").read_text().replace("-> Data:\n", f"-> Data:\n{imports}", 1)
    recipe.write_text(text.replace("mnist_cnn", "my_task"))
    folder = make(str(recipe), tmp_path / "project")
    assert "Run       python train.py\n" in (folder / "train.py").read_text()
    assert {"optimizers.py", "artefacts.py"} <= {path.name for path in (folder / "common").iterdir()}
    assert f"scipy>={importlib.metadata.version('scipy')}\n" in (folder / "requirements.txt").read_text()
    recipe.write_text("import nowhere_to_be_found\n" + text)
    with pytest.raises(new_project.UserError, match="imports nowhere_to_be_found, which is not installed"):
        make(str(recipe), tmp_path / "another")
    assert not (tmp_path / "another").exists()


def test_an_empty_folder_is_filled(tmp_path, monkeypatch):
    """Also the one that a shell stands in."""
    monkeypatch.chdir(tmp_path)
    make("recipes/mnist_cnn.py", pathlib.Path("."))
    assert {path.name for path in tmp_path.iterdir()} >= {"train.py", "common", ".gitignore"}
    assert not list(tmp_path.glob(".new-project*"))


def file(path):
    path.write_text("something")


def full(path):
    path.mkdir()
    (path / "mine.txt").write_text("something")


def dangling(path):
    path.symlink_to("nowhere")


@pytest.mark.parametrize(
    ("recipe", "folder", "prepare", "named"),
    [
        ("nowhere", "new", None, "nowhere: no such recipe; choose one of cifar10_cnn, "),
        (str(ROOT / "scripts" / "doctor.py"), "new", None, "doctor.py: not a recipe"),
        ("mnist_cnn", "there", full, "there: is not empty; name a new folder"),
        ("mnist_cnn", "there", file, "there: not a folder; name a new one"),
        ("mnist_cnn", "there", dangling, "there: not a folder; name a new one"),
        ("mnist_cnn", "there/new", file, "create it first"),
        ("mnist_cnn", "no/new", None, "create it first"),
        ("mnist_cnn", "a" * 300, None, "can't be written (File name too long)"),
    ],
)
def test_what_cannot_be_made_is_named(recipe, folder, prepare, named, tmp_path, capsys):
    if prepare:
        prepare(tmp_path / "there")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as left:
        run_script(lambda: make(recipe, tmp_path / folder))
    printed = capsys.readouterr()
    assert (left.value.code, printed.out, printed.err.count("\n")) == (2, "", 1)
    assert named in printed.err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_disk_that_is_full_leaves_nothing(tmp_path, monkeypatch):
    def full_disk(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pathlib.Path, "write_bytes", full_disk)
    with pytest.raises(new_project.UserError, match="can't be written \\(No space left on device\\)"):
        make("mnist_cnn", tmp_path / "project")
    assert not list(tmp_path.iterdir())
