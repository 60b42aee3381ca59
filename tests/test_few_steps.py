"""Students of several passes: training gives each pass what the sampler, and URSA's pipeline, will give it."""

import copy
import math

import pytest
import torch
from safetensors.torch import load_file

from dimo.commands.export import Student, readme_of
from dimo.commands.sample import Request, open_sampler
from dimo.config import load_config
from dimo.distill.few_steps import draft_x_init
from dimo.distill.stages import Step
from dimo.errors import DimoError
from dimo.evaluation.evaluate import evaluate, open_comparison, student_row
from dimo.train.trainer import Trainer
from dimo.ursa import MetricPath, MixturePath, sample
from dimo.ursa.sampler import Trajectory, pipeline_steps, student_times, timesteps
from dimo.worlds import checkpoint_folder

GRID = (3, 4, 4)
KEYS = [
    "distill.student_steps=3", "training.gradient_accumulation_steps=2", "distill.batch_size_per_gpu=4",
    "distill.t_draws=1", "distill.p_corrupt=0.5", "distill.lambda_ent=0.02", "optim.warmup_steps=1",
    "experiment.save_every=2", "experiment.sample_every=99", "experiment.log_every=1", "model.device=cpu",
]  # fmt: skip


@pytest.fixture
def step(ursa, generator):
    """Stage 2 of six rows, the second of which comes from the x_init mix."""
    txt_ids = ursa.tokenize(["blue bar moving up", "pink square moving left", "green corner moving down"] * 2, 4)
    x_init = torch.randint(ursa.path.codebook_size, (6, 48), generator=generator)
    return Step(txt_ids=txt_ids, x_init=x_init, corrupted=torch.arange(6) == 1)


def drawn(step, ursa, times, gain=1.0, network=None, seed=3, **changes):
    made = copy.copy(step)
    vars(made).update(changes)
    generator = torch.Generator().manual_seed(seed)
    draft_x_init(made, network or ursa.transformer, ursa.path, GRID, times, gain, generator)
    return made


def naive_rates(path, x_1, x_t, t):
    """Rates (K,) of one token from the formula, in float64; upstream has none at t = 0."""
    if t == 0:
        return torch.zeros(path.codebook_size, dtype=torch.float64)
    vectors, beta = path.codebook.double(), path.c * (t / (1 - t)) ** path.alpha
    d = (vectors - vectors[x_1]).square().sum(-1)
    slope = path.c * path.alpha * t ** (path.alpha - 1) / (1 - t) ** (path.alpha + 1)
    return (-beta * d).softmax(-1) * slope * (d[x_t] - d).clamp(min=0)


def test_the_pipelines_first_step_is_idle_on_the_metric_path_only(generator):
    codebook = torch.randn(6, 3, generator=generator)
    metric, mixture, n = MetricPath(codebook, 0.9, 3.0), MixturePath(codebook), 40_000
    x_1, x_t = torch.full((n,), 2), torch.full((n,), 5)
    for t, t_next in ((0.0, 1 / 3), (1 / 3, 2 / 3)):
        moved = metric.jump(x_1, x_t, t, t_next - t, generator)
        rates = naive_rates(metric, 2, 5, t)
        total = rates.sum()
        want = torch.eye(6, dtype=torch.float64)[5]
        if total > 0:
            stays = torch.exp(-(t_next - t) * total)
            want = stays * want + (1 - stays) * rates / total
        share = torch.bincount(moved, minlength=6) / n
        assert (share - want).abs().max() < 5 * 0.5 / math.sqrt(n)
    assert torch.equal(metric.jump(x_1, x_t, 0.0, 1 / 3, generator), x_t)
    assert not torch.equal(mixture.jump(x_1, x_t, 0.0, 1 / 3, generator), x_t)
    for passes, shift in ((1, 1.0), (2, 1.0), (4, 3.3)):
        idle = passes > 1
        assert pipeline_steps(passes, shift, metric.moves_at_0) == passes + idle
        assert student_times(metric, passes, shift) == timesteps(passes + idle, shift)[idle:]
        assert student_times(mixture, passes, shift) == timesteps(passes, shift)


def test_every_pass_is_trained_on_what_the_sampler_gives_it(step, ursa):
    times = student_times(ursa.path, 3, ursa.shift)
    made, seen = drawn(step, ursa, times), Trajectory()
    g = torch.Generator().manual_seed(3)
    torch.randint(3, (1,), generator=g)  # the first row's pass
    sample(ursa.transformer, ursa.path, step.txt_ids, GRID, times, x_init=step.x_init, generator=g, trajectory=seen)
    assert made.student_step[1] == 1  # of the mix
    for row, number in enumerate(made.student_step.tolist()):
        assert torch.equal(made.x_init[row], seen.x_t[number - 1][row])
    others = made.student_step[[0, 2, 3, 4, 5]].tolist()
    assert sorted(set(others)) == [1, 2, 3] and (made.x_init != step.x_init).any(1).tolist() == [
        number > 1 for number in made.student_step.tolist()
    ]
    many = [drawn(step, ursa, times[:2], seed=seed).student_step[0].item() for seed in range(60)]
    assert 15 < many.count(1) < 45 and set(many) == {1, 2}
    chunked = drawn(step, ursa, times, dense=False)
    assert torch.equal(chunked.x_init, made.x_init) and not made.x_init.requires_grad


