"""Reads a network through a logits slice, that of training or one's own, and asks the finder whether it is right."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from dimo.errors import DimoError, reason, require_time
from dimo.ursa import Chunked, Dense, Prediction, Ursa, build_ursa_inputs, predict
from dimo.ursa.chunks import without_compiling
from dimo.views.alignment import UNNAMED, Alignment, Grid, find_misalignment

if TYPE_CHECKING:
    from dimo.views.clean_tokens import CleanTokens

NEAR_DATA = 0.9  # the t at which a trained teacher knows most clean tokens
TOKENS = 2**14  # in one pass: three clips of 5,120 tokens
LOGITS = 2**25  # entries of logits that are made whole, 128 MiB
Slice = Callable[[torch.Tensor, int, int], torch.Tensor]


def slice_as_written(logits: torch.Tensor, num_visual_tokens: int, codebook_size: int) -> torch.Tensor:
    """The slice as URSA's pipeline writes it, for comparison with the function that training reads through."""
    return logits[:, -(num_visual_tokens + 1) : -1, -codebook_size:]


def clips_at_once(num_visual_tokens: int) -> int:
    return max(1, TOKENS // num_visual_tokens)


@dataclasses.dataclass
class Reader:
    """A network whose clean tokens are read through `slice_`, for `dimo.ursa.predict` and the sampler.

    Args:
        slice_: like `extract_visual_logits`. With `dense` it gets all logits (B, S, V) and the codebook's size K; else
            the hidden states (B, S, D) and D in place of K, as in training wherever logits are never made whole.
    """

    network: Any
    slice_: Slice
    dense: bool = False

    def predict(self, txt_ids, visual_tokens, latents_shape, t=None) -> Dense | Chunked:
        """The prediction of the clean codes.

        Raises:
            DimoError: the slice fails, or what it returns is not (B, N, K).
        """
        inputs, config = build_ursa_inputs(self.network, txt_ids, visual_tokens, latents_shape), self.network.config
        codebook_size, head = config.vocab_size - config.lm_vocab_size, self.network.lm_head.weight
        if self.dense:
            logits = self.network(inputs.input_ids, inputs.rope_pos)
            return Dense(self._slice(logits, inputs.num_visual_tokens, codebook_size))
        hidden = self.network.hidden(inputs.input_ids, inputs.rope_pos)
        hidden = self._slice(hidden, inputs.num_visual_tokens, hidden.shape[-1])
        return Chunked(hidden.to(head.dtype), head[-codebook_size:])

    def _slice(self, states: torch.Tensor, num_visual_tokens: int, codebook_size: int) -> torch.Tensor:
        given = f"({'logits' if self.dense else 'hidden states'} {tuple(states.shape)}, {num_visual_tokens}, "
        given += f"{codebook_size})"
        try:
            found = self.slice_(states, num_visual_tokens, codebook_size)
        except Exception as error:  # anything can happen in a function of the user's
            raise DimoError(f"the slice failed on {given}: {type(error).__name__}: {reason(error)}") from error
        want = (len(states), num_visual_tokens, codebook_size)
        got = tuple(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
        if got != want:
            raise DimoError(f"the slice of {given} must have shape {want}, got {got}")
        return found


def logits_fit(ursa: Ursa, latents_shape: Grid, max_prompt_length: int) -> bool:
    """Whether a clip's logits are small enough to be made whole."""
    return (math.prod(latents_shape) + max_prompt_length + 1) * ursa.transformer.config.lm_head_size <= LOGITS


def check_slice(
    ursa: Ursa, clean: CleanTokens, max_prompt_length: int, dense: bool, slice_: Slice | None = None,
    t: float = NEAR_DATA,
) -> Alignment:  # fmt: skip
    """Ask the finder what the teacher predicts through a slice, with the clean tokens re-noised at t.

    Args:
        dense: read logits; else hidden states, of which logits are made a few tokens at a time.
        slice_: as in `Reader`; None is the function that training reads through.

    Returns:
        The verdict. If the slice fits no reading although the same passes are right as URSA writes the slice, it is
        wrong in a way that has no name: `found` is then UNNAMED.

    Raises:
        DimoError: fewer than 8 clips, t out of range, or a slice that fails.
    """
    require_time("t", t)
    txt_ids, codes = ursa.tokenize(clean.prompts, max_prompt_length), clean.codes
    size = clips_at_once(codes.shape[1])
    if dense:
        size = min(size, max(1, LOGITS // ((codes.shape[1] + max_prompt_length) * ursa.path.codebook_size)))

    def predictions(network) -> Iterator[Prediction]:
        g = torch.Generator(codes.device).manual_seed(1)
        for ids, x_1 in zip(txt_ids.split(size), codes.split(size)):
            x_t = ursa.path.sample(x_1, t, g)
            try:
                one = predict(network, ids, x_t, clean.latents_shape, dense)
            except DimoError as error:  # a Reader says so itself
                about = "" if isinstance(network, Reader) else "the slice that training reads through fails: "
                raise DimoError(f"{about}{error}") from error
            yield one

    asked = ursa.transformer if slice_ is None else Reader(ursa.transformer, slice_, dense)
    with torch.no_grad(), without_compiling(), _eager(codes.device):
        found = find_misalignment(predictions(asked), codes, clean.latents_shape)
        if found.found is not None:
            return found
        written = find_misalignment(predictions(Reader(ursa.transformer, slice_as_written, dense)), codes,
                                    clean.latents_shape)  # fmt: skip
    if written.found != "right":
        return found
    says = "the slice is wrong in a way that has no name here: it fits no reading of the targets, although the same "
    return Alignment(found.readings, UNNAMED, says + "pass fits them when it is read as URSA's pipeline reads it")


def _eager(device: torch.device) -> contextlib.AbstractContextManager:
    """A few passes of another batch size are not worth a minute of compiling."""
    return torch.compiler.set_stance("force_eager") if device.type == "cuda" else contextlib.nullcontext()
