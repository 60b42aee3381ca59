"""Two real processes that train a world's teacher together, against one gradient of all their videos."""

import json

import torch
from processes import launch_forked, run_script
from torch.nn import functional as F

from dimo.ursa import UrsaTransformer, visual_logits
from dimo.worlds import load_world
from dimo.worlds.teacher import TeacherRecipe, initialise, ursa_config
from dimo.worlds.tiles import TilesWorld

WORLD = TilesWorld(frames=2, codes=16)
RECIPE = TeacherRecipe(layers=1, hidden=32, heads=2, batch_size=6, steps=40, muon_lr=8e-3)
# `dimo`, but for the scores: they are taken of one video for each prompt
DIMO = "import dimo.worlds.teacher as t; t.SCORED = 1; from dimo.__main__ import main; raise SystemExit(main())"
STEPS = f"""
import sys, torch, torch.distributed as dist
from dimo.errors import DimoError
from dimo.ursa import UrsaTransformer
from dimo.worlds import denoising
from dimo.worlds.denoising import DenoisingSteps, rank
from dimo.worlds.teacher import TeacherRecipe, encode, initialise, ursa_config
from dimo.worlds.tiles import TilesWorld
dist.init_process_group("gloo")
world, recipe, seen, found = {WORLD}, {RECIPE}, [], []
torch.manual_seed(0)
model = UrsaTransformer(ursa_config(world, recipe))
initialise(model, world.codebook())
loss = denoising.denoising_loss
def spy(network, *batch):
    seen.append([x.clone() for x in batch[:3]])
    return loss(network, *batch)
denoising.denoising_loss = spy
steps = DenoisingSteps(
    world, recipe, model, encode(world, world.prompts), 0, torch.Generator().manual_seed(rank()), graph=False
)
reduce = dist.all_reduce
dist.all_reduce = lambda x: (reduce(x), found.append(x.clone()))
for index in range(3):
    steps.step(index)
end = torch.cat([p.detach().flatten() for p in model.parameters()])
torch.save({{"batches": seen, "gradients": found, "end": end}}, f"rank{{rank()}}.pt")
"""


def test_the_gradient_is_that_of_all_videos_and_the_weights_stay_the_same(tmp_path):
    run_script(tmp_path, STEPS)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    assert torch.equal(first["end"], second["end"])
    txt_ids, x_t, x_1 = (torch.cat(parts) for parts in zip(first["batches"][0], second["batches"][0]))
    assert len(x_1) == RECIPE.batch_size and not torch.equal(x_1[:3], x_1[3:])
    torch.manual_seed(0)
    model = UrsaTransformer(ursa_config(WORLD, RECIPE))
    initialise(model, WORLD.codebook())
    F.cross_entropy(visual_logits(model, txt_ids, x_t, WORLD.latents_shape).flatten(0, 1), x_1.flatten()).backward()
    joint = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert torch.allclose(first["gradients"][0], joint, rtol=1e-4, atol=1e-6 * joint.abs().max())


def command(folder, out, **changes):
    given = {"frames": 2, "codes": 16, "layers": 1, "hidden": 32, "heads": 2, "batch_size": 6, "steps": 4} | changes
    flags = [f"--{name}={value}" for name, value in given.items()]
    return launch_forked(folder, "-c", DIMO, "world", "train", "tiles", "-o", out, *flags)


def test_the_command_started_by_torchrun_writes_one_teacher(tmp_path):
    done = command(tmp_path, "world")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("validity") == 1 and load_world(tmp_path / "world") == WORLD
    assert json.loads((tmp_path / "world/transformer/config.json").read_text())["hidden_size"] == 32


def test_videos_that_cannot_be_shared_evenly_are_refused(tmp_path):
    done = command(tmp_path, "world", batch_size=7)
    assert done.returncode == 2 and "batch_size 7 cannot be shared evenly by 2 processes" in done.stderr
