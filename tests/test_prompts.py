"""Caption files: what goes in comes out, once per epoch, over all ranks, and a resumed stream is the stream."""

import csv
import json
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from koala import koala_row, koala_texts, write_koala

from dimo.data.prompts import PromptStream
from dimo.errors import DimoError
from dimo.train.config import load_config
from dimo.train.trainer import Trainer, step_through

quick = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


def write(file, captions, column="caption"):
    """`captions` (str or None) as the kind that the suffix says, by another library than the one that reads."""
    kind = file.suffix[1:]
    if kind == "txt":
        file.write_bytes("".join(f"{c or ''}\n" for c in captions).encode())
    elif kind == "jsonl":
        ascii = len(captions) % 2 == 0
        lines = [json.dumps({"id": i, column: c}, ensure_ascii=ascii) for i, c in enumerate(captions)]
        file.write_bytes("\n".join(lines).encode())
    elif kind == "csv":
        with open(file, "w", encoding="utf-8", newline="") as opened:
            writer = csv.writer(opened)
            writer.writerows([["id", column], *([i, c] for i, c in enumerate(captions))])
    else:
        pq.write_table(pa.table({"id": range(len(captions)), column: pa.array(captions, pa.string())}), file)
    return file


def koala(tmp_path, rows=600, shards=3):
    write_koala(tmp_path / "koala", rows, shards, words=8)
    return tmp_path / "koala"


def captions_of(rows=600, keep=lambda row: True):
    """What one epoch of the folder must give."""
    return sorted(t.strip() for t, row in rows_of(rows) if t.strip() and keep(row))


def rows_of(rows):
    """(caption, row) as they were written."""
    texts = koala_texts(words=8)
    made = [koala_row(n, texts[n % len(texts)]) for n in range(rows)]
    return [(row[3], row) for row in made]


# in a text file a line is a prompt, and every reader takes \r for the end of a line
any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
one_line = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\n"), max_size=40)
tricky = st.sampled_from(["NA", "null", "12", "1e5", "a,b", '"', '""', "\ufeffx", "a\r\nb", "\\", "'", "{}", "a\x00b"])


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


def test_a_koala_folder_row_by_row(tmp_path):
    stream = PromptStream(koala(tmp_path), shuffle_buffer=100)
    wanted = captions_of()
    assert sorted(stream.take(len(wanted))) == wanted
    assert stream.counts() == {"epoch": 0, "rows": 600, "no_caption": 600 - len(wanted), "filtered": 0}


def test_filters_by_score(tmp_path):
    stream = PromptStream(koala(tmp_path), minimum={"clarity_score": 0.3, "video_training_suitability_score": 0.5})
    wanted = captions_of(keep=lambda row: float(row[4]) >= 0.3 and row[7] == "0.5")
    assert 0 < len(wanted) < len(captions_of())
    assert sorted(stream.take(len(wanted))) == wanted
    counts = stream.counts()
    assert counts["filtered"] == 600 - counts["no_caption"] - len(wanted) and counts["no_caption"] > 0
    with pytest.raises(DimoError, match="holds no prompt that passes: of 600 rows .* fall under clarity_score 2"):
        PromptStream(koala(tmp_path), minimum={"clarity_score": 2})


@quick
@given(st.integers(1, 9), st.integers(1, 700), st.integers(1, 200))
def test_ranks_share_one_sequence_without_overlap(folder, world_size, buffer, size):
    whole = PromptStream(folder, shuffle_buffer=buffer).take(size * world_size)
    parts = [PromptStream(folder, 0, r, world_size, buffer).take(size) for r in range(world_size)]
    assert [p for step in zip(*parts) for p in step] == whole
    # captions of the folder are all different, so within an epoch nothing may come twice
    epoch = len(captions_of())
    assert len(set(whole[:epoch])) == min(epoch, len(whole))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return koala(tmp_path_factory.mktemp("shared"))


