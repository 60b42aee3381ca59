"""Checkpoint folders: what is read, what is refused, and the teacher that ships."""

import json
import shutil

import pytest
import torch
from hostile import Hostile
from safetensors.torch import load_file, save_file

from dimo.config import load_config
from dimo.errors import DimoError
from dimo.evaluation.evaluate import evaluate_to_folder
from dimo.ursa import load_ursa, sample
from dimo.ursa.loading import load_transformer, save_student
from dimo.ursa.weights import read_weights
from dimo.worlds import checkpoint_folder, load_world
from dimo.worlds.oracle import score
from dimo.worlds.shapes import ShapesWorld
from dimo.worlds.teacher import TeacherRecipe, encode, make_teacher

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(checkpoint_folder("shapes"), tmp_path / "shapes")


def test_the_shipped_teacher_needs_its_passes(ursa, world, generator):
    prompts = [p for p in world.prompts for _ in range(2)]
    ids = ursa.tokenize(prompts, 4)
    valid = {}
    for steps in (1, 25):
        codes = sample(ursa.transformer, ursa.path, ids, world.latents_shape, steps, generator=generator)
        valid[steps] = score(world, codes, prompts).valid.float().mean().item()
    assert valid[1] < 0.02 and valid[25] >= 0.90


def test_the_shipped_folder_is_small_and_holds_no_surprise():
    folder = checkpoint_folder("shapes")
    assert sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) < 8e6
    assert torch.load(folder / "scheduler" / "scheduler_model.pth", weights_only=True).keys() == {"path.emb"}


def test_the_tokenizer_gives_the_ids_that_the_teacher_was_trained_on(ursa, world):
    assert torch.equal(ursa.tokenize(world.prompts, 4), encode(world, world.prompts))


def test_sharded_and_bin_weights_are_the_same_weights(folder):
    whole = load_transformer(folder / "transformer").state_dict()
    state, names = load_file(folder / WEIGHTS), {}
    for i, part in enumerate((list(state)[::2], list(state)[1::2])):
        file = f"diffusion_pytorch_model-0000{i + 1}-of-00002.safetensors"
        save_file({k: state[k] for k in part}, folder / "transformer" / file)
        names |= dict.fromkeys(part, file)
    (folder / WEIGHTS).unlink()
    index = folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": names}))
    sharded = load_transformer(folder / "transformer").state_dict()
    index.unlink()
    torch.save(state, folder / "transformer" / "diffusion_pytorch_model.bin")
    pickled = load_transformer(folder / "transformer").state_dict()
    for key in whole:
        assert torch.equal(whole[key], sharded[key]) and torch.equal(whole[key], pickled[key])


def test_save_student_round_trip(ursa, tmp_path):
    save_student(tmp_path / "out", ursa.transformer)
    again = load_transformer(tmp_path / "out")
    assert again.config == ursa.transformer.config
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), ursa.transformer.state_dict().values()))


def test_a_mixture_path_is_read_from_alpha_null(folder):
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"alpha": None}))
    assert type(load_ursa(folder).path).__name__ == "MixturePath"


def test_a_hostile_pickle_is_not_executed(folder, tmp_path):
    file = folder / "scheduler" / "scheduler_model.pth"
    torch.save({"path.emb": Hostile(tmp_path / "executed")}, file)
    with pytest.raises(DimoError, match="could not be read as plain tensors: .*contains more than tensors") as refused:
        load_ursa(folder)
    assert "weights_only" not in str(refused.value)  # torch advises to turn it off
    assert not (tmp_path / "executed").exists()
    torch.load(file, weights_only=False)
    assert (tmp_path / "executed").exists()  # it was armed


def damage(folder, file, how):
    path = folder / file
    if how == "remove":
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    elif how == "truncate":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        path.write_text(json.dumps(json.loads(path.read_text()) | how))


