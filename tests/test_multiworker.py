"""Several processes as one training: equal to one process, ended together, and nothing left behind."""

import concurrent.futures
import json
import os
import pathlib
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time

from common.cli import EXIT_INTERRUPTED, UserError, run_recipe
from common.multiworker import EXIT_WORKER_LOST, Cluster, described_cluster

import keras
import kubernetes_validate
import numpy as np
import pytest
import tensorflow as tf
import yaml
from conftest import RECIPES, load_recipe
from programs import ROOT, run_program, start_program
from test_readme import load_script
from worker_cases import CASES, Group

launch = load_script("launch")
LINEAR = [str(ROOT / "recipes" / "linear_regression.py"), "--epochs", "2", "--quiet"]
# Statistics over a batch, texts, and a regression.
KINDS = ["normalization", "text_classifier", "linear_regression"]


def tf_config(workers: list[str], index: object = 0, kind: str = "worker") -> str:
    return json.dumps({"cluster": {"worker": workers}, "task": {"type": kind, "index": index}})


@pytest.fixture
def addresses():
    """Of two workers; whether the ports are free again, is asked at the end."""
    ports = launch.free_ports(2)
    yield [f"127.0.0.1:{port}" for port in ports]
    assert [port for port in ports if listened_to(port)] == []


def listened_to(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def is_running(pid: int) -> bool:
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False).stdout
    # Who is dead may still wait for a parent to notice (Z); one of whose threads some are left is not dead (Zl).
    return bool(state) and not ("Z" in state and "l" not in state)


