"""The finder names every misreading that is planted where training and notebooks read, and none on the right slice."""

import math

import pytest
import torch

from dimo.config import load_config
from dimo.errors import DimoError
from dimo.train.trainer import Trainer
from dimo.ursa import Dense, UrsaTransformer, inputs, load_ursa, predict
from dimo.views.alignment import find_misalignment
from dimo.worlds import checkpoint_folder

GRID, N, K = (3, 4, 4), 48, 10
right = inputs.extract_visual_logits


def positions(by):
    return lambda logits, n, k: logits[:, -(n + 1) + by : logits.shape[1] - 1 + by, -k:]


def as_video(change):
    """A misreading of the slice (B, T, H, W, K)."""
    return lambda logits, n, k: change(right(logits, n, k).unflatten(1, GRID)).flatten(1, 3)


PLANTED = {
    "position late": positions(1),
    "position early": lambda logits, n, k: right(logits, n, k).roll(1, 1),  # a pass gives logits from BOV on
    "two positions early": lambda logits, n, k: right(logits, n, k).roll(2, 1),
    "height and width exchanged": as_video(lambda z: z.transpose(2, 3)),
    "frames last": as_video(lambda z: z.permute(0, 2, 3, 1, 4)),
    "frames reversed": as_video(lambda z: z.flip(1)),
    "rows reversed": as_video(lambda z: z.flip(2)),
    "columns reversed": as_video(lambda z: z.flip(3)),
    "row late": lambda logits, n, k: right(logits, n, k).roll(-4, 1),
    "frame early": lambda logits, n, k: right(logits, n, k).roll(16, 1),
    "samples shifted": lambda logits, n, k: right(logits, n, k).roll(-1, 0),
}
OF_LOGITS = {
    "ids +1": lambda logits, n, k: right(logits, n, k).roll(1, -1),
    "ids -1": lambda logits, n, k: right(logits, n, k).roll(-1, -1),
}


class Remembered:
    """The world's teacher, asked once for each input: misreadings come after it."""

    def __init__(self, network):
        self.network, self.config, self.lm_head, self.known = network, network.config, network.lm_head, {}

    def _ask(self, function, input_ids, *more, **named):
        key = function, input_ids.numpy().tobytes()
        if key not in self.known:
            self.known[key] = function(input_ids, *more, **named)
        return self.known[key]

    def __call__(self, *inputs, **named):
        return self._ask(self.network.__call__, *inputs, **named)

    def hidden(self, *inputs):
        return self._ask(self.network.hidden, *inputs)


@pytest.fixture(scope="module")
def teacher():
    return Remembered(load_ursa(checkpoint_folder("shapes")).transformer.requires_grad_(False))


def batch(world, ursa, seed, t=0.9, clips=64):
    g = torch.Generator().manual_seed(seed)
    prompt, codes = world.draw(clips, g)
    return ursa.tokenize([world.prompts[i] for i in prompt], 4), codes, ursa.path.sample(codes, t, g)


def found_in(world, ursa, teacher, seed, dense, **more):
    txt_ids, codes, x_t = batch(world, ursa, seed, **more)
    return find_misalignment(predict(teacher, txt_ids, x_t, GRID, dense), codes, GRID)


@pytest.mark.parametrize("name", [*PLANTED, *OF_LOGITS])
def test_what_is_planted_is_named_on_every_batch(name, world, ursa, teacher, monkeypatch):
    monkeypatch.setattr(inputs, "extract_visual_logits", (PLANTED | OF_LOGITS)[name])
    for seed in range(20):
        assert found_in(world, ursa, teacher, seed, dense=True).found == name
        if name in PLANTED:  # ids are logits' alone
            assert found_in(world, ursa, teacher, seed, dense=False).found == name


def test_the_right_slice_is_never_blamed(world, ursa, teacher):
    for seed in range(20):
        for t in (0.5, 0.9, 0.95):
            assert found_in(world, ursa, teacher, seed, dense=seed % 2 == 0, t=t).found in ("right", None)
    assert "is right" in found_in(world, ursa, teacher, 0, dense=True).sentence


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
    monkeypatch.setattr(inputs, "extract_visual_logits", PLANTED["position late"])
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
