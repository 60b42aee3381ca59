"""A folder written by URSA's own classes (tests/data/tiny-ursa): read to the recorded values, refused when damaged."""

import contextlib
import json
import math
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from hostile import Hostile
from safetensors.torch import load_file, save_file

from dimo.commands.inspect_folder import inspect_folder
from dimo.config import load_config
from dimo.errors import DimoError, are_finite
from dimo.train.trainer import Trainer
from dimo.ursa import build_ursa_inputs, load_ursa, save_student, visual_logits
from dimo.ursa.loading import load_student, load_transformer
from dimo.ursa.weights import read_weights, weight_headers, weight_shapes
from dimo.worlds import checkpoint_folder

DATA = Path(__file__).parent / "data"
TINY = DATA / "tiny-ursa"
PROMPTS = ["a red ball", "Überraschung: 猫, 2 dogs & a cat that jump over the wall"]
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
BIN = "transformer/diffusion_pytorch_model.bin"
OUTSIDE = "../vae/diffusion_pytorch_model.safetensors"  # exists
CONFIG = "transformer/config.json"
SHAPE, TEXT = (1, 6, 8), 24


@pytest.fixture(scope="module")
def tiny():
    return load_ursa(TINY)


@pytest.fixture(scope="module")
def recorded():
    return load_file(TINY / "recorded.safetensors")


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(TINY, tmp_path / "tiny-ursa")


def test_weights_are_read_onto_the_cpu_under_the_name_that_accelerate_gives_it(tiny):
    state = read_weights(TINY / "transformer", torch.device("cpu", 0))
    own = tiny.transformer.state_dict()
    assert state.keys() == own.keys() and all(torch.equal(state[key].float(), own[key]) for key in own)


def test_prompts_become_the_ids_of_upstreams_pipeline(tiny, recorded):
    want = recorded["0.input_ids"][:, :TEXT]
    assert torch.equal(tiny.tokenize([*PROMPTS, "", ""], TEXT), want)
    assert (want[0] == 0).sum() > 5 and not (want[1] == 0).any()  # one is padded, one cut


def test_the_prompts_that_are_cut_are_counted(tiny, monkeypatch):
    lengths = [len(ids) for ids in tiny.tokenizer(PROMPTS).input_ids]
    longest = max(lengths)
    for length in (1, min(lengths), longest - 1, longest, longest + 1):
        want = sum(each > length for each in lengths)
        assert tiny.tokenize_and_count([*PROMPTS, ""], length)[1] == want
        with monkeypatch.context() as patch:  # as of a tokenizer in plain Python
            patch.setattr("transformers.BatchEncoding.encodings", None)
            assert tiny.tokenize_and_count([*PROMPTS, ""], length)[1] == want


@pytest.mark.parametrize("call", [0, 2])
def test_the_pipelines_calls_are_reproduced(tiny, recorded, call):
    want = recorded[f"{call}.input_ids"]
    n = torch.Size(SHAPE).numel()
    codes = want[:, -n:] - tiny.transformer.config.lm_vocab_size
    inputs = build_ursa_inputs(tiny.transformer, want[:, :TEXT], codes, SHAPE)
    assert torch.equal(inputs.input_ids, want) and torch.equal(inputs.rope_pos, recorded[f"{call}.rope_pos"])
    logits = tiny.transformer(inputs.input_ids, inputs.rope_pos)
    off = (logits - recorded[f"{call}.logits"]).abs().max() / recorded[f"{call}.logits"].abs().max()
    assert off < 1e-4 and recorded[f"{call}.logits"].std() > 1


def test_sizes_come_from_the_folder(tiny):
    assert (tiny.path.codebook_size, tiny.path.alpha, tiny.path.c, tiny.shift) == (240, 0.9, 3.0, 1.0)
    assert tiny.strides == (1, 2) and tiny.latents_shape(3, 12, 16) == (3, 6, 8)
    with pytest.raises(DimoError, match="height must be a multiple of 2, got 13; the nearest are 12 or 14"):
        tiny.latents_shape(1, 13, 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_dtype_is_that_of_the_transformer_and_not_of_the_path(dtype):
    ursa = load_ursa(TINY, dtype=dtype)
    assert {p.dtype for p in ursa.transformer.parameters()} == {dtype}
    assert ursa.path.codebook.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64])
