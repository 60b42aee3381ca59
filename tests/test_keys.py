"""Every key of the configuration reaches what it is for: one key is changed, and what a run makes is another.

What a run makes is compared bit for bit: on one thread the same configuration gives the same bits, so that a key that
nothing reads changes none.
"""

import contextlib
import functools
import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from dimo.config import config_keys, load_config
from dimo.errors import DimoError
from dimo.evaluation.evaluate import evaluate_to_folder
from dimo.train.trainer import Trainer
from dimo.ursa.transformer import Layer, UrsaTransformer
from dimo.worlds import checkpoint_folder, load_world
from dimo.worlds.teacher import TeacherRecipe, ursa_config, write_checkpoint
from dimo.worlds.tiles import TilesWorld

TESTS = Path(__file__).parent
TINY = TESTS / "data" / "tiny-ursa"
SCORES = ("clarity_score", "aesthetic_score", "motion_score", "video_training_suitability_score")
SMALL = (
    "model.device=cpu", "distill.teacher_ckpt={folder}/world", "distill.batch_size_per_gpu=4", "distill.t_draws=1",
    "distill.aux_steps=1", "training.max_train_steps=3", "optim.warmup_steps=1", "experiment.sample_every=9",
    "evaluation.videos_per_prompt=1", "evaluation.teacher_steps=[1]", "evaluation.judged_videos=0",
)  # fmt: skip
# {folder} is `made_once`
CAPTIONS = ("distill.prompt_source={folder}/captions.csv",)
SIZES = (
    "distill.teacher_ckpt={tiny}", "distill.prompt_source={folder}/captions.csv", "distill.num_frames=5",
    "distill.height=16", "distill.width=16", "distill.max_prompt_length=6",
)  # fmt: skip
GUIDED = ("distill.guidance_scale=3", "distill.empty_prompt_share=0")
TILES = ("distill.teacher_ckpt={folder}/tiles", "distill.num_frames=5", "distill.batch_size_per_gpu=2")
BONUS = ("distill.lambda_ent=0.5",)
REMEMBERS = ("distill.p_corrupt=1", "distill.p_corrupt_fade=0")
REINFORCE = ("distill.estimator=reinforce",)
MATRIX, EMBEDDINGS = "model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight"  # stepped by Muon, by AdamW


class Row(NamedTuple):
    """`key` becomes `value`, `beside` other keys that both runs have: all that `seen` names must differ, and nothing
    that `still` names may. Names are beginnings of what `STEPPED`, `TRAINED` and the others below give.
    """

    key: str
    value: object
    seen: str
    steps: int = 1  # of training
    beside: tuple[str, ...] = ()
    still: str = ""


