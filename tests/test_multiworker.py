"""Several processes as one training: equal to one process, ended together, and nothing left behind."""

import contextlib
import json
import os
import pathlib
import re
import shlex
import signal
import socket
import subprocess
import sys
import time

from common.cli import EXIT_INTERRUPTED, run_recipe
from common.cluster_description import described_cluster
from common.multiworker import EXIT_WORKER_LOST

import keras
import kubernetes_validate
import numpy as np
import pytest
import yaml
from conftest import RECIPES, ROOT, load_recipe, run_program
from test_readme import load_script

launch = load_script("launch")
LINEAR = [str(ROOT / "recipes" / "linear_regression.py"), "--epochs", "2", "--quiet"]
TRAINED = [*RECIPES, "normalization_and_dropout"]


def tf_config(workers: list[str], index: object = 0, kind: str = "worker") -> str:
    return json.dumps({"cluster": {"worker": workers}, "task": {"type": kind, "index": index}})


@pytest.fixture
def addresses():
    """Of three workers; whether the ports are free again, is asked at the end."""
    ports = launch.free_ports(3)
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
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=cwd,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
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
    """What one process, two workers and three workers come to, in every recipe."""
    found = {}
    for workers in (1, 2, 3):
        folder = tmp_path_factory.mktemp(f"workers-{workers}")
        group = [f"127.0.0.1:{port}" for port in launch.free_ports(workers)]
        processes = []
        for index in range(workers):
            for name in ("runs", "temporary"):
                (folder / str(index) / name).mkdir(parents=True)
            environment = {"TMPDIR": str(folder / str(index) / "temporary"), "TF_CONFIG": tf_config(group, index)}
            environment["PYTHONPATH"] = str(ROOT / "recipes")
            command = [str(ROOT / "tests" / "worker.py"), str(folder / str(index) / "runs")]
            processes.append(start(command, folder / str(index), **environment))
        outputs = []
        for code, output, errors in ended(processes):
            assert code == 0, errors
            lines = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
            outputs.append({line["name"]: line for line in lines})
        found[workers] = folder, outputs
    return found


