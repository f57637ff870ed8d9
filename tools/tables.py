"""Formats the records in results/ as Markdown tables, for tools/publish.py."""

import itertools
import re
import statistics

from published import (
    benchmarks,
    docstring_entry,
    load_runs,
    machine_of,
    main_metric,
    marks,
    mean,
    precision_suffix,
    pruned,
    read_record,
    read_records,
    recipe_flags,
    recipe_paths,
    stale,
    uncommitted,
    variant_records,
    with_metric,
)

# Extra metrics of recipes, and their text in the table; {} is replaced by the value.
EXTRA = {
    "one_view_accuracy": "without averaging over views: {}",
    "alone_accuracy": "the same network without a teacher: {}",
    "unpruned_accuracy": "unpruned: {}",
    "dynamic_litert_accuracy": "int8 weights: {}",
    "float16_litert_accuracy": "float16 weights: {}",
    "int8_litert_accuracy": "int8 weights and activations: {}",
    "naive_accuracy": "the same network trained naively, for at most 10 epochs: {}",
    "logistic_regression_accuracy": "logistic regression: {}",
    "bag_of_words_accuracy": "bag-of-words logistic regression: {}",
    "majority_accuracy": "most frequent class: {}",
    "ridge_mse": "ridge regression: {}",
    "lstsq_mse": "least squares: {}",
    "noise_floor_mse": "noise floor: {}",
}

# Words of the table in README.md. A recipe without a text here gets the Teaches entry of its docstring, shortened.
ENGLISH = {
    "header": "recipe | what it teaches | data | test result | time",
    "generated": "generated",
    "accuracy": "accuracy",
    "mse": "mean squared error",
    "seeds": ", {} seeds",
    "missing": "not yet measured",
    "cores": "{} CPU cores",
    "legend": "Mean ± standard deviation over the seeds, and median training time on {}, with the flags given below "
    "the name. Baselines, machines and other flags: [results](docs/results.md).",
    "stale": "† The recipe has changed since this measurement.",
    "uncommitted": "‡ Measured with uncommitted changes.",
}
# The same in README.zh-CN.md, and what each recipe teaches; tests/test_readme.py names a recipe that is missing.
CHINESE = {
    "header": "配方 | 教什么 | 数据 | 测试结果 | 时间",
    "generated": "生成的数据",
    "accuracy": "准确率",
    "mse": "均方误差",
    "seeds": "，{} 个种子",
    "missing": "尚未测量",
    "cores": "{} 个 CPU 核",
    "legend": "结果为各随机种子的均值 ± 标准差，时间为训练时间的中位数（{}），使用名称下方的参数。"
    "基线、机器与其他参数见 [results](docs/results.md)（英文）。",
    "stale": "† 测量之后，该配方的代码有改动。",
    "uncommitted": "‡ 测量时有未提交的改动。",
    "cifar10_cnn": "良好的训练方法能让教程中常见的网络提高多少",
    "cifar10_fast": "如何快速训练",
    "dense_classifier": "softmax、one-hot 标签与分类交叉熵，用于线性不可分的类别",
    "dense_regression": "神经网络何时优于线性模型",
    "distillation": "以教师模型的软标签为目标，只计算一次并缓存",
    "linear_regression": "梯度下降能找到精确解，而任何模型都无法预测噪声",
    "mnist_cnn": "从像素到概率的卷积网络，以及细致的训练",
    "pruning": "以零值为掩码的渐进式幅值剪枝，以及更小的网络",
    "quantization": "三种训练后量化，用 LiteRT 在测试集上评估",
    "text_classifier": "由模型的层统计词 n-gram，并由计数得到初始权重",
}

# Target values for tools/benchmark.py, and the mark of a value below its target.
IMAGE_RECIPES = ("cifar10_cnn", "cifar10_fast", "mnist_cnn")
TARGETS = {
    "to_naive": {**dict.fromkeys(IMAGE_RECIPES, 1.2), "dense_classifier": 3.0, "dense_regression": 3.0},
    "to_pytorch": dict.fromkeys(IMAGE_RECIPES, 1.2),
    "share_of_peak": {"cifar10_cnn": 0.30, "cifar10_fast": 0.55, "mnist_cnn": 0.25},
}
NO_CALLBACKS = 0.97
BELOW = " ▼"


