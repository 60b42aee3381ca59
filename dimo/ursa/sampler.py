"""Sampling from noise in any number of steps, equivalent to URSA's KineticOptimalScheduler."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
from collections.abc import Iterator, Sequence

import torch

from dimo.errors import DimoError, require_finite, require_shape
from dimo.ursa.chunks import FEW_CODES
from dimo.ursa.prediction import Chunked, Dense, Prediction, predict
from dimo.ursa.probability_path import T_MAX, MetricPath, MixturePath
from dimo.ursa.transformer import UrsaTransformer

log = logging.getLogger(__name__)
MOST_PASSES = round(1 / (1 - T_MAX))  # the last of so many is at t = .999, and no network is trained beyond it

# of videos sampled at a time: the most; of tokens on a GPU; of squares of a video's tokens on a CPU, where long videos
# are not faster together, and who waits sees one after the other finished
MOST_VIDEOS, TOKENS, SQUARES = 512, 64 * 1280, 2**21


@dataclasses.dataclass
class Trajectory:
    """A record of all sampling steps: time t, codes x_t before the step and predicted clean codes x_1, each (B, N)."""

    t: list[float] = dataclasses.field(default_factory=list)
    x_t: list[torch.Tensor] = dataclasses.field(default_factory=list)
    x_1: list[torch.Tensor] = dataclasses.field(default_factory=list)


def require_passes(name: str, passes: int) -> None:
    """Refuse a number of passes that no video should be asked for; `name` is the flag or key that holds it."""
    if not 1 <= passes <= MOST_PASSES:
        raise DimoError(f"{name} must lie in [1, {MOST_PASSES}], got {passes}")


def videos_at_once(tokens: int, device: torch.device) -> int:
    """How many videos of so many tokens are sampled at a time, unless somebody asks for another number."""
    fit = SQUARES // tokens**2 if device.type == "cpu" else TOKENS // tokens
    return max(1, min(MOST_VIDEOS, fit))


def timesteps(steps: int, shift: float = 1.0) -> list[float]:
    """Time of every step: t_i = 1 - shift s / (1 + (shift - 1) s) with s = 1 - i / steps; t_0 = 0."""
    if steps < 1 or shift <= 0:
        raise DimoError(f"steps must be at least 1 and shift positive, got steps={steps}, shift={shift}")
    sigma = [1 - i / steps for i in range(steps)]
    return [1 - shift * s / (1 + (shift - 1) * s) for s in sigma]


def pipeline_steps(passes: int, shift: float, moves_at_0: bool) -> int:
    """`num_inference_steps` at which URSA's pipeline gives a student `passes` passes that count.

    On the metric path a jump from t = 0 moves no token (`moves_at_0` of the path is false), so of several steps the
    first does nothing but take time: the second starts from the same noise. Two passes that count need three steps.
    """
    idle = passes > 1 and not moves_at_0 and timesteps(passes, shift)[0] <= 0
    return passes + idle


def student_times(path: MetricPath | MixturePath, passes: int, shift: float = 1.0) -> list[float]:
    """Times of a student's passes: those of the pipeline in `pipeline_steps` steps, without an idle first one."""
    return timesteps(pipeline_steps(passes, shift, path.moves_at_0), shift)[-passes:]


def warn_if_guided_again(guidance_scale: float, guidance_trunc: float) -> None:
    """Log a warning if guidance would apply to a student, whose first step is at t = 0 or near it."""
    if guidance_scale > 1 and guidance_trunc > 0:
        log.warning(
            "guidance_scale=%g guides the student a second time: the teacher's guidance is distilled into it already, "
            "and guiding it again doubles the cost and degrades its videos; use guidance_scale=1", guidance_scale,
        )  # fmt: skip


def warn_if_other_passes(steps: int, trained_for: int) -> None:
    """Log a warning if a student is sampled in another number of passes than it was trained for."""
    if steps != trained_for:
        log.warning(
            "this student was trained for %d pass%s, and is asked for %d: its videos are likely worse", trained_for,
            "es" if trained_for > 1 else "", steps,
        )  # fmt: skip


