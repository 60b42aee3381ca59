"""Predictions: a distribution over the codebook for every visual token.

At 49x320x512 the float32 logits take 8 GB, the hidden states behind them 0.14 GB. A prediction is therefore read in
chunks of tokens through `logits(rows)`. `Dense` stores the logits, `Chunked` computes them from hidden states and the
head, and `Sparse` (`dimo.ursa.sparse`) from the few codes that an exact teacher considers possible.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Self, overload

import torch
from torch.nn import functional as F

from dimo.errors import DimoError, require_ids, require_shape
from dimo.ursa import inputs
from dimo.ursa.chunks import on_device, pick, tokens_at_once
from dimo.ursa.inputs import build_ursa_inputs, visual_logits
from dimo.ursa.sequence import ALL, Part, active_split
from dimo.ursa.transformer import UrsaTransformer


class Prediction:
    """Distributions over K codes for a batch of tokens (B, N). Flattened to B*N rows, samples follow each other.

    Under sequence parallelism `part` says which n of the N tokens are held here, and rows are those of (B, n).
    """

    codebook_size: int  # K
    part: Part = ALL

    @property
    def shape(self) -> tuple[int, int]:
        """(B, N)."""
        raise NotImplementedError

    @property
    def held(self) -> tuple[int, int]:
        """(B, n): the tokens that are held here."""
        return self.shape

    @property
    def device(self) -> torch.device:
        raise NotImplementedError

    def _rows(self, rows: slice) -> torch.Tensor:
        """Float32 logits (n, K) of some of the B*N tokens."""
        raise NotImplementedError

    def logits(self, rows: slice | None = None) -> torch.Tensor:
        """Float32 logits (n, K) of some of the B*N tokens; None: of all, (B, N, K), for inspection."""
        if rows is not None:
            return self._rows(rows)
        return self._rows(slice(None)).unflatten(0, self.held)

    def detach(self, copy: bool = False) -> Prediction:
        """Detached from the graph; `copy`: independent of later in-place updates of the weights."""
        raise NotImplementedError

    def kernel(self, function: Callable) -> Callable:
        """`function`, which takes chunks of these logits, compiled if that pays off."""
        return function

    def row_chunks(self) -> Iterator[slice]:
        """Slices that cover all rows in chunks of `tokens_at_once`."""
        count, size = self.held[0] * self.held[1], tokens_at_once(self.codebook_size, self.device)
        return (slice(start, min(start + size, count)) for start in range(0, count, size))

    @torch.no_grad()
    def map(self, function: Callable[..., tuple[torch.Tensor, ...]], *tensors: torch.Tensor):
        """Apply a per-token function in chunks, without gradients and without materialising all logits.

        Args:
            function: maps the logits (n, K) of a chunk, and the chunks (n, ...) of `tensors`, to a tuple of (n, ...).
            tensors: further inputs, each (B, N, ...).

        Returns:
            The outputs for all tokens, each (B, N, ...).
        """
        for i, tensor in enumerate(tensors):
            require_shape(f"tensors[{i}]", tensor, (*self.shape, *tensor.shape[2:]))
        fixed, flat = self.detach(), [self.part.own(tensor).flatten(0, 1) for tensor in tensors]
        one = self.kernel(function)
        parts = [one(fixed._rows(rows), *(x[rows] for x in flat)) for rows in self.row_chunks()]
        return tuple(self.part.whole(torch.cat(rows).unflatten(0, self.held)) for rows in zip(*parts))

    def sample(self, generator: torch.Generator | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Sample every token independently, without gradients.

        Returns:
            x, log p(x) and entropy in nats, each (B, N). The uniform number behind each token is drawn up front, so the
            result does not depend on the chunk size.
        """
        u = torch.rand(self.shape, generator=generator, device=self.device, dtype=torch.float64)
        return self.map(_draw, u)

    def argmax(self) -> torch.Tensor:
        """The most likely code of every token: (B, N)."""
        return self.map(_argmax)[0]

    def log_prob(self, x: torch.Tensor) -> torch.Tensor:
        """log p(x) of codes x (B, N), in nats, without gradients: (B, N)."""
        require_shape("x", x, self.shape)
        require_ids("x", x, self.codebook_size)
        return self.map(_log_prob, x)[0]

    def entropy(self) -> torch.Tensor:
        """Entropy of every token's distribution in nats, without gradients: (B, N)."""
        return self.map(_entropy)[0]

    def divergence(self, other: Prediction, beta: float) -> torch.Tensor:
        """(1 - beta) KL(self || other) + beta KL(other || self) per token in nats, without gradients: (B, N)."""
        require_same_tokens("other", other, self)
        fixed, other = self.detach(), other.detach()
        one = self.kernel(_divergence)
        parts = [one(fixed._rows(rows), other._rows(rows), beta) for rows in self.row_chunks()]
        return self.part.whole(torch.cat(parts).view(self.held))

    def __repr__(self) -> str:
        batch, tokens = self.shape
        return f"{type(self).__name__}({batch} x {tokens} tokens, {self.codebook_size} codes, {self.device})"


