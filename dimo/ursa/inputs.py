"""Build URSA's input sequence from prompts and codes, and slice the visual logits out of its output.

input_ids = [text (L, left-padded)] [BOV] [visual codes + lm_vocab_size (N)]; text token i sits at (i, i, i), BOV at
(L, L, L), visual token (f, y, x) at (L + 1 + f, y, x). The model predicts the *next* position, so the logits of the
N visual tokens are those at BOV and all visual positions but the last: `logits[:, -(N+1):-1]`.
"""

from __future__ import annotations

import dataclasses
import math

import torch

from dimo.errors import DimoError, require_ids, require_shape

TEMPORAL_STRIDE, SPATIAL_STRIDE = 4, 8  # of URSA's VAE


@dataclasses.dataclass(frozen=True)
class UrsaInputs:
    """input_ids (B, L+1+N) int64, rope_pos (L+1+N, 3) int64, num_visual_tokens N."""

    input_ids: torch.Tensor
    rope_pos: torch.Tensor
    num_visual_tokens: int


def latents_shape_for(
    num_frames: int,
    height: int,
    width: int,
    temporal_stride: int = TEMPORAL_STRIDE,
    spatial_stride: int = SPATIAL_STRIDE,
) -> tuple[int, int, int]:
    """Latent grid of a video: T = (num_frames - 1) / 4 + 1, H = height / 8, W = width / 8 at the default strides.

    Args:
        num_frames, height, width: size of the video in frames and pixels.
        temporal_stride, spatial_stride: strides of the VAE, by default those of URSA's video VAE. `Ursa.latents_shape`
            uses the strides of the checkpoint folder.

    Returns:
        (T, H, W).

    Raises:
        DimoError: a size is not divisible; the message gives the nearest valid ones.
    """
    for name, value, stride, offset in (
        ("num_frames", num_frames, temporal_stride, 1),
        ("height", height, spatial_stride, 0),
        ("width", width, spatial_stride, 0),
    ):
        smallest = offset or stride
        if value < smallest or (value - offset) % stride:
            below = max(smallest, value - (value - offset) % stride)
            rule = f"a multiple of {stride}" + (f" plus {offset}" if offset else "")
            choices = " or ".join(str(v) for v in sorted({below, below + stride}))
            raise DimoError(f"{name} must be {rule}, got {value}; the nearest are {choices}")
    return (num_frames - 1) // temporal_stride + 1, height // spatial_stride, width // spatial_stride


def rope_positions(text_length: int, latents_shape: tuple[int, int, int], device=None) -> torch.Tensor:
    """Positions (t, y, x) of L text tokens, BOV and the N visual tokens: (L+1+N, 3) int64."""
    head = torch.arange(text_length + 1, device=device).view(-1, 1).expand(-1, 3)
    starts = (text_length + 1, 0, 0)
    axes = (torch.arange(start, start + n, device=device) for start, n in zip(starts, latents_shape))
    return torch.cat([head, torch.cartesian_prod(*axes).view(-1, 3)])


def build_ursa_inputs(
    transformer,
    txt_ids: torch.Tensor,
    visual_tokens: torch.Tensor,
    latents_shape: tuple[int, int, int],
    device: torch.device | str | None = None,
) -> UrsaInputs:
    """Splice prompts and visual codes into one sequence.

    Args:
        transformer: anything with `.config` holding lm_vocab_size, vocab_size and bov_token_id (upstream's too).
        txt_ids: (B, L) text ids, left-padded.
        visual_tokens: (B, N) or (B, T, H, W) codes in [0, K).
        latents_shape: (T, H, W), N = T*H*W.
        device: device of the result; None means the device of `visual_tokens`.

    Raises:
        DimoError: mismatched shapes, or ids out of range.
    """
    config = transformer.config
    if len(latents_shape) != 3 or any(int(n) < 1 for n in latents_shape):
        raise DimoError(f"latents_shape must be three positive numbers (T, H, W), got {tuple(latents_shape)}")
    t, h, w = (int(n) for n in latents_shape)
    latents_shape = t, h, w
    num_visual_tokens = math.prod(latents_shape)
    require_shape("txt_ids", txt_ids, ("B", "L"))
    batch = txt_ids.shape[0]
    if isinstance(visual_tokens, torch.Tensor) and visual_tokens.dim() == 4:
        require_shape("visual_tokens", visual_tokens, (batch, *latents_shape))
        visual_tokens = visual_tokens.flatten(1)
    require_shape("visual_tokens", visual_tokens, (batch, num_visual_tokens))
    require_ids("txt_ids", txt_ids, config.lm_vocab_size)
    require_ids("visual_tokens", visual_tokens, config.vocab_size - config.lm_vocab_size)

    device = visual_tokens.device if device is None else torch.device(device)
    bov = torch.full((batch, 1), config.bov_token_id, device=device, dtype=torch.long)
    codes = visual_tokens.to(device, torch.long) + config.lm_vocab_size
    return UrsaInputs(
        input_ids=torch.cat([txt_ids.to(device, torch.long), bov, codes], 1),
        rope_pos=rope_positions(txt_ids.shape[1], latents_shape, device),
        num_visual_tokens=num_visual_tokens,
    )


def extract_visual_logits(logits: torch.Tensor, num_visual_tokens: int, codebook_size: int) -> torch.Tensor:
    """Logits of the visual tokens; hidden states are sliced the same way, with K their size.

    Args:
        logits: (B, S, V), where V is K, or more if the head covers the text vocabulary as well; the last K columns are
            the visual codes.
        num_visual_tokens: N.
        codebook_size: K.

    Returns:
        (B, N, K), a view of `logits`.

    Raises:
        DimoError: fewer than N + 1 positions, or fewer than K columns.
    """
    require_shape("logits", logits, ("B", "S", "V"))
    if num_visual_tokens < 1 or logits.shape[1] < num_visual_tokens + 1:
        raise DimoError(
            f"logits must span at least num_visual_tokens + 1 = {num_visual_tokens + 1} positions "
            f"(BOV and the visual tokens), got {logits.shape[1]}"
        )
    if codebook_size < 1 or logits.shape[2] < codebook_size:
        raise DimoError(f"logits must have at least codebook_size = {codebook_size} columns, got {logits.shape[2]}")
    return logits[:, -(num_visual_tokens + 1) : -1, -codebook_size:]


def visual_logits(
    transformer, txt_ids: torch.Tensor, visual_tokens: torch.Tensor, latents_shape: tuple[int, int, int]
) -> torch.Tensor:
    """One forward pass of our transformer: prompts (B, L) and codes (B, N) -> logits (B, N, K) of the clean codes."""
    inputs = build_ursa_inputs(transformer, txt_ids, visual_tokens, latents_shape)
    logits = transformer(inputs.input_ids, inputs.rope_pos, last=inputs.num_visual_tokens + 1)
    config = transformer.config
    return extract_visual_logits(logits, inputs.num_visual_tokens, config.vocab_size - config.lm_vocab_size)
