"""scripts/recipe.py without a GPU: what it would put into a CUDA graph is the trainer's step."""

import contextlib

import recipe
import torch

from dimo.config import load_config
from dimo.train.trainer import Trainer


class _Stream:
    def wait_stream(self, other):
        pass


def test_the_graph_of_the_recipe_makes_the_trainers_steps(monkeypatch, tmp_path):
    for name, stand_in in {
        "current_stream": _Stream,
        "Stream": _Stream,
        "synchronize": lambda: None,
        "stream": contextlib.nullcontext,
        "graph": lambda *_, **__: contextlib.nullcontext(),  # the step is made at once, and the state put back
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)

    class Replayed:
        def register_generator_state(self, generator):
            pass

        def replay(self):
            graph._step()

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Replayed)
    monkeypatch.setattr(recipe, "CHECKED", 1)
    keys = ["model.device=cpu", "training.max_train_steps=40", "optim.warmup_steps=1", "optim.weight_decay=0.1"]
    keys += ["distill.batch_size_per_gpu=32"]
    trainer = Trainer(load_config("shapes_long", [*keys, f"experiment.output_dir={tmp_path}"]))
    trainer.x_init.capacity = 64  # full after two steps
    graph = recipe.Graph(trainer, [0.5, 0.9])
    assert graph.check() < 3e-3  # of what the weights moved: sums in another order
    start = graph.state()
    before = [p.clone() for p in graph.averages[0]]
    graph.step(2, 40)
    after = [p for p in trainer.networks.student.parameters() if p.requires_grad]
    keep = (1 + 2) / (10 + 2)  # the average warms up as the trainer's
    for average in graph.averages:
        assert all(torch.allclose(a, keep * b + (1 - keep) * c, atol=1e-6) for a, b, c in zip(average, before, after))
    once = graph.state()
    graph.load_state(start)  # as a run does that goes on
    assert not all(torch.equal(x, once[name]) for name, x in graph.state().items())
    graph.step(2, 40)
    assert all(torch.equal(x, once[name]) for name, x in graph.state().items())
