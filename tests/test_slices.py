"""Slices: what was saved is what the networks said, and a replay names where they no longer do."""

import copy
import json
from pathlib import Path

import pytest
import torch
from forks import python
from safetensors.torch import load_file, save_file

from dimo.commands.cli import main
from dimo.distill.stages import Step
from dimo.errors import DimoError
from dimo.train.guards import save_replay
from dimo.ursa import build_ursa_inputs, visual_logits
from dimo.views.explorer_data import Setting, ask
from dimo.views.models import open_models
from dimo.views.slices import replay, save_slice, write_test
from dimo.worlds import SHIPPED_STUDENT

TINY = Path(__file__).parent / "data" / "tiny-ursa"


@pytest.fixture(scope="module")
def models():
    return open_models("shapes", student=SHIPPED_STUDENT)


@pytest.fixture
def saved(models, tmp_path):
    models.folder = tmp_path
    setting = Setting(models.prompts[5], 2, 0.3, guidance_scale=2.0, temperature=1.5)
    return save_slice(models, setting, ask(models, setting.prompt, setting.seed, setting.t), (1, 2, 3))


def changed(models, name, key, by):
    """The same with one weight of one network changed."""
    other, network = copy.copy(models), copy.deepcopy(models.networks[name])
    network.state_dict()[key].view(-1)[0] += by
    other.networks = models.networks | {name: network}
    return other


@torch.no_grad()
def test_a_slice_holds_what_went_in_and_what_came_out(models, saved, tmp_path):
    assert saved.parent == tmp_path / "slices" and {p.suffix for p in saved.parent.iterdir()} == {
        ".json",
        ".safetensors",
    }
    about, data = json.loads(saved.read_text()), load_file(saved.with_suffix(".safetensors"))
    assert about["tokens"][0] == 16 + 2 * 4 + 3 and about["setting"]["guidance_scale"] == 2.0
    assert about["origin"] == {"source": "shapes", "student": str(SHIPPED_STUDENT)}
    tokens, teacher, student = about["tokens"], models.networks["teacher"], models.networks["student"]
    c, u = (visual_logits(teacher, data[ids], data["x_t"], models.grid)[0] for ids in ("txt_ids", "uncond_ids"))
    z = {"guided": u + 2 * (c - u), "student": visual_logits(student, data["txt_ids"], data["x_t"], models.grid)[0]}
    for name in z:
        log_p = (z[name] / 1.5).log_softmax(-1)[tokens]
        assert torch.allclose(data[f"{name}.log_p"], log_p.gather(1, data[f"{name}.codes"]), atol=1e-4)
        assert torch.equal(data[f"{name}.codes"][:, 0], log_p.argmax(-1))
    # the state after the last layer, read at the position before the token, is what head and norm make logits of
    last = student.lm_head(student.model.norm(data["student.hidden.02"]))
    assert torch.allclose(last, z["student"][tokens], atol=1e-3)
    spliced = build_ursa_inputs(teacher, data["uncond_ids"], data["x_t"], models.grid)
    assert spliced.num_visual_tokens == 48 and torch.isfinite(data["unconditional.hidden.00"]).all()


def test_a_replay_agrees_with_itself_and_in_bf16(models, saved):
    same = replay(saved, models)
    assert same.agrees and max(same.differences.values()) == 0 and "is reproduced" in same.sentence
    assert "weights" not in same.sentence
    half = replay(saved.with_suffix(".safetensors"), dtype="bfloat16")  # the networks that the slice names
    assert half.agrees and 1e-4 < max(half.differences.values()) < 0.3, half.sentence
    assert "weights" not in half.sentence


@pytest.mark.parametrize(
    ("name", "key", "where"),
    [
        ("student", "model.layers.1.mlp.down_proj.weight", "student, layer 01, token "),
        ("teacher", "model.layers.2.self_attn.o_proj.weight", "unconditional, layer 02, token "),
        ("teacher", "lm_head.weight", "conditional, log-probabilities, token "),
    ],
)
def test_a_replay_says_where_it_first_differs(models, saved, name, key, where):
    outcome = replay(saved, changed(models, name, key, 3.0))
    assert not outcome.agrees and outcome.first.startswith(where), outcome.sentence
    assert f"first at {where}" in outcome.sentence and f"the weights of {name} are others" in outcome.sentence


