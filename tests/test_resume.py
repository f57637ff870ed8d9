"""A run that was interrupted anywhere continues to the very same weights, records and curves."""

import contextlib
import dataclasses
import errno
import fcntl
import json
import math
import os
import pathlib
import platform
import random
import shutil
import signal
import subprocess
import sys
import time

from common.batches import Split, evaluation_batches, training_batches
from common.checkpoints import Checkpoints, newest_checkpoint
from common.cli import AlreadyFinishedError, SharedConfig, TrainingFailedError, UserError, run_recipe
from common.data import Data
from common.evaluation import evaluate_regressor
from common.progress import EpochLine
from common.records import provenance, read_json, read_run, rename, write_json
from common.run_directory import lock, unlock
from common.runs import start_run, with_class_names

import damage
import keras
import numpy as np
import pytest
import tensorflow as tf
import torture
from conftest import load_recipe, smoke_config, smoke_data
from programs import FORK_SERVER, ROOT, run_program, start_program

STEPS = 6


@dataclasses.dataclass(frozen=True)
class Config(SharedConfig):
    """Settings of the training below."""

    epochs: int = 30
    batch_size: int = 16
    threads: int = 2
    deterministic: bool = True
    quiet: bool = True
    strategy: str = "none"


class Interruption(keras.callbacks.Callback):
    """Sends this process a signal at one moment: (hook, epoch, batch)."""

    def __init__(self, moment=None, number=signal.SIGTERM):
        super().__init__()
        self._moment, self._number = moment, number

    def _at(self, hook, batch):
        if self._moment == (hook, self._epoch, batch):
            os.kill(os.getpid(), self._number)

    def on_epoch_begin(self, epoch, logs=None):
        self._epoch = epoch

    def on_train_batch_begin(self, batch, logs=None):
        self._at("train", batch)

    def on_test_batch_begin(self, batch, logs=None):
        self._at("validation", batch)

    def on_epoch_end(self, epoch, logs=None):
        self._at("end", 0)


class Brake(keras.callbacks.Callback):
    """Lowers the learning rate with the number of executions that it has seen."""

    def __init__(self):
        super().__init__()
        self.seen = 0

    def on_train_batch_end(self, batch, logs=None):
        self.seen += 1
        if self.seen % 5 == 0:
            rate = self.model.optimizer.learning_rate
            rate.assign(rate * 0.98)


class Notes(keras.callbacks.Callback):
    """Holds all kinds of state, which changes with each epoch, and an object that no checkpoint can hold."""

    def __init__(self):
        super().__init__()
        self.seen, self.stranger = [], object()
        self.state = {
            "arrays": [np.arange(3.0), np.float32(0.1)],
            "array": np.ones((2, 0), np.int8),
            "names": np.array(["a", "bc"]),
            ("a", "tuple"): {1: "integer key", 2.5: {3, frozenset({4})}},
            "numbers": (1, 2**70, -0.0, math.inf, True, None, np.bool_(True)),
            "huge": np.longdouble(1) / 3,
        }

    def on_epoch_begin(self, epoch, logs=None):
        self.seen = []

    def on_train_batch_end(self, batch, logs=None):
        self.seen.append(np.int64(batch))


def splits():
    random = np.random.default_rng(0)
    inputs = random.normal(size=(130, 5)).astype(np.float32)
    targets = (inputs[:, :1] * 2 + random.normal(size=(130, 1))).astype(np.float32)
    parts = {"train": slice(0, 90), "validation": slice(90, 110), "test": slice(110, 130)}
    task = {"input": "table", "output": "number"}
    return Data(
        "noise",
        "generated",
        task,
        **{name: Split.from_arrays(inputs[part], targets[part]) for name, part in parts.items()},
    )


