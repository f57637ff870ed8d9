"""Plots of the records in results/, for tools/publish.py."""

import statistics

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from published import benchmarks, load_runs, main_metric, mean, precision_suffix, pruned, recipe_paths, with_metric


def curves() -> Figure | None:
    """Plots each recipe's validation metric by epoch, one line per seed; without validation, the training metric."""
    published = [path.stem for path in recipe_paths() if load_runs(path.stem)]
    if not published:
        return None
    figure = Figure(figsize=(11, 3 * -(-len(published) // 3)), layout="constrained")
    for position, recipe in enumerate(published, start=1):
        runs = load_runs(recipe)
        metric = main_metric(runs)
        split, prefix = ("validation", "val_") if runs[0]["data"]["validation"] else ("training", "")
        axes = figure.add_subplot(-(-len(published) // 3), 3, position, title=recipe, xlabel="epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylabel(f"{split} {'accuracy' if metric == 'accuracy' else 'mean squared error'}")
        for run in runs:
            # If the loss is the metric, the history contains it only as the loss.
            values = [epoch.get(prefix + metric, epoch[f"{prefix}loss"]) for epoch in run["history"]]
            axes.plot(range(1, len(values) + 1), values, linewidth=1.2, label=f"seed {run['seed']}")
        if metric != "accuracy":
            axes.set_yscale("log")
        axes.legend(fontsize=7)
    return figure


def speeds() -> Figure | None:
    """Plots the speed of each recipe and its faster PyTorch twin relative to the naive baseline, by machine."""
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
    panels[-1].set_xlabel("examples per second, relative to the naive baseline: median, minimum and maximum")
    return figure


def draw_speeds(axes: Axes, records: list[dict]) -> None:
    """Draws the panel of one machine: a dot at the median over the rounds, and a line from minimum to maximum."""
    labels = {"recipe": "recipe", "PyTorch": "PyTorch, the faster of eager and compiled"}
    for offset, (variant, label) in zip((0.15, -0.15), labels.items(), strict=True):
        positions, samples = [], []
        for position, record in enumerate(reversed(records)):
            measured = record["better_pytorch"] if variant == "PyTorch" else variant
            if measured:
                positions.append(position + offset)
                samples.append(sorted(ratios(record["rounds"], measured)))
        medians = [statistics.median(values) for values in samples]
        errors = [[median - values[0] for median, values in zip(medians, samples, strict=True)]]
        errors += [[values[-1] - median for median, values in zip(medians, samples, strict=True)]]
        axes.errorbar(medians, positions, xerr=errors, fmt="o", markersize=5, linewidth=1.5, label=label)
        for position, median, values in zip(positions, medians, samples, strict=True):
            axes.annotate(
                f"{median:.2f}", (values[-1], position), (4, 0), textcoords="offset points", va="center", fontsize=8
            )
    axes.axvline(1, color="black", linewidth=0.8, label="naive baseline")
    axes.set_yticks(range(len(records)), [record["recipe"] + precision_suffix(record) for record in reversed(records)])
    axes.set_ylim(-0.6, len(records) - 0.4)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.margins(x=0.1)
    axes.grid(axis="x", linewidth=0.3)


def ratios(rounds: list[dict], variant: str) -> list[float]:
    """Returns the speed of one variant relative to the naive baseline, for each round."""
    return [run[variant]["examples_per_second"] / run["naive"]["examples_per_second"] for run in rounds]


def pruning_curve() -> Figure | None:
    """Plots test accuracy by the number of remaining weights, for weight pruning and filter pruning."""
    runs_with_baseline = with_metric(load_runs("pruning"), "unpruned_accuracy")
    if not runs_with_baseline:
        return None
    points: dict[str, list[tuple[float, float, float]]] = {}
    for kind, _, runs in pruned():
        deviation = statistics.stdev(run["metrics"]["accuracy"] for run in runs) if len(runs) > 1 else 0.0
        points.setdefault(kind, []).append((mean(runs, "nonzero_weights"), mean(runs, "accuracy"), deviation))
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="remaining weights", ylabel="test accuracy", xscale="log")
    for kind, values in sorted(points.items()):
        weights, accuracies, deviations = zip(*sorted(values), strict=True)
        axes.errorbar(weights, accuracies, deviations, marker="o", capsize=3, label=f"{kind} removed")
    axes.axhline(mean(runs_with_baseline, "unpruned_accuracy"), color="black", linewidth=0.8, label="unpruned")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.xaxis.set_minor_formatter("{x:,.0f}")
    axes.yaxis.set_major_formatter("{x:.2%}")
    axes.legend(fontsize=8)
    return figure
