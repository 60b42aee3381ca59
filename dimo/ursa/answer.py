"""What a network says about N tokens, kept as hidden states: its logits are made a few tokens at a time, or when asked.

At 49x320x512 one float32 tensor of logits is 8 GB and the hidden states behind it are 0.14 GB. The head is linear, so
guidance works on hidden states too, and costs one product with the head instead of two.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch.nn import functional as F

from dimo.errors import require_shape
from dimo.ursa.chunks import chunks, on_device, pick, tokens_at_once
from dimo.ursa.inputs import build_ursa_inputs


@dataclasses.dataclass
class Answer:
    """Hidden states (B, N, D) and the head's rows (K, D) of the codes; both may carry a graph."""

    hidden: torch.Tensor
    weight: torch.Tensor

    def __post_init__(self):
        require_shape("hidden", self.hidden, ("B", "N", self.weight.shape[-1]))

    @property
    def logits(self) -> torch.Tensor:
        """(B, N, K), all of them, in float32: for looking at."""
        return logits_of(self.hidden.flatten(0, 1), self.weight).view(*self.hidden.shape[:2], -1)

    def detach(self, copy: bool = False) -> Answer:
        """The same without a graph, the weight in the dtype of the hidden states; `copy`: whatever happens to it."""
        return Answer(self.hidden.detach(), self.weight.detach().to(self.hidden.dtype, copy=copy))

    def chunk(self, parts: int) -> list[Answer]:
        """Cut along the batch."""
        return [Answer(hidden, self.weight) for hidden in self.hidden.chunk(parts)]


def visual_answer(transformer, txt_ids: torch.Tensor, visual_tokens: torch.Tensor, latents_shape) -> Answer:
    """One pass of a transformer: codes (B, N) under prompts (B, L) -> its answer on the clean codes."""
    inputs, config = build_ursa_inputs(transformer, txt_ids, visual_tokens, latents_shape), transformer.config
    hidden = transformer.hidden(inputs.input_ids, inputs.rope_pos)[:, -(inputs.num_visual_tokens + 1) : -1]
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        hidden = hidden.to(torch.get_autocast_dtype(device))
    weight, codes = transformer.lm_head.weight, config.vocab_size - config.lm_vocab_size
    return Answer(hidden, weight if len(weight) == codes else weight[-codes:])  # a slice's gradient is a copy more


def guide_answer(cond: Answer, uncond: Answer, scale: torch.Tensor | float) -> Answer:
    """Classifier-free guidance, u + w (c - u), in float32 on hidden states; w a number or (B, 1 or N, 1)."""
    c, u = cond.hidden.float(), uncond.hidden.float()
    return Answer((u + scale * (c - u)).to(cond.hidden.dtype), cond.weight)


def logits_of(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """(n, D) and (K, D) -> float32 logits (n, K), never rounded to bfloat16 on a GPU."""
    weight = weight.to(hidden.dtype)
    if hidden.is_cuda and hidden.dtype != torch.float32 and not (hidden.requires_grad or weight.requires_grad):
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)
    return F.linear(hidden, weight).float()


def by_chunks(function: Callable[..., tuple[torch.Tensor, ...]], answer: Answer, *tensors: torch.Tensor):
    """function(logits (n, K), *pieces) -> tensors (n, ...), over all tokens without ever holding all logits.

    Args:
        tensors: (B, N, ...) each, cut like the logits.

    Returns:
        What the function returns, as tensors (B, N, ...). Without gradients.
    """
    shape = answer.hidden.shape[:2]
    for i, tensor in enumerate(tensors):
        require_shape(f"tensors[{i}]", tensor, (*shape, *tensor.shape[2:]))
    answer = answer.detach()
    hidden, *flat = (x.flatten(0, 1) for x in (answer.hidden, *tensors))
    one, size = on_device(function, hidden), tokens_at_once(len(answer.weight), hidden.device)
    with torch.no_grad():
        parts = [one(logits_of(h, answer.weight), *pieces) for h, *pieces in chunks(size, hidden, *flat)]
    return tuple(torch.cat(part).unflatten(0, shape) for part in zip(*parts))


def _draw(logits: torch.Tensor, u: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Codes (n,), their log-probability and the entropy, of logits (n, K)."""
    x, log_z = pick(logits, u), logits.logsumexp(-1, keepdim=True)
    return x, _log_prob(logits, x, log_z)[0], _entropy(logits, log_z)[0]


def _log_prob(logits: torch.Tensor, x: torch.Tensor, log_z: torch.Tensor | None = None) -> tuple[torch.Tensor]:
    log_z = logits.logsumexp(-1, keepdim=True) if log_z is None else log_z
    return ((logits.gather(-1, x.unsqueeze(-1)) - log_z).squeeze(-1),)


def _entropy(logits: torch.Tensor, log_z: torch.Tensor | None = None) -> tuple[torch.Tensor]:
    log_z = logits.logsumexp(-1, keepdim=True) if log_z is None else log_z
    return (log_z.squeeze(-1) - ((logits - log_z).exp() * logits).sum(-1),)


def _most_likely(logits: torch.Tensor) -> tuple[torch.Tensor]:
    return (logits.argmax(-1),)


def draw(answer: Answer, generator: torch.Generator | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x (B, N) drawn from softmax(logits), and per token log p(x) and entropy in nats.

    One uniform number per token decides, drawn before any chunk is: the result does not depend on their size.
    """
    shape, device = answer.hidden.shape[:2], answer.hidden.device
    return by_chunks(_draw, answer, torch.rand(shape, generator=generator, device=device, dtype=torch.float64))


def most_likely(answer: Answer) -> torch.Tensor:
    """The code (B, N) with the highest logit."""
    return by_chunks(_most_likely, answer)[0]


def log_prob(answer: Answer, x: torch.Tensor) -> torch.Tensor:
    """log p(x) in nats of the codes x (B, N)."""
    return by_chunks(_log_prob, answer, x)[0]


def entropy(answer: Answer) -> torch.Tensor:
    """Of every token's softmax(logits), in nats: (B, N)."""
    return by_chunks(_entropy, answer)[0]
