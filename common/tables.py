"""Tables of the user: reads CSV and Parquet, infers the kinds of the columns, and encodes rows for a network."""

import csv
import dataclasses
import io
import pathlib
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from common.batches import Split
from common.cli import SharedConfig, UserError, listed, some, warn
from common.console import say

import keras
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import tensorflow as tf

# Cells without a value, in any case. In a column of classes, the words of the second line are classes.
_EMPTY = {"", "na", "n/a", "nan", "null"}
MISSING = _EMPTY | {"none", "?", "-"}
_NULLS = sorted({form(word) for word in MISSING for form in (str.lower, str.upper, str.title)} | {"NaN"})
_YES_NO = [("yes", "no"), ("y", "n"), ("true", "false"), ("t", "f"), ("on", "off"), ("ja", "nein"), ("1", "0")]
_BOOLEANS = {word: float(place == 0) for pair in _YES_NO for place, word in enumerate(pair)}
_DAYS = ["%d.%m.%Y", "%d/%m/%Y", "%m/%d/%Y", "%d-%m-%Y", "%m-%d-%Y", "%Y/%m/%d", "%Y.%m.%d", "%d-%b-%Y"]
_DAYS += ["%d %b %Y", "%d %B %Y", "%b %d, %Y", "%B %d, %Y"]
_DATES = ["ISO8601", *(f"{day}{time}" for day in _DAYS for time in ("", " %H:%M", " %H:%M:%S", " %I:%M %p"))]
_CURRENCY = r"(?:[$€£¥₹]|USD|EUR|GBP|CHF)?"
_NUMBERS = {  # By decimal mark; the other mark, spaces and apostrophes separate thousands.
    mark: re.compile(
        rf"([+-]?)\s*{_CURRENCY}\s*([+-]?)(\d{{1,3}}(?:([{other}\s'\u2019])\d{{3}})(?:\4\d{{3}})*|\d*)"
        rf"(?:[{mark}](\d*))?(e[+-]?\d+)?\s*({_CURRENCY}|%)",
        re.IGNORECASE,
    )
    for mark, other in ((".", ","), (",", "."))
}
LARGEST = 1e100  # Squares of larger numbers overflow.
MOST_CATEGORIES = 50  # One-hot columns of a category: its most frequent values.
_REMEDY = "correct them, or name the columns with --categories or --drop"
NO_TEXT = "\0"  # In no cell of a table.
# Layers of a saved model have unique names, and each column is an input layer.
_LAYERS = {"encoder", "stack", "argmax", "class_names", "dense_classifier", "dense_regression", "linear_regression"}


@dataclasses.dataclass(frozen=True)
class TableConfig(SharedConfig):
    """The flags of recipes that train on tables."""

    target: str = "target"  # the column to predict, with --data FILE
    drop: str = ""  # columns to leave out, separated by commas
    categories: str = ""  # columns to treat as categories; the target, if its numbers are classes
    numbers: str = ""  # columns to treat as numbers, even if they look like the number of the row
    group: str = ""  # rows with equal values in this column are in one split, such as a patient; not an input


class Table(NamedTuple):
    """A file that was read: columns by name, with the types that Arrow infers, and the mark before decimals."""

    path: pathlib.Path
    columns: dict[str, pa.ChunkedArray]
    mark: str = "."

    def where(self, row: int) -> str:
        """Names a row as a person counts: the line of column names in a CSV is row 1."""
        return f"row {row + (1 if self.path.suffix.lower() == '.parquet' else 2)}"


