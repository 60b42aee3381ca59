"""Every key of the configuration: dataclasses whose fields say what they mean, and how to go through them all."""

from __future__ import annotations

import dataclasses
from typing import Any

from dimo.config.values import read_value
from dimo.errors import DimoError

BETA = {"forward": 0.0, "jeffreys": 0.5, "reverse": 1.0}


def _key(default: Any, help: str, path: bool = False) -> Any:
    about = {"help": help, "path": path}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=about)
    return dataclasses.field(default=default, metadata=about)


@dataclasses.dataclass
class Experiment:
    name: str = _key("run", "name of the run")
    output_dir: str = _key("runs/${experiment.name}", "the run folder", path=True)
    seed: int = _key(0, "every random draw derives from (seed, rank, step)")
    log_every: int = _key(10, "steps between lines of metrics.jsonl")
    save_every: int = _key(500, "steps between checkpoints")
    sample_every: int = _key(500, "steps between sample pictures")
    keep_last: int = _key(2, "checkpoints kept")
    resume: bool = _key(True, "continue from the folder's newest checkpoint")
    overwrite: bool = _key(False, "start over in a used folder")
    trackers: list[str] = _key([], "beside metrics.jsonl: tensorboard, wandb, trackio")
    student_dtype: str = _key(
        "auto", "of checkpoints/final: float32, bfloat16 or float16; auto: float32 of a built-in world, else bfloat16"
    )


@dataclasses.dataclass
class Model:
    device: str = _key("auto", "auto, cpu or cuda")
    backend: str = _key("native", "native, or upstream: diffnext's class as teacher, student and auxiliary")
    compile: bool = _key(
        False, "compile the layers, on a GPU, of backend native: a minute at the start, then faster steps"
    )
    activation_checkpointing: str = _key(
        "none", "none, selective (keep attention, compute the rest again) or full; backend native"
    )
    train_embeddings: bool = _key(True, "false: they stay the teacher's, one copy for all networks")
    train_head: bool = _key(
        False, "true: head and last norm learn too, and the student's logits grow without end (docs/experiments.md)"
    )
    logit_gain: float = _key(3.0, "the student's last norm is the teacher's times this, so that logits have room")
    final_logit_gain: float = _key(12.0, "the same in checkpoints/final, whose draws are then nearly its arg-max")


