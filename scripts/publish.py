"""Writes what results/ holds into README.md, its pictures and the docstrings of the recipes.

    python scripts/publish.py

scripts/reproduce.py, benchmark.py and ship.py end with it. A record of other code than the recipe's file has now is
shown as stale; its comments and docstrings may change.
"""

import ast
import hashlib
import json
import pathlib
import re
import shlex
import statistics
from typing import Any

from common.cli import Parser, UserError, run_script
from common.evaluation import figure_png
from common.records import write_file

from matplotlib.figure import Figure

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / "results"
RESULT = r"^Result    .*(?:\n {10}.*)*$"  # In the docstring of a recipe, with the lines that belong to it.
# Metrics beside a recipe's own, and how the table calls them; {} takes the figure.
BESIDE = {
    "one_view_accuracy": "without averaging over views: {}",
    "alone_accuracy": "the same network without a teacher: {}",
    "unpruned_accuracy": "nothing removed: {}",
    "dynamic_litert_accuracy": "weights in eight bits: {}",
    "float16_litert_accuracy": "weights in sixteen bits: {}",
    "int8_litert_accuracy": "all in eight bits: {}",
    "naive_accuracy": "the same network trained naively: {}",
    "logistic_regression_accuracy": "logistic regression: {}",
    "bag_of_words_accuracy": "bag-of-words logistic regression: {}",
    "majority_accuracy": "commonest class: {}",
    "ridge_mse": "ridge regression: {}",
    "lstsq_mse": "least squares: {}",
    "noise_floor_mse": "noise floor: {}",
}


def main() -> None:
    Parser(__doc__).parse_args()
    publish()


def publish() -> None:
    """Writes what results/ holds into README.md and the recipes."""
    readme = ROOT / "README.md"
    text = with_part(readme.read_text(), "results", results_table())
    text = with_part(text, "benchmark", benchmark_table())
    text = with_part(text, "shipped", shipped_tables())
    written = {readme: with_part(text, "distributed", distributed_table())}
    for path in sorted((ROOT / "recipes").glob("*.py")):
        written[path] = with_result_line(path.read_text(), result_line(path.stem))
    try:
        for name, picture in (("curves", curves()), ("benchmark", speeds()), ("pruning", pruning_curve())):
            if picture:
                (RESULTS / f"{name}.png").write_bytes(figure_png(picture))
        for path, text in written.items():
            write_file(path, text)
    except OSError as error:
        raise UserError(f"{error.filename or readme}: {error.strerror}; make room, then run this again") from error


def code_sha256(path: pathlib.Path) -> str:
    """SHA-256 of a Python file's code: what it says in comments and docstrings, and its layout, make no difference."""

    def said(node: Any) -> Any:
        # Less what is empty: versions of Python differ in which empty fields there are.
        if isinstance(node, ast.AST):
            fields = [(name, said(value)) for name, value in ast.iter_fields(node) if value not in (None, [])]
            return type(node).__name__, fields
        return [said(each) for each in node] if isinstance(node, list) else node

    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            del node.body[0]
    return hashlib.sha256(repr(said(tree)).encode()).hexdigest()


def stale(recipe: str) -> str:
    """What to say of a record that was made by other code than the recipe has now; nothing if it was not."""
    record = read_record(RESULTS / f"{recipe}.json", "code_sha256")
    return "" if record["code_sha256"] == code_sha256(ROOT / "recipes" / f"{recipe}.py") else ", stale"


def without_places(flags: list[str]) -> list[str]:
    """The flags less `--data-dir PLACE`."""
    return without(flags, "--data-dir")


def without(words: list[str], *flags: str) -> list[str]:
    """The words less some flags and their values, written as `--flag value` or `--flag=value`."""
    return [
        word
        for word, before in zip(words, ["", *words], strict=False)
        if before not in flags and word.partition("=")[0] not in flags
    ]


def set_flags(command: str) -> str:
    """The flags of a recipe in the command that trained it; those for data, seed and display aside."""
    words = without(shlex.split(command)[2:], "--data", "--seed")
    return shlex.join(word for word in words if word not in ("--quiet", "--no-baseline"))


def read_record(path: pathlib.Path, *needed: str) -> dict:
    """A file of results/, which must have the entries that are `needed`."""
    try:
        record = json.loads(path.read_text())
        if missing := [name for name in needed if not record[name]]:
            raise KeyError(*missing)
        return record
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(f"{path}: damaged ({error}); get it back with git, or measure again") from error