STEPPED = [
    Row("experiment.seed", 1, "step.txt_ids step.x_init student"),
    Row("experiment.seed", 1, "step.txt_ids", beside=CAPTIONS),
    Row("model.activation_checkpointing", "full", "count.blocks", still="student aux loss"),
    Row("model.attention", "math", "student aux", still="step.x_init"),
    Row("model.train_embeddings", "false", f"student.{EMBEDDINGS} aux.{EMBEDDINGS} ema.{EMBEDDINGS}"),
    Row("model.aux_shared_layers", 1, f"aux.{MATRIX} aux.{EMBEDDINGS} count.blocks", still="step. loss/aux",
        beside=("distill.teacher_ckpt=shapes",)),
    Row("model.train_head", "true", "student.lm_head aux.lm_head ema.lm_head"),
    Row("model.logit_gain", 2, "student.model.norm ema.model.norm loss/total", still="aux.model.norm"),
    Row("model.final_logit_gain", 5, "final.model.norm", still="student ema final.lm_head"),
    Row("distill.teacher_ckpt", "shapes", "student aux ema loss/total"),
    Row("distill.teacher", "exact", "student loss/total", beside=TILES, still="aux step.x_t"),
    Row("distill.prompt_source", "{folder}/captions.csv", "step.txt_ids student"),
    Row("distill.min_clarity", 0.5, "step.txt_ids student", beside=CAPTIONS),
    Row("distill.min_aesthetic", 0.5, "step.txt_ids student", beside=CAPTIONS),
    Row("distill.min_motion", 0.5, "step.txt_ids student", beside=CAPTIONS),
    Row("distill.min_suitability", 0.5, "step.txt_ids student", beside=CAPTIONS),
    Row("distill.motion_prefix", 9, "step.txt_ids student", beside=CAPTIONS),
    Row("distill.motion_share", 0, "step.txt_ids student", beside=(*CAPTIONS, "distill.motion_prefix=9")),
    Row("distill.shuffle_buffer", 5, "step.txt_ids student", beside=CAPTIONS),
    Row("evaluation.held_out", 0, "step.txt_ids student", beside=CAPTIONS, steps=3),
    Row("distill.num_frames", 9, "step.x_hat student", beside=SIZES),
    Row("distill.height", 24, "step.x_hat student", beside=SIZES),
    Row("distill.width", 24, "step.x_hat student", beside=SIZES),
    Row("distill.max_prompt_length", 6, "step.txt_ids student"),
    Row("distill.batch_size_per_gpu", 3, "step.x_hat student"),
    Row("distill.guidance_scale", 3, "student", beside=GUIDED[1:], still="step.txt_ids step.x_t"),
    Row("distill.guidance_trunc", 0, "student", beside=GUIDED, still="step.txt_ids step.x_t"),
    Row("distill.negative_prompt", "blue bar moving up", "student", beside=GUIDED, still="step.txt_ids step.x_t"),
    # the student's empty prompts, which a guided run has, and the auxiliary's, which fits to samples have
    Row("distill.empty_prompt_share", 1, "step.txt_ids student",
        beside=("distill.guidance_scale=3", "distill.aux_objective=match_teacher")),
    Row("distill.empty_prompt_share", 1, "aux loss/aux", still="step.txt_ids step.x_t"),
    Row("distill.estimator", "reinforce", "student", still="aux"),
    Row("distill.divergence", "forward", "student", still="aux"),
    Row("distill.aux_objective", "match_teacher", "aux loss/aux", beside=("distill.t_draws=2",)),
    Row("distill.aux_target", "exact", "aux loss/aux student", still="step.x_t"),
    Row("distill.aux_target", "exact", "aux", beside=("training.gradient_accumulation_steps=2",), still="step.x_t"),
    Row("distill.student_steps", 2, "step.x_init student count.blocks", still="step.txt_ids"),
    Row("distill.aux_steps", 2, "aux"),
    Row("distill.aux_pass", "shared", "count.blocks student"),
    Row("distill.label_smoothing", 0.3, "aux loss/aux"),
    Row("distill.w_distill", 2, "student", beside=("distill.w_kd=0.5",), still="aux"),
    Row("distill.w_kd", 0.5, "student count.blocks", still="aux"),
    Row("distill.kd_every", 2, "student count.blocks", steps=2, beside=("distill.w_kd=0.5",)),
    Row("distill.w_reinforce", 0.5, "student", still="aux"),
    Row("distill.baseline", "leave_one_out", "student reward/baseline", steps=2, beside=REINFORCE),
    Row("distill.baseline_decay", 0.1, "student reward/baseline", steps=3, beside=REINFORCE),
    Row("distill.lambda_ent", 0.5, "student lambda_ent", still="aux"),
    Row("distill.lambda_ent_high", 2, "student lambda_ent", beside=(*BONUS, "distill.entropy_floor=2")),
    Row("distill.entropy_floor", 2, "student lambda_ent", beside=BONUS),
    Row("distill.ent_anneal_from", 2, "student lambda_ent", steps=2, beside=(*BONUS, "distill.ent_anneal_to=3")),
    Row("distill.ent_anneal_to", 2, "student lambda_ent", steps=2, beside=BONUS),
    Row("distill.t_curriculum_steps", 9, "step.t t/mean student"),
    Row("distill.t_power", 1, "step.t t/mean student"),
    Row("distill.t_power_start", 6, "step.t t/mean student"),
    Row("distill.t_power_fade", 0.1, "step.t t/mean student", steps=2, beside=("distill.t_power_start=6",)),
    Row("distill.t_draws", 2, "step.t step.x_t student"),
    Row("distill.t_per", "frame", "step.t student"),
    Row("distill.t_per", "mixed", "step.t student"),
    Row("distill.t_shift", 4, "step.t t/mean student"),
    Row("distill.t_shift", 4, "aux loss/aux", beside=("distill.t_curriculum_steps=0",), still="step.x_hat"),
    Row("distill.p_corrupt", 0, "x_init/corrupt_share step.x_init", steps=2, beside=REMEMBERS),
    Row("distill.p_corrupt_fade", 0.4, "x_init/corrupt_share step.x_init", steps=3, beside=REMEMBERS),
    Row("distill.corrupt_ratio", 0, "step.x_init", steps=2, beside=REMEMBERS, still="x_init/corrupt_share"),
    Row("optim.optimizer", "adamw", f"student.{MATRIX} aux.{MATRIX}", still=f"aux.{EMBEDDINGS}"),
    Row("optim.lr", 1e-2, f"student.{EMBEDDINGS} aux.{MATRIX} optim/lr", still=f"aux.{EMBEDDINGS}"),
    Row("optim.lr", 1e-2, "student", beside=("optim.optimizer=adamw",), still="aux"),
    Row("optim.aux_lr", 1e-2, f"aux.{EMBEDDINGS} aux.{MATRIX}", still="optim/lr"),
    Row("optim.aux_lr", 1e-2, f"aux.{MATRIX}", beside=("optim.optimizer=adamw",), still="optim/lr"),
    Row("optim.muon_lr", 1e-2, f"student.{MATRIX} aux.{MATRIX}", still=f"aux.{EMBEDDINGS} optim/lr"),
    Row("optim.muon_momentum", 0.5, f"student.{MATRIX} aux.{MATRIX}", steps=2),
    Row("optim.muon_weight_decay", 0.5, f"student.{MATRIX} aux.{MATRIX}", still=f"aux.{EMBEDDINGS}"),
    Row("optim.warmup_steps", 9, "student aux optim/lr"),
    Row("optim.decay", "constant", "student aux optim/lr", steps=2),
    Row("optim.min_lr_share", 0.9, f"student.{EMBEDDINGS} student.{MATRIX} optim/lr", steps=2, still="aux"),
    Row("optim.aux_min_lr_share", 0.9, f"aux.{EMBEDDINGS} aux.{MATRIX}", steps=2, still="optim/lr"),
    Row("optim.beta1", 0.5, f"student.{EMBEDDINGS} aux.{EMBEDDINGS}", steps=2),
    Row("optim.beta2", 0.5, f"student.{EMBEDDINGS} aux.{EMBEDDINGS}", steps=2),
    Row("optim.weight_decay", 0.5, f"student.{EMBEDDINGS} aux.{EMBEDDINGS}", still=f"aux.{MATRIX}"),
    Row("optim.max_grad_norm", 1e-7, f"student.{EMBEDDINGS} aux.{EMBEDDINGS}", still="grad_norm/aux"),
    Row("optim.ema_decay", 0, "ema final", still="student"),
    Row("optim.ema_every", 2, "ema final", still="student"),
    Row("training.max_train_steps", 30, "student optim/lr", steps=2),
    Row("training.mixed_precision", "bf16", "student aux"),
    Row("training.gradient_accumulation_steps", 2, "student aux"),
]  # fmt: skip
FOLDER = "runs/smoke/"
TRAINED = [
    Row("experiment.name", "other", "runs/other/config.yaml runs/smoke/config.yaml"),
    Row("experiment.output_dir", "elsewhere", "elsewhere/config.yaml runs/smoke/config.yaml"),
    Row("experiment.log_every", 1, f"{FOLDER}metrics.jsonl"),
    Row("experiment.save_every", 1, f"{FOLDER}checkpoints/step-00000001/student.safetensors"),
    Row("experiment.keep_last", 1, f"{FOLDER}checkpoints/step-00000001/", beside=("experiment.save_every=1",)),
    Row("experiment.keep_every", 1, f"{FOLDER}checkpoints/milestone-00000001/", beside=("experiment.keep_last=1",)),
    Row("experiment.sample_every", 1, f"{FOLDER}samples/step-00000001.png", still=f"{FOLDER}samples/step-00000002.png"),
    Row("experiment.student_dtype", "float16", f"{FOLDER}checkpoints/final/student.pt"),
    Row("training.max_train_steps", 1, f"{FOLDER}checkpoints/step-00000002/ {FOLDER}samples/step-00000001.png"),
]
TRAINED_AGAIN = [
    Row("experiment.resume", "false", "refusal"),
    Row("experiment.overwrite", "true", f"{FOLDER}train.log", still="refusal"),
]
EVALUATED = [
    Row("evaluation.videos_per_prompt", 2, "student_1/ untrained_1/ teacher_1/"),
    Row("evaluation.teacher_steps", "[2]", "teacher_2", still="teacher_1 student_1"),
    Row("evaluation.seed", 1, "student_1/ untrained_1/ teacher_1/"),
    Row("evaluation.judged_videos", 1, "teacher_1_again/ student_1/teacher_nll", still="student_1/validity"),
    Row("evaluation.batch_size", 10, "student_1/ untrained_1/ teacher_1/"),
]
ELSEWHERE = {  # {key: the test that shows it}
    "distill.protocol": "test_a_protocol_replaces_what_a_preset_says_of_guidance_and_nothing_that_is_said_beside_it",
    "model.device": "test_a_gpu_that_is_not_there_is_missed_where_it_is_asked_for",
    "model.backend": "test_the_other_backend_is_loaded_where_it_is_asked_for",
    "model.compile": "test_layers_are_compiled_on_a_gpu_where_it_is_asked_for",
    "experiment.trackers": "test_a_tracker_gets_every_logged_row_and_one_identity_for_a_resumed_run",
    "training.num_processes": "test_the_command_names_engine_processes_and_a_free_port",
    "training.engine": "test_the_command_names_engine_processes_and_a_free_port",
    "training.sequence_parallel": "test_two_that_share_a_sample_make_the_steps_of_one",
    "training.cuda_graph": "test_a_replayed_run_is_the_run_without_graphs",
    "training.max_bad_steps": "test_after_so_many_in_a_row_it_stops_and_the_batch_can_be_replayed",
}


