"""Bridge to diffnext, URSA's own code: its transformer, VAE and pipeline. The only module that imports diffnext.

Tested with diffnext 0.3.0a0 (baaivision/URSA at 29284bb), transformers 4.57.6, diffusers 0.39.0.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import logging
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
import transformers
from accelerate import init_empty_weights
from diffnext.models.embeddings import FlexRotaryEmbedding
from diffnext.models.text_encoders import qwen3
from diffnext.models.transformers.transformer_ursa import URSATransformer3DModel
from torch.nn import functional as F

from dimo.errors import DimoError, nearest, reason, require_ids, require_shape
from dimo.ursa.frames import frames_of
from dimo.ursa.inputs import build_ursa_inputs
from dimo.ursa.layout import UPSTREAM_VAES, require_upstream_heads, require_upstream_layout, student_file
from dimo.ursa.sampler import warn_if_guided_again
from dimo.ursa.transformer import UrsaConfig
from dimo.ursa.weights import load_weights, read_weights

log = logging.getLogger(__name__)
RECOMPILE_LIMIT = 64  # for diffnext's compiled RoPE: batch, heads, dtype and grad mode vary; the default is 8

_cuda_swiglu = qwen3.swiglu
_compiled_rotate = FlexRotaryEmbedding.PEFunc.partitioned_impl
_eager_rotate = inspect.unwrap(_compiled_rotate)


def _swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return _cuda_swiglu(gate, up) if gate.is_cuda else F.silu(gate) * up


def _rotate(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return (_compiled_rotate if x.is_cuda else _eager_rotate)(self, x, w)


def bridge() -> None:
    """Patch diffnext so that its transformer also runs on a CPU; CUDA tensors still use its own kernels.

    Its SwiGLU is a CUDA kernel, and its RoPE is compiled, which on a CPU needs a C++ compiler and seconds per shape.
    """
    if qwen3.swiglu is not _swiglu:
        qwen3.swiglu, FlexRotaryEmbedding.PEFunc.partitioned_impl = _swiglu, _rotate
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
        log.warning(
            "diffnext's SwiGLU kernel needs CUDA: on a CPU, silu(gate) * up replaces it, and RoPE runs uncompiled"
        )


class UpstreamTransformer(URSATransformer3DModel):
    """diffnext's transformer with the interface of `UrsaTransformer`: same state-dict keys, `config` a UrsaConfig."""

    config: Any = None  # a UrsaConfig; replaces diffusers' property, which cannot be set

    def hidden(self, input_ids: torch.Tensor, rope_pos: torch.Tensor) -> torch.Tensor:
        """Hidden states (B, S, hidden_size) after the final norm, for ids (B, S) at positions (S, 3)."""
        self._require(input_ids, rope_pos)
        return self.model(input_ids, rope_pos=rope_pos)[0]

    def forward(self, input_ids: torch.Tensor, rope_pos: torch.Tensor, last: int | None = None) -> torch.Tensor:
        """Logits (B, S, lm_head_size), or only those of the `last` positions."""
        self._require(input_ids, rope_pos)
        return super().forward(input_ids, rope_pos=rope_pos, logits_to_keep=last).sample

    def _require(self, input_ids: torch.Tensor, rope_pos: torch.Tensor) -> None:
        require_shape("input_ids", input_ids, ("B", "S"))
        require_shape("rope_pos", rope_pos, (input_ids.shape[1], 3))
        require_ids("input_ids", input_ids, self.config.vocab_size)


def empty_transformer(config: UrsaConfig) -> UpstreamTransformer:
    """diffnext's transformer with its weights on the meta device, for `load_weights(..., assign=True)`.

    Raises:
        DimoError: a head size that upstream does not support, or transformers 5, which it is incompatible with.
    """
    require_upstream_heads("backend upstream", config, "; use backend native")
    _require_transformers_4()
    bridge()
    with init_empty_weights(include_buffers=False):  # its RoPE tables are buffers that no checkpoint contains
        transformer = UpstreamTransformer(**config.to_dict())
    transformer.config = config
    return transformer