def start(command: list[str], cwd: pathlib.Path, **environment: str) -> subprocess.Popen:
    return start_program(
        [sys.executable, *command],
        cwd=cwd,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def ended(processes: list[subprocess.Popen]) -> list[tuple[int, str, str]]:
    """Exit code, output and errors of each; a process that hangs is killed, and fails the test."""
    try:
        outputs = [process.communicate(timeout=1800) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert not any(is_running(process.pid) for process in processes)
    return [(process.returncode, *output) for process, output in zip(processes, outputs, strict=True)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Trains some networks with so many workers, once: the folder, and what each worker printed."""
    found = {}

    def train(workers: int, names: list[str]) -> tuple[pathlib.Path, list[dict]]:
        if (workers, *names) in found:
            return found[(workers, *names)]
        folder, group = tmp_path_factory.mktemp("workers"), [f"127.0.0.1:{port}" for port in launch.free_ports(workers)]
        processes = []
        for index in range(workers):
            for name in ("runs", "temporary"):
                (folder / str(index) / name).mkdir(parents=True)
            environment = {"TMPDIR": str(folder / str(index) / "temporary"), "TF_CONFIG": tf_config(group, index)}
            environment["PYTHONPATH"] = os.pathsep.join(
                filter(None, [str(ROOT / "recipes"), os.environ.get("PYTHONPATH")])
            )
            command = [str(ROOT / "tests" / "worker.py"), str(folder / str(index) / "runs"), *names]
            processes.append(start(command, folder / str(index), **environment))
        outputs = []
        for code, output, errors in ended(processes):
            assert code == 0, errors
            lines = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
            outputs.append({line["name"]: line for line in lines})
        return found.setdefault((workers, *names), (folder, outputs))

    return train


@pytest.mark.parametrize(
    ("name", "workers", "names"),
    [(name, 2, KINDS) for name in KINDS]
    + [pytest.param(name, workers, [name], marks=pytest.mark.slow) for workers in (2, 3) for name in RECIPES],
)
def test_workers_equal_one_process(trained, name, workers, names):
    (folder, (chief, *others)), (alone_folder, _) = trained(workers, names), trained(1, names)
    runs = [each / "0" / "runs" / name for each in (alone_folder, folder)]
    alone, group = (json.loads((run / "result.json").read_text()) for run in runs)
    assert group["steps"] == alone["steps"] >= 18
    for there, here in zip(*(keras.models.load_model(run / "model.keras").get_weights() for run in runs), strict=True):
        if there.dtype.kind == "f":
            np.testing.assert_allclose(here, there, rtol=0, atol=1e-5)
    for history in zip(alone["history"], group["history"], strict=True):
        for key in set(history[0]) - {"seconds", "examples_per_second"}:
            assert history[1][key] == pytest.approx(history[0][key], rel=1e-4), key
    assert group["metrics"] == pytest.approx(alone["metrics"], rel=1e-4)
    # All workers have the same weights, and one writes.
    for number, other in enumerate(others, start=1):
        assert other[name] == chief[name]
        assert [path for path in (folder / str(number)).rglob("*") if path.name not in ("runs", "temporary")] == []
    assert len(list(runs[1].glob("tensorboard/events*"))) == 1
    assert (group["hardware"]["strategy"], group["hardware"]["devices"]) == ("multi-worker", workers)


SHORT_CASES = {"SIGTERM or SIGINT", "kill -9 of a worker"}


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if case in SHORT_CASES else pytest.mark.long) for case in CASES]
)
def test_how_several_workers_end(case, tmp_path):
    _, problem = CASES[case](
        Group(str(ROOT / "recipes" / "linear_regression.py"), 2, tmp_path, seed=0, popen=start_program)
    )
    assert not problem


class Store:
    """The key-value store of the coordination service, within one process."""

    def __init__(self):
        self.values, self.changed = {}, threading.Condition()

    def set_config_key_value(self, key: str, value: str) -> None:
        with self.changed:
            if key in self.values:
                raise tf.errors.AlreadyExistsError(None, None, key)
            self.values[key] = value
            self.changed.notify_all()

    def get_config_key_value(self, key: str, timeout: int) -> str:
        with self.changed:
            if not self.changed.wait_for(lambda: key in self.values, timeout / 1000):
                raise tf.errors.DeadlineExceededError(None, None, key)
            return self.values[key]


def on_all(*calls):
    """What each worker returns or raises when all call the cluster at once."""
    store, workers = Store(), tuple(f"host-{index}:1" for index in range(len(calls)))

    def one(index: int):
        cluster = Cluster(workers, index)
        cluster._store, cluster.strategy = store, tf.distribute.get_strategy()
        try:
            return calls[index](cluster)
        except UserError as error:
            return str(error)

    with concurrent.futures.ThreadPoolExecutor(len(calls)) as threads:
        return list(threads.map(one, range(len(calls))))


def test_values_are_gathered_and_given_out():
    def call(cluster):
        gathered = cluster.gather([cluster.index, np.float32([0.1])])
        return gathered, cluster.from_chief({"all": len(gathered)} if cluster.chief else None)

    chief, other, _ = on_all(call, call, call)
    assert [index for index, _ in chief[0]] == [0, 1, 2]
    assert [np.float32(values) for _, values in chief[0]] == [np.float32([0.1])] * 3
    assert other == ([], {"all": 3})


@pytest.mark.parametrize(
    "array", [np.arange(5, dtype=np.uint8), np.array(["one", "two"]), np.zeros((0, 3)), np.float32(1)]
)
def test_arrays_come_as_they_are(array):
    (received,) = on_all(lambda cluster: cluster.from_chief(np.asarray(array)))
    assert (received.dtype, received.shape) == (np.asarray(array).dtype, np.shape(array))
    np.testing.assert_array_equal(received, array)


def test_values_that_differ_are_named_on_all_workers():
    def compares(**values):
        return lambda cluster: cluster.compare({"seed": 0, "code": "a", **values})

    assert on_all(compares(), compares()) == [None, None]
    (line,) = set(on_all(compares(), compares(), compares(code="b")))
    assert line.startswith("worker 2 at host-2:1: code is 'b', but 'a' on worker 0; start all workers with the same")


def test_a_process_alone_asks_only_itself():
    cluster = Cluster()
    cluster.ask(stop=False, save=True)
    assert cluster.agreed() == (False, True)
    assert cluster.agreed() == (False, False)
    cluster.ask(stop=True, save=False)
    assert cluster.agreed() == (True, False)
    assert not Cluster().agree_to_stop(False)
    assert Cluster().agree_to_stop(True)
    assert cluster.gather(3) == [3]
    assert cluster.from_chief("value") == "value"
    cluster.leave()


TWO = ["127.0.0.1:1111", "127.0.0.1:1112"]
CHIEF = '{"cluster": {"chief": ["a:1"], "worker": ["b:1"]}, "task": {"type": "%s", "index": 0}}'


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, ((), 0)),
        ({"TF_CONFIG": ""}, ((), 0)),
        ({"TF_CONFIG": tf_config(TWO, 1)}, (tuple(TWO), 1)),
        ({"TF_CONFIG": tf_config(TWO, "1")}, (tuple(TWO), 1)),
        ({"TF_CONFIG": CHIEF % "worker"}, (("a:1", "b:1"), 1)),
        ({"TF_CONFIG": CHIEF % "chief"}, (("a:1", "b:1"), 0)),
        ({"SLURM_STEP_NUM_TASKS": "1"}, ((), 0)),
    ],
)
def test_a_described_cluster(variables, expected):
    assert described_cluster(variables) == expected


def slurm(monkeypatch, **variables: str) -> dict[str, str]:
    standard = {"SLURM_JOB_ID": "1234567", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1"}
    standard |= {"SLURM_STEP_NODELIST": "node[9-10]", "SLURM_STEP_TASKS_PER_NODE": "2(x2)"}
    environment = {**standard, "SLURMD_NODENAME": "node9", **variables}
    for name, value in environment.items():  # The resolver reads the true environment.
        monkeypatch.setenv(name, value)
    return environment


def test_a_step_of_slurm_is_a_cluster(monkeypatch):
    """Each task finds its own place, though Slurm counts node9 before node10, and the resolver behind it."""
    workers = ("node10:24567", "node10:24568", "node9:24567", "node9:24568")
    assert described_cluster(slurm(monkeypatch)) == (workers, 3)
    assert described_cluster(slurm(monkeypatch, SLURMD_NODENAME="node10", SLURM_LOCALID="0")) == (workers, 0)


@pytest.mark.parametrize(
    ("description", "named"),
    [
        ("{", "TF_CONFIG: can't be used"),
        ("[]", "TF_CONFIG: can't be used"),
        (json.dumps({"cluster": {"worker": TWO}}), "TF_CONFIG: can't be used (KeyError: 'task')"),
        (tf_config(TWO, 2), "('worker', 2) is not in list"),
        (tf_config(TWO, "one"), "TF_CONFIG: can't be used"),
        (tf_config(TWO, kind="chief"), "('chief', 0) is not in list"),
        (tf_config(TWO, kind="evaluator"), "parameter servers or an evaluator"),
        (
            '{"cluster": {"worker": ["a:1"], "ps": ["b:1"]}, "task": {"type": "worker", "index": 0}}',
            "parameter servers",
        ),
        (tf_config([TWO[0], TWO[0]]), "'127.0.0.1:1111' is no host:port, or given twice"),
        (tf_config(["127.0.0.1", TWO[0]]), "'127.0.0.1' is no host:port"),
        (tf_config(["http://a:1", TWO[0]]), "'http://a:1' is no host:port"),
        (tf_config([1, TWO[0]]), "1 is no host:port"),
        ({"SLURM_STEP_NODELIST": "node[9"}, "Slurm: can't be used (ValueError: Invalid hostlist"),
        ({"SLURM_LOCALID": ""}, "Slurm: can't be used"),
        ({"SLURM_LOCALID": "7"}, "Slurm: can't be used"),
    ],
)
def test_a_malformed_cluster_is_one_line(description, named, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    if isinstance(description, dict):
        slurm(monkeypatch, **description)
    else:
        monkeypatch.setenv("TF_CONFIG", description)
    recipe = load_recipe("linear_regression")
    monkeypatch.setattr(sys, "argv", ["recipes/linear_regression.py"])
    with pytest.raises(SystemExit) as exit_code:
        run_recipe(recipe.train, recipe.Config)
    assert exit_code.value.code == 2
    one_line(capsys.readouterr().err, named)
    assert not list(tmp_path.iterdir())


def one_line(errors: str, named: str) -> None:
    assert errors.startswith("error: "), errors
    assert errors.count("\n") == 1, errors
    assert named in errors


@pytest.mark.long
def test_data_of_another_shape_end_all_before_there_are_models(addresses, tmp_path):
    """TensorFlow could not bring the models together. And --data may differ: the files of each worker have a place."""
    rows = "\n".join(f"{number},{number % 7},{number % 3}" for number in range(60))
    (tmp_path / "table.csv").write_text(f"a,b,y\n{rows}\n")
    commands = [LINEAR, [*LINEAR, "--data", str(tmp_path / "table.csv")]]
    for code, _, errors in ended(
        [start(command, tmp_path, TF_CONFIG=tf_config(addresses, index)) for index, command in enumerate(commands)]
    ):
        assert code == 2
        one_line(errors, "data is ")
    assert [path.name for path in tmp_path.iterdir()] == ["table.csv"]


@pytest.mark.long
def test_a_port_that_is_taken_ends_all_workers(addresses, tmp_path):
    host, port = addresses[1].split(":")
    command = [*LINEAR, "--cluster-timeout", "5"]
    with socket.create_server((host, int(port))):
        results = ended([start(command, tmp_path, TF_CONFIG=tf_config(addresses, index)) for index in (0, 1)])
    for code, _, errors in results:
        assert code == 2
        one_line(errors, f"worker 1 at {addresses[1]}: ")


def launched(*words: str, cwd: pathlib.Path) -> tuple[subprocess.Popen, list[str]]:
    """A launcher, and the lines it has printed until its training runs."""
    launcher = start([str(ROOT / "scripts" / "launch.py"), *words], cwd)
    lines = []
    for line in launcher.stdout:
        lines.append(line)
        if line.startswith("[0] epoch 1/"):
            break
    assert lines[-1].startswith("[0] epoch 1/"), launcher.stderr.read()
    return launcher, lines


def assert_nothing_left(lines: list[str]) -> None:
    pids = re.findall(r"worker \d+ is process (\d+)", "".join(lines))
    ports = re.findall(r"127\.0\.0\.1:(\d+)", lines[0])
    assert len(pids) == len(ports) == 2
    assert not any(is_running(int(pid)) for pid in pids)
    assert not any(listened_to(int(port)) for port in ports)


LONG = ["--workers", "2", LINEAR[0], "--", "--epochs", "100000", "--run-dir", "run", "--no-baseline"]


@pytest.mark.long
def test_the_launcher_saves_and_ends_all_on_a_signal(tmp_path):
    launcher, lines = launched(*LONG, cwd=tmp_path)
    launcher.send_signal(signal.SIGINT)
    ((code, _, errors),) = ended([launcher])
    assert code == 75, errors
    assert "[0] interrupted: the same command with --resume continues run" in errors
    assert list((tmp_path / "run" / "checkpoints").glob("epoch-*"))
    assert not (tmp_path / "run" / "result.json").exists()
    assert_nothing_left(lines)


@pytest.mark.long
def test_a_launcher_that_is_killed_leaves_no_worker(tmp_path):
    launcher, lines = launched(*LONG, cwd=tmp_path)
    launcher.kill()
    launcher.communicate()  # Ends when the last worker has closed its output, which is a moment before its end.
    while any(is_running(int(pid)) for pid in re.findall(r"is process (\d+)", "".join(lines))):
        time.sleep(0.1)
    assert_nothing_left(lines)


@pytest.mark.long
def test_a_worker_that_is_asked_to_stop_before_it_can_answer_ends_all(tmp_path):
    launcher = start([str(ROOT / "scripts" / "launch.py"), *LONG], tmp_path)
    lines = [launcher.stdout.readline() for _ in range(3)]
    os.kill(int(lines[2].split()[-1]), signal.SIGTERM)  # It has hardly begun to import.
    ((code, output, _),) = ended([launcher])
    assert code == 75
    assert "restart" not in output
    assert_nothing_left(lines)


@pytest.mark.long
def test_a_launcher_that_nobody_reads_saves_and_ends(tmp_path):
    """Under nohup too, which has hang-ups ignored."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    launcher, lines = launched(*LONG, cwd=tmp_path)
    with launcher:  # Closes its output at the end.
        launcher.stdout.close()
        errors = launcher.stderr.read()
    assert launcher.returncode == 75
    assert "Traceback" not in errors
    assert list((tmp_path / "run" / "checkpoints").glob("epoch-*"))
    assert_nothing_left(lines)


@pytest.mark.parametrize(
    "name", ["pruning", *(pytest.param(name, marks=pytest.mark.slow) for name in RECIPES if name != "pruning")]
)
@pytest.mark.long
def test_the_launcher_trains_at_default_flags(name, tmp_path):
    """With what the result is compared with, which some recipes train by several workers too."""
    words = ["--workers", "2", str(ROOT / "recipes" / f"{name}.py"), "--", "--smoke", "--data", "sample"]
    ((code, _, errors),) = ended([start([str(ROOT / "scripts" / "launch.py"), *words], tmp_path)])
    assert code == 0, errors
    assert len(list(tmp_path.glob("runs/*/*/result.json"))) == 1


@pytest.mark.long
def test_a_finished_run_is_finished_for_all_workers(tmp_path):
    """Only the chief looks into the run directory; the other ends with its line."""
    words = ["--workers", "2", *LINEAR[:1], "--", "--smoke", "--no-baseline", "--run-dir", "run"]
    for more, line in (([], "run directory: run"), (["--resume"], "run: finished already")):
        ((code, printed, errors),) = ended([start([str(ROOT / "scripts" / "launch.py"), *words, *more], tmp_path)])
        assert code == 0, errors
        assert f"[0] {line}" in printed
    assert "[1] run: finished already" in errors


def test_the_launcher_gives_up_after_so_many_restarts(tmp_path):
    crashing = tmp_path / "crashing.py"
    crashing.write_text("import os\nos.abort()")
    run = run_program("scripts/launch.py", "--workers", "2", "--max-restarts", "1", str(crashing))
    assert run.returncode == 76
    assert run.stdout.count("died of signal 6") == 4
    assert "restart 1 of at most 1" in run.stdout


def test_after_an_error_of_its_own_no_worker_is_started_again(tmp_path):
    mistaken = tmp_path / "mistaken.py"
    mistaken.write_text("raise ValueError('a mistake')")
    run = run_program("scripts/launch.py", "--workers", "2", str(mistaken))
    assert run.returncode == 1
    assert run.stdout.count("ended with 1") == 2
    assert run.stdout.splitlines()[-1] == "[launch] not restarted: a worker failed with an error, see above"


def test_what_the_launcher_cannot_print_does_not_stop_it(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import sys\nsys.stdout.buffer.write('zé\\n'.encode())")
    command = ("scripts/launch.py", "--workers", "2", str(script))
    run = run_program(*command, PYTHONIOENCODING="ascii")
    assert (run.returncode, run.stderr) == (0, "")
    assert "[1] z\\xe9\n" in run.stdout
    words = " ".join(map(shlex.quote, (sys.executable, *command)))
    for redirection, expected in ((">&-", 0), ("> /dev/full", 75)):
        run = subprocess.run(
            ["bash", "-c", f"{words} {redirection}"], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert (run.returncode, run.stderr) == (expected, ""), redirection


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--workers", "2", "recipes/none.py"], "recipes/none.py: no such file"),
        (
            ["--workers", "2", LINEAR[0], "--epochs", "1"],
            "--epochs 1: not flags of the launcher; put the flags of the recipe after --",
        ),
        (["--workers", "0", LINEAR[0]], "--workers: give 1 or more"),
        (["--workers", "two", LINEAR[0]], "--workers: invalid int value: 'two'"),
        (["--workers", "2", "--max-restarts", "-1", LINEAR[0]], "--max-restarts 0 or more"),
        (["--worker", "2", LINEAR[0]], "the following arguments are required: --workers"),
    ],
)
def test_wrong_flags_of_the_launcher(words, named, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["launch.py", *words])
    with pytest.raises(SystemExit) as exit_code:
        launch.main()
    assert exit_code.value.code == 2
    one_line(capsys.readouterr().err, named)


def test_the_launcher_knows_the_exit_codes_without_tensorflow():
    assert (launch.EXIT_INTERRUPTED, launch.EXIT_WORKER_LOST) == (EXIT_INTERRUPTED, EXIT_WORKER_LOST)
    run = run_program("-c", "import sys, launch; print(*sys.modules)", cwd=ROOT / "scripts")
    assert "launch" in run.stdout.split(), run.stderr
    assert "tensorflow" not in run.stdout.split()


def test_each_worker_gets_gpus_of_its_own(tmp_path):
    listing = tmp_path / "nvidia-smi"
    listing.write_text('#!/bin/sh\nfor gpu in 0 1 2; do echo "GPU $gpu: none"; done\n')
    listing.chmod(0o755)
    script = tmp_path / "shown.py"
    script.write_text("import os\nprint('gpus', os.environ['CUDA_VISIBLE_DEVICES'])\n")
    path = f"{tmp_path}:{os.environ['PATH']}"
    run = run_program("scripts/launch.py", "--workers", "2", str(script), PATH=path)
    assert "[0] gpus 0,2\n" in run.stdout
    assert "[1] gpus 1\n" in run.stdout
    run = run_program("scripts/launch.py", "--workers", "4", str(script), PATH=path)
    assert run.returncode == 2
    one_line(run.stderr, "--workers 4: this machine has 3 GPU(s)")


def test_the_kubernetes_manifest_is_valid():
    documents = list(yaml.safe_load_all((ROOT / "docs" / "kubernetes.yaml").read_text()))
    for document in documents:
        kubernetes_validate.validate(document, "1.30", strict=True)
    service, policy, job = documents
    template = job["spec"]["template"]
    assert service["spec"]["selector"].items() <= template["metadata"]["labels"].items()
    assert policy["spec"]["podSelector"]["matchLabels"] == service["spec"]["selector"]
    (container,) = template["spec"]["containers"]
    variables = {each["name"]: each.get("value") for each in container["env"]}
    assert list(variables) == ["INDEX", "TF_CONFIG"]  # Kubernetes puts in what stands before.
    name, subdomain, count = job["metadata"]["name"], template["spec"]["subdomain"], job["spec"]["completions"]
    assert subdomain == service["metadata"]["name"]
    expected = tuple(f"{name}-{index}.{subdomain}:2222" for index in range(count))
    for index in range(count):
        filled = {"TF_CONFIG": variables["TF_CONFIG"].replace("$(INDEX)", str(index))}
        assert described_cluster(filled) == (expected, index)
    assert (ROOT / container["command"][1]).is_file()
    run = run_program(*container["command"][1:], "--help")
    assert run.returncode == 0


@pytest.mark.long
def test_the_slurm_script_trains(tmp_path):
    """With an `srun` that starts the tasks on this machine, with the variables that Slurm sets."""
    srun = tmp_path / "srun"
    srun.write_text(FAKE_SRUN)
    srun.chmod(0o755)
    (tmp_path / "scontrol").symlink_to("/bin/echo")
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": str(os.getpid())}
    words = ["--smoke", "--data", "sample", "--no-baseline"]
    script = (ROOT / "scripts" / "slurm.sbatch").read_text().replace(".venv/bin/python", sys.executable)
    script = script.replace("recipes/", f"{ROOT}/recipes/")
    run = subprocess.run(
        ["bash", "-s", "--", *words],
        input=script,
        cwd=tmp_path,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    (result,) = tmp_path.glob("runs/*/result.json")
    assert json.loads(result.read_text())["hardware"]["strategy"] == "multi-worker"


FAKE_SRUN = """#!/bin/bash
export SLURM_STEP_NUM_TASKS=2 SLURM_STEP_NODELIST=localhost SLURM_STEP_TASKS_PER_NODE=2 SLURMD_NODENAME=localhost
for task in 0 1; do
    SLURM_PROCID=$task SLURM_LOCALID=$task "$@" &
    tasks="$tasks $!"
done
for task in $tasks; do wait $task || exit; done
"""
