"""A teacher's steps as a CUDA graph, without a GPU: a replay is the captured function called again.

The same with real graphs needs a GPU; there `dimo world train` always uses them.
"""

import math

import pytest
import torch

from dimo.errors import DimoError
from dimo.ursa import UrsaTransformer
from dimo.ursa.cuda_graph import ORDINARY
from dimo.worlds import denoising, teacher
from dimo.worlds.denoising import DenoisingSteps, TrainingState
from dimo.worlds.teacher import TeacherRecipe, encode, initialise, make_teacher, ursa_config
from dimo.worlds.tiles import TilesWorld

STEPS = ORDINARY + 5
WORLD = TilesWorld(frames=2, codes=16, strays=25)


@pytest.fixture
def captured(monkeypatch):
    """The functions that were captured."""
    functions = []
    monkeypatch.setattr(denoising, "record", lambda function, *_: (functions.append(function), function)[1])
    return functions


def training(graph, **more):
    recipe = TeacherRecipe(layers=1, hidden=32, heads=2, batch_size=4, steps=STEPS, **more)
    torch.manual_seed(0)
    model = UrsaTransformer(ursa_config(WORLD, recipe))
    initialise(model, WORLD.codebook())
    ids = encode(WORLD, WORLD.prompts)
    return DenoisingSteps(WORLD, recipe, model, ids, 0, torch.Generator().manual_seed(0), graph)


def weights(steps):
    return torch.cat([p.detach().flatten() for net in (steps.model, steps.ema) for p in net.parameters()])


def held(steps):
    """Where a graph reads and writes, so that no step may put another tensor in its place."""
    state = [x for one in steps.optimizers.values() for values in one.state.values() for x in values.values()]
    return [
        steps.prompt,
        steps.x_1,
        *(one.param_groups[0]["lr"] for one in steps.optimizers.values()),
        steps.ema_weight,
        *steps.ema.parameters(),
        *state,
    ]


@pytest.mark.parametrize("more", [{}, {"t_per": "frame", "t_shift": 2.6}, {"muon_lr": 8e-3}], ids=str)
def test_replays_make_the_ordinary_steps(captured, more):
    plain, graph, losses = training(False, **more), training(True, **more), []
    start = weights(plain)
    for index in range(STEPS):
        before = held(graph) if index else []
        plain.step(index), graph.step(index)
        losses.append((plain.loss.item(), pytest.approx(graph.loss.item(), rel=1e-4)))
        assert all(a is b for a, b in zip(before, held(graph)))
    assert [a for a, b in losses if a != b] == [] and len({a for a, _ in losses}) == STEPS
    rates = [[one.param_groups[0]["lr"] for one in steps.optimizers.values()] for steps in (plain, graph)]
    assert len(captured) == 2 and all(rate.dim() == 0 for rate in rates[1])
    assert rates[0] == pytest.approx([rate.item() for rate in rates[1]])
    assert (weights(plain) - weights(graph)).norm() < 1e-3 * (weights(plain) - start).norm()


def test_a_graph_goes_on_where_training_stopped(tmp_path, captured):
    whole, first, second = (training(True) for _ in range(3))
    for index in range(STEPS):
        whole.step(index)
        if index < 5:
            first.step(index)
    TrainingState(tmp_path / "half.pt", first).save(5)
    assert TrainingState(tmp_path / "half.pt", second).load() == 5
    rate = second.optimizers["adamw"].param_groups[0]["lr"]
    for index in range(5, STEPS):
        second.step(index)
    assert second.optimizers["adamw"].param_groups[0]["lr"] is rate and len(captured) == 4
    assert torch.equal(weights(whole), weights(second))


@pytest.mark.parametrize("other", [{"a": 1}, [1]], ids=str)
def test_another_file_in_its_place_is_a_sentence(tmp_path, other):
    torch.save(other, tmp_path / "half.pt")
    with pytest.raises(DimoError, match="half.pt is damaged: remove it to start afresh"):
        TrainingState(tmp_path / "half.pt", training(False)).load()