def fit(
    directory,
    moment=None,
    number=signal.SIGTERM,
    steps_per_execution=1,
    width=8,
    more=(),
    look=None,
    verbose=0,
    **settings,
):
    """Trains a network with all that has a state: dropout, batch normalisation, Adam, callbacks that wait."""
    config = Config(run_dir=str(directory), **settings)
    run, data = start_run(config), splits()
    with run.strategy.scope():
        inputs = keras.Input([5])
        x = keras.layers.Dense(width, activation="relu")(inputs)
        x = keras.layers.Dropout(0.5)(keras.layers.BatchNormalization()(x))
        model = keras.Model(inputs, keras.layers.Dense(1)(x))
        model.compile(keras.optimizers.Adam(0.1), "mse", metrics=["mae"], steps_per_execution=steps_per_execution)
    callbacks = [
        # With what Keras changes the sign of when it first compares.
        keras.callbacks.EarlyStopping(patience=2, min_delta=0.01, restore_best_weights=True),
        Brake(),
        keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: None),
        keras.callbacks.ReduceLROnPlateau(patience=1, factor=0.5),
        Interruption(moment, number),
        *more,
    ]
    model.fit(
        training_batches(data.train, 16, config.seed, strategy=run.strategy, start_step=run.start_step),
        steps_per_epoch=STEPS,
        shuffle=False,
        epochs=config.epochs,
        validation_data=evaluation_batches(data.validation, 10, run.strategy),
        validation_steps=2,
        callbacks=[*run.callbacks(data, more=callbacks), *([look] if look else [])],
        verbose=verbose,
    )
    run.finish(model, data, evaluate_regressor(model, data.test, 16, run.strategy), {})


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The outcome of the run that nobody interrupts."""
    directory = tmp_path_factory.mktemp("alone") / "run"
    fit(directory)
    outcome = torture.outcome(directory)
    assert len(outcome["history"]) < Config.epochs, "early stopping must be part of this"
    assert len({epoch["loss"] for epoch in outcome["history"]}) == len(outcome["history"])
    return outcome


MOMENTS = [
    ("train", 0, 0),
    ("train", 0, 3),
    ("train", 2, STEPS - 1),
    ("train", 3, 2),
    ("validation", 1, 0),
    ("validation", 2, 1),
    ("end", 0, 0),
    ("end", 2, 0),
]


@pytest.mark.long
def test_a_network_that_only_one_of_the_processes_trained_before(tmp_path, alone, monkeypatch):
    """As the teacher of distillation, which a resumed run finds trained: with its optimizer, Keras counts one more."""

    begin = start_run

    def start_run_after_another(config):
        run = begin(config)
        assert keras.optimizers.Adam().name == "adam"
        return run

    with monkeypatch.context() as patched:
        patched.setitem(fit.__globals__, "start_run", start_run_after_another)
        with pytest.raises(KeyboardInterrupt):
            fit(tmp_path / "run", ("end", 0, 0))
    fit(tmp_path / "run", resume=True)
    assert torture.outcome(tmp_path / "run") == alone


SHORT_MOMENTS = {("train", 3, 2), ("validation", 2, 1), ("end", 2, 0)}


@pytest.mark.parametrize(
    "moment",
    [pytest.param(moment, marks=() if moment in SHORT_MOMENTS else pytest.mark.long) for moment in MOMENTS],
    ids=lambda moment: "-".join(map(str, moment)),
)
def test_interrupted_anywhere_the_end_is_the_same(tmp_path, alone, moment):
    with pytest.raises(KeyboardInterrupt, match="the same command with --resume continues"):
        fit(tmp_path / "run", moment)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, "given back"
    assert not (tmp_path / "run" / "result.json").exists()
    fit(tmp_path / "run", resume=True)
    assert torture.outcome(tmp_path / "run") == alone
    assert read_json(tmp_path / "run" / "result.json")["resumed"] == 1
    assert not unlock(tmp_path / "run"), "unlocked by the end of the run"


@pytest.mark.long
def test_interrupted_at_every_stage_of_one_run(tmp_path, alone):
    for number, moment in enumerate(sorted(MOMENTS, key=lambda moment: (moment[1], moment[0] != "train", moment[2]))):
        with contextlib.suppress(KeyboardInterrupt, AlreadyFinishedError):  # The moment may have passed.
            fit(tmp_path / "run", moment, resume=number > 0)
    if not (tmp_path / "run" / "result.json").exists():
        fit(tmp_path / "run", resume=True)
    assert torture.outcome(tmp_path / "run") == alone
    result = read_json(tmp_path / "run" / "result.json")
    assert result["resumed"] >= 5
    seconds = result["seconds"]
    assert seconds["total"] > seconds["compile"] + seconds["train"] >= 0.99 * result["history"][-1]["seconds"]
    assert [epoch["seconds"] for epoch in result["history"]] == sorted(epoch["seconds"] for epoch in result["history"])


def test_several_steps_in_one_execution(tmp_path):
    fit(tmp_path / "alone", steps_per_execution=3)
    directory = tmp_path / r"run [0.1] a\b*ü"  # TensorFlow reads some of these as a pattern.
    with pytest.raises(KeyboardInterrupt):
        fit(directory, ("train", 1, 0), steps_per_execution=3)
    checkpoint, state = newest_checkpoint(directory / "checkpoints")
    assert (checkpoint.name, state["step"]) == ("epoch-000001-batch-000000003", STEPS + 3)
    fit(directory, steps_per_execution=3, resume=True)
    copy = shutil.copytree(directory, tmp_path / "copy")  # `outcome` reads with TensorFlow.
    assert torture.outcome(copy) == torture.outcome(tmp_path / "alone")


@pytest.mark.parametrize("moment", [("train", 1, 0), ("validation", 1, 0)])
@pytest.mark.long
def test_resumed_with_other_steps_per_execution(tmp_path, monkeypatch, moment):
    """As when the machine is slower than before."""
    monkeypatch.delattr(Brake, "on_train_batch_end")  # It counts executions.
    fit(tmp_path / "alone", epochs=3)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "run", moment, steps_per_execution=3, epochs=3)
    fit(tmp_path / "run", epochs=3, resume=True)
    assert torture.outcome(tmp_path / "run") == torture.outcome(tmp_path / "alone")


def test_a_resumed_epoch_is_shown_with_the_steps_before(tmp_path, capsys, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "run", ("train", 1, 3), epochs=3)
    capsys.readouterr()
    phases = []
    monkeypatch.setattr(
        EpochLine, "on_train_batch_end", lambda line, batch, logs: phases.append(line.skipped + batch + 1)
    )
    fit(tmp_path / "run", epochs=3, verbose=2, resume=True, quiet=False)
    assert phases == [*range(5, STEPS + 1), *range(1, STEPS + 1)]
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("training: ", "epoch "))]
    assert [line.partition("  ")[0] for line in shown] == [
        f"training: epochs 3, steps per epoch {STEPS}",
        "epoch 2/3",
        "epoch 3/3",
    ]
    result = read_json(tmp_path / "run" / "result.json")
    assert result["steps"] == 3 * STEPS


@pytest.mark.long
def test_a_run_whose_config_is_damaged_is_refused(tmp_path):
    fit(tmp_path / "run", epochs=1)
    config = tmp_path / "run" / "config.json"
    config.write_bytes(config.read_bytes()[:50])
    with pytest.raises(UserError, match=r"config\.json: not written by a recipe, or damaged; .*train again"):
        fit(tmp_path / "run", resume=True)


@pytest.mark.long
def test_files_that_an_editor_has_laid_out_anew(tmp_path, alone):
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "run", ("train", 1, 3))
    config = tmp_path / "run" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text())))
    fit(tmp_path / "run", resume=True)
    assert torture.outcome(tmp_path / "run") == alone
    result = tmp_path / "run" / "result.json"
    result.write_text(result.read_text().rstrip())
    assert read_run(tmp_path / "run")["weights_sha256"] == alone["weights"]


def test_what_is_renamed_is_on_the_disk_first(tmp_path, monkeypatch):
    done = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (done.append(os.readlink(f"/proc/self/fd/{file}")), sync(file)))
    monkeypatch.setattr(os, "replace", lambda old, new: (done.append(f"renamed {old}"), replace(old, new)))
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "file").write_text("content")
    rename(tmp_path / "part", tmp_path / "whole")
    part = tmp_path / "part"
    assert done == [str(part / "file"), str(part), f"renamed {part}", str(tmp_path)]
    assert (tmp_path / "whole" / "file").read_text() == "content"


def test_a_picture_that_fails_costs_a_picture(tmp_path, alone, monkeypatch, capsys):
    def fail(figure, title):
        raise MemoryError("no room for so many pixels")

    monkeypatch.setattr("common.runs.figure_png", fail)
    fit(tmp_path / "run")
    names = [line.partition(": ")[2] for line in capsys.readouterr().err.splitlines()]
    assert [name.rpartition("/")[2] for name in names] == [
        f"{name}.png: can't be written (no room for so many pixels)" for name in ("learning_curves", "predictions")
    ]
    assert torture.outcome(tmp_path / "run") == alone


def test_a_recipe_of_another_repository_has_a_commit_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(ROOT / "recipes" / "mnist_cnn.py")])
    assert "recipe_commit" not in provenance()
    git = ["git", "-C", str(tmp_path), "-c", "user.name=me", "-c", "user.email=me@example.org"]
    for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "mine"]):
        subprocess.run([*git, *words], check=True)
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "recipe.py")])
    stated = provenance()
    assert len(stated["recipe_commit"]) == 40
    assert stated["commit"] != stated["recipe_commit"]


def test_a_class_may_have_any_name():
    """Keras takes [UNK] for a word that it does not know."""
    inputs = keras.Input([3])
    model = with_class_names(keras.Model(inputs, keras.layers.Softmax()(inputs)), ("cat", "[UNK]", "dog"))
    assert model([np.eye(3)])["class"].numpy().tolist() == [b"cat", b"[UNK]", b"dog"]


@pytest.mark.long
def test_under_several_replicas(tmp_path):
    settings = {"strategy": "mirrored", "devices": 2}
    fit(tmp_path / "alone", **settings)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "run", ("train", 1, 2), **settings)
    fit(tmp_path / "run", resume=True, **settings)
    outcomes = [torture.outcome(tmp_path / name) for name in ("run", "alone")]
    assert outcomes[0]["weights"] == outcomes[1]["weights"]
    assert outcomes[0]["curves"] == outcomes[1]["curves"]


def test_killed_in_evaluation_or_while_the_result_is_written(tmp_path, alone, monkeypatch):
    """All epochs are done: nothing is trained again, not even after early stopping."""

    def die(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("common.runs.write_json", lambda *file: die() if "metrics" in file[1] else write_json(*file))
        with pytest.raises(KeyboardInterrupt):
            fit(tmp_path / "run")
    fit(tmp_path / "run", ("train", len(alone["history"]), 0), resume=True)
    assert torture.outcome(tmp_path / "run") == alone


@pytest.mark.long
def test_killed_before_the_first_checkpoint(tmp_path, alone, monkeypatch):
    def die(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "on_epoch_begin", die)
        with pytest.raises(KeyboardInterrupt):
            fit(tmp_path / "run")
    assert newest_checkpoint(tmp_path / "run" / "checkpoints") is None
    fit(tmp_path / "run", resume=True)
    assert torture.outcome(tmp_path / "run") == alone


def test_resume_starts_what_never_began(tmp_path, alone):
    fit(tmp_path / "run", resume=True)
    assert torture.outcome(tmp_path / "run") == alone


def test_the_last_two_checkpoints_are_kept(tmp_path):
    fit(tmp_path / "run", checkpoint_every=4, epochs=2)
    # Every four steps, and at the end.
    kept = {"epoch-000001-batch-000000002", "epoch-000002-batch-000000000"}
    assert {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()} == kept


def test_a_checkpoint_that_is_due_at_the_end_of_an_epoch_is_written(tmp_path):
    fit(tmp_path / "run", checkpoint_every=STEPS, epochs=3)
    assert (tmp_path / "run" / "checkpoints" / "epoch-000002-batch-000000000").is_dir()


@pytest.mark.long
def test_what_else_lies_beside_the_checkpoints_stays(tmp_path, alone, capsys):
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "run", ("train", 3, 2))
    checkpoints = tmp_path / "run" / "checkpoints"
    (checkpoints / "epoch-zzz").mkdir()
    (checkpoints / "epoch-zzz" / "notes.txt").write_text("mine")
    (checkpoints / "epoch-000009-batch-000000000").touch()
    fit(tmp_path / "run", resume=True)
    assert capsys.readouterr().err == ""
    assert (checkpoints / "epoch-zzz" / "notes.txt").read_text() == "mine"
    assert len([path for path in checkpoints.iterdir() if path.is_dir()]) <= 1 + 2
    shutil.rmtree(checkpoints / "epoch-zzz")
    (checkpoints / "epoch-000009-batch-000000000").unlink()
    assert torture.outcome(tmp_path / "run") == alone


@pytest.mark.parametrize(("guess", "first"), [(0.0, [1]), pytest.param(math.inf, [], marks=pytest.mark.long)])
def test_checkpoints_are_as_frequent_as_they_are_fast(tmp_path, alone, monkeypatch, guess, first):
    """The first is due when it has been guessed to take a hundredth of the time; then, by the time that it took."""
    saved, write = [], Checkpoints._save
    monkeypatch.setattr("common.checkpoints._GUESS", guess)

    def slow(self, metrics):
        saved.append(self._step)
        write(self, metrics)
        self._took = math.inf

    monkeypatch.setattr(Checkpoints, "_save", slow)
    fit(tmp_path / "run")
    assert saved == [*first, STEPS * len(alone["history"])]
    assert torture.outcome(tmp_path / "run") == alone


@pytest.mark.parametrize(("seconds", "place"), [(0, (3 * STEPS, 3, 0)), (1.1, (16, 2, 4))])
@pytest.mark.long
def test_a_stop_in_a_validation(tmp_path, alone, seconds, place):
    """A short one comes to its end; after a long one, the steps since the last checkpoint are repeated."""

    class Slow(keras.callbacks.Callback):
        def on_test_batch_end(self, batch, logs=None):
            time.sleep(seconds)

    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "run", ("validation", 2, 0), checkpoint_every=4, more=[Slow()])
    _, state = newest_checkpoint(tmp_path / "run" / "checkpoints")
    assert (state["step"], state["epoch"], state["batch"]) == place
    seconds = 0
    fit(tmp_path / "run", more=[Slow()], resume=True)
    assert torture.outcome(tmp_path / "run") == alone


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(tmp_path, alone, capsys):
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "run", ("train", 3, 2))
    newest, _ = newest_checkpoint(tmp_path / "run" / "checkpoints")
    file = newest / "arrays.npz"
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.write_bytes(content)
    fit(tmp_path / "run", resume=True)
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"warning: {file}: damaged; resuming from the one before it, or from the beginning"
    assert torture.outcome(tmp_path / "run") == alone


@pytest.mark.long
def test_damage_anywhere_is_noticed(tmp_path, capsys):
    """The quick part of tools/damage.py: every kind of file, some of its bytes."""
    counts = damage.damage(tmp_path, flips=100, truncations=30, random=random.Random(0))
    assert len(counts) == 7
    assert sum(counts.values()) == 130


def test_a_signal_before_the_first_step_is_done_is_answered_at_once(tmp_path):
    """Tracing can take long; here, the handler that was there before ends the training."""
    asked = []

    def leave(number, frame):
        asked.append(number)
        raise KeyboardInterrupt("at once")

    signal.signal(signal.SIGTERM, leave)
    with pytest.raises(KeyboardInterrupt, match="at once"):
        fit(tmp_path / "run", ("train", 0, 0))
    assert signal.getsignal(signal.SIGTERM) is leave
    with pytest.raises(KeyboardInterrupt, match="the same command with --resume continues"):
        fit(tmp_path / "run", ("train", 0, 1), resume=True)
    assert asked == [signal.SIGTERM]


def test_a_second_interrupt_ends_the_program_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("signal.default_int_handler", None)  # As when the recipe has set its own handler.
    before = signal.getsignal(signal.SIGINT)

    class Look(keras.callbacks.Callback):
        found = None

        def on_train_batch_begin(self, batch, logs=None):
            if batch == 1:
                Look.found = signal.getsignal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt, match="the same command with --resume continues"):
        fit(tmp_path / "run", ("train", 0, 1), signal.SIGINT, more=[Look()])
    assert Look.found == signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) is before


def test_exit_code_75_from_a_recipe(tmp_path):
    """As a process: once before training, once in it; then to the end."""
    recipe = str(ROOT / "recipes" / "linear_regression.py")
    command = [sys.executable, recipe, "--deterministic", "--no-baseline", "--epochs", "200", "--run-dir", "run"]
    for number, awaited in ((signal.SIGINT, "hardware: "), (signal.SIGTERM, "epoch 1/")):
        process = start_program([*command, "--resume"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        while not process.stdout.readline().startswith(awaited):
            assert process.poll() is None
        process.send_signal(number)
        _, errors = process.communicate()
        assert (process.returncode, errors.count("\n")) == (75, 1), errors
        assert errors.startswith("interrupted: ")
        assert "the same command with --resume continues" in errors
    assert newest_checkpoint(tmp_path / "run" / "checkpoints")[1]["step"] > 0
    done = run_program(*command[1:], "--resume", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_finished_run_is_finished_while_its_model_is_there(tmp_path):
    fit(tmp_path / "run", epochs=1)
    with pytest.raises(AlreadyFinishedError, match="finished already"):
        fit(tmp_path / "run", epochs=1, resume=True)
    with pytest.raises(UserError, match=r"in .*/run, a finished run, epochs was 1 and is 2; give the same flags"):
        fit(tmp_path / "run", epochs=2, resume=True)
    model = tmp_path / "run" / "model.keras"
    for do_damage in (lambda: model.write_bytes(model.read_bytes()[:-1]), model.unlink):
        do_damage()
        with pytest.raises(UserError, match=r"model\.keras: missing or changed since the training;"):
            fit(tmp_path / "run", epochs=1, resume=True)
        assert not unlock(tmp_path / "run"), "unlocked with the refusal"


def test_resume_alone_takes_the_latest_unfinished_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = load_recipe("linear_regression")
    data = smoke_data("linear_regression")

    def train(**settings):
        module.train(smoke_config(module, "", **settings), data)

    def interrupt():
        with monkeypatch.context() as patch:
            patch.setattr(Checkpoints, "on_test_end", lambda self, logs=None: os.kill(os.getpid(), signal.SIGTERM))
            with pytest.raises(KeyboardInterrupt):
                train()

    train()
    interrupt()
    interrupt()
    runs = sorted((tmp_path / "runs" / "linear_regression").iterdir())
    finished = [(run / "result.json").exists() for run in runs]
    assert finished == [True, False, False]
    train(resume=True)
    assert [(run / "result.json").exists() for run in runs] == [True, False, True]
    train(resume=True)
    assert [(run / "result.json").exists() for run in runs] == [True, True, True]
    with pytest.raises(AlreadyFinishedError, match=runs[1].name):
        train(resume=True)
    assert sorted((tmp_path / "runs" / "linear_regression").iterdir()) == runs


@pytest.mark.long
def test_resume_alone_finds_a_run_with_a_name_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module, data = load_recipe("linear_regression"), smoke_data("linear_regression")
    for name in ("runs/zz_older", "runs/over_night"):
        with monkeypatch.context() as patch:
            patch.setattr(Checkpoints, "on_test_end", lambda self, logs=None: os.kill(os.getpid(), signal.SIGTERM))
            with pytest.raises(KeyboardInterrupt):
                module.train(smoke_config(module, name), data)
    module.train(smoke_config(module, "", resume=True), data)
    assert [path.parent.name for path in tmp_path.rglob("result.json")] == ["over_night"]


def same(one, other):
    """Whether two values are equal, and of equal types all the way down."""
    if type(one) is not type(other):
        return False
    if isinstance(one, np.ndarray | np.generic):
        return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
    if isinstance(one, dict):
        return same(list(one.items()), list(other.items()))
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return repr(one) == repr(other)


def test_the_state_of_callbacks_is_kept_exactly_or_named(tmp_path, capsys):
    notes = Notes()
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "run", ("train", 1, 3), more=[notes], checkpoint_every=2)
    warning = "warning: Notes.stranger: holds a object, which no checkpoint keeps; --resume starts without it\n"
    assert capsys.readouterr().err == warning
    assert same(notes.seen, list(map(np.int64, range(4))))
    resumed = Notes()
    resumed.state = None

    class Look(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            assert batch == 0
            assert same(resumed.seen, notes.seen)
            assert same(resumed.state, notes.state)
            raise StopAsyncIteration

    with pytest.raises(StopAsyncIteration):
        fit(tmp_path / "run", more=[resumed], look=Look(), resume=True)


def test_another_model_is_refused(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "run", ("train", 1, 2))
    with pytest.raises(UserError, match=r"'dense/kernel'.*start a new run"):
        fit(tmp_path / "run", resume=True, width=9)
    with pytest.raises(UserError, match="holds None where this training has TerminateOnNaN"):
        fit(tmp_path / "run", resume=True, more=[keras.callbacks.TerminateOnNaN()])
    fit(tmp_path / "run", resume=True)


def test_other_data_are_refused(tmp_path, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "run", ("train", 1, 2))
    monkeypatch.setattr(Data, "digest", lambda self: "another")
    with pytest.raises(UserError, match="not the data this run began with"):
        fit(tmp_path / "run", resume=True)


def hold(directory, answer):
    """As another process: takes the lock of a run directory and keeps it, or says why it can't."""
    try:
        lock(directory)
    except UserError as error:
        answer.send(str(error))
    else:
        answer.send("locked")
        time.sleep(600)


