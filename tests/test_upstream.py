"""Beside diffnext itself, URSA's own code. Skipped where it is not installed; nothing here installs it."""

import copy
import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from hostile import Hostile
from safetensors.torch import load_file

pytest.importorskip("diffnext")
if int(transformers.__version__.split(".")[0]) > 4:
    pytest.skip("diffnext's transformer needs transformers 4", allow_module_level=True)

from diffnext.models.text_encoders import qwen3
from diffnext.models.transformers.transformer_ursa import URSATransformer3DModel
from diffnext.pipelines import URSAPipeline

from dimo.bench import bench, bench_config
from dimo.commands.export import export
from dimo.commands.sample import Request, sample_to_folder
from dimo.config import load_config
from dimo.errors import DimoError
from dimo.train.trainer import Trainer
from dimo.ursa import UrsaConfig, UrsaTransformer, build_ursa_inputs, load_ursa, sample, upstream
from dimo.ursa.frames import eight_bits
from dimo.ursa.loading import load_student
from dimo.ursa.weights import read_pickle, read_weights
from dimo.worlds import checkpoint_folder

DATA = Path(__file__).parent / "data"
TINY, STUDENT = DATA / "tiny-ursa", DATA / "tiny-student"


@pytest.fixture(scope="module")
def native():
    return load_ursa(TINY)


@pytest.fixture(scope="module")
def other():
    return load_ursa(TINY, backend="upstream")


