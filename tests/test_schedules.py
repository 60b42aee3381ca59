"""Schedules against their closed forms."""

import dataclasses

import pytest
import torch

from dimo.config.schema import Distill
from dimo.distill.schedules import (
    Baseline,
    EntropyController,
    XInit,
    draw_t,
    fade,
    power_at,
    sample_t_curriculum,
    shift_for,
)
from dimo.errors import DimoError
from dimo.ursa.probability_path import T_MAX, shifted
from dimo.ursa.sampler import timesteps


@pytest.mark.parametrize(
    ("step", "quantile"), [(0, lambda u: 1 - (1 - u) ** 2), (99, lambda u: 1 - (1 - u) ** 2), (100, lambda u: u)]
)
def test_t_has_the_quantiles_of_its_equation(step, quantile, generator):
    t = sample_t_curriculum(100_000, step, 100, generator)
    assert 0 <= t.min() and t.max() <= 0.999
    for u in (0.1, 0.5, 0.9):
        assert t.quantile(u).item() == pytest.approx(0.999 * quantile(u), abs=0.006)


def test_draws_of_t_are_stratified_and_each_is_uniform(generator):
    t = sample_t_curriculum(3000, 0, 0, generator, draws=4).view(4, 3000) / T_MAX
    for sample in t.T[:200].tolist():  # one in each quarter
        assert sorted(int(4 * u) for u in sample) == [0, 1, 2, 3]
    for draw in t:
        assert torch.histc(draw, 10, 0, 1) / 3000 == pytest.approx(torch.full((10,), 0.1), abs=0.02)
        assert torch.histc(draw[:100], 4, 0, 1).min() > 10  # the order differs from sample to sample
    free = sample_t_curriculum(4 * 3000, 0, 0, generator).view(4, 3000) / T_MAX
    # Var of a mean of R uniforms: 1 / (12 R), and 1 / (12 R^3) where each has a part of its own
    assert free.mean(0).var().item() == pytest.approx(1 / 48, rel=0.1)
    assert t.mean(0).var().item() == pytest.approx(1 / (12 * 64), rel=0.1)
    early = sample_t_curriculum(3000, 0, 10, generator, draws=2).view(2, 3000) / T_MAX
    assert ((early.min(0).values <= 0.75) & (early.max(0).values >= 0.75)).all()  # 1 - (1 - 1/2)^2
    with pytest.raises(DimoError, match="draws must be at least 1, got 0"):
        sample_t_curriculum(2, 0, 0, draws=0)


def test_the_mix_fades(generator):
    assert [fade(step, 0, 50.0) for step in (0, 25, 50, 99)] == [1.0, 0.5, 0.0, 0.0]
    assert fade(99, 0, 0.0) == 1.0
    mix = XInit(5, p_corrupt=0.4, corrupt_ratio=0.2)
    for share, factor in ((0.4, 1.0), (0.2, 0.5), (0.0, 0.0)):
        mix.fade = factor
        mix.remember(torch.zeros(8, 50, dtype=torch.long), torch.zeros(8, 2, dtype=torch.long))  # faded out or not
        corrupted = mix(torch.zeros(4000, 2, dtype=torch.long), 50, generator)[2]
        assert corrupted.float().mean().item() == pytest.approx(share, abs=0.03)
    assert len(mix.x_hat) == 24


def test_x_init_is_uniform_without_memory(generator):
    x, ids, corrupted = XInit(5, 0.2, 0.2)(torch.zeros(4000, 2, dtype=torch.long), 6, generator)
    assert not corrupted.any() and not ids.any()
    assert torch.allclose(torch.bincount(x.flatten(), minlength=5) / x.numel(), torch.full((5,), 0.2), atol=0.012)


def test_x_init_mixes_old_samples_with_their_own_prompts(generator):
    mix = XInit(5, p_corrupt=0.25, corrupt_ratio=0.4)
    old = torch.randint(5, (8, 50), generator=generator)
    mix.remember(old, torch.arange(8)[:, None].expand(-1, 2))
    x, ids, corrupted = mix(torch.full((4000, 2), 77), 50, generator)
    assert corrupted.float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert (ids[~corrupted] == 77).all() and (ids[corrupted] < 8).all()
    same = (x[corrupted] == old[ids[corrupted, 0]]).float().mean().item()
    assert same == pytest.approx(1 - 0.4 * 0.8, abs=0.01)
    assert (x[~corrupted] == old[0]).float().mean().item() == pytest.approx(0.2, abs=0.01)


