"""Splits texts in any script into words, with stock layers of Keras, so that a saved model takes raw texts."""

import functools
import hashlib
import sys
import unicodedata
from collections.abc import Iterable

import keras
import numpy as np

# Scripts without spaces: each character is a word, with the marks that follow it.
_NO_SPACES = {"CJK", "IDEOGRAPHIC", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR"}
# What capitals or informal writing leave out: grave, acute, Greek accents and breathings, the dot of i; the Arabic
# stroke that lengthens words. Apostrophes do not end a word.
_IGNORED = set("\u0300\u0301\u0307\u0313\u0314\u0342\u0640'\u2019\u02bc\uff07")
# Kinds of characters. A mark belongs to the character before. From _MARK_OF_SINGLE on, no letter joins the word.
_LETTER, _MARK, _MARK_OF_SINGLE, _SINGLE, _SEPARATOR = range(5)
PRIME = 0x9E3779B97F4A7C15 - 2**64  # Multiplier of all hashes: odd, so that it has an inverse modulo 2**64.
_CHARACTERS_PER_WORD = 10


def folded(character: str) -> tuple[int, str]:
    """Returns the kind of a character, and the letters, marks and digits that it contributes to a word.

    These are in compatibility decomposition (NFKD) and have no case, so that all ways to write a word are the same.
    """
    category, name = unicodedata.category(character), unicodedata.name(character, "")
    if category == "So":  # Such as emoji: a word on its own.
        return _SINGLE, character
    if name.startswith("VARIATION SELECTOR"):  # Between emoji and text style.
        return _MARK_OF_SINGLE, ""
    if _is_ignored(character):
        return _MARK, ""
    text = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", character).casefold()).replace("\u0131", "i")
    text = "".join(part for part in text if unicodedata.category(part)[0] in "LMN" or _is_ignored(part))
    if not text:
        return _SEPARATOR, ""
    is_mark = unicodedata.category(text[0])[0] == "M"
    if _NO_SPACES & {*unicodedata.name(text[0], "").replace("-", " ").split()}:
        kind = _MARK_OF_SINGLE if is_mark else _SINGLE
    else:
        kind = _MARK if is_mark else _LETTER
    return kind, "".join(part for part in text if not _is_ignored(part))


def _is_ignored(character: str) -> bool:
    is_format = unicodedata.category(character) == "Cf" and character != "\u200b"  # The zero-width space is a space.
    is_vowel_point = 10 <= unicodedata.combining(character) <= 36  # Of Hebrew and Arabic.
    return character in _IGNORED or is_format or is_vowel_point


@functools.cache
def _all_folded() -> dict[str, tuple[int, str]]:
    known = map(chr, range(1, sys.maxunicode + 1))  # A vocabulary of Keras can't hold the null character.
    return {of: folded(of) for of in known if unicodedata.category(of) not in ("Cn", "Co", "Cs")}


def _hash(text: str) -> tuple[int, int]:
    """Returns a hash h and a factor f of folded text: if g is the hash of what precedes it, that of both is g / f + h.

    All are modulo 2**64. The order of marks has no influence, because it differs between ways to write a letter.
    """
    value, shrinkage = 0, 1
    for part in text:
        if unicodedata.category(part)[0] != "M":
            value, shrinkage = value * PRIME, shrinkage * pow(PRIME, -1, 2**64)
        value += int.from_bytes(hashlib.blake2b(part.encode(), digest_size=8).digest(), "little")
    return _signed(value), _signed(shrinkage)


def _signed(value: int) -> int:
    return (value + 2**63) % 2**64 - 2**63


def word_hashes(texts: keras.KerasTensor, train_texts: Iterable[bytes], length: int) -> keras.KerasTensor:
    """Splits texts into words by layers of Keras.

    The same text in other case or typography has the same words: composed or decomposed accents, wide letters,
    punctuation and spaces of any kind. Characters of scripts without spaces are one word each.

    Args:
        texts: UTF-8 strings, [batch].
        train_texts: all their letters are known. Other letters make a word unknown.
        length: maximum number of words per text; the first ones. Reads at most 10 characters per word.

    Returns:
        A 64-bit hash per word, int64 [batch, length], followed by zeros; the output of a layer "words".
    """
    ops, every, seen = keras.ops, _all_folded(), set()
    for text in train_texts:
        seen.update(text.decode(errors="replace"))
    parts = {part for character in seen for part in every.get(character, (0, ""))[1]}
    known = {of: about for of, about in every.items() if unicodedata.category(of) == "So" or parts.issuperset(about[1])}
    # Padding is a separator. Unknown characters are letters of their own.
    table = [(_SEPARATOR, ""), (_LETTER, "\ufffd"), *known.values()]
    table = np.array([(kind, *_hash(text)) for kind, text in table])

    limit = length * _CHARACTERS_PER_WORD
    number = keras.layers.TextVectorization(
        standardize=None, split="character", vocabulary=[*known], output_sequence_length=limit, name="characters"
    )(texts)
    # One long row with the characters of all texts, because their lengths differ a lot.
    row, column = ops.nonzero(number)
    number = ops.take(ops.reshape(number, [-1]), ops.cast(row, "int64") * limit + column)
    kind, value, shrinkage = ops.unstack(ops.take(table, number, axis=0), 3, axis=1)
    after_word = ops.logical_and(ops.equal(kind, _LETTER), ops.roll(kind, 1) >= _MARK_OF_SINGLE)
    starts = ops.logical_or(ops.equal(column, 0), ops.logical_or(kind >= _SINGLE, after_word))
    # The hash of a word is a polynomial of its characters: a difference of cumulative sums, modulo 2**64.
    shrinkage = ops.cumprod(shrinkage)
    (end,) = ops.nonzero(ops.roll(starts, -1))
    sums, shrinkage = ops.take(ops.cumsum(value * shrinkage), end), ops.take(shrinkage, end)
    growth = shrinkage
    for _ in range(5):  # Newton's method for the inverse; each step doubles the number of correct bits, at first 3.
        growth = growth * (2 - shrinkage * growth)
    word = ops.diff(ops.pad(sums, [[1, 0]])) * growth
    (kept,) = ops.nonzero(word)  # Separators have no content.
    row, word = ops.take(row, ops.take(end, kept)), ops.pad(ops.take(word, kept), [[0, 1]])
    # Back to one row per text.
    of_text = ops.cumsum(ops.ones_like(texts, dtype="int32")) - 1
    first, last = (ops.expand_dims(ops.searchsorted(row, of_text, side), 1) for side in ("left", "right"))
    place = first + ops.arange(length)
    words = ops.where(place < last, ops.take(word, ops.minimum(place, last)), 0)
    return keras.layers.Identity(name="words")(words)