def read_table(path: pathlib.Path, texts: Iterable[str] = (), all_texts: bool = False) -> Table:
    """Reads a CSV with any delimiter, or a Parquet file. Spaces around column names are removed, and / becomes |.

    Columns in `texts` stay texts, even if they contain numbers; with `all_texts`, all columns do.

    Raises:
        UserError: the file can't be read, rows have different lengths, or two columns have one name.
    """
    try:
        if path.suffix.lower() == ".parquet":
            table, mark = pyarrow.parquet.read_table(path), "."
            names = [name for name in table.column_names if not name.startswith("__index_level_")]
            table = table.select(names)
        else:
            table, mark = _read_csv(path, set(texts), all_texts)
    except UnicodeError as error:
        raise UserError(f"{path}: not readable as a table ({error}); save it as CSV in UTF-8") from error
    except (OSError, pa.ArrowException) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{path}: not readable as a table ({reason}); save it as CSV or Parquet") from error
    columns = {}
    for number, (name, column) in enumerate(zip(table.column_names, table.columns, strict=True), start=1):
        name = name.strip().replace("/", "|") or f"column {number}"  # Keras does not allow / in names.
        if name in columns:
            raise UserError(f"{path}: there are two columns {name!r}; rename or remove one")
        if name in _LAYERS and not all_texts:
            raise UserError(f"{path}: the model has a part called {name!r}; rename this column")
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        if pa.types.is_nested(column.type):
            raise UserError(f"{path}: column {name!r} holds lists; remove it")
        keep = all_texts or name in texts
        columns[name] = column.cast(pa.string()) if keep or pa.types.is_binary(column.type) else column
    if not table.num_rows:
        raise UserError(f"{path}: no rows below the column names; add some")
    return Table(path, columns, mark)


def _read_csv(path: pathlib.Path, texts: set[str], all_texts: bool) -> tuple[pa.Table, str]:
    with pa.input_stream(str(path)) as file:  # Also decompresses .gz.
        start = file.read(2**16)
    if b"\0" in start and start[:2] not in (b"\xff\xfe", b"\xfe\xff"):
        raise UserError(f"{path}: not a text file; save it as CSV in UTF-8, or as Parquet with the suffix .parquet")
    encodings = ["utf-16"] if start[:2] in (b"\xff\xfe", b"\xfe\xff") else ["utf8", "cp1252", "latin-1"]
    rows, delimiter = _sample(start.decode(encodings[0], errors="replace").removeprefix("\ufeff"))
    mark = _decimal_mark(rows[1:], delimiter)

    def options(encoding: str, handler: Callable | None, types: dict[str, pa.DataType]) -> tuple:
        block_size = 2**26 if all_texts else 2**22  # A cell must fit into a block.
        return (
            pyarrow.csv.ReadOptions(encoding=encoding, use_threads=handler is None, block_size=block_size),
            pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True, invalid_row_handler=handler),
            pyarrow.csv.ConvertOptions(
                column_types=dict.fromkeys(rows[0] if all_texts else texts, pa.string()) | types,
                null_values=_NULLS,
                strings_can_be_null=False,
                decimal_point=mark,
            ),
        )

    def read(encoding: str, handler: Callable | None = None) -> pa.Table:
        # Where Arrow infers a type, it keeps the text of the whole column. So numbers are inferred from the first rows.
        with pyarrow.csv.open_csv(path, *options(encoding, handler, {})) as reader:
            numbers = [field.name for field in reader.schema if field.type in (pa.int64(), pa.float64())]
        try:
            return pyarrow.csv.read_csv(path, *options(encoding, handler, dict.fromkeys(numbers, pa.float64())))
        except pa.ArrowInvalid as error:
            if "conversion error" not in str(error):
                raise
        return pyarrow.csv.read_csv(path, *options(encoding, handler, {}))

    wrong = {}

    def collect(row: Any) -> str:
        wrong[row.number] = f"row {row.number} has {row.actual_columns}"
        return "skip"

    for encoding in encodings:
        try:
            table = read(encoding)
            _ = table.column_names  # Decodes them.
            if encoding == "utf8" and any(pa.types.is_binary(field.type) for field in table.schema):
                continue
        except (pa.ArrowInvalid, UnicodeError) as error:
            if isinstance(error, UnicodeError) or "UTF8" in str(error):
                continue
            if "Expected" in str(error):
                width = read("latin-1", collect).num_columns
                problem = f"the first line has {width} values, and {some(wrong.values())}"
                remedy = f"correct them, or put values with {delimiter!r} into quotes"
                raise UserError(f"{path}: {problem}; {remedy}") from error
            raise
        if encoding in ("cp1252", "latin-1"):
            warn(f"{path}: not UTF-8; read as {'Windows-1252' if encoding == 'cp1252' else 'Latin-1'}")
        return table, mark
    raise UserError(f"{path}: not readable as text; save it as CSV in UTF-8")