@settings(quick, max_examples=25)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 700), st.lists(st.integers(1, 400), max_size=3))
def test_a_stream_killed_anywhere_goes_on_with_the_next_prompt(tmp_path, folder, before, after, buffer, sizes):
    def open_stream(world_size):
        options = {"minimum": {"clarity_score": 0.2}, "motion": "score", "motion_share": 0.5}
        return PromptStream(folder, 3, world_size - 1, world_size, buffer, **options)

    stream = open_stream(before)
    for size in sizes:
        stream.take(size)
    torch.save(stream.state_dict(), tmp_path / "state.pt")
    again, ranks_changed = open_stream(before), open_stream(after)
    for other in (again, ranks_changed):
        other.take(7)  # wherever it was
        other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert again.state_dict() == stream.state_dict() and again.counts() == stream.counts()
    assert again.take(500) == stream.take(500)
    assert again.counts() == stream.counts()
    whole = open_stream(1)
    whole.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert ranks_changed.take(9) == whole.take(9 * after)[after - 1 :: after]


def test_every_epoch_has_all_prompts_in_a_new_order(folder):
    wanted = captions_of()
    stream = PromptStream(folder, shuffle_buffer=50)
    first, second, third = (stream.take(len(wanted)) for _ in range(3))
    assert sorted(first) == sorted(second) == sorted(third) == wanted
    assert first != second != third and first != wanted
    assert stream.counts()["epoch"] == 2 and stream.counts()["rows"] == 1800
    assert PromptStream(folder, seed=1, shuffle_buffer=50).take(len(wanted)) != first
    assert PromptStream(folder, seed=0, shuffle_buffer=50).take(len(wanted)) == first


def test_a_changed_folder_is_not_resumed(tmp_path):
    file = write(tmp_path / "a.txt", ["one", "two"])
    state = PromptStream(file).state_dict()
    write(file, ["one", "two", "three"])
    with pytest.raises(DimoError, match="has changed since the checkpoint"):
        PromptStream(file).load_state_dict(state)


def test_the_motion_prefix(folder, tmp_path):
    count = len(captions_of())
    fixed = PromptStream(folder, motion=9).take(count)
    assert sorted(p.removeprefix("motion=9.0, ") for p in fixed) == captions_of()
    assert all(p.startswith("motion=9.0, ") for p in fixed)
    own = PromptStream(folder, motion="score").take(count)
    assert sorted(own) == sorted(f"motion={float(row[6]):.1f}, {t.strip()}" for t, row in rows_of(600) if t.strip())
    some = PromptStream(folder, motion=5, motion_share=0.6).take(count)
    share = sum(p.startswith("motion=5.0, ") for p in some) / count
    assert 0.5 < share < 0.7 and some == PromptStream(folder, motion=5, motion_share=0.6).take(count)
    assert PromptStream(folder, motion=5, motion_share=0).take(count) == PromptStream(folder).take(count)
    file = tmp_path / "a.csv"
    file.write_text("caption,motion_score\na,\nb,fast\nc,nan\nd,7\n")
    assert sorted(PromptStream(file, motion="score").take(4)) == ["a", "b", "c", "motion=7.0, d"]


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


def test_csv_as_it_is_found(tmp_path):
    file = tmp_path / "odd [name] * {}.csv"
    file.write_bytes(b'id,"caption",n\n1,a\n2,"b, ""c""\r\nd",,,\n\n3,,7\n4,e,1\n5,"cut off in the')
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


def test_any_caption_column_that_is_usual(tmp_path):
    for column in ("prompt", "text"):
        assert PromptStream(write(tmp_path / "a.jsonl", ["x"], column)).take(1) == ["x"]
    (tmp_path / "a.jsonl").write_text('{"text": "no"}\n{"caption": 3, "text": "no"}\n{"caption": "yes"}\n')
    assert PromptStream(tmp_path / "a.jsonl").take(2) == ["yes", "yes"]


