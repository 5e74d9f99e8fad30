"""Tables in every form that people have: the same rows, or an error that names the file."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from probekit.data.statement_files import read_statements
from probekit.data.tables import TABLE_SUFFIXES, UnknownColumns, read_table

ROWS = [["1.jpg", "A red cup, and a car."], ["2.jpg", "Café “zur Post”"]]


def write(folder: Path, name: str, content: str | bytes, encoding: str = "utf-8") -> Path:
    file = folder / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode(encoding))
    return file


def captions(file: Path) -> list[list[str]]:
    table = read_table(file)
    return [list(row) for row in zip(table.column("image"), table.column("caption"), strict=True)]


# ------------------------------------------------------------------------------------ forms of text


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize(
    "header", ["image{}caption", "File Name {} Caption", "IMG{}\ufeffSentence"]
)
@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_separators_headers_and_line_ends_do_not_matter(tmp_path, separator, header, line_end):
    lines = [header.format(separator), *(f'{a}{separator} "{b}"' for a, b in ROWS), ""]
    assert captions(write(tmp_path, "a.csv", line_end.join(lines))) == ROWS


@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"]
)
def test_encodings_are_recognised_by_their_marks(tmp_path, encoding):
    content = "image\tcaption\n" + "".join(f"{a}\t{b}\n" for a, b in ROWS)
    assert captions(write(tmp_path, "a.txt", content, encoding)) == ROWS


@pytest.mark.parametrize("text", ["Café zur Post", "Größe: 5 €", "l’été – «là»", "Ça va, Æbler?"])
def test_western_texts_are_read_as_cp1252(tmp_path, text):
    table = read_table(write(tmp_path, "a.csv", f'image,caption\n1.jpg,"{text}"\n', "cp1252"))
    assert table.encoding == "cp1252"
    assert table.column("caption").tolist() == [text]


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("Привет", "cp1251"),
        ("一只狗在草地上", "gbk"),
        ("犬が走る", "shift-jis"),
        ("It’s a café", "mac-roman"),
        ("żółty pies", "cp1250"),
        ("kırmızı şapka", "cp1254"),
    ],
)
def test_other_encodings_are_not_guessed(tmp_path, text, encoding):
    file = write(tmp_path, "a.csv", f"image,caption\n1.jpg,{text}\n", encoding)
    with pytest.raises(ValueError, match=r"a\.csv .*line 2 is not UTF-8.*save it as UTF-8"):
        read_table(file)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", "1.jpg#0\ta cup\n1.jpg#1\ta “car”\n", [["1.jpg", "a cup"], ["1.jpg", "a “car”"]]),
        ("a.txt", "1.jpg#zhc#0 一只狗\n", [["1.jpg", "一只狗"]]),
        ("a.csv", '1.jpg,"a cup, red"\n2.png,b\n', [["1.jpg", "a cup, red"], ["2.png", "b"]]),
        ("a.tsv", "a cup\tfolder/1.jpg\n", [["folder/1.jpg", "a cup"]]),
    ],
)
def test_tables_without_a_header(tmp_path, name, content, expected):
    assert captions(write(tmp_path, name, content)) == expected


def test_quotation_marks_may_be_part_of_a_text(tmp_path):
    content = 'image,caption\n1.jpg,"Stop" sign\n2.jpg,"Go" or "stop" on it\n'
    expected = [["1.jpg", '"Stop" sign'], ["2.jpg", '"Go" or "stop" on it']]
    assert captions(write(tmp_path, "a.csv", content)) == expected


def test_rows_without_anything_in_them_are_no_rows(tmp_path):
    table = read_table(
        write(tmp_path, "a.csv", "\n,image,caption,\n1,1.jpg,x,\n,,,\n\n2,2.jpg,,\n")
    )
    assert table.column("image").tolist() == ["1.jpg", "2.jpg"]
    assert table.column("caption").tolist() == ["x", ""]


# ------------------------------------------------------------------------------------ forms of JSON


@pytest.mark.parametrize("mark", ["", "\u2028", "\u0085", "\x1c", "\ufeff", "\n"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n", " "])
def test_a_line_of_json_ends_where_its_object_does(tmp_path, mark, line_end):
    rows = [{"image": a, "caption": b + mark + "x"} for a, b in ROWS]
    content = line_end.join(json.dumps(row, ensure_ascii=False) for row in rows)
    assert captions(write(tmp_path, "a.jsonl", content)) == [[a, b + mark + "x"] for a, b in ROWS]


@pytest.mark.parametrize(
    "content",
    [
        [{"image": a, "caption": b} for a, b in ROWS],
        {str(i): {"image": a, "caption": b} for i, (a, b) in enumerate(ROWS)},
        {"image": [a for a, _ in ROWS], "caption": [b for _, b in ROWS]},
        {"image": {"0": "1.jpg", "1": "2.jpg"}, "caption": {"0": ROWS[0][1], "1": ROWS[1][1]}},
        {"version": 1, "data": [{"image": a, "caption": b} for a, b in ROWS]},
        dict(ROWS),
        {
            "images": [{"id": k, "file_name": name} for k, (name, _) in enumerate(ROWS)],
            "annotations": [
                {"id": 7 + k, "image_id": k, "caption": text} for k, (_, text) in enumerate(ROWS)
            ],
            "licenses": [],
        },
    ],
)
def test_json_is_read_whichever_way_round(tmp_path, content):
    assert captions(write(tmp_path, "a.json", json.dumps(content))) == ROWS


def test_parquet_is_read(tmp_path):
    pd.DataFrame(ROWS, columns=["file_name", "text"]).to_parquet(tmp_path / "a.parquet")
    assert captions(tmp_path / "a.parquet") == ROWS


# ----------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "", "it is empty"),
        ("a.json", " \n", "it is empty"),
        ("a.csv", "image,caption\n1.jpg,a cup, red\n", "row 1 has 3 fields for 2 columns"),
        ("a.csv", 'image,caption\n1.jpg,"a cup\n2.jpg,b\n', "line 3: unexpected end"),
        ("a.csv", 'image,caption\n1.jpg,"a "red" cup"\n', "line 2: .*expected after"),
        ("a.txt", "1.jpg#0\ta cup\n2.jpg a car\n", "line 2 is not like the first one"),
        ("a.csv", "1.jpg,a cup\na car,b\n", "no names of columns"),
        ("a.json", "[1]", "row 1 is no object"),
        ("a.json", "[" * 100_000, "recursion"),
        ("a.json", '{"image": "1.jpg", "te', "Unterminated"),
        ("a.parquet", "x", "[Pp]arquet"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=rf"{name} cannot be read .*{message}"):
        read_table(write(tmp_path, name, content))


def test_a_missing_column_is_named_with_what_it_may_be_called(tmp_path):
    table = read_table(write(tmp_path, "a.csv", "image,sentence1,sentence2\n1.jpg,a,b\n"))
    message = (
        r"a\.csv has no caption: it has the columns image, sentence1, sentence2, .*description"
    )
    with pytest.raises(UnknownColumns, match=message):
        table.column("caption")


def test_columns_of_one_meaning_must_agree(tmp_path):
    same = "image,file_name,caption\na/1.jpg,b/1.jpg,x\n"
    table = read_table(write(tmp_path, "a.csv", same))
    assert table.column("image").tolist() == ["a/1.jpg"]
    table = read_table(write(tmp_path, "a.csv", "image,path,caption\n7,1.jpg,x\n"))
    assert table.column("image").tolist() == ["1.jpg"]
    table = read_table(write(tmp_path, "a.csv", "image,caption,text\n1.jpg,x,x\n2.jpg,x,y\n"))
    with pytest.raises(ValueError, match=r"caption and text both name .* differ \(row 2\)"):
        table.column("caption")


def test_an_id_names_an_image_where_nothing_else_does(tmp_path):
    table = read_table(write(tmp_path, "a.csv", "image_id,caption\n17,x\n"))
    assert table.column("image").tolist() == ["17"]
    table = read_table(write(tmp_path, "a.csv", "image_id,file_name,caption\n17,1.jpg,x\n"))
    assert table.column("image").tolist() == ["1.jpg"]


# ---------------------------------------------------------------------------------------- any table

FUZZING = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
FIELDS = st.text(
    st.characters(codec="utf-8", exclude_characters="\r\n") | st.sampled_from(',;|\t"\u2028\x85#'),
    max_size=12,
)
STATEMENTS = st.lists(st.tuples(FIELDS, FIELDS, st.sampled_from(["yes", "No", "1", "0.0"])))
WRITERS = {
    ".csv": lambda rows, separator: written(rows, delimiter=separator),
    ".jsonl": lambda rows, separator: "\n".join(
        json.dumps(dict(zip(rows[0], row, strict=True)), ensure_ascii=False) for row in rows[1:]
    ),
    ".json": lambda rows, separator: json.dumps(
        [dict(zip(rows[0], row, strict=True)) for row in rows[1:]]
    ),
}


def written(rows: list, **options) -> str:
    stream = io.StringIO(newline="")
    csv.writer(stream, quoting=csv.QUOTE_ALL, **options).writerows(rows)
    return stream.getvalue()


@pytest.mark.slow
@FUZZING
@given(
    rows=STATEMENTS,
    suffix=st.sampled_from(sorted(WRITERS)),
    separator=st.sampled_from(",;"),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
)
def test_what_is_written_is_read_or_the_row_is_named(tmp_path, rows, suffix, separator, encoding):
    content = WRITERS[suffix]([["image", "text", "label"], *rows], separator)
    file = write(tmp_path, f"some{suffix}", content, encoding)
    try:
        statements = read_statements(file)
    except ValueError as error:
        assert str(file) in str(error)  # noqa: PT017 (rows are as good as an error)
        assert not rows or any(not image.strip() or not text.strip() for image, text, _ in rows)
    else:
        assert len(statements) == len(rows)
        assert statements.text.tolist() == [text.strip() for _, text, _ in rows]
        assert statements.label.tolist() == [int(label in ("yes", "1")) for *_, label in rows]


@pytest.mark.slow
@FUZZING
@given(content=st.binary(max_size=80) | st.text(max_size=60).map(str.encode))
@pytest.mark.parametrize("suffix", TABLE_SUFFIXES)
def test_whatever_stands_in_a_file_it_is_read_or_named(tmp_path, content, suffix):
    file = write(tmp_path, f"some{suffix}", content)
    try:
        table = read_table(file)
    except ValueError as error:
        assert str(file) in str(error)  # noqa: PT017 (see above)
    else:
        assert table.rows.index.is_unique
