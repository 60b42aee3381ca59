"""Each kind of caption file: what goes in comes out, and what is no caption is refused before it is a prompt."""

import bz2
import gzip
import json
import lzma

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from captions import make, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dimo.commands.sample import read_prompts
from dimo.data.stream import PromptStream
from dimo.errors import DimoError

quick = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])

# in a text file a line is a prompt, and every reader takes \r for the end of a line
# a NUL byte is refused
any_text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=40)
one_line = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r\n"), max_size=40)
tricky = st.sampled_from(
    ["NA", "null", "12", "1e5", "a,b", '"', '""', "\ufeffx", "a\r\nb", "\\", "'", "{}", '\\"', "[a]"]
)


@pytest.mark.parametrize("kind", ["txt", "jsonl", "csv", "parquet"])
def test_whatever_text_goes_in_comes_out(kind, tmp_path):
    texts = one_line if kind == "txt" else st.one_of(any_text, tricky, st.none())

    @quick
    @given(st.lists(texts, min_size=1, max_size=8), st.integers(1, 9))
    def check(captions, buffer):
        file = write(tmp_path / f"a.{kind}", captions)
        wanted = [c.strip() for c in captions if c and c.strip()]
        if kind == "txt" and wanted and captions[0].startswith("\ufeff"):
            return  # a byte-order mark, and tested as one
        if not wanted:
            with pytest.raises(DimoError, match="holds no prompt"):
                PromptStream(file, shuffle_buffer=buffer)
            return
        stream = PromptStream(file, shuffle_buffer=buffer)
        assert sorted(stream.take(len(wanted))) == sorted(wanted)
        assert sorted(stream.take(len(wanted))) == sorted(wanted)

    check()


@pytest.mark.parametrize("kind", ["txt", "jsonl", "csv"])
def test_a_byte_order_mark_is_read_over_and_what_is_no_utf_8_refused(kind, tmp_path):
    file = write(tmp_path / f"a.{kind}", ["one", "tXo", "é"])
    whole = file.read_bytes()
    file.write_bytes(b"\xef\xbb\xbf" + whole.replace(b"X", "\ufffd".encode()))  # which is UTF-8 as well
    assert sorted(PromptStream(file).take(3)) == ["one", "t\ufffdo", "é"]
    line = 3 if kind == "csv" else 2
    for bad, byte in ((whole.replace(b"X", b"\xff"), "0xff"), (whole.decode().replace("X", "ä").encode("l1"), "0xe4")):
        file.write_bytes(bad)
        with pytest.raises(DimoError, match=f"a.{kind} cannot be read as {kind}: line {line} is not UTF-8.* {byte}$"):
            PromptStream(file)


@pytest.mark.parametrize("kind", ["txt", "jsonl", "csv"])
def test_what_is_no_utf_8_is_refused_far_down_too(kind, tmp_path):
    file = write(tmp_path / f"a.{kind}", [f"prompt {i}" for i in range(12_000)] + ["X"])
    file.write_bytes(file.read_bytes().replace(b"X", b"\xe9"))
    with pytest.raises(DimoError, match=f"line {12_002 if kind == 'csv' else 12_001} is not UTF-8 text"):
        PromptStream(file, shuffle_buffer=10).take(12_001)


def test_bytes_in_parquet_are_read_as_text_and_what_is_no_utf_8_refused(tmp_path):
    file, texts = tmp_path / "a.parquet", [f"prömpt {i}" for i in range(2500)]
    data = [text.encode() for text in texts]
    pq.write_table(pa.table({"n": range(2500), "caption": pa.array(data, pa.binary())}), file)
    assert sorted(PromptStream(file).take(2500)) == sorted(texts)
    stream = PromptStream(file, shuffle_buffer=700)
    stream.take(1900)
    resumed = PromptStream(file, shuffle_buffer=700)
    resumed.load_state_dict(stream.state_dict())
    assert resumed.take(600) == stream.take(600)
    data[2100] = "prömpt".encode("latin-1")
    made = pa.array(data, pa.binary())
    for column in (made, pa.Array.from_buffers(pa.string(), len(made), made.buffers())):  # text only by its type
        pq.write_table(pa.table({"n": range(2500), "caption": column}), file)
        with pytest.raises(DimoError, match="a.parquet cannot be read .* row 2101 of column caption is not .* 0xf6$"):
            PromptStream(file, shuffle_buffer=10).take(2500)