@functools.cache
def made_once() -> Path:
    """A folder with world, the built-in one with one layer of its three, and captions.csv, its prompts with scores."""
    folder = Path(tempfile.mkdtemp())
    transformer = shutil.copytree(checkpoint_folder("shapes"), folder / "world") / "transformer"
    settings = json.loads((transformer / "config.json").read_text()) | {"num_hidden_layers": 1}
    (transformer / "config.json").write_text(json.dumps(settings))
    (file,) = transformer.glob("*.safetensors")
    weights = load_file(file)
    save_file({n: w for n, w in weights.items() if ".layers." not in n or ".layers.0." in n}, file)
    prompts = load_world(folder / "world").prompts
    world, recipe = TilesWorld(frames=2, codes=16), TeacherRecipe(layers=1, hidden=32, heads=2, head_dim=16)
    network = UrsaTransformer(ursa_config(world, recipe))
    write_checkpoint(folder / "tiles", world, network, 0.9, 3.0)
    rows = [[prompt, *(f"{i * p % 48 / 48:.3f}" for p in (5, 7, 11, 13))] for i, prompt in enumerate(prompts)]
    lines = [["caption", *SCORES], *rows]
    (folder / "captions.csv").write_text("".join(",".join(line) + "\n" for line in lines))
    return folder


