"""Tables as people have them: kinds of columns, their values, the encoder, and predictions from raw columns."""

import dataclasses
import json
import warnings

from common import artefacts, tables
from common.cli import UserError
from common.data import load_table

import keras
import numpy as np
import pandas as pd
import predict
import pytest
import tensorflow as tf
from conftest import load_recipe, smoke_config

ROWS = 240


def table_of(seed: int = 0, rows: int = ROWS) -> pd.DataFrame:
    """A table with each kind of column, and a class that depends on a category and a number."""
    random = np.random.default_rng(seed)
    place, mass = random.choice(["north", "south", "Öland"], rows), random.normal(4000, 500, rows)
    days = pd.to_timedelta(random.integers(0, 700, rows), "D")
    return pd.DataFrame(
        {
            "id": np.arange(10_000, 10_000 + rows),
            "place/name": place,
            "mass (g)": np.where(random.uniform(size=rows) < 0.1, np.nan, mass.round(0)),
            "tagged": random.choice(["Yes", "no"], rows),
            "seen": pd.Timestamp("2024-01-01") + days,
            "left": (pd.Timestamp("2024-01-13") + days).strftime("%d/%m/%Y"),
            "price": [f"${price:,.2f}" for price in random.uniform(1, 3000, rows)],
            "share": [f"{share:.1f}%" for share in random.uniform(0, 100, rows)],
            "station": "main",
            "note": [f"note {number}" for number in random.permutation(rows)],
            "sex": random.choice(["male", "female", "NA"], rows),
            "target": np.where((place == "north") ^ (mass > 4000), "alba", "nigra"),
        }
    )


KINDS = {
    "place|name": "category",
    "mass (g)": "number",
    "tagged": "boolean",
    "seen": "date ISO8601",
    "left": "date %d/%m/%Y",
    "price": "number",
    "share": "number",
    "sex": "category",
}


def load(path, classes=True, **flags):
    return load_table("", tables.TableConfig(data=str(path), **flags), dict, classes)


def written(folder, table: pd.DataFrame, name: str = "table.csv", **options):
    table.to_csv(folder / name, index=False, **options)
    return folder / name


def column(data, name: str, split: str = "train") -> np.ndarray:
    return getattr(data, split).arrays()[0][name]


def refusal(path, **flags) -> str:
    with pytest.raises(UserError) as error:
        load(path, quiet=True, **flags)
    return str(error.value)


@pytest.mark.parametrize("form", ["comma", "semicolon", "tab", "BOM", "Latin-1", "UTF-16", "Parquet"])
def test_each_form_of_a_file_gives_the_same_columns(tmp_path, form):
    table = table_of()
    path, options = tmp_path / "table.csv", {"index": False}
    options |= {"semicolon": {"sep": ";", "decimal": ","}, "tab": {"sep": "\t"}}.get(form, {})
    options |= {"BOM": {"encoding": "utf-8-sig"}, "Latin-1": {"encoding": "cp1252"}}.get(form, {})
    options |= {"UTF-16": {"encoding": "utf-16"}}.get(form, {})
    if form == "semicolon":  # As a German spreadsheet writes money.
        table["price"] = [price.translate(str.maketrans(",.", ".,")) for price in table["price"]]
        table["share"] = [share.replace(".", ",") for share in table["share"]]
    if form == "Parquet":
        table.to_parquet(path := tmp_path / "table.parquet")
    else:
        table.to_csv(path, **options)
    data, expected = load(path), load(written(tmp_path, table_of(), "expected.csv"))
    assert data.columns == KINDS
    for name in KINDS:
        np.testing.assert_array_equal(data.train.stored_inputs[name], expected.train.stored_inputs[name])


def test_values_of_each_kind(tmp_path):
    """Against what pandas reads, for all rows."""
    table = table_of()
    data = load(written(tmp_path, table))
    assert data.columns == KINDS
    stored = {name: np.asarray(values) for name, values in data.train.stored_inputs.items()}
    np.testing.assert_array_equal(stored["mass (g)"], table["mass (g)"])
    np.testing.assert_array_equal(stored["tagged"], table["tagged"] == "Yes")
    for name, form in (("seen", None), ("left", "%d/%m/%Y")):
        seconds = (pd.to_datetime(table[name], format=form) - pd.Timestamp(0)) / pd.Timedelta(seconds=1)
        np.testing.assert_array_equal(stored[name], seconds)
    np.testing.assert_allclose(stored["price"], [float(price[1:].replace(",", "")) for price in table["price"]])
    np.testing.assert_allclose(stored["share"], [float(share[:-1]) / 100 for share in table["share"]])
    assert stored["sex"].tolist() == [b"" if sex == "NA" else sex.encode() for sex in table["sex"]]