def mean_and_deviation(runs: list[dict], metric: str) -> str:
    """Formats mean ± standard deviation of a metric over the runs; accuracies in percent."""
    scale, unit, digits = (100, " %", 2) if metric.endswith("accuracy") else (1, "", 4)
    values = [run["metrics"][metric] * scale for run in runs]
    average = f"{statistics.mean(values):.{digits}f}"
    if len(values) == 1:
        return average + unit
    return f"{average} ± {statistics.stdev(values):.{digits}f}{unit}"


def margin(runs: list[dict], baseline: str) -> str:
    """Formats the mean difference between a recipe and a baseline metric; empty if it was trained for fewer epochs."""
    if baseline == "naive_accuracy":
        return ""
    own, other = mean(runs, main_metric(runs)), mean(runs, baseline)
    if baseline.endswith("accuracy"):
        return f" ({100 * abs(own - other):.2f} points {'below' if other <= own else 'above'})"
    return f" ({other / own:.2f} times the recipe's)"


def seeds(runs: list[dict]) -> str:
    """Formats the seeds of the runs."""
    return ", ".join(str(run["seed"]) for run in runs)


def training_time(runs: list[dict]) -> str:
    """Formats the median time from raw data to saved model, without evaluation and baselines."""
    seconds = statistics.median(run["seconds"]["total"] - run["seconds"]["evaluate"] for run in runs)
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.0f} s"


def result_line(recipe: str) -> str:
    """Formats the Result entry in the docstring of a recipe."""
    lines = []
    for record in (read_record(recipe), *variant_records(recipe)):
        if not record:
            lines.append("not yet measured")
            continue
        runs = record["runs"]
        name = "accuracy" if main_metric(runs) == "accuracy" else "mean squared error"
        value = mean_and_deviation(runs, main_metric(runs))
        line = (
            f"test {name} {value} over {len(runs)} seeds, {training_time(runs)}, {machine_of(runs[0])}{stale(record)}"
        )
        flags = recipe_flags(runs[0]["command"])
        lines += [f"{line},", f"with {flags}"] if flags else [line]
    return f"\n{' ' * 10}".join(lines)


def shortened(entry: str) -> str:
    """Shortens an entry of a docstring for a table: without parentheses and what follows a colon or semicolon."""
    return re.split("[:;]", re.sub(r" \([^)]*\)", "", entry))[0]


def recipes_table(language: dict[str, str] = ENGLISH) -> str:
    """Formats one row per recipe, for README.md or, in `CHINESE`, for README.zh-CN.md."""
    lines, machines = [f"| {language['header']} |", "|---|---|---|---|---|"], set()
    signs = {"stale": "†", "uncommitted": "‡"}
    for path in recipe_paths():
        record, result, time = read_record(path.stem), language["missing"], ""
        link = f"[`{path.stem}`](recipes/{path.name})"
        teaches = language.get(path.stem) or shortened(docstring_entry(path, "Teaches"))
        data = shortened(docstring_entry(path, "Data")).replace("generated", language["generated"])
        if record:
            runs = record["runs"]
            metric, flags, hardware = main_metric(runs), recipe_flags(runs[0]["command"]), runs[0]["hardware"]
            link += f"<br>`{flags}`" if flags else ""
            result = f"{language[metric]} {mean_and_deviation(runs, metric)}{language['seeds'].format(len(runs))}"
            result += "".join(f" {sign}" for mark, sign in signs.items() if mark in marks(record))
            time = training_time(runs)
            machines.add(", ".join(hardware["gpus"]) or language["cores"].format(hardware["cores"]))
        lines.append(f"| {link} | {teaches} | {data} | {result} | {time} |")
    lines += ["", language["legend"].format(", ".join(sorted(machines)) or language["missing"])]
    used = [mark for mark, sign in signs.items() if any(sign in line for line in lines)]
    return "\n".join([*lines, *(language[mark] for mark in used)])


