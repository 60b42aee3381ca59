"""Upstream's own pipeline for `dimo bench --against upstream`: of a checkpoint folder, or of random weights."""

from __future__ import annotations

import types

import torch
from accelerate import init_empty_weights
from diffnext.models.transformers.transformer_ursa import URSATransformer3DModel
from diffnext.pipelines import URSAPipeline
from diffnext.schedulers.scheduling_dfm import KineticOptimalScheduler, MetricDiscreteProbPath

from dimo.config import Config
from dimo.errors import DimoError
from dimo.ursa import Ursa
from dimo.ursa.upstream import bridge, load_pipeline, require_pipeline
from dimo.worlds import checkpoint_folder


def require_upstream(config: Config, size: str | None) -> None:
    """Raise unless `pipeline_call` can run: on a CPU too, but not with a built-in world.

    Args:
        size: of random weights, all of which it takes; None: the configuration's checkpoint folder.
    """
    if size is None:
        try:
            require_pipeline(checkpoint_folder(config.distill.teacher_ckpt))
        except DimoError as error:
            how = "take a folder of URSA's own, or random weights by --size"
            raise DimoError(f"--against upstream: {error}; {how}") from error


def pipeline_call(config: Config, ursa: Ursa | None, device: torch.device, steps: int = 25):
    """A function that makes one batch of videos with upstream's pipeline, up to its codes, with guidance.

    Args:
        ursa: random weights to put into upstream's classes; None: those of the configuration's checkpoint folder.
    """
    d = config.distill
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if ursa is None:
        pipeline = load_pipeline(checkpoint_folder(d.teacher_ckpt), device, dtype)
    else:
        pipeline = random_pipeline(ursa, device, dtype)
    pipeline.set_progress_bar_config(disable=True)
    prompts = ["a red ball rolls over green grass"] * d.batch_size_per_gpu
    ids = {}
    if ursa is not None:  # it has no tokenizer that pads
        ids["prompt_ids"] = ursa.tokenize(prompts, d.max_prompt_length, device)
        ids["negative_prompt_ids"] = ursa.tokenize([""] * len(prompts), d.max_prompt_length, device)

    def call():
        return pipeline(
            prompt=prompts, num_frames=d.num_frames, height=d.height, width=d.width, num_inference_steps=steps,
            guidance_scale=max(d.guidance_scale, 1.0), output_type="latent", max_prompt_length=d.max_prompt_length,
            generator=torch.Generator(device).manual_seed(0), **ids,
        ).frames  # fmt: skip

    return call


def random_pipeline(ursa: Ursa, device: torch.device, dtype: torch.dtype) -> URSAPipeline:
    """Upstream's classes around the weights and the codebook of `ursa`, with a VAE that only tells its strides."""
    bridge()
    with init_empty_weights(include_buffers=False):
        transformer = URSATransformer3DModel(**ursa.transformer.config.to_dict())
    transformer.load_state_dict(ursa.transformer.state_dict(), assign=True)
    scheduler = KineticOptimalScheduler(alpha=ursa.path.alpha, c=ursa.path.c, shift=ursa.shift)
    scheduler.path = MetricDiscreteProbPath(ursa.path.codebook.to(dtype), ursa.path.alpha, ursa.path.c)
    scheduler.codebook_size = ursa.path.codebook_size
    vae = types.SimpleNamespace(config={"temporal_stride": ursa.strides[0], "spatial_stride": ursa.strides[1]})
    pipeline = URSAPipeline(transformer.to(device, dtype), scheduler, vae, types.SimpleNamespace())
    return pipeline.to(device)
