"""Compares finished runs: prints a table and plots their learning curves to a file.

    python scripts/compare.py runs/mnist_cnn/one runs/mnist_cnn/two -o curves.png
    python scripts/compare.py

Without arguments, compares all runs below runs/. The table shows data, metrics, time, and the settings that differ.
"""

import contextlib
import os
import pathlib

from common.cli import RUNTIME_FLAGS, Parser, UserError, run_script
from common.evaluation import figure_png
from common.records import read_run

import rich
from matplotlib.figure import Figure
from rich.table import Table


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="*", type=pathlib.Path, help="run directories; left out: all below runs/")
    parser.add_argument(
        "-o", "--output", type=pathlib.Path, default=pathlib.Path("comparison.png"), help="the picture to write"
    )
    arguments = parser.parse_args()
    if arguments.output.suffix != ".png":
        raise UserError(f"-o {arguments.output}: give a name that ends in .png")
    folders = arguments.runs or sorted(path.parent for path in pathlib.Path("runs").rglob("result.json"))
    if not folders:
        raise UserError("runs: no finished runs below this folder; train a recipe, or name run directories")
    runs = {str(folder): read_run(folder) for folder in folders}
    part = arguments.output.with_name(f"{arguments.output.name}.part")  # Renamed when complete.
    try:
        part.write_bytes(figure_png(curves(runs)))
        os.replace(part, arguments.output)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise UserError(f"{arguments.output}: can't be written ({error.strerror}); choose another file") from error
    rich.print(table(runs))
    print(f"curves: {arguments.output}")


def rows(runs: dict[str, dict]) -> dict[str, dict[str, object]]:
    """Returns the compared values of each run: recipe, data, differing settings, metrics, size and time."""
    values = {}
    configs = [{k: v for k, v in run["config"].items() if k not in RUNTIME_FLAGS} for run in runs.values()]
    settings = [
        name for name in dict.fromkeys(key for config in configs for key in config)
        if len({repr(config.get(name)) for config in configs}) > 1
    ]  # fmt: skip
    for (folder, run), config in zip(runs.items(), configs, strict=True):
        values[folder] = {
            "recipe": run["recipe"],
            "data": f"{run['data']['name']} ({run['data']['source']})",
            **{f"--{name.replace('_', '-')}": config.get(name, "") for name in settings if name != "data"},
            **run["metrics"],
            "parameters": run["parameters"],
            "training seconds": run["seconds"]["train"],
            "examples per second": run["examples_per_second"],
        }
    return values


def table(runs: dict[str, dict]) -> Table:
    """Builds a table with one column per run, since there are usually more values to compare than runs."""
    values = rows(runs)
    result = Table("run", *values)
    for name in dict.fromkeys(key for row in values.values() for key in row):
        result.add_row(name.replace("_", " "), *(cell(row.get(name)) for row in values.values()))
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
    figure = Figure(figsize=(6 * len(names), 4.5), layout="constrained")
    for position, name in enumerate(names, start=1):
        axes = figure.add_subplot(1, len(names), position, title=name, xlabel="epoch")
        for number, (folder, run) in enumerate(runs.items()):
            for key, style, label in ((name, "--", None), (f"val_{name}", "-", folder)):
                if key in run["history"][0]:
                    values = [epoch[key] for epoch in run["history"]]
                    axes.plot(range(1, len(values) + 1), values, style, color=f"C{number % 10}", label=label)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", fontsize=8)
    return figure


if __name__ == "__main__":
    run_script(main)