@dataclasses.dataclass(repr=False, eq=False)
class _OfNetwork(Prediction):
    """A prediction whose logits are a linear function of states (B, N, ...), through which gradients can flow."""

    states: torch.Tensor
    head: torch.Tensor | None
    part: Part = ALL

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.states), self.part.count or self.states.shape[1]

    @property
    def held(self) -> tuple[int, int]:
        return tuple(self.states.shape[:2])

    @property
    def device(self) -> torch.device:
        return self.states.device

    def with_states(self, states: torch.Tensor) -> Self:
        """A prediction with other states and the same head."""
        return dataclasses.replace(self, states=states)

    def guided(self, uncond: _OfNetwork, scale: torch.Tensor | float) -> Self:
        """Classifier-free guidance u + scale (c - u), where c is this prediction; `scale` a number or (B, 1 or N, 1).

        Computed on the states, in which logits are linear: this saves one of two products with the head.
        """
        require_shape("uncond's states", uncond.states, tuple(self.states.shape))
        scale = self.part.own(scale) if isinstance(scale, torch.Tensor) else scale
        c, u = self.states.float(), uncond.states.float()
        return self.with_states((u + scale * (c - u)).to(self.states.dtype))

    def of_tokens(self, tokens: slice | torch.Tensor) -> Self:
        """The prediction for some of the tokens."""
        return self.with_states(self.states[:, tokens])

    def chunk(self, parts: int) -> list[Self]:
        """Split along the batch."""
        return [self.with_states(states) for states in self.states.chunk(parts)]

    def repeat(self, times: int) -> Self:
        """The batch repeated `times` times."""
        return self if times == 1 else self.with_states(self.states.repeat(times, 1, 1))


@dataclasses.dataclass(repr=False, eq=False)
class Dense(_OfNetwork):
    """Stored logits (B, N, K), for codebooks of up to a few thousand codes."""

    states: torch.Tensor
    head: None = None

    def __post_init__(self):
        require_shape("logits", self.states, ("B", "N", "K"))
        self.codebook_size = self.states.shape[-1]

    def _rows(self, rows: slice) -> torch.Tensor:
        return self.states.flatten(0, 1)[rows].float()

    def detach(self, copy: bool = False) -> Dense:
        return Dense(self.states.detach())

    def pull_back(self, d_logits: torch.Tensor, rows: slice, d_states: torch.Tensor, d_head=None, scale=1.0) -> None:
        """Backpropagate to the states, which are the logits: d_states[rows] = d_logits."""
        d_states[rows] = d_logits


@dataclasses.dataclass(repr=False, eq=False)
class Chunked(_OfNetwork):
    """Hidden states (B, N, D) and the head's rows (K, D) of the codes; logits are computed on demand."""

    states: torch.Tensor
    head: torch.Tensor

    def __post_init__(self):
        require_shape("hidden", self.states, ("B", "N", self.head.shape[-1]))
        self.codebook_size = len(self.head)

    def _rows(self, rows: slice) -> torch.Tensor:
        return logits_of(self.states.flatten(0, 1)[rows], self.head)

    def detach(self, copy: bool = False) -> Chunked:
        """Detached, with the head in the dtype of the hidden states."""
        return Chunked(self.states.detach(), self.head.detach().to(self.states.dtype, copy=copy), self.part)

    def kernel(self, function: Callable) -> Callable:
        return on_device(function, self.states)

    def pull_back(
        self, d_logits: torch.Tensor, rows: slice, d_states: torch.Tensor, d_head: torch.Tensor | None, scale: float
    ) -> None:
        """Backpropagate a chunk: d_states[rows] = d_logits head, and d_head += scale d_logits^T hidden.

        `d_head` is (K, D) float32, or None if the head is frozen.
        """
        torch.mm(d_logits, self.head, out=d_states[rows])
        if d_head is None:
            return
        hidden = self.states.flatten(0, 1)[rows]
        if d_logits.is_cuda and d_logits.dtype != torch.float32:
            torch.addmm(d_head, d_logits.T, hidden, torch.float32, alpha=scale, out=d_head)
        else:
            d_head.addmm_(d_logits.T.float(), hidden.float(), alpha=scale)