def config_of(overrides):
    words = [word.format(folder=made_once(), tiny=TINY) for word in (*SMALL, *overrides)]
    return load_config("smoke", words)


@pytest.fixture(scope="module", autouse=True)
def _no_pictures():
    """A picture takes longer than three steps; its file is enough."""

    def save(file, *_):
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(b"")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dimo.views.sheets.save_sheet", save)
        yield
    shutil.rmtree(made_once())
    made_once.cache_clear()
    base_of.cache_clear()


@contextlib.contextmanager
def empty_folder():
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        yield Path(folder)


def stepped(overrides, steps):
    """{name: value} after so many steps: student., aux. and ema. with their weights, final. what would be written of
    them, step. what the last step drew, the metrics, and count.blocks, passes of single layers.
    """
    made, inner = {"count.blocks": 0}, Layer.block

    def counted(*arguments):
        made["count.blocks"] += 1
        return inner(*arguments)

    with pytest.MonkeyPatch.context() as patch, empty_folder():
        patch.setattr(Layer, "block", counted)
        trainer = Trainer(config_of(overrides))
        for index in range(steps):
            step, extra = trainer.step(index)
    made |= {f"step.{name}": getattr(step, name) for name in ("txt_ids", "x_init", "x_hat", "t", "x_t")}
    made |= {name: float(value) for name, value in (trainer.metrics(step) | extra).items()}
    for network in ("student", "aux", "ema"):
        weights = getattr(trainer.networks, network).state_dict()
        made |= {f"{network}.{name}": weight for name, weight in weights.items()}
    return made | {f"final.{name}": weight for name, weight in trainer.final_weights().items()}


