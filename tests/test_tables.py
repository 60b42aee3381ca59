"""CSV files: every row comes back as it was written, or is refused with its line, at any depth."""

import csv
import json

import pytest
from captions import make, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dimo.commands.sample import read_prompts
from dimo.data.stream import PromptStream
from dimo.errors import DimoError

quick = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def test_csv_as_it_is_found(tmp_path):
    file = tmp_path / "odd [name] * {}.csv"
    file.write_bytes(b'id,"caption",n\n1,a,\n2,"b, ""c""\r\nd",,,\n\n3,,7\n4,e,1\n5,"cut off in the')
    stream = PromptStream(file)
    assert sorted(stream.take(3)) == ["a", 'b, "c"\r\nd', "e"]
    assert stream.counts()["no_caption"] == 2  # the blank line, and row 3
    file.write_bytes(b"caption,n\na,1,\nb,2,\n")  # a comma too many everywhere, which pandas takes for an index
    assert sorted(PromptStream(file).take(2)) == ["a", "b"]


@pytest.mark.parametrize("rows", [0, 1, 9_999, 10_000, 10_001, 25_000])
def test_a_cut_last_line_costs_no_other_row(rows, tmp_path):
    file = write(tmp_path / "a.csv", [f"number {i}, whole" for i in range(rows)])
    with open(file, "a") as opened:
        opened.write('x,"cut')
    if rows == 0:
        with pytest.raises(DimoError, match="holds no prompt"):
            PromptStream(file)
        return
    stream = PromptStream(file)
    state = stream.state_dict()
    once = stream.take(rows)
    assert len(set(once)) == rows and all(p.endswith(", whole") for p in once)
    again = PromptStream(file)
    again.take(rows)
    again.load_state_dict(state)
    assert again.take(rows) == once
    lines = tmp_path / "b.jsonl"
    lines.write_text("".join(json.dumps({"caption": p}) + "\n" for p in once[:1500]) + '{"caption": "cut')
    assert sorted(PromptStream(lines).take(min(rows, 1500))) == sorted(once[:1500])


def python(**options):
    """Rows as csv.writer writes them; pandas writes through it, with a line's end of \n."""

    def write(file, rows):
        with open(file, "w", encoding="utf-8", newline="") as opened:
            csv.writer(opened, **options).writerows(rows)

    return write


def spark(file, rows):
    """Rows as Spark writes them: quoted where they must be, with a backslash before a quote."""

    def field(text):
        text = str(text)
        quoted = not text or text != text.strip() or any(c in text for c in ',"\r\n')
        return '"' + text.replace('"', '\\"') + '"' if quoted else text

    lines = (",".join(map(field, row)) + "\n" for row in rows)
    file.write_bytes("".join(lines).encode())