def load_runs(recipe: str) -> list[dict]:
    """The published runs of a recipe; empty if there are none."""
    path = RESULTS / f"{recipe}.json"
    return read_record(path, "runs")["runs"] if path.exists() else []


def with_metric(runs: list[dict], metric: str) -> list[dict]:
    """The runs that have a metric; those made with --no-baseline have none to compare with."""
    return [run for run in runs if metric in run["metrics"]]


def figure(runs: list[dict], metric: str) -> str:
    """Mean ± standard deviation of a metric over the runs, accuracies in per cent."""
    scale, unit, digits = (100, " %", 2) if metric.endswith("accuracy") else (1, "", 4)
    values = [run["metrics"][metric] * scale for run in runs]
    middle = f"{statistics.mean(values):.{digits}f}"
    if len(values) == 1:
        return middle + unit
    return f"{middle} ± {statistics.stdev(values):.{digits}f}{unit}"


def mean(runs: list[dict], metric: str) -> float:
    """Of a metric over the runs."""
    return statistics.mean(run["metrics"][metric] for run in runs)


def margin(runs: list[dict], other: str) -> str:
    """By how much the recipe is better than what stands beside it, on the mean."""
    mine, its = mean(runs, main_metric(runs)), mean(runs, other)
    if other.endswith("accuracy"):
        return f" ({100 * abs(mine - its):.2f} points {'below' if its <= mine else 'above'})"
    return f" ({its / mine:.2f} times the recipe's)"


def main_metric(runs: list[dict]) -> str:
    """What a recipe is judged by."""
    return "accuracy" if "accuracy" in runs[0]["metrics"] else "mse"


def seeds(runs: list[dict]) -> str:
    """Of the runs, with commas."""
    return ", ".join(str(run["seed"]) for run in runs)


def minutes(runs: list[dict]) -> str:
    """Median time from the raw data to the saved model, without evaluation and baselines."""
    spent = statistics.median(run["seconds"]["total"] - run["seconds"]["evaluate"] for run in runs)
    return f"{spent / 60:.1f} min" if spent >= 60 else f"{spent:.0f} s"


def hardware(runs: list[dict]) -> str:
    """Processor or graphics cards of the runs."""
    machine = runs[0]["hardware"]
    return ", ".join(machine["gpus"]) or f"{machine['cores']} cores of {machine['processor']}"


def result_line(recipe: str) -> str:
    """What the docstring of a recipe says of its result."""
    runs = load_runs(recipe)
    if not runs:
        return "not yet measured"
    name = "accuracy" if main_metric(runs) == "accuracy" else "mean squared error"
    found = figure(runs, main_metric(runs))
    line = f"test {name} {found} over {len(runs)} seeds, {minutes(runs)}, {hardware(runs)}{stale(recipe)}"
    flags = set_flags(runs[0]["command"])
    return f"{line},\n{' ' * 10}with {flags}" if flags else line


def results_table() -> str:
    """The table of all recipes, in Markdown."""
    lines = ["| recipe | data | test result | to compare | training | seeds |", "|---|---|---|---|---|---|"]
    machines = set()
    for path in sorted((ROOT / "recipes").glob("*.py")):
        runs = load_runs(path.stem)
        link = f"[`{path.stem}`](recipes/{path.name})"
        if not runs:
            lines.append(f"| {link} | | not yet measured | | | |")
            continue
        flags = set_flags(runs[0]["command"])
        link += f"<br>`{flags}`" if flags else ""
        metric = main_metric(runs)
        label = "accuracy" if metric == "accuracy" else "mean squared error"
        beside = "<br>".join(
            text.format(figure(runs, name)) + margin(runs, name)
            for name, text in BESIDE.items()
            if name in runs[0]["metrics"]
        )
        data = runs[0]["data"]
        counts = f"{data['train']:,} train, {data['validation']:,} validation, {data['test']:,} test"
        lines.append(
            f"| {link} | {data['name']} ({data['source']}): {counts} | {label} {figure(runs, metric)} "
            f"| {beside} | {minutes(runs)}{stale(path.stem)} | {seeds(runs)} |"
        )
        versions = runs[0]["versions"]
        machines.add(f"{hardware(runs)}, TensorFlow {versions['tensorflow']}, Keras {versions['keras']}")
    lines += [
        "",
        "Mean ± standard deviation over the seeds; the time is the median from raw data to the saved "
        "model, less evaluation and what the result is compared with.",
    ]
    lines += ["Measured on: " + "; ".join(sorted(machines)) + "."]
    if any("stale" in line for line in lines):
        lines += ["Stale: the recipe has changed since, and was not measured again yet."]
    return "\n".join(lines)


