"""Compares finished runs: prints a table with a row per run, and plots their learning curves to a file.

    python scripts/compare.py
    python scripts/compare.py --recipe mnist_cnn --sort accuracy
    python scripts/compare.py runs/mnist_cnn/one runs/mnist_cnn/two -o curves.png

Without run directories, compares all runs below runs/. Each recipe has a table with the settings that differ, the
metrics of the test split, size and time. If the terminal is too narrow for it, its columns continue in a second table.
"""

import contextlib
import math
import os
import pathlib
import textwrap

from common.cli import RUNTIME_FLAGS, Parser, UserError, run_script
from common.evaluation import figure_png
from common.records import read_run

import matplotlib
import rich
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from rich.table import Column, Table
from rich.text import Text

# `--sort` lists small values of these columns first; of other metrics and of the throughput, large values.
SMALLER_IS_BETTER = ("loss", "mse", "mae", "error", "perplexity", "parameters", "seconds")


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="*", type=pathlib.Path, help="run directories; left out: all below runs/")
    parser.add_argument("--recipe", help="only the runs of this recipe")
    parser.add_argument("--sort", metavar="COLUMN", help="a metric, best first, or another column of the table")
    parser.add_argument(
        "-o", "--output", type=pathlib.Path, default=pathlib.Path("comparison.png"), help="the picture to write"
    )
    arguments = parser.parse_args()
    if arguments.output.suffix != ".png":
        raise UserError(f"-o {arguments.output}: give a name that ends in .png")
    folders = arguments.runs or sorted(path.parent for path in pathlib.Path("runs").rglob("result.json"))
    if not folders:
        raise UserError("runs: no finished runs below this folder; train a recipe, or name run directories")
    found = {folder: read_run(folder) for folder in folders}
    if arguments.recipe:
        recipes = ", ".join(sorted({run["recipe"] for run in found.values()}))
        found = {folder: run for folder, run in found.items() if run["recipe"] == arguments.recipe}
        if not found:
            raise UserError(
                f"--recipe {arguments.recipe}: no finished runs of this recipe; there are runs of {recipes}"
            )
    parent = os.path.commonpath([folder.absolute().parent for folder in found])
    runs = {os.path.relpath(folder.absolute(), parent): run for folder, run in found.items()}
    if arguments.sort:
        runs = sort(runs, arguments.sort)
    part = arguments.output.with_name(f"{arguments.output.name}.part")  # Renamed when complete.
    try:
        part.write_bytes(figure_png(curves(runs), heading(runs)))
        os.replace(part, arguments.output)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise UserError(f"{arguments.output}: can't be written ({error.strerror}); choose another file") from error
    for runs_of_recipe in by_recipe(runs):
        print(heading(runs_of_recipe))
        rich.print(*tables(rows(runs_of_recipe), rich.get_console().width), sep="\n")
    print(f"curves: {arguments.output}")


def by_recipe(runs: dict[str, dict]) -> list[dict[str, dict]]:
    """Returns the runs of each recipe: a common table would be mostly empty."""
    recipes = sorted({run["recipe"] for run in runs.values()})
    return [{name: run for name, run in runs.items() if run["recipe"] == recipe} for recipe in recipes]


def heading(runs: dict[str, dict]) -> str:
    """Returns the recipes and data of the runs."""
    recipes = ", ".join(sorted({run["recipe"] for run in runs.values()}))
    data = ", ".join(sorted({f"{run['data']['name']} ({run['data']['source']})" for run in runs.values()}))
    return f"{recipes}: {len(runs)} run{'s' * (len(runs) > 1)} on {data}"


def differing(runs: dict[str, dict]) -> dict[str, dict[str, object]]:
    """Returns what differs between runs, by run and column: recipe, data and settings."""
    values = {}
    for name, run in runs.items():
        settings = {key: value for key, value in run["config"].items() if key not in {*RUNTIME_FLAGS, "data"}}
        flags = {f"--{key.replace('_', '-')}": value for key, value in settings.items()}
        values[name] = {"recipe": run["recipe"], "data": f"{run['data']['name']} ({run['data']['source']})", **flags}
    columns = dict.fromkeys(column for row in values.values() for column in row)
    differ = [column for column in columns if len({repr(row.get(column)) for row in values.values()}) > 1]
    return {name: {column: row[column] for column in differ if column in row} for name, row in values.items()}


