"""A naive training step as the baseline of the benchmark: eager layers, full logits, plain autograd, no optimizer.

It computes what `Trainer.step` does with the token-level estimator and is not slowed down on purpose: in bf16 training
weights and activations are bf16, attention is PyTorch's fused kernel, and losses use `torch.nn.functional`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch.nn import functional as F

from dimo.config import Config, to_flat
from dimo.distill.schedules import sample_t_curriculum
from dimo.errors import DimoError
from dimo.ursa import UrsaTransformer, visual_logits

# what the naive step does; of a configuration that does something else, times and TFLOP/s could not be compared
DOES = {
    "distill.estimator": "dimo", "distill.divergence": "forward", "distill.aux_objective": "denoise",
    "distill.aux_steps": 1, "distill.aux_pass": "shared", "distill.t_draws": 1, "distill.student_steps": 1,
    "distill.kd_every": 1, "training.gradient_accumulation_steps": 1,
}  # fmt: skip


def require_naive(config: Config) -> None:
    """Raise DimoError for a step that the naive one cannot be compared with."""
    flat = to_flat(config)
    other = {key: flat[key] for key, value in DOES.items() if flat[key] != value}
    if other:
        needed, got = (" ".join(f"{key}={of[key]}" for key in other) for of in (DOES, other))
        raise DimoError(f"--against naive needs {needed}, got {got}")


def naive_step(
    config: Config, teacher: UrsaTransformer, path, txt_ids: torch.Tensor, uncond_ids: torch.Tensor,
    grid: tuple[int, int, int], checkpointing: bool = False,
) -> Callable[[], None]:  # fmt: skip
    """Returns a function that runs one naive step on its own copies of student and auxiliary, up to the gradients.

    Args:
        path: probability path.
        txt_ids: (B, L) prompts.
        uncond_ids: (1, L) negative prompt.
        grid: latents_shape (T, H, W).
        checkpointing: checkpoint all activations.
    """
    require_naive(config)
    d = config.distill
    how = "full" if checkpointing else "none"
    if config.training.mixed_precision == "bf16":
        teacher = teacher.bfloat16()
    student, aux = (copy.deepcopy(teacher).requires_grad_(True) for _ in range(2))
    for network in (teacher, student, aux):
        network.run_with(False, how)
        network.model.embed_tokens.requires_grad_(False)
        network.lm_head.requires_grad_(network is not teacher and config.model.train_head)
    n = grid[0] * grid[1] * grid[2]
    size, device, codes = (len(txt_ids), n), txt_ids.device, path.codebook_size

    def log_softmax(z):
        return F.log_softmax(z.float(), -1)

    def step():
        for network in (student, aux):
            network.zero_grad()
        x_init = torch.randint(codes, size, device=device)
        z = visual_logits(student, txt_ids, x_init, grid)
        log_p = log_softmax(z)
        p = log_p.exp()
        x_hat = torch.multinomial(p.detach().view(-1, codes), 1).view(size)
        entropy = -(p * log_p).sum(-1).mean()
        x_t = path.sample(x_hat, sample_t_curriculum(len(txt_ids), 0, 0, device=device))
        with torch.no_grad():
            if d.guidance_scale == 1:
                target = visual_logits(teacher, txt_ids, x_t, grid)
            else:
                ids = torch.cat([txt_ids, uncond_ids.expand_as(txt_ids)])
                cond, uncond = visual_logits(teacher, ids, x_t.repeat(2, 1), grid).chunk(2)
                target = uncond + d.guidance_scale * (cond - uncond)
            log_target = log_softmax(target)
        z_aux = visual_logits(aux, txt_ids, x_t, grid)
        F.cross_entropy(z_aux.float().flatten(0, 1), x_hat.flatten(), label_smoothing=d.label_smoothing).backward()
        with torch.no_grad():
            gradient = log_softmax(z_aux).exp() - log_target.exp()
        loss = (gradient * z).sum(-1).mean() - d.lambda_ent * entropy
        if d.w_kd > 0:
            log_p_t = log_softmax(visual_logits(student, txt_ids, x_t, grid))
            loss = loss + d.w_kd * F.kl_div(log_p_t, log_target, log_target=True, reduction="sum") / x_t.numel()
        loss.backward()

    return step