def _sample(text: str) -> tuple[list[list[str]], str]:
    """Returns the first rows, and the delimiter that gives most of them the length of the header."""
    best = (False, 0.0, 0), [[""]], ","
    for delimiter in ",;\t|":
        try:
            rows = [row for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter) if row]
        except csv.Error:
            continue
        rows = rows[:-1] if len(rows) > 2 and len(text) > 2**15 else rows  # The last one may be cut off.
        if rows:
            width = len(rows[0])
            score = width > 1, float(np.mean([len(row) == width for row in rows])), width
            best = max(best, (score, rows, delimiter), key=lambda each: each[0])
    return best[1], best[2]


def _decimal_mark(rows: list[list[str]], delimiter: str) -> str:
    cells = [cell.strip() for row in rows for cell in row]

    def count(mark: str) -> int:
        thousands = re.compile(rf"[+-]?\d{{1,3}}([{mark}]\d{{3}})+")
        decimal = re.compile(rf"[+-]?\d*[{mark}]\d+([eE][+-]?\d+)?")
        return sum(bool(decimal.fullmatch(cell)) and not thousands.fullmatch(cell) for cell in cells)

    points, commas = count("."), count(",")
    return "," if commas > points or (commas == points and delimiter == ";") else "."


def read_csv(path: pathlib.Path, columns: Sequence[str], remedy: str = "rename one") -> pd.DataFrame:
    """Reads a CSV with all values as strings. If one of `columns` is missing, the error message includes `remedy`."""
    table = read_table(path, all_texts=True)
    require(path, table.columns, columns, remedy)
    return pd.DataFrame({name: column.to_pandas() for name, column in table.columns.items()})


def require(path: pathlib.Path, found: Iterable[str], columns: Iterable[str], remedy: str) -> None:
    """Raises a `UserError` that names all `columns` that a file lacks."""
    if missing := [name for name in columns if name not in (found := list(found))]:
        raise UserError(f"{path}: no column {listed(missing)} among {listed(found, 20)}; {remedy}")


class _Distinct(NamedTuple):
    """A column of strings: the distinct strings without spaces around them, and their index in each row."""

    values: list[str]
    codes: np.ndarray

    @classmethod
    def of(cls, column: pa.ChunkedArray) -> "_Distinct":
        encoded = column.cast(pa.string()).combine_chunks().dictionary_encode()
        encoded = encoded.combine_chunks() if isinstance(encoded, pa.ChunkedArray) else encoded
        values = [value.strip() for value in encoded.dictionary.to_pylist()] + [""]
        return cls(values, encoded.indices.fill_null(len(values) - 1).to_numpy(zero_copy_only=False))


def _is_text(column: pa.ChunkedArray) -> bool:
    return pa.types.is_string(column.type) or pa.types.is_large_string(column.type)


def _number(text: str, mark: str) -> float:
    """Returns the number that a string stands for, NaN if it stands for none."""
    found = _NUMBERS[mark].fullmatch(text.replace("\N{MINUS SIGN}", "-"))
    if not found:
        return np.nan
    sign, second, whole, _, fraction, exponent, unit = found.groups()
    digits = re.sub(r"\D", "", whole)
    if not digits + (fraction or "") or (sign and second):
        return np.nan
    return float(f"{sign}{second}{digits or 0}.{fraction or 0}{exponent or ''}") / (100 if unit == "%" else 1)


def _seconds(values: pd.Series | pd.DatetimeIndex) -> np.ndarray:
    """Seconds since 1970, float64; NaN for dates that are missing."""
    dates = pd.DatetimeIndex(values)
    dates = (dates.tz_convert(None) if dates.tz else dates).as_unit("us")
    return np.where(dates.isna(), np.nan, dates.asi8 / 1e6)


def _parsed(texts: list[str], kind: str, mark: str) -> np.ndarray:
    """Returns strings as float64 of a kind; NaN for those that do not fit, and for missing ones."""
    if kind == "number":
        return np.array([_number(text, mark) for text in texts], np.float64)
    if kind == "boolean":
        return np.array([_BOOLEANS.get(text.casefold(), np.nan) for text in texts], np.float64)
    dates = pd.to_datetime(pd.Series(texts, dtype=object), errors="coerce", format=kind.removeprefix("date "), utc=True)
    return _seconds(dates)