def holder_of(directory):
    """Starts a process that takes the lock of a run directory; returns the process and its answer."""
    here, there = FORK_SERVER.Pipe()
    holder = FORK_SERVER.Process(target=hold, args=(directory, there))
    holder.start()
    return holder, here.recv()


@pytest.mark.long
def test_one_run_directory_one_run(tmp_path, alone):
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "run", ("train", 1, 2))
    # This process still has the lock of the run that was interrupted in it; another one may not take it.
    holder, answer = holder_of(tmp_path / "run")
    holder.join()
    assert f"in use by process {os.getpid()} on " in answer
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    holder, answer = holder_of(tmp_path / "other")
    assert answer == "locked"
    with pytest.raises(UserError, match=f"in use by process {holder.pid} on .*; wait for it, or choose another"):
        fit(tmp_path / "other", resume=True)
    holder.kill()
    holder.join()
    fit(tmp_path / "other", resume=True)
    assert torture.outcome(tmp_path / "other") == alone


def test_a_run_that_is_unlocked_is_free_for_another_process(tmp_path):
    lock(tmp_path)
    assert (tmp_path / "lock").read_text() == f"process {os.getpid()} on {platform.node()}"
    assert unlock(tmp_path)
    assert not unlock(tmp_path), "a second time"
    holder, answer = holder_of(tmp_path)
    assert answer == "locked"
    with pytest.raises(UserError, match=f"in use by process {holder.pid} on "):
        lock(tmp_path)
    holder.kill()
    holder.join()