@overload
def predict(network: UrsaTransformer, txt_ids, visual_tokens, latents_shape, dense=..., t=...) -> Dense | Chunked: ...
@overload
def predict(network, txt_ids, visual_tokens, latents_shape, dense=..., t=...) -> Any: ...
def predict(network, txt_ids: torch.Tensor, visual_tokens: torch.Tensor, latents_shape, dense: bool = False, t=None):
    """One forward pass of a transformer, or of any network that has a method `predict`, such as an exact teacher.

    That method is called as `network.predict(txt_ids, visual_tokens, latents_shape, t)` and returns a `Prediction`.

    Args:
        txt_ids: (B, L) left-padded text ids.
        visual_tokens: (B, N) codes in [0, K).
        latents_shape: (T, H, W) with N = T*H*W.
        dense: compute all logits of a transformer at once; not inside `dimo.ursa.sequence.splitting`.
        t: time of `visual_tokens`, a number, (B,) or (B, N), if known. A transformer infers it from the tokens.

    Returns:
        The prediction of the clean codes.
    """
    if hasattr(network, "predict"):
        return network.predict(txt_ids, visual_tokens, latents_shape, t)
    if dense:
        return Dense(visual_logits(network, txt_ids, visual_tokens, latents_shape))
    spliced, config = build_ursa_inputs(network, txt_ids, visual_tokens, latents_shape), network.config
    hidden = network.hidden(spliced.input_ids, spliced.rope_pos)
    # the slice that logits get, by its name in its module, so that one that is replaced there is replaced here too
    split, part = active_split(), ALL
    if split is None:
        hidden = inputs.extract_visual_logits(hidden, spliced.num_visual_tokens, hidden.shape[-1])
    else:
        length = spliced.input_ids.shape[1]
        positions = inputs.extract_visual_logits(torch.arange(length).view(1, -1, 1), spliced.num_visual_tokens, 1)
        rows, part = split.share(int(positions[0, 0]), spliced.num_visual_tokens, length)
        hidden = hidden[:, rows]
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        hidden = hidden.to(torch.get_autocast_dtype(device))
    weight, codes = network.lm_head.weight, config.vocab_size - config.lm_vocab_size
    weight = weight if len(weight) == codes else weight[-codes:]  # slicing costs a copy of the gradient
    return Chunked(hidden, weight, part)


def require_same_tokens(name: str, prediction: Prediction, as_in: Prediction) -> None:
    """Raise DimoError unless both predictions have the same B, N and K."""
    got, want = ((*p.shape, p.codebook_size) for p in (prediction, as_in))
    if got != want:
        raise DimoError(f"{name} must predict (B, N, K) = {want}, got {got}")


def logits_of(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Hidden states (n, D) and head (K, D) -> float32 logits (n, K); on a GPU not rounded to bfloat16 in between."""
    weight = weight.to(hidden.dtype)
    if hidden.is_cuda and hidden.dtype != torch.float32 and not (hidden.requires_grad or weight.requires_grad):
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)
    return F.linear(hidden, weight).float()


# The functions below take a chunk of float32 logits (n, K).


def _draw(logits: torch.Tensor, u: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Sampled codes, their log-probability and the entropy, each (n,)."""
    x, log_z = pick(logits, u), logits.logsumexp(-1, keepdim=True)
    return x, _log_prob(logits, x, log_z)[0], _entropy(logits, log_z)[0]


def _log_prob(logits: torch.Tensor, x: torch.Tensor, log_z: torch.Tensor | None = None) -> tuple[torch.Tensor]:
    log_z = logits.logsumexp(-1, keepdim=True) if log_z is None else log_z
    return ((logits.gather(-1, x.unsqueeze(-1)) - log_z).squeeze(-1),)


def _entropy(logits: torch.Tensor, log_z: torch.Tensor | None = None) -> tuple[torch.Tensor]:
    log_z = logits.logsumexp(-1, keepdim=True) if log_z is None else log_z
    return (log_z.squeeze(-1) - ((logits - log_z).exp() * logits).sum(-1),)


def _argmax(logits: torch.Tensor) -> tuple[torch.Tensor]:
    return (logits.argmax(-1),)


def _divergence(z_p: torch.Tensor, z_q: torch.Tensor, beta: float) -> torch.Tensor:
    log_p, log_q = z_p.log_softmax(-1), z_q.log_softmax(-1)
    return (((1 - beta) * log_p.exp() - beta * log_q.exp()) * (log_p - log_q)).sum(-1)