def results_table() -> str:
    """Formats all results of all recipes."""
    lines = ["| recipe | data | test result | baseline | training time | seeds |", "|---|---|---|---|---|---|"]
    machines = set()
    records = [
        (path, record) for path in recipe_paths() for record in (read_record(path.stem), *variant_records(path.stem))
    ]
    for path, record in records:
        link = f"[`{path.stem}`](../recipes/{path.name})"
        if not record:
            lines.append(f"| {link} | | not yet measured | | | |")
            continue
        runs = record["runs"]
        flags = recipe_flags(runs[0]["command"])
        link += f"<br>`{flags}`" if flags else ""
        metric = main_metric(runs)
        label = "accuracy" if metric == "accuracy" else "mean squared error"
        compared = "<br>".join(
            text.format(mean_and_deviation(runs, name)) + margin(runs, name)
            for name, text in EXTRA.items()
            if name in runs[0]["metrics"]
        )
        data = runs[0]["data"]
        counts = f"{data['train']:,} train, {data['validation']:,} validation, {data['test']:,} test"
        lines.append(
            f"| {link} | {data['name']} ({data['source']}): {counts} | {label} {mean_and_deviation(runs, metric)} "
            f"| {compared} | {training_time(runs)}, {machine_of(runs[0])}{marks(record)} | {seeds(runs)} |"
        )
        versions = runs[0]["versions"]
        machines.add(f"{machine_of(runs[0])}, TensorFlow {versions['tensorflow']}, Keras {versions['keras']}")
    lines += [
        "",
        "Mean ± standard deviation over the seeds. The time is the median from raw data to the saved model, without "
        "evaluation, baselines and the training of a `--teacher`.",
    ]
    lines += ["Measured on: " + "; ".join(sorted(machines)) + "."]
    return "\n".join([*lines, "", *legend_lines(lines)]).rstrip()


def legend_lines(lines: list[str]) -> list[str]:
    """Returns an explanation of each mark of `published.marks` that a table uses."""
    legend = {
        "stale": "Stale: the recipe has changed since this measurement.",
        "uncommitted": "Uncommitted: measured with changes that were not committed.",
    }
    return [part for mark, text in legend.items() if any(f", {mark}" in line for line in lines) for part in (text, "")]


def benchmark_table() -> str:
    """Formats the medians of tools/benchmark.py, one table per machine."""
    machines, lines = benchmarks(), []
    measured = list(itertools.chain(*machines.values()))
    header = "| recipe | examples per second | ratio to naive baseline | ratio to PyTorch | share of peak "
    header += "| time to first step | callbacks |"
    for machine, records in machines.items():
        lines += [f"On {machine}:", "", header, "|---|---|---|---|---|---|---|", *map(benchmark_row, records), ""]
    if any(BELOW in line for line in lines):
        lines += [
            f"{BELOW.strip()}: below the target. Targets: 1.2 times the naive baseline and PyTorch for the three "
            "image recipes; 3 times the naive baseline for the two dense networks; 30, 55 and 25 % of the peak for "
            "`cifar10_cnn`, `cifar10_fast` and `mnist_cnn`; at most 3 % of the training time in callbacks.",
            "",
        ]
    if any("recipe without callbacks" in record["examples_per_second"] for record in measured):
        lines += [
            "Callbacks: their share of the training time. Values with a wide range, or below zero, are older "
            "measurements: the difference to a training without callbacks.",
            "",
        ]
    lines += legend_lines(lines)
    if measured:
        counts = sorted({len(record["rounds"]) for record in measured})
        names = sorted({f"{record['data']['name']} ({record['data']['source']})" for record in measured})
        lines += [
            f"Medians, with minimum and maximum of {' or '.join(map(str, counts))} rounds in parentheses. The peak is "
            "measured in the same rounds: if it is low, other programs slowed the machine down.",
            "",
            f"Data: {', '.join(names)}.",
            "",
        ]
    if record := read_record("target"):
        rounds, missed = len(record["rounds"]), record["naive_missed"]
        lines += [
            f"`cifar10_cnn --epochs 5` reaches {100 * record['target_validation_accuracy']:.0f} % validation accuracy "
            f"in {'at most ' * bool(missed)}{spread(record['to_naive'])} of the time of the naive baseline"
            + (f", which missed that accuracy in {missed} of {rounds} rounds" if missed else "")
            + f", on {machine_of(record)}{marks(record)}.",
            "",
        ]
    if measured:
        lines += ["![Examples per second, relative to the naive baseline](../results/benchmark.png)"]
    return "\n".join(lines).strip() or "Not yet measured."


