"""URSA's transformer in plain PyTorch, with the state-dict keys of diffnext's `URSATransformer3DModel`.

A Qwen3 decoder (RMSNorm, grouped-query attention with per-head q/k norm, SwiGLU, no biases) with three changes:
attention is bidirectional and unmasked, RoPE has three coordinates, and there is no timestep input at all.
Source: baaivision/URSA at 29284bb, and arXiv 2510.24717.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import sdpa_kernel

from dimo.errors import DimoError, require_ids, require_shape
from dimo.ursa import cpu, recompute
from dimo.ursa.attention import KERNELS
from dimo.ursa.config import NORM_EPS, UrsaConfig
from dimo.ursa.lower import active_lower
from dimo.ursa.sequence import Split, active_split


class RMSNorm(nn.Module):
    """x / rms(x) * weight, rounded once. Upstream also rounds x / rms(x), which is less accurate in bfloat16."""

    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if cpu.serves(x):  # also without gradients, so that teacher and initial student agree bit for bit
            return cpu.Norm.apply(x, self.weight, NORM_EPS)
        return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), NORM_EPS)


def rope_table(rope_pos: torch.Tensor, theta: float, head_dim: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    """RoPE table for `rotate`: (cos, signed sin), each (S, head_dim) float32, for positions (S, 3) = (t, y, x).

    With head_dim 128, the 64 frequencies take their coordinate from [t, y, x] repeated 16 times, then [y, x] repeated 8
    times.
    """
    coordinate = torch.cat([rope_pos.repeat(1, head_dim // 8), rope_pos[:, 1:].repeat(1, head_dim // 16)], -1)
    exponent = torch.arange(0, head_dim, 2, device=rope_pos.device).float() / head_dim
    angle = coordinate * torch.pow(theta, exponent).reciprocal()
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Apply RoPE to x (B, heads, S, head_dim), rotating the two halves of each head by the table (S, head_dim)."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin).to(x.dtype)


class Products(nn.Module):
    """Linear maps as two matrix products: of the input with the weights of several maps, then with those of `last`.

    One product for several maps is faster, and the gradient of the input needs no sum. Their weights are put together,
    and under autocast cast, in every pass, unless `hold` has done it once and for all.
    """

    held: tuple[torch.Tensor, torch.Tensor] | None = None

    def __init__(self):
        super().__init__()
        self.register_load_state_dict_post_hook(_renew)

    def maps(self) -> tuple[list[nn.Linear], nn.Linear]:
        """The maps of the input, and the last one."""
        raise NotImplementedError

    def weights(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The weights of the two products, the first of which takes x."""
        maps, last = self.maps()
        if self.held is not None and self.held[1].requires_grad == last.weight.requires_grad:
            if self.held[0].dtype == x.dtype or torch.is_autocast_enabled(x.device.type):
                return self.held
        return torch.cat([one.weight for one in maps]), last.weight

    def hold(self, dtype: torch.dtype) -> None:
        """Hold both weights in `dtype`: of maps that learn as copies, which have the gradients from now on; of frozen
        ones the only weights there are, of which the maps' become views.
        """
        maps, last = self.maps()
        learns = last.weight.requires_grad
        both = torch.cat([one.weight for one in maps]), last.weight
        first, second = (weight.detach().to(dtype, copy=learns).requires_grad_(learns) for weight in both)
        self.held = first, second
        if not learns:
            for one, (_, held, rows) in zip((*maps, last), list(self.copies())):
                one.weight = nn.Parameter(held[rows], requires_grad=False)

    def copies(self) -> Iterator[tuple[nn.Parameter, torch.Tensor, slice]]:
        """Every weight, what holds its copy, and the rows of it; nothing if nothing is held."""
        maps, last = self.maps()
        if self.held is None:
            return
        start = 0
        for one in maps:
            yield one.weight, self.held[0], slice(start, start + len(one.weight))
            start += len(one.weight)
        yield last.weight, self.held[1], slice(0, len(last.weight))

    def __getstate__(self) -> dict:
        return {**self.__dict__, "held": None}  # a copy of the module has weights of its own

    def _apply(self, fn, recurse: bool = True) -> Products:
        self.held = None  # weights that are moved or cast are new ones
        return super()._apply(fn, recurse)


