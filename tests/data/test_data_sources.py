"""Files good and corrupt: the rows that come out, and that every complaint names file, line, reason and cure."""

import gzip
import json
import re
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefero.data import parsing, sources
from prefero.data.sources import Rows, as_rows, local_file, read_rows, require_columns

ROWS = [{"prompt": "a", "n": 1}, {"prompt": "b\u2028c", "n": 2}, {"prompt": 'é "q", x\ny', "n": 3}]


def jsonl(rows: list[dict[str, object]]) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def put(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = b'prompt,n\na,1\n"b\xe2\x80\xa8c",2\n"\xc3\xa9 ""q"", x\ny",3\n'
    files = [
        put(tmp_path, "x.jsonl", jsonl(ROWS)),
        put(tmp_path, "x.jsonl.gz", gzip.compress(jsonl(ROWS))),
        put(tmp_path, "x.json", json.dumps(ROWS).encode()),
        put(tmp_path, "lines.json", jsonl(ROWS)),
        put(tmp_path, "data.json", json.dumps({"data": ROWS}).encode()),
        put(tmp_path, "x.csv", table),
        put(tmp_path, "x.csv.gz", gzip.compress(table)),
        put(tmp_path, "x.tsv", b'prompt\tn\na\t1\nb\xe2\x80\xa8c\t2\n"\xc3\xa9 ""q"", x\ny"\t3\n'),
        tmp_path / "x.parquet",
    ]
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), files[-1])
    for path in files:
        rows = read_rows(path)
        assert [{"prompt": row["prompt"], "n": int(row["n"])} for row in rows] == ROWS, path
        assert rows.columns == ["prompt", "n"] and rows.bad == [] and rows.source == str(path)
    assert read_rows(files[5]).where(2) == f"{files[5]}:4"
    assert read_rows(files[0]).row_id(1) == "x.jsonl:2"


