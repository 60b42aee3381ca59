"""The evaluation run, the alarms and the ablation."""

import json

import imageio.v3 as iio
import pytest
import torch

from dimo.config import load_config
from dimo.errors import DimoError
from dimo.evaluation.evaluate import evaluate, evaluate_to_folder, format_table, load_student
from dimo.evaluation.metrics import columns_of, legend
from dimo.ursa import sample, save_student
from dimo.ursa.sampler import Trajectory
from dimo.views.alarms import alarms
from dimo.worlds.oracle import score


@pytest.fixture
def no_pictures(monkeypatch):
    """To draw one takes longer than a run of two steps."""
    monkeypatch.setattr("dimo.views.sheets.save_sheet", lambda *_: None)


def test_rows_are_what_the_samplers_and_the_oracle_give(world, ursa):
    rows, codes = evaluate(world, ursa, ursa.transformer, videos_per_prompt=2, teacher_steps=(1, 3), seed=5)
    assert list(rows) == [
        "student_1",
        "student_1_argmax",
        "untrained_1",
        "untrained_1_argmax",
        "teacher_1",
        "teacher_3",
    ]
    prompts = [p for p in world.prompts for _ in range(2)]
    again = sample(
        ursa.transformer, ursa.path, ursa.tokenize(prompts, 4), (3, 4, 4), 3,
        generator=torch.Generator().manual_seed(5 * 1_000_003),
    )  # fmt: skip
    assert torch.equal(codes["teacher_3"], again)
    assert rows["teacher_3"]["validity"] == score(world, again, prompts).valid.float().mean().item()
    # the teacher as its own student, from the same noise and with the same draws
    assert torch.equal(codes["student_1"], codes["teacher_1"]) and torch.equal(codes["student_1"], codes["untrained_1"])
    assert not torch.equal(codes["student_1"], codes["student_1_argmax"])
    first, second = ursa.path.codebook[again.view(48, 2, 48)].unbind(1)
    assert rows["teacher_3"]["spread"] == pytest.approx((first - second).square().sum(-1).mean().item(), rel=1e-4)
    same = (again[::2] == again[1::2]).all(1).float().mean().item()
    assert rows["teacher_3"]["distinct"] == pytest.approx(1 - same / 2)
    keys = ["validity", "adherence", "token_accuracy", "coverage", "coverage_near", "coverage_detail", "videos"]
    keys += ["seconds_per_video", "spread", "distinct", "intervals"]
    assert all(list(row) == keys for row in rows.values()) and "undefined" in format_table(rows)
    assert columns_of(rows) == [key for key in keys if key not in ("coverage_detail", "videos", "intervals")]
    low, high = rows["teacher_3"]["intervals"]["token_accuracy"]
    assert low < rows["teacher_3"]["token_accuracy"] < high


def test_every_batch_of_every_row_starts_from_the_same_noise(world, ursa, monkeypatch):
    started = []

    def recording(*arguments, **options):
        way = Trajectory()
        codes = sample(*arguments, **options, trajectory=way)
        started.append(way.x_t[0])
        return codes

    monkeypatch.setattr("dimo.evaluation.comparison.sample", recording)
    rows, codes = evaluate(world, ursa, ursa.transformer, videos_per_prompt=1, teacher_steps=(1, 3), batch_size=20)
    del started[14], started[7], started[0]  # each network's warm-up before the clock starts
    noise = [torch.cat(started[i : i + 3]) for i in range(0, len(started), 3)]  # 20 + 20 + 8 videos a row
    assert len(noise) == len(rows) == 6 and all(torch.equal(x, noise[0]) for x in noise)
    assert len(noise[0].unique(dim=0)) == 48  # no batch repeats another's
    assert torch.equal(codes["student_1"], codes["teacher_1"])
    started.clear()
    evaluate(world, ursa, ursa.transformer, videos_per_prompt=1, teacher_steps=(1,), batch_size=20, seed=1235)
    both = torch.cat([noise[0], *started[1:4]])
    assert len(both.unique(dim=0)) == 2 * 48  # nor does any batch of the next seed


def test_the_teacher_alone_is_guided_as_in_training(world, ursa, tmp_path, monkeypatch, caplog, no_pictures):
    save_student(tmp_path / "student", ursa.transformer)
    scored = []
    monkeypatch.setattr("dimo.evaluation.evaluate.score", lambda w, c, p: scored.append(c) or score(w, c, p))

    def codes_of(*overrides):
        """Of every row of an evaluation under a configuration."""
        scored.clear()
        config = load_config("smoke", ["evaluation.videos_per_prompt=1", "evaluation.seed=5", *overrides])
        rows = evaluate_to_folder(config, tmp_path / "student", tmp_path / "out", progress=False)
        return dict(zip(rows, scored, strict=True))

    def draw(steps, **guide):
        noise = torch.Generator().manual_seed(5 * 1_000_003)
        return sample(ursa.transformer, ursa.path, ids, (3, 4, 4), steps, shift=ursa.shift, generator=noise, **guide)

    negative = "blue bar moving up"
    ids = ursa.tokenize(world.prompts, 4)
    options = {"guidance_scale": 3.0, "guidance_trunc": 0.6, "uncond_ids": ursa.tokenize([negative] * len(ids), 4)}
    plain = codes_of()
    assert "guid" not in caplog.text
    guided = codes_of("distill.guidance_scale=3", "distill.guidance_trunc=0.6", f"distill.negative_prompt={negative}")
    assert "guidance_scale=3 applies to the teacher only" in caplog.text
    for steps in (1, 4):
        name = f"teacher_{steps}"
        assert torch.equal(plain[name], draw(steps)) and torch.equal(guided[name], draw(steps, **options))
        assert not torch.equal(plain[name], guided[name])
    for name in ("student_1", "student_1_argmax", "untrained_1", "untrained_1_argmax"):
        assert torch.equal(plain[name], guided[name])