def test_who_is_stopped_while_the_teacher_is_scored_does_not_train_it_again(tmp_path, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(teacher, "KEEP_EVERY", 2)
    recipe = TeacherRecipe(layers=1, hidden=32, heads=2, batch_size=4, steps=4)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(teacher, "sample", stop)
        make_teacher(WORLD, recipe, tmp_path / "world")
    assert (tmp_path / "world.training.pt").exists()
    monkeypatch.setattr(DenoisingSteps, "step", stop)
    assert "validity" in make_teacher(WORLD, recipe, tmp_path / "world", videos_per_prompt=1)
    assert not (tmp_path / "world.training.pt").exists()


def test_training_starts_from_another_teachers_weights(tmp_path):
    small = {"layers": 1, "hidden": 32, "heads": 2, "batch_size": 4, "steps": 1}
    first = teacher.train_teacher(WORLD, TeacherRecipe(**small, seed=1), progress=False)
    teacher.write_checkpoint(tmp_path / "first", WORLD, first, 0.9, 3.0)
    # at so low a rate one step leaves the weights where they are
    second = TeacherRecipe(**small, seed=2, start_from=str(tmp_path / "first"), lr=1e-12)
    for name, weight in teacher.train_teacher(WORLD, second, progress=False).state_dict().items():
        torch.testing.assert_close(weight, first.state_dict()[name])
    with pytest.raises(DimoError, match="first has another hidden_size than the teacher to train"):
        make_teacher(WORLD, TeacherRecipe(start_from=second.start_from, **(small | {"hidden": 48})), tmp_path / "x")
    with pytest.raises(DimoError, match="shapes is no teacher of the tiles world with the same prompts"):
        make_teacher(WORLD, TeacherRecipe(start_from="shapes", **small), tmp_path / "x")


def test_times_per_sample_per_frame_and_mixed():
    seen = {}
    for t_per in ("sample", "frame", "mixed"):
        steps = training(False, t_per=t_per, t_shift=2.0, t_spread=0.7)
        steps.videos = 4000
        t = steps._times()
        t = t[:, None, None] if t_per == "sample" else t.unflatten(1, (WORLD.latents_shape[0], -1))
        assert (t == t[..., :1]).all() and t.min() > 0 and t.max() < 0.999  # the tokens of a frame share a time
        t = t[..., 0]
        seen[t_per] = (t == t[:, :1]).all(1).float().mean().item()
        # logit-normal around the shift's, whatever is drawn together
        assert torch.logit(t / 0.999).mean().item() == pytest.approx(-math.log(2.0), abs=0.05)
        assert torch.logit(t / 0.999).std().item() == pytest.approx(0.7, abs=0.05)
    assert (seen["sample"], seen["frame"]) == (1.0, 0.0) and seen["mixed"] == pytest.approx(0.5, abs=0.04)


def test_two_commands_do_not_make_one_teacher(tmp_path):
    refused = pytest.raises(DimoError, match=f"another process is making {tmp_path / 'world'}; wait for it, or give")
    with teacher._alone(tmp_path / "world"), refused:
        make_teacher(WORLD, TeacherRecipe(layers=1, hidden=32, heads=2, batch_size=4, steps=4), tmp_path / "world")
    assert list(tmp_path.iterdir()) == []


def test_muon_moves_the_matrices_of_layers_equally_in_all_directions():
    steps = training(False, muon_lr=8e-3)
    start = {name: p.detach().clone() for name, p in steps.model.named_parameters()}
    steps.step(0)
    moved = {name: p.detach() - start[name] for name, p in steps.model.named_parameters()}
    for name, change in moved.items():
        level = torch.linalg.svdvals(change) / (8e-3 * 0.2 * max(change.shape) ** 0.5) if change.dim() == 2 else None
        if ".layers." in name and level is not None:
            assert level[4] > 0.6 and level.max() < 1.3, name  # the gradient of few videos is of low rank
        else:
            assert change.abs().max().item() == pytest.approx(steps.recipe.lr, rel=0.01), name  # AdamW's first step


def test_shifted_times_lie_towards_the_noise():
    """P(t <= s) of uniform u with t = u / (u + shift (1 - u)) is shift s / (1 + (shift - 1) s)."""
    steps = training(False, t_shift=4.0)
    steps.videos = 20_000
    t = steps._times()
    for s in (0.05, 0.2, 0.5, 0.9):
        assert (t <= s).float().mean().item() == pytest.approx(4 * s / (1 + 3 * s), abs=0.015)


def test_times_may_be_logit_normal():
    """logit t has the median -log shift, and one standard deviation below it lie 15.9% of the times."""
    steps = training(False, t_shift=1.5, t_spread=0.7)
    steps.videos = 20_000
    logit = torch.logit(steps._times() / 0.999)
    for deviations, share in ((-1, 0.159), (0, 0.5), (2, 0.977)):
        assert (logit < deviations * 0.7 - math.log(1.5)).float().mean().item() == pytest.approx(share, abs=0.012)


def test_many_codes_start_as_a_linear_map_of_the_codebook():
    """Least squares of embeddings and head on the code vectors leaves 5% of their variance; text is random."""
    world = TilesWorld(codes=1000)
    torch.manual_seed(0)
    model = UrsaTransformer(ursa_config(world, TeacherRecipe(layers=1)))
    initialise(model, world.codebook())
    points = torch.nn.functional.normalize(world.codebook(), dim=-1)
    points = torch.cat([points, torch.ones(len(points), 1)], 1)
    for weight, std in ((model.model.embed_tokens.weight, 1.0), (model.lm_head.weight, 1 / 8)):
        rows = weight.detach()[-1000:]
        left = rows - points @ torch.linalg.lstsq(points, rows).solution
        assert left.square().mean().item() == pytest.approx(0.05 * std**2, rel=0.1)
        assert rows.square().mean().item() == pytest.approx(std**2, rel=0.3)


def test_a_matrix_of_a_layer_that_is_as_long_as_the_codebook_does_not_start_as_a_map_of_it():
    world = TilesWorld(codes=1000)
    torch.manual_seed(0)
    model = UrsaTransformer(ursa_config(world, TeacherRecipe(layers=1, intermediate=1024)))
    initialise(model, world.codebook())
    rows = model.model.layers[0].mlp.gate_proj.weight.detach()[-1000:]
    left = rows - world.codebook() @ torch.linalg.lstsq(world.codebook(), rows).solution
    assert left.square().mean() > 0.9 * rows.square().mean()
