"""Texts in any script: words, what a saved model answers, and how files are read."""
# ruff: noqa: RUF001

import dataclasses
import itertools
import json
import unicodedata

from common.cli import SharedConfig, UserError
from common.texts import word_hashes
from common.user_files import read_labelled_texts, read_texts

import keras
import numpy as np
import pandas as pd
import pytest
import tensorflow as tf
from conftest import load_recipe


def model_of_words(train_texts, length=20):
    texts = keras.Input([], dtype="string")
    return keras.Model(texts, word_hashes(texts, [text.encode() for text in train_texts], length))


def words(model, *texts):
    """The numbers of the words of each text."""
    return [row[row != 0].tolist() for row in model(tf.constant(texts)).numpy()]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A fine film, don't miss it", "a fine film dont miss it"),
        ("«Fine»\u00a0— “film”…(miss)", "fine film miss"),
        ("it's\u2003it\u2019s\u200bits", "its its its"),
        ("don\u00adt\tDON\u2019T", "dont dont"),
        ("3.5 well-made snake_case @name", "3 5 well made snake case name"),
        ("Straße STRASSE", "strasse strasse"),
        ("ﬁne ｆｉｎｅ 𝐟𝐢𝐧𝐞", "fine fine fine"),
        ("Istanbul İSTANBUL ISTANBUL ıstanbul", "istanbul istanbul istanbul istanbul"),
        ("Οδυσσεύς ΟΔΥΣΣΕΥΣ ὀδυσσεὺσ", "οδυσσευσ οδυσσευσ οδυσσευσ"),
        ("Й и ё е", "й и ё е"),
        ("电影 很好。很", "电 影 很 好 很"),
        ("ที่นี่ดี", "ที่ นี่ ดี"),
        ("ガス ｶﾞｽ", "ガ ス ガ ス"),
        ("iPhone手机abc", "iphone 手 机 abc"),
        ("good🎉🎉fun ❤️ ❤", "good 🎉 🎉 fun ❤ ❤"),
        ("한국 영화", "한국 영화"),
        ("كِتَاب كتـاب", "كتاب كتاب"),
        (" ... ", ""),
        ("", ""),
    ],
)
def test_words_of(text, expected):
    """Words are equal exactly if the expected ones are, in composed and decomposed form."""
    model = model_of_words([text, expected])
    for form in ("NFC", "NFD"):
        (found,) = words(model, unicodedata.normalize(form, text))
        assert len(found) == len(expected.split())
        assert found == list(itertools.chain(*(words(model, word)[0] for word in expected.split())))
    assert len(set(found)) == len(set(expected.split()))


def test_words_do_not_depend_on_the_batch():
    texts = ["", "a fine film", "x" * 300, "…", "a", "film fine", "很好 a"]
    model = model_of_words(texts, length=3)
    assert words(model, *texts) == [words(model, text)[0] for text in texts]
    assert [len(row) for row in words(model, *texts)] == [0, 3, 1, 0, 1, 2, 3]
    assert words(model, "", " ") == [[], []]


def test_the_order_of_marks_does_not_matter():
    model = model_of_words(["ệ"])
    typed = ["\u1ec7", "e\u0323\u0302", "e\u0302\u0323", "\u00ea\u0323"]
    assert len({str(words(model, text)) for text in typed}) == 1


def test_letters_order_and_accents_make_different_words():
    """The hash is one of the whole word: of all words of up to four letters from a small alphabet, none are equal."""
    every = ["".join(letters) for size in (1, 2, 3, 4) for letters in itertools.product("abcüй", repeat=size)]
    found = list(itertools.chain(*words(model_of_words(["abcüй"]), *every)))
    assert len(set(found)) == len(found) == len(every)


def test_letters_that_training_lacks_make_unknown_words():
    model = model_of_words(["rich"])
    ((zurich,), (rich,)) = words(model, "zürich", "rich")
    assert zurich != rich
    assert words(model, "rich\u2047 “rich”🎉")[0][:2] == [rich, rich]


