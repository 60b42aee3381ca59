"""The finder names every misreading that is planted where training and notebooks read, and none on the right slice."""

import math

import pytest
import torch
from misalignments import Remembered, found_in, planted

from dimo.config import load_config
from dimo.errors import DimoError
from dimo.train.trainer import Trainer
from dimo.ursa import Dense, UrsaTransformer, inputs, load_ursa, predict
from dimo.views.alignment import find_misalignment
from dimo.worlds import checkpoint_folder

GRID, N, K = (3, 4, 4), 48, 10


@pytest.fixture(scope="module")
def teacher():
    return Remembered(load_ursa(checkpoint_folder("shapes")).transformer.requires_grad_(False))


def batch(world, ursa, seed, t=0.9, clips=64):
    g = torch.Generator().manual_seed(seed)
    prompt, codes = world.draw(clips, g)
    return ursa.tokenize([world.prompts[i] for i in prompt], 4), codes, ursa.path.sample(codes, t, g)


@pytest.mark.parametrize("name", planted(GRID))
def test_what_is_planted_is_named(name, ursa, teacher, monkeypatch):
    """On three batches; `python scripts/misalignments.py` takes twenty, and 1,280 tokens."""
    monkeypatch.setattr(inputs, "extract_visual_logits", planted(GRID)[name])
    for seed in range(3):
        assert found_in(ursa, teacher, seed) == name
        if not name.startswith("ids"):  # those are of logits alone
            assert found_in(ursa, teacher, seed, dense=False) == name


def test_the_right_slice_is_never_blamed(world, ursa, teacher):
    for seed in range(20):
        for t in (0.5, 0.9, 0.95):
            assert found_in(ursa, teacher, seed, t, dense=seed % 2 == 0) in ("right", None)
    txt_ids, codes, x_t = batch(world, ursa, 0)
    said = find_misalignment(predict(ursa.transformer, txt_ids, x_t, GRID, True), codes, GRID).sentence
    assert "is right" in said


@pytest.mark.parametrize("scale", [0.02, 2.0])
def test_a_network_that_knows_nothing_is_undecided(world, ursa, scale):
    """Random weights: what a token's position says of its neighbour is by chance, and for many clips not small."""
    fresh = UrsaTransformer(ursa.transformer.config).requires_grad_(False)
    g = torch.Generator().manual_seed(0)
    for p in fresh.parameters():
        if p.dim() == 2:
            p.copy_(torch.randn(p.shape, generator=g) * scale / math.sqrt(p.shape[1]))
    for seed in range(5):
        txt_ids, codes, x_t = batch(world, ursa, seed)
        verdict = find_misalignment(predict(fresh, txt_ids, x_t, GRID, True), codes, GRID)
        assert verdict.found is None and "undecided between" in verdict.sentence
    uniform = find_misalignment(Dense(torch.zeros(64, N, K)), codes, GRID)
    frequent = torch.bincount(codes.flatten(), minlength=K).float().log().roll(1).expand(64, N, K)
    assert uniform.found is None and find_misalignment(Dense(frequent), codes, GRID).found is None


def test_figures_are_those_of_a_loop(world, ursa):
    txt_ids, codes, x_t = batch(world, ursa, 3, t=0.5, clips=9)
    prediction = predict(ursa.transformer, txt_ids, x_t, GRID, True)
    log_p = prediction.logits().double().log_softmax(-1)
    readings = find_misalignment(prediction, codes, GRID).readings

    def cost(b, i, clip, by):
        return -log_p[b, i, codes[clip, i + by]].item()

    for name, by in (("right", 0), ("position late", 1), ("row early", -4)):
        inside, gains = [i for i in range(N) if 0 <= i + by < N], []
        nats = [cost(b, i, b, by) for b in range(9) for i in inside]
        for b in range(9):
            gain = {}
            for shift in {0, by}:
                others = [sum(cost(b, i, (b - r) % 9, shift) for r in (2, 3, 5)) / 3 for i in inside]
                gain[shift] = sum(cost(b, i, b, shift) - o for i, o in zip(inside, others)) / len(inside)
            gains.append(gain[by] - gain[0])
        mean = sum(gains) / 9
        error = math.sqrt(sum((x - mean) ** 2 for x in gains) / 8 / 9)
        got = readings[name]
        assert got.nats == pytest.approx(sum(nats) / len(nats), rel=1e-4, abs=1e-6)
        assert (got.worse, got.error) == pytest.approx((mean, error), rel=1e-3, abs=1e-6)


def test_readings_that_change_nothing_are_left_out():
    codes = torch.randint(5, (8, 6), generator=torch.Generator().manual_seed(0))
    names = find_misalignment(Dense(torch.zeros(8, 6, 5)), codes, (1, 2, 3)).readings
    assert not {"frames reversed", "frame late", "frame early", "frames last"} & names.keys()
    assert {"right", "row late", "height and width exchanged", "rows reversed"} < names.keys()


@pytest.mark.parametrize("precision", ["no", "bf16"])  # logits and hidden states
def test_training_refuses_to_start_on_a_misread_slice(precision, monkeypatch, tmp_path):
    keys = ["training.max_train_steps=1", "distill.batch_size_per_gpu=2", "model.device=cpu"]
    keys += [f"training.mixed_precision={precision}", f"experiment.output_dir={tmp_path}"]
    trainer = Trainer(load_config("smoke", keys))
    assert "the slice is right" in trainer.require_aligned()[0]
    monkeypatch.setattr(inputs, "extract_visual_logits", planted(GRID)["position late"])
    with pytest.raises(DimoError, match="the slice is read one position late: .*extract_visual_logits"):
        trainer.train(progress=False)
    assert not (tmp_path / "checkpoints" / "final").exists()


def test_bad_input_is_refused_in_a_sentence():
    prediction, codes = Dense(torch.zeros(9, 6, 5)), torch.zeros(9, 6, dtype=torch.long)
    with pytest.raises(DimoError, match=r"codes must have shape \(9, 6\)"):
        find_misalignment(prediction, codes[:, :5], (1, 1, 5))
    with pytest.raises(DimoError, match=r"codes must lie in \[0, 5\)"):
        find_misalignment(prediction, codes + 5, (1, 2, 3))
    with pytest.raises(DimoError, match=r"latents_shape must hold 6 tokens as codes do, got \(1, 2, 2\)"):
        find_misalignment(prediction, codes, (1, 2, 2))
    with pytest.raises(DimoError, match="codes must hold at least 8 clips"):
        find_misalignment(Dense(torch.zeros(4, 6, 5)), codes[:4], (1, 2, 3))