@pytest.fixture(scope="module")
def video_folder(tmp_path_factory):
    """64,000 codes and a video VAE: 17 frames are 5 latent frames, 8 pixels a token."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(DATA)
        from make_tiny_ursa import make
    return make(tmp_path_factory.mktemp("video") / "ursa", codes=64_000)


def test_upstreams_class_has_our_keys_and_our_names(native, other):
    assert isinstance(other.transformer, URSATransformer3DModel)
    assert other.transformer.config == native.transformer.config
    ours, theirs = native.transformer.state_dict(), other.transformer.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_native_and_upstream_agree_layer_by_layer(native, other, generator):
    ids = native.tokenize(["a red ball", "two dogs"], 9)
    inputs = build_ursa_inputs(native.transformer, ids, torch.randint(240, (2, 30), generator=generator), (2, 3, 5))
    errors = upstream.compare_layers(native.transformer, other.transformer, inputs.input_ids, inputs.rope_pos)
    assert list(errors) == ["embed_tokens", "layers.0", "layers.1", "norm", "logits"]
    assert max(errors.values()) < 1e-5
    wrong = copy.deepcopy(native.transformer)
    wrong.model.layers[1].mlp.down_proj.weight.data.mul_(1.1)
    errors = upstream.compare_layers(wrong, other.transformer, inputs.input_ids, inputs.rope_pos)
    assert errors["layers.0"] < 1e-5 and errors["layers.1"] > 1e-3 and errors["logits"] > 1e-3


def test_hidden_and_the_last_positions_are_the_same_calls(native, other, generator):
    ids = native.tokenize(["a red ball"], 9)
    inputs = build_ursa_inputs(native.transformer, ids, torch.randint(240, (1, 30), generator=generator), (2, 3, 5))
    for transformer in (native.transformer, other.transformer):
        logits = transformer(inputs.input_ids, inputs.rope_pos)
        last = transformer(inputs.input_ids, inputs.rope_pos, last=31)
        assert torch.allclose(last, logits[:, -31:], atol=1e-5)
        hidden = transformer.hidden(inputs.input_ids, inputs.rope_pos)
        assert torch.allclose(hidden @ transformer.lm_head.weight.T, logits, atol=1e-5)
        with pytest.raises(DimoError, match="rope_pos must have shape"):
            transformer(inputs.input_ids, inputs.rope_pos[1:])


def test_in_bfloat16_we_are_nearer_to_float32_than_upstream():
    config = UrsaConfig(
        hidden_size=256, intermediate_size=512, num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=6,
        vocab_size=900, lm_vocab_size=500, lm_head_size=400, bov_token_id=7,
    )  # fmt: skip
    g = torch.Generator().manual_seed(0)
    ours = UrsaTransformer(config).requires_grad_(False)
    for name, p in ours.named_parameters():
        p.normal_(1.0, 0.1, generator=g) if "norm" in name else p.normal_(0.0, 0.04, generator=g)
    theirs = upstream.empty_transformer(config)
    theirs.load_state_dict(ours.state_dict(), assign=True)
    ids, pos = torch.randint(900, (1, 200), generator=g), torch.randint(40, (200, 3), generator=g)
    want = theirs.requires_grad_(False)(ids, pos)
    assert (ours(ids, pos) - want).norm() < 1e-5 * want.norm()
    error = [(copy.deepcopy(m).bfloat16()(ids, pos) - want).norm() / want.norm() for m in (ours, theirs)]
    assert 1e-3 < error[0] < 0.95 * error[1]


def test_gradients_agree(native, other, generator):
    ids = native.tokenize(["a red ball"], 9)
    inputs = build_ursa_inputs(native.transformer, ids, torch.randint(240, (1, 30), generator=generator), (2, 3, 5))
    grads = []
    for transformer in (copy.deepcopy(native.transformer), copy.deepcopy(other.transformer)):
        transformer.requires_grad_(True)(inputs.input_ids, inputs.rope_pos).square().mean().backward()
        grads.append({k: p.grad for k, p in transformer.named_parameters()})
    for key, ours in grads[0].items():
        assert (ours - grads[1][key]).abs().max() <= 1e-4 * ours.abs().max()


def test_the_swiglu_bridge_says_so_and_computes_swiglu(monkeypatch, caplog, generator):
    monkeypatch.setattr(qwen3, "swiglu", upstream._cuda_swiglu)
    x, y = torch.randn(2, 3, 4, generator=generator)
    with pytest.raises((AssertionError, RuntimeError)):  # why there is a bridge
        qwen3.swiglu(x, y)
    with caplog.at_level(logging.WARNING):
        upstream.bridge()
    assert "SwiGLU" in caplog.text
    assert torch.allclose(qwen3.swiglu(x, y), x / (1 + (-x).exp()) * y)


def test_frames_equal_the_recorded(native):
    recorded = load_file(TINY / "recorded.safetensors")
    frames = native.decode(recorded["latents"])
    want = (recorded["frames"].permute(0, 2, 3, 4, 1) * 127.5 + 127.5).clamp(0, 255) / 255
    assert frames.shape == (2, 1, 12, 16, 3)
    assert torch.equal(eight_bits(frames), load_file(STUDENT / "recorded.safetensors")["frames.bytes"])
    assert (frames - want).abs().max() < 1e-5 and want.std() > 0.01
    with pytest.raises(DimoError, match=r"codes must lie in \[0, 240\)"):
        native.decode(recorded["latents"] + 240)


def test_a_vae_that_drops_frames_is_reported(video_folder, caplog):
    ursa = load_ursa(video_folder)
    assert ursa.decode(torch.zeros(1, 5, 2, 2, dtype=torch.long)).shape == (1, 17, 16, 16, 3) and not caplog.records
    assert ursa.decode(torch.zeros(1, 13, 2, 2, dtype=torch.long)).shape[1] < 49 and "of 49 frames" in caplog.text


def test_the_pipelines_calls_are_rebuilt(native):
    calls, latents = upstream.record_calls(
        upstream.load_pipeline(TINY), prompt=["a red ball"], num_frames=2, height=6, width=8, num_inference_steps=3,
        guidance_scale=4.0, max_prompt_length=16,
    )  # fmt: skip
    assert len(calls) == 3 and calls[0].input_ids.shape == (2, 17 + 24) and latents.shape == (1, 2, 3, 4)
    rows = upstream.compare_calls(native.transformer, calls, (2, 3, 4))
    assert all(row["ids"] and row["positions"] and row["logits"] < 1e-5 for row in rows)
    calls[1].input_ids[:, 16] = 5  # another BOV
    calls[2].rope_pos[20, 1] += 1
    rows = upstream.compare_calls(native.transformer, calls, (2, 3, 4))
    assert [row["ids"] for row in rows] == [True, False, True]
    assert [row["positions"] for row in rows] == [True, True, False]


def test_the_values_recorded_of_a_student_are_what_upstream_gives(monkeypatch):
    monkeypatch.syspath_prepend(DATA)
    from record_student import record

    kept, again = load_file(STUDENT / "recorded.safetensors"), record(STUDENT / "student.pt")
    assert kept.keys() == again.keys()
    assert all(torch.allclose(kept[key].double(), again[key].double(), rtol=1e-5, atol=1e-4) for key in kept)


def test_a_hostile_pickle_does_not_reach_upstreams_scheduler(tmp_path):
    """Upstream unpickles the file whatever it holds."""
    folder = shutil.copytree(TINY, tmp_path / "folder")
    torch.save({"path.emb": Hostile(tmp_path / "executed")}, folder / "scheduler" / "scheduler_model.pth")
    with pytest.raises(DimoError, match="could not be read as plain tensors"):
        upstream.load_pipeline(folder)
    assert not (tmp_path / "executed").exists()


def test_what_upstreams_pipeline_cannot_run_is_refused_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(URSAPipeline, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))

    def edited(name: str, **values) -> Path:
        folder = shutil.copytree(TINY, tmp_path / f"{len(list(tmp_path.iterdir()))}")
        file = folder / name
        file.write_text(json.dumps(json.loads(file.read_text()) | values))
        return folder

    bare = shutil.copytree(TINY, tmp_path / "bare")
    (bare / "model_index.json").unlink()
    for folder, sentence in (
        (checkpoint_folder("shapes"), "needs head_dim = 128, but this checkpoint's config.json has head_dim = 16"),
        (bare, "model_index.json is missing"),
        (edited("vae/config.json", _class_name="PaletteDecoder"), "cannot run the VAE in .*, of class 'Palette"),
        (edited("transformer/config.json", lm_head_size=512), "over the codebook alone, .* lm_head_size = 512 for 240"),
    ):
        with pytest.raises(DimoError, match=sentence):
            upstream.load_pipeline(folder)


def test_a_folder_that_upstream_cannot_load_is_a_sentence(tmp_path):
    folder = shutil.copytree(TINY, tmp_path / "folder")
    (folder / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"cut")
    with pytest.raises(DimoError, match=f"pipeline could not be loaded from {folder}: "):
        upstream.load_pipeline(folder)


def test_a_pipeline_of_a_student_warns_where_it_guides_it_again(caplog):
    settings = {"prompt": "a red ball", "num_frames": 2, "height": 6, "width": 8, "num_inference_steps": 1,
                "max_prompt_length": 12, "output_type": "latent"}  # fmt: skip
    pipeline = upstream.load_pipeline(TINY, student=STUDENT)
    taken = pipeline.transformer.state_dict()
    assert all(torch.equal(taken[k], v.float()) for k, v in read_pickle(STUDENT / "student.pt").items())
    for guidance, said in (({}, "guidance_scale=7"), ({"guidance_scale": 3.0}, "guidance_scale=3"), (1, "")):
        caplog.clear()
        pipeline(**settings, **(guidance if isinstance(guidance, dict) else {"guidance_scale": guidance}))
        assert (f"{said} guides the student a second time" in caplog.text) if said else "guides" not in caplog.text
    upstream.load_pipeline(TINY)(**settings)
    assert "guides" not in caplog.text


@pytest.mark.parametrize("source", ["a folder", "random weights"])
def test_bench_times_upstreams_pipeline_without_a_gpu(source, tmp_path, monkeypatch):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red ball\n")
    keys = ["model.device=cpu", "distill.num_frames=5", "distill.height=8", "distill.width=8",
            "distill.max_prompt_length=4", f"distill.prompt_source={prompts}"]  # fmt: skip
    size = "tiny" if source == "random weights" else None
    keys += [] if size else [f"distill.teacher_ckpt={TINY}"]
    lines, parts = [], ("generate",)
    report = bench(bench_config(None, size, keys), size, parts, ("upstream",), repeats=1, warmup=0, generate_steps=(1,),
                   progress=lines.append)  # fmt: skip
    assert report["upstream"]["seconds"] > 0 and "upstream's pipeline, 25 steps" in "".join(lines)


def test_bench_refuses_a_world_before_it_measures(monkeypatch):
    monkeypatch.setattr("dimo.bench.matrix_product", lambda clock: pytest.fail("measured"))
    with pytest.raises(DimoError, match="--against upstream: .* needs head_dim = 128, .* random weights with --size"):
        bench(load_config("shapes", []), against=("upstream",))


def test_a_world_with_small_heads_is_refused():
    with pytest.raises(DimoError, match="needs head_dim = 128, but this checkpoint's config.json has head_dim = 16"):
        load_ursa(checkpoint_folder("shapes"), backend="upstream")


@pytest.fixture(scope="module", params=["native", "upstream"])
def run(request, video_folder, tmp_path_factory):
    """Two training steps at 17x32x32 on 64,000 codes, and what they leave."""
    prompts = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    prompts.write_text("a red ball\na dog\n")
    sizes = ["distill.num_frames=17", "distill.height=32", "distill.width=32", "distill.max_prompt_length=16"]
    config = load_config("smoke", [
        *sizes, f"distill.teacher_ckpt={video_folder}", f"distill.prompt_source={prompts}", "model.device=cpu",
        f"experiment.output_dir={tmp_path_factory.mktemp('run') / 'run'}", "training.max_train_steps=2",
        "distill.batch_size_per_gpu=1", f"model.backend={request.param}", "experiment.student_dtype=float16",
        "experiment.sample_every=2", "model.logit_gain=2", "model.final_logit_gain=6",
    ])  # fmt: skip
    trainer = Trainer(config)
    trainer.train(progress=False)
    n = trainer.networks
    unwrapped = [trainer.accelerator.unwrap_model(m) for m in (n.teacher, n.student, n.aux, n.ema)]
    want = URSATransformer3DModel if request.param == "upstream" else type(load_ursa(TINY).transformer)
    assert all(isinstance(m, want) for m in unwrapped)
    return Path(config.experiment.output_dir), unwrapped[3].state_dict()


def test_a_student_of_either_backend_loads_strictly_into_upstreams_class(run, video_folder):
    """The weights are the moving average's, with final_logit_gain in the last norm."""
    path, ema = run
    ema = ema | {"model.norm.weight": ema["model.norm.weight"] * 3}
    final = path / "checkpoints" / "final"
    theirs = URSATransformer3DModel.from_pretrained(video_folder / "transformer")
    taught = read_weights(video_folder / "transformer")
    assert theirs.load_state_dict(torch.load(final / "student.pt", weights_only=True), strict=True)
    again = URSATransformer3DModel.from_pretrained(final / "student")
    assert again.config.hidden_size == 16 and again.config.lm_head_size == 64_000
    for model in (theirs, again):
        state = model.state_dict()
        assert state.keys() == ema.keys()
        assert all(torch.equal(state[k].half(), ema[k].half()) for k in ema)
        assert torch.allclose(state["model.norm.weight"], taught["model.norm.weight"].float() * 6, rtol=2e-3)
    assert any(not torch.equal(state[k].half(), taught[k]) for k in ema)


