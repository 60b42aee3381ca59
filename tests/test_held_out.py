"""Captions that are held out are never trained on, and they are what a student without an oracle is evaluated on."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch

from dimo.commands.cli import main
from dimo.commands.report import write_run_report
from dimo.config import load_config
from dimo.errors import DimoError
from dimo.evaluation.evaluate import evaluate_to_folder
from dimo.evaluation.summary import prompts_of
from dimo.run.folder import RunFolder
from dimo.run.origin import held_out_by
from dimo.train import prompts
from dimo.train.prompts import open_prompts
from dimo.train.trainer import Trainer
from dimo.ursa import load_ursa
from dimo.worlds import DATA

TINY = Path(__file__).parent / "data" / "tiny-ursa"
SIZE = ["distill.num_frames=1", "distill.height=8", "distill.width=8", "distill.max_prompt_length=9"]
SMALL = ["model.device=cpu", "distill.batch_size_per_gpu=2", "evaluation.videos_per_prompt=1", "experiment.log_every=1"]
SMALL += ["distill.t_draws=1", "distill.aux_steps=1"]
WORDS = "red green blue black white grey pink dark light bright large small round flat".split()
CAPTIONS = [f"{WORDS[i % 14]} {WORDS[i // 14]}" for i in range(60)]


@pytest.fixture(scope="module")
def tiny():
    return load_ursa(TINY)


def config_for(folder, captions, *more):
    file = folder / "captions.csv"
    rows = [f"{caption},{i / 10}" for i, caption in enumerate(captions)]
    file.write_text("\n".join(["caption,motion_score", *rows]) + "\n")
    own = [f"distill.prompt_source={file}", f"distill.teacher_ckpt={TINY}", f"experiment.output_dir={folder}/run"]
    return load_config("smoke", [*SMALL, *SIZE, *own, *more])


def seen_in(config, ursa, batches, ranks=1):
    """Texts that all ranks take in so many batches of 3, by a tokenizer that keeps them."""
    seen = []
    for rank in range(ranks):
        source, inner = open_prompts(config, ursa, rank, ranks), ursa.tokenize_and_count

        class Listening:
            path = ursa.path

            def tokenize_and_count(self, prompts, length, inner=inner):
                seen.extend(prompts)
                return inner(prompts, length)

        source.ursa = Listening()
        for _ in range(batches):
            source.batch(3, torch.Generator())
    return seen


@pytest.mark.parametrize("ranks", [1, 3])
def test_held_out_captions_are_never_trained_on_and_all_others_are(ranks, tiny, tmp_path):
    double = [*CAPTIONS, *CAPTIONS[:30]]  # some come twice
    for more in ([], ["distill.motion_prefix=score", "distill.motion_share=0.5"], ["distill.shuffle_buffer=7"]):
        config = config_for(tmp_path, double, *more)
        source = open_prompts(config, tiny)
        plain = {prompt.split(", ")[-1] for prompt in source.held_out}
        assert source.examples == source.held_out and len(plain) == 8 and plain <= set(CAPTIONS)
        seen = {prompt.split(", ")[-1] for prompt in seen_in(config, tiny, 120 // ranks, ranks)}  # four epochs
        assert seen == set(CAPTIONS) - plain


def test_which_are_held_out_depends_on_the_captions_alone_and_fewer_are_the_first_of_more(tiny, tmp_path):
    def held_out(*more, rank=0, ranks=1):
        return open_prompts(config_for(tmp_path, CAPTIONS, *more), tiny, rank, ranks).held_out

    eight = held_out()
    assert len(set(eight)) == 8 and eight != CAPTIONS[:8]
    assert held_out("experiment.seed=5", "distill.shuffle_buffer=3", rank=2, ranks=4) == eight
    assert held_out("evaluation.held_out=3") == eight[:3] and held_out("evaluation.held_out=12")[:8] == eight
    prefixed = held_out("distill.motion_prefix=9", "distill.motion_share=1")
    assert prefixed == [f"motion=9.0, {caption}" for caption in eight]
    assert held_out("evaluation.held_out=0") == []


def test_ranks_share_what_is_left_and_a_resumed_run_goes_on_with_the_next(tiny, tmp_path):
    config, g = config_for(tmp_path, CAPTIONS), torch.Generator()
    alone = open_prompts(config, tiny)
    whole = torch.cat([alone.batch(2, g) for _ in range(60)])
    pair = [open_prompts(config, tiny, rank, 2) for rank in range(2)]
    for step in range(30):
        of_ranks = [source.batch(2, g) for source in pair]
        assert torch.equal(torch.stack(of_ranks, 1).flatten(0, 1), whole[4 * step : 4 * step + 4])
        if step == 11:  # goes on alone, as one of two, and as one of two whose hold-out is another
            states = pair[0].state_dict(), pair[1].state_dict()
    again = open_prompts(config, tiny)
    again.load_state_dict(states[1])
    assert torch.equal(torch.cat([again.batch(2, g) for _ in range(36)]), whole[48:])


def test_a_position_from_before_there_was_hold_out_is_kept(tiny, tmp_path):
    g = torch.Generator()
    before = open_prompts(config_for(tmp_path, CAPTIONS, "evaluation.held_out=0"), tiny)
    before.batch(7, g)
    after = open_prompts(config_for(tmp_path, CAPTIONS), tiny)
    after.load_state_dict(before.state_dict())
    rest = [prompt for prompt in before.stream.take(53) if prompt not in after.held_out]
    assert torch.equal(after.batch(len(rest), g), tiny.tokenize(rest, 9))


@pytest.mark.parametrize(
    ("captions", "wanted", "held_out", "sentence"),
    [
        (CAPTIONS[:11], 8, 2, "2 captions are held out of training for evaluation: at most one in 5, although"),
        (CAPTIONS[:4], 8, 0, "too few captions to hold any out of training (4 different ones): evaluation uses"),
    ],
)
def test_few_captions_are_enough_and_what_was_done_is_said(captions, wanted, held_out, sentence, tmp_path, caplog):
    config = config_for(tmp_path, captions, f"evaluation.held_out={wanted}", "training.max_train_steps=1")
    run = Trainer(config).train(progress=False)
    assert sentence in (run.path / "train.log").read_text()
    with caplog.at_level(logging.WARNING):
        rows = evaluate_to_folder(config, run.path / "checkpoints" / "final", run.path, progress=False)
    assert sentence in caplog.text
    assert {row["prompts_held_out"] for row in rows.values()} == {held_out}
    told = f"Prompts: {held_out} held-out captions." if held_out else "Prompts: captions that were trained on."
    assert prompts_of(rows) == told and told in write_run_report(run, most=1).read_text()


def test_what_was_held_out_is_said(tiny, tmp_path):
    for captions, wanted, sentence in (
        (CAPTIONS, 8, "8 captions are held out of training for evaluation"),
        ([CAPTIONS[0]] * 30, 8, "too few captions to hold any out of training (1 different ones): evaluation uses "
         "captions that are trained on"),
        (CAPTIONS, 0, "evaluation.held_out is 0: evaluation uses captions that are trained on"),
    ):  # fmt: skip
        assert open_prompts(config_for(tmp_path, captions, f"evaluation.held_out={wanted}"), tiny).about == sentence


def test_a_run_that_began_without_hold_out_goes_on_and_its_evaluation_says_so(tmp_path, caplog):
    config = config_for(tmp_path, CAPTIONS, "training.max_train_steps=1")
    run = Trainer(config).train(progress=False)
    assert held_out_by(run.path) == 8
    older = (run.path / "config.yaml").read_text().replace("  held_out: 8\n", "")
    (run.path / "config.yaml").write_text(older)  # as an earlier dimo left it
    assert held_out_by(run.path) == 0
    Trainer(config_for(tmp_path, CAPTIONS, "training.max_train_steps=2")).train(progress=False)
    assert RunFolder(run.path).status()["step"] == 2 and held_out_by(run.path) == 0
    assert "continues with the old behaviour: evaluation.held_out=0" in (run.path / "train.log").read_text()
    assert main(["evaluate", str(run.path), "evaluation.teacher_steps=[1]"]) == 0
    assert "has held out 0 captions throughout, not 8" in caplog.text
    rows = json.loads((run.path / "report.json").read_text())
    assert rows["student_1"]["prompts_held_out"] == 0


def test_more_than_the_run_held_out_is_not_claimed(tmp_path, caplog):
    run = Trainer(config_for(tmp_path, CAPTIONS, "training.max_train_steps=1", "evaluation.held_out=2")).train(False)
    for asked, given in ((1, 1), (2, 2), (9, 2)):
        words = [f"evaluation.held_out={asked}", "evaluation.teacher_steps=[1]", "--out_dir", str(tmp_path / "out")]
        assert main(["evaluate", str(run.path), *words]) == 0
        rows = json.loads((tmp_path / "out" / "report.json").read_text())
        assert rows["student_1"]["prompts_held_out"] == given


def test_of_other_captions_than_the_runs_nothing_is_claimed(tmp_path, caplog):
    run = Trainer(config_for(tmp_path, CAPTIONS, "training.max_train_steps=1")).train(False)
    (tmp_path / "moved").mkdir()
    (tmp_path / "captions.csv").rename(tmp_path / "moved" / "captions.csv")
    (tmp_path / "part.csv").write_text("\n".join(["caption", *CAPTIONS[:20]]))
    known = "Prompts: 8 held-out captions."
    unknown = "Prompts: captions other than the run's; it is not known which of them it was trained on."
    for name, more, held_out, sentence in (
        ("moved/captions.csv", [], 8, known),
        ("part.csv", [], None, unknown),
        ("moved/captions.csv", ["distill.min_motion=2"], None, unknown),
    ):
        caplog.clear()
        words = [f"--prompt_file={tmp_path / name}", *more, "evaluation.teacher_steps=[1]", f"--out={tmp_path / 'out'}"]
        assert main(["evaluate", str(run.path), *words]) == 0
        rows = json.loads((tmp_path / "out" / "report.json").read_text())
        assert rows["student_1"]["prompts_held_out"] == held_out and prompts_of(rows) == sentence
        assert ("held out of training for evaluation" in caplog.text) == (held_out is not None)


def test_captions_that_were_trained_on_are_counted(tiny, tmp_path, caplog, monkeypatch):
    twice = [*CAPTIONS, *(f"{caption.upper()}." for caption in CAPTIONS[:30])]
    run = Trainer(config_for(tmp_path, twice, "training.max_train_steps=1")).train(False)
    held = open_prompts(load_config(run.path / "config.yaml"), tiny).held_out
    trained = [caption.lower().strip(".") for caption in twice if caption not in held]
    again = sum(caption.lower().strip(".") in trained for caption in held)
    assert 0 < again < 8 and {CAPTIONS[0], CAPTIONS[1]} <= {*trained}
    (tmp_path / "other.csv").write_text(f"caption\na new one\nanother\n{CAPTIONS[0].title()} \n{CAPTIONS[1]}\n")
    for more, count, seen in (([], 8, again), ([f"--prompt_file={tmp_path / 'other.csv'}"], 4, 2)):
        caplog.clear()
        words = [*more, "evaluation.teacher_steps=[1]", "evaluation.judged_videos=0", f"--out={tmp_path / 'out'}"]
        assert main(["evaluate", str(run.path), *words]) == 0
        rows = json.loads((tmp_path / "out" / "report.json").read_text())
        assert rows["student_1"]["prompts_held_out"] == count - seen and rows["student_1"]["prompts_trained_on"] == seen
        assert f"{seen} of the {count} captions are among those that {run.path} was trained on" in caplog.text
        assert prompts_of(rows) == f"Prompts: {count - seen} held-out captions, and {seen} that were trained on."

    searched = []
    monkeypatch.setattr(prompts, "_search", lambda *asked: searched.append(asked) or set())
    own = load_config(run.path / "config.yaml")
    assert prompts.trained_on(own, run.path, held) == again and not searched  # kept with the run
    assert prompts.trained_on(own, run.path, ["new"]) == 0 and len(searched) == 1
    for damaged in ("[", "{}"):
        (run.path / "trained_on.json").write_text(damaged)
        assert prompts.trained_on(own, run.path, held) == 0
    with open(tmp_path / "captions.csv", "a") as file:
        file.write("one more,1\n")
    assert prompts.trained_on(own, run.path, held) == 0 and len(searched) == 4


def test_prompts_that_become_one_by_cutting_are_said(tiny, tmp_path):
    captions = [f"a very long caption about a {word} thing" for word in WORDS]
    config = config_for(tmp_path, captions, "distill.max_prompt_length=3", "evaluation.held_out=0")
    assert "distill.max_prompt_length=3 tokens, only 1 of the 8 example prompts" in open_prompts(config, tiny).about
    config = config_for(tmp_path, captions, "distill.max_prompt_length=40", "evaluation.held_out=0")
    assert "truncated" not in open_prompts(config, tiny).about


def test_a_worlds_prompts_are_never_cut(ursa, tmp_path):
    sentence = "must be at least 4, .* in tokens, got 2: 48 of 48 prompts would be truncated, leaving 12 different ones"
    config = load_config("smoke", [*SMALL, "distill.max_prompt_length=2"])
    with pytest.raises(DimoError, match=sentence):
        Trainer(config)
    with pytest.raises(DimoError, match=sentence):
        evaluate_to_folder(config, DATA / "shapes" / "student", tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
    for length in (4, 7):
        open_prompts(load_config("smoke", [*SMALL, f"distill.max_prompt_length={length}"]), ursa)


def test_a_worlds_prompts_stay_different(tmp_path):
    folder = shutil.copytree(DATA / "shapes", tmp_path / "mine")
    file = folder / "tokenizer" / "tokenizer.json"
    values = json.loads(file.read_text())
    for colour in ("blue", "green"):  # which are then one unknown word
        del values["model"]["vocab"][colour]
    file.write_text(json.dumps(values))
    config = load_config("smoke", [*SMALL, f"distill.teacher_ckpt={folder}"])
    with pytest.raises(DimoError, match="48 prompts of this one become only 36 different ones"):
        Trainer(config)