def test_what_is_said_of_a_token_is_of_that_token(models, saved):
    """Not the largest difference, which is of a later one."""
    file = saved.with_suffix(".safetensors")
    data, about = load_file(file), json.loads(saved.read_text())
    for row, by in ((2, 1.01), (5, 1.5)):
        data["student.hidden.01"][row] *= by
    save_file(data, file)
    frames, rows, columns = models.grid
    token = about["tokens"][2]
    place = token // (rows * columns), token // columns % rows, token % columns
    outcome = replay(saved, models)
    assert f"student, layer 01, token {place}: 0.0099 of its norm" in outcome.first
    assert outcome.differences["student, layer 01"] == pytest.approx(0.5 / 1.5, rel=1e-4)


def test_a_wrong_slice_of_the_logits_is_caught(models, saved, monkeypatch):
    def late(logits, n, codes):
        return logits[:, -n:, -codes:]

    monkeypatch.setattr("dimo.ursa.inputs.extract_visual_logits", late)
    outcome = replay(saved, models)
    assert not outcome.agrees and "log-probabilities" in outcome.first and "weights" not in outcome.sentence


def test_another_model_and_damaged_files_are_sentences(models, saved, tmp_path):
    with pytest.raises(DimoError, match="is a slice of another model than .*: it has hidden_size 64 instead of 16"):
        replay(saved, open_models(TINY, size=(2, 8, 12)))
    alone = tmp_path / "alone.json"
    alone.write_text(saved.read_text())
    with pytest.raises(DimoError, match="alone.safetensors, the tensors of this slice, cannot be read"):
        replay(alone)
    save_file({"x": torch.zeros(1)}, alone.with_suffix(".safetensors"))
    with pytest.raises(DimoError, match="alone.safetensors lacks txt_ids, uncond_ids, x_hat, x_init, x_t"):
        replay(alone)
    about = json.loads(saved.read_text())
    alone.write_text(json.dumps(about | {"setting": about["setting"] | {"tee": 1}}))
    with pytest.raises(DimoError, match="alone.json is damaged: .*unexpected keyword argument 'tee'"):
        replay(alone)
    alone.write_text("{}")
    with pytest.raises(DimoError, match="is no slice of dimo: it lacks dtype, grid"):
        replay(alone)
    with pytest.raises(DimoError, match="token must lie in latents_shape"):
        save_slice(models, Setting("p"), ask(models, models.prompts[0]), (0, 4, 0))


def test_the_batch_of_a_skipped_step_says_where_it_is_not_finite(models, tmp_path):
    file, n = tmp_path / "slices" / "replay-00000006-rank0.safetensors", 48
    draw = lambda rows: torch.randint(10, (rows, n), generator=torch.Generator().manual_seed(rows))  # noqa: E731
    txt_ids = models.ursa.tokenize(models.prompts[:2], models.max_prompt_length)
    save_replay(file, Step(txt_ids=txt_ids, x_init=draw(2), x_hat=draw(2), x_t=draw(4), t=torch.rand(4)), 5, 17)
    fine = replay(file, models)
    assert fine.agrees and "on the batch of step 6 all networks are finite" in fine.sentence
    for name, key, where in (
        ("student", "model.layers.1.mlp.down_proj.weight", "student, layer 01"),
        ("teacher", "lm_head.weight", "teacher, the logits"),
    ):
        outcome = replay(file, changed(models, name, key, float("nan")))
        assert not outcome.agrees and outcome.first == where and where in outcome.sentence
    with pytest.raises(DimoError, match="is the batch of a training step, but not in slices/ of a run folder"):
        replay(file)


def test_the_command_and_the_test_that_is_copied(models, saved, capsys):
    assert main(["replay", str(saved)]) == 0 and "the slice is reproduced" in capsys.readouterr().out
    text = write_test(saved)
    (file,) = saved.parent.glob("test_*.py")
    assert file.read_text() == text
    exec(compile(text, file, "exec"), names := {"__file__": str(file)})
    names[file.stem.replace("-", "_")]()  # agrees
    data = load_file(saved.with_suffix(".safetensors"))
    data["student.hidden.01"][0] *= 1.01
    save_file(data, saved.with_suffix(".safetensors"))
    words = ["-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    failed = python.run(words, capture_output=True, text=True)
    assert failed.returncode == 1 and "first at student, layer 01, token (1, 2, 3): 0.0099" in failed.stdout
    assert main(["replay", str(saved)]) == 2
    assert "first at student, layer 01, token (1, 2, 3)" in capsys.readouterr().err