def _require_transformers_4() -> None:
    if int(transformers.__version__.split(".")[0]) > 4:
        raise DimoError(
            f"diffnext's transformer needs transformers >=4.57.1,<5, got {transformers.__version__}; use backend native"
        )


class UpstreamVae:
    """Codes (B, T, H, W) -> frames (B, F, height, width, 3), RGB in [0, 1], by diffnext's autoencoder."""

    def __init__(self, module: torch.nn.Module, codebook_size: int):
        self.module, self.codebook_size = module.eval().requires_grad_(False), codebook_size

    @torch.no_grad()
    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Decode one video at a time, as the pipeline does."""
        require_shape("codes", codes, ("B", "T", "H", "W"))
        require_ids("codes", codes, self.codebook_size)
        codes = codes.to(next(self.module.parameters()).device)
        frames = torch.cat([self.module.decode(one).sample for one in codes.split(1)]).float()
        frames = frames.unsqueeze(2) if frames.dim() == 4 else frames  # an image autoencoder has no time axis
        due = self.module.config.temporal_stride * (codes.shape[1] - 1) + 1
        if frames.shape[2] != due:  # its temporal tiling assumes videos encoded in the same tiles
            log.warning("this VAE decodes %s instead of %s frames, as it does in URSA's pipeline", frames.shape[2], due)
        return frames_of(frames.movedim(1, -1))


def load_vae(folder: Path, config: dict, device) -> UpstreamVae:
    """Load the autoencoder in `folder` in float32.

    Raises:
        DimoError: its class is not one of diffnext's discrete autoencoders, or the weights do not fit.
    """
    name = config.get("_class_name", "")
    if name not in UPSTREAM_VAES:
        raise DimoError(f"the VAE in {folder} is of class {name!r}{nearest(name, UPSTREAM_VAES)}")
    vae_class = getattr(importlib.import_module(f"diffnext.models.autoencoders.{UPSTREAM_VAES[name]}"), name)
    module = vae_class.from_config(config)
    load_weights(module, read_weights(folder), where=str(folder))
    return UpstreamVae(module.to(device), config.get("num_vq_embeddings", module.config.num_vq_embeddings))


def require_pipeline(folder: str | Path) -> None:
    """Raise DimoError unless diffnext's pipeline can run this checkpoint folder, see `require_upstream_layout`."""
    _require_transformers_4()
    require_upstream_layout(Path(folder))


def load_pipeline(folder: str | Path, device="cpu", dtype: torch.dtype = torch.float32, student: str | Path = ""):
    """Load diffnext's `URSAPipeline` from a checkpoint folder.

    Args:
        student: weights of a student, as for `load_student`; empty means the teacher. A student's pipeline warns if it
            is called with guidance, which diffnext's default of 7 does.

    Raises:
        DimoError: `require_pipeline` fails, or the weights do not fit.
    """
    require_pipeline(folder)
    bridge()
    kind = _student_pipeline() if student else _pipeline_class()
    try:
        pipeline = kind.from_pretrained(str(folder), torch_dtype=dtype)
    except Exception as error:  # diffusers and transformers raise many types for a damaged file
        raise DimoError(f"diffnext's pipeline could not be loaded from {folder}: {reason(error)}") from error
    if student:
        source = student_file(student)
        load_weights(pipeline.transformer, read_weights(source), where=str(source))
    return pipeline.to(torch.device(device))


def _pipeline_class() -> type[Any]:
    try:
        from diffnext.pipelines import URSAPipeline
    except Exception as error:  # incompatible versions fail in many ways
        raise DimoError(f"diffnext's pipeline cannot be imported: {reason(error)}") from error
    return URSAPipeline