def benchmark_row(record: dict) -> str:
    """Formats the benchmark of one recipe in one precision."""

    def marked(name: str, text: str) -> str:
        value = record[name]["median"] if isinstance(record[name], dict) else record[name]
        target = NO_CALLBACKS if name == "to_no_callbacks" else TARGETS[name].get(record["recipe"], 0)
        return text + BELOW * (value < target)

    torch = "not measured"
    if record["to_pytorch"]:
        torch = marked("to_pytorch", f"{spread(record['to_pytorch'])} ({record['better_pytorch']})")
    percent = f"{100 * record['share_of_peak']:.0f} %" if record["share_of_peak"] >= 0.005 else "under 1 %"
    share = f"{percent} of {record['peak_flops'] / 1e9:,.0f} GFLOPS"
    return (
        f"| `{record['recipe']}`{precision_suffix(record)}{marks(record)} "
        f"| {record['examples_per_second']['recipe']:,.0f} "
        f"| {marked('to_naive', spread(record['to_naive']))} | {torch} | {marked('share_of_peak', share)} "
        f"| {record['first_step_seconds']['recipe']:.1f} s "
        f"| {marked('to_no_callbacks', percent_lost(record['to_no_callbacks']))} |"
    )


def percent_lost(interval: dict[str, float]) -> str:
    """Formats the loss of ratios below 1 in percent: median, minimum and maximum."""
    minimum, median, maximum = (100 * (1 - interval[name]) for name in ("highest", "median", "lowest"))
    return f"{median:.1f} % ({minimum:.1f} to {maximum:.1f})"


def spread(interval: dict[str, float]) -> str:
    """Formats median, minimum and maximum."""
    return f"{interval['median']:.2f} ({interval['lowest']:.2f} to {interval['highest']:.2f})"


def shipped_rows(record: dict) -> list[list[str]]:
    """Returns a record of tools/ship.py as table rows, including the header; times in milliseconds."""
    variants = record["variants"]
    first = next(iter(variants.values()))
    score = "accuracy" if "accuracy" in first else "mse"
    header = ["variant", "KiB", "parameters", "not zero", score, *(f"ms, {batch}" for batch in first["seconds"]), "MiB"]
    rows = [header]
    for name, variant in variants.items():
        quality = f"{100 * variant[score]:.2f} %" if score == "accuracy" else f"{variant[score]:.4f}"
        row = [
            name,
            f"{variant['bytes'] / 1024:,.0f}",
            f"{variant['parameters']:,}",
            f"{variant['nonzero']:,}",
            quality,
        ]
        times = [f"{1000 * seconds:.3f}" for seconds in variant["seconds"].values()]
        rows.append([*row, *times, f"{variant['memory_bytes'] / 2**20:,.0f}"])
    return rows