@pytest.mark.parametrize("workers", [2, 3])
@pytest.mark.parametrize("name", TRAINED)
def test_workers_equal_one_process(trained, name, workers):
    def weights(count):
        return keras.models.load_model(trained[count][0] / "0" / "runs" / name / "model.keras").get_weights()

    def result(count):
        return json.loads((trained[count][0] / "0" / "runs" / name / "result.json").read_text())

    alone, group = result(1), result(workers)
    assert group["steps"] == alone["steps"] >= 20
    examples, steps = group["data"]["train"], group["steps"] // group["epochs"]
    sizes = {(step + 1) * examples // steps - step * examples // steps for step in range(steps)}
    assert any(size % workers for size in sizes), "no batch is uneven"
    for there, here in zip(weights(1), weights(workers), strict=True):
        if there.dtype.kind == "f":
            np.testing.assert_allclose(here, there, rtol=0, atol=1e-5)
    for history in zip(alone["history"], group["history"], strict=True):
        for key in set(history[0]) - {"seconds", "examples_per_second"}:
            assert history[1][key] == pytest.approx(history[0][key], rel=1e-4), key
    assert group["metrics"] == pytest.approx(alone["metrics"], rel=1e-4)


@pytest.mark.parametrize("workers", [2, 3])
def test_all_workers_have_the_same_weights_and_one_writes(trained, workers):
    folder, (chief, *others) = trained[workers]
    assert list(chief) == TRAINED
    for number, other in enumerate(others, start=1):
        assert {name: other[name] for name in TRAINED} == chief
        assert [path for path in (folder / str(number)).rglob("*") if path.name not in ("runs", "temporary")] == []
    for name in TRAINED:
        run = folder / "0" / "runs" / name
        assert len(list(run.glob("tensorboard/events*"))) == 1
        result = json.loads((run / "result.json").read_text())
        assert (result["hardware"]["strategy"], result["hardware"]["devices"]) == ("multi-worker", workers)


TWO = ["127.0.0.1:1111", "127.0.0.1:1112"]


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, ((), 0)),
        ({"TF_CONFIG": ""}, ((), 0)),
        ({"TF_CONFIG": tf_config(TWO, 1)}, (tuple(TWO), 1)),
        ({"TF_CONFIG": tf_config(TWO, "1")}, (tuple(TWO), 1)),
        (
            {"TF_CONFIG": '{"cluster": {"chief": ["a:1"], "worker": ["b:1"]}, "task": {"type": "worker", "index": 0}}'},
            (("a:1", "b:1"), 1),
        ),
        (
            {"TF_CONFIG": '{"cluster": {"chief": ["a:1"], "worker": ["b:1"]}, "task": {"type": "chief", "index": 0}}'},
            (("a:1", "b:1"), 0),
        ),
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
        ("{", "no JSON"),
        ("[" * 100_000, "no JSON"),
        ("[]", 'no object "cluster"'),
        ('{"task": {"type": "worker", "index": 0}}', 'no object "cluster"'),
        (json.dumps({"cluster": {"worker": TWO}}), 'no object "task"'),
        (tf_config([]), "names no worker"),
        (tf_config(TWO, 2), "the index 2, but cluster has 2 worker(s)"),
        (tf_config(TWO, -1), "the index -1"),
        (tf_config(TWO, "one"), "the index 'one'"),
        (tf_config(TWO, True), "the index True"),
        (tf_config(TWO, kind="boss"), "the type 'boss'"),
        (tf_config(TWO, kind="chief"), "cluster has 0 chief(s)"),
        (tf_config(TWO, kind="evaluator"), "names an evaluator"),
        (tf_config([TWO[0], TWO[0]]), "two workers have the address 127.0.0.1:1111"),
        (tf_config(["127.0.0.1", TWO[0]]), "'127.0.0.1' is no address"),
        (tf_config(["127.0.0.1:0", TWO[0]]), "'127.0.0.1:0' is no address"),
        (tf_config(["127.0.0.1:65536", TWO[0]]), "'127.0.0.1:65536' is no address"),
        (tf_config(["127.0.0.1:01112", TWO[0]]), "'127.0.0.1:01112' is no address"),
        (tf_config(["http://a:1", TWO[0]]), "'http://a:1' is no address"),
        (tf_config(["a..b:1", TWO[0]]), "'a..b:1' is no address"),
        (tf_config(["a" * 64 + ".b:1", TWO[0]]), "b:1' is no address"),
        (tf_config(["a:" + "1" * 5000, TWO[0]]), "is no address"),
        (tf_config(TWO, "1" * 5000), "the index"),
        (tf_config([1, TWO[0]]), "1 is no address"),
        ('{"cluster": {"worker": {"0": "a:1"}}, "task": {"type": "worker", "index": 0}}', "is no list"),
        ('{"cluster": {"chief": ["a:1", "b:1"]}, "task": {"type": "chief", "index": 0}}', "has 2 chiefs"),
        (
            '{"cluster": {"worker": ["a:1"], "ps": ["b:1"]}, "task": {"type": "worker", "index": 0}}',
            "parameter servers",
        ),
        ('{"cluster": {"boss": ["a:1"]}, "task": {"type": "boss", "index": 0}}', "a job 'boss'"),
        ({"SLURM_STEP_TASKS_PER_NODE": "two"}, "Slurm: can't read its variables (Invalid tasks-per-node"),
        ({"SLURM_STEP_NODELIST": "node[9"}, "Slurm: can't read its variables (Invalid hostlist"),
        ({"SLURM_PROCID": "first"}, "Slurm: can't read its variables"),
        ({"SLURM_LOCALID": ""}, "Slurm: SLURM_LOCALID not set"),
        ({"SLURM_LOCALID": "7"}, "Slurm: this task is node9:24574, but the step has node10:24567"),
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
    errors = capsys.readouterr().err
    assert exit_code.value.code == 2
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    assert named in errors
    assert not list(tmp_path.iterdir())


def one_line(errors: str, named: str) -> None:
    assert errors.startswith("error: "), errors
    assert errors.count("\n") == 1, errors
    assert named in errors


@pytest.mark.parametrize(("index", "absent"), [(0, 1), (1, 0)])
def test_an_absent_worker_is_named(index, absent, addresses, tmp_path):
    command = [*LINEAR, "--cluster-timeout", "2"]
    ((code, _, errors),) = ended([start(command, tmp_path, TF_CONFIG=tf_config(addresses[:2], index))])
    assert code == 2
    one_line(errors, f"worker {absent} at {addresses[absent]}: did not come within 2 s")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("index", "number"), [(0, signal.SIGTERM), (1, signal.SIGINT)])
