"""The evaluation run, the alarms and the ablation."""

import json
from pathlib import Path

import pytest
import torch
from forks import python
from safetensors.torch import load_file

from dimo.config import load_config
from dimo.errors import DimoError
from dimo.evaluation.ablate import ablate, format_ablation
from dimo.evaluation.alarms import alarms
from dimo.evaluation.evaluate import evaluate, evaluate_to_folder, format_table, load_student
from dimo.evaluation.metrics import columns_of
from dimo.ursa import sample, save_student
from dimo.ursa.sampler import Trajectory
from dimo.worlds.oracle import score

TINY = Path(__file__).parent / "data" / "tiny-ursa"


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
    keys = ["validity", "adherence", "token_accuracy", "coverage", "coverage_detail", "videos", "seconds_per_video"]
    assert all(list(row) == keys for row in rows.values()) and "undefined" in format_table(rows)
    assert columns_of(rows) == [key for key in keys if key not in ("coverage_detail", "videos")]


def test_every_batch_of_every_row_starts_from_the_same_noise(world, ursa, monkeypatch):
    started = []

    def recording(*arguments, **options):
        way = Trajectory()
        codes = sample(*arguments, **options, trajectory=way)
        started.append(way.x_t[0])
        return codes

    monkeypatch.setattr("dimo.evaluation.comparison.sample", recording)
    rows, codes = evaluate(world, ursa, ursa.transformer, videos_per_prompt=1, teacher_steps=(1, 3), batch_size=20)
    del started[7], started[0]  # each network's warm-up before the clock starts
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
    assert (tmp_path / "out" / "sheet.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(DimoError, match="latents_shape"):
        evaluate_to_folder(load_config("smoke", ["distill.width=40"]), tmp_path / "student", tmp_path, progress=False)


def test_a_student_that_does_not_fit_is_refused(ursa, tmp_path):
    with pytest.raises(DimoError, match="does not exist"):
        load_student(ursa, tmp_path)
    torch.save({"a": torch.zeros(1)}, tmp_path / "student.pt")
    with pytest.raises(DimoError, match="do not fit this model: it lacks"):
        load_student(ursa, tmp_path)


def rows_with(count=40, **changes):
    rows = []
    for i in range(count):
        row = {"step": 10 * (i + 1), "loss/aux": 0.5, "lambda_ent": 0.01, "codes/used": 10.0, "grad_norm/student": 1.0}
        rows.append(row | {name.replace("__", "/"): change(i) for name, change in changes.items()})
    return rows


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        (None, {}),
        ("entropy_floor", {"lambda_ent": lambda i: 0.05 if i >= 20 else 0.01}),
        ("aux_lags", {"loss__aux": lambda i: 0.5 if i < 15 else 0.9}),
        ("codes_lost", {"codes__used": lambda i: 10 if i < 20 else 4}),
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
        assert any(ch.isdigit() or "/" in ch for ch in found[0].sentence) and found[0].step > 0


def test_ablation_tunes_on_one_seed_reports_on_others_and_continues(tmp_path, no_pictures):
    small = [
        "training.max_train_steps=2",
        "evaluation.videos_per_prompt=1",
        "evaluation.teacher_steps=[1]",
        "distill.batch_size_per_gpu=2",
        "model.device=cpu",
        "optim.lr=1e-3",
        "optim.aux_lr=4e-3",
        "optim.muon_lr=5e-3",
    ]
    table = ablate(tmp_path, "smoke", small, [1e-4, 2e-4], 2, ["recipe", "literal"])
    result = json.loads((tmp_path / "ablation.json").read_text())
    assert list(result) == ["recipe", "literal"] and len(result["recipe"]["seeds"]) == 2
    assert len(list(tmp_path.glob("*-seed100"))) == 4 and len(table.splitlines()) == 4
    for lr in (1e-4, 2e-4):  # all rates move together, in the proportions of the command's own
        optim = load_config(tmp_path / f"recipe-lr{lr:g}-seed100" / "config.yaml").optim
        assert (optim.lr, optim.aux_lr, optim.muon_lr) == pytest.approx((lr, 4 * lr, 5 * lr))
    written = {f: f.stat().st_mtime_ns for f in tmp_path.glob("*/report.json")}
    assert len(written) == 8
    assert ablate(tmp_path, "smoke", small, [1e-4, 2e-4], 2, ["recipe", "literal"]) == table
    assert written == {f: f.stat().st_mtime_ns for f in tmp_path.glob("*/report.json")}
    longer = [key for key in small if "max_train_steps" not in key] + ["training.max_train_steps=3"]
    ablate(tmp_path, "smoke", longer, [1e-4], 1, ["recipe"])  # a report of fewer steps does not stand for it
    renewed = {f.parent.name for f, when in written.items() if f.stat().st_mtime_ns != when}
    assert renewed == {"recipe-lr0.0001-seed100", "recipe-lr0.0001-seed0"}
    with pytest.raises(DimoError, match="methods must be among .* got .magic."):
        ablate(tmp_path, "smoke", small, [1e-4], 1, ["magic"])


def test_runs_of_an_ablation_side_by_side_are_the_same_runs(tmp_path):
    small = ["training.max_train_steps=2", "evaluation.videos_per_prompt=1", "distill.batch_size_per_gpu=2",
             "evaluation.teacher_steps=[1]", "model.device=cpu"]  # fmt: skip

    def run(jobs, *more):
        words = [
            "-m",
            "dimo",
            "ablate",
            "-c",
            "smoke",
            "-o",
            str(tmp_path / str(jobs)),
            "--lrs",
            "1e-4",
            "--seeds",
            "1",
        ]
        words += ["--method", "recipe", "--jobs", str(jobs), *small, *more]
        return python.run(words, capture_output=True, text=True)

    assert [run(jobs).returncode for jobs in (1, 2)] == [0, 0]
    one, other = (
        load_file(
            tmp_path / str(jobs) / "recipe-lr0.0001-seed0/checkpoints/final/student/diffusion_pytorch_model.safetensors"
        )
        for jobs in (1, 2)
    )
    assert all(torch.allclose(one[name], other[name], atol=1e-6) for name in one)
    refused = run(2, "distill.p_corrupt=0.5")
    assert refused.returncode == 2 and "another configuration" in refused.stderr, refused.stderr


@pytest.mark.parametrize(
    ("found", "best", "starred"),  # (validity, coverage) by rate
    [
        ({1e-4: (0.3, 0.97), 1e-3: (0.99, 0.03)}, 1e-4, False),  # every video valid, and nearly all the same
        ({1e-4: (0.3, 0.97), 1e-3: (0.9, 0.5)}, 1e-4, False),  # half collapsed, and ahead even by the product
        ({1e-4: (0.3, 0.81), 1e-3: (0.4, 0.99)}, 1e-3, False),
        ({1e-4: (0.5, 0.1), 1e-3: (0.2, 0.6)}, 1e-3, True),
        ({1e-4: (0.0, None), 1e-3: (0.1, None), 2e-3: (0.05, None)}, 1e-3, True),
    ],
)
def test_a_collapsed_student_does_not_win_its_rate(tmp_path, monkeypatch, found, best, starred):
    def trained(run):
        validity, coverage = found[run.lr]
        return {"validity": validity, "adherence": 1.0, "coverage": coverage}

    monkeypatch.setattr("dimo.evaluation.ablate.Run.__call__", trained)
    table = ablate(tmp_path, "smoke", [], list(found), 1, ["recipe"])
    row = json.loads((tmp_path / "ablation.json").read_text())["recipe"]
    assert row["lr"] == best and {float(lr): row["coverage"] for lr, row in row["tuning"].items()} == {
        lr: coverage for lr, (_, coverage) in found.items()
    }
    assert (f"{best:g}*" in table) == starred and "coverage of at least 0.8" in table.splitlines()[-1]


def test_an_ablation_without_an_oracle_is_refused_before_anything_is_trained(tmp_path):
    with pytest.raises(DimoError, match="ablations need a built-in world, .*tiny-ursa is not one"):
        ablate(tmp_path / "out", "smoke", [f"distill.teacher_ckpt={TINY}"], [1e-4], 1, ["recipe"])
    assert not (tmp_path / "out").exists()


def test_the_ablation_table_by_hand():
    seeds = [{"validity": v, "adherence": 1.0, "coverage": c} for v, c in ((0.5, 0.9), (0.7, None))]
    tuning = {"0.001": {"validity": 0.5, "adherence": 1.0, "coverage": 0.9}}
    text = format_ablation({"recipe": {"lr": 0.001, "seeds": seeds, "tuning": tuning}})
    assert "0.600 +- 0.141" in text and "0.900 +- 0.000 (1 of 2)" in text
    never = [seed | {"coverage": None} for seed in seeds]
    assert "undefined" in format_ablation({"recipe": {"lr": 0.001, "seeds": never, "tuning": tuning}})