def test_weights_are_finite_also_where_their_sum_is_too_large_for_their_dtype(dtype):
    weights = torch.full((100, 100), 60_000, dtype=dtype)
    assert are_finite(weights) and are_finite(weights[:0])
    for bad in ([math.nan], [math.inf], [-math.inf], [math.inf, -math.inf]) if dtype.is_floating_point else ():
        spoilt = weights.clone()
        spoilt[0, : len(bad)] = torch.tensor(bad)
        assert not are_finite(spoilt)


def test_bfloat16_is_close_to_float32_and_so_is_autocast(tiny, recorded):
    ids, pos, want = (recorded[f"0.{name}"] for name in ("input_ids", "rope_pos", "logits"))
    low = load_ursa(TINY, dtype=torch.bfloat16).transformer(ids, pos)
    assert low.dtype == torch.bfloat16 and 1e-4 < (low - want).norm() / want.norm() < 0.03
    with torch.autocast("cpu", torch.bfloat16):
        mixed = tiny.transformer(ids, pos)
    assert 1e-4 < (mixed - want).norm() / want.norm() < 0.03


def test_a_dtype_or_backend_that_does_not_exist_is_refused():
    with pytest.raises(DimoError, match="dtype must be one of float32, bfloat16, float16, got torch.int64"):
        load_ursa(TINY, dtype=torch.int64)
    with pytest.raises(DimoError, match="backend must be one of native, upstream, got 'upstrem'; did you mean 'upstre"):
        load_ursa(TINY, backend="upstrem")


def test_without_diffnext_frames_and_backend_upstream_say_what_to_install(monkeypatch):
    monkeypatch.delitem(sys.modules, "dimo.ursa.upstream", raising=False)
    monkeypatch.delattr("dimo.ursa.upstream", raising=False)
    for name in [name for name in sys.modules if name.split(".")[0] == "diffnext"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "diffnext", None)
    ursa = load_ursa(TINY)
    assert ursa.vae is None
    with pytest.raises(DimoError, match="cannot be turned into frames: diffnext .* pip install .*URSA.git"):
        ursa.decode(torch.zeros(1, *SHAPE, dtype=torch.long))
    with pytest.raises(DimoError, match="diffnext .* pip install .*URSA.git"):
        load_ursa(TINY, backend="upstream")


def test_a_folder_without_a_vae_loads_and_says_so(folder):
    shutil.rmtree(folder / "vae")
    ursa = load_ursa(folder)
    assert ursa.strides == (4, 8)
    with pytest.raises(DimoError, match="vae contains no VAE"):
        ursa.decode(torch.zeros(1, *SHAPE, dtype=torch.long))


def test_a_head_over_text_and_codebook_gives_the_same_visual_logits(folder, tiny, generator):
    state = load_file(folder / WEIGHTS)
    text = torch.randn(272, 16, generator=generator).half()
    save_file(state | {"lm_head.weight": torch.cat([text, state["lm_head.weight"]])}, folder / WEIGHTS)
    change(folder / CONFIG, {"lm_head_size": 512})
    codes = torch.randint(240, (2, 48), generator=generator)
    both = [visual_logits(m, torch.ones(2, 5).long(), codes, SHAPE)
            for m in (load_ursa(folder).transformer, tiny.transformer)]  # fmt: skip
    assert both[0].shape == (2, 48, 240) and torch.allclose(*both, atol=1e-5)