def test_x_init_keeps_the_newest_and_survives_a_checkpoint(generator):
    mix = XInit(9, p_corrupt=1.0, corrupt_ratio=0.0, capacity=3)
    for code in range(4):
        mix.remember(torch.full((2, 4), code), torch.full((2, 1), code))
    assert mix.x_hat[:, 0].tolist() == [3, 3, 2] and mix.full
    kept = mix.x_hat, mix.txt_ids  # where a CUDA graph would read them
    mix.remember(torch.full((2, 4), 4), torch.full((2, 1), 4))
    assert mix.x_hat is kept[0] and mix.txt_ids is kept[1]
    assert mix.x_hat[:, 0].tolist() == mix.txt_ids[:, 0].tolist() == [4, 4, 3]
    again = XInit(9, p_corrupt=1.0, corrupt_ratio=0.0, capacity=3)
    again.load_state_dict(mix.state_dict())
    x, ids, _ = again(torch.zeros(50, 1, dtype=torch.long), 4, generator)
    assert (x == ids).all() and set(ids.flatten().tolist()) == {3, 4}


def test_entropy_bonus_rises_under_its_floor_and_falls_back_with_hysteresis():
    nats = torch.tensor
    bonus = EntropyController(0.01, 0.05, floor=0.5)
    for _ in range(EntropyController.WARMUP):
        assert bonus(nats(2.0)) == 0.01
    assert bonus(nats(1.01)) == 0.01
    assert bonus(nats(0.99)) == 0.05
    assert bonus(nats(1.05)) == 0.05  # above the floor, but not by a tenth
    again = EntropyController(0.01, 0.05, floor=0.5)
    again.load_state_dict(bonus.state_dict())
    assert again(nats(1.05)) == 0.05
    assert again(nats(1.11)) == 0.01
    again.fade = 0.5
    assert again(nats(0.99)) == 0.025


def test_the_scale_of_the_entropy_is_its_mean_over_the_first_steps():
    bonus, first = EntropyController(0.01, 0.05, floor=0.5), torch.linspace(2, 4, EntropyController.WARMUP)
    for entropy in (*first, torch.tensor(100.0)):  # the last is not one of them
        bonus(entropy)
    state = bonus.state_dict()
    assert state == {"raised": False, "seen": EntropyController.WARMUP, "start": pytest.approx(3.0)}
    assert [type(value) for value in state.values()] == [bool, int, float]  # as checkpoints hold them


def test_a_fade_of_no_length_is_a_step_and_none_at_all_without_an_end():
    assert [fade(step, 100, 100) for step in (0, 99, 100, 500)] == [1, 1, 0, 0]
    assert [fade(step, 0, 0) for step in (0, 500)] == [1, 1]


def test_baseline_is_the_moving_average_of_earlier_rewards():
    baseline, rewards, want = Baseline(0.9), [1.0, 3.0, -2.0], 1.0
    for reward in rewards:
        assert baseline(torch.tensor([reward])).item() == pytest.approx(want)
        want = 0.9 * want + 0.1 * reward


def test_bad_input_is_refused_in_a_sentence():
    with pytest.raises(DimoError, match="must not be negative"):
        sample_t_curriculum(3, -1, 0)
    with pytest.raises(DimoError, match=r"p_corrupt must lie in \[0, 1\]"):
        XInit(5, p_corrupt=1.1, corrupt_ratio=0.2)
    with pytest.raises(DimoError, match=r"x_hat must lie in \[0, 5\)"):
        XInit(5, 0.2, 0.2).remember(torch.full((1, 2), 5), torch.zeros(1, 1))
    with pytest.raises(DimoError, match=r"entropy must have shape \(\), got \(2,\)"):
        EntropyController(0.01, 0.05, 0.3)(torch.ones(2))
    with pytest.raises(DimoError, match="baseline decay"):
        Baseline(1.0)