def test_a_directory_that_was_taken_meanwhile_is_left_alone(tmp_path):
    """Between the choice of the directory and the training, the data are loaded: that can take minutes."""
    for content in ({"config.json": "{}"}, {"lock": ""}):
        directory = tmp_path / next(iter(content))
        run = start_run(Config(run_dir=str(directory)))
        directory.mkdir()
        for name, text in content.items():
            (directory / name).write_text(text)
        if "lock" in content:
            with open(directory / "lock", "rb") as held:
                fcntl.flock(held, fcntl.LOCK_EX)
                with pytest.raises(UserError, match="in use by another process; wait for it"):
                    run.callbacks(splits())
        else:
            with pytest.raises(UserError, match="another process uses it now; choose a new folder"):
                run.callbacks(splits())
        assert {path.name: path.read_text() for path in directory.iterdir() if path.name in content} == content
        assert {path.name for path in directory.iterdir()} == {"lock", *content}


def test_a_loss_that_is_no_number(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("common.checkpoints._SHARE", math.inf)  # After each execution, however short.
    module = load_recipe("linear_regression")
    flags = ["--learning-rate", "30", "--epochs", "60", "--quiet", "--run-dir", str(tmp_path / "run"), "--no-baseline"]
    monkeypatch.setattr(sys, "argv", ["recipe.py", *flags])
    with pytest.raises(SystemExit) as left:
        run_recipe(module.train, module.Config)
    assert left.value.code == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("training failed: ")
    assert "step" in line
    checkpoint, _ = newest_checkpoint(tmp_path / "run" / "checkpoints")
    with np.load(checkpoint / "arrays.npz") as arrays:
        assert all(np.isfinite(arrays[name]).all() for name in arrays.files)


def test_a_loss_that_is_no_number_names_the_last_one_that_was(tmp_path):
    class Spoil(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            if self.model.optimizer.iterations == 8:
                self.model.optimizer.learning_rate = np.nan

    message = r"the loss is nan at step 10 \(the last finite one was \d.*\); try a smaller --learning-rate"
    with pytest.raises(TrainingFailedError, match=message):
        fit(tmp_path / "run", more=[Spoil()], checkpoint_every=STEPS)
    assert newest_checkpoint(tmp_path / "run" / "checkpoints")[1]["step"] == STEPS


class Vandal(keras.callbacks.Callback):
    """Does something to the logs in mid-training."""

    def __init__(self, act):
        super().__init__()
        self._act = act

    def on_epoch_end(self, epoch, logs=None):
        if epoch == 1:
            self._act()


@pytest.mark.long
def test_logs_deleted_in_mid_training(tmp_path, alone):
    logs = tmp_path / "run" / "tensorboard"
    fit(tmp_path / "run", more=[Vandal(lambda: shutil.rmtree(logs))])
    outcome = torture.outcome(tmp_path / "run")
    assert (outcome["weights"], outcome["metrics"]) == (alone["weights"], alone["metrics"])


def test_logs_that_cannot_be_written(tmp_path, alone, monkeypatch, capsys):
    def refuse(*arguments, **named):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tf.summary, "create_file_writer", refuse)
    fit(tmp_path / "run")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {tmp_path / 'run' / 'tensorboard'}: no more logs ([Errno 13] Permission denied)")
    outcome = torture.outcome(tmp_path / "run")
    assert (outcome["weights"], outcome["metrics"]) == (alone["weights"], alone["metrics"])


FULL_DISK = """
import resource, runpy, signal, sys
limit = int(sys.argv[1])
sys.argv = sys.argv[2:]
import common.checkpoints, common.runs, tensorflow
begin = common.runs.Run.callbacks
def callbacks(*arguments, **named):
    # From the first step on, no file grows beyond the limit, as on a full disk.
    found = begin(*arguments, **named)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    return found
if limit:
    common.runs.Run.callbacks = callbacks
else:
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def never_full(tmp_path_factory):
    directory = tmp_path_factory.mktemp("never_full") / "run"
    recipe = load_recipe("dense_classifier")
    recipe.train(smoke_config(recipe, directory), smoke_data("dense_classifier"))
    return read_json(directory / "result.json")["weights_sha256"]


@pytest.mark.parametrize(
    ("limit", "warnings", "code", "line"),
    [
        (0, [], 2, "error: --run-dir"),  # The lock and config.json.
        (1000, ["no more logs", "can't be written"], 2, "make room, then continue with --resume"),
        (65_000, ["can't be written"], 2, "make room, then continue with --resume"),  # Checkpoints and the model.
    ],
)
@pytest.mark.long
def test_a_full_disk(tmp_path, never_full, limit, warnings, code, line):
    flags = ("--data", "sample", "--smoke", "--threads", "2", "--deterministic", "--no-baseline", "--quiet")
    command = (str(ROOT / "recipes" / "dense_classifier.py"), *flags, "--run-dir", "run")
    run = run_program("-c", FULL_DISK, str(limit), *command, cwd=tmp_path)
    lines = [each for each in run.stderr.splitlines() if each.startswith(("warning: ", "error: "))]
    assert run.returncode == code, run.stderr
    assert "Traceback" not in run.stderr
    assert line in lines[-1]
    for words in warnings:
        assert any(words in each for each in lines[:-1]), lines
    if not limit:
        assert not (tmp_path / "run").exists(), "nothing is left behind"
    done = run_program(*command, "--resume", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert read_json(tmp_path / "run" / "result.json")["weights_sha256"] == never_full


@pytest.mark.long
def test_a_picture_is_written_whole_or_not_at_all(tmp_path, monkeypatch, capsys):
    write = pathlib.Path.write_bytes

    def full(path, content):
        if ".png" in path.name:
            write(path, content[:1000])
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, content)

    monkeypatch.setattr(pathlib.Path, "write_bytes", full)
    recipe = load_recipe("linear_regression")
    recipe.train(smoke_config(recipe, tmp_path / "run"), smoke_data("linear_regression"))
    assert "learning_curves.png: can't be written" in capsys.readouterr().err
    assert not list(tmp_path.glob("run/plots/*.png"))


@pytest.mark.long
def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(tmp_path, alone, monkeypatch, capsys):
    write, calls = np.savez, []

    def full(path, *arrays):
        calls.append(path)
        if len(calls) > 2:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, *arrays)

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", full)
        with pytest.raises(KeyboardInterrupt):
            fit(tmp_path / "run", ("train", 3, 2), checkpoint_every=STEPS)
    (line,) = capsys.readouterr().err.splitlines()
    assert ": can't be written ([Errno 28] No space left on device); the checkpoint before it stays" in line
    assert newest_checkpoint(tmp_path / "run" / "checkpoints")[1]["step"] == 2 * STEPS
    fit(tmp_path / "run", resume=True)
    assert torture.outcome(tmp_path / "run") == alone