def jump(
    path: MetricPath | MixturePath,
    prediction: Prediction | torch.Tensor,
    x_t: torch.Tensor,
    t: float,
    t_next: float | None,
    generator: torch.Generator | None = None,
    argmax: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One sampling step.

    Args:
        prediction: of the clean codes at x_t: a `Prediction`, or logits (B, N, K).
        x_t: (B, N) codes at time t.
        t_next: time after the step; None means this is the last step, which returns x_1 itself.
        argmax: take the most likely x_1 instead of sampling it.

    Returns:
        (codes at t_next, predicted clean codes x_1), both (B, N).

    Raises:
        DimoError: wrong shapes, or predictions that are not finite.
    """
    if isinstance(prediction, torch.Tensor):
        prediction = Dense(prediction)
    if (*prediction.shape, prediction.codebook_size) != (*x_t.shape, path.codebook_size):
        raise DimoError(
            f"prediction must be for {tuple(x_t.shape)} tokens and {path.codebook_size} codes, got {prediction!r}"
        )
    if isinstance(prediction, Dense | Chunked):
        require_finite("logits" if isinstance(prediction, Dense) else "hidden states", prediction.states)
    x_1 = prediction.argmax() if argmax else prediction.sample(generator)[0]
    return (x_1 if t_next is None else path.jump(x_1, x_t, t, t_next - t, generator)), x_1


def predict_guided(
    network,
    txt_ids: torch.Tensor,
    uncond_ids: torch.Tensor,
    x_t: torch.Tensor,
    latents_shape: tuple[int, int, int],
    scale: torch.Tensor | float,
    dense: bool = False,
    t: torch.Tensor | float | None = None,
):
    """Classifier-free guidance with both passes in one batch: the prediction u + scale (c - u) at x_t (B, N).

    Args:
        txt_ids: (B, L) prompts, of c.
        uncond_ids: (1 or B, L) the empty or negative prompt, of u.
        scale: a number or (B, 1 or N, 1).
        dense, t: as in `predict`.
    """
    ids = torch.cat([txt_ids, uncond_ids.expand_as(txt_ids)])
    twice = torch.cat([t, t]) if isinstance(t, torch.Tensor) else t
    cond, uncond = predict(network, ids, x_t.repeat(2, 1), latents_shape, dense, twice).chunk(2)
    return cond.guided(uncond, scale)


@torch.no_grad()
def inputs_of_passes(
    network: UrsaTransformer,
    path: MetricPath | MixturePath,
    txt_ids: torch.Tensor,
    x_init: torch.Tensor,
    latents_shape: tuple[int, int, int],
    times: Sequence[float],
    gain: float = 1.0,
    dense: bool = False,
    generator: torch.Generator | None = None,
) -> Iterator[torch.Tensor]:
    """What an unguided student sees in each pass of `sample`, x_t (B, N): x_init, then its drafts, jumped on.

    Args:
        times: one per pass, as from `student_times`. The last pass itself is not made.
        gain: multiplies the logits of the passes that are made.
    """
    x_t = x_init
    yield x_t
    for t, t_next in itertools.pairwise(times):
        prediction = predict(network, txt_ids, x_t, latents_shape, dense)
        x_t, _ = jump(path, prediction.with_states(gain * prediction.states), x_t, t, t_next, generator)
        yield x_t


@torch.no_grad()
def sample(
    transformer,
    path: MetricPath | MixturePath,
    txt_ids: torch.Tensor,
    latents_shape: tuple[int, int, int],
    steps: int | Sequence[float] = 25,
    *,
    x_init: torch.Tensor | None = None,
    guidance_scale: float = 1.0,
    guidance_trunc: float = 0.9,
    uncond_ids: torch.Tensor | None = None,
    shift: float = 1.0,
    argmax: bool = False,
    generator: torch.Generator | None = None,
    trajectory: Trajectory | None = None,
) -> torch.Tensor:
    """Generate codes in `steps` sampling steps.

    Args:
        steps: their number, or the time of each, ascending, as from `student_times`.
        txt_ids: (B, L) prompts.
        latents_shape: (T, H, W) with N = T*H*W.
        x_init: (B, N) initial codes; None means uniform noise from `generator`.
        guidance_scale: classifier-free guidance; 1 means none, larger values need `uncond_ids`.
        guidance_trunc: time from which on there is no guidance, as in URSA's pipeline.
        uncond_ids: (B, L) ids of the empty or a negative prompt, evaluated in the same batch.
        shift: time shift, see `timesteps`; of a number of steps.
        argmax: take the most likely codes; with steps=1 the student becomes a deterministic map from noise to video.
        trajectory: filled in place with every step if given.

    Returns:
        (B, N) int64 codes.

    Raises:
        DimoError: an argument out of range, wrong shapes, or logits that are not finite.
    """
    device, batch = txt_ids.device, txt_ids.shape[0]
    size = (batch, math.prod(latents_shape))
    if x_init is None:
        x_init = torch.randint(path.codebook_size, size, device=device, generator=generator)
    require_shape("x_init", x_init, size)
    if not guidance_scale >= 1:
        raise DimoError(f"guidance_scale must be at least 1 (no guidance), got {guidance_scale}")
    if not 0 <= guidance_trunc <= 1:
        raise DimoError(f"guidance_trunc must lie in [0, 1] (1: guidance at every t), got {guidance_trunc}")
    if guidance_scale > 1 and uncond_ids is None:
        raise DimoError("uncond_ids is needed when guidance_scale > 1: the ids of the empty or the negative prompt")

    x_t, times = x_init, timesteps(steps, shift) if isinstance(steps, int) else list(steps)
    dense = path.codebook_size <= FEW_CODES
    for i, t in enumerate(times):
        if guidance_scale > 1 and t < guidance_trunc:
            prediction = predict_guided(transformer, txt_ids, uncond_ids, x_t, latents_shape, guidance_scale, dense, t)
        else:
            prediction = predict(transformer, txt_ids, x_t, latents_shape, dense, t)
        t_next = times[i + 1] if i + 1 < len(times) else None
        x_next, x_1 = jump(path, prediction, x_t, t, t_next, generator, argmax)
        if trajectory is not None:
            trajectory.t.append(t)
            trajectory.x_t.append(x_t)
            trajectory.x_1.append(x_1)
        x_t = x_next
    return x_t