def benchmark_table() -> str:
    """The medians of scripts/benchmark.py, in Markdown."""
    lines = [
        "| recipe | examples a second | to the naive way | to PyTorch | share of peak | first execution | callbacks |",
        "|---|---|---|---|---|---|---|",
    ]
    records = benchmarks()
    for record in records:
        torch = (
            f"{spread(record['to_pytorch'])} ({record['better_pytorch']})" if record["to_pytorch"] else "not measured"
        )
        lines.append(
            f"| `{record['recipe']}`{in_bfloat16(record)} | {record['examples_per_second']['recipe']:,.0f} "
            f"| {spread(record['to_naive'])} | {torch} "
            f"| {100 * record['share_of_peak']:.0f} % of {record['peak_flops'] / 1e9:,.0f} GFLOPS "
            f"| {record['first_step_seconds']['recipe']:.1f} s "
            f"| {percent_lost(record['to_no_callbacks'])} |"
        )
    if records:
        names = sorted({f"{record['data']['name']} ({record['data']['source']})" for record in records})
        lines += ["", f"Data: {', '.join(names)}."]
    target = RESULTS / "target.json"
    if target.exists():
        record = read_record(target, "rounds")
        rounds, missed = len(record["rounds"]), record["naive_missed"]
        lines += [
            "",
            f"`cifar10_cnn --epochs 5` is at {record['target_validation_accuracy']:.0%} validation accuracy in "
            f"{spread(record['to_naive'])} of the time of the naive script"
            + (f" (at most: that one gave up in {missed} of {rounds} rounds)." if missed else "."),
        ]
    if records:
        lines += ["", "![Examples per second, against the naive way](results/benchmark.png)"]
    return "\n".join(lines) if len(lines) > 2 else "Not yet measured."


def benchmarks() -> list[dict]:
    """The records of scripts/benchmark.py, one for each recipe that has one."""
    return [read_record(path, "examples_per_second", "rounds") for path in sorted(RESULTS.glob("benchmark-*.json"))]


def in_bfloat16(record: dict) -> str:
    """What is said of a recipe that was measured in mixed precision."""
    return " in bfloat16" if record["precision"] == "mixed_bfloat16" else ""


def speeds() -> Figure | None:
    """Examples per second of each recipe and of its better twin in PyTorch, in those of the naive way."""
    records = benchmarks()
    if not records:
        return None
    figure = Figure(figsize=(9, 1.2 + 0.7 * len(records)), layout="constrained")
    axes = figure.add_subplot(xlabel="examples per second, in those of the naive way")
    for offset, way in ((0.25, "recipe"), (0.0, "PyTorch"), (-0.25, "naive")):
        places, widths = [], []
        for place, record in enumerate(reversed(records)):
            found = record["examples_per_second"].get(record["better_pytorch"] if way == "PyTorch" else way)
            if found:
                places.append(place + offset)
                widths.append(found / record["examples_per_second"]["naive"])
        bars = axes.barh(places, widths, height=0.24, label="PyTorch, its better form" if way == "PyTorch" else way)
        axes.bar_label(bars, fmt="%.2f", fontsize=8, padding=2)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(records)), [record["recipe"] + in_bfloat16(record) for record in reversed(records)])
    axes.margins(x=0.1)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=8)
    return figure


def percent_lost(interval: dict[str, float]) -> str:
    """What ratios below 1 cost, with the least and the most."""
    least, middle, most = (100 * (1 - interval[name]) for name in ("highest", "median", "lowest"))
    return f"{middle:.1f} % ({least:.0f} to {most:.0f})"


def spread(interval: dict[str, float]) -> str:
    """A median with its lowest and highest."""
    return f"{interval['median']:.2f} ({interval['lowest']:.2f} to {interval['highest']:.2f})"