def column_values(table: Table, name: str, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the values of a column and the rows that do not fit its kind.

    Values are float64 [n], with NaN for missing ones, or for a category UTF-8 strings [n], empty for missing ones.
    """
    column = table.columns[name]
    if kind == "category" or _is_text(column):
        distinct = _Distinct.of(column)
        absent = np.array([value.casefold() in MISSING for value in distinct.values])
        if kind == "category":
            encoded = [b"" if none else value.encode() for value, none in zip(distinct.values, absent, strict=True)]
            return np.array([*encoded, None], object)[:-1][distinct.codes], np.empty(0, int)
        texts = [text for text, none in zip(distinct.values, absent, strict=True) if not none]
        of_distinct = np.full(len(absent), np.nan)
        of_distinct[~absent] = _parsed(texts, kind, table.mark)
        values, absent = of_distinct[distinct.codes], absent[distinct.codes]
    else:
        absent = column.is_null().to_numpy()
        values = _as_float64(column)
        absent |= np.isnan(values)  # A number that is not a number, in Parquet.
        wrong_type = pa.types.is_temporal(column.type) != kind.startswith("date") and not absent.all()
        if wrong_type or (kind == "boolean" and not np.isin(values[~absent], (0, 1)).all()):
            return values, np.flatnonzero(~absent)
    return values, np.flatnonzero(~absent & ~(np.abs(values) < LARGEST))


def _as_float64(column: pa.ChunkedArray) -> np.ndarray:
    """Returns numbers, booleans, dates (seconds since 1970) and times (seconds) as float64; NaN if missing."""
    kind = column.type
    if pa.types.is_null(kind):
        return np.full(len(column), np.nan)
    if pa.types.is_date(kind) or pa.types.is_timestamp(kind):
        column = column.cast(pa.timestamp("us", getattr(kind, "tz", None)), safe=False).cast(pa.int64())
    elif pa.types.is_temporal(kind):  # A time of day or a duration.
        column = column.cast(pa.time64("us") if pa.types.is_time(kind) else pa.duration("us")).cast(pa.int64())
    values = column.cast(pa.float64(), safe=False).to_numpy()
    return values / 1e6 if pa.types.is_temporal(kind) else values


class Kind(NamedTuple):
    """What a column is: `number`, `boolean`, `date` with a format, or `category`; empty if it is left out. And why."""

    name: str
    note: str


def column_kind(table: Table, name: str, rows: np.ndarray, flags: "Flags") -> Kind:
    """Infers the kind of a column from the given rows, those of train."""
    column = table.columns[name]
    if name in flags.categories:
        return Kind("category", "")
    if not _is_text(column):
        values = _as_float64(column)
        kind = "date ISO8601" if pa.types.is_temporal(column.type) else "number"
        kind = "boolean" if pa.types.is_boolean(column.type) else kind
        return _unless_useless(Kind(kind, ""), values, rows, name in flags.numbers)
    distinct = _Distinct.of(column)
    codes, counts = np.unique(distinct.codes[rows], return_counts=True)
    known = [
        (distinct.values[code], count)
        for code, count in zip(codes.tolist(), counts.tolist(), strict=True)
        if distinct.values[code].casefold() not in MISSING
    ]
    texts, counts = [text for text, _ in known], np.array([count for _, count in known])
    if not texts:
        return Kind("", "empty")
    folded = {text.casefold() for text in texts}
    candidates = ["boolean"] if any(folded <= set(pair) for pair in _YES_NO) else []
    candidates = candidates or ["number", *(f"date {form}" for form in _formats(texts[:100]))]
    fits = {kind: ~np.isnan(_parsed(texts, kind, table.mark)) for kind in candidates}
    kind = max(fits, key=lambda each: fits[each].sum())
    of_values, of_rows = fits[kind].mean(), counts[fits[kind]].sum() / counts.sum()
    # A few cells that do not fit are mistakes, which the user should know of.
    if name in flags.numbers or fits[kind].all() or (max(of_values, of_rows) >= 0.9 and counts.sum() >= 20):
        kind = "number" if name in flags.numbers else kind
        if kind.startswith("date ") and sum(fit.all() for fit in fits.values()) > 1:
            return Kind("", "dates whose day and month can't be told apart")
        values, _ = column_values(table, name, kind)
        return _unless_useless(Kind(kind, ""), values, rows, name in flags.numbers)
    if len(texts) > max(20, counts.sum() / 2):
        return Kind("", f"{len(texts):,} different texts in {counts.sum():,} rows")
    gaps = counts.sum() < len(rows)
    return Kind("category", "") if len(texts) + gaps > 1 else Kind("", f"constant in train, {texts[0]!r}")


def _formats(texts: list[str]) -> list[str]:
    """Returns the formats of dates that fit most of the given strings."""
    if not any(re.search(r"\d", text) for text in texts):
        return []
    fits = {form: np.mean(~np.isnan(_parsed(texts, f"date {form}", "."))) for form in _DATES}
    return [form for form, share in fits.items() if share >= 0.9]


def _unless_useless(kind: Kind, values: np.ndarray, rows: np.ndarray, wanted: bool) -> Kind:
    """Leaves out columns of numbers that are empty or constant in `rows`, or only number the rows."""
    of_train = values[rows]
    known = of_train[~np.isnan(of_train)]
    if not len(known):
        return Kind("", "empty")
    if len(known) == len(rows) and known.min() == known.max():
        return Kind("", f"constant in train, {known[0]:g}")
    if kind.name == "number" and not wanted and len(known) == len(rows) >= 10 and (np.trunc(known) == known).all():
        distinct = len(np.unique(known))
        if (of_train - rows == of_train[0] - rows[0]).all() or (
            distinct == len(rows) and np.ptp(known) < 1.3 * len(values)
        ):
            return Kind("", "numbers the rows; to keep it, give --numbers")
    return kind


class Flags(NamedTuple):
    """The names of columns in the flags of a `TableConfig`."""

    drop: list[str]
    categories: list[str]
    numbers: list[str]

    @classmethod
    def of(cls, config: TableConfig) -> "Flags":
        """Splits the flags at commas; names with commas are in double quotes."""
        rows = (next(csv.reader([getattr(config, field)]), []) for field in cls._fields)
        return cls(*([name.strip().replace("/", "|") for name in row] for row in rows))


class UserTable:
    """The user's rows, before and after they are split: `targets`, `groups`, and `inputs` once train is known."""

    def __init__(self, path: pathlib.Path, config: TableConfig, classes: bool):
        self.flags, self.config, self.classes = Flags.of(config), config, classes
        texts = [*self.flags.categories, *([config.target] if classes else [])]
        paths = {"train": path} | ({"test": pathlib.Path(config.test_data)} if config.test_data else {})
        self.tables = {split: read_table(of, texts) for split, of in paths.items()}
        self.targets = {}
        for split, table in self.tables.items():
            if split == "train":
                require(table.path, table.columns, [config.target], "name another with --target")
                for flag, names in (*self.flags._asdict().items(), ("group", [config.group][: bool(config.group)])):
                    require(table.path, table.columns, names, f"correct --{flag}")
                    if config.target in names and flag != "categories":
                        raise UserError(f"--{flag} {config.target}: is the column to predict; name another --target")
                wanted = [name for name in table.columns if name not in (*self.flags.drop, config.group)]
            require(table.path, table.columns, wanted, "name the columns as in --data")
            for name in table.columns.keys() - {*wanted, config.group}:
                del table.columns[name]
            self.targets[split] = self._target(table)
        train = self.tables["train"]
        if self.targets.keys() and not train.columns.keys() - {config.group}:
            raise UserError(f"{path}: {config.target!r} is the only column; add input columns")
        if config.group:
            self.groups = _digest({"": train.columns.pop(config.group)})
            self.tables.get("test", train).columns.pop(config.group, None)
        else:
            self.groups = _digest(train.columns)

    def _target(self, table: Table) -> np.ndarray:
        """Removes the column to predict from a table and returns it: class names, or float64."""
        name, column = self.config.target, table.columns[self.config.target]
        if not self.classes and _is_text(column):
            texts = [text for text in _Distinct.of(column).values if text.casefold() not in MISSING]
            if texts and np.isnan(_parsed(texts, "number", table.mark)).mean() > 0.5:
                problem = f"{table.path}: column {name!r} holds texts ({listed(texts, 3)})"
                raise UserError(f"{problem}, and this recipe predicts numbers; train dense_classifier")
        values = target_values(table, name, self.classes, _REMEDY)
        if self.classes and name not in self.flags.categories:
            classes = np.unique(values).tolist()
            if len(classes) > max(50, len(values) / 10) and not np.isnan(_parsed(classes, "number", table.mark)).any():
                problem = f"column {name!r} holds {len(classes):,} different numbers in {len(values):,} rows"
                remedy = f"train dense_regression to predict numbers; if they are classes, give --categories {name}"
                raise UserError(f"{table.path}: {problem}; {remedy}")
        del table.columns[name]
        return values

    def inputs(self, rows: np.ndarray) -> tuple[dict[str, dict[str, tf.Tensor]], dict[str, str]]:
        """Converts the columns of each split's table, whose memory it frees; also returns their kinds.

        Args:
            rows: the rows of train, from which the kinds are inferred.
        """
        train = self.tables["train"]
        kinds = {name: column_kind(train, name, rows, self.flags) for name in train.columns}
        used = {name: kind.name for name, kind in kinds.items() if kind.name}
        found = {split: {} for split in self.tables}
        for split, table in self.tables.items():
            wrong = {}
            for name in [*table.columns]:
                if name not in used:
                    del table.columns[name]
                    continue
                values, places = column_values(table, name, used[name])
                if len(places):
                    wrong[name] = used[name], places
                    continue
                del table.columns[name]
                pa.default_memory_pool().release_unused()
                if split == "train":
                    kinds[name] = Kind(used[name], _note(used[name], values, rows))
                with tf.device("CPU:0"):
                    found[split][name] = tf.convert_to_tensor(values)
            refuse(table, wrong, _REMEDY)
        if not self.config.quiet:
            show_kinds(kinds)
        if not used:
            left = "; ".join(f"{name}: {kind.note}" for name, kind in [*kinds.items()][:10])
            raise UserError(f"{train.path}: no columns to learn from ({left}); add some")
        return found, used


def refuse(table: Table, wrong: dict[str, tuple[str, np.ndarray]], remedy: str) -> None:
    """Raises a `UserError` for the rows of each column that do not fit its kind, if there are any."""
    problems = []
    for name, (kind, rows) in wrong.items():
        if len(rows):
            expected = {"number": "numbers", "boolean": "yes or no"}.get(kind, "dates")
            cells = table.columns[name].take(pa.array(rows[:3]))
            shown = ", ".join(
                f"{str(cell)[:30]!r} in {table.where(row)}" for cell, row in zip(cells.to_pylist(), rows, strict=False)
            )
            count = f"{len(rows):,} of {len(table.columns[name]):,} cells are not {expected}"
            problems.append(f"column {name!r}: {count} ({shown}{', …' * (len(rows) > 3)})")
    if problems:
        more = f"; and {len(problems) - 10} more columns" if len(problems) > 10 else ""
        raise UserError(f"{table.path}: {'; '.join(problems[:10])}{more}; {remedy}")


def _digest(columns: dict[str, pa.ChunkedArray]) -> np.ndarray:
    """Returns a 64-bit number per row; rows with equal values have equal numbers. Numbers of rows do not count."""
    digests: Any = np.uint64(0)
    for column in columns.values():
        if _is_text(column):
            distinct = _Distinct.of(column)
            numbers = pd.util.hash_array(np.array([*distinct.values, None], object)[:-1])[distinct.codes]
        else:
            values = _as_float64(column)
            if len(values) > 1 and (np.diff(values) == 1).all():
                continue
            numbers = pd.util.hash_array(values)
        digests = digests * np.uint64(1_000_003) + numbers
    return digests if np.ndim(digests) else np.arange(len(next(iter(columns.values()))))


def _note(kind: str, values: np.ndarray, rows: np.ndarray) -> str:
    if kind == "category":
        found = pd.Series(values[rows]).value_counts()
        count, missing = len(found) - (b"" in found.index), int(np.sum(values == b""))
        most = f", {MOST_CATEGORIES} of them kept" if len(found) > MOST_CATEGORIES else ""
        return f"{count:,} values{most}" + (f", {missing:,} missing" if missing else "")
    missing = int(np.isnan(values).sum())
    return f"{missing:,} missing" if missing else ""


def show_kinds(kinds: dict[str, Kind], most: int = 20) -> None:
    """Prints a table of the first columns, their kinds and why some are left out; then how many more of each kind."""
    lines = {}
    for name, kind in kinds.items():
        parts = (kind.name.partition(" ")[0], kind.note) if kind.name else (f"left out: {kind.note}",)
        lines[name] = ", ".join(part for part in parts if part)
    # Those left out are worth knowing.
    order = sorted(lines, key=lambda name: bool(kinds[name].name)) if len(lines) > most else [*lines]
    say("columns:")
    for name in order[:most]:
        say(f"  {name:<24} {lines[name]}")
    rest = pd.Series([kinds[name].name.partition(" ")[0] or "left out" for name in order[most:]], dtype=object)
    if len(rest):
        counts = ", ".join(f"{count:,} {kind}" for kind, count in rest.value_counts().items())
        say(f"  and {len(rest):,} more: {counts}")


def read_inputs(path: pathlib.Path, kinds: dict[str, str]) -> tuple[dict[str, np.ndarray], list[str]]:
    """Reads the columns that a model takes from a file: see `column_values`. Also returns the names of the rows.

    Other columns are ignored.

    Args:
        path: a CSV or Parquet file.
        kinds: the kind of each column of the model, as `Data.columns` has them.
    """
    table = read_table(path, [name for name, kind in kinds.items() if kind == "category"])
    require(path, table.columns, kinds, "the model takes them; rename or add columns")
    found = {name: column_values(table, name, kind) for name, kind in kinds.items()}
    refuse(table, {name: (kinds[name], wrong) for name, (_, wrong) in found.items()}, "correct them")
    count = len(next(iter(found.values()))[0])
    return {name: values for name, (values, _) in found.items()}, [table.where(row) for row in range(count)]


def read_target(path: pathlib.Path, target: str, classes: bool) -> np.ndarray:
    """Reads the column to predict from a file; see `target_values`."""
    table = read_table(path, [target] if classes else [])
    require(path, table.columns, [target], "the model predicts it; add it")
    return target_values(table, target, classes, "correct them")


def target_values(table: Table, name: str, classes: bool, remedy: str) -> np.ndarray:
    """Returns the column to predict: class names, or float64, [n].

    Raises a `UserError` for empty cells, and for those that are not numbers, with `remedy`.
    """
    if classes:
        distinct = _Distinct.of(table.columns[name])
        values = np.array(distinct.values)[distinct.codes]
        absent = np.array([value.casefold() in _EMPTY for value in distinct.values])[distinct.codes]
    else:
        values, wrong = column_values(table, name, "number")
        refuse(table, {name: ("number", wrong)}, remedy)
        absent = np.isnan(values)
    if absent.any():
        rows = some(map(table.where, np.flatnonzero(absent).tolist()))
        raise UserError(f"{table.path}: column {name!r} is empty in {rows}; fill it or remove the rows")
    return values


class Features(NamedTuple):
    """How rows become features: `numbers` with mean and deviation, `gaps`, and `categories` with their values."""

    numbers: dict[str, tuple[float, float]]
    gaps: list[str]
    categories: dict[str, list[str]]

    @property
    def names(self) -> list[str]:
        """The name of each feature, in the order of the encoder's output."""
        values = (f"{name}={value}" for name, values in self.categories.items() for value in values)
        return [*self.numbers, *(f"{name} is missing" for name in self.gaps), *values]

    @property
    def scales(self) -> np.ndarray:
        """Mean and deviation of each feature, float64 [features, 2]: (feature - mean) / deviation is its output."""
        scales = [*self.numbers.values()] + [(0.0, 1.0)] * (len(self.names) - len(self.numbers))
        return np.array(scales, np.float64).reshape(-1, 2)


def fit_features(data: Any) -> Features:
    """Computes means, deviations and the most frequent categories from the training rows, in float64."""
    numbers, gaps, categories = {}, [], {}
    for name in sorted(data.columns):
        values = np.asarray(data.train.stored_inputs[name])
        values = values if data.train.rows is None else values[data.train.rows]
        if data.columns[name] == "category":
            most = pd.Series(values).value_counts().index[:MOST_CATEGORIES]  # By their number.
            # The missing value is last: Keras drops an empty string that is first in a vocabulary.
            categories[name] = [value.decode() for value in sorted(most, key=lambda value: value == b"")]
            continue
        known = values[~np.isnan(values)]
        mean, deviation = (float(known.mean()), float(known.std())) if len(known) else (0.0, 0.0)
        # Rounding gives a constant column a tiny deviation.
        numbers[name] = mean, deviation if deviation > 1e-14 * abs(mean) else 1.0
        if len(known) < len(values):
            gaps.append(name)
        # Without the last digits, which may be noise.
        sample = np.unique(np.char.mod("%.12g", known[:1000]).astype(np.float64))
        remain = len(np.unique(((sample - mean) / numbers[name][1]).astype(np.float32)))
        if remain < 0.9 * len(sample):
            warn(f"column {name!r}: only {remain:,} of {len(sample):,} numbers stay different in float32")
    return Features(numbers, gaps, categories)


def build_encoder(features: Features) -> keras.Model:
    """Maps raw columns by name, float64 or string [n], to float32 [n, features].

    Numbers are shifted and scaled in float64; missing ones become the mean, and columns with missing numbers in train
    get an indicator. Categories become one-hot; values that are rare or unseen in train are all zeros.
    """
    kinds = dict.fromkeys(features.numbers, "float64") | dict.fromkeys(features.categories, "string")
    inputs = {name: keras.Input([], dtype=kind, name=name) for name, kind in kinds.items()}
    categories = [keras.Input([], dtype="string") for _ in features.categories]
    columns, parts = [inputs[name] for name in features.categories], []
    if features.numbers:
        columns = [keras.ops.stack([inputs[name] for name in features.numbers], axis=1), *columns]
        raw = keras.Input([len(features.numbers)], dtype="float64", name="numbers")
        mean, deviation = np.array([*features.numbers.values()]).T
        missing = keras.ops.isnan(raw)
        parts.append(keras.ops.cast(keras.ops.where(missing, 0.0, (raw - mean) / deviation), "float32"))
        if features.gaps:
            places = [[*features.numbers].index(name) for name in features.gaps]
            parts.append(keras.ops.cast(keras.ops.take(missing, places, axis=1), "float32"))
    for column, values in zip(categories, features.categories.values(), strict=True):
        # By default, "[UNK]" could not be a category.
        lookup = keras.layers.StringLookup(vocabulary=values, oov_token=NO_TEXT, output_mode="one_hot")
        parts.append(lookup(column)[:, 1:])
    matrix = keras.ops.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]
    # A model of its own, because a column may have the name of a layer.
    encoder = keras.Model([raw, *categories] if features.numbers else categories, matrix, name="encoder")
    return keras.Model(inputs, encoder(columns))


