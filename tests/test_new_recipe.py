"""A new recipe starts as a full member of the collection."""

import ast
import os
import re
import shutil

import pytest
from conftest import RECIPES
from programs import ROOT, run_program
from test_readme import load_script

new_recipe = load_script("new_recipe")


@pytest.fixture
def project(tmp_path):
    """A copy of the project's own files, with `common` of the copy first on the path."""
    for name in ("common", "recipes", "scripts", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


@pytest.mark.long
def test_a_new_recipe_is_a_member(project):
    environment = {"PYTHONPATH": str(project)}
    words = ("scripts/new_recipe.py", "my_task", "--from", "linear_regression")
    run = run_program(*words, cwd=project, **environment)
    assert (run.returncode, run.stderr) == (0, "")
    recipe = (project / "recipes" / "my_task.py").read_text()
    assert "Run       python recipes/my_task.py" in recipe
    assert "Result    not yet measured" in recipe
    assert "linear_regression" not in recipe
    tests = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_my_task.py")
    checked = run_program(*tests, cwd=project, **environment)
    assert checked.returncode == 0, checked.stdout
    tidy = run_program("-m", "ruff", "check", "recipes/my_task.py", "tests/test_my_task.py", cwd=project)
    assert tidy.returncode == 0, tidy.stdout
    again = run_program(*words, cwd=project, **environment)
    assert (again.returncode, again.stderr) == (
        2,
        f"error: recipes{os.sep}my_task.py: exists already; choose another name\n",
    )


@pytest.mark.parametrize("original", RECIPES)
def test_only_the_name_of_the_recipe_is_another(project, original):
    """There is a `keras.distillation` too, and who prunes speaks of pruning."""
    new_recipe.new_recipe(project, "my_task", original)
    trees = []
    for name in (original, "my_task"):
        tree = ast.parse((project / "recipes" / f"{name}.py").read_text())
        assert f"python recipes/{name}.py" in ast.get_docstring(tree)
        trees.append(ast.unparse(tree.body[1:]))
    assert trees[1] == re.sub(rf"'{original}'", "'my_task'", trees[0])


@pytest.mark.parametrize(
    ("name", "original", "named"),
    [
        ("my_task", "nowhere", "--from nowhere: no such recipe; choose one of cifar10_cnn, "),
        ("My Task", "mnist_cnn", "My Task: not a valid name"),
        ("mnist_cnn", "mnist_cnn", "exists already"),
        ("json", "mnist_cnn", "json: Python itself uses this name"),
        ("class", "mnist_cnn", "class: Python itself uses this name"),
        ("my_task", "../scripts/doctor", "no such recipe"),
        ("a" * 300, "mnist_cnn", "up to 100 small letters"),
    ],
)
def test_what_cannot_be_made_is_named(project, name, original, named):
    with pytest.raises(new_recipe.UserError, match=named):
        new_recipe.new_recipe(project, name, original)