@pytest.mark.parametrize("ends", [b"\n", b"\r\n"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_bom_crlf_and_blank_lines_are_harmless(tmp_path: Path, ends: bytes, bom: bytes) -> None:
    lines = [b'{"prompt": "a"}', b"", b"   ", b'{"prompt": "b"}']
    rows = read_rows(put(tmp_path, "x.jsonl", bom + ends.join(lines)))
    assert [row["prompt"] for row in rows] == ["a", "b"] and rows.lines == [1, 4]
    table = read_rows(put(tmp_path, "x.csv", bom + ends.join([b"prompt", b"a", b"", b"b"])))
    assert list(table) == list(rows)


BAD_LINES = {
    "truncated": (b'{"prompt": "the end is mis', "cut short"),
    "nan": (b'{"prompt": "a", "margin": NaN}', "NaN is not JSON"),
    "infinity": (b'{"prompt": "a", "margin": -Infinity}', "-Infinity is not JSON"),
    "overflow": (b'{"prompt": "a", "margin": 1e999}', "not a finite number"),
    "duplicate": (b'{"prompt": "a", "prompt": "b"}', "duplicate key 'prompt'"),
    "duplicate inside": (b'{"prompt": "a", "meta": {"x": 1, "x": 2}}', "duplicate key 'x'"),
    "deep": (b'{"prompt": ' + b"[" * 60 + b"]" * 60 + b"}", "32 levels"),
    "very deep": (b'{"prompt": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", "nested"),
    "huge": (b'{"prompt": "a", "n": ' + b"9" * 30 + b"}", "64 bits"),
    "huger": (b'{"prompt": "a", "n": ' + b"9" * 5000 + b"}", "digits"),
    "latin": ('{"prompt": "caf\xe9"}'.encode("latin-1"), "not UTF-8 (byte 16"),
    "nul text": (b'{"prompt": "a\\u0000b"}', "NUL"),
    "nul bytes": (b"\0" * 40, "not valid JSON"),
    "surrogate": (b'{"prompt": "\\ud83d"}', "surrogate"),
    "surrogate key": (b'{"prompt": "a", "\\ud83d": 1}', "surrogate"),
    "list": (b'["prompt", "a"]', "got list"),
    "string": (b'"prompt"', "got str"),
    "null": (b"null", "got NoneType"),
    "two": (b'{"prompt": "a"} {"prompt": "b"}', "Extra data"),
    "python": (b"{'prompt': 'a'}", "not valid JSON"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_stops_with_file_line_reason_and_cure_or_is_counted(tmp_path: Path, name: str) -> None:
    line, why = BAD_LINES[name]
    path = put(tmp_path, "bad.jsonl", b'{"prompt": "first"}\n\n' + line + b'\n{"prompt": "last"}\n')
    with pytest.raises(ValueError, match=re.escape(f"{path}:3: ")) as caught:
        read_rows(path)
    assert why in str(caught.value) and "fix the line or pass --max-bad-rows" in str(caught.value)
    rows = read_rows(path, max_bad_rows=1)
    assert [row["prompt"] for row in rows] == ["first", "last"] and rows.lines == [1, 4]
    assert [bad.line for bad in rows.bad] == [3] and why in rows.bad[0].why


def test_the_budget_is_a_number_of_rows(tmp_path: Path) -> None:
    path = put(tmp_path, "x.jsonl", b'{"a": 1}\n' + b"nonsense\n" * 3)
    assert len(read_rows(path, max_bad_rows=3).bad) == 3
    with pytest.raises(ValueError, match=r":4: .*3 bad rows so far"):
        read_rows(path, max_bad_rows=2)
    with pytest.raises(ValueError, match="max_bad_rows = -1"):
        read_rows(path, max_bad_rows=-1)


@pytest.mark.parametrize(
    ("table", "line", "why"),
    [
        (b"a,b\n1,2\n1,2,3\n4,5\n", 3, "3 cells where the header has 2"),
        (b"a,b\n1,2\n1\n4,5\n", 3, "1 cells"),
        (b'a,b\n1,2\n"x"y,2\n4,5\n', 3, "not a valid row"),
        (b"a,b\n1,2\n\xff,2\n4,5\n", 3, "not UTF-8"),
        (b"a,b\n1,2\nx\0,2\n4,5\n", 3, "NUL"),
        (b'a,b\n"1\n1",2\n1\n4,5\n', 4, "1 cells"),
    ],
)
def test_bad_table_rows(tmp_path: Path, table: bytes, line: int, why: str) -> None:
    path = put(tmp_path, "x.csv", table)
    with pytest.raises(ValueError, match=re.escape(f"{path}:{line}: ")) as caught:
        read_rows(path)
    assert why in str(caught.value)
    rows = read_rows(path, max_bad_rows=1)
    assert len(rows) == 2 and rows[1] == {"a": "4", "b": "5"}


def test_a_long_cell_is_no_error_and_no_global_setting_changes(tmp_path: Path) -> None:
    import csv

    before = csv.field_size_limit()
    assert read_rows(put(tmp_path, "x.csv", b"a\n" + b"x" * 300_000))[0] == {"a": "x" * 300_000}
    assert csv.field_size_limit() == before


@pytest.mark.parametrize(
    ("name", "data", "why"),
    [
        ("x.jsonl", b"", "no rows"),
        ("x.jsonl", b"\n\n", "no rows"),
        ("x.csv", b"a,b\n", "no rows"),
        ("x.csv", b"a,a\n1,2\n", "distinct"),
        ("x.csv", b"a,\n1,2\n", "distinct"),
        ("x.json", b"", "not valid JSON"),
        ("x.json", b"[]", "no rows"),
        ("x.json", b"3", "array of rows, got int"),
        ("x.json", b'[{"a": NaN}]', "NaN"),
        ("x.json", b'[{"a": "\xff"}]', "not UTF-8"),
        ("x.jsonl", '{"a": 1}'.encode("utf-16"), "UTF-16"),
        ("x.jsonl.gz", b"no gzip at all", "cannot be read"),
        ("x.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 500)[:-12], "cannot be read"),
        ("x.parquet", b"PAR1 not at all", "parquet"),
        ("x.txt", b"hello", "unknown kind of file"),
    ],
)
def test_unreadable_files(tmp_path: Path, name: str, data: bytes, why: str) -> None:
    path = put(tmp_path, name, data)
    with pytest.raises(ValueError, match=re.escape(why)) as caught:
        read_rows(path)
    assert str(path) in str(caught.value)


def test_a_gzip_bomb_is_not_swallowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parsing, "MAX_LINE_BYTES", 2**16)
    path = put(tmp_path, "x.jsonl.gz", gzip.compress(b"0" * 2**22))
    with pytest.raises(ValueError, match="longer than"):
        read_rows(path, max_bad_rows=10)


_VALUES = st.one_of(st.text(max_size=8), st.floats(), st.integers())
_GOOD_OR_NEARLY = st.dictionaries(st.text(max_size=4), _VALUES, max_size=3).map(lambda row: json.dumps(row).encode())
_BAD = st.sampled_from([line for name, (line, _) in BAD_LINES.items() if name != "very deep"])


@settings(deadline=None, max_examples=150)
@given(
    st.lists(st.one_of(st.binary(max_size=40), _BAD, _GOOD_OR_NEARLY), max_size=6),
    st.sampled_from(["x.jsonl", "x.json", "x.csv", "x.tsv", "x.jsonl.gz"]),
    st.booleans(),
)
def test_no_bytes_raise_anything_but_a_value_error(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], name: str, compress: bool
) -> None:
    data = b"\n".join(lines)
    path = put(tmp_path_factory.mktemp("fuzz"), name, gzip.compress(data) if compress and name.endswith("gz") else data)
    for budget in (0, 100):
        try:
            rows = read_rows(path, max_bad_rows=budget)
        except ValueError as error:
            assert str(path) in str(error)
        else:
            assert len(rows) > 0 and all(type(row) is dict for row in rows)
            json.dumps(list(rows), allow_nan=False).encode("utf-8")


def test_missing_files_name_their_likes(tmp_path: Path) -> None:
    put(tmp_path, "train.jsonl", jsonl(ROWS))
    with pytest.raises(ValueError, match=r"no such file \(did you mean 'train.jsonl'\?\)"):
        read_rows(tmp_path / "trian.jsonl")
    with pytest.raises(ValueError, match=r"folder .* does not exist either"):
        read_rows(tmp_path / "nowhere" / "train.jsonl")


def test_a_folder_holds_a_file_for_each_split(tmp_path: Path) -> None:
    put(tmp_path, "train.jsonl", jsonl(ROWS))
    put(tmp_path, "test.csv", b"prompt,n\nz,9\n")
    assert len(read_rows(tmp_path)) == 3
    assert read_rows(tmp_path, split="test")[0]["prompt"] == read_rows(f"{tmp_path}:test")[0]["prompt"] == "z"
    assert local_file(tmp_path) == tmp_path / "train.jsonl"
    assert local_file(f"{tmp_path}:test") == tmp_path / "test.csv"
    assert local_file("owner/name:test") is None
    with pytest.raises(ValueError, match=r"no file for split 'tset' \(did you mean 'test'\?\)"):
        read_rows(tmp_path, split="tset")
    put(tmp_path, "test.jsonl", jsonl(ROWS))
    with pytest.raises(ValueError, match="several files"):
        read_rows(tmp_path, split="test")
    with pytest.raises(ValueError, match="one split"):
        read_rows(tmp_path / "train.jsonl", split="test")
    with pytest.raises(ValueError, match="subset = 'en' is for hub data sets"):
        read_rows(tmp_path / "train.jsonl", subset="en")


@pytest.mark.parametrize(("module", "extra"), [("datasets", "hub"), ("pyarrow.parquet", "parquet")])
def test_a_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, extra: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    source = "owner/name" if extra == "hub" else str(put(tmp_path, "x.parquet", b"PAR1"))
    with pytest.raises(ValueError, match=re.escape(f'pip install "prefero[{extra}]"')):
        read_rows(source)


def test_a_hub_name_is_loaded_with_split_subset_and_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    class Hub:
        @staticmethod
        def load_dataset(name: str, subset: str | None, *, data_dir: str | None, split: str) -> list[dict[str, str]]:
            if name == "owner/absent":
                raise FileNotFoundError("no connection")
            return [{"prompt": f"{name} {subset} {data_dir} {split}"}]

    monkeypatch.setitem(sys.modules, "datasets", Hub)
    rows = read_rows("owner/name", split="test", subset="small", data_dir="harmless")
    assert rows[0]["prompt"] == "owner/name small harmless test"
    assert rows.row_id(0) == "owner/name:1"
    assert read_rows("owner/name:test")[0]["prompt"] == "owner/name None None test"
    with pytest.raises(ValueError, match="'owner/absent', split = 'train': no such file, and the hub"):
        read_rows("owner/absent")


def test_rows_of_a_program(tmp_path: Path) -> None:
    rows = as_rows([{"a": 1}, {"a": 2}])
    assert isinstance(rows, Rows) and as_rows(rows) is rows and list(rows[1:]) == [{"a": 2}] and rows[1:].lines == [2]
    with pytest.raises(ValueError, match="rows:2: a row must be an object"):
        as_rows([{"a": 1}, ["b"]])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="column name must be a string"):
        as_rows([{1: "a"}])  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="read files with read_rows"):
        as_rows("train.jsonl")  # type: ignore[arg-type]
    datasets = pytest.importorskip("datasets")
    assert list(as_rows(datasets.Dataset.from_list([{"a": 1}, {"a": 2}]))) == list(rows)


def test_a_missing_column_lists_those_present_and_suggests() -> None:
    rows = as_rows([{"promt": "a", "label": 1}])
    with pytest.raises(
        ValueError, match=r"no column 'prompt' \(did you mean 'promt'\?\); columns present: promt, label"
    ):
        require_columns(rows, ["label", "prompt"])


def test_suffixes_are_all_read() -> None:
    assert set(sources.SUFFIXES) >= {".jsonl", ".json", ".csv", ".tsv", ".parquet", ".jsonl.gz", ".csv.gz"}