def test_any_caption_column_that_is_usual(tmp_path):
    for column in ("prompt", "text"):
        assert PromptStream(write(tmp_path / "a.jsonl", ["x"], column)).take(1) == ["x"]
    (tmp_path / "a.jsonl").write_text('{"text": "no"}\n{"caption": 3, "text": "no"}\n{"caption": "yes"}\n')
    assert PromptStream(tmp_path / "a.jsonl").take(2) == ["yes", "yes"]


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ({}, "contains none"),
        ({"a.csv": b""}, r"a.csv is empty \(0 bytes\)"),
        ({"a.csv": b"id,title\n1,x\n"}, "a.csv has no column caption, prompt or text; it has id, title"),
        ({"a.csv": b"caption\n"}, "holds no prompt: none of its 0 rows has a caption"),
        ({"a.csv": b"caption\nx\n", "b.csv": b"url\nx\n"}, "b.csv has no column caption"),
        ({"a.jsonl": b'{"caption": "x"}\n{"caption": "cut}\n'}, "as jsonl: line 2 is not a JSON object"),
        (
            {"a.jsonl": b'{"caption": "x"}\n{"id": 1, "caption": "y", "caption": "z"}\n'},
            "line 2 has the key caption twice",
        ),
        ({"a.txt": b"\n  \n\r\n"}, "holds no prompt: none of its 3 rows"),
        ({"a.jsonl": b'{"caption": "x"}\nnonsense\n{"caption": "y"}\n'}, "as jsonl: line 2 is not a JSON object"),
        ({"a.jsonl": b'{"caption": "x", "n": ' + b"9" * 5000 + b"}\n"}, "line 1 is not a JSON object"),
        ({"a.jsonl": b'["x"]\n["y"]\n'}, "line 1 is not a JSON object"),
        ({"a.jsonl": b"\n{'caption': 'x'}\n\n"}, "as jsonl: line 2 is not a JSON object"),
        ({"a.jsonl": b'{"title": "x"}\n'}, "no column caption, prompt or text; it has title"),
        ({"a.parquet": b"PAR1 half"}, "a.parquet cannot be read as parquet"),
    ],
)
def test_what_does_not_serve_is_refused_in_a_sentence(files, sentence, tmp_path):
    for name, content in files.items():
        make(tmp_path, name, content)
    with pytest.raises(DimoError, match=sentence):
        PromptStream(tmp_path)


def packed(pack):
    return pack(b"caption\na dog\n" * 20)