def test_the_kinds_are_printed_once_and_bounded(tmp_path, capsys):
    table = table_of()
    path = written(tmp_path, table)
    load(path)
    printed = capsys.readouterr().out
    rows = {line.split("  ")[1]: line.split("  ")[-1].strip() for line in printed.splitlines() if line[:1] == " "}
    assert rows["id"] == "left out: numbers the rows; to keep it, give --numbers"
    assert rows["place|name"] == "category, 3 values"
    assert rows["mass (g)"] == f"number, {table['mass (g)'].isna().sum()} missing"
    assert rows["station"] == "left out: constant in train, 'main'"
    assert rows["note"].startswith("left out: ")
    wide = pd.DataFrame(np.random.default_rng(0).normal(size=(50, 60))).add_prefix("c").assign(target=["a", "b"] * 25)
    load(written(tmp_path, wide))
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == "  and 40 more: 40 number"
    assert len(printed) == 23


def test_flags_choose_kinds_and_columns(tmp_path):
    table = table_of().assign(code=np.arange(ROWS) % 5)
    path = written(tmp_path, table)
    data = load(path, drop="seen,left,price,share,note,place/name,station", categories="code", numbers="id")
    expected = {"id": "number", "mass (g)": "number", "tagged": "boolean", "sex": "category", "code": "category"}
    assert data.columns == expected
    assert set(column(data, "code")) == {b"0", b"1", b"2", b"3", b"4"}
    for flag in ("drop", "categories", "numbers", "group"):
        assert "no column 'nowhere'" in refusal(path, **{flag: "nowhere"})
    assert refusal(path, drop="target").startswith("--drop target: is the column to predict")


def test_groups_stay_together_and_are_no_input(tmp_path):
    random = np.random.default_rng(0)
    patient = random.integers(0, 40, 400)
    table = pd.DataFrame({"patient": patient, "a": random.normal(size=400), "target": np.where(patient % 2, "x", "y")})
    data = load(written(tmp_path, table), group="patient")
    assert data.columns == {"a": "number"}
    splits = {split: set(patient[getattr(data, split).rows]) for split in ("train", "validation", "test")}
    assert all(splits.values())
    assert sum(map(len, splits.values())) == 40


def test_a_file_of_test_examples(tmp_path):
    path, test = written(tmp_path, table_of()), written(tmp_path, table_of(1, 30).iloc[:, ::-1], "test.csv")
    data = load(path, test_data=str(test))
    assert (len(data.test), len(data.train) + len(data.validation)) == (30, ROWS)
    assert set(column(data, "sex", "test")) == {b"male", b"female", b""}
    lacking = written(tmp_path, table_of(1, 30).drop(columns=["sex", "seen"]), "lacking.csv")
    assert "no column 'seen', 'sex' among " in refusal(path, test_data=str(lacking))


def test_kinds_are_inferred_from_train_only(tmp_path):
    """A column that is constant in train is left out, whatever the test file has."""
    path = written(tmp_path, table_of().assign(flag=0))
    test = written(tmp_path, table_of(1, 30).assign(flag=range(30), sex="unheard of"), "test.csv")
    data = load(path, test_data=str(test))
    assert "flag" not in data.columns
    features = tables.fit_features(data)
    assert sorted(features.categories["sex"]) == ["", "female", "male"]
    matrix = tables.encoded(data.test, tables.build_encoder(features)).inputs.numpy()
    sex = [place for place, name in enumerate(features.names) if name.startswith("sex=")]
    np.testing.assert_array_equal(matrix[:, sex], 0)


def test_cells_that_do_not_fit_are_told_at_once_by_column(tmp_path):
    table = table_of().astype({"mass (g)": object, "seen": str})
    table.loc[[10, 20, 30, 40], "mass (g)"] = ["heavy", "light", "?", "heavy"]
    table.loc[5, "seen"] = "soon"
    line = refusal(written(tmp_path, table))
    assert "column 'mass (g)': 3 of 240 cells are not numbers ('heavy' in row 12, 'light' in row 22, 'heavy'" in line
    assert "; column 'seen': 1 of 240 cells are not dates ('soon' in row 7); correct them, or name" in line
    assert load(written(tmp_path, table), drop="seen", categories="mass (g)").columns["mass (g)"] == "category"


def test_rows_of_wrong_length_are_named(tmp_path):
    (tmp_path / "table.csv").write_text("a,target\n1,x\n2,y,z\n3\n4,x\n")
    assert "first line has 2 values, and row 3 has 3, row 4 has 1; correct" in refusal(tmp_path / "table.csv")


def test_dates_that_can_be_read_in_two_ways_are_left_out(tmp_path):
    days = np.random.default_rng(0).integers(1, 13, (200, 2))
    table = pd.DataFrame(
        {"day": [f"{a:02}/{b:02}/2024" for a, b in days], "a": days[:, 0] ** 3, "target": ["x", "y"] * 100}
    )
    assert load(written(tmp_path, table)).columns == {"a": "number"}