def shipped_rows(record: dict) -> list[list[str]]:
    """A record of scripts/ship.py as a table, the header first: times in milliseconds."""
    variants = record["variants"]
    first = next(iter(variants.values()))
    score = "accuracy" if "accuracy" in first else "mse"
    header = ["variant", "KiB", "parameters", "not zero", score, *(f"ms, {each}" for each in first["seconds"]), "MiB"]
    rows = [header]
    for name, found in variants.items():
        quality = f"{100 * found[score]:.2f} %" if score == "accuracy" else f"{found[score]:.4f}"
        row = [name, f"{found['bytes'] / 1024:,.0f}", f"{found['parameters']:,}", f"{found['nonzero']:,}", quality]
        times = [f"{1000 * seconds:.3f}" for seconds in found["seconds"].values()]
        rows.append([*row, *times, f"{found['memory_bytes'] / 2**20:,.0f}"])
    return rows


def quicker(record: dict) -> list[str]:
    """How much quicker and smaller eight bits are, and a network without half of its filters than the whole one."""

    def times(one: dict, other: dict, batch: int) -> str:
        timed = f"batch {batch}, one thread"
        return f"{other['seconds'][timed] / one['seconds'][timed]:,.1f}"

    variants, whole, lines = record["variants"], RESULTS / "ship-mnist_cnn.json", []
    if {"keras", "litert", "litert int8"} <= set(variants):
        int8, litert = variants["litert int8"], variants["litert"]
        lines += [
            f"At batch 1, one thread, `litert int8` is {times(int8, litert, 1)} times as quick as `litert`, with "
            f"{100 * int8['bytes'] / litert['bytes']:.1f} % of its bytes, and "
            f"{times(int8, variants['keras'], 1)} times as quick as the Keras model, called as `model(inputs)`.",
            "",
        ]
    if record["recipe"] == "pruning" and "litert" in variants and whole.exists():
        before = read_record(whole, "variants")["variants"]["litert"]
        lines += [
            f"Beside `mnist_cnn`, whose network this was, `litert` is {times(variants['litert'], before, 1)} times as "
            f"quick at batch 1, one thread, and {times(variants['litert'], before, 64)} times at batch 64.",
            "",
        ]
    return lines


def shipped_tables() -> str:
    """The records of scripts/ship.py, a table each, and what pruning cost and distillation gained, in Markdown."""
    lines = []
    for path in sorted(RESULTS.glob("ship-*.json")):
        record = read_record(path, "variants", "trained_by")
        header, *rows = shipped_rows(record)
        data, machine = record["data"], record["hardware"]
        lines += [
            f"`{' '.join([record['recipe'], set_flags(record['trained_by'])]).strip()}`, "
            f"seed {record['seed']}, {data['test']:,} test examples of {data['name']} "
            f"({data['source']}), {machine['cores']} cores of {machine['processor']}:",
            "",
            *(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)),
            "",
            *quicker(record),
        ]
    if compared := with_metric(load_runs("pruning"), "unpruned_accuracy"):
        whole = mean(compared, "unpruned_accuracy")
        lines += [
            "| removed by `pruning` | weights left | test accuracy | points lost | seeds |",
            "|---|---|---|---|---|",
        ]
        for kind, share, runs in pruned():
            lost = 100 * (whole - mean(runs, "accuracy"))
            lines.append(
                f"| {100 * share:.0f} % of the {kind} | {mean(runs, 'nonzero_weights'):,.0f} "
                f"| {figure(runs, 'accuracy')} | {lost:.2f} | {seeds(runs)} |"
            )
        lines += ["", "![Test accuracy by the number of weights that are left](results/pruning.png)", ""]
    taught = [read_record(path, "runs")["runs"] for path in RESULTS.glob("distillation*.json")]
    taught = [runs for runs in taught if with_metric(runs, "alone_accuracy") == runs]
    if taught:
        lines += ["| epochs of `distillation` | test accuracy | without a teacher | points gained | seeds |"]
        lines += ["|---|---|---|---|---|"]
    for runs in sorted(taught, key=lambda runs: runs[0]["epochs"]):
        gained = 100 * (mean(runs, "accuracy") - mean(runs, "alone_accuracy"))
        lines.append(
            f"| {runs[0]['epochs']} | {figure(runs, 'accuracy')} | {figure(runs, 'alone_accuracy')} | {gained:.2f} "
            f"| {seeds(runs)} |"
        )
    return "\n".join(lines).strip() or "Not yet measured."