def few_texts(folder, rows=40, **columns):
    table = pd.DataFrame({"text": [f"{['fine', 'poor'][row % 2]} film number {row}" for row in range(rows)]})
    table = table.assign(label=["pos", "neg"] * (rows // 2), **columns)
    table.to_csv(folder / "texts.csv", index=False)
    return folder / "texts.csv"


LANGUAGES = {
    "Latin": ("Une œuvre très réussie, à voir", "Un film ennuyeux, à éviter"),
    "Greek": ("Μια θαυμάσια ταινία, εξαίσιος ρυθμός", "Μια βαρετή ταινία, άσχημος ρυθμός"),
    "Cyrillic": ("Чудесный фильм, ещё и весёлый", "Скучный фильм, дурной и тяжёлый"),
}


@pytest.fixture(scope="module")
def any_language(tmp_path_factory):
    """A model of texts in three languages and of Chinese, saved, and loaded without this project's classes."""
    folder, random = tmp_path_factory.mktemp("languages"), np.random.default_rng(0)
    good, bad, other = ["精彩", "好看", "感人"], ["无聊", "难看", "失望"], ["这部", "电影", "演员", "故事", "音乐"]
    rows = [(text, label) for pair in LANGUAGES.values() for text, label in zip(pair, ("pos", "neg"), strict=True)] * 8
    rows = [(f"{text} {number}", label) for number, (text, label) in enumerate(rows)]
    for label, of in (("pos", good), ("neg", bad)):
        for _ in range(120):
            rows.append(("".join(random.permutation([*random.choice(other, 3), random.choice(of)])), label))
    pd.DataFrame(rows, columns=["text", "label"]).to_csv(folder / "texts.csv", index=False)
    recipe = load_recipe("text_classifier")
    flags = {
        "data": str(folder / "texts.csv"),
        "epochs": 3,
        "batch_size": 16,
        "length": 50,
        "run_dir": str(folder / "run"),
    }
    metrics = recipe.train(recipe.Config(**flags, quiet=True))
    return metrics, keras.models.load_model(folder / "run" / "model.keras"), folder / "run"


def test_texts_without_spaces_are_learned(any_language):
    metrics, model, _ = any_language
    assert metrics["accuracy"] > 0.95
    assert metrics["bag_of_words_accuracy"] > 0.9
    assert model(tf.constant(["故事电影精彩", "音乐演员失望"]))["class"].numpy().tolist() == [b"pos", b"neg"]


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_same_text_in_other_typography_has_the_same_answer(any_language, language):
    _, model, _ = any_language
    for text in LANGUAGES[language]:
        composed, decomposed = (unicodedata.normalize(form, text) for form in ("NFC", "NFD"))
        without_accents = "".join(mark for mark in decomposed if mark not in "\u0300\u0301").upper()
        same = [composed, decomposed, text.upper(), decomposed.upper(), text.title(), f"«{text}»…", f"“{text}”"]
        same += [text.replace(" ", "\u00a0"), text.replace(", ", "—"), without_accents]
        answers = model(tf.constant(same))
        probabilities = answers["probabilities"].numpy()
        np.testing.assert_allclose(probabilities, probabilities[:1].repeat(len(same), 0), rtol=0, atol=1e-6)
        assert abs(probabilities[0, 0] - 0.5) > 0.1, "not an answer for unknown words"


def test_a_saved_model_is_stock_keras(any_language):
    *_, folder = any_language
    config = json.dumps(json.loads(keras.models.load_model(folder / "model.keras").to_json()))
    assert "common." not in config
    assert "Lambda" not in config


@pytest.mark.parametrize("balanced", ["none", "balanced"])
def test_a_text_without_known_words_has_the_frequencies_of_the_classes(balanced):
    recipe = load_recipe("text_classifier")
    data = load_smoke(recipe)
    train = dataclasses.replace(data.train, rows=data.train.rows[data.train.targets.numpy()[:, 0] == 1][:30])
    train = np.concatenate([train.rows, data.train.rows[data.train.targets.numpy()[:, 1] == 1][:10]])
    data = dataclasses.replace(data, train=dataclasses.replace(data.train, rows=train))
    config = recipe.Config(length=4, class_weights=balanced)
    model = recipe.build_model(config, data, np.zeros([9, 2]))
    expected = {"none": [0.75, 0.25], "balanced": [0.5, 0.5]}[balanced]
    np.testing.assert_allclose(model(np.zeros([1, 4], np.int32)).numpy()[0], expected, rtol=1e-5)


def load_smoke(recipe):
    return recipe.load_data(recipe.Config(data="sample", smoke=True))


@pytest.mark.long
def test_a_text_of_ten_megabytes_among_short_ones(tmp_path):
    text = "a fine film" + " and on" * 1_400_000
    table = pd.DataFrame({"text": [text, *(f"a poor film {row}" for row in range(99))], "label": ["a", "b"] * 50})
    table.to_csv(tmp_path / "texts.csv", index=False)
    arrays, _ = read(tmp_path / "texts.csv")
    found = words(model_of_words(["a fine film"], length=100), *arrays["train"][0])
    assert [len(row) for row in found] == [100] + [4] * 99


def folder_of_texts(folder, **files):
    for name in ("neg", "pos"):
        (folder / name).mkdir(parents=True)
        for number in range(3):
            (folder / name / f"{number}.txt").write_text(f"text {number} of {name}")
    for name, content in files.items():
        (folder / "neg" / f"{name}.txt").write_bytes(content)
    return folder


def read(path, group="", **flags):
    return read_labelled_texts(path, "text", "label", group, SharedConfig(**flags))


def test_encodings(tmp_path, capsys):
    files = {
        "mark": "schön".encode("utf-8-sig"),
        "utf16": "schön".encode("utf-16"),
        "big": b"\xfe\xff" + "schön".encode("utf-16-be"),
        "windows": "schön “so”".encode("cp1252"),
        "latin": b"sch\xf6n \x81",
    }
    (texts, labels) = read(folder_of_texts(tmp_path, **files))[0]["train"]
    found = [text.decode() for text, label in zip(texts, labels, strict=True) if label == "neg"][3:]
    assert found == ["schön", "schön \x81", "schön", "schön", "schön “so”"]  # By the names of the files.
    warnings = capsys.readouterr().err
    assert "1 file is not UTF-8; read as Windows-1252" in warnings
    assert "1 file is not UTF-8; read as Latin-1" in warnings
    assert read_texts(tmp_path / "neg" / "utf16.txt", "text") == ["schön".encode()]


def test_all_broken_files_are_named_at_once(tmp_path, capsys):
    files = {f"blank{number:02}": b" \n" for number in range(12)} | {"binary": b"\x00\x01\xff"}
    folder = folder_of_texts(tmp_path, **files)
    with pytest.raises(UserError) as raised:
        read(folder)
    assert "13 files can't be used" in str(raised.value)
    assert "binary.txt: not a text file" in str(raised.value)
    assert "blank08.txt: no text in this file and 3 more; correct or remove them, or give" in str(raised.value)
    (texts, labels) = read(folder, skip_broken=True)[0]["train"]
    assert len(texts) == len(labels) == 6
    assert "left out 13 files that can't be used: " in capsys.readouterr().err


def test_other_files_are_counted(tmp_path, capsys):
    folder = folder_of_texts(tmp_path)
    (folder / "neg" / "more.md").write_text("not read")
    read(folder)
    assert "left out 1 .md" in capsys.readouterr().out


def test_all_empty_cells_are_named_at_once(tmp_path):
    path = tmp_path / "texts.csv"
    path.write_text("text,label\nfine,pos\n,neg\npoor,\ngood,pos\n")
    with pytest.raises(
        UserError, match=r"2 rows can't be used: .*row 3, column 'text': empty, .*row 4, column 'label'"
    ):
        read(path)
    texts, labels = read(path, skip_broken=True)[0]["train"]
    assert (texts.tolist(), labels.tolist()) == ([b"fine", b"good"], ["pos", "pos"])
    path.write_text("text,label\n,pos\n,neg\n")
    with pytest.raises(UserError, match="none of the rows of train can be used"):
        read(path, skip_broken=True)


def test_groups_stay_together_and_test_data_are_the_test_split(tmp_path):
    recipe = load_recipe("text_classifier")
    path = few_texts(tmp_path, author=[f"author {row // 4}" for row in range(40)])
    data = recipe.load_data(recipe.Config(data=str(path), group="author"))
    splits = [
        {int(text.split()[-1]) // 4 for text in of.inputs.numpy()} for of in (data.train, data.validation, data.test)
    ]
    assert sum(map(len, splits)) == len(set.union(*splits)) == 10
    assert all(splits)
    (tmp_path / "other").mkdir()
    other = few_texts(tmp_path / "other", rows=6)
    data = recipe.load_data(recipe.Config(data=str(path), group="author", test_data=str(other)))
    assert len(data.test) == 6
    assert len(data.train) + len(data.validation) == 40
    folder = folder_of_texts(tmp_path / "folder")
    data = recipe.load_data(recipe.Config(data=str(folder), test_data=str(folder_of_texts(tmp_path / "test"))))
    assert data.counts()["test"] == 6


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ({"group": "author", "data": "sample"}, "--group author: is for files of your own"),
        ({"group": "text"}, "--group text: also the --text-column; give another column"),
        ({"group": "nobody"}, "no column 'nobody'"),
    ],
)
def test_groups_that_do_not_fit(tmp_path, flags, problem):
    recipe = load_recipe("text_classifier")
    flags = {"data": str(few_texts(tmp_path))} | flags
    with pytest.raises(UserError, match=problem):
        recipe.load_data(recipe.Config(**flags))