def test_numbers_as_people_write_them():
    texts = ["1,234.5", "$ 1,200", "-€3", "12 %", "\N{MINUS SIGN}4", "1 234 567", "1e3", ".5", "+7"]
    expected = [1234.5, 1200, -3, 0.12, -4, 1234567, 1000, 0.5, 7]
    np.testing.assert_allclose([tables._number(text, ".") for text in texts], expected)
    german = ["1.234,5", "1.200 €", "0,5", "1.000.000"]
    np.testing.assert_allclose([tables._number(text, ",") for text in german], [1234.5, 1200, 0.5, 1e6])
    for text in ("", "-", "1,5", "12,34,567", "1 2", "three", "1.2.3", "$", "--3", "1,2345"):
        assert np.isnan(tables._number(text, ".")), text


def test_the_encoder_shifts_in_float64(tmp_path, capsys):
    """Seconds since 1970 differ by less than float32 can tell; a column of two far places loses them, and says so."""
    random = np.random.default_rng(0)
    time = 1_700_000_000 + random.integers(0, 120, 500)
    far = np.where(np.arange(500) % 2, 0, time)
    table = pd.DataFrame({"time": time, "far": far, "steady": 0.1 + 0.2, "target": np.where(time % 2, "x", "y")})
    table.loc[0, "steady"] = 0.3  # But for rounding, a constant.
    data = load(written(tmp_path, table))
    features = tables.fit_features(data)
    assert "warning: column 'far': only " in (told := capsys.readouterr().err)
    assert "'time'" not in told
    names, matrix = features.names, tables.encoded(data.train, tables.build_encoder(features)).inputs.numpy()
    seconds = column(data, "time")
    np.testing.assert_allclose(matrix[:, names.index("time")], (seconds - seconds.mean()) / seconds.std(), atol=1e-6)
    assert np.abs(matrix).max() < 30


def test_features_of_each_kind(tmp_path):
    data = load(written(tmp_path, table_of()))
    features = tables.fit_features(data)
    train = tables.encoded(data.train, tables.build_encoder(features))
    by_name = dict(zip(features.names, train.inputs.numpy().T, strict=True))
    assert len(by_name) == train.input_shape[0]
    mass, place = column(data, "mass (g)"), column(data, "place|name")
    np.testing.assert_array_equal(by_name["mass (g) is missing"], np.isnan(mass))
    scaled = np.nan_to_num((mass - np.nanmean(mass)) / np.nanstd(mass))
    np.testing.assert_allclose(by_name["mass (g)"], scaled, atol=1e-6)
    np.testing.assert_array_equal(by_name["place|name=Öland"], place == "Öland".encode())
    assert by_name["sex="].sum() == np.sum(column(data, "sex") == b"")


def test_rare_categories_are_others():
    values = [f"{number:03}" for number in range(80) for _ in range(80 - number)]
    split = tables.Split.from_arrays(
        {"a": np.array([value.encode() for value in values], object)}, np.zeros(len(values))
    )
    data = dataclasses.make_dataclass("Data", ["columns", "train"])({"a": "category"}, split)
    features = tables.fit_features(data)
    assert features.categories["a"] == sorted(set(values))[: tables.MOST_CATEGORIES]
    encoder = tables.build_encoder(features)
    sums = encoder({"a": tf.constant(["000", "079", "unseen", "[UNK]", ""])}).numpy().sum(axis=1)
    np.testing.assert_array_equal(sums, [1, 0, 0, 0, 0])


