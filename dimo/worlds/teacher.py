"""Make a world's teacher: a URSA transformer trained by denoising on the world's own videos, as a checkpoint folder."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import shutil
from pathlib import Path

import torch
from torch.nn import functional as F
from tqdm import tqdm

from dimo.ursa import MetricPath, UrsaConfig, UrsaTransformer, save_student, visual_logits
from dimo.worlds.palette import PaletteDecoder
from dimo.worlds.shapes import ShapesWorld

PAD, UNKNOWN, BOV = "<pad>", "<unk>", "<bov>"
PROMPT_LENGTH = 4  # words of a prompt
ALPHA, C = 0.9, 2.0  # of the metric path
EMPTY_PROMPT_SHARE = 0.1
SHIPPED = Path(__file__).parent / "data" / "shapes"


def words(world: ShapesWorld) -> list[str]:
    """The vocabulary: special tokens, then every word of every prompt."""
    return [PAD, UNKNOWN, BOV] + sorted({word for prompt in world.prompts for word in prompt.split()})


def ursa_config(world: ShapesWorld, layers: int, hidden: int, intermediate: int, heads: int) -> UrsaConfig:
    text = len(words(world))
    return UrsaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_attention_heads=heads,
        num_key_value_heads=1,
        num_hidden_layers=layers,
        rope_theta=100,
        vocab_size=text + world.codebook_size,
        lm_vocab_size=text,
        lm_head_size=world.codebook_size,
        bov_token_id=words(world).index(BOV),
    )


def train_teacher(
    world: ShapesWorld,
    *,
    layers: int = 3,
    hidden: int = 64,
    intermediate: int = 96,
    heads: int = 1,
    steps: int = 20_000,
    batch_size: int = 256,
    lr: float = 2e-3,
    seed: int = 0,
    device: str = "cpu",
    alpha: float = ALPHA,
    c: float = C,
    progress: bool = True,
) -> UrsaTransformer:
    """Denoising cross-entropy at t uniform in [0, 0.999), 10% empty prompts, cosine decay; returns the EMA weights."""
    torch.manual_seed(seed)
    generator = torch.Generator(device).manual_seed(seed)
    path = MetricPath(world.codebook().to(device), alpha, c)
    model = UrsaTransformer(ursa_config(world, layers, hidden, intermediate, heads)).to(device)
    ema = copy.deepcopy(model).requires_grad_(False)
    prompt_ids = encode(world, world.prompts).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.0)
    warmup = min(200, steps // 10 + 1)
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, 1.0, warmup),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps - warmup + 1),
        ],
        milestones=[warmup],
    )
    bar = tqdm(range(steps), desc="teacher", unit="step", disable=not progress, mininterval=1)
    for step in bar:
        prompt, x_1 = world.draw(batch_size, generator)
        t = torch.rand(batch_size, generator=generator, device=device) * 0.999
        drop = torch.rand(batch_size, generator=generator, device=device) < EMPTY_PROMPT_SHARE
        txt_ids = prompt_ids[prompt].masked_fill(drop[:, None], words(world).index(PAD))
        logits = visual_logits(model, txt_ids, path.sample(x_1, t, generator), world.latents_shape)
        loss = F.cross_entropy(logits.flatten(0, 1), x_1.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), max(1e-3, 1 / (step + 1)))
        if step % 100 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
    return ema


def encode(world: ShapesWorld, prompts: list[str]) -> torch.Tensor:
    """The ids (B, 4) that the shipped tokenizer gives the world's own prompts, without building it."""
    world.attributes(prompts)
    index = {word: i for i, word in enumerate(words(world))}
    return torch.tensor([[index[word] for word in prompt.split()] for prompt in prompts])


def write_checkpoint(
    folder: Path, world: ShapesWorld, transformer: UrsaTransformer, alpha: float = ALPHA, c: float = C
) -> Path:
    """Write a whole checkpoint folder in URSA's layout, and `world.json` with the world's sizes; whole or absent."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = Path(folder)
    beside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    save_student(beside / "transformer", transformer)
    (beside / "scheduler").mkdir()
    scheduler = {"_class_name": "KineticOptimalScheduler", "alpha": alpha, "c": c, "eps": 1e-5, "shift": 1.0}
    (beside / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler, indent=2) + "\n")
    torch.save({"path.emb": world.codebook()}, beside / "scheduler" / "scheduler_model.pth")
    vocabulary = {word: i for i, word in enumerate(words(world))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, unk_token=UNKNOWN, eos_token=PAD, padding_side="left"
    ).save_pretrained(beside / "tokenizer")
    PaletteDecoder(world.palette()).save(beside / "vae")
    index = {
        "_class_name": "URSAPipeline",
        "transformer": ["diffnext.models.transformers.transformer_ursa", "URSATransformer3DModel"],
        "scheduler": ["diffnext.schedulers.scheduling_dfm", "KineticOptimalScheduler"],
        "vae": ["dimo.worlds.palette", "PaletteDecoder"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
    }
    (beside / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    sizes = {"world": "shapes", **dataclasses.asdict(world)}
    (beside / "world.json").write_text(json.dumps(sizes, indent=2) + "\n")
    if folder.exists():
        shutil.rmtree(folder)
    os.rename(beside, folder)
    return folder