def encoded(split: Split, encoder: keras.Model, mean: float = 0.0, deviation: float = 1.0) -> Split:
    """Encodes the rows of a split once, before training: float32 [n, features].

    With `mean` and `deviation`, targets become (target - mean) / deviation in float32; else they stay as they are.
    """
    matrix = np.empty((len(split), *encoder.output_shape[1:]), np.float32)
    for start in range(0, len(split), 10_000):
        rows = slice(start, start + 10_000)
        # Not in a dataset: its graph would have an operation per column, and take seconds to build.
        inputs, _ = split.arrays(rows)
        with tf.device("CPU:0"):
            matrix[rows] = encoder(tf.nest.map_structure(tf.constant, inputs))
    targets = np.asarray(split.targets)
    if (mean, deviation) != (0.0, 1.0):
        targets = ((targets - mean) / deviation).astype(np.float32)
    return Split.from_arrays(matrix, targets)


def target_scale(data: Any) -> tuple[float, float]:
    """Returns mean and deviation of the training targets; the deviation is 1 if they are constant."""
    targets = np.asarray(data.train.targets)
    mean, deviation = float(targets.mean()), float(targets.std())
    return mean, deviation if deviation > 1e-14 * abs(mean) else 1.0


def in_units(network: keras.Model, mean: float, deviation: float) -> keras.Model:
    """Appends layers that convert standardized outputs to `output * deviation + mean`, in float64."""
    # Keras passes constants through float32; their sum has all digits of the mean.
    rounded = float(np.float32(mean))
    x = keras.layers.Rescaling(deviation, rounded, dtype="float64", name="units")(network.output)
    x = keras.layers.Rescaling(1.0, mean - rounded, dtype="float64", name="offset")(x)
    return keras.Model(network.input, x, name=network.name)
