"""Rows: from files or a Hugging Face data set to texts and labels. Knows nothing of tokens."""

import csv
import hashlib
import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from localization.config import DataConfig
from localization.errors import DataError
from model_store.manifest import TextInput


@dataclass(frozen=True)
class Rows:
    """Texts (or pairs) with their class names."""

    inputs: tuple[TextInput, ...]
    labels: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.inputs)

    def sample(self, count: int | None, seed: int) -> "Rows":
        """A random sample of `count` rows in random order; None: all, shuffled."""
        order = list(range(len(self)))
        random.Random(seed).shuffle(order)  # noqa: S311 - not for secrets
        return self.take(order[:count])

    def take(self, order: Sequence[int]) -> "Rows":
        """The rows at these indices."""
        inputs = tuple(self.inputs[index] for index in order)
        return Rows(inputs, tuple(self.labels[index] for index in order))


@dataclass(frozen=True)
class Dataset:
    """A task's rows: class names in sorted order, and three splits; `test` may be empty."""

    labels: tuple[str, ...]
    train: Rows
    validation: Rows
    test: Rows
    sha256: dict[str, str]
    """Digest of each source as read, before sampling."""


def load_dataset(config: DataConfig, root: Path, seed: int) -> Dataset:
    """Read, sample and split. Raises `DataError` that names the file and the row."""
    everything = load_rows(config.train, config, root, split="train")
    digests = {"train": _digest(everything)}
    test = Rows((), ())
    if config.test is not None:
        test = load_rows(config.test, config, root, split="test")
        digests["test"] = _digest(test)
    labels = tuple(sorted(set(everything.labels)))
    if len(labels) < 2:
        raise DataError(f"{config.train}: one class only ({labels[0]!r}); two are needed")
    unknown = sorted(set(test.labels) - set(labels))
    if unknown:
        raise DataError(f"{config.test}: label {unknown[0]!r} does not occur in {config.train}")
    sampled = everything.sample(config.max_train_rows, seed)
    count = max(1, round(len(sampled) * config.validation_share))
    if len(sampled) <= count or len(sampled) < 2 * len(labels):
        raise DataError(
            f"{config.train}: {len(sampled)} rows are too few for {len(labels)} classes; "
            f"give at least {2 * len(labels)}"
        )
    train, validation = _split(sampled, count)
    return Dataset(labels, train, validation, test, digests)


def load_rows(source: str, config: DataConfig, root: Path, split: str) -> Rows:
    """Rows of a file below `root`, or of a Hugging Face data set's split (`id` or `id:config`)."""
    path = root / source
    kind = path.suffix.lower()
    if kind in _READERS:
        if not path.is_file():
            raise DataError(f"{path}: no such file")
        return _rows(_records(path, kind), config, str(path))
    if path.is_file() or not _HUB_ID.fullmatch(source):
        raise DataError(f"{path}: unknown kind of file; {', '.join(_READERS)} are read")
    return _rows(_hub_records(source, root, split), config, source)


def _records(path: Path, kind: str) -> Iterable[Mapping[str, Any]]:
    try:
        yield from _READERS[kind](path)
    except ImportError:
        raise DataError(f"{path}: Parquet needs pyarrow: pip install 'taskbone[data]'") from None
    except (ValueError, RecursionError, csv.Error, OSError) as error:
        # pyarrow's errors are ValueErrors, and so are those of JSON and UTF-8.
        raise DataError(f"{path}: cannot be read: {error}") from None


def _json_lines(path: Path) -> Iterable[Mapping[str, Any]]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path}:{number}: not JSON: {error}") from None
            if not isinstance(record, dict):
                raise DataError(f"{path}:{number}: a JSON object a line is expected")
            yield record


def _separated(path: Path, delimiter: str) -> Iterable[Mapping[str, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines, delimiter=delimiter, strict=True)
        names = list(reader.fieldnames or ())
        if len(set(names)) != len(names):
            raise DataError(f"{path}: a column name stands twice in {names}")
        for record in reader:
            if None in record or None in record.values():
                raise DataError(
                    f"{path}:{reader.line_num}: not {len(names)} columns; "
                    f"a text that holds {delimiter!r} must be quoted"
                )
            yield record


def _parquet(path: Path) -> Iterable[Mapping[str, Any]]:
    import pyarrow.parquet

    yield from pyarrow.parquet.read_table(path).to_pylist()


_READERS: dict[str, Callable[[Path], Iterable[Mapping[str, Any]]]] = {
    ".jsonl": _json_lines,
    ".csv": lambda path: _separated(path, ","),
    ".tsv": lambda path: _separated(path, "\t"),
    ".parquet": _parquet,
}
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")


def _hub_records(source: str, root: Path, split: str) -> Iterable[Mapping[str, Any]]:
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"{source!r} is no file below {root}; a Hugging Face data set needs the package "
            "datasets: pip install 'taskbone[data]'"
        ) from None
    name, _, subset = source.partition(":")
    local = root / name
    try:
        loaded = datasets.load_dataset(
            str(local) if local.is_dir() else name, subset or None, split=split
        )
    except Exception as error:  # noqa: BLE001 - datasets raises many kinds, all the user's to mend
        raise DataError(f"{source!r}, split {split!r}: {str(error).splitlines()[0]}") from None
    # Class numbers are turned into the names that the data set declares.
    named = {
        column: feature
        for column, feature in loaded.features.items()
        if isinstance(feature, datasets.ClassLabel)
    }
    for record in loaded:
        # The hub marks a row without label by the number -1.
        yield record | {
            column: feature.int2str(record[column]) if record[column] >= 0 else None
            for column, feature in named.items()
        }


def _rows(records: Iterable[Mapping[str, Any]], config: DataConfig, name: str) -> Rows:
    columns = (config.text,) if isinstance(config.text, str) else config.text
    inputs: list[TextInput] = []
    labels: list[str] = []
    for number, record in enumerate(records, 1):
        for column in (*columns, config.label):
            value = record.get(column)
            if value is None or (column == config.label and (value == "" or value != value)):
                raise DataError(
                    f"{name}: row {number} has no {column!r}; "
                    f"its columns are {sorted(map(str, record))}"
                )
        texts = [record[column] for column in columns]
        if not all(isinstance(text, str) for text in texts):
            raise DataError(f"{name}: row {number}: a text is expected in {columns}")
        if not all(_is_unicode(text) for text in (*texts, str(record[config.label]))):
            raise DataError(f"{name}: row {number}: half of a surrogate pair is no text")
        inputs.append(texts[0] if len(texts) == 1 else (texts[0], texts[1]))
        labels.append(str(record[config.label]))
    if not inputs:
        raise DataError(f"{name}: no rows")
    return Rows(tuple(inputs), tuple(labels))


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def _split(rows: Rows, count: int) -> tuple[Rows, Rows]:
    """Training and validation rows; a class's only row stays in training."""
    left = Counter(rows.labels)
    validation: list[int] = []
    train: list[int] = []
    for index, label in enumerate(rows.labels):
        if len(validation) < count and left[label] > 1:
            validation.append(index)
            left[label] -= 1
        else:
            train.append(index)
    return rows.take(train), rows.take(validation)


def _digest(rows: Rows) -> str:
    text = json.dumps([rows.inputs, rows.labels], ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()
