"""Creates a new recipe as a copy of an existing one, together with a test.

    python scripts/new_recipe.py my_task --from mnist_cnn

The other tests find the new recipe in recipes/. tools/reproduce.py measures it and adds it to the tables of
README.md and docs/.
"""

import importlib.util
import keyword
import pathlib
import re

from common.cli import Parser, UserError, run_script
from common.console import print_line

RESULT = r"^Result    .*(?:\n {10}.*)*$"  # The Result entry of a docstring, with its continuation lines.
ROOT = pathlib.Path(__file__).parent.parent


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("name", help="of the new recipe: small letters, digits and _")
    parser.add_argument("--from", dest="original", required=True, help="name of the recipe to copy")
    arguments = parser.parse_args()
    new_recipe(ROOT, arguments.name, arguments.original.removesuffix(".py"))
    print_line(f"wrote recipes/{arguments.name}.py and tests/test_{arguments.name}.py")
    print_line("next:")
    print_line(f"  scripts/run.sh {arguments.name} --smoke")
    print_line(f"  scripts/test.sh tests/test_{arguments.name}.py")


def new_recipe(root: pathlib.Path, name: str, original: str) -> None:
    """Copies a recipe to a new name and writes a test for it."""
    source, target = (root / "recipes" / f"{stem}.py" for stem in (original, name))
    test = root / "tests" / f"test_{name}.py"
    if not re.fullmatch(r"\w+", original) or not source.exists():
        names = ", ".join(sorted(path.stem for path in target.parent.glob("*.py")))
        raise UserError(f"--from {original}: no such recipe; choose one of {names}")
    if not re.fullmatch(r"[a-z][a-z0-9_]{,99}", name):
        raise UserError(f"{name}: not a valid name; use up to 100 small letters, digits and _, a letter first")
    for path in (target, test):
        if path.exists():
            raise UserError(f"{path.relative_to(root)}: exists already; choose another name")
    # The folder of a script comes first on the import path, so recipes/json.py would shadow Python's json module.
    if keyword.iskeyword(name) or importlib.util.find_spec(name):
        raise UserError(f"{name}: Python itself uses this name; choose another")
    # Replace only the name of the recipe, not the same word elsewhere, as in keras.distillation.
    own_name = rf'(?<=recipes/){original}(?=\.py)|(?<="){original}(?=")'
    text = re.sub(own_name, name, source.read_text(encoding="utf-8"))
    # The measured result belongs to the original recipe.
    target.write_text(re.sub(RESULT, "Result    not yet measured", text, count=1, flags=re.MULTILINE), "utf-8")
    test.write_text(TEST.format(name=name), encoding="utf-8")


TEST = '''\
"""What recipes/{name}.py promises beyond what tests/test_recipes.py asks of every recipe."""

import json

import numpy as np
from conftest import load_recipe, smoke_config, smoke_data


def test_{name}_learns(tmp_path):
    """On its sample, the loss falls from epoch to epoch; put the promise of your recipe in its place."""
    recipe = load_recipe("{name}")
    metrics = recipe.train(smoke_config(recipe, tmp_path, epochs=3), smoke_data("{name}"))
    assert all(np.isfinite(value) for value in metrics.values())
    result = (tmp_path / "result.json").read_text()
    losses = [epoch["loss"] for epoch in json.loads(result)["history"]]
    assert losses[-1] < losses[0]
'''


if __name__ == "__main__":
    run_script(main)