def rows(runs: dict[str, dict]) -> dict[str, dict[str, object]]:
    """Returns the row of each run, by column: what differs, the metrics of the test split, size and time."""
    differs = differing(runs)
    settings = dict.fromkeys(column for row in differs.values() for column in row)
    metrics = dict.fromkeys(metric for run in runs.values() for metric in run["metrics"])
    return {
        name: {
            **settings,
            **differs[name],
            **metrics,
            **run["metrics"],
            "parameters": run["parameters"],
            "training seconds": run["seconds"]["train"],
            "examples per second": run["examples_per_second"],
        }
        for name, run in runs.items()
    }


def sort(runs: dict[str, dict], wanted: str) -> dict[str, dict]:
    """Returns the runs sorted by a column: numbers best first, texts by alphabet; runs without a value come last.

    Raises a `UserError` if there is no such column. `wanted` may have underscores or hyphens for spaces.
    """
    values = rows(runs)
    columns = {plain(column): column for column in next(iter(values.values()))}
    if plain(wanted) not in columns:
        raise UserError(f"--sort {wanted}: not a column of the table; choose one of {', '.join(columns)}")
    column = columns[plain(wanted)]
    descending = not column.startswith("-") and not column.endswith(SMALLER_IS_BETTER)

    def key(name: str) -> tuple:
        value = values[name][column]
        if isinstance(value, int | float) and not math.isnan(value):
            return 0, -value if descending else value, ""
        return (2, 0, "") if value is None or isinstance(value, float) else (1, 0, str(value))

    return {name: runs[name] for name in sorted(runs, key=key)}


def plain(column: str) -> str:
    """Returns the name of a column as `--sort` lists it."""
    return column.strip("-").replace("-", "_").replace(" ", "_")


def tables(values: dict[str, dict[str, object]], width: int) -> list[Table]:
    """Builds a table with a row per run. Columns that do not fit in `width` continue in further tables."""
    longest = min(max(map(len, values)), width // 2)
    groups, used = [], math.inf
    for column in next(iter(values.values())):
        title = column.replace("_", " ")
        cells = [cell(row[column]) for row in values.values()]
        needed = 3 + max(len(word) for text in (title, *cells) for word in [*text.split(), ""])
        if used + needed > width:
            groups.append([(Column("run", min_width=longest), [Text(name, overflow="fold") for name in values])])
            used = 4 + longest
        groups[-1].append((Column(title), map(Text, cells)))
        used += needed
    result = []
    for group in groups:
        columns, cells = zip(*group, strict=True)
        result.append(Table(*columns))
        for row in zip(*cells, strict=True):
            result[-1].add_row(*row)
    return result


def cell(value: object) -> str:
    """Formats a value for the table."""
    if isinstance(value, float):
        return f"{value:,.1f}" if abs(value) >= 100 else f"{value:.4g}"
    return "" if value is None else str(value)


def curves(runs: dict[str, dict]) -> Figure:
    """Plots each metric that has training (dashed) and validation (solid) values; only the loss if there is none."""
    logged = dict.fromkeys(name for run in runs.values() for name in run["history"][0])
    names = [name for name in logged if f"val_{name}" in logged] or ["loss"]
    width = max(6, 5 * len(names))
    labels = [
        textwrap.fill(
            f"{name}: {', '.join(f'{key} {value}' for key, value in values.items())}".rstrip(": "), 14 * width
        )
        for name, values in differing(runs).items()
    ]
    lines = 2 + sum(label.count("\n") + 1 for label in labels)
    figure = Figure(figsize=(width, 4.5 + 0.17 * lines), layout="constrained")
    # Ten colors that are easy to tell apart; for more runs, a scale.
    scale = matplotlib.colormaps["turbo"].resampled(len(runs))
    colors = [f"C{number}" if len(runs) <= 10 else scale(number) for number in range(len(runs))]
    for position, name in enumerate(names, start=1):
        axes = figure.add_subplot(1, len(names), position, title=name, xlabel="epoch")
        for run, color in zip(runs.values(), colors, strict=True):
            for key, style in ((name, "--"), (f"val_{name}", "-")):
                if key in run["history"][0]:
                    values = [epoch[key] for epoch in run["history"]]
                    axes.plot(range(1, len(values) + 1), values, style, marker=".", color=color)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    styles = [Line2D([], [], color="black", linestyle=style) for style in ("--", "-")]
    handles = [*styles, *(Line2D([], [], color=color) for color in colors)]
    labels = ["train", "validation", *(label.replace("$", r"\$") for label in labels)]
    figure.legend(handles, labels, loc="outside lower left", fontsize=8)
    return figure


if __name__ == "__main__":
    run_script(main)