def make(tmp_path, name, content):
    tmp_path.joinpath(name).parent.mkdir(exist_ok=True)
    tmp_path.joinpath(name).write_bytes(content)


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ({}, "holds none"),
        ({"a.csv": b""}, r"a.csv is empty \(0 bytes\)"),
        ({"a.csv": b"id,title\n1,x\n"}, "a.csv has no column caption, prompt or text; it has id, title"),
        ({"a.csv": b"caption\n"}, "holds no prompt: none of its 0 rows has a caption"),
        ({"a.csv": b"caption\nA bird\nA dog, running\n"}, r"line 3 has 2 fields under 1 column.*must be in quotes"),
        ({"a.csv": b'caption\n"' + b"x\n" * 99_999}, "cannot be read as csv: field larger than"),
        ({"a.csv": b"caption\nx\n", "b.csv": b"url\nx\n"}, "b.csv has no column caption"),
        ({"a.csv": b"caption\nx\n", "b.txt": b"x"}, r"mixes kinds of files \(csv, txt\)"),
        ({"a.md": b"x", "b.csv.gz": b"x"}, "holds none"),
        ({"a.txt": b"\n  \n\r\n"}, "holds no prompt: none of its 3 rows"),
        ({"a.jsonl": b'{"caption": "x"}\nnonsense\n{"caption": "y"}\n'}, "as jsonl: line 2 is not a JSON object"),
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


def test_wrong_arguments_are_refused(folder, tmp_path):
    with pytest.raises(DimoError, match="its name is empty"):
        PromptStream("")
    with pytest.raises(DimoError, match="there.csv does not exist"):
        PromptStream(tmp_path / "there.csv")
    make(tmp_path, "a.png", b"x")
    with pytest.raises(DimoError, match="a.png is not one"):
        PromptStream(tmp_path / "a.png")
    with pytest.raises(DimoError, match=r"rank must lie in \[0, world_size\), got 2 of 2"):
        PromptStream(folder, rank=2, world_size=2)
    with pytest.raises(DimoError, match="has no column motion_score; it has text"):
        PromptStream(write(tmp_path / "a.txt", ["x"]), motion="score")
    with pytest.raises(DimoError, match="has no column clarity_score; it has id, caption"):
        PromptStream(write(tmp_path / "a.csv", ["x"]), minimum={"clarity_score": 0.5})
    half = write(tmp_path / "b.csv", ["x"])
    stream = PromptStream(half)
    half.unlink()
    with pytest.raises(DimoError, match="b.csv cannot be read as csv"):
        stream.take(2)


OFFLINE = """
import socket, sys
def refuse(*a, **k): raise RuntimeError("the network was asked for")
socket.socket.connect = socket.getaddrinfo = refuse
from dimo.data.prompts import PromptStream
assert "datasets" not in sys.modules
print(len(PromptStream(sys.argv[1]).take(50)))
"""


def test_nothing_is_fetched_cached_or_copied(folder, tmp_path):
    env = {"HOME": str(tmp_path), "HF_HOME": str(tmp_path / "hf"), "TMPDIR": str(tmp_path), "PATH": "/usr/bin:/bin"}
    env["PYTHONPATH"] = ":".join(sys.path)
    done = subprocess.run([sys.executable, "-c", OFFLINE, folder], env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "50\n"), done.stderr
    assert list(tmp_path.iterdir()) == []


# --- in training


def config_for(run, source, *more):
    small = ["model.device=cpu", "distill.batch_size_per_gpu=4", "distill.shuffle_buffer=64", "experiment.log_every=1"]
    small += ["distill.p_corrupt=0"]  # which gives some samples an earlier prompt
    small += ["evaluation.held_out=0"]
    return load_config("smoke", [*small, f"distill.prompt_source={source}", f"experiment.output_dir={run}", *more])