def change(file, values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def shard(folder, drop=0):
    """Split the weights in three shards with an index, of which the last `drop` are then missing."""
    state, names = load_file(folder / WEIGHTS), {}
    (folder / WEIGHTS).unlink()
    for i in range(3):
        name = f"diffusion_pytorch_model-0000{i + 1}-of-00003.safetensors"
        part = {k: state[k] for k in sorted(state)[i::3]}
        names |= dict.fromkeys(part, name)
        if i < 3 - drop:
            save_file(part, folder / "transformer" / name)
    index = folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return index


def as_bin(folder, content):
    (folder / WEIGHTS).unlink()
    torch.save(content, folder / BIN)


def edit(folder, key, change):
    state = load_file(folder / WEIGHTS)
    save_file(state | {key: change(state[key])}, folder / WEIGHTS)


def retokenize(folder, **changes):
    file = folder / "tokenizer" / "tokenizer.json"
    values = json.loads(file.read_text())
    if "add" in changes:
        token = values["added_tokens"][0] | {"id": changes["add"], "content": "<|extra|>"}
        values["added_tokens"].append(token)
        values["model"]["vocab"]["<|extra|>"] = changes["add"]
    file.write_text(json.dumps(values))


DAMAGE = {
    "a missing shard": (lambda f: shard(f, 1), "1 of 3 shards .* are missing, the first is .*-00003-of-00003"),
    "two missing shards": (lambda f: shard(f, 2), "2 of 3 shards .* the copy of the folder is incomplete"),
    "an index of nothing": (lambda f: shard(f).write_text('{"weight_map": {}}'), "index.json is damaged"),
    "an index that leads outside": (
        lambda f: shard(f).write_text(json.dumps({"weight_map": {"lm_head.weight": OUTSIDE}})),
        "1 of 1 shards .* are missing",
    ),
    "a cut shard": (lambda f: cut(shard(f).with_name("diffusion_pytorch_model-00002-of-00003.safetensors")), "damaged"),
    "an empty weights file": (lambda f: (f / WEIGHTS).write_bytes(b""), r"is empty \(0 bytes\)"),
    "an empty .bin": (lambda f: (as_bin(f, {}), (f / BIN).write_bytes(b"")), r"is empty \(0 bytes\)"),
    "a .bin of nonsense": (lambda f: (as_bin(f, {}), (f / BIN).write_bytes(b"\0")), "as plain tensors: .+"),
    "weights of integers": (lambda f: edit(f, "model.norm.weight", lambda v: v.long()),
                            "model.norm.weight in .* must hold floating-point numbers, got torch.int64"),
    "a weight that is NaN": (lambda f: edit(f, "lm_head.weight", lambda v: v.index_fill(0, torch.tensor(3), math.nan)),
                             "lm_head.weight in .* must be finite, got NaN"),
    "an infinite weight": (lambda f: edit(f, "lm_head.weight", lambda v: v.index_fill(1, torch.tensor(3), -math.inf)),
                           "lm_head.weight in .* must be finite"),
    "an infinite codebook": (lambda f: torch.save({"path.emb": torch.full((240, 6), math.inf)},
                                                  f / "scheduler" / "scheduler_model.pth"), "'path.emb' in .* finite"),
    "no tokenizer.json": (lambda f: (f / "tokenizer" / "tokenizer.json").unlink(),
                          "could not be read: there is no tokenizer.json$"),
    "an LFS pointer": (lambda f: (f / WEIGHTS).write_text("version https://git-lfs.example/spec/v1\noid sha256:0\n"),
                       "is a Git LFS pointer, not the file itself"),
    "code in a .bin": (lambda f: as_bin(f, {"lm_head.weight": Hostile(f / "executed")}),
                       "could not be read as plain tensors"),
    "a nested .bin": (lambda f: as_bin(f, {"state_dict": {}}), "names to tensors only, but 'state_dict' is of"),
    "a .bin that is a list": (lambda f: as_bin(f, [1]), "must hold a plain state dict, got list"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "weights file .* does not exist, nor .bin, nor an index"),
    "a config that is a list": (lambda f: (f / CONFIG).write_text("[]"), "must hold an object, got list"),
    "a size in words": (lambda f: change(f / CONFIG, {"hidden_size": "16"}), "hidden_size must be .*, got '16'"),
    "BOV among the codes": (lambda f: change(f / CONFIG, {"bov_token_id": 272}), r"bov_token_id must lie in \[0, lm_v"),
    "another head": (lambda f: change(f / CONFIG, {"lm_head_size": 300}), "lm_head_size must be .* = 240, or .* = 512"),
    "a wrong shape": (lambda f: change(f / CONFIG, {"intermediate_size": 64}), r"\(16, 32\) in place of \(16, 64\)"),
    "no codebook": (lambda f: torch.save({"emb": torch.ones(3)}, f / "scheduler" / "scheduler_model.pth"), "path.emb"),
    "another codebook": (lambda f: torch.save({"path.emb": torch.ones(9, 6)}, f / "scheduler" / "scheduler_model.pth"),
                         "has 9 codes, the transformer's config.json says 240"),
    "a scheduler that is a tensor": (lambda f: torch.save(torch.ones(9, 6), f / "scheduler" / "scheduler_model.pth"),
                                     "must hold a plain state dict, got Tensor"),
    "alpha in words": (lambda f: change(f / "scheduler/scheduler_config.json", {"alpha": "0.9"}), "alpha in .* '0.9'"),
    "no c": (lambda f: change(f / "scheduler/scheduler_config.json", {"c": None}), "c in .* must be a positive number"),
    "no shift": (lambda f: change(f / "scheduler/scheduler_config.json", {"shift": 0}), "shift in .* must .* got 0"),
    "a cut tokenizer": (lambda f: cut(f / "tokenizer" / "tokenizer.json"), "tokenizer in .* could not be read"),
    "a tokenizer of another model": (lambda f: retokenize(f, add=272), "has ids up to 272, but ids from lm_vocab_size"),
    "a VAE of another codebook": (lambda f: change(f / "vae/config.json", {"num_vq_embeddings": 64000}),
                                  "VAE in .* has 64000 codes, the transformer's config.json says 240"),
    "strides of nothing": (lambda f: change(f / "vae/config.json", {"temporal_stride": 0}), "temporal_stride and .*"),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_folder_is_refused_in_a_sentence(folder, what):
    damage, sentence = DAMAGE[what]
    damage(folder)
    with pytest.raises(DimoError, match=sentence) as refusal:
        load_ursa(folder)
    assert str(folder) in str(refusal.value)
    assert not (folder / "executed").exists()


def test_a_tokenizer_without_the_bov_id_is_refused(folder):
    """The config's id is a text id, but the tokenizer stops before it."""
    state = load_file(folder / WEIGHTS)
    embeddings = state["model.embed_tokens.weight"]
    grown = torch.cat([embeddings[:272], embeddings[:8], embeddings[272:]])
    save_file(state | {"model.embed_tokens.weight": grown}, folder / WEIGHTS)
    change(folder / CONFIG, {"vocab_size": 520, "lm_vocab_size": 280, "bov_token_id": 275})
    with pytest.raises(DimoError, match="tokenizer in .* has no token 275, which config.json gives as bov_token_id"):
        load_ursa(folder)
    change(folder / CONFIG, {"bov_token_id": 3})
    assert load_ursa(folder).transformer.config.bov_token_id == 3


@pytest.mark.parametrize(
    ("state", "sentence"),
    [
        ({"palette": torch.ones(9, 3)}, "palette .* 9 codes, not 10"),
        ({"colours": torch.ones(10, 3)}, "no palette"),
    ],
)
def test_a_palette_of_another_world_is_refused(tmp_path, state, sentence):
    folder = shutil.copytree(checkpoint_folder("shapes"), tmp_path / "shapes")
    save_file(state, folder / "vae" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(DimoError, match=sentence):
        load_ursa(folder)


def test_code_that_comes_with_a_tokenizer_is_not_executed(folder):
    (folder / "tokenizer" / "own.py").write_text(
        f"import os\nos.mkdir({str(folder / 'executed')!r})\nfrom transformers import PreTrainedTokenizerFast as Own\n"
    )
    change(folder / "tokenizer/tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}})
    with contextlib.suppress(DimoError):
        load_ursa(folder)
    assert not (folder / "executed").exists()


def test_a_tokenizer_that_cannot_pad_is_refused(folder):
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        file = folder / "tokenizer" / name
        values = json.loads(file.read_text())
        values.pop("pad_token", None)
        file.write_text(json.dumps(values))
    with pytest.raises(DimoError, match="has no padding token"):
        load_ursa(folder)


def test_shards_are_the_same_weights_and_the_same_shapes(folder):
    whole, shapes = load_transformer(folder / "transformer").state_dict(), weight_shapes(folder / "transformer")
    index = shard(folder)
    assert all(torch.equal(v, whole[k]) for k, v in load_transformer(folder / "transformer").state_dict().items())
    assert weight_shapes(folder / "transformer") == shapes == {k: tuple(v.shape) for k, v in whole.items()}
    index.unlink()
    torch.save(read_weights(TINY / "transformer"), folder / "transformer" / "diffusion_pytorch_model.bin")
    assert weight_shapes(folder / "transformer") == shapes
    assert {dtype for _, dtype in weight_headers(folder / "transformer").values()} == {"float16"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_student_is_written_in_the_dtype_asked_for(tiny, tmp_path, dtype):
    save_student(tmp_path / "student", tiny.transformer, dtype=dtype)
    state = read_weights(tmp_path / "student")
    assert {v.dtype for v in state.values()} == {dtype}
    assert {name for _, name in weight_headers(tmp_path / "student").values()} == {str(dtype).removeprefix("torch.")}
    assert "head_dim" not in json.loads((tmp_path / "student" / "config.json").read_text())
    again = load_student(tiny, tmp_path / "student")
    worst = max((a - b).abs().max() for a, b in zip(again.parameters(), tiny.transformer.parameters()))
    assert worst == 0 if dtype != torch.bfloat16 else 0 < worst < 0.02  # the folder is float16, which bfloat16 rounds


@pytest.mark.parametrize("asked", [None, torch.float16])
def test_training_on_the_folder_leaves_the_averaged_student_in_bfloat16_or_the_dtype_asked_for(tmp_path, asked):
    dtype = asked or torch.bfloat16
    more = [f"experiment.student_dtype={str(asked).removeprefix('torch.')}"] if asked else []
    (tmp_path / "prompts.txt").write_text("a red ball\na dog\n")
    trainer = Trainer(load_config("smoke", [
        f"distill.teacher_ckpt={TINY}", f"distill.prompt_source={tmp_path / 'prompts.txt'}", "distill.num_frames=5",
        "distill.height=8", "distill.width=16", "distill.max_prompt_length=9", "distill.batch_size_per_gpu=2",
        "training.max_train_steps=2", "model.device=cpu", f"experiment.output_dir={tmp_path / 'run'}", *more,
    ]))  # fmt: skip
    assert trainer.num_visual_tokens == 5 * 4 * 8  # the folder's strides are 1 and 2
    trainer.train(progress=False)
    final = tmp_path / "run" / "checkpoints" / "final"
    ema = {k: v.to(dtype) for k, v in trainer.networks.ema.state_dict().items()}
    ema["model.norm.weight"] *= 4  # model.final_logit_gain is 4 times model.logit_gain
    for source in (final / "student.pt", final / "student"):
        state = read_weights(source)
        assert state.keys() == ema.keys() and all(torch.equal(state[k], ema[k]) for k in ema)
    student = trainer.accelerator.unwrap_model(trainer.networks.student).state_dict()
    assert any(not torch.equal(student[k].to(dtype), ema[k]) for k in ema)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("model.backend=upstrem", "model.backend must be one of native, upstream"),
        ("experiment.student_dtype=int8", "experiment.student_dtype must be one of auto, float32, bfloat16, float16"),
        ("distill.guidance_scale=0.5", "distill.guidance_scale must be at least 1"),
    ],
)
def test_keys_out_of_range_are_refused(override, sentence):
    with pytest.raises(DimoError, match=sentence):
        load_config("smoke", [override])


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda file, state: file.write_bytes(b""), r"student.pt is empty \(0 bytes\)"),
        (lambda file, state: file.write_text("experiment: {name: w}\n"), "tensors: it was not written by torch.save"),
        (lambda file, state: torch.save({k: v.long() for k, v in state.items()}, file), "must hold floating-point"),
        (lambda file, state: torch.save({k: v / 0 for k, v in state.items()}, file), "in the weights of .* be finite"),
        (lambda file, state: torch.save(state, file.with_name("ema.safetensors")),
         "does not exist, .*; give the path of one of its files: ema.safetensors$"),
    ],
)  # fmt: skip
def test_a_student_that_is_none_is_refused_in_a_sentence(tiny, tmp_path, make, sentence):
    make(tmp_path / "student.pt", tiny.transformer.state_dict())
    with pytest.raises(DimoError, match=sentence):
        load_student(tiny, tmp_path)


