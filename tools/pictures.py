"""The pictures that tools/publish.py draws of what results/ holds."""

import statistics

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from published import benchmarks, in_bfloat16, load_runs, main_metric, mean, pruned, recipe_paths, with_metric


def curves() -> Figure | None:
    """Each recipe's main metric by epoch, a line for each seed; without validation examples, the training one."""
    published = [path.stem for path in recipe_paths() if load_runs(path.stem)]
    if not published:
        return None
    figure = Figure(figsize=(11, 3 * -(-len(published) // 3)), layout="constrained")
    for place, recipe in enumerate(published, start=1):
        runs = load_runs(recipe)
        metric = main_metric(runs)
        kept, prefix = ("validation", "val_") if runs[0]["data"]["validation"] else ("training", "")
        axes = figure.add_subplot(-(-len(published) // 3), 3, place, title=recipe, xlabel="epoch")
        axes.set_ylabel(f"{kept} {'accuracy' if metric == 'accuracy' else 'mean squared error'}")
        for run in runs:
            # Where the loss is the metric, it is shown once.
            values = [epoch.get(prefix + metric, epoch[f"{prefix}loss"]) for epoch in run["history"]]
            axes.plot(range(1, len(values) + 1), values, linewidth=1.2, label=f"seed {run['seed']}")
        if metric != "accuracy":
            axes.set_yscale("log")
        axes.legend(fontsize=7)
    return figure


def speeds() -> Figure | None:
    """Examples per second of each recipe and of its better twin in PyTorch, in those of the naive way, by machine."""
    machines = benchmarks()
    if not machines:
        return None
    rows = [len(records) for records in machines.values()]
    figure = Figure(figsize=(9, 1.2 * len(rows) + 0.45 * sum(rows)), layout="constrained")
    panels = figure.subplots(len(rows), sharex=True, squeeze=False, height_ratios=rows)[:, 0]
    for axes, (machine, records) in zip(panels, machines.items(), strict=True):
        axes.set_title(machine, fontsize=10)
        draw_speeds(axes, records)
    panels[0].legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=8)
    panels[-1].set_xlabel("examples per second, in those of the naive way: median, lowest and highest")
    return figure


def draw_speeds(axes: Axes, records: list[dict]) -> None:
    """The panel of one machine: a dot at the median over the rounds, and a line from the lowest to the highest."""
    labels = {"recipe": "recipe", "PyTorch": "PyTorch, its better form"}
    for offset, (way, label) in zip((0.15, -0.15), labels.items(), strict=True):
        places, found = [], []
        for place, record in enumerate(reversed(records)):
            measured = record["better_pytorch"] if way == "PyTorch" else way
            if measured:
                places.append(place + offset)
                found.append(sorted(ratios(record["rounds"], measured)))
        middles = [statistics.median(each) for each in found]
        errors = [[middle - each[0] for middle, each in zip(middles, found, strict=True)]]
        errors += [[each[-1] - middle for middle, each in zip(middles, found, strict=True)]]
        axes.errorbar(middles, places, xerr=errors, fmt="o", markersize=5, linewidth=1.5, label=label)
        for place, middle, each in zip(places, middles, found, strict=True):
            axes.annotate(
                f"{middle:.2f}", (each[-1], place), (4, 0), textcoords="offset points", va="center", fontsize=8
            )
    axes.axvline(1, color="black", linewidth=0.8, label="the naive way")
    axes.set_yticks(range(len(records)), [record["recipe"] + in_bfloat16(record) for record in reversed(records)])
    axes.set_ylim(-0.6, len(records) - 0.4)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.margins(x=0.1)
    axes.grid(axis="x", linewidth=0.3)


def ratios(rounds: list[dict], way: str) -> list[float]:
    """The speed of one way in that of the naive one, round by round."""
    return [each[way]["examples_per_second"] / each["naive"]["examples_per_second"] for each in rounds]


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
