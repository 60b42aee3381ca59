"""Metrics of a step, and their means over the steps between two rows."""

from types import SimpleNamespace

import pytest
import torch

from dimo.train.metrics import Averages, gaps_by_t, measured


def step_of(t, gap):
    one = torch.ones(gap.shape)
    gaps = SimpleNamespace(entropy_teacher=one, entropy_aux=one, total_variation=gap)
    rest = dict.fromkeys(("loss", "distill", "logits_std"), torch.tensor(1.0))
    rest |= {"aux_losses": [torch.tensor(1.0)], "baseline": None, "kd": None, "corrupted": torch.zeros(3)}
    return SimpleNamespace(t=t, gaps=gaps, entropy=one, reward=one, **rest)


def test_the_gap_of_a_quarter_of_t_is_the_mean_over_its_tokens_of_all_steps():
    g, averages, seen = torch.Generator().manual_seed(0), Averages(), {}
    times = [
        torch.tensor([0.0, 0.249, 0.25]),
        torch.tensor([[0.9, 0.99, 0.1, 0.24]] * 3),
        torch.tensor([0.3, 0.2, 0.26]),
    ]
    for t in times:
        gap = torch.rand(3, 4, generator=g)
        averages.add(measured(step_of(t, gap)))
        for one, value in zip(
            (t if t.dim() == 2 else t[:, None].expand(3, 4)).flatten().tolist(), gap.flatten().tolist()
        ):
            seen.setdefault(f"gap_by_t/{int(one * 4) / 4:.2f}", []).append(value)
    found = gaps_by_t({name: value.item() for name, value in averages.take().items()})
    by_t = {name: value for name, value in found.items() if "_t/" in name}
    assert by_t == {name: pytest.approx(sum(values) / len(values)) for name, values in seen.items()}
    assert len(by_t) == 3 and "gap_by_t/0.50" not in by_t  # where t never was
    assert gaps_by_t(dict.fromkeys(["gap_by_t/0.00", "share_of_t/0.00"], float("nan"))) == {}
