"""The configuration as dataclasses: every field is a key with a type, a default and a help text.

Its range or its choices are in `RANGES` and `validate` of `dimo.config.load`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from dimo.config.values import read_value
from dimo.errors import DimoError
from dimo.ursa.sampler import MOST_PASSES

BETA = {"forward": 0.0, "jeffreys": 0.5, "reverse": 1.0}


def _key(default: Any, help: str, path: bool = False) -> Any:
    about = {"help": help, "path": path}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=about)
    return dataclasses.field(default=default, metadata=about)


@dataclasses.dataclass
class Experiment:
    name: str = _key("run", "name of the run, by default also its folder under runs/")
    output_dir: str = _key(
        "runs/${experiment.name}", "run folder: configuration, logs, checkpoints and samples", path=True
    )
    seed: int = _key(0, "seed of training; every random draw depends only on (seed, rank, step)")
    log_every: int = _key(10, "steps between lines of metrics.jsonl")
    save_every: int = _key(500, "steps between checkpoints")
    sample_every: int = _key(500, "steps between sample sheets (PNG), and between measurements of collapse")
    keep_last: int = _key(2, "number of checkpoints kept; older ones are deleted")
    keep_every: int = _key(
        0, "steps between milestones, copies of the student in checkpoints/ that are never deleted; 0: none"
    )
    resume: bool = _key(True, "continue from the newest intact checkpoint in the run folder")
    overwrite: bool = _key(False, "delete an existing run in the run folder, checkpoints included, and start over")
    trackers: list[str] = _key([], "trackers to log to besides metrics.jsonl: tensorboard, wandb, trackio")
    student_dtype: str = _key(
        "auto",
        "dtype of checkpoints/final: float32, bfloat16, float16, or auto (built-in world: float32, else bfloat16)",
    )


@dataclasses.dataclass
class Model:
    device: str = _key("auto", "device of the networks: cpu, cuda, or auto (cuda if available)")
    backend: str = _key(
        "native", "transformer implementation: native, or upstream (diffnext's class for all three networks)"
    )
    compile: bool = _key(
        False, "torch.compile the transformer layers (GPU, backend native); compiling takes about a minute"
    )
    activation_checkpointing: str = _key(
        "none", "none, or recompute: swiglu, selective (all but attention), full; only native"
    )
    attention: str = _key("auto", "kernel of attention: auto (fa4 where it works), fa4, cudnn, flash or math")
    train_embeddings: bool = _key(
        True, "train the token embeddings; false: frozen at the teacher's, one copy shared by all networks"
    )
    aux_shared_layers: int = _key(0, "first layers of the auxiliary that stay the teacher's, with its embeddings")
    train_head: bool = _key(
        False, "train output head and last norm too, which lets the logits grow without bound; false: both are frozen"
    )
    logit_gain: float = _key(
        3.0, "multiplies the weight of the student's last norm: acts as an inverse temperature on its logits"
    )
    final_logit_gain: float = _key(
        12.0, "logit_gain of checkpoints/final, an inverse temperature so high that sampling is nearly argmax"
    )


@dataclasses.dataclass
class Distill:
    teacher_ckpt: str = _key(
        "shapes", "name of a built-in world, or path of a checkpoint folder in URSA's layout", path=True
    )
    teacher: str = _key(
        "network",
        "what is distilled: network (the transformer of teacher_ckpt), or exact (the posterior of its world, tiles or "
        "sprites; student and auxiliary start from the transformer all the same)",
    )
    prompt_source: str = _key(
        "world",
        "world (the built-in world's prompts), or a txt, jsonl, csv or parquet file of captions, or a folder of them",
        path=True,
    )
    min_clarity: float | None = _key(None, "drop captions whose clarity_score is lower or missing; null: no filter")
    min_aesthetic: float | None = _key(None, "drop captions whose aesthetic_score is lower or missing; null: no filter")
    min_motion: float | None = _key(None, "drop captions whose motion_score is lower or missing; null: no filter")
    min_suitability: float | None = _key(
        None, "drop captions whose video_training_suitability_score is lower or missing; null: no filter"
    )
    motion_prefix: str = _key(
        "none", "prefix captions with 'motion=x.x, ': a number, score (each row's motion_score) or none"
    )
    motion_share: float = _key(0.6, "fraction of captions that get the motion prefix")
    shuffle_buffer: int = _key(10_000, "rows of the prompt source shuffled together and held in memory")
    num_frames: int = _key(
        9, "frames of a video, 1 plus a multiple of the VAE's temporal stride (4); 1 for an image model"
    )
    height: int = _key(32, "height in pixels, a multiple of the VAE's spatial stride (8, or 16 for an image model)")
    width: int = _key(32, "width in pixels, a multiple of the VAE's spatial stride (8, or 16 for an image model)")
    max_prompt_length: int = _key(
        0, "text tokens per prompt, left-padded or truncated; 0: 320, or the longest prompt of a world"
    )
    batch_size_per_gpu: int = _key(64, "samples per process and micro-batch (see training.gradient_accumulation_steps)")
    protocol: str = _key(
        "none", "none, or vbench, URSA's own: guidance_scale 7, negative_prompt and motion_prefix 9, unless set"
    )
    guidance_scale: float = _key(1.0, "classifier-free guidance scale of the teacher; 1: no guidance")
    guidance_trunc: float = _key(
        0.9, "time t in [0, 1] from which on the teacher is not guided (t = 0 is noise, 1 is data)"
    )
    negative_prompt: str = _key("", "negative prompt of the teacher's guidance; empty: the empty prompt")
    student_steps: int = _key(
        1,
        f"passes of the student per video, at most {MOST_PASSES}; each but the first learns from its own draft, "
        "re-noised as by the sampler",
    )
    empty_prompt_share: float = _key(
        0.1, "fraction of empty prompts when the auxiliary is fitted; with guidance_scale > 1, for the student too"
    )
    estimator: str = _key(
        "dimo", "gradient of the distillation loss: dimo (token-level, exact) or reinforce (policy gradient)"
    )
    divergence: str = _key(
        "time",
        "teacher-auxiliary divergence: forward (KL), jeffreys, reverse (KL), a beta in [0, 1], or time (beta = t)",
    )
    aux_objective: str = _key(
        "denoise", "objective of the auxiliary: denoise (fit the student's samples) or match_teacher (preset literal)"
    )
    aux_target: str = _key(
        "sampled",
        "target of aux_objective=denoise: sampled (x_hat), or exact (its distribution given x_t and x_init: less "
        "variance for one more product with the head)",
    )
    aux_steps: int = _key(2, "updates of the auxiliary per update of the student")
    aux_pass: str = _key(
        "own", "auxiliary logits at x_t: own (a separate pass) or shared (those of its first t_draws fitting passes)"
    )
    label_smoothing: float = _key(0.0, "label smoothing of the auxiliary's cross-entropy")
    w_distill: float = _key(1.0, "weight of the distillation loss (stage 8)")
    w_kd: float = _key(
        0.0, "weight of the knowledge-distillation loss, KL(teacher || student) at x_t (stage 7); 0: off"
    )
    kd_every: int = _key(1, "compute the knowledge-distillation loss only every so many steps")
    w_reinforce: float = _key(
        0.0, "weight, relative to w_distill, of a policy gradient added to estimator dimo; 0: off"
    )
    baseline: str = _key("ema", "reward baseline of estimator reinforce: ema or leave_one_out")
    baseline_decay: float = _key(0.99, "decay of the ema reward baseline")
    lambda_ent: float = _key(0.0, "weight of the entropy bonus on the student's tokens; 0: off")
    lambda_ent_high: float = _key(
        0.05, "weight of the entropy bonus while the entropy is below its floor; ignored if lambda_ent is 0"
    )
    entropy_floor: float = _key(
        0.3, "floor of the entropy, as a fraction of its mean over the first 20 steps; ignored if lambda_ent is 0"
    )
    ent_anneal_from: int = _key(0, "step at which the entropy bonus starts to fade out linearly")
    ent_anneal_to: int = _key(0, "step at which the entropy bonus reaches zero; 0: never")
    t_curriculum_steps: int = _key(
        0, "steps with re-noising time t = 1 - (1 - u)^2 (biased to data), u uniform; afterwards t = u"
    )
    t_power: float = _key(
        1.6, "exponent applied to t after the curriculum; above 1 shifts t towards noise, where coverage is decided"
    )
    t_power_start: float = _key(
        0.0, "t_power at the first step; it then moves to t_power: modes first, sharpness later; 0: t_power throughout"
    )
    t_power_fade: float = _key(
        0.9,
        "fraction of training over which t_power_start moves to t_power, geometrically; 0 is not at once but never: "
        "t_power_start holds throughout",
    )
    t_draws: int = _key(
        4, "stratified draws of (t, x_t) per x_hat; each extra draw costs two forward passes without gradient"
    )
    t_per: str = _key(
        "sample",
        "draw one t per sample, which keeps modes, or per latent frame: sample, frame, or mixed (a coin per sample)",
    )
    t_shift: str = _key(
        "1",
        "shift s of t towards noise, t' = t / (t + s (1 - t)), after curriculum and t_power and in the auxiliary's "
        "fits: a number from 1 (off), law (sqrt(num_visual_tokens / 48)), or checkpoint (its scheduler's shift)",
    )
    p_corrupt: float = _key(
        0.2, "probability that x_init is an earlier student sample with part of its tokens replaced, not pure noise"
    )
    p_corrupt_fade: float = _key(
        0.7,
        "fraction of training over which p_corrupt falls linearly to zero; 0 is not at once but never: p_corrupt stays",
    )
    corrupt_ratio: float = _key(0.5, "probability that a token of a corrupted x_init (see p_corrupt) is replaced")

    def score_minimums(self) -> dict[str, float]:
        """{Koala-36M score column: minimum} of the minimums that are set."""
        minimums = {
            "clarity_score": self.min_clarity,
            "aesthetic_score": self.min_aesthetic,
            "motion_score": self.min_motion,
            "video_training_suitability_score": self.min_suitability,
        }
        return {column: least for column, least in minimums.items() if least is not None}

    def beta(self) -> float | str:
        """`divergence` parsed: beta in [0, 1], or "time" for beta = t per token.

        Raises:
            DimoError: not a known name or a number in [0, 1].
        """
        if self.divergence == "time":
            return "time"
        beta = BETA.get(self.divergence)
        if beta is None:
            try:
                beta = read_value("distill.divergence", "float", str(self.divergence))
            except DimoError:
                known = ", ".join(("time", *BETA))
                raise DimoError(
                    f"distill.divergence must be one of {known} or a number, got {self.divergence!r}"
                ) from None
        if not 0 <= beta <= 1:
            raise DimoError(f"distill.divergence as a number must lie in [0, 1], got {beta}")
        return beta

    def shift_value(self) -> float | str:
        """`t_shift` parsed: a number of at least 1, "law" or "checkpoint"."""
        if self.t_shift in ("law", "checkpoint"):
            return self.t_shift
        try:
            value = read_value("distill.t_shift", "float", self.t_shift)
        except DimoError as error:
            raise DimoError(f"distill.t_shift must be law, checkpoint or a number, got {self.t_shift!r}") from error
        if value < 1:
            raise DimoError(f"distill.t_shift as a number must be at least 1 (1: off), got {value}")
        return value

    def motion_value(self) -> float | str | None:
        """`motion_prefix` parsed: a number, "score", or None for "none"."""
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
    optimizer: str = _key("muon", "muon (weight matrices of the layers; AdamW for all other parameters) or adamw")
    lr: float = _key(1.5e-3, "AdamW learning rate of the student")
    aux_lr: float = _key(4e-3, "AdamW learning rate of the auxiliary; its Muon rate is muon_lr * aux_lr / lr")
    muon_lr: float = _key(7.5e-3, "Muon learning rate of the student")
    muon_momentum: float = _key(0.9, "Muon momentum")
    muon_weight_decay: float = _key(
        0.02, "Muon decoupled weight decay: each step multiplies a matrix by 1 - muon_lr * this"
    )
    warmup_steps: int = _key(50, "linear learning-rate warm-up of student and auxiliary, in steps")
    decay: str = _key(
        "linear", "learning-rate schedule: linear, cosine, constant, or wsd (constant, then linear over the last fifth)"
    )
    min_lr_share: float = _key(0.05, "final learning rate of the student as a fraction of its peak")
    aux_min_lr_share: float = _key(0.2, "final learning rate of the auxiliary as a fraction of its peak")
    beta1: float = _key(0.0, "AdamW beta1 (decay of the first moment)")
    beta2: float = _key(0.99, "AdamW beta2 (decay of the second moment)")
    weight_decay: float = _key(0.0, "AdamW decoupled weight decay")
    max_grad_norm: float = _key(1.0, "gradient-norm clipping threshold, applied to student and auxiliary separately")
    ema_decay: float = _key(0.9995, "decay of the student's weight EMA, which is sampled and saved as the student")
    ema_every: int = _key(1, "steps between updates of the EMA, whose decay is then that of so many steps")


@dataclasses.dataclass
class Training:
    max_train_steps: int = _key(2000, "number of student updates")
    mixed_precision: str = _key("no", "no (float32), or bf16 autocast")
    num_processes: int = _key(1, "number of training processes over all machines, one per GPU")
    engine: str = _key(
        "ddp", "multi-process engine: ddp, fsdp2, deepspeed_zero2, or path of an accelerate YAML file", path=True
    )
    gradient_accumulation_steps: int = _key(1, "micro-batches of batch_size_per_gpu samples per update")
    sequence_parallel: int = _key(1, "GPUs that divide the tokens of each sample; they share one batch_size_per_gpu")
    cuda_graph: bool = _key(
        False, "replay the step as a CUDA graph; on a built-in world, with model.compile, a fifth of the time; one GPU"
    )
    max_bad_steps: int = _key(5, "consecutive steps skipped for NaN or infinity before training stops with an error")


@dataclasses.dataclass
class Evaluation:
    videos_per_prompt: int | None = _key(None, "videos per prompt; null: 64 in a world with an oracle, else 2")
    teacher_steps: list[int] = _key(
        [1, 2, 4, 8, 25],
        f"numbers of sampling steps, at most {MOST_PASSES}, at which the teacher is evaluated for comparison",
    )
    seed: int = _key(1234, "seed of initial noise and sampling, the same for every row of the table")
    batch_size: int | None = _key(
        None,
        "videos sampled per batch in a world with an oracle (of others always 1); null: 512 short ones, or as few long "
        "ones as the device is fast with",
    )
    judged_videos: int = _key(
        256,
        "videos of each row, spread over the prompts but at least one of each, that the teacher judges and compares "
        "with its own; 0: none",
    )
    held_out: int = _key(8, "captions excluded from training and used to evaluate a student without an oracle; 0: none")


@dataclasses.dataclass
class Config:
    experiment: Experiment = dataclasses.field(default_factory=Experiment)
    model: Model = dataclasses.field(default_factory=Model)
    distill: Distill = dataclasses.field(default_factory=Distill)
    optim: Optim = dataclasses.field(default_factory=Optim)
    training: Training = dataclasses.field(default_factory=Training)
    evaluation: Evaluation = dataclasses.field(default_factory=Evaluation)


def config_keys() -> dict[str, dataclasses.Field]:
    """{dotted key: its dataclass field}, in declaration order."""
    groups = vars(Config())
    return {f"{name}.{f.name}": f for name, group in groups.items() for f in dataclasses.fields(group)}


def default_of(field: dataclasses.Field) -> Any:
    """Default value of a key."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def kind_of(field: dataclasses.Field) -> str:
    """Type of a key as `dimo.config.values.read_value` expects it: "path", or the annotation, such as "int | None"."""
    return "path" if field.metadata["path"] else str(field.type)


def to_flat(config: Config) -> dict[str, Any]:
    """The configuration as {dotted key: value}."""
    return {key: getattr(getattr(config, key.split(".")[0]), key.split(".")[1]) for key in config_keys()}