def test_a_resumed_run_trains_on_the_next_prompts(world, tmp_path):
    file = write(tmp_path / "a.csv", world.prompts)
    straight = Trainer(config_for(tmp_path / "a", file))
    batches = [step.txt_ids for _, step, _ in step_through(straight, 6)]
    # the world's tokenizer knows these words, so that other prompts are other ids: the batches are the stream's
    texts = PromptStream(file, shuffle_buffer=64).take(24)
    assert torch.equal(torch.cat(batches), straight.ursa.tokenize(texts, 4)) and len(set(texts)) == 24
    first = Trainer(config_for(tmp_path / "b", file))
    assert all(torch.equal(step.txt_ids, batches[i]) for i, step, _ in step_through(first, 3))
    torch.save((*first.state(), first.rank_state()), tmp_path / "state.pt")
    resumed = Trainer(config_for(tmp_path / "b", file))
    resumed.load_state(*torch.load(tmp_path / "state.pt", weights_only=True))
    for index in range(3, 6):
        step, _ = resumed.step(index)
        assert torch.equal(step.txt_ids, batches[index])
    assert resumed.prompts.examples == straight.prompts.examples
    for a, b in zip(straight.networks.student.parameters(), resumed.networks.student.parameters()):
        assert torch.equal(a, b)


def test_the_share_of_prompts_that_are_cut_is_a_metric_and_survives_a_resume(world, tmp_path):
    cut = [f"{prompt} and more" for prompt in world.prompts[:6]]
    file = write(tmp_path / "a.csv", world.prompts[:12] + cut)
    trainer = Trainer(config_for(tmp_path / "a", file, "training.max_train_steps=9"))
    for index, _, metrics in step_through(trainer, 9):  # two epochs
        text = PromptStream(file, shuffle_buffer=64).take(4 * (index + 1))
        assert metrics["prompts/cut_share"] == sum(prompt in cut for prompt in text) / len(text)
    assert metrics["prompts/cut_share"] == 1 / 3
    resumed = Trainer(config_for(tmp_path / "b", file))
    resumed.load_state(*trainer.state(), trainer.rank_state())
    assert resumed.prompts.metrics() == trainer.prompts.metrics()


def test_a_run_on_captions_to_its_end(folder, tmp_path):
    more = ["distill.motion_prefix=3.5", "distill.motion_share=1", "distill.min_clarity=0.1"]
    trainer = Trainer(config_for(tmp_path, folder, "training.max_train_steps=2", *more))
    assert all(p.startswith("motion=3.5, ") for p in trainer.prompts.examples)
    run = trainer.train(progress=False)
    rows = run.metrics()
    assert rows[-1]["prompts/rows"] == 64 and rows[-1]["prompts/no_caption"] > 0 and rows[-1]["prompts/filtered"] > 0
    assert (tmp_path / "samples" / "step-00000002.png").stat().st_size > 0


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["distill.min_clarity=0.5"], "for a file of captions, and distill.prompt_source is world"),
        (["distill.motion_prefix=9"], "for a file of captions, and distill.prompt_source is world"),
        (["distill.prompt_source=a.csv", "distill.motion_prefix=fast"], "must be none, score or a number, got 'fast'"),
        (["distill.prompt_source=a.csv", "distill.min_motion=nan"], "min_motion must be a finite number, got nan"),
        (["distill.motion_share=2"], r"distill.motion_share must lie in \[0, 1\]"),
        (["distill.shuffle_buffer=0"], "distill.shuffle_buffer must be at least 1"),
    ],
)
def test_the_configuration_of_prompts_is_checked(overrides, sentence):
    with pytest.raises(DimoError, match=sentence):
        load_config("smoke", overrides)


def test_the_configuration_of_prompts_is_read():
    given = ["distill.prompt_source=a.csv", "distill.min_aesthetic=4", "distill.motion_prefix=9"]
    d = load_config("smoke", given).distill
    assert d.score_minimums() == {"aesthetic_score": 4} and d.motion_value() == 9
    assert load_config("smoke").distill.score_minimums() == {}
