"""dimo.ursa against values recorded from URSA's reference implementation (see tests/data/golden/README.md)."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dimo.ursa import (
    MetricPath,
    MixturePath,
    UrsaConfig,
    UrsaTransformer,
    build_ursa_inputs,
    extract_visual_logits,
    guide,
    latents_shape_for,
    timesteps,
)

GOLDEN = Path(__file__).parent / "data" / "golden"
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
    shape, scale = tuple(CASES["pipe"]["latents_shape"]), CASES["pipe"]["guidance_scale"]
    n = torch.Size(shape).numel()
    for j in range(CASES["pipe"]["steps"]):
        ids = recorded[f"pipe.{j}.input_ids"]
        codes = ids[:, -n:] - transformer.config.lm_vocab_size
        inputs = build_ursa_inputs(transformer, ids[:, : -(n + 1)], codes, shape)
        assert torch.equal(inputs.input_ids, ids)
        assert torch.equal(inputs.rope_pos, recorded[f"pipe.{j}.rope_pos"].long())
        logits = transformer(inputs.input_ids, inputs.rope_pos)
        assert_close(logits, recorded[f"pipe.{j}.logits"])
        cond, uncond = recorded[f"pipe.{j}.logits"].chunk(2)
        assert_close(guide(cond, uncond, scale), uncond + scale * (cond - uncond))


def test_latents_shapes_of_ursa():
    assert latents_shape_for(17, 256, 256) == (5, 32, 32)
    assert latents_shape_for(49, 320, 512) == (13, 40, 64)
