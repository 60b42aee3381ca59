"""What docs/extending.md shows is run as it stands; then the new world and the new metric are looked for."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
import torch

from dimo.commands.cli import parse
from dimo.distill.losses import student_loss
from dimo.distill.stages import ESTIMATORS
from dimo.errors import DimoError
from dimo.evaluation.evaluate import format_table
from dimo.evaluation.metrics import REFERENCE_FREE, SCORED, Videos, legend, measure
from dimo.ursa import load_ursa
from dimo.worlds import checkpoint_folder, load_world, video_size
from dimo.worlds.oracle import score
from dimo.worlds.registry import WORLDS
from dimo.worlds.teacher import TeacherRecipe, encode, make_teacher

PAGE = Path(__file__).parent.parent / "docs" / "extending.md"
REGISTRIES = (WORLDS, SCORED, REFERENCE_FREE, ESTIMATORS)
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page's code as a module, executed in an empty folder; what it registers is taken back at the end."""
    folder, before = tmp_path_factory.mktemp("page"), [dict(d) for d in REGISTRIES]
    file = folder / "extending_page.py"
    file.write_text("\n\n".join(BLOCK.findall(PAGE.read_text(encoding="utf-8"))), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, file.stem, module)  # dataclasses look their module up there
        patch.setattr("dimo.views.sheets.save_sheet", lambda *_: None)  # to draw takes longer than all the rest
        patch.chdir(folder)
        spec.loader.exec_module(module)
        yield module
    for registry, was in zip(REGISTRIES, before):
        registry.clear()
        registry.update(was)


def test_the_new_world_is_trained_and_scored(page):
    world = page.RampWorld()
    assert load_world("worlds/ramp") == world and video_size("worlds/ramp") == (9, 16, 16)
    assert json.loads(Path("worlds/ramp/world.json").read_text()) == {"world": "ramp", "frames": 3, "shades": 5}
    assert page.run.status()["step"] == 2 and page.settings.distill.max_prompt_length == 2
    written = json.loads((page.run.path / "report.json").read_text())
    assert {"validity", "adherence", "coverage_detail"} <= written["student_1"].keys()
    assert list(written["student_1"]["coverage_detail"]) == ["first_shade", "first_shade_per_prompt"]
    frames = load_ursa("worlds/ramp").decode(torch.tensor([[0] * 4 + [2] * 4 + [4] * 4]).view(1, 3, 2, 2))
    assert frames.shape == (1, 9, 16, 16, 3) and [frames[0, f].unique().tolist() for f in (0, 4, 8)] == [
        [0],
        [0.5],
        [1],
    ]


def test_the_new_worlds_oracle_is_right(page):
    world = page.RampWorld(frames=2, shades=4)
    codes = torch.tensor([[0] * 4 + [1] * 4, [1] * 4 + [0] * 4, [3, 3, 3, 3, 0, 0, 0, 1], [2] * 8])
    scores = score(world, codes, ["getting lighter", "getting lighter", "getting lighter", "getting darker"])
    assert scores.valid.tolist() == [True, True, False, False]
    assert scores.accuracy.tolist() == [1.0, 1.0, 0.875, 0.5]
    assert scores.adherent.tolist() == [True, False, True, True]
    assert scores.prompt.tolist()[:3] == [0, 1, 0] and scores.free["first_shade"][0].tolist()[:3] == [0, 1, 3]


def test_the_command_line_knows_the_new_world(page, monkeypatch, tmp_path):
    args = parse(["world", "train", "ramp", "-o", "x", "--shades", "7", "--hidden", "32"])
    assert (args.world, args.shades, args.frames, args.hidden) == ("ramp", 7, 3, 32)
    with pytest.raises(DimoError, match="does not take --background_shades 7"):
        parse(["world", "train", "ramp", "-o", "x", "--background_shades", "7"])  # of another world
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DimoError, match="world ramp ships without a teacher: train one with `dimo world train ramp -o"):
        checkpoint_folder("ramp")


def test_prompts_of_different_lengths_are_padded_as_the_tokenizer_does(page, monkeypatch, tmp_path):
    class Uneven(page.RampWorld):
        prompts = ["lighter", "getting darker"]

        def decoder(self):
            return None

    recipe = TeacherRecipe(layers=1, hidden=32, heads=2, batch_size=2, steps=1)
    make_teacher(Uneven(), recipe, tmp_path / "made", videos_per_prompt=1)
    ursa = load_ursa(tmp_path / "made")
    assert torch.equal(ursa.tokenize(Uneven.prompts, 2), encode(Uneven(), Uneven.prompts))
    assert ursa.vae is None and not (tmp_path / "made" / "vae").exists()


def test_the_new_metric_is_in_the_report(page):
    written = json.loads(Path("runs/again/report.json").read_text())
    assert all(0 <= row["stillness"] <= 1 for row in written.values())
    assert "stillness" in format_table(written).split()
    assert "stillness (lower is better): share of tokens that are as in the latent frame before." in legend(written)
    codes = torch.tensor([[[[1, 2]], [[1, 3]], [[1, 3]]]])  # (1, 3, 1, 2): 3 of 4 tokens stay
    assert (
        page.stillness(Videos(codes, ["x"], 1, 1.0)) == 0.75
        and page.stillness(Videos(codes[:, :1], ["x"], 1, 1.0)) is None
    )


def test_the_new_metric_needs_no_oracle(page):
    codes = torch.tensor([[[[1]], [[1]]], [[[1]], [[2]]]])
    row = measure(Videos(codes, ["x", "x"], 2, 1.0))
    assert row["stillness"] == 0.5 and row["codes_used"] == 2 and row["diversity"] == 0.5


def test_the_new_estimator_gives_its_gradient_to_the_student(page):
    assert page.ratio.config.distill.estimator == "log_ratio" and Path("runs/ratio/checkpoints/final").is_dir()
    step, _ = page.ratio.step(2)
    logits = step.student.logits().detach().requires_grad_(True)
    draws = len(step.x_t) // len(step.x_hat)
    x = step.x_hat.repeat(draws, 1)
    gap = (step.teacher.log_prob(x) - step.aux.log_prob(x)).view(draws, *step.x_hat.shape).mean(0)
    others = (gap.sum(0) - gap) / (len(gap) - 1)
    log_p = logits.log_softmax(-1).gather(-1, step.x_hat[..., None])[..., 0]
    (want,) = torch.autograd.grad(-((gap - others) * log_p).mean(), logits)
    student = step.student.with_states(logits.detach().requires_grad_(True))
    made = student_loss(
        student.repeat(draws), step.teacher, step.aux, x, step.logp.repeat(draws, 1), step.entropy.repeat(draws, 1),
        beta=step.beta, advantage=step.advantage, w_policy=step.w_policy,
    )  # fmt: skip
    (got,) = torch.autograd.grad(made.total, student.states)
    assert want.abs().max() > 1e-4 and torch.allclose(got, want, atol=1e-6)
