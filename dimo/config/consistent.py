"""Combinations of keys that make no sense together."""

from __future__ import annotations

from dimo.config.schema import Distill
from dimo.errors import DimoError


def require_consistent(d: Distill) -> None:
    """Raise DimoError for values of `distill` that exclude each other."""
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
    if d.ent_anneal_to and d.ent_anneal_from > d.ent_anneal_to:
        raise DimoError(
            f"distill.ent_anneal_from must not be after ent_anneal_to, got {d.ent_anneal_from} and {d.ent_anneal_to}"
        )