@torch.no_grad()
def _renew(products: Products, _) -> None:
    """Hold what was loaded."""
    for weight, held, rows in products.copies():
        held[rows].copy_(weight)


class Attention(Products):
    """Bidirectional grouped-query attention with RMSNorm on every query and key head before RoPE.

    `kernels`, a key of `dimo.ursa.attention.KERNELS`, is set by `UrsaTransformer.run_with`.
    """

    def __init__(self, config: UrsaConfig):
        super().__init__()
        q_size, kv_size = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(config.head_dim)
        self.k_norm = RMSNorm(config.head_dim)
        self.head_dim, self.heads = config.head_dim, config.num_attention_heads
        self.kv_heads = config.num_key_value_heads
        self.kernels = "auto"

    def maps(self) -> tuple[list[nn.Linear], nn.Linear]:
        return [self.q_proj, self.k_proj, self.v_proj], self.o_proj

    def forward(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, split: Split | None = None, length: int = 0
    ) -> torch.Tensor:
        into, out_of = self.weights(x)
        q, k, v = (
            F.linear(x, into).unflatten(-1, (-1, self.head_dim)).split([self.heads, self.kv_heads, self.kv_heads], 2)
        )
        if split is None and self.kernels == "auto" and cpu.attends(q):
            q = cpu.NormRotate.apply(q, self.q_norm.weight, cos, sin, NORM_EPS)
            k = cpu.NormRotate.apply(k, self.k_norm.weight, cos, sin, NORM_EPS)
            out = cpu.Attend.apply(q, k, v.transpose(1, 2))
        else:
            q, k, v = self.q_norm(q).transpose(1, 2), self.k_norm(k).transpose(1, 2), v.transpose(1, 2)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
            if split is not None:
                q, k, v = (split.to_heads(one, length) for one in (q, k, v))
            with sdpa_kernel(KERNELS[self.kernels], set_priority=True):
                out = F.scaled_dot_product_attention(q, k, v, enable_gqa=self.heads != self.kv_heads)
            out = out if split is None else split.to_tokens(out)
        return F.linear(out.transpose(1, 2).flatten(2), out_of)


class MLP(Products):
    """SwiGLU."""

    def __init__(self, config: UrsaConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def maps(self) -> tuple[list[nn.Linear], nn.Linear]:
        return [self.gate_proj, self.up_proj], self.down_proj

    def forward(self, x: torch.Tensor, again: bool = False) -> torch.Tensor:
        """`again`: for the backward pass keep gate and up alone, not their product, which is quickly made again."""
        into, out_of = self.weights(x)
        gate, up = F.linear(x, into).chunk(2, -1)
        return F.linear(recompute.once(swiglu, gate, up) if again else swiglu(gate, up), out_of)


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return F.silu(gate) * up


class Layer(nn.Module):
    """One decoder layer. `compiled` and `checkpointing` are set by `UrsaTransformer.run_with`."""

    def __init__(self, config: UrsaConfig):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size)
        self.post_attention_layernorm = RMSNorm(config.hidden_size)
        self.compiled, self.checkpointing = False, "none"

    def forward(self, x: torch.Tensor, *how) -> torch.Tensor:
        run = recompute.compiled_run() if self.compiled else recompute.run_layer
        return run(self, self.checkpointing if torch.is_grad_enabled() else "none", x, *how)

    def block(self, x: torch.Tensor, *how) -> torch.Tensor:
        return self.feed(self.attend(x, *how))

    def attend(self, x: torch.Tensor, *how) -> torch.Tensor:
        """`how`: what `Attention.forward` takes besides x."""
        return x + self.self_attn(self.input_layernorm(x), *how)

    def feed(self, x: torch.Tensor, again: bool = False) -> torch.Tensor:
        """`again`: see `MLP.forward`."""
        return x + self.mlp(self.post_attention_layernorm(x), again)


