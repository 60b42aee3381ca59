"""The stream of prompts: each once per epoch, over all ranks, and a resumed stream is the stream."""

import pytest
import torch
from captions import make, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from koala import koala_row, koala_texts, write_koala

from dimo.config import load_config
from dimo.data.stream import PromptStream
from dimo.errors import DimoError
from dimo.train.trainer import Trainer, step_through

quick = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


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
    with pytest.raises(DimoError, match="holds no prompt that passes: of 600 rows .* are below clarity_score 2"):
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
    with pytest.raises(DimoError, match="has changed since the checkpoint: other prompts"):
        PromptStream(file).load_state_dict(state)
    write(file, ["one", "owt"])
    with pytest.raises(DimoError, match="has changed since the checkpoint: other prompts"):
        PromptStream(file).load_state_dict(state)
    write(tmp_path / "b.txt", ["three"])
    with pytest.raises(DimoError, match="has changed since the checkpoint .other files"):
        PromptStream(tmp_path).load_state_dict(state)


def test_a_run_goes_on_in_a_file_that_was_mended_further_on(tmp_path):
    captions = [f"prompt {i}" for i in range(2000)]
    whole = PromptStream(write(tmp_path / "whole" / "a.csv", captions), shuffle_buffer=100)
    file = write(tmp_path / "a.csv", captions)
    right = file.read_bytes()
    file.write_bytes(right.replace(b"prompt 1500", b"prompt, 1500"))
    stream = PromptStream(file, shuffle_buffer=100)
    assert stream.take(1450) == whole.take(1450)
    state = stream.state_dict()
    with pytest.raises(DimoError, match="line 1502 has 3 fields for 2"):
        stream.take(100)
    file.write_bytes(right)
    resumed = PromptStream(file, shuffle_buffer=100)
    resumed.load_state_dict(state)
    assert resumed.take(900) == whole.take(900)


def test_positions_of_an_earlier_dimo_are_read(tmp_path):
    """Which kept a digest of names and sizes, and none of the block."""
    file = write(tmp_path / "a.txt", ["one", "two", "three"])
    stream = PromptStream(file)
    stream.take(2)
    state = {k: v for k, v in stream.state_dict().items() if k != "block"} | {"files": "b7beeff78f28ceea"}
    resumed = PromptStream(file)
    resumed.load_state_dict(state)
    assert resumed.take(4) == stream.take(4)
    write(file, ["one", "two", "four"])
    with pytest.raises(DimoError, match="has changed since the checkpoint .other files or sizes"):
        resumed.load_state_dict(state)


def test_the_motion_prefix(folder, tmp_path):
    count = len(captions_of())
    fixed = PromptStream(folder, motion=9, motion_share=1).take(count)
    assert sorted(p.removeprefix("motion=9.0, ") for p in fixed) == captions_of()
    assert all(p.startswith("motion=9.0, ") for p in fixed)
    own = PromptStream(folder, motion="score", motion_share=1).take(count)
    assert sorted(own) == sorted(f"motion={float(row[6]):.1f}, {t.strip()}" for t, row in rows_of(600) if t.strip())
    some = PromptStream(folder, motion=5).take(count)
    share = sum(p.startswith("motion=5.0, ") for p in some) / count
    assert 0.5 < share < 0.7 and some == PromptStream(folder, motion=5).take(count)
    assert PromptStream(folder, motion=5, motion_share=0).take(count) == PromptStream(folder).take(count)
    file = tmp_path / "a.csv"
    file.write_text("caption,motion_score\na,\nb,fast\nc,nan\nd,7\n")
    assert sorted(PromptStream(file, motion="score", motion_share=1).take(4)) == ["a", "b", "c", "motion=7.0, d"]


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
        (["distill.min_clarity=0.5"], "need a file of captions, but distill.prompt_source is world"),
        (["distill.motion_prefix=9"], "need a file of captions, but distill.prompt_source is world"),
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