def test_drafts_are_as_sharp_as_the_final_weights_make_them(step, ursa):
    times, sharp = student_times(ursa.path, 2), copy.deepcopy(ursa.transformer)
    sharp.model.norm.weight.data.mul_(4)
    for dense in (True, False):
        gained = drawn(step, ursa, times, 4.0, dense=dense)
        assert torch.equal(gained.x_init, drawn(step, ursa, times, network=sharp).x_init)
    assert not torch.equal(gained.x_init, drawn(step, ursa, times).x_init)
    with pytest.raises(DimoError, match="times must be ascending"):
        drawn(step, ursa, [0.5, 0.2])


def trainer_in(folder, *more):
    return Trainer(load_config("smoke", [*KEYS, f"experiment.output_dir={folder}", *more]))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Four updates, in one go."""
    trainer = trainer_in(tmp_path_factory.mktemp("few") / "run", "training.max_train_steps=4")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dimo.views.sheets.save_sheet", lambda *_: None)
        return trainer.train(progress=False).path


def test_a_killed_run_goes_on_to_the_same_bits(run, tmp_path, monkeypatch):
    monkeypatch.setattr("dimo.views.sheets.save_sheet", lambda *_: None)
    begun = trainer_in(tmp_path, "training.max_train_steps=4")
    inner = begun.step
    begun.step = lambda index: inner(index) if index < 3 else pytest.fail("killed")
    with pytest.raises(BaseException, match="killed"):
        begun.train(progress=False)
    trainer_in(tmp_path, "training.max_train_steps=4").train(progress=False)
    for name in ("student", "aux", "ema"):
        one, other = (load_file(f / "checkpoints" / "step-00000004" / f"{name}.safetensors") for f in (run, tmp_path))
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_micro_batch_repeats_its_pass_at_the_same_draft(tmp_path):
    trainer, seen = trainer_in(tmp_path, "training.max_train_steps=2"), {3: [], 6: []}
    start = trainer.networks.student.model.layers[0].mlp.up_proj.weight.detach().clone()
    for number, step, _ in trainer.walk(0):
        if number in seen:
            seen[number].append((step.student_step, step.x_init, step.x_hat))
    assert len(seen[3]) == 2 and all(
        torch.equal(a, b) for one, other in zip(seen[3], seen[6]) for a, b in zip(one, other)
    )
    assert not torch.equal(seen[3][0][1], seen[3][1][1])
    assert not torch.equal(start, trainer.networks.student.model.layers[0].mlp.up_proj.weight)


def test_sampled_and_evaluated_in_its_own_passes(run, ursa, world, monkeypatch):
    final, times = run / "checkpoints" / "final", student_times(ursa.path, 3)
    sampler = open_sampler(Request(student_ckpt=str(final), device="cpu"), ["blue bar moving up"])
    ids = ursa.tokenize(["blue bar moving up"], 4)
    want = sample(sampler.network, ursa.path, ids, GRID, times, generator=torch.Generator().manual_seed(7))
    assert sampler.request.steps == 3 and torch.equal(sampler.codes("blue bar moving up", 7).flatten(1), want)
    assert open_sampler(Request(student_ckpt=str(final), steps=1), ["blue bar moving up"]).request.steps == 1
    comparison, _ = open_comparison(load_config("smoke", ["model.device=cpu"]), final)  # that says nothing of 3
    for network in ("student", "untrained"):
        named = [name for name in comparison.rows if name.startswith(network)]
        assert named == [f"{network}_{end}" for end in ("1", "1_argmax", "3", "3_argmax")]
    rows, codes = evaluate(
        world, ursa, sampler.network, videos_per_prompt=1, teacher_steps=(4,), student_steps=3, seed=5
    )
    assert student_row(rows) == "student_3" and rows["student_3"]["videos"] == len(world.prompts)
    generator = torch.Generator().manual_seed(5 * 1_000_003)
    ids = ursa.tokenize(world.prompts, 4)
    assert torch.equal(codes["student_3"], sample(sampler.network, ursa.path, ids, GRID, times, generator=generator))
    generator.manual_seed(5 * 1_000_003)
    start = sample(ursa.transformer, ursa.path, ids, GRID, times, generator=generator, argmax=True)
    assert torch.equal(codes["untrained_3_argmax"], start)
    one = sample(sampler.network, ursa.path, ids, GRID, 1, generator=generator.manual_seed(5 * 1_000_003))
    assert torch.equal(codes["student_1"], one)


def test_an_exported_student_says_how_the_pipeline_gives_it_its_passes(tmp_path):
    student = Student({"w": torch.zeros(1)}, 9, "checkpoints/final")
    folder = checkpoint_folder("shapes")
    for passes, steps in ((1, 1), (2, 3), (4, 5)):
        config = load_config("smoke", [f"distill.student_steps={passes}", f"distill.teacher_ckpt={folder}"])
        readme = readme_of(tmp_path / "out", config, student)
        assert f"num_inference_steps={steps}, guidance_scale=1" in readme and f"`num_inference_steps={steps}`" in readme
        assert f"--num_inference_steps {steps} " in readme and ("moves no token" in readme) == (passes > 1)
    for passes in (0, 1001):
        with pytest.raises(DimoError, match=rf"student_steps must lie in \[1, 1000\], got {passes}"):
            load_config("smoke", [f"distill.student_steps={passes}"])