def _student_pipeline() -> type[Any]:
    pipeline_class: Any = _pipeline_class()
    signature = inspect.signature(pipeline_class.__call__)

    class StudentPipeline(pipeline_class):
        """URSAPipeline that warns about guiding a student."""

        def __call__(self, *args, **kwargs):
            given = signature.bind(self, *args, **kwargs)
            given.apply_defaults()
            warn_if_guided_again(given.arguments["guidance_scale"], given.arguments["guidance_trunc"])
            return super().__call__(*args, **kwargs)

    return StudentPipeline


@dataclasses.dataclass
class Call:
    """One recorded call of the pipeline's transformer: input_ids (B, S), rope_pos (S, 3), logits (B, S, V)."""

    input_ids: torch.Tensor
    rope_pos: torch.Tensor
    logits: torch.Tensor


@torch.no_grad()
def record_calls(pipeline, seed: int = 0, **arguments) -> tuple[list[Call], torch.Tensor]:
    """Run diffnext's pipeline and record the calls of its transformer.

    Args:
        arguments: passed to the pipeline: prompt, num_frames, height, width, num_inference_steps, guidance_scale, ...

    Returns:
        (calls, the pipeline's codes (B, T, H, W)).
    """
    calls = []

    def keep(module, args, kwargs, output):
        kept = args[0], kwargs["rope_pos"], output[0]  # cloned: the pipeline changes ids and logits in place
        calls.append(Call(*(tensor.detach().clone() for tensor in kept)))

    hook = pipeline.transformer.register_forward_hook(keep, with_kwargs=True)
    try:
        generator = torch.Generator(pipeline.device).manual_seed(seed)
        latents = pipeline(output_type="latent", generator=generator, **arguments).frames
    finally:
        hook.remove()
    return calls, latents


@torch.no_grad()
def compare_calls(transformer, calls: list[Call], latents_shape: tuple[int, int, int]) -> list[dict]:
    """Repeat recorded calls with `build_ursa_inputs` and our transformer.

    Returns:
        One dict per call: `ids` and `positions` (whether they are equal) and `logits` (their `relative_error`).
    """
    n, rows = torch.Size(latents_shape).numel(), []
    for call in calls:
        codes = call.input_ids[:, -n:] - transformer.config.lm_vocab_size
        inputs = build_ursa_inputs(transformer, call.input_ids[:, : -(n + 1)], codes, latents_shape)
        logits = transformer(inputs.input_ids, inputs.rope_pos)
        same_ids = torch.equal(inputs.input_ids, call.input_ids)
        same_pos = torch.equal(inputs.rope_pos, call.rope_pos.to(inputs.rope_pos))
        rows.append({"ids": same_ids, "positions": same_pos, "logits": relative_error(logits, call.logits)})
    return rows


@torch.no_grad()
def compare_layers(native, upstream, input_ids: torch.Tensor, rope_pos: torch.Tensor) -> dict[str, float]:
    """`relative_error` between two transformers on the same input, layer by layer.

    Returns:
        {embed_tokens, layers.0, ..., norm, logits: error}, in this order.
    """
    outputs = [_layer_outputs(model, input_ids, rope_pos) for model in (native, upstream)]
    return {name: relative_error(outputs[0][name], outputs[1][name]) for name in outputs[1]}


def _layer_outputs(transformer, input_ids: torch.Tensor, rope_pos: torch.Tensor) -> dict[str, torch.Tensor]:
    decoder = transformer.model
    outputs: dict[str, torch.Tensor] = {}
    parts = {"embed_tokens": decoder.embed_tokens, "norm": decoder.norm}
    parts |= {f"layers.{i}": layer for i, layer in enumerate(decoder.layers)}
    hooks = [
        module.register_forward_hook(lambda _, __, out, name=name: outputs.__setitem__(name, out.clone()))
        for name, module in parts.items()
    ]
    try:
        outputs["logits"] = transformer(input_ids, rope_pos)
    finally:
        for hook in hooks:
            hook.remove()
    return outputs


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """max |got - want| / max |want|, in float32."""
    require_shape("got", got, tuple(want.shape))
    return ((got.float() - want.float()).abs().max() / want.float().abs().max()).item()