def test_the_student_runs_in_upstreams_pipeline_in_one_step(run, video_folder):
    path, _ = run
    student = path / "checkpoints" / "final" / "student.pt"
    pipeline = URSAPipeline.from_pretrained(str(video_folder), torch_dtype=torch.float32)
    pipeline.transformer.load_state_dict(torch.load(student, weights_only=True), strict=True)
    settings = {"prompt": "a red ball", "num_frames": 17, "height": 32, "width": 32, "num_inference_steps": 1,
                "guidance_scale": 1, "max_prompt_length": 16}  # fmt: skip
    frames = pipeline(generator=torch.Generator().manual_seed(0), **settings).frames
    assert frames.shape == (1, 17, 32, 32, 3) and frames.std() > 1
    again = upstream.load_pipeline(video_folder, student=student)
    calls, latents = upstream.record_calls(again, **settings)
    assert len(calls) == 1 and len(calls[0].input_ids) == 1  # one pass, unguided
    ursa = load_ursa(video_folder)
    assert upstream.compare_calls(load_student(ursa, student), calls, (5, 4, 4))[0]["logits"] < 1e-5
    other = eight_bits(ursa.decode(latents)) != torch.from_numpy(frames)
    assert other.float().mean() < 1e-3  # float32 sums of two copies of the VAE; rounding changes a fourth