WRITERS = {
    "csv": python(),
    "csv, all quoted": python(quoting=csv.QUOTE_ALL),
    "csv, texts quoted": python(quoting=csv.QUOTE_NONNUMERIC),
    "pandas": python(lineterminator="\n"),
    "pandas, all quoted": python(lineterminator="\n", quoting=csv.QUOTE_ALL),
    "spark": spark,
    "csv, backslashes": python(doublequote=False, escapechar="\\"),
    "csv, backslashes and no quotes": python(quoting=csv.QUOTE_NONE, escapechar="\\"),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_what_programs_write_comes_back_row_by_row_or_is_refused_with_its_line(writer, tmp_path):
    """Other backslashes than those before quotes, commas and line ends are left to the texts themselves."""
    escapes = "backslashes" in writer or writer == "spark"
    letters = st.sampled_from('ab ,"\n' + ("" if escapes else "\r\\'é"))
    refusals = []

    @settings(quick, max_examples=150, derandomize=True)
    @given(st.lists(st.text(letters, max_size=8), min_size=1, max_size=6))
    def check(captions):
        file = tmp_path / "a.csv"
        rows = [[number, caption, 0.5] for number, caption in enumerate(captions)]
        WRITERS[writer](file, [["id", "caption", "score"], *rows, [7, "the end", 0.5]])
        try:
            read = read_prompts(file)
        except DimoError as error:
            refusals.append(str(error))
            assert "a.csv cannot be read as csv: " in str(error) and " line " in str(error)
        else:
            assert read == [caption.strip() for caption in captions if caption.strip()] + ["the end"]

    check()
    if escapes:
        assert refusals
    else:  # only this is written without quotes by pandas
        assert all("carriage return" in refusal and writer == "pandas" for refusal in refusals)


ROWS = "".join(f"v{i},a grey pigeon,0.{i % 10}\n" for i in range(11_998))  # lines 2 to 11,999
BROKEN = {
    "a comma": ("v,a pigeon, on a step,0.5\nv,b,1\n", "line 12000 has 4 fields for 3 column.*must be in quotes"),
    "a field too few": ("v,a pigeon\nv,b,1\n", "line 12000 has 2 field.* for 3 columns"),
    "a line's end": ("v,a pigeon\non a step,0.5\nv,b,1\n", "line 12000 has 2 field.* for 3 columns"),
    "a carriage return": ("v,a pigeon\ron a step,0.5\nv,b,1\n", "line 12000 has a carriage return"),
    "a quote never closed": ('v,"a pigeon,0.5\nv,b,1\nv,c,1\n', "line 12000: the quote.* still open .*, line 12002"),
    "closed by the next": (
        'v,"a pigeon,0.5\nv,b,1\nv,"c, d",1\n',
        "line 12000: text follows the closing of the quotes.* 12002",
    ),
    "a later quote": ('v,"a\nb","c\nv,b,1\n', "line 12001: the quote that opens here is still open"),
    "without limit": (
        'v,"a\nb","' + "x\n" * 70_000,
        "line 12001: the quote that opens here is never closed, or begins a field of more than 131,072",
    ),
    "a long field": ("v," + "x" * 140_000 + ",1\n", "line 12000: here begins a field of more than 131,072"),
    "escaped": ('v,"a \\"grey\\" pigeon",0.5\nv,b,1\n', r"line 12000: \\\".* is not valid CSV; .*\"\" \(in Spark"),
    "escaped at the end": ('v,"a pigeon of 5\\"",0.5\nv,b,1\nv,"c, d",1\n', r"line 12000: \\\""),
    "escaped to the end": ('v,"a pigeon of 5\\"",0.5\n', r"line 12000: \\\""),
    "escaped, no quotes": ('v,a \\"grey\\" pigeon,0.5\nv,b,1\n', r"line 12000 has \\\" outside quotes"),
    "escaped comma at the end": ("v,a,0.5\\,\n", "line 12000 has 4 fields for 3"),
    "the header again": ("v,caption,1\nvideoID,caption,score\nv,b,1\n", "line 12001 repeats the header"),
    "latin-1": (b"v,caf\xe9,1\n", "line 12000 is not UTF-8"),
    "a NUL": ("v,\0\0\0,1\n", "line 12000 contains a NUL byte"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_row_is_named_far_down(name, tmp_path):
    text, sentence = BROKEN[name]
    text = text if isinstance(text, bytes) else text.encode()
    file = make(tmp_path, "a.csv", f"videoID,caption,score\n{ROWS}".encode() + text)
    with pytest.raises(DimoError, match=f"a.csv cannot be read as csv: {sentence}"):
        read_prompts(file)
    stream = PromptStream(file, shuffle_buffer=100)
    assert set(stream.take(11_900)) == {"a grey pigeon"}
    state = stream.state_dict()
    for cut in (stream, PromptStream(file, shuffle_buffer=100)):
        cut.load_state_dict(state)
        with pytest.raises(DimoError, match=f"a.csv cannot be read as csv: {sentence}"):
            cut.take(200)


def test_a_file_of_carriage_returns_alone_is_named_as_one(tmp_path):
    file = make(tmp_path, "a.csv", b"id,caption\r1,a dog\r2,a cat\r")
    for read in (PromptStream, read_prompts):
        with pytest.raises(
            DimoError, match=r"a.csv cannot be read as csv: its lines end in a carriage return .* alone; s"
        ):
            read(file)


def test_a_header_without_its_end_and_blank_rows_hold_nothing(tmp_path):
    file = make(tmp_path, "a.csv", b"id,caption,,\n1,a\n\n  \n2,b,\n,,\n3,c,,,,\n")
    assert read_prompts(file) == ["a", "b", "c"]
    assert PromptStream(file).counts()["rows"] == 6


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("id,caption,\n1,b,\n2,a dog, running\n", 3),  # pandas and Excel write such a header
        ("caption,,\na,,\na dog, and, a cat\n", 3),
        ("id,caption,score\n1,b,1,\n2,a dog, running,\n", 3),  # has no score, and a comma too many
    ],
)
def test_no_caption_is_cut_at_its_comma_where_a_row_has_empty_fields_too_many(text, line, tmp_path):
    file = make(tmp_path, "a.csv", text.encode())
    for read in (PromptStream, read_prompts):
        with pytest.raises(DimoError, match=f"line {line} has . fields for . column.*commas must be in quotes"):
            read(file)


def test_a_row_cut_outside_quotes_is_left_out_and_said_once(tmp_path, caplog):
    file = make(tmp_path, "a.csv", b"id,caption,score\n1,a,0.5\n2,half a capt")
    assert read_prompts(file) == PromptStream(file).take(1) == ["a"]
    assert caplog.messages == [f"{file}: the last row, line 3, is truncated and skipped"]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("id;caption\n1;a, b\n", r"it has id;caption \(separate the columns by commas"),
        ("id\tcaption\n1\ta, b\n", r"\(separate the columns by commas"),
        ("'id'|\"text\"\n1|a\n", r"\(separate the columns by commas"),
        ("sep=;\nid;caption\n1;a\n", r"it has sep=; \(separate the columns .* names in the first line"),
        ("id, caption\n1,a\n", r"it has id,  caption \(rename ' caption' to caption\)"),
        ("ID,Caption\n1,a\n", r"\(rename 'Caption' to caption\)"),
        ("id,title\n1,a\n", "it has id, title$"),
        ("\nid,caption\n1,a\n", "line 1 is blank; it must name the columns"),
    ],
)
def test_a_header_that_is_nearly_right_is_told_what_is_wrong(content, sentence, tmp_path):
    with pytest.raises(DimoError, match=sentence):
        read_prompts(make(tmp_path, "a.csv", content.encode()))


def test_a_quote_after_white_space_is_no_part_of_a_caption(tmp_path):
    lines = "".join(f"{i},a grey pigeon\n" for i in range(2000))
    for gap in (" ", "\t "):
        file = make(tmp_path, "a.csv", f'id,caption\n{lines}1,{gap}"a dog"\n2,b\n'.encode())
        with pytest.raises(DimoError, match="line 2002 has white space between a comma and a quote"):
            read_prompts(file)
    file = write(tmp_path / "a.csv", [' "a dog" barks', 'a 5" dog'])
    assert read_prompts(file) == ['"a dog" barks', 'a 5" dog']


def test_scores_are_finite_numbers_in_plain_digits(tmp_path):
    scores = ["inf", "Infinity", "1_0", "1e999", "nan", "", "7", " 8.25 "]
    rows = "".join(f"{i},{score}\n" for i, score in enumerate(scores))
    file = make(tmp_path, "a.csv", f"caption,motion_score\n{rows}".encode())
    stream = PromptStream(file, minimum={"motion_score": 1}, motion="score", motion_share=1)
    assert sorted(stream.take(2)) == ["motion=7.0, 6", "motion=8.2, 7"] and stream.counts()["filtered"] == 6