ALL = ("txt", "jsonl", "csv", "parquet")
FOREIGN = {
    "a Git LFS pointer.*git lfs pull": (ALL, b"version https://git-lfs.github.com/spec/v1\noid sha256:12ab\nsize 7\n"),
    "a git-annex pointer": (ALL, b"/annex/objects/SHA256E-s12--ab.csv\n"),
    "gzip-compressed": (ALL, packed(gzip.compress)),
    "bzip2-compressed": (ALL, packed(bz2.compress)),
    "xz-compressed": (ALL, packed(lzma.compress)),
    "a zip archive": (ALL, b"PK\x03\x04caption"),
    "UTF-16": (ALL, "caption\na dog\n".encode("utf-16")),
    "NUL byte.*UTF-16": (("txt", "jsonl", "csv"), "caption\na dog\n".encode("utf-16-le")),
    "a web page.*download it again": (ALL, b"\n <!doctype HTML><html>\n<h1>Sign in</h1>\n"),
    "a web page": (ALL, b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>'),
    "contains only '404: Not Found'": (ALL, b"404: Not Found"),
    "contains only 'Entry not found'": (ALL, b"Entry not found\n"),
    "parquet .rename it to .parquet": (("txt", "jsonl", "csv"), b"PAR1\x15\x04"),
    "not a JSON object but begins an array": (("jsonl",), b'\n[{"caption": "a dog"},\n{"caption": "b"}]\n'),
    "line 1 is not a JSON object": (("jsonl",), b'{\n"caption": "a dog"\n}\n'),
    "line 1 is not UTF-8 text.*0x89": (("txt", "jsonl", "csv"), b"\x89PNG\r\n\x1a\n"),
    "line 2 contains a NUL byte": (("txt", "csv"), b"caption\na dog\0\n"),
    "it is JSON": (("txt",), b'[{"caption": "a dog"},\n{"caption": "b"}]\n'),
    "it is JSON: write": (("txt",), b'{\n  "caption": "a dog"\n}\n'),
    "JSON: write one object per line": (("txt",), b'["a dog",\n"b"]\n'),
    "it is JSON: write one object per line and rename": (("txt",), b'{"caption": "a dog"}\n{"caption": "b"}\n'),
    "a table with the column prompt": (("txt",), b"id\tprompt\n1\ta dog\n"),
    "a table with the column text": (("txt",), b"url,text\nx,a dog\n"),
    "a table with the column caption": (("txt",), b'"id","caption"\n1,a dog\n'),
}


@pytest.mark.parametrize(("sentence", "kind"), [(s, kind) for s, (kinds, _) in FOREIGN.items() for kind in kinds])
def test_a_file_of_something_else_is_refused(sentence, kind, tmp_path):
    file = make(tmp_path, f"a.{kind}", FOREIGN[sentence][1])
    for read in (PromptStream, read_prompts):
        with pytest.raises(DimoError, match=f"a.{kind} cannot be read as {kind}: .*{sentence}"):
            read(file)


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("['a dog runs', 'a \"dog\" sits']", "list"),
        ('["a dog", null]', "list"),
        ("  ('a dog', 'a cat')", "tuple"),
        ("{'en': 'a dog'}", "dict"),
        ("[0.25, 0.5]", "list"),
        (r"['a \d']", "list"),
        ("array(['a dog', 'a cat'], dtype=object)", "list"),
    ],
)
def test_the_text_of_a_list_is_refused_however_deep(kind, text, name, tmp_path):
    file = write(tmp_path / f"a.{kind}", [f"prompt {i}" for i in range(2500)] + [text, "more"])
    place = {"csv": "line 2502", "parquet": "row 2501"}.get(kind, "line 2501")
    with pytest.raises(DimoError, match=f"a.{kind} cannot be read as {kind}: the caption of {place} is a {name}, not"):
        read_prompts(file)
    stream = PromptStream(file, shuffle_buffer=10)
    with pytest.raises(DimoError, match=f"{place} is a {name}, not text"):
        stream.take(2501)


@pytest.mark.parametrize("kind", ALL)
def test_brackets_alone_make_no_list(kind, tmp_path):
    texts = [
        "[applause] a man bows (slowly)",
        "(a dog)",
        '["STOP" sign]',
        "[]",
        "{a}",
        "('x')",
        "[b",
        "it's [c]",
        "b'a",
        "array('x')",
    ]
    assert read_prompts(write(tmp_path / f"a.{kind}", texts)) == texts


@pytest.mark.parametrize("value", [["a dog", "a cat"], {"en": "a dog"}])
def test_lists_that_a_file_has_as_lists_are_refused(value, tmp_path):
    pq.write_table(pa.table({"caption": [value]}), tmp_path / "a.parquet")
    make(tmp_path, "a.jsonl", json.dumps({"caption": value}).encode())
    for file, place in ((tmp_path / "a.parquet", "row 1"), (tmp_path / "a.jsonl", "line 1")):
        with pytest.raises(DimoError, match=f"the caption of {place} is a {type(value).__name__}, not text"):
            read_prompts(file)