class Decoder(nn.Module):
    def __init__(self, config: UrsaConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size)


class UrsaTransformer(nn.Module):
    """Token ids and 3-D positions in, next-position logits out.

    Weights are initialised like Qwen3's: normal(0, 0.02), RMSNorm weights one.
    """

    def __init__(self, config: UrsaConfig):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.lm_head_size, bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)

    def run_with(self, compile: bool = False, checkpointing: str = "none", attention: str = "auto") -> UrsaTransformer:
        """Configure how the layers run. Returns self.

        Args:
            compile: torch.compile the layers; takes about a minute in the first pass.
            checkpointing: a key of `dimo.ursa.recompute.CHECKPOINTING`.
            attention: a key of `dimo.ursa.attention.KERNELS`; "fa4" must have been found by `choose` there.

        Raises:
            DimoError: unknown `checkpointing` or `attention`.
        """
        if checkpointing not in recompute.CHECKPOINTING:
            raise DimoError(f"checkpointing must be one of {', '.join(recompute.CHECKPOINTING)}, got {checkpointing!r}")
        if attention not in KERNELS:
            raise DimoError(f"attention must be one of {', '.join(KERNELS)}, got {attention!r}")
        for layer in self.model.layers:
            layer.compiled, layer.checkpointing, layer.self_attn.kernels = compile, checkpointing, attention
        return self

    def hold(self, dtype: torch.dtype) -> UrsaTransformer:
        """Hold the layers' matrices as the products use them, in `dtype` (see `Products.hold`). Returns self."""
        for part in self.modules():
            if isinstance(part, Products):
                part.hold(dtype)
        return self

    def hidden(self, input_ids: torch.Tensor, rope_pos: torch.Tensor) -> torch.Tensor:
        """Hidden states after the final norm.

        Args:
            input_ids: (B, S) in [0, vocab_size): text, BOV, visual codes + lm_vocab_size.
            rope_pos: (S, 3) positions (t, y, x).

        Returns:
            (B, S, hidden_size); inside `dimo.ursa.sequence.splitting` only the positions that are held here. Inside
            `dimo.ursa.lower.going_on` the first layers are not run.

        Raises:
            DimoError: wrong shapes, or an id out of range.
        """
        require_shape("input_ids", input_ids, ("B", "S"))
        require_shape("rope_pos", rope_pos, (input_ids.shape[1], 3))
        require_ids("input_ids", input_ids, self.config.vocab_size)
        cos, sin = rope_table(rope_pos, self.config.rope_theta, self.config.head_dim)
        split, how = active_split(), tuple[Any, ...]()
        if split is not None:
            how = split, input_ids.shape[1]
            input_ids, cos, sin = (split.own(one, dim) for one, dim in ((input_ids, 1), (cos, 0), (sin, 0)))
        lower = active_lower()
        if lower is not None and lower.states is not None:
            x, done = lower.states, lower.layers
            require_shape("the hidden states to go on from", x, (*input_ids.shape, self.config.hidden_size))
        else:
            x, done = self.model.embed_tokens(input_ids), 0
            # embeddings may differ in dtype from the layers (shared with a bfloat16 teacher, or float32)
            autocast = torch.is_autocast_enabled(x.device.type)
            x = x.to(torch.get_autocast_dtype(x.device.type) if autocast else self.lm_head.weight.dtype)
        for index, layer in enumerate(list(self.model.layers)[done:], done + 1):
            x = layer(x, cos, sin, *how)
            if lower is not None and index == lower.layers:
                lower.states = x
        return self.model.norm(x)

    def forward(self, input_ids: torch.Tensor, rope_pos: torch.Tensor, last: int | None = None) -> torch.Tensor:
        """Logits (B, S, lm_head_size); position i predicts token i + 1.

        `last` restricts the output to the last positions, (B, last, lm_head_size), since text logits are not needed.
        """
        x = self.hidden(input_ids, rope_pos)
        return self.lm_head(x if last is None else x[:, -last:])