def test_a_report_and_a_sheet_are_written(ursa, tmp_path):
    save_student(tmp_path / "student", ursa.transformer)
    config = load_config(
        "smoke", ["evaluation.videos_per_prompt=1", "evaluation.teacher_steps=[2]", "model.device=cpu"]
    )
    rows = evaluate_to_folder(config, tmp_path / "student", tmp_path / "out", progress=False)
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == rows
    assert "Rank correlations: measured on students of this world, shapes." in legend(rows)
    assert (tmp_path / "out" / "sheet.png").read_bytes()[:4] == b"\x89PNG"
    assert iio.imread(tmp_path / "out" / "clips.mp4").shape == (9, 22 + 6 * 182, 3 * 168 - 8, 3)
    with pytest.raises(DimoError, match="latents_shape"):
        evaluate_to_folder(load_config("smoke", ["distill.width=40"]), tmp_path / "student", tmp_path, progress=False)


def test_a_student_that_does_not_fit_is_refused(ursa, tmp_path):
    with pytest.raises(DimoError, match="does not exist"):
        load_student(ursa, tmp_path)
    torch.save({"a": torch.zeros(1)}, tmp_path / "student.pt")
    with pytest.raises(DimoError, match="do not fit the teacher .*: it lacks"):
        load_student(ursa, tmp_path)


def rows_with(count=40, **changes):
    rows = []
    for i in range(count):
        row = {"step": 10 * (i + 1), "loss/aux": 0.5, "lambda_ent": 0.01, "codes/used": 10.0, "grad_norm/student": 1.0}
        rows.append(row | {name.replace("__", "/"): change(i) for name, change in changes.items()})
    return rows


WATCHED = {
    f"collapse__{name}": lambda i, value=value: value
    for name, value in {
        "spread": 0.7, "teacher_spread": 1.0, "least_share": 0.6, "sampled_entropy": 0.7, "teacher_entropy": 1.0,
        "mutual_information": 0.1, "distinct": 0.5,
    }.items()
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        (None, {}),
        ("entropy_floor", {"lambda_ent": lambda i: 0.05 if i >= 20 else 0.01}),
        ("aux_lags", {"loss__aux": lambda i: 0.5 if i < 15 else 0.9}),
        (None, {"loss__aux": lambda i: 1e-3 if i < 15 else 9e-3}),  # of an auxiliary that has nothing left to predict
        ("codes_lost", {"codes__used": lambda i: 10 if i < 20 else (4, 5, 6)[i % 3]}),
        ("collapsed", WATCHED | {"collapse__least_share": lambda i: (1.0, 0.41, 0.39)[i // 15]}),
        ("collapsed", WATCHED | {"collapse__sampled_entropy": lambda i: (1.0, 0.41, 0.39)[i // 15]}),
        ("collapsed", WATCHED | {"collapse__mutual_information": lambda i: (0.1, 0.9, 0.4)[i // 15]}),
        (None, WATCHED | {"collapse__mutual_information": lambda i: 0.1 + 0.02 * i}),
        (None, WATCHED | {"collapse__spread": lambda i: 1.0 if i % 3 == 0 else None}),  # measured now and then
        ("logits_run_away", {"logits__std": lambda i: 5.0 if i < 9 else 160.0}),
        ("gradient_spike", {"grad_norm__student": lambda i: 30.0 if i == 25 else 1.0}),
        ("steps_skipped", {"guard__skipped": lambda i: 0 if i < 7 else 2}),
        ("non_finite", {"non_finite": lambda i: ["loss/total"] if i == 3 else []}),
    ],
)
def test_each_alarm_rings_once_for_its_own_reason(name, changes):
    found = alarms(rows_with(**changes))
    assert [a.name for a in found] == ([name] if name else [])
    if name:
        over = {"non_finite", "steps_skipped", "gradient_spike"} & {name}
        assert over or found[0].over is None
        assert any(ch.isdigit() or "/" in ch for ch in found[0].sentence) and found[0].step > 0


def test_an_alarm_is_over_when_what_it_says_holds_no_longer():
    falls = {"collapse__least_share": lambda i: 0.1 if 20 <= i < 30 else 1.0}
    (alarm,) = alarms(rows_with(**(WATCHED | falls)))
    assert (alarm.name, alarm.step, alarm.over) == ("collapsed", 210, 310)