@dataclasses.dataclass
class Distill:
    teacher_ckpt: str = _key("shapes", "a built-in world's name, or a checkpoint folder in URSA's layout", path=True)
    prompt_source: str = _key(
        "world", "world, or a txt, jsonl, csv or parquet file of captions, or a folder of them", path=True
    )
    min_clarity: float | None = _key(None, "captions with a lower clarity_score are left out")
    min_aesthetic: float | None = _key(None, "the same for aesthetic_score")
    min_motion: float | None = _key(None, "the same for motion_score")
    min_suitability: float | None = _key(None, "the same for video_training_suitability_score")
    motion_prefix: str = _key("none", "'motion=x.x, ' before captions: a number, score (the row's own), or none")
    motion_share: float = _key(0.6, "share of the captions that get the prefix")
    shuffle_buffer: int = _key(10_000, "rows of the prompt source that are shuffled together")
    num_frames: int = _key(9, "frames of a video: 4 (T-1) + 1; 1 of an image model")
    height: int = _key(32, "pixels, a multiple of the VAE's stride: 8, or 16 of an image model")
    width: int = _key(32, "the same")
    max_prompt_length: int = _key(0, "text tokens, padded on the left, cut on the right; 0: 320, or a world's own 4")
    batch_size_per_gpu: int = _key(64, "samples a step")
    guidance_scale: float = _key(1.0, "the teacher's guidance; 1 is none")
    guidance_trunc: float = _key(0.9, "guidance is off where t >= this")
    negative_prompt: str = _key("", "the teacher's guidance leads away from this; empty: the empty prompt")
    empty_prompt_share: float = _key(0.1, "share of empty prompts when the auxiliary is fitted")
    estimator: str = _key("dimo", "dimo (token-level gradient) or reinforce (policy gradient)")
    divergence: str = _key("time", "time (beta = t), forward, jeffreys, reverse, or beta in [0, 1]")
    aux_objective: str = _key("denoise", "denoise (fit the student) or match_teacher (preset literal)")
    aux_steps: int = _key(2, "updates of the auxiliary per step of the student")
    aux_pass: str = _key(
        "own", "own, or shared: the auxiliary's first t_draws fits are at x_t and its answers there; no pass of its own"
    )
    label_smoothing: float = _key(0.0, "of the auxiliary's cross-entropy")
    w_distill: float = _key(1.0, "weight of stage 8")
    w_kd: float = _key(0.0, "weight of stage 7")
    kd_every: int = _key(1, "stage 7 only in every so-many-th step")
    w_reinforce: float = _key(0.0, "weight, inside w_distill's, of the log-ratio policy gradient beside estimator dimo")
    baseline: str = _key("ema", "of estimator reinforce: ema or leave_one_out")
    baseline_decay: float = _key(0.99, "of the EMA baseline")
    lambda_ent: float = _key(0.0, "entropy bonus")
    lambda_ent_high: float = _key(0.05, "the bonus once the entropy is below the floor; no use while lambda_ent is 0")
    entropy_floor: float = _key(
        0.3, "share of the first steps' entropy under which the bonus rises; no use while lambda_ent is 0"
    )
    ent_anneal_from: int = _key(0, "step at which the bonus starts to fade")
    ent_anneal_to: int = _key(0, "step at which the bonus is gone; 0: never")
    t_curriculum_steps: int = _key(0, "steps with t = 1 - (1-u)^2; 0: t uniform from the start")
    t_power: float = _key(1.6, "t is then raised to it: above 1 leans to the noise, where coverage is decided")
    t_draws: int = _key(4, "stratified draws of t and x_t for each x_hat; one more costs two passes without gradient")
    t_per: str = _key("sample", "one t per sample, or per latent frame")
    p_corrupt: float = _key(0.2, "share of x_init that is an earlier sample, corrupted")
    p_corrupt_fade: float = _key(0.7, "share of the run over which p_corrupt falls to zero; 0: it stays")
    corrupt_ratio: float = _key(0.5, "share of its tokens that are replaced")

    def score_minimums(self) -> dict[str, float]:
        """{Koala-36M's score column: least value}, of those that are set."""
        minimums = {
            "clarity_score": self.min_clarity,
            "aesthetic_score": self.min_aesthetic,
            "motion_score": self.min_motion,
            "video_training_suitability_score": self.min_suitability,
        }
        return {column: least for column, least in minimums.items() if least is not None}

    def beta(self) -> float | str:
        """The beta of `divergence`, a number in [0, 1], or "time", where beta = t token by token.

        Raises:
            DimoError: neither a name nor a number in [0, 1].
        """
        if self.divergence == "time":
            return "time"
        beta = BETA.get(self.divergence)
        if beta is None:
            try:
                beta = read_value("distill.divergence", "float", str(self.divergence))
            except DimoError:
                known = ", ".join(("time", *BETA))
                raise DimoError(f"divergence must be one of {known} or a number, got {self.divergence!r}") from None
        if not 0 <= beta <= 1:
            raise DimoError(f"divergence as a number must lie in [0, 1], got {beta}")
        return beta

    def motion_value(self) -> float | str | None:
        """`motion_prefix` as a number, "score" or None."""
        if self.motion_prefix in ("none", "score"):
            return None if self.motion_prefix == "none" else "score"
        try:
            return read_value("distill.motion_prefix", "float", self.motion_prefix)
        except DimoError as error:
            raise DimoError(
                f"distill.motion_prefix must be none, score or a number, got {self.motion_prefix!r}"
            ) from error