def test_an_exported_folder_is_the_student_to_upstreams_pipeline(run, video_folder, tmp_path, monkeypatch):
    """`from_pretrained` alone: one step gives dimo's logits and, from the same noise and draws, dimo's tokens."""
    monkeypatch.syspath_prepend(DATA)
    from record_student import Draws

    upstream.bridge()
    path, _ = run
    assert "num_inference_steps=1, guidance_scale=1, max_prompt_length=16" in export(path, tmp_path / "out")
    pipeline = URSAPipeline.from_pretrained(str(tmp_path / "out"), torch_dtype=torch.float32)
    draws, prompts = Draws(pipeline, seed=2), ["a red ball", "a dog"]
    settings = {"num_frames": 17, "height": 32, "width": 32, "max_prompt_length": 16}
    calls, theirs = upstream.record_calls(pipeline, prompt=prompts, num_inference_steps=1, guidance_scale=1, **settings)
    assert len(calls) == 1
    student = load_student(load_ursa(video_folder), path)
    assert upstream.compare_calls(student, calls, (5, 4, 4))[0]["logits"] < 1e-5
    taught = load_ursa(tmp_path / "out")
    x_init = calls[0].input_ids[:, -80:] - student.config.lm_vocab_size
    monkeypatch.setattr(torch, "rand", lambda size, **_: draws.used[0].view(size))
    ours = sample(taught.transformer, taught.path, taught.tokenize(prompts, 16), (5, 4, 4), 1, x_init=x_init)
    assert torch.equal(ours, theirs.flatten(1))


def test_dimo_sample_writes_frames_of_the_student(run, video_folder, tmp_path):
    path, _ = run
    request = Request(str(video_folder), str(path), 17, 32, 32, max_prompt_length=16)
    assert sample_to_folder(request, ["a red ball"], tmp_path)[0].name == "0000.mp4"


def test_transformers_5_is_refused_in_a_sentence(monkeypatch):
    monkeypatch.setattr("transformers.__version__", "5.1.0")
    sentence = "diffnext's transformer needs transformers >=4.57.1,<5, got 5.1.0"
    with pytest.raises(DimoError, match=sentence):
        load_ursa(TINY, backend="upstream")
    with pytest.raises(DimoError, match=sentence):
        upstream.load_pipeline(TINY)