def test_signals_work_while_waiting(index, number, addresses, tmp_path):
    """The default time to wait is a minute; that the process does not end for that reason, its code tells."""
    _, port = addresses[index].split(":")
    process = start(LINEAR, tmp_path, TF_CONFIG=tf_config(addresses[:2], index))
    while not listened_to(int(port)):
        assert process.poll() is None, process.stderr.read()
    process.send_signal(number)
    ((code, _, errors),) = ended([process])
    assert code == 75
    assert errors == "interrupted: the same command with --resume goes on\n"


def other_seed(folder, workers):
    return [*LINEAR, "--seed", "1"], workers, "seed is 1, but 0 on worker 0"


def other_code(folder, workers):
    copied = folder / "linear_regression.py"
    copied.write_text(pathlib.Path(LINEAR[0]).read_text() + "# Another version.\n")
    return [str(copied), *LINEAR[1:]], workers, "code is "


def other_data(folder, workers):
    rows = "\n".join(f"{number},{number % 7},{number % 3}" for number in range(60))
    (folder / "table.csv").write_text(f"a,b,y\n{rows}\n")
    return [*LINEAR, "--data", str(folder / "table.csv")], workers, "data is "


def data_of_another_shape(folder, workers):
    """Which TensorFlow could not bring together."""
    rows = "\n".join(f"{number},{number % 7},{number % 5},{number % 3}" for number in range(60))
    (folder / "table.csv").write_text(f"a,b,c,y\n{rows}\n")
    return [*LINEAR, "--data", str(folder / "table.csv")], workers, "data is "


def other_cluster(folder, workers):
    return LINEAR, [*workers, "127.0.0.1:9"], "worker 1 at 127.0.0.1: says that the cluster is"


@pytest.mark.parametrize("difference", [other_seed, other_code, other_data, data_of_another_shape, other_cluster])
def test_workers_that_differ_end_with_one_line_each(difference, addresses, tmp_path):
    command, workers, named = difference(tmp_path, addresses[:2])
    before = sorted(tmp_path.iterdir())
    processes = [
        start(LINEAR, tmp_path, TF_CONFIG=tf_config(addresses[:2], 0)),
        start(command, tmp_path, TF_CONFIG=tf_config(workers, 1)),
    ]
    for code, _, errors in ended(processes):
        assert code == 2
        one_line(errors, named)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("taken", [0, 1])
def test_a_port_that_is_taken_ends_all_workers(taken, addresses, tmp_path):
    host, port = addresses[taken].split(":")
    command = [*LINEAR, "--cluster-timeout", "5"]
    with socket.socket() as holder:
        holder.bind((host, int(port)))
        holder.listen()
        results = ended([start(command, tmp_path, TF_CONFIG=tf_config(addresses[:2], index)) for index in (0, 1)])
    for code, _, errors in results:
        assert code == 2
        one_line(errors, f"worker {taken} at {addresses[taken]}: ")
    assert "Address already in use" in results[taken][2]


STRANGERS = [
    *(b"", b"GET / HTTP/1.1\r\n\r\n", b"[]\n", b'{"array": 1}\n', b"[" * 99_999 + b"\n", b"x" * 300_000),
    b'{"index": 99, "workers": [], "problem": ""}\n',
    b'{"index": 1, "workers": [], "problem": {}}\n',
]


def test_strangers_at_the_port_keep_nobody_waiting(addresses, tmp_path):
    """They say nothing, too much, or nonsense, and stay."""
    host, port = addresses[0].split(":")
    workers = [start(LINEAR, tmp_path, TF_CONFIG=tf_config(addresses[:2], 0))]
    while not listened_to(int(port)):
        assert workers[0].poll() is None, workers[0].stderr.read()
    with contextlib.ExitStack() as stack:
        for said in 2 * STRANGERS:
            stranger = stack.enter_context(socket.create_connection((host, int(port))))
            with contextlib.suppress(OSError):  # Sent away before all was said.
                stranger.sendall(said)
        workers.append(start(LINEAR, tmp_path, TF_CONFIG=tf_config(addresses[:2], 1)))
        for code, _, errors in ended(workers):
            assert (code, errors) == (0, "")
    assert len(list(tmp_path.glob("runs/*/*/result.json"))) == 1


