"""Upstream's pipeline for `dimo bench --against upstream`, with a checkpoint folder or random weights."""

from __future__ import annotations

import types

import torch
from accelerate import init_empty_weights
from diffnext.models.transformers.transformer_ursa import URSATransformer3DModel
from diffnext.pipelines import URSAPipeline
from diffnext.schedulers.scheduling_dfm import KineticOptimalScheduler, MetricDiscreteProbPath

from dimo.config import Config
from dimo.errors import DimoError
from dimo.ursa import MetricPath, Ursa
from dimo.ursa.upstream import bridge, load_pipeline, require_pipeline
from dimo.worlds import checkpoint_folder


def require_upstream(config: Config, size: str | None) -> None:
    """Raise DimoError unless upstream's pipeline can run the configuration's checkpoint; random weights always can.

    Args:
        size: size of random weights; None for the configuration's checkpoint folder.
    """
    if size is None:
        try:
            require_pipeline(checkpoint_folder(config.distill.teacher_ckpt))
        except DimoError as error:
            how = "use a URSA checkpoint, or random weights with --size"
            raise DimoError(f"--against upstream: {error}; {how}") from error


def pipeline_call(config: Config, ursa: Ursa | None, device: torch.device, steps: int = 25):
    """Returns a function that generates the codes of one batch of videos with upstream's pipeline, with guidance.

    Args:
        ursa: random weights to load into upstream's classes; None for the configuration's checkpoint folder.
        steps: number of sampling steps.
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
    if ursa is not None:  # its stand-in for a tokenizer cannot be called by upstream
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
    """Upstream's pipeline with the weights and codebook of `ursa`, and a stub VAE that only has strides."""
    bridge()
    with init_empty_weights(include_buffers=False):
        transformer = URSATransformer3DModel(**ursa.transformer.config.to_dict())
    transformer.load_state_dict(ursa.transformer.state_dict(), assign=True)
    path = ursa.path
    assert isinstance(path, MetricPath)  # as `random_ursa` makes it
    scheduler = KineticOptimalScheduler(alpha=path.alpha, c=path.c, shift=ursa.shift)
    scheduler.path = MetricDiscreteProbPath(path.codebook.to(dtype), path.alpha, path.c)
    scheduler.codebook_size = path.codebook_size
    vae = types.SimpleNamespace(config={"temporal_stride": ursa.strides[0], "spatial_stride": ursa.strides[1]})
    pipeline = URSAPipeline(transformer.to(device, dtype), scheduler, vae, types.SimpleNamespace())
    return pipeline.to(device)
