"""A training begins with the weights of another one, and ends when validation no longer improves."""

import dataclasses
import pathlib
import re
import shutil
import signal

from common.batches import evaluation_batches, training_batches
from common.cli import AlreadyFinishedError, UserError
from common.evaluation import evaluate_regressor
from common.initial_weights import InitialWeights
from common.records import read_json
from common.runs import start_run, with_class_names

import keras
import numpy as np
import pytest
import test_resume
import torture
from conftest import load_recipe, short_set, smoke_config
from programs import ROOT, run_program
from test_resume import STEPS, Interruption, splits


@dataclasses.dataclass(frozen=True)
class Config(test_resume.Config):
    """Settings of the training below."""

    epochs: int = 12


class Recorder(keras.callbacks.Callback):
    """Keeps the weights at the beginning of training and after each epoch."""

    def __init__(self):
        super().__init__()
        self._begin, self._ends = None, []

    def on_epoch_begin(self, epoch, logs=None):
        self._begin = self._begin or self.model.get_weights()

    def on_epoch_end(self, epoch, logs=None):
        self._ends.append(self.model.get_weights())


def fit(directory, moment=None, width=8, rate=0.1, more=(), number=signal.SIGTERM, **settings):
    """Trains a network with dropout, batch normalization and Adam; validation is best in the middle of training."""
    config = Config(run_dir=str(directory), **settings)
    run, data = start_run(config), splits()
    if not config.validation_size:
        data = dataclasses.replace(data, validation=dataclasses.replace(data.validation, rows=np.arange(0)))
    with run.strategy.scope():
        inputs = keras.Input([5])
        x = keras.layers.Dense(width, activation="relu")(inputs)
        x = keras.layers.Dropout(0.5)(keras.layers.BatchNormalization()(x))
        model = keras.Model(inputs, keras.layers.Dense(1, name="answer")(x))
        model.compile(keras.optimizers.Adam(rate), "mse", metrics=["mae"])
    recorder = Recorder()
    model.fit(
        training_batches(data.train, 16, config.seed, strategy=run.strategy, start_step=run.start_step),
        steps_per_epoch=STEPS,
        shuffle=False,
        epochs=config.epochs,
        validation_data=evaluation_batches(data.validation, 10, run.strategy) if len(data.validation) else None,
        validation_steps=2 if len(data.validation) else None,
        callbacks=[*run.callbacks(data, more=[Interruption(moment, number), *more]), recorder],
        verbose=0,
    )
    run.finish(model, data, evaluate_regressor(model, data.test, 16, run.strategy), {})
    return model, recorder


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A finished run to begin with."""
    directory = tmp_path_factory.mktemp("source") / "run"
    fit(directory, epochs=2, seed=7)
    return directory


def saved_weights(directory: pathlib.Path) -> list[np.ndarray]:
    return keras.models.load_model(directory / "model.keras").get_weights()


def assert_equal(weights, others):
    assert len(weights) == len(others)
    for values, of_other in zip(weights, others, strict=True):
        np.testing.assert_array_equal(values, of_other)


def test_training_begins_with_the_weights_of_a_run_or_a_file(source, tmp_path, capsys):
    for number, path in enumerate((source, source / "model.keras")):
        _, recorder = fit(tmp_path / str(number), epochs=1, init_from=str(path), quiet=False)
        assert_equal(recorder._begin, saved_weights(source))
        assert f"initial weights: 3 of 3 layers from {source}/model.keras\n" in capsys.readouterr().out
    first, second = (read_json(tmp_path / name / "result.json") for name in ("0", "1"))
    assert first["weights_sha256"] == second["weights_sha256"]
    assert first["files"] == {"init-from": read_json(source / "result.json")["model_sha256"]}


def test_layers_of_other_shapes_start_fresh_and_are_named(tmp_path, capsys):
    inputs = keras.Input([5])
    other = keras.Model(inputs, keras.layers.Dense(3, name="answer")(keras.layers.Dense(8, name="dense_4")(inputs)))
    other.save(tmp_path / "other.keras")
    _, alone = fit(tmp_path / "alone", epochs=1)
    _, recorder = fit(tmp_path / "run", epochs=1, init_from=str(tmp_path / "other.keras"), quiet=False)
    line = f"initial weights: 1 of 3 layers from {tmp_path}/other.keras; new: 'batch_normalization', 'answer'\n"
    assert line in capsys.readouterr().out
    assert_equal(recorder._begin[:2], other.get_weights()[:2])
    assert_equal(recorder._begin[2:], alone._begin[2:])


def test_where_nothing_fits_there_is_no_run(source, tmp_path):
    inputs = keras.Input([5])
    keras.Model(inputs, keras.layers.Dense(3, name="answer")(inputs)).save(tmp_path / "other.keras")
    named = r"--init-from .*other\.keras: none of the layers 'dense', 'batch_normalization', 'answer' .*; give a run"
    (tmp_path / "mine").mkdir()
    for name in ("new", "mine"):
        with pytest.raises(UserError, match=named):
            fit(tmp_path / name, init_from=str(tmp_path / "other.keras"))
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["mine", "other.keras"]


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (None, r"--init-from .*first: can't be read \(No such file or directory\)"),
        (b"no model", r"--init-from .*first: can't be read \(File is not a zip file\); give a run, or a \.keras file"),
        ("folder", r"first/result\.json: can't be read .*; name the folder of a run"),
        ("unfinished", r"first: a run that is not finished; continue it with --resume"),
    ],
)
def test_a_file_that_is_no_model(tmp_path, content, named):
    first = tmp_path / "first"
    if isinstance(content, bytes):
        first.write_bytes(content)
    elif content:
        first.mkdir()
    if content == "unfinished":
        (first / "config.json").touch()
    with pytest.raises(UserError, match=named):
        fit(tmp_path / "run", init_from=str(first))
    assert not (tmp_path / "run").exists()


def test_layers_match_by_order_where_keras_has_counted_their_names(tmp_path):
    """Keras counts the layers of all models of a process; also in models that are layers."""

    def build():
        inputs, within = keras.Input([4]), keras.Input([4])
        part = keras.Model(within, keras.layers.Dense(4)(keras.layers.Dense(4)(within)))
        return keras.Model(inputs, keras.layers.Dense(4)(part(inputs)))

    first, second = build(), build()
    assert first.layers[-1].name != second.layers[-1].name
    first.save(tmp_path / "first.keras")
    assert "3 of 3 layers" in InitialWeights(tmp_path / "first.keras").assign(second)
    assert_equal(first.get_weights(), second.get_weights())


def test_what_is_fitted_to_the_data_is_that_of_the_new_data(tmp_path):
    def build(values, words):
        numbers, texts = keras.Input([2]), keras.Input([1], dtype="string")
        normalize = keras.layers.Normalization(name="normalize")
        normalize.adapt(np.asarray(values))
        lookup = keras.layers.StringLookup(vocabulary=words, name="words")
        vectors = keras.layers.Flatten()(keras.layers.Embedding(4, 3, name="vectors")(lookup(texts)))
        joined = keras.layers.Concatenate()([normalize(numbers), vectors])
        return keras.Model([numbers, texts], keras.layers.Dense(1, name="answer")(joined))

    build([[0.0, 1.0], [2.0, 5.0]], ["a", "b", "c"]).save(tmp_path / "first.keras")
    for words, line in ((["a", "b", "c"], "2 of 2"), (["a", "b", "d"], "1 of 2")):
        model = build([[7.0, 1.0], [9.0, 5.0]], words)
        before = {layer.name: layer.get_weights() for layer in model.layers}
        said = InitialWeights(tmp_path / "first.keras").assign(model)
        assert f": {line} layers" in said
        assert said.endswith("; fitted to this data: 'normalize'")
        assert ("; new: 'vectors'; other vocabulary: 'words'; " in said) == (line == "1 of 2")
        assert_equal(before["normalize"], model.get_layer("normalize").get_weights())
        same = np.array_equal(before["vectors"][0], model.get_layer("vectors").get_weights()[0])
        assert same == (line == "1 of 2")


def test_embeddings_of_another_tokenizer_start_fresh(tmp_path):
    """As in text_classifier, which trains on the ids of words and saves a model that takes texts."""

    def tokenizer(*words):
        texts = keras.Input([], dtype="string")
        split = keras.layers.TextVectorization(vocabulary=list(words), output_sequence_length=4, name="words")
        return keras.Model(texts, split(texts), name="tokenizer")

    def network():
        ids = keras.Input([4], dtype="int64")
        mean = keras.layers.GlobalAveragePooling1D()(keras.layers.Embedding(4, 3, name="vectors")(ids))
        return keras.Model(ids, keras.layers.Dense(2, name="answer")(mean), name="network")

    texts, first = keras.Input([], dtype="string"), network()
    keras.Model(texts, first(tokenizer("a", "b")(texts))).save(tmp_path / "first.keras")
    for words, same in ((("a", "b"), True), (("b", "a"), False)):
        second = network()
        said = InitialWeights(tmp_path / "first.keras", preprocessing=tokenizer(*words)).assign(second)
        assert ("; new: 'vectors'; other vocabulary: 'words'" in said) == (not same)
        assert np.array_equal(first.get_weights()[0], second.get_weights()[0]) == same
        assert_equal(first.get_weights()[1:], second.get_weights()[1:])


def test_other_classes_are_named(tmp_path):
    inputs = keras.Input([4])
    model = keras.Model(inputs, keras.layers.Dense(2, activation="softmax")(inputs))
    with_class_names(model, ("cat", "dog")).save(tmp_path / "first.keras")
    for names, end in ((("cat", "dog"), "first.keras"), (("cat", "owl"), "; their classes were 'cat', 'dog'")):
        assert InitialWeights(tmp_path / "first.keras", names).assign(model).endswith(end)


@short_set("linear_regression")
def test_every_recipe_begins_with_its_own_run(recipe, finished_run, tmp_path, capsys):
    """With the shortest step, training changes no weight: the result is that of the run before."""
    _, first = finished_run(recipe.__name__)
    settings = {"init_from": str(first), "learning_rate": 1e-30, "epochs": 1, "quiet": False}
    metrics = recipe.train(smoke_config(recipe, tmp_path / "run", **settings))
    line = re.search(r"initial weights: (\d+) of (\d+) layers.*", capsys.readouterr().out)
    assert line[1] == line[2], line[0]
    before = read_json(first / "result.json")["metrics"]
    if recipe.__name__ not in ("pruning", "cifar10_fast"):  # They change weights in other ways than by gradients.
        for name in set(metrics) & {"accuracy", "mse"}:
            assert metrics[name] == pytest.approx(before[name], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("moment", [("train", 1, 3), pytest.param(("train", 0, 2), marks=pytest.mark.long)], ids=str)
def test_killed_it_goes_on_to_the_same_weights(source, tmp_path, moment):
    fit(tmp_path / "alone", epochs=3, init_from=str(source))
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "run", moment, epochs=3, init_from=str(source))
    fit(tmp_path / "run", epochs=3, init_from=str(source), resume=True)
    assert torture.outcome(tmp_path / "run") == torture.outcome(tmp_path / "alone")


@pytest.mark.long
def test_a_resumed_run_takes_the_same_file_only(source, tmp_path):
    copy = shutil.copytree(source, tmp_path / "copy")
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "run", ("train", 0, 2), epochs=3, init_from=str(copy))
    fit(tmp_path / "other", epochs=1)
    shutil.copy(tmp_path / "other" / "model.keras", copy)
    with pytest.raises(UserError, match=r"--resume: in .*, init-from was '\w+' and is '\w+'; give the same flags"):
        fit(tmp_path / "run", epochs=3, init_from=str(copy), resume=True)


def test_a_finished_run_names_the_way_to_more_epochs(source):
    with pytest.raises(AlreadyFinishedError, match=f"finished already; .* new run with --init-from {source}$"):
        fit(source, epochs=2, seed=7, resume=True)


@pytest.fixture(scope="module")
def patient(tmp_path_factory):
    """A run that validation stops, and its weights after each epoch."""
    directory = tmp_path_factory.mktemp("patient") / "run"
    _, recorder = fit(directory, epochs=30, patience=3)
    return directory, recorder


def test_patience_keeps_the_best_epoch(patient):
    directory, recorder = patient
    result = read_json(directory / "result.json")
    losses = [epoch["val_loss"] for epoch in result["history"]]
    best = int(np.argmin(losses))
    assert result["best_epoch"] == best + 1
    assert result["epochs"] == len(losses) == best + 4 < 30
    assert_equal(saved_weights(directory), recorder._ends[best])


@pytest.mark.long
def test_patience_keeps_the_best_of_all_epochs(patient, tmp_path):
    """Also if training ends by --epochs."""
    epochs = read_json(patient[0] / "result.json")["best_epoch"] + 1
    fit(tmp_path / "run", epochs=epochs, patience=3)
    assert read_json(tmp_path / "run" / "result.json")["best_epoch"] == epochs - 1
    assert_equal(saved_weights(tmp_path / "run"), patient[1]._ends[epochs - 2])


@pytest.mark.parametrize("after", [1, *(pytest.param(after, marks=pytest.mark.long) for after in (0, 3))])
def test_killed_after_the_best_epoch(patient, tmp_path, after):
    best = read_json(patient[0] / "result.json")["best_epoch"]
    moment = ("end", best - 1 + after, 0) if after in (0, 3) else ("train", best - 1 + after, 3)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "run", moment, epochs=30, patience=3)
    fit(tmp_path / "run", epochs=30, patience=3, resume=True)
    assert torture.outcome(tmp_path / "run") == torture.outcome(patient[0])
    assert read_json(tmp_path / "run" / "result.json")["best_epoch"] == best


def test_patience_needs_validation(tmp_path):
    with pytest.raises(UserError, match="--patience 3: there are no validation examples; give a --validation-size"):
        fit(tmp_path / "run", patience=3, validation_size=0)
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_no_epoch_before_the_pruning_is_kept(tmp_path):
    recipe = load_recipe("pruning")
    config = smoke_config(recipe, tmp_path / "run", epochs=2, patience=1, sparsity=0.5)
    metrics = recipe.train(config)
    assert read_json(tmp_path / "run" / "result.json")["best_epoch"] == 2
    model = keras.models.load_model(tmp_path / "run" / "model.keras")
    kernels = sum(weight.size for weight in model.get_weights() if weight.ndim > 1)
    assert metrics["nonzero_weights"] < 0.55 * kernels


@pytest.mark.parametrize(
    "callback", [keras.callbacks.ReduceLROnPlateau(), keras.callbacks.LearningRateScheduler(lambda epoch: 0.1)]
)
def test_callbacks_that_set_the_learning_rate_need_one_without_a_schedule(tmp_path, callback):
    named = rf"{type(callback).__name__}: can't set .* has a schedule; use one of both, or --patience"
    with pytest.raises(UserError, match=named):
        fit(tmp_path / "run", more=[callback], rate=keras.optimizers.schedules.CosineDecay(0.1, 100))
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_several_workers_begin_with_the_same_weights(finished_run, tmp_path):
    _, first = finished_run("linear_regression")
    flags = ["--init-from", str(first), "--learning-rate", "1e-30", "--epochs", "1", "--smoke", "--run-dir", "run"]
    program = str(ROOT / "recipes" / "linear_regression.py")
    run = run_program(str(ROOT / "scripts" / "launch.py"), "--workers", "2", program, "--", *flags, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert_equal(saved_weights(tmp_path / "run"), saved_weights(first))