def test_the_student_of_another_model_is_refused(tiny, tmp_path, ursa):
    torch.save(ursa.transformer.state_dict(), tmp_path / "student.pt")
    with pytest.raises(DimoError, match="student.pt do not fit the teacher .*tiny-ursa: it has unknown model.layers.2"):
        load_student(tiny, tmp_path / "student.pt")


DAMAGES = {  # what is not said by what libraries raise: {name: (file, its new text, the sentence)}
    "brackets": (CONFIG, "[" * 100_000, "config.json is damaged: "),
    "digits": (CONFIG, '{"hidden_size": ' + "1" * 5000 + "}", "config.json is damaged: "),
    "twice": (CONFIG, '{"rope_theta": 10000, "rope_theta": 1000000}', "config.json is damaged.*rope_theta' twice"),
    "theta": (CONFIG, '{"rope_theta": 1' + "0" * 400 + "}", "rope_theta must be .* at most 9007"),
    "layers": (CONFIG, '{"num_hidden_layers": 1000000000}', "num_hidden_layers must be .* at most 1000, got 10"),
    "width": (CONFIG, '{"hidden_size": 1000000000000000}', "hidden_size must be .* at most 1048576"),
    "tokens": ("tokenizer/special_tokens_map.json", '{"eos_token": ', "special_tokens_map.json is damaged"),
    "page": ("tokenizer/added_tokens.json", "<!doctype html>", "added_tokens.json is damaged"),
    "list": ("vae/config.json", '{"_class_name": ["AutoencoderVQ"], "num_vq_embeddings": 7}', "has 7 codes, .* 240"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_told_by_loading_and_by_inspection(folder, damage):
    name, text, sentence = DAMAGES[damage]
    (folder / name).write_text(text, encoding="utf-8")
    with pytest.raises(DimoError, match=sentence):
        load_ursa(folder)
    assert any(re.search(sentence, missing) for missing in inspect_folder(folder, 5, 8, 16)[1])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda emb: emb.to_sparse(), "'path.emb' in .* must be a dense tensor"),
        (lambda emb: emb[:1].expand_as(emb).clone(), "all rows of 'path.emb' in .*scheduler_model.pth are equal"),
    ],
)
def test_a_codebook_without_distances_is_refused(folder, change, sentence):
    file = folder / "scheduler" / "scheduler_model.pth"
    torch.save({key: change(value) for key, value in torch.load(file, weights_only=True).items()}, file)
    with pytest.raises(DimoError, match=sentence):
        load_ursa(folder)


def test_a_file_in_place_of_the_vaes_folder_is_refused(folder):
    shutil.rmtree(folder / "vae")
    (folder / "vae").write_text("elsewhere")
    with pytest.raises(DimoError, match="vae is a file, but a checkpoint's VAE is a folder"):
        load_ursa(folder)


def test_shards_that_hold_the_same_are_refused(folder):
    """As where a folder was downloaded over an older one of other shards."""
    state, first, second = load_file(folder / WEIGHTS), "a-00001-of-00002.safetensors", "a-00002-of-00002.safetensors"
    keys = sorted(state)
    (folder / WEIGHTS).unlink()
    for name, part in ((first, keys[:6]), (second, keys[5:])):
        save_file({key: state[key] for key in part}, folder / "transformer" / name)
    index = {"weight_map": dict.fromkeys(keys[:6], first) | dict.fromkeys(keys[6:], second)}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    for read in (read_weights, weight_shapes):
        with pytest.raises(DimoError, match=f"{second} contains {keys[5]}, which another shard"):
            read(folder / "transformer")
