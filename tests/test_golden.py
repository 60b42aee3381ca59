"""dimo against values recorded of URSA's reference implementation: README.md in tests/data/golden and tiny-student."""

import itertools
import json
from pathlib import Path

import imageio.v3 as iio
import pytest
import torch
from safetensors.torch import load_file

from dimo.config import load_config
from dimo.train.trainer import Trainer
from dimo.ursa import (
    MetricPath,
    MixturePath,
    UrsaConfig,
    UrsaTransformer,
    build_ursa_inputs,
    extract_visual_logits,
    latents_shape_for,
    load_ursa,
    sample,
    timesteps,
    visual_logits,
)
from dimo.ursa.frames import eight_bits, frames_of
from dimo.ursa.loading import load_student
from dimo.ursa.sampler import Trajectory
from dimo.ursa.weights import read_pickle, read_weights
from dimo.views.clips import write_frames

DATA = Path(__file__).parent / "data"
GOLDEN, TINY, STUDENT = DATA / "golden", DATA / "tiny-ursa", DATA / "tiny-student"
GRID = (2, 3, 4)  # of the student's videos
CASES = json.loads((GOLDEN / "cases.json").read_text())


@pytest.fixture(scope="module")
def recorded():
    return load_file(GOLDEN / "golden.safetensors")


@pytest.fixture(scope="module")
def transformer():
    model = UrsaTransformer(UrsaConfig.from_dict(json.loads((GOLDEN / "transformer_config.json").read_text())))
    model.load_state_dict(load_file(GOLDEN / "transformer.safetensors"), strict=True)
    return model.eval().requires_grad_(False)


def assert_close(got, want, share=1e-4):
    """Within `share` of the largest recorded entry."""
    assert got.shape == want.shape
    assert (got - want).abs().max() <= share * want.abs().max()


@pytest.mark.parametrize("case", CASES["cases"], ids=lambda c: str(c["case"]))
def test_inputs_hidden_and_logits_equal_the_recorded(recorded, transformer, case):
    i, shape = case["case"], tuple(case["latents_shape"])
    inputs = build_ursa_inputs(transformer, recorded[f"{i}.txt_ids"], recorded[f"{i}.visual_tokens"], shape)
    assert torch.equal(inputs.input_ids, recorded[f"{i}.input_ids"])
    assert torch.equal(inputs.rope_pos, recorded[f"{i}.rope_pos"])
    assert_close(transformer.hidden(inputs.input_ids, inputs.rope_pos), recorded[f"{i}.hidden"])
    logits = transformer(inputs.input_ids, inputs.rope_pos)
    assert_close(logits, recorded[f"{i}.logits"])
    visual = extract_visual_logits(logits, inputs.num_visual_tokens, transformer.config.codebook_size)
    assert_close(visual, recorded[f"{i}.visual_logits"])
    shifted = logits[:, -inputs.num_visual_tokens :]
    assert (shifted - recorded[f"{i}.visual_logits"]).abs().max() > 0.1 * shifted.abs().max()


def test_paths_equal_the_recorded(recorded):
    p = CASES["path"]
    path = MetricPath(recorded["codebook"], p["alpha"], p["c"], p["eps"])
    mixture = MixturePath(recorded["codebook"])
    x_1, x_t = recorded["path.x_1"], recorded["path.x_t"]
    for i, t in enumerate(recorded["path.t"].tolist()):
        assert_close(path.prob(x_1, t), recorded["path.prob"][i], 1e-5)
        assert_close(path.velocity(x_1, x_t, t), recorded["path.velocity"][i])
        assert_close(mixture.velocity(x_1, x_t, t), recorded["mixture.velocity"][i])


@pytest.mark.parametrize("shift", [1, 3])
@pytest.mark.parametrize("steps", [1, 4, 25])
def test_time_steps_equal_the_recorded(recorded, shift, steps):
    want = recorded[f"timesteps.shift{shift}.steps{steps}"].tolist()
    assert timesteps(steps, shift) == pytest.approx(want, abs=1e-15)


def test_the_pipelines_calls_are_reproduced(recorded, transformer):
    shape = tuple(CASES["pipe"]["latents_shape"])
    n = torch.Size(shape).numel()
    for j in range(CASES["pipe"]["steps"]):
        ids = recorded[f"pipe.{j}.input_ids"]
        codes = ids[:, -n:] - transformer.config.lm_vocab_size
        inputs = build_ursa_inputs(transformer, ids[:, : -(n + 1)], codes, shape)
        assert torch.equal(inputs.input_ids, ids)
        assert torch.equal(inputs.rope_pos, recorded[f"pipe.{j}.rope_pos"].long())
        logits = transformer(inputs.input_ids, inputs.rope_pos)
        assert_close(logits, recorded[f"pipe.{j}.logits"])


def test_latents_shapes_of_ursa():
    assert latents_shape_for(17, 256, 256) == (5, 32, 32)
    assert latents_shape_for(49, 320, 512) == (13, 40, 64)


@pytest.fixture(scope="module")
def tiny():
    return load_ursa(TINY)


@pytest.fixture(scope="module")
def of_student():
    return load_file(STUDENT / "recorded.safetensors")