def test_two_columns_of_one_name_are_refused_where_they_are_asked_for(tmp_path):
    twice = pa.table([["a"], ["b"], ["c"]], names=["caption", "motion_score", "caption"])
    pq.write_table(twice, tmp_path / "a.parquet")
    make(tmp_path, "a.csv", b"caption,motion_score,caption\na,b,c\n")
    for kind in ("parquet", "csv"):
        with pytest.raises(DimoError, match="2 columns are named caption"):
            PromptStream(tmp_path / f"a.{kind}")
    scores = pa.table([["a"], [1], [2], ["x"], ["y"]], names=["caption", "motion_score", "motion_score", "id", "id"])
    pq.write_table(scores, tmp_path / "a.parquet")
    make(tmp_path, "a.csv", b"id,caption,motion_score,id,motion_score\nx,a,1,y,2\n")
    make(tmp_path, "a.jsonl", b'{"id": 1, "id": 2, "caption": "a", "motion_score": 1, "motion_score": 2}\n')
    for kind in ("parquet", "csv", "jsonl"):
        assert read_prompts(tmp_path / f"a.{kind}") == ["a"]
        with pytest.raises(DimoError, match="2 columns are named motion_score|has the key motion_score twice"):
            PromptStream(tmp_path / f"a.{kind}", motion="score")


def test_lines_end_as_everywhere(tmp_path):
    assert read_prompts(make(tmp_path, "a.txt", "a\rb\r\nc\u2028d\n\r\n \x85e".encode())) == ["a", "b", "c\u2028d", "e"]
    with pytest.raises(DimoError, match="line 2 is longer than 16,777,216 bytes"):
        read_prompts(make(tmp_path, "a.txt", b"x\n" + b"y" * (1 << 24)))


@pytest.mark.parametrize("kind", ALL)
def test_the_text_of_bytes_is_refused_however_deep(kind, tmp_path):
    for text in ("b'a dog'", 'b"a dog\'s"'):
        file = write(tmp_path / f"a.{kind}", [f"prompt {i}" for i in range(1500)] + [text, "more"])
        with pytest.raises(DimoError, match="the caption of (row|line) 150[12] is bytes, not text: .*; decode it$"):
            read_prompts(file)


@pytest.mark.parametrize("last", ['{"caption": "c"},', '{"caption": "c"}{"caption": "d"}', "the end", "null"])
def test_a_last_line_that_is_not_cut_but_wrong_is_refused(last, tmp_path):
    file = make(tmp_path, "a.jsonl", ('{"caption": "a"}\n' * 1500 + last).encode())
    for read in (read_prompts, lambda file: PromptStream(file, shuffle_buffer=10).take(1501)):
        with pytest.raises(DimoError, match="line 1501 is not a JSON object"):
            read(file)


@pytest.mark.parametrize("kind", ["txt", "jsonl", "csv"])
def test_a_last_line_cut_within_a_character_is_left_out_and_said(kind, tmp_path, caplog):
    file = write(tmp_path / f"a.{kind}", ["one", "two", "caf\u5496"])  # three, so JSON is in UTF-8 too
    whole = file.read_bytes()
    file.write_bytes(whole[: whole.index("\u5496".encode()) + 2])
    assert read_prompts(file) == ["one", "two"]
    assert sorted(PromptStream(file).take(2)) == ["one", "two"]
    line = 4 if kind == "csv" else 3
    assert caplog.messages == [f"{file}: the last line, {line}, ends within a character and is skipped"]


@pytest.mark.parametrize("kind", ["txt", "csv"])
def test_what_git_left_among_captions_is_refused_however_deep(kind, tmp_path):
    good = "caption\n" + "a dog\n" * 1500
    for left, sentence in (
        ("version https://git-lfs.github.com/spec/v1\noid sha256:12ab\nsize 7\n", "begins a Git LFS pointer"),
        ("<<<<<<< HEAD\na\n=======\nb\n>>>>>>> other\n", "is a git conflict marker"),
    ):
        file = make(tmp_path, f"a.{kind}", (good + left + "a cat\n").encode())
        with pytest.raises(DimoError, match=f"line 1502 {sentence}"):
            read_prompts(file)