@pytest.mark.parametrize(
    ("file", "how", "sentence"),
    [
        (WEIGHTS, "truncate", "weights file .* is damaged"),
        (WEIGHTS, "remove", "weights file .* does not exist"),
        ("transformer/config.json", "remove", "config.json is missing"),
        ("transformer/config.json", "truncate", "config.json is damaged"),
        ("transformer/config.json", {"num_hidden_layers": 4}, "do not fit this model: it lacks"),
        ("transformer/config.json", {"num_hidden_layers": 2}, "do not fit this model: it has unknown"),
        ("transformer/config.json", {"intermediate_size": 32}, "it has the wrong shape for"),
        ("transformer/config.json", {"vocab_size": 33}, "lm_head_size must be the codebook's size"),
        ("scheduler/scheduler_model.pth", "truncate", "could not be read as plain tensors: it is cut off"),
        ("scheduler/scheduler_config.json", "remove", "scheduler_config.json is missing"),
        ("tokenizer", "remove", "tokenizer is missing"),
    ],
)
def test_a_damaged_folder_is_refused_in_a_sentence(folder, file, how, sentence):
    damage(folder, file, how)
    with pytest.raises(DimoError, match=sentence):
        load_ursa(folder)


def test_a_missing_folder_and_missing_weights_are_named(tmp_path):
    with pytest.raises(DimoError, match="checkpoint folder .* does not exist"):
        load_ursa(tmp_path / "nowhere")
    with pytest.raises(DimoError, match="weights file .* does not exist"):
        read_weights(tmp_path / "student.pt")


def test_a_folder_that_is_no_world_cannot_be_scored(folder):
    (folder / "world.json").unlink()
    with pytest.raises(DimoError, match="is not a world's checkpoint"):
        load_world(folder)


def test_a_teacher_of_another_world_is_trained_and_loads(tmp_path):
    other = ShapesWorld(frames=2, object_shades=1, background_shades=3)
    recipe = TeacherRecipe(layers=1, hidden=32, heads=2, steps=3, batch_size=4)
    table = make_teacher(other, recipe, tmp_path / "made", videos_per_prompt=1)
    assert len(table.splitlines()) == 6
    assert load_world(tmp_path / "made") == other and load_ursa(tmp_path / "made").path.codebook_size == 7
    assert json.loads((tmp_path / "made" / "world.json").read_text())["world"] == "shapes"
    with pytest.raises(DimoError, match="steps must be at least 1"):
        make_teacher(other, TeacherRecipe(steps=0), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_teacher_replaces_only_a_teacher_and_only_by_a_finite_one(tmp_path, folder, monkeypatch):
    tiny = {"layers": 1, "hidden": 32, "heads": 2, "batch_size": 2}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    with pytest.raises(DimoError, match="mine exists and is not a world's checkpoint folder"):
        make_teacher(ShapesWorld(), TeacherRecipe(steps=1, **tiny), tmp_path / "mine")
    assert (tmp_path / "mine/thesis.txt").read_text() == "years of work"
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    monkeypatch.setattr("dimo.worlds.teacher.KEEP_EVERY", 1)
    with pytest.raises(DimoError, match="weights are not finite after 3 steps"):
        make_teacher(ShapesWorld(), TeacherRecipe(steps=3, lr=1e30, **tiny), folder)
    assert before == {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    assert not folder.with_name(f"{folder.name}.training.pt").exists()  # another rate would be refused


def test_a_world_file_of_another_world_is_refused(folder):
    file = folder / "world.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"object_shades": 3}))
    with pytest.raises(DimoError, match="codebook has 10 codes, but the world in its world.json has 14"):
        evaluate_to_folder(load_config("smoke", [f"distill.teacher_ckpt={folder}"]), folder / "student", folder / "out")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"frames": 3.0}))
    with pytest.raises(DimoError, match="frames must be a whole number, got 3.0"):
        load_world(folder)


def test_training_the_teacher_learns():
    """Fifty steps on an easy world: the loss on fresh videos falls well below the start's."""
    from dimo.ursa import MetricPath, UrsaTransformer, predict
    from dimo.ursa.token_losses import denoising
    from dimo.worlds.teacher import initialise, train_teacher, ursa_config

    recipe = TeacherRecipe(layers=1, hidden=32, heads=2, intermediate=32, steps=150, batch_size=32, lr=5e-3)
    world, g = ShapesWorld(), torch.Generator().manual_seed(9)
    prompt, x_1 = world.draw(64, g)
    x_t = MetricPath(world.codebook(), recipe.alpha, recipe.c).sample(x_1, 0.5, g)
    ids = encode(world, world.prompts)[prompt]
    torch.manual_seed(0)
    fresh = UrsaTransformer(ursa_config(world, recipe))
    initialise(fresh, world.codebook())
    trained = train_teacher(world, recipe, progress=False)
    with torch.no_grad():
        before, after = (denoising(predict(m, ids, x_t, world.latents_shape), x_1).item() for m in (fresh, trained))
    assert after < 0.5 * before