@dataclasses.dataclass
class Optim:
    optimizer: str = _key("muon", "muon (matrices of the layers; AdamW for the rest) or adamw")
    lr: float = _key(1.5e-3, "of the student, AdamW")
    aux_lr: float = _key(4e-3, "of the auxiliary, AdamW; its muon_lr keeps the same ratio to the student's")
    muon_lr: float = _key(7.5e-3, "of the student's matrices, Muon")
    muon_momentum: float = _key(0.9, "Muon")
    muon_weight_decay: float = _key(0.02, "Muon: a matrix shrinks by its muon_lr times this a step")
    warmup_steps: int = _key(50, "linear warm-up of both")
    decay: str = _key("linear", "linear, cosine, wsd (constant, then linear in the last fifth) or constant")
    min_lr_share: float = _key(0.05, "share of the peak at which the student's decay ends")
    aux_min_lr_share: float = _key(0.2, "the same for the auxiliary, which has to follow to the end")
    beta1: float = _key(0.0, "AdamW")
    beta2: float = _key(0.99, "AdamW")
    weight_decay: float = _key(0.0, "AdamW")
    max_grad_norm: float = _key(1.0, "gradient clipping, each network by itself")
    ema_decay: float = _key(0.9995, "of the student's moving average, which is what ships")


@dataclasses.dataclass
class Training:
    max_train_steps: int = _key(2000, "steps of the student")
    mixed_precision: str = _key("no", "no or bf16")
    num_processes: int = _key(1, "processes that train together, one a GPU, on all machines")
    engine: str = _key(
        "ddp", "of several processes: ddp, fsdp2, deepspeed_zero2, or an accelerate YAML file", path=True
    )
    gradient_accumulation_steps: int = _key(1, "parts of batch_size_per_gpu samples that make one step")
    max_bad_steps: int = _key(5, "steps in a row that may be skipped for NaN or infinity before the run stops")


@dataclasses.dataclass
class Evaluation:
    videos_per_prompt: int | None = _key(None, "videos of every prompt; null: 64 where an oracle scores them, else 2")
    teacher_steps: list[int] = _key([1, 2, 4, 8, 25], "the teacher's numbers of passes")
    seed: int = _key(1234, "of noise and sampling, the same for every row")
    batch_size: int = _key(512, "videos a pass")
    held_out: int = _key(8, "captions never trained on, on which a student without an oracle is evaluated; 0: none")


@dataclasses.dataclass
class Config:
    experiment: Experiment = dataclasses.field(default_factory=Experiment)
    model: Model = dataclasses.field(default_factory=Model)
    distill: Distill = dataclasses.field(default_factory=Distill)
    optim: Optim = dataclasses.field(default_factory=Optim)
    training: Training = dataclasses.field(default_factory=Training)
    evaluation: Evaluation = dataclasses.field(default_factory=Evaluation)


def config_keys() -> dict[str, dataclasses.Field]:
    """Every dotted key with its field, in order."""
    groups = {f.name: f.default_factory for f in dataclasses.fields(Config)}
    return {f"{g}.{f.name}": f for g, cls in groups.items() for f in dataclasses.fields(cls)}


def default_of(field: dataclasses.Field) -> Any:
    """What the key is when nobody sets it."""
    return field.default if field.default is not dataclasses.MISSING else field.default_factory()


def kind_of(field: dataclasses.Field) -> str:
    """What `dimo.config.values.read_value` is to make of what is written for the key."""
    return "path" if field.metadata["path"] else field.type


def describe() -> str:
    """A table of every key, its default and what it means."""
    rows = [(k, str(default_of(f)), f.metadata["help"]) for k, f in config_keys().items()]
    wide = [max(len(r[i]) for r in rows) for i in (0, 1)]
    return "\n".join(f"{k:{wide[0]}}  {v:{wide[1]}}  {h}" for k, v, h in rows)


def to_flat(config: Config) -> dict[str, Any]:
    """{dotted key: value}."""
    return {key: getattr(getattr(config, key.split(".")[0]), key.split(".")[1]) for key in config_keys()}