def test_column_numbers_do_not_make_equal_rows_different(tmp_path):
    """Each row five times: none may be in two splits, whatever number it has."""
    random = np.random.default_rng(0)
    a = np.repeat(random.normal(size=60), 5)
    data = load(written(tmp_path, pd.DataFrame({"id": range(300), "a": a, "target": random.choice(["x", "y"], 300)})))
    contents = {split: set(column(data, "a", split)) for split in ("train", "validation", "test")}
    assert sum(map(len, contents.values())) == 60


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of dense_classifier on a table of each kind, with a class called [UNK] and names that are no names."""
    folder = tmp_path_factory.mktemp("tables")
    table = table_of().replace({"target": {"nigra": "[UNK]"}}).assign(体重=range(0, 3 * ROWS, 3), cast=1.5)
    table.loc[::2, "cast"] = 2.5
    path = written(folder, table)
    recipe = load_recipe("dense_classifier")
    config = smoke_config(recipe, folder / "run", data=str(path), smoke=False, epochs=12, batch_size=32)
    recipe.train(config)
    return path, folder / "run", recipe.load_data(config)


def test_predict_gives_the_answers_of_the_run(trained, tmp_path):
    """Without the target, in another order, with more columns: the same; a category that is new is as another."""
    path, run, data = trained
    table = pd.read_csv(path, keep_default_na=False)
    new = written(tmp_path, table.drop(columns="target").iloc[:, ::-1].assign(more="x"), sep=";")
    answers = predict.predict(run, [str(new)])
    result, model = artefacts.load_run(run)
    assert result["columns"] == data.columns == {**KINDS, "体重": "number", "cast": "number"}
    inputs, targets = data.test.arrays()
    outputs = model(tf.nest.map_structure(tf.constant, inputs))["probabilities"].numpy()
    assert np.mean(outputs.argmax(axis=1) == targets.argmax(axis=1)) == pytest.approx(result["metrics"]["accuracy"])
    found = [[*answers[row]["probabilities"].values()] for row in data.test.rows]
    np.testing.assert_allclose(found, outputs, atol=1e-6)
    assert {answer["class"] for answer in answers} == {"alba", "[UNK]"}
    one = written(tmp_path, table.head(2).assign(**{"place/name": "Mars"}))
    assert [answer["input"] for answer in predict.predict(run, [str(one)])] == [f"{one}, row 2", f"{one}, row 3"]


def test_predict_names_all_columns_and_cells_that_are_wrong(trained, tmp_path):
    path, run, _ = trained
    table = pd.read_csv(path, keep_default_na=False, dtype=str)
    with pytest.raises(UserError, match=r"no column 'seen', 'sex' among .*; the model takes them; rename"):
        predict.predict(run, [str(written(tmp_path, table.drop(columns=["sex", "seen"])))])
    table.loc[0, ["tagged", "seen"]] = "perhaps"
    with pytest.raises(UserError, match=r"'tagged': 1 of 240 cells are not yes or no .*'seen': 1 of 240 cells are not"):
        predict.predict(run, [str(written(tmp_path, table))])


@pytest.mark.parametrize("form", ["keras", "saved_model", "litert", "onnx"])
@pytest.mark.long
def test_exports_take_raw_columns_by_name(trained, tmp_path, form):
    export = pytest.importorskip("export")
    pytest.importorskip("ai_edge_litert" if form == "litert" else "tf2onnx" if form == "onnx" else "keras")
    path, run, data = trained
    result, model = artefacts.load_run(run)
    file = tmp_path / f"exported{export.SUFFIXES[form]}"
    assert export.export(model, result, form, file, export.first_inputs(data, 100), 1e-4)["passed"]
    answers, expected = (predict.predict(where, [str(path)]) for where in (file, run))
    assert [answer["class"] for answer in answers] == [answer["class"] for answer in expected]


def test_inputs_of_a_saved_model_have_names_that_tensorflow_accepts():
    names = artefacts.served_names(["mass (g)", "mass [g]", "50%", "体重", "_a", "b"])
    assert [*names.values()] == ["column_50_", "column__a", "b", "mass__g_", "mass__g__", "column___"]


@pytest.mark.parametrize("name", ["linear_regression", pytest.param("dense_regression", marks=pytest.mark.long)])
def test_a_target_with_a_large_offset(tmp_path, name):
    """The digits of a target of a billion survive, in the metrics, the baselines and the saved model."""
    random = np.random.default_rng(0)
    a = random.normal(size=1000)
    path = written(tmp_path, pd.DataFrame({"a": a, "b": random.normal(size=1000), "target": 1e9 + 10 * a}))
    recipe = load_recipe(name)
    config = smoke_config(recipe, tmp_path / "run", data=str(path), smoke=False, baseline=True, epochs=15)
    metrics = recipe.train(dataclasses.replace(config, target="target", batch_size=32, learning_rate=0.003))
    assert metrics["r2"] > 0.98
    assert metrics["ridge_mse" if name == "dense_regression" else "lstsq_mse"] < 0.1
    answers = predict.predict(tmp_path / "run", [str(path)])
    errors = [answer["value"] for answer in answers] - (1e9 + 10 * a)
    assert np.sqrt(np.mean(errors**2)) < 1.5


def test_a_thousand_columns_in_one_model(tmp_path):
    features = tables.Features({f"x{number}": (float(number), 2.0) for number in range(200)}, ["x7"], {"c": ["a", ""]})
    encoder = tables.build_encoder(features)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder.save(tmp_path / "encoder.keras")
        again = keras.models.load_model(tmp_path / "encoder.keras")
    inputs = {name: tf.constant([float(name[1:]), np.nan], tf.float64) for name in features.numbers}
    matrix = again({"c": tf.constant(["a", ""]), **inputs}).numpy()
    np.testing.assert_array_equal(matrix, [[0.0] * 201 + [1.0, 0.0], [0.0] * 200 + [1.0, 0.0, 1.0]])


def test_result_json_has_the_kinds(trained):
    assert json.loads((trained[1] / "result.json").read_text())["columns"]["left"] == "date %d/%m/%Y"
