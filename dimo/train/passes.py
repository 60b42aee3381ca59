"""How many passes of a network a training step takes."""

from __future__ import annotations

from dimo.config import Config

LEARNING = ("student at x_init", "auxiliary's fit", "student at x_t")  # entries of `passes_of` with a gradient


def passes_of(config: Config) -> dict[str, int]:
    """Cost of a batch of a step in units of one forward pass; a backward pass counts as two.

    What activation checkpointing makes again is not counted, and a stage 7 that distill.kd_every leaves out of most
    steps neither.
    """
    d, accumulates = config.distill, config.training.gradient_accumulation_steps > 1
    return {
        "student's drafts": d.student_steps - 1,
        "student before the updates": int(accumulates),  # its pass is made again after them, with a gradient
        "student at x_init": 3,
        "teacher": d.t_draws * (2 if d.guidance_scale != 1 and d.guidance_trunc > 0 else 1),
        "auxiliary's fit": 3 * d.aux_steps * (d.t_draws if d.aux_objective == "match_teacher" else 1),
        "auxiliary at x_t": d.t_draws if d.aux_pass == "own" else 0,
        "student at x_t": 3 * d.t_draws if d.w_kd > 0 and d.kd_every == 1 else 0,
    }


def passes_shared(config: Config) -> int:
    """How many of `passes_of` a layer that the auxiliary shares with the teacher has no part in."""
    d, passes = config.distill, passes_of(config)
    fits = passes["auxiliary's fit"] // 3
    at_x_t = fits if d.aux_objective == "match_teacher" else d.t_draws if d.aux_pass == "shared" else 0
    return 2 * fits + at_x_t + passes["auxiliary at x_t"]


def passes_of_step(config: Config, layers: int) -> float:
    """Mean cost of a training step per process, in forward passes of one video through all `layers` of a network.

    An update counts as one. Losses and moving average are left out, so that a share of these passes is a smaller share
    of the time.
    """
    d, shared = config.distill, config.model.aux_shared_layers / layers
    passes = passes_of(config) | {"student at x_t": 3 * d.t_draws / d.kd_every if d.w_kd > 0 else 0}
    updates = 1 + d.aux_steps * (1 - shared)
    of_video = sum(passes.values()) - shared * passes_shared(config) + updates
    return config.training.gradient_accumulation_steps * d.batch_size_per_gpu * of_video
