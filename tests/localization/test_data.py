"""Rows from every kind of file, and the errors that name file and row."""

import csv
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from localization.config import DataConfig
from localization.data import Rows, _split, load_dataset, load_rows
from localization.errors import DataError

RECORDS = [
    {"sentence": "a good film", "other": "one, two", "label": "good"},
    {"sentence": 'a "bad" film', "other": "ü", "label": "bad"},
    {"sentence": "a good dog", "other": "x", "label": "good"},
    {"sentence": "a bad dog", "other": "y", "label": "bad"},
    {"sentence": "a good cat", "other": "z", "label": "good"},
]
CONFIG = DataConfig(train="rows", text="sentence")


def _write(folder: Path, suffix: str) -> Path:
    path = folder / f"rows{suffix}"
    if suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(record) for record in RECORDS) + "\n\n")
    elif suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS), path)
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(
                file, ["sentence", "other", "label"], delimiter="\t" if suffix == ".tsv" else ","
            )
            writer.writeheader()
            writer.writerows(RECORDS)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".tsv", ".parquet"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, suffix: str) -> None:
    _write(tmp_path, suffix)
    rows = load_rows(f"rows{suffix}", CONFIG, tmp_path, "train")
    assert rows.inputs == tuple(record["sentence"] for record in RECORDS)
    assert rows.labels == tuple(record["label"] for record in RECORDS)


def test_a_byte_order_mark_is_no_column(tmp_path: Path) -> None:
    (tmp_path / "rows.CSV").write_text("\ufeffsentence,label\na,x\n", encoding="utf-8")
    assert load_rows("rows.CSV", CONFIG, tmp_path, "train").inputs == ("a",)


def test_two_columns_give_pairs(tmp_path: Path) -> None:
    _write(tmp_path, ".csv")
    config = DataConfig(train="rows.csv", text=("sentence", "other"))
    rows = load_rows("rows.csv", config, tmp_path, "train")
    assert rows.inputs[0] == ("a good film", "one, two")


def test_a_hugging_face_data_set_is_read_by_its_id(tmp_path: Path) -> None:
    """A folder in the hub's layout stands for a data set of the hub: one library reads both."""
    folder = tmp_path / "org" / "films"
    folder.mkdir(parents=True)
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, RECORDS)))
    rows = load_rows("org/films", CONFIG, tmp_path, "test")
    assert rows.labels == tuple(record["label"] for record in RECORDS)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.jsonl", None, "no such file"),
        ("rows.xlsx", "x", "unknown kind of file"),
        ("rows.jsonl", '{"sentence": "a"\n', "not JSON"),
        ("rows.jsonl", "[1]\n", "rows.jsonl:1"),
        ("rows.jsonl", '{"sentence": "a"}\n', "row 1 has no 'label'"),
        ("rows.jsonl", '{"sentence": 3, "label": "x"}\n', "a text is expected"),
        ("rows.jsonl", "\n", "no rows"),
        ("rows.jsonl", "[" * 100_000, "rows.jsonl:1: not JSON"),
        ("rows.jsonl", '{"sentence": "\\ud83d", "label": "x"}\n', "surrogate"),
        ("rows.jsonl", '{"sentence": "a", "label": NaN}\n', "row 1 has no 'label'"),
        ("rows.csv", "sentence,label\nhello, world,pos\n", "rows.csv:2: not 2 columns"),
        ("rows.csv", "sentence,label\nhello,\n", "row 1 has no 'label'"),
        ("rows.csv", "sentence,label,label\na,b,c\n", "stands twice"),
        ("rows.parquet", "no parquet", "cannot be read"),
    ],
)
def test_what_is_wrong_is_named(
    tmp_path: Path, name: str, content: str | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        load_rows(name, CONFIG, tmp_path, "train")


def test_an_unknown_label_in_the_test_rows_is_refused(tmp_path: Path) -> None:
    _write(tmp_path, ".jsonl")
    (tmp_path / "test.jsonl").write_text('{"sentence": "a", "label": "odd"}\n')
    config = DataConfig(train="rows.jsonl", test="test.jsonl", text="sentence")
    with pytest.raises(DataError, match="'odd' does not occur"):
        load_dataset(config, tmp_path, seed=0)


def test_too_few_rows_are_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, RECORDS[:2])))
    with pytest.raises(DataError, match="too few"):
        load_dataset(DataConfig(train="rows.jsonl", text="sentence"), tmp_path, seed=0)


@given(st.lists(st.sampled_from("abc"), min_size=6, max_size=50), st.integers(1, 20))
def test_validation_rows_never_take_a_classs_last_row(labels: list[str], count: int) -> None:
    rows = Rows(tuple(str(number) for number in range(len(labels))), tuple(labels))
    train, validation = _split(rows, count)
    assert set(train.labels) == set(labels)
    assert sorted(train.inputs + validation.inputs, key=lambda x: int(str(x))) == list(rows.inputs)
    assert len(validation) <= count


def test_the_sample_depends_on_the_seed_alone(tmp_path: Path) -> None:
    _write(tmp_path, ".jsonl")
    config = DataConfig(train="rows.jsonl", text="sentence", max_train_rows=4)
    assert load_dataset(config, tmp_path, seed=3) == load_dataset(config, tmp_path, seed=3)
    assert load_dataset(config, tmp_path, seed=3) != load_dataset(config, tmp_path, seed=4)
