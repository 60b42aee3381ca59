"""The evaluation where no oracle knows the videos: what can be measured of samplers without any truth.

No figure here says that a video is good. A low teacher_nll says that the teacher finds the tokens plausible, which a
frozen or repeated video can be too: read it beside diversity and codes_used.
"""

from __future__ import annotations

import itertools
import json
import math
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from dimo.distill.losses import log_prob, token_entropy
from dimo.errors import DimoError, require_shape
from dimo.files import whole_file
from dimo.ursa import Ursa, UrsaTransformer, guide, sample, visual_logits
from dimo.ursa.chunks import tokens_at_once

COLUMNS = ("seconds_per_video", "codes_used", "token_entropy", "teacher_nll", "diversity")
TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)  # at which teacher_nll re-noises
Grid = tuple[int, int, int]


@torch.no_grad()
def compare(
    ursa: Ursa,
    student: UrsaTransformer,
    prompts: list[str],
    grid: Grid,
    *,
    videos_per_prompt: int = 2,
    teacher_steps: tuple[int, ...] = (1, 25),
    guidance_scale: float = 1.0,
    guidance_trunc: float = 0.9,
    negative_prompt: str = "",
    seed: int = 1234,
    max_prompt_length: int = 320,
    progress: bool = True,
) -> tuple[dict, dict[str, torch.Tensor]]:
    """Sample every prompt `videos_per_prompt` times, one video a pass -> (rows by name, codes (B, N) by name).

    Rows: student_1, student_1_argmax, untrained_1 (what the student started from), each one unguided pass, and
    teacher_<steps>, guided. Video i starts from the same noise in every row. Each row has

        seconds_per_video   sampling, without decoding, after one pass to warm up
        codes_used          different codes in all its videos
        token_entropy       of what its one pass predicts, nats per token; None for more passes
        teacher_nll         see `teacher_nll`, nats per token
        diversity           see `diversity`; None for one video per prompt
    """
    if not prompts or videos_per_prompt < 1:
        raise DimoError(f"prompts and videos_per_prompt must not be empty, got {len(prompts)} and {videos_per_prompt}")
    path, teacher, device = ursa.path, ursa.transformer, ursa.path.device
    txt_ids = ursa.tokenize([p for p in prompts for _ in range(videos_per_prompt)], max_prompt_length)
    uncond_ids = ursa.tokenize([negative_prompt], max_prompt_length)
    g = torch.Generator(device).manual_seed(seed)
    x_init = torch.randint(path.codebook_size, (len(txt_ids), math.prod(grid)), generator=g, device=device)
    guided = {"guidance_scale": guidance_scale, "guidance_trunc": guidance_trunc, "uncond_ids": uncond_ids}
    samplers = {
        "student_1": (student, 1, {}),
        "student_1_argmax": (student, 1, {"argmax": True}),
        "untrained_1": (teacher, 1, {}),
        **{f"teacher_{n}": (teacher, n, guided) for n in teacher_steps},
    }
    rows, codes = {}, {}
    bar = tqdm(samplers.items(), desc="evaluate", unit="sampler", disable=not progress)
    for name, (network, steps, options) in bar:
        options = {"shift": ursa.shift, "generator": g, **options}
        sample(network, path, txt_ids[:1], grid, 1, **options).cpu()
        parts, start = [], time.perf_counter()
        for i, ids in enumerate(txt_ids.split(1)):
            g.manual_seed(seed + 1 + i)
            parts.append(sample(network, path, ids, grid, steps, x_init=x_init[i : i + 1], **options).cpu())
        seconds = time.perf_counter() - start  # .cpu() waits for the GPU, so the clock is right
        codes[name] = torch.cat(parts)
        scale = guidance_scale if options.get("guidance_trunc", 0) > 0 else 1.0  # the one pass is at t = 0
        entropy = pass_entropy(network, txt_ids, x_init, grid, scale, uncond_ids) if steps == 1 else None
        rows[name] = {
            "seconds_per_video": seconds / len(txt_ids),
            "codes_used": codes[name].unique().numel(),
            "token_entropy": None if entropy is None else entropy.mean().item(),
            "teacher_nll": teacher_nll(ursa, codes[name].to(device), txt_ids, grid, seed + 1 + len(txt_ids)),
            "diversity": diversity(codes[name].view(len(prompts), videos_per_prompt, -1)),
        }
    return rows, codes


@torch.no_grad()
def pass_entropy(
    network: UrsaTransformer, txt_ids: torch.Tensor, x_t: torch.Tensor, grid: Grid,
    guidance_scale: float = 1.0, uncond_ids: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Entropy in nats of every token that one pass at x_t (B, N) predicts under txt_ids (B, L) -> (B, N).

    With guidance_scale > 1 of the guided prediction, away from uncond_ids (1, L).
    """
    codebook_size = network.config.vocab_size - network.config.lm_vocab_size
    videos = max(1, tokens_at_once(codebook_size, x_t.device) // x_t.shape[1])  # URSA: one, whose logits are 1.3 GB
    parts = []
    for ids, x in zip(txt_ids.split(videos), x_t.split(videos)):
        logits = visual_logits(network, ids, x, grid)
        if guidance_scale > 1:
            logits = guide(logits, visual_logits(network, uncond_ids.expand_as(ids), x, grid), guidance_scale)
        parts.append(token_entropy(logits))
    return torch.cat(parts)


@torch.no_grad()
def teacher_nll(
    ursa: Ursa, codes: torch.Tensor, txt_ids: torch.Tensor, grid: Grid, seed: int, times: tuple[float, ...] = TIMES
) -> float:
    """-log p_T(x_1 | x_t, prompt) of codes x_1 (B, N) under the unguided teacher, x_t drawn from the path at `times`.

    Mean over tokens, videos and times, in nats per token. The same seed gives the same noise, whatever the codes are.
    """
    g, total = torch.Generator(codes.device).manual_seed(seed), 0.0
    for t in times:
        for ids, x_1 in zip(txt_ids.split(1), codes.split(1)):
            logits = visual_logits(ursa.transformer, ids, ursa.path.sample(x_1, t, g), grid)
            total -= log_prob(logits, x_1).mean().item()
    return total / (len(times) * len(codes))


def diversity(codes: torch.Tensor) -> float | None:
    """Mean share of tokens in which two of V videos of one prompt differ; codes (P, V, N). None where V is 1."""
    require_shape("codes", codes, ("P", "V", "N"))
    pairs = list(itertools.combinations(range(codes.shape[1]), 2))
    return sum((codes[:, i] != codes[:, j]).float().mean().item() for i, j in pairs) / len(pairs) if pairs else None


def save_codes(file: Path, codes: dict[str, torch.Tensor], prompts: list[str], grid: Grid) -> None:
    """Codes (B, T, H, W) by row, to be decoded anywhere; the prompt of each video is in the metadata, as JSON."""
    with whole_file(file) as beside:
        save_file({name: c.view(-1, *grid) for name, c in codes.items()}, beside, {"prompts": json.dumps(prompts)})
