"""Sequence parallelism: two processes that share every sample against one that has it alone, in float64."""

import pytest
import torch
from processes import run_script

from dimo.config import load_config
from dimo.errors import DimoError

SETTINGS = [
    "model.device=cpu", "distill.batch_size_per_gpu=2", "distill.w_kd=0.3", "distill.lambda_ent=0.02",
    "distill.w_reinforce=0.5", "distill.guidance_scale=2", "distill.t_per=frame", "optim.optimizer=adamw",
    "model.train_head=true", "model.aux_shared_layers=1", "training.gradient_accumulation_steps=2",
]  # fmt: skip

# Two steps in float64, then metrics; everything that the process has seen goes to a file.
TWO_STEPS = """
import sys
import torch
import dimo.train.trainer as module
from dimo.config import load_config

load, shorten = module.load_ursa, torch.Tensor.float


def load_double(*args, **kwargs):
    ursa = load(*args, **kwargs)
    ursa.transformer.double()
    return ursa


def two_steps(keys):
    module.load_ursa = load_double
    torch.Tensor.float = lambda self: self if self.dtype == torch.float64 else shorten(self)  # losses do
    trainer = module.Trainer(load_config("smoke", keys))
    norms, drawn, held = [], [], []
    predict = trainer.networks.student.hidden
    trainer.networks.student.hidden = lambda *a: held.append(predict(*a)) or held[-1]
    for index in range(2):
        step, values = trainer.step(index)
        norms.append([float(values["grad_norm/aux"]), float(values["grad_norm/student"])])
        drawn.append({k: getattr(step, k) for k in ("txt_ids", "x_init", "x_hat", "logp", "t", "x_t", "reward")})
    metrics = trainer.metrics(step)
    tensors, _ = trainer.state()
    torch.Tensor.float, module.load_ursa = shorten, load
    return {"norms": norms, "drawn": drawn, "metrics": metrics, "tensors": tensors, "held": held[0].shape[1]}, trainer


if __name__ == "__main__":
    made, trainer = two_steps(sys.argv[2:])
    assert trainer.engine.kind == sys.argv[1]
    torch.save(made, f"{sys.argv[1]}-rank{trainer.engine.rank}.pt")
"""


@pytest.fixture(scope="module")
def alone():
    names: dict = {"__name__": "two_steps"}
    exec(TWO_STEPS, names)
    return names["two_steps"](SETTINGS)[0]


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_two_that_share_a_sample_make_the_steps_of_one(tmp_path, alone, engine):
    more = ["training.sequence_parallel=2", "training.num_processes=2", "model.activation_checkpointing=selective"]
    run_script(tmp_path, TWO_STEPS, engine, *SETTINGS, *more, engine=engine)
    ranks = [torch.load(tmp_path / f"{engine}-rank{rank}.pt") for rank in range(2)]
    length = sum(rank["held"] for rank in ranks)
    assert length == alone["held"] and length % 2 == 1  # 53 positions: one has 27, the other 26
    for rank in ranks:
        for got, want in zip(rank["drawn"], alone["drawn"]):
            for key, value in want.items():
                assert torch.allclose(got[key].double(), value.double(), rtol=1e-9, atol=1e-12), key
        assert torch.allclose(torch.tensor(rank["norms"]), torch.tensor(alone["norms"]), rtol=1e-9)
        for key, value in alone["metrics"].items():
            if key != "logits/std":  # each process looks at tokens of its own
                assert rank["metrics"][key] == pytest.approx(value, rel=1e-5), key
    for name, weights in alone["tensors"].items():
        for key, value in weights.items():
            assert torch.allclose(ranks[0]["tensors"][name][key], value, rtol=1e-7, atol=1e-9), (name, key)


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ([], "sequence_parallel must divide training.num_processes=1, got 2"),
        (["training.num_processes=2", "model.backend=upstream"], "sequence_parallel needs model.backend=native"),
        (["training.num_processes=2", "distill.teacher=exact"], "sequence_parallel needs distill.teacher=network"),
    ],
)
def test_what_cannot_be_shared_is_refused(keys, sentence):
    with pytest.raises(DimoError, match=sentence):
        load_config("smoke", [*SETTINGS, "training.sequence_parallel=2", *keys])


ALONE = """
import pytest
from dimo.config import load_config
from dimo.errors import DimoError
from dimo.train.trainer import Trainer

keys = ["model.device=cpu", "optim.optimizer=adamw", "training.num_processes=3", "training.sequence_parallel=3"]
with pytest.raises(DimoError, match="sequence_parallel=3 must divide the number of processes, 2"):
    Trainer(load_config("smoke", keys))
"""


def test_a_launch_of_another_number_is_refused(tmp_path):
    run_script(tmp_path, ALONE)