def test_a_stranger_in_place_of_the_chief(addresses, tmp_path):
    host, port = addresses[0].split(":")
    with socket.create_server((host, int(port))) as server:
        worker = start([*LINEAR, "--cluster-timeout", "3"], tmp_path, TF_CONFIG=tf_config(addresses[:2], 1))
        connection, _ = server.accept()
        connection.sendall(b"220 welcome\n")
        ((code, _, errors),) = ended([worker])
        connection.close()
    assert code == 2
    one_line(errors, f"worker 0 at {addresses[0]}: did not come within 3 s")


def launched(*words: str, cwd: pathlib.Path) -> tuple[subprocess.Popen, list[str]]:
    """A launcher, and the lines it has printed until its training runs."""
    launcher = start([str(ROOT / "scripts" / "launch.py"), *words], cwd)
    lines = []
    for line in launcher.stdout:
        lines.append(line)
        if line.startswith("[0] Epoch 2"):
            break
    assert lines[-1].startswith("[0] Epoch 2"), launcher.stderr.read()
    return launcher, lines


def assert_nothing_left(lines: list[str]) -> None:
    pids = re.findall(r"worker \d+ is process (\d+)", "".join(lines))
    ports = re.findall(r"127\.0\.0\.1:(\d+)", lines[0])
    assert len(pids) == len(ports) == 2
    assert not any(is_running(int(pid)) for pid in pids)
    assert not any(listened_to(int(port)) for port in ports)


LONG = ["--workers", "2", LINEAR[0], "--", "--epochs", "100000", "--run-dir", "run", "--no-baseline"]


def test_the_launcher_saves_and_ends_all_on_a_signal(tmp_path):
    launcher, lines = launched(*LONG, cwd=tmp_path)
    launcher.send_signal(signal.SIGINT)
    ((code, _, errors),) = ended([launcher])
    assert code == 75, errors
    assert "[0] interrupted: saved in run/checkpoints" in errors
    assert list((tmp_path / "run" / "checkpoints").glob("epoch-*"))
    assert not (tmp_path / "run" / "result.json").exists()
    assert_nothing_left(lines)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process together with its parent")
def test_a_launcher_that_is_killed_leaves_no_worker(tmp_path):
    launcher, lines = launched(*LONG, cwd=tmp_path)
    launcher.kill()
    launcher.communicate()  # Ends when the last worker has closed its output, which is a moment before its end.
    while any(is_running(int(pid)) for pid in re.findall(r"is process (\d+)", "".join(lines))):
        time.sleep(0.1)
    assert_nothing_left(lines)


def test_a_worker_that_is_asked_to_stop_before_it_can_answer_ends_all(tmp_path):
    launcher = start([str(ROOT / "scripts" / "launch.py"), *LONG], tmp_path)
    lines = [launcher.stdout.readline() for _ in range(3)]
    os.kill(int(lines[2].split()[-1]), signal.SIGTERM)  # It has hardly begun to import.
    ((code, output, _),) = ended([launcher])
    assert code == 75
    assert "restart" not in output
    assert_nothing_left(lines)


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
    assert run.stdout.splitlines()[-1] == "[launch] not started again: a worker ended by an error of its own, see above"


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


def test_too_many_workers_for_the_machine(tmp_path):
    command = f"ulimit -n 60; {shlex.quote(sys.executable)} scripts/launch.py --workers 100 {shlex.quote(LINEAR[0])}"
    run = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 2
    one_line(run.stderr, "--workers 100: can't be started (Too many open files); start fewer")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--workers", "2", "recipes/none.py"], "recipes/none.py: no such file"),
        (
            ["--workers", "2", LINEAR[0], "--epochs", "1"],
            "--epochs 1: no flags of the launcher; put those of the recipe",
        ),
        (["--workers", "0", LINEAR[0]], "--workers 0: give 1 to 1000"),
        (["--workers", "100000", LINEAR[0]], "--workers 100000: give 1 to 1000"),
        (["--workers", "2", LINEAR[0], "--", "--strategy=none"], "--strategy none: several workers train by one"),
        (["--workers", "two", LINEAR[0]], "--workers: invalid int value: 'two'"),
        (["--workers", "2", "--max-restarts", "-1", LINEAR[0]], "--max-restarts -1: give 0 or more"),
        (["--worker", "2", LINEAR[0]], "the following arguments are required: --workers"),
    ],
)
def test_wrong_flags_of_the_launcher(words, named):
    run = run_program("scripts/launch.py", *words)
    assert run.returncode == 2
    one_line(run.stderr, named)


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
    documents = list(yaml.safe_load_all((ROOT / "scripts" / "kubernetes.yaml").read_text()))
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