def pruned() -> list[tuple[str, float, list[dict]]]:
    """What was removed (weights or filters), which share of it, and the runs of each record of pruning."""
    found = []
    for path in RESULTS.glob("pruning*.json"):
        runs = read_record(path, "runs")["runs"]
        words = shlex.split(runs[0]["command"].replace("=", " "))
        given = {word: words[place + 1] for place, word in enumerate(words) if word in ("--remove", "--sparsity")}
        found.append((given.get("--remove", "weights"), float(given.get("--sparsity", 0.9)), runs))
    return sorted(found, key=lambda record: record[:2])


def pruning_curve() -> Figure | None:
    """Test accuracy by the number of weights that are left, with single weights removed and with filters."""
    compared = with_metric(load_runs("pruning"), "unpruned_accuracy")
    if not compared:
        return None
    points: dict[str, list[tuple[float, float, float]]] = {}
    for kind, _, runs in pruned():
        deviation = statistics.stdev(run["metrics"]["accuracy"] for run in runs) if len(runs) > 1 else 0.0
        points.setdefault(kind, []).append((mean(runs, "nonzero_weights"), mean(runs, "accuracy"), deviation))
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="weights that are left", ylabel="test accuracy", xscale="log")
    for kind, found in sorted(points.items()):
        left, accuracies, deviations = zip(*sorted(found), strict=True)
        axes.errorbar(left, accuracies, deviations, marker="o", capsize=3, label=f"{kind} removed")
    axes.axhline(mean(compared, "unpruned_accuracy"), color="black", linewidth=0.8, label="nothing removed")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.xaxis.set_minor_formatter("{x:,.0f}")
    axes.yaxis.set_major_formatter("{x:.2%}")
    axes.legend(fontsize=8)
    return figure


def distributed_table() -> str:
    """What several workers and a strategy cost, in Markdown."""
    lines = [
        "| cifar10_cnn, two epochs | images per second | test accuracy | pairs | machine |",
        "|---|---|---|---|---|",
    ]
    for name, label in (
        ("workers", "two workers instead of one process, on the same cores"),
        ("strategy", "a strategy with one replica instead of none"),
    ):
        path = RESULTS / f"{name}.json"
        if path.exists():
            record = read_record(path, "pairs")
            one, other = ([pair[way]["metrics"]["accuracy"] for pair in record["pairs"]] for way in record["ways"])
            on_average = 100 * (statistics.mean(other) - statistics.mean(one))
            points = record["largest_difference_of_test_accuracy_in_points"]
            lines.append(
                f"| {label} | {record['median_ratio_images_per_second']:.2f} times as many "
                f"| {on_average:+.2f} points on average, at most {points:.2f} apart "
                f"| {len(record['pairs'])} | {hardware([record])} |"
            )
    return "\n".join(lines) if len(lines) > 2 else "Not yet measured."


def curves() -> Figure | None:
    """Each recipe's validation metric by epoch, a line for each seed; without validation examples, the training one."""
    published = [path.stem for path in sorted((ROOT / "recipes").glob("*.py")) if load_runs(path.stem)]
    if not published:
        return None
    figure = Figure(figsize=(11, 3 * -(-len(published) // 3)), layout="constrained")
    for place, recipe in enumerate(published, start=1):
        runs = load_runs(recipe)
        accuracy = main_metric(runs) == "accuracy"
        kept, prefix = ("validation", "val_") if runs[0]["data"]["validation"] else ("training", "")
        axes = figure.add_subplot(-(-len(published) // 3), 3, place, title=recipe, xlabel="epoch")
        axes.set_ylabel(f"{kept} {'accuracy' if accuracy else 'error'}")
        for run in runs:
            values = [epoch[prefix + ("accuracy" if accuracy else "loss")] for epoch in run["history"]]
            axes.plot(range(1, len(values) + 1), values, linewidth=1.2, label=f"seed {run['seed']}")
        if not accuracy:
            axes.set_yscale("log")
        axes.legend(fontsize=7)
    return figure


def with_part(readme: str, name: str, written: str) -> str:
    """README.md with what stands between the markers of one part replaced."""
    begin, end = f"<!-- {name}: written by scripts/publish.py -->", f"<!-- end of {name} -->"
    before, _, rest = readme.partition(begin)
    _, _, after = rest.partition(end)
    return f"{before}{begin}\n\n{written}\n\n{end}{after}"


def with_result_line(source: str, line: str) -> str:
    """A recipe with the Result line of its docstring replaced."""
    return re.sub(RESULT, lambda _: f"Result    {line}", source, count=1, flags=re.MULTILINE)


if __name__ == "__main__":
    run_script(main)