def files_in(folder):
    """{path: what is to be compared}: lines of metrics.jsonl, resumptions in train.log, the dtype of student.pt."""
    made = {str(file.relative_to(folder)): None for file in folder.rglob("*") if file.is_file()}
    for name in made:
        if name.endswith("metrics.jsonl"):
            made[name] = len((folder / name).read_text().splitlines())
        elif name.endswith("train.log"):
            made[name] = (folder / name).read_text().count("resumed: ")
        elif name.endswith("final/student.pt"):
            made[name] = {w.dtype for w in torch.load(folder / name, weights_only=True).values()}
    return made


TWO = ("training.max_train_steps=2", "distill.batch_size_per_gpu=1")


def trained(overrides, _):
    """{path of a file: see `files_in`} of a whole run."""
    with empty_folder() as folder:
        Trainer(config_of((*TWO, *overrides))).train(progress=False)
        return files_in(folder)


def trained_again(overrides, _):
    """The same of a run in a folder that holds a finished one, and why it was refused."""
    with empty_folder() as folder:
        Trainer(config_of(TWO)).train(progress=False)
        refusal = ""
        try:
            Trainer(config_of((*TWO, *overrides))).train(progress=False)
        except DimoError as error:
            refusal = str(error)
        return files_in(folder) | {"refusal": refusal}


def evaluated(overrides, _):
    """{row/figure: value} of a report, but seconds."""
    with empty_folder() as folder:
        rows = evaluate_to_folder(config_of(overrides), made_once() / "world" / "transformer", folder, progress=False)
    return {f"{r}/{name}": v for r, row in rows.items() for name, v in row.items() if name != "seconds_per_video"}


@functools.cache
def base_of(make, beside, steps):
    return make(beside, steps)


def changed(before, after, name):
    """Names that begin so and stand for something else, or for something in one of the two only."""
    names = {key for key in before.keys() | after.keys() if key.startswith(name)}
    assert names, f"nothing that a run makes is called {name}..."
    both = {key for key in names if key in before and key in after}
    same = lambda a, b: torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b  # noqa: E731
    return sorted(names - {key for key in both if same(before[key], after[key])})


TABLE = [(stepped, row) for row in STEPPED] + [(trained, row) for row in TRAINED]
TABLE += [(trained_again, row) for row in TRAINED_AGAIN] + [(evaluated, row) for row in EVALUATED]


@pytest.mark.parametrize(("make", "row"), TABLE, ids=lambda x: x.key if isinstance(x, Row) else x.__name__)
def test_a_key_changes_what_it_is_for(make, row):
    before = base_of(make, row.beside, row.steps)
    after = make((*row.beside, f"{row.key}={row.value}"), row.steps)
    for name in row.seen.split():
        assert changed(before, after, name), f"{row.key}={row.value} leaves {name} as it is ({make.__name__})"
    for name in row.still.split():
        assert not changed(before, after, name), f"{row.key}={row.value} changes {name} as well ({make.__name__})"


@pytest.mark.parametrize(("make", "steps"), [(stepped, 2), (trained, 1), (trained_again, 1), (evaluated, 1)])
def test_nothing_changes_where_no_key_does(make, steps):
    """Without which the test above would pass whatever a key does."""
    assert changed(base_of(make, (), steps), make((), steps), "") == []


def test_every_key_is_shown_to_change_something():
    shown = {row.key for _, row in TABLE}
    assert shown | ELSEWHERE.keys() == config_keys().keys() and not shown & ELSEWHERE.keys()
    tests = "".join(file.read_text(encoding="utf-8") for file in TESTS.glob("test_*.py"))
    for key, test in ELSEWHERE.items():
        assert re.search(rf"^def {test}\(", tests, re.M), f"{key}: there is no {test}"


def test_a_gpu_that_is_not_there_is_missed_where_it_is_asked_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    Trainer(config_of(["model.device=auto"]))
    with pytest.raises(DimoError, match="model.device is cuda, but PyTorch finds no GPU"):
        Trainer(config_of(["model.device=cuda"]))


def test_the_other_backend_is_loaded_where_it_is_asked_for(monkeypatch):
    asked = DimoError("diffnext is asked for")

    def refuse():
        raise asked

    monkeypatch.setattr("dimo.ursa.loading.import_upstream", refuse)
    Trainer(config_of([]))
    with pytest.raises(DimoError) as refused:
        Trainer(config_of(["model.backend=upstream"]))
    assert refused.value is asked
