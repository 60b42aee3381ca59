"""Combinations of keys that make no sense together."""

from __future__ import annotations

from dimo.config.schema import Config
from dimo.errors import DimoError


def require_consistent(config: Config) -> None:
    """Raise DimoError for values that exclude each other, or by which nothing would be learnt."""
    d = config.distill
    if d.aux_pass == "shared" and d.aux_objective == "denoise" and d.t_draws > d.aux_steps:
        raise DimoError(
            f"distill.aux_pass=shared needs aux_steps >= t_draws, got distill.t_draws={d.t_draws} and "
            f"distill.aux_steps={d.aux_steps}; use distill.aux_pass=own"
        )
    if d.aux_target == "exact" and d.aux_objective != "denoise":
        raise DimoError(f"distill.aux_target=exact is a target of distill.aux_objective=denoise, got {d.aux_objective}")
    leaves_one_out = d.w_reinforce > 0 or (d.estimator == "reinforce" and d.baseline == "leave_one_out")
    if leaves_one_out and d.batch_size_per_gpu < 2:
        raise DimoError(
            "distill.w_reinforce and distill.baseline=leave_one_out compare the samples of a batch: "
            f"distill.batch_size_per_gpu must be at least 2, got {d.batch_size_per_gpu}"
        )
    if d.w_distill == d.w_kd == 0:
        raise DimoError(
            "distill.w_distill and distill.w_kd are both 0, so the student would learn nothing (w_distill also "
            "multiplies w_reinforce)"
        )
    as_the_teacher = d.teacher == "network" and d.guidance_scale == 1 and config.model.logit_gain == 1
    if d.w_distill == d.lambda_ent == 0 and as_the_teacher:
        raise DimoError(
            "distill.w_distill is 0, so only w_kd would teach the student, by its KL to the teacher; but it starts as "
            "that teacher, so the KL is 0 and it would learn nothing: set w_distill, distill.guidance_scale above 1, "
            "distill.teacher=exact or model.logit_gain other than 1"
        )
    if d.ent_anneal_to and d.ent_anneal_from > d.ent_anneal_to:
        raise DimoError(
            f"distill.ent_anneal_from must not be after ent_anneal_to, got {d.ent_anneal_from} and {d.ent_anneal_to}"
        )
