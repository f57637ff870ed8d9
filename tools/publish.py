"""Writes the records in results/ to README.md, to its plots, and to the docstrings of the recipes.

    python tools/publish.py

tools/reproduce.py, benchmark.py and ship.py call it at the end. A record is marked stale if the code of the recipe has
changed since; changes to comments and docstrings don't count.
"""

import pathlib
import re

from common.cli import Parser, UserError, run_script
from common.evaluation import figure_png
from common.records import load_program, write_file

import published
from pictures import curves, pruning_curve, speeds
from published import recipe_paths
from tables import benchmark_table, distributed_table, result_line, results_table, shipped_tables

RESULT = load_program(published.ROOT / "scripts" / "new_recipe.py").RESULT


def main() -> None:
    Parser(__doc__).parse_args()
    publish()


def publish() -> None:
    """Updates README.md, its plots and the docstrings of the recipes."""
    readme = published.ROOT / "README.md"
    try:
        text = with_part(readme.read_text(), "results", results_table())
    except OSError as error:
        raise UserError(f"{readme}: can't be read ({error.strerror}); get it back with git") from error
    text = with_part(text, "benchmark", benchmark_table())
    text = with_part(text, "shipped", shipped_tables())
    files = {readme: with_part(text, "distributed", distributed_table())}
    for path in recipe_paths():
        files[path] = with_result_line(path, result_line(path.stem))
    try:
        for name, figure in (("curves", curves()), ("benchmark", speeds()), ("pruning", pruning_curve())):
            if figure:
                write_file(published.ROOT / "results" / f"{name}.png", figure_png(figure))
        for path, text in files.items():
            write_file(path, text)
    except OSError as error:
        raise UserError(f"{error.filename or readme}: {error.strerror}; make room, then run this again") from error


def with_part(readme: str, name: str, content: str) -> str:
    """Returns the text of README.md with the content between the markers of one part replaced."""
    begin, end = f"<!-- {name}: written by tools/publish.py -->", f"<!-- end of {name} -->"
    before, _, rest = readme.partition(begin)
    _, separator, after = rest.partition(end)
    if not separator:
        raise UserError(f"README.md: lacks {begin!r} or {end!r} behind it; put them where the figures shall stand")
    return f"{before}{begin}\n\n{content}\n\n{end}{after}"


def with_result_line(path: pathlib.Path, line: str) -> str:
    """Returns the source of a recipe with the Result entry of its docstring replaced."""
    source, replaced = re.subn(RESULT, lambda _: f"Result    {line}", path.read_text(), count=1, flags=re.MULTILINE)
    if not replaced:
        raise UserError(f"{path}: no line of its docstring begins with 'Result    '; put one above 'Run'")
    return source


if __name__ == "__main__":
    run_script(main)
