"""Writes the records in results/ to the tables and plots of README and docs/, and to the docstrings of the recipes.

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
from tables import (
    CHINESE,
    benchmark_table,
    distributed_table,
    recipes_table,
    result_line,
    results_table,
    shipped_tables,
)

RESULT = load_program(published.ROOT / "scripts" / "new_recipe.py").RESULT
# The pages with a generated part, and the function that formats it.
PAGES = {
    "README.md": recipes_table,
    "README.zh-CN.md": lambda: recipes_table(CHINESE),
    "docs/results.md": results_table,
    "docs/benchmarks.md": benchmark_table,
    "docs/small-models.md": shipped_tables,
    "docs/hardware.md": distributed_table,
}
BEGIN, END = "<!-- results: written by tools/publish.py -->", "<!-- end of results -->"


def main() -> None:
    Parser(__doc__).parse_args()
    publish()


def publish() -> None:
    """Updates the pages, the plots and the docstrings of the recipes."""
    files = {}
    for name, table in PAGES.items():
        page = published.ROOT / name
        try:
            files[page] = with_table(page, page.read_text("utf-8"), table())
        except OSError as error:
            raise UserError(f"{page}: can't be read ({error.strerror}); restore it with git") from error
    for path in recipe_paths():
        files[path] = with_result_line(path, result_line(path.stem))
    try:
        for name, figure in (("curves", curves()), ("benchmark", speeds()), ("pruning", pruning_curve())):
            if figure:
                write_file(published.ROOT / "results" / f"{name}.png", figure_png(figure))
        for path, text in files.items():
            write_file(path, text)
    except OSError as error:
        raise UserError(f"{error.filename or page}: {error.strerror}; make room, then run this again") from error


def with_table(page: pathlib.Path, text: str, table: str) -> str:
    """Returns the text of a page with the part between the markers replaced."""
    before, _, rest = text.partition(BEGIN)
    _, separator, after = rest.partition(END)
    if not separator:
        raise UserError(f"{page}: lacks {BEGIN!r} or, after it, {END!r}; put them where the table belongs")
    return f"{before}{BEGIN}\n\n{table}\n\n{END}{after}"


def with_result_line(path: pathlib.Path, line: str) -> str:
    """Returns the source of a recipe with the Result entry of its docstring replaced."""
    source, replaced = re.subn(RESULT, lambda _: f"Result    {line}", path.read_text(), count=1, flags=re.MULTILINE)
    if not replaced:
        raise UserError(f"{path}: no line of its docstring begins with 'Result    '; put one above 'Run'")
    return source


if __name__ == "__main__":
    run_script(main)