def speedup_lines(record: dict) -> list[str]:
    """Describes how much faster and smaller int8 models and pruned models are."""

    def speedup(variant: dict, baseline: dict, batch: int) -> str:
        setting = f"batch {batch}, one thread"
        return f"{baseline['seconds'][setting] / variant['seconds'][setting]:,.1f}"

    variants, unpruned, lines = record["variants"], read_record("ship-mnist_cnn"), []
    if {"keras", "litert", "litert int8"} <= set(variants):
        int8, litert = variants["litert int8"], variants["litert"]
        lines += [
            f"At batch 1, one thread, `litert int8` is {speedup(int8, litert, 1)} times as fast as `litert`, with "
            f"{100 * int8['bytes'] / litert['bytes']:.1f} % of its bytes, and "
            f"{speedup(int8, variants['keras'], 1)} times as fast as the Keras model, called as `model(inputs)`.",
            "",
        ]
    if record["recipe"] == "pruning" and "litert" in variants and unpruned:
        full = unpruned["variants"]["litert"]
        lines += [
            f"Compared with the unpruned `mnist_cnn`, `litert` is {speedup(variants['litert'], full, 1)} "
            f"times as fast at batch 1, one thread, and {speedup(variants['litert'], full, 64)} times at batch 64.",
            "",
        ]
    return lines


def shipped_tables() -> str:
    """Formats one table per record of tools/ship.py, and tables for pruning and distillation."""
    lines = []
    for record in read_records("ship-*"):
        header, *rows = shipped_rows(record)
        data = record["data"]
        lines += [
            f"`{' '.join([record['recipe'], recipe_flags(record['trained_by'])]).strip()}`, "
            f"seed {record['seed']}, {data['test']:,} test examples of {data['name']} "
            f"({data['source']}), {machine_of(record)}{marks(record)}:",
            "",
            *(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)),
            "",
            *speedup_lines(record),
        ]
    if runs_with_baseline := with_metric(load_runs("pruning"), "unpruned_accuracy"):
        unpruned = mean(runs_with_baseline, "unpruned_accuracy")
        lines += [
            "| removed by `pruning` | remaining weights | test accuracy | points lost | seeds |",
            "|---|---|---|---|---|",
        ]
        for kind, sparsity, runs in pruned():
            lost = 100 * (unpruned - mean(runs, "accuracy"))
            lines.append(
                f"| {100 * sparsity:.0f} % of the {kind} | {mean(runs, 'nonzero_weights'):,.0f} "
                f"| {mean_and_deviation(runs, 'accuracy')} | {lost:.2f} | {seeds(runs)}{uncommitted({'runs': runs})} |"
            )
        lines += ["", "![Test accuracy by the number of remaining weights](../results/pruning.png)", ""]
    distilled = [record["runs"] for record in read_records("distillation*")]
    distilled = [runs for runs in distilled if with_metric(runs, "alone_accuracy") == runs]
    if distilled:
        lines += ["| epochs of `distillation` | test accuracy | without a teacher | points gained | seeds |"]
        lines += ["|---|---|---|---|---|"]
    for runs in sorted(distilled, key=lambda runs: runs[0]["epochs"]):
        gained = 100 * (mean(runs, "accuracy") - mean(runs, "alone_accuracy"))
        lines.append(
            f"| {runs[0]['epochs']} | {mean_and_deviation(runs, 'accuracy')} "
            f"| {mean_and_deviation(runs, 'alone_accuracy')} | {gained:.2f} "
            f"| {seeds(runs)} |"
        )
    return "\n".join(lines).strip() or "Not yet measured."


def distributed_table() -> str:
    """Formats the cost of several workers, and of a distribution strategy."""
    lines = [
        "| cifar10_cnn, two epochs | images per second | test accuracy | pairs | machine |",
        "|---|---|---|---|---|",
    ]
    for name, label in (
        ("workers", "two workers instead of one process, on the same cores"),
        ("strategy", "a strategy with one replica instead of none"),
    ):
        if record := read_record(name):
            baseline, other = ([pair[way]["metrics"]["accuracy"] for pair in record["pairs"]] for way in record["ways"])
            difference = 100 * (statistics.mean(other) - statistics.mean(baseline))
            points = record["largest_difference_of_test_accuracy_in_points"]
            lines.append(
                f"| {label} | {record['median_ratio_images_per_second']:.2f} times as many "
                f"| {difference:+.2f} points on average, at most {points:.2f} apart "
                f"| {len(record['pairs'])} | {machine_of(record)}{marks(record)} |"
            )
    return "\n".join(lines) if len(lines) > 2 else "Not yet measured."