def test_a_students_pass_is_upstreams(tiny, of_student):
    """Upstream's transformer, with student.pt loaded strictly, was called so by its pipeline under guidance."""
    n, ids = GRID[0] * GRID[1] * GRID[2], of_student["input_ids"]
    assert torch.equal(tiny.tokenize(["a red ball", "two dogs jump over a wall", "", ""], 12), ids[:, :12])
    student, codes = load_student(tiny, STUDENT), ids[:, -n:] - 272
    inputs = build_ursa_inputs(student, ids[:, :12], codes, GRID)
    assert torch.equal(inputs.input_ids, ids) and torch.equal(inputs.rope_pos, of_student["rope_pos"])
    assert_close(visual_logits(student, ids[:, :12], codes, GRID), of_student["visual_logits"], 1e-5)


@pytest.mark.parametrize("few_codes", [2048, 0], ids=["logits", "hidden states"])  # of which the codes are drawn
@pytest.mark.parametrize("scale", [1, 3, 7])
def test_a_students_one_step_gives_the_codes_of_upstreams_pipeline(tiny, of_student, scale, few_codes, monkeypatch):
    """From its noise, and with the uniform numbers that decided there."""
    monkeypatch.setattr("dimo.ursa.sampler.FEW_CODES", few_codes)
    cond, uncond = of_student["input_ids"][:, :12].chunk(2)
    monkeypatch.setattr(torch, "rand", lambda size, **_: of_student["u"].view(size))
    codes = sample(load_student(tiny, STUDENT), tiny.path, cond, GRID, 1, guidance_scale=scale, uncond_ids=uncond,
                   x_init=of_student["x_init"])  # fmt: skip
    assert torch.equal(codes, of_student[f"codes.{scale}"])
    others = [of_student[f"codes.{other}"] for other in (1, 3, 7) if other != scale]
    assert all((codes != other).float().mean() > 0.2 for other in others)


def test_twelve_steps_give_the_codes_of_upstreams_pipeline(tiny, of_student, monkeypatch):
    """A teacher's, on the way too: guided until t = 0.9, and with the numbers that decided there."""
    r, way = of_student, Trajectory()
    jumps = zip(r["steps.u"], (*r["steps.whether"], None), (*r["steps.where"], None))
    numbers = iter([number for step in jumps for number in step])
    monkeypatch.setattr(torch, "rand", lambda size, **_: next(numbers).view(size))
    cond, uncond = r["input_ids"][:, :12].chunk(2)
    codes = sample(tiny.transformer, tiny.path, cond, GRID, 12, guidance_scale=3, uncond_ids=uncond,
                   x_init=r["steps.codes"][0], trajectory=way)  # fmt: skip
    assert torch.equal(torch.stack([*way.x_t, codes]), r["steps.codes"])
    assert all((now != then).any() for now, then in itertools.pairwise(r["steps.codes"][1:]))


def test_a_final_student_is_as_the_one_that_upstream_loaded_strictly(tmp_path, tiny):
    """Keys, shapes and dtypes of checkpoints/final; the gain is in the last norm, and nowhere else in the file."""
    (tmp_path / "captions.txt").write_text("a red ball\n")
    config = load_config("smoke", [
        f"distill.teacher_ckpt={TINY}", f"distill.prompt_source={tmp_path / 'captions.txt'}", "model.device=cpu",
        "distill.num_frames=5", "distill.height=8", "distill.width=8", "distill.max_prompt_length=8",
        "distill.batch_size_per_gpu=1", "training.max_train_steps=1", f"experiment.output_dir={tmp_path / 'run'}",
        "experiment.student_dtype=float16", "experiment.sample_every=9", "model.final_logit_gain=5",
    ])  # fmt: skip
    Trainer(config).train(progress=False)
    made = read_pickle(tmp_path / "run/checkpoints/final/student.pt")
    taken, norm = read_pickle(STUDENT / "student.pt"), tiny.transformer.model.norm.weight
    assert {k: (v.shape, v.dtype) for k, v in made.items()} == {k: (v.shape, v.dtype) for k, v in taken.items()}
    for weights, gain in ((made, 5), (taken, 12)):
        assert_close(weights["model.norm.weight"].float(), norm.detach() * gain, 1e-3)
    again = read_weights(tmp_path / "run/checkpoints/final/student")
    assert all(torch.equal(again[key], made[key]) for key in made)


def test_the_eight_bits_of_frames_are_upstreams(of_student, tmp_path):
    """Its image processor cuts off; every level and its neighbours are among the recorded values."""
    decoded = of_student["levels.decoded"].movedim(1, -1)
    frames, want = frames_of(decoded), of_student["levels.bytes"]
    assert torch.equal(eight_bits(frames), want) and ((frames * 255).round() != want).float().mean() > 0.2
    assert frames.min() == 0 and frames.max() == 1 and want.unique().numel() == 256
    assert torch.equal(eight_bits(torch.arange(256) / 255), torch.arange(256, dtype=torch.uint8))
    image = frames_of(load_file(TINY / "recorded.safetensors")["frames"][1].movedim(0, -1))
    written = torch.from_numpy(iio.imread(write_frames(tmp_path / "image", image)))
    assert torch.equal(written, of_student["frames.bytes"][1, 0])