@pytest.mark.parametrize("step, clean", [(0, lambda u: 1 - (1 - u) ** 2), (7, lambda u: u)])
def test_times_are_curriculum_then_power_then_shift(step, clean):
    """t = S(C(u)^p), written out; S is the shift of the sampler's timesteps."""
    u = torch.rand(500, generator=torch.Generator().manual_seed(3))
    got = draw_t(500, (3, 4, 4), step, 5, "sample", 1.6, 1, torch.Generator().manual_seed(3), shift=4.0)
    t = (T_MAX * clean(u)) ** 1.6
    assert torch.allclose(got, t / (t + 4 * (1 - t)), atol=1e-6) and got.max() <= T_MAX
    assert timesteps(25, 4.0) == pytest.approx(shifted(torch.arange(25) / 25, 4.0).tolist(), abs=1e-6)
    same = draw_t(500, (3, 4, 4), step, 5, "sample", 1.6, 1, torch.Generator().manual_seed(3))
    assert torch.allclose(same, t, atol=1e-6)


def test_a_mixed_batch_has_rows_of_both_kinds(generator):
    rows = draw_t(4000, (3, 2, 2), 0, 0, "mixed", 1.0, 4, generator).view(4, 4000, 3, 4)
    assert (rows == rows[..., :1]).all()
    whole = (rows[:, :, :1] == rows).all(-1).all(-1)  # one t for all frames
    assert (whole == whole[:1]).all() and 0.47 < whole[0].float().mean() < 0.53
    parts = (rows[..., 0] / T_MAX * 4).long().sort(0).values  # one draw in each quarter, of either kind
    assert (parts == torch.arange(4).view(4, 1, 1)).all()
    for kind in (whole[0], ~whole[0]):
        assert rows[:, kind].mean().item() == pytest.approx(0.5, abs=0.02)


def test_the_power_of_t_moves_from_its_start_to_its_end():
    powers = [power_at(step, 2.0, 8.0, 100) for step in (0, 50, 100, 500)]
    assert powers == pytest.approx([8, 4, 2, 2])  # half of the way is the geometric mean
    assert [power_at(step, 1.6, 0.0, 100) for step in (0, 50, 500)] == [1.6] * 3  # off
    g = [torch.Generator().manual_seed(3) for _ in range(2)]
    given = [draw_t(64, (3, 2, 2), 0, 0, "frame", power, 2, each) for power, each in zip((6.0, torch.tensor(6.0)), g)]
    torch.testing.assert_close(*given)
    # P(u^p < x) = x^(1/p): a sixth power puts 31% of the times below .001
    assert (draw_t(20_000, (1, 1, 1), 0, 0, "sample", 6.0, 1) < 0.001).float().mean().item() == pytest.approx(
        (0.001 / 0.999) ** (1 / 6), abs=0.015
    )


def test_a_shift_below_1_is_refused():
    with pytest.raises(DimoError, match="shift must be at least 1"):
        draw_t(2, (3, 2, 2), 0, 0, "sample", 1.0, 1, shift=0.5)


@pytest.mark.parametrize(
    "written, tokens, checkpoints, shift",
    [("1", 5120, 3.0, 1), ("2.5", 5120, None, 2.5), ("law", 48, None, 1), ("law", 16, None, 1),
     ("law", 1200, None, 5), ("law", 33_280, None, 26.33), ("checkpoint", 48, 3.0, 3)],
)  # fmt: skip
def test_the_shift_that_a_key_stands_for(written, tokens, checkpoints, shift):
    assert shift_for(Distill(t_shift=written).shift_value(), tokens, checkpoints) == pytest.approx(shift, abs=5e-3)


@pytest.mark.parametrize(
    "written, checkpoints, sentence",
    [("0.5", None, "as a number must be at least 1 .*, got 0.5"), ("lwa", None, "must be law, checkpoint or a number"),
     ("nan", None, "must be law, checkpoint or a number"),
     ("checkpoint", None, "scheduler_config.json, but that file has none; give a number, or law"),
     ("checkpoint", 0.5, "that file has 0.5, and a shift must be at least 1")],
)  # fmt: skip
def test_shifts_that_cannot_be(written, checkpoints, sentence):
    with pytest.raises(DimoError, match=sentence):
        shift_for(Distill(t_shift=written).shift_value(), 48, checkpoints)


def test_a_checkpoint_has_a_shift_of_its_own_only_where_its_scheduler_names_one(ursa, tmp_path):
    file = tmp_path / "scheduler" / "scheduler_config.json"
    file.parent.mkdir()
    for content, own in (('{"shift": 3.0}', 3.0), ('{"shift": null}', None), ("{}", None)):
        file.write_text(content)
        assert dataclasses.replace(ursa, shift=3.0, folder=tmp_path).own_shift == own
