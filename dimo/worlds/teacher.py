"""Train a world's teacher, a URSA transformer that denoises the world's videos, and write its checkpoint folder."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.nn import functional as F
from tqdm import tqdm

from dimo.errors import DimoError, are_finite
from dimo.files import locked, require_place, save_torch, whole_folder
from dimo.ursa import Ursa, UrsaConfig, UrsaTransformer, load_ursa, sample, save_student
from dimo.ursa.cuda_graph import on_stream
from dimo.ursa.loading import load_transformer
from dimo.ursa.probability_path import T_PER
from dimo.ursa.sampler import videos_at_once
from dimo.worlds import WORLD_FILE, checkpoint_folder, is_world, load_world
from dimo.worlds.denoising import DenoisingSteps, TrainingState, rank
from dimo.worlds.oracle import score
from dimo.worlds.protocol import World, prompt_index, prompt_length, prompts_to_score

PAD, UNKNOWN, BOV = "<pad>", "<unk>", "<bov>"
SCORED = 2**20  # tokens of all videos with which a new teacher is scored, about
GUIDANCE = 3.0  # of the last row of a new teacher's scores
KEEP_EVERY = 500  # steps
FEW, LINEAR = 256, 0.95  # codes that start singly; the share of the variance that is linear in more of them
LIMITS = {"t_shift": (1e-3, 1e3), "t_spread": (0.0, 10.0), "muon_lr": (0.0, 1.0)}  # a larger shift leaves one t only
SEEDS_APART = 1_000_003  # of the processes that train together
COMPILED = 256  # tokens of a video from which compiling the layers saves more time than it takes


def _field(default, help: str):
    return dataclasses.field(default=default, metadata={"help": help})


@dataclasses.dataclass(frozen=True)
class TeacherRecipe:
    """Architecture, path and training of a teacher; the defaults are those of the built-in world's teacher."""

    layers: int = _field(3, "number of layers")
    hidden: int = _field(64, "hidden size")
    intermediate: int = _field(128, "hidden size of the MLPs")
    heads: int = _field(8, "number of attention heads")
    head_dim: int = _field(16, "size of an attention head, a multiple of 16")
    # for about ten positions; with URSA's 1,000,000 half of the frequencies would be constant
    rope_theta: float = _field(10.0, "theta of RoPE; below 1 its frequencies exceed one radian per token")
    alpha: float = _field(0.9, "alpha of the metric path, beta_t = c (t / (1-t))^alpha")
    c: float = _field(2.0, "c of the metric path")
    steps: int = _field(25_000, "training steps")
    batch_size: int = _field(256, "videos per step, shared by all processes")
    t_per: str = _field("sample", "one t per sample, per latent frame as URSA's (frame), or by a coin either (mixed)")
    t_shift: float = _field(1.0, "shift of t in training, t / (t + shift (1 - t)): above 1 towards the noise")
    t_spread: float = _field(0.0, "standard deviation of logit t, which is normal, around the shift's; 0: uniform t")
    lr: float = _field(2e-3, "peak learning rate, with cosine decay to zero")
    muon_lr: float = _field(0.0, "Muon's peak rate for the layers' matrices, lr being that of all others; 0: no Muon")
    start_from: str = _field("", "a teacher, folder or built-in world, whose weights training starts from")
    seed: int = _field(0, "seed of initialisation and data")
    device: str = _field("cpu", "cpu or cuda")


RECIPES = {  # of worlds for which the defaults are not meant
    # the phase of a texture is a matter of parity: at this theta RoPE turns by about half a circle per row and column
    "tiles": TeacherRecipe(
        layers=6, hidden=128, intermediate=256, heads=4, head_dim=32, rope_theta=0.19, c=3.0, steps=15_000
    ),
    # 2.9 million parameters: at bf16, teacher and student are 11.5 MB together; RoPE turns by up to a full circle per
    # row and column; where a card is and which is decided at t from .2 to .7, the texture before; what the words for
    # motion mean is learnt where one frame is clean and another is not
    "sprites": TeacherRecipe(
        layers=6,
        hidden=160,
        intermediate=320,
        heads=5,
        head_dim=32,
        rope_theta=0.1408,
        c=2.0,
        batch_size=78,
        steps=49_000,
        t_per="mixed",
        t_shift=1.4,
        t_spread=0.8,
        lr=3e-3,
        muon_lr=8e-3,
    ),
}


def words(world: World) -> list[str]:
    """The text vocabulary: special tokens, then all words of all prompts."""
    return [PAD, UNKNOWN, BOV] + sorted({word for prompt in world.prompts for word in prompt.split()})


def ursa_config(world: World, recipe: TeacherRecipe) -> UrsaConfig:
    text = len(words(world))
    return UrsaConfig.from_dict(
        {
            "hidden_size": recipe.hidden,
            "intermediate_size": recipe.intermediate,
            "num_attention_heads": recipe.heads,
            "num_key_value_heads": recipe.heads,
            "num_hidden_layers": recipe.layers,
            "rope_theta": recipe.rope_theta,
            "vocab_size": text + world.codebook_size,
            "lm_vocab_size": text,
            "lm_head_size": world.codebook_size,
            "bov_token_id": words(world).index(BOV),
            "head_dim": recipe.head_dim,
        }
    )


@torch.no_grad()
def initialise(model: UrsaTransformer, codebook: torch.Tensor) -> None:
    """Initialise in place: embeddings with std 1, matrices with std 1/sqrt(fan_in), residual branches scaled by depth.

    Qwen3's std of 0.02 suits hidden sizes of thousands; with 64 the activations start near zero and training stalls
    (docs/experiments.md). Of more than FEW codes, embeddings and head are nearly a random linear map of the codebook on
    the unit sphere: log p_t(x_t | x_1) is linear in the vector of x_t, and so many codes are slow to learn singly.
    """
    points = F.normalize(codebook.float(), dim=-1)
    points = (points - points.mean(0)) / points.std()
    for name, weight in model.named_parameters():
        if weight.dim() != 2:
            continue
        std = 1.0 if "embed_tokens" in name else weight.shape[1] ** -0.5
        if "o_proj" in name or "down_proj" in name:
            std /= (2 * model.config.num_hidden_layers) ** 0.5
        torch.nn.init.normal_(weight, std=std)
        # the last rows of the embeddings are the codes, and all of the head's
        if len(codebook) > FEW and ("embed_tokens" in name or "lm_head" in name):
            linear = points @ torch.randn(points.shape[1], weight.shape[1]) * (std / points.shape[1] ** 0.5)
            rows = weight[-len(codebook) :]
            rows.mul_((1 - LINEAR) ** 0.5).add_(linear, alpha=LINEAR**0.5)


def train_teacher(
    world: World, recipe: TeacherRecipe, progress: bool = True, kept: Path | None = None
) -> UrsaTransformer:
    """Train a teacher by denoising; returns the EMA of its weights.

    Cross-entropy of the clean tokens at t in [0, 0.999), uniform unless shifted or spread (logit-normal, as in
    arXiv 2403.03206), one per sample, per latent frame or by a coin either, with 10% empty prompts for classifier-free
    guidance. On a GPU in bfloat16, the step a CUDA graph. Processes of one process group train together.

    Args:
        kept: a file that holds the state of training, written every KEEP_EVERY steps; training goes on from it.

    Raises:
        DimoError: `kept` is of another world or recipe, `start_from` of other sizes.
    """
    gpu = recipe.device == "cuda"
    torch.manual_seed(recipe.seed)
    generator = torch.Generator(recipe.device).manual_seed((recipe.seed + SEEDS_APART * rank()) % 2**63)
    model = UrsaTransformer(ursa_config(world, recipe))
    if recipe.start_from:
        model.load_state_dict(_started(world, recipe).state_dict())
    else:
        initialise(model, world.codebook())
    model = model.to(recipe.device).run_with(compile=gpu and math.prod(world.latents_shape) >= COMPILED)
    prompt_ids, pad = encode(world, world.prompts), words(world).index(PAD)
    training = DenoisingSteps(world, recipe, model, prompt_ids, pad, generator, graph=gpu)
    with on_stream(training.stream):
        state = TrainingState(kept, training)
        steps = range(state.load(), recipe.steps)
        bar = tqdm(
            steps,
            desc="teacher",
            unit="step",
            disable=not progress or rank() > 0,
            mininterval=1,
            initial=steps.start,
            total=recipe.steps,
        )
        for step in bar:
            training.step(step)
            if step % 100 == 0:
                bar.set_postfix(loss=f"{training.loss.item():.4f}", refresh=False)
            if (step + 1) % KEEP_EVERY == 0:
                state.save(step + 1)
    return training.ema.run_with(compile=False)


def _started(world: World, recipe: TeacherRecipe) -> UrsaTransformer:
    """The transformer that training starts from."""
    folder, config = checkpoint_folder(recipe.start_from), ursa_config(world, recipe)
    if not is_world(folder) or words(load_world(folder)) != words(world):
        raise DimoError(f"start_from {recipe.start_from} is no teacher of the {world.name} world with the same prompts")
    started = load_transformer(folder / "transformer")
    differ = [name for name, value in vars(config).items() if vars(started.config)[name] != value]
    if differ:
        raise DimoError(f"start_from {recipe.start_from} has another {', '.join(differ)} than the teacher to train")
    return started


def make_teacher(world: World, recipe: TeacherRecipe, folder: Path, videos_per_prompt: int = 64) -> str:
    """Train a teacher, write its checkpoint folder and score it.

    Training that was interrupted goes on from the file FOLDER.training.pt beside it. Of processes that train together,
    the first writes and scores.

    Returns:
        Validity and adherence by number of sampling steps, and guided, as a table; of other processes, "".

    Raises:
        DimoError: before training: a value out of range, a missing device, or a folder with other contents; after it:
            training diverged, and nothing was written.
    """
    _require_sense(world, recipe)
    folder = Path(folder).resolve()
    if folder.exists() and not is_world(folder) and (not folder.is_dir() or any(folder.iterdir())):
        raise DimoError(f"{folder} exists and is not a world's checkpoint folder: give another one, or remove it")
    require_place(folder)
    with _alone(folder):
        return _make_alone(world, recipe, folder, videos_per_prompt)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """In this context no other command makes a teacher in this folder; processes that train together are one."""
    if rank() > 0:
        yield
        return
    beside = folder.with_name(f".{folder.name}.lock")
    beside.parent.mkdir(parents=True, exist_ok=True)
    beside.touch()
    with locked(beside, f"another process is making {folder}; wait for it, or give another --out"):
        try:
            yield
        finally:
            beside.unlink(missing_ok=True)


def _make_alone(world: World, recipe: TeacherRecipe, folder: Path, videos_per_prompt: int) -> str:
    kept = folder.with_name(f"{folder.name}.training.pt")
    transformer = train_teacher(world, recipe, kept=kept)
    if rank() > 0:
        return ""
    if not all(are_finite(p) for p in transformer.parameters()):
        kept.unlink(missing_ok=True)  # there is nothing to go on from
        raise DimoError(f"the teacher's weights are not finite after {recipe.steps} steps; try a lower lr")
    write_checkpoint(folder, world, transformer, recipe.alpha, recipe.c)
    print(f"{folder} is written; now it is scored", file=sys.stderr, flush=True)
    scores = _scores(world, load_ursa(folder, recipe.device), recipe, videos_per_prompt)
    kept.unlink(missing_ok=True)  # only now: who is stopped while it is scored does not train it again
    return scores


def _scores(world: World, ursa: Ursa, recipe: TeacherRecipe, videos_per_prompt: int) -> str:
    """The table of `make_teacher`."""
    asked, tokens = prompts_to_score(world), math.prod(world.latents_shape)
    videos_per_prompt = max(1, min(videos_per_prompt, SCORED // (len(asked) * tokens)))
    prompts = [p for p in asked for _ in range(videos_per_prompt)]
    batches = ursa.tokenize(prompts, prompt_length(world)).split(videos_at_once(tokens, ursa.path.device))
    pad, lines = words(world).index(PAD), [f"{'passes':>6} {'guidance':>9} {'validity':>9} {'adherence':>10}"]
    samplers = ((1, 1.0), (4, 1.0), (8, 1.0), (25, 1.0), (25, GUIDANCE))
    passes = len(prompts) * sum(steps * (1 + (guidance > 1)) for steps, guidance in samplers)
    with tqdm(desc="score", total=passes, unit="pass", mininterval=1) as bar:
        for steps, guidance in samplers:
            made, generator = [], torch.Generator(recipe.device).manual_seed(recipe.seed)
            for ids in batches:
                guide = {"guidance_scale": guidance, "uncond_ids": torch.full_like(ids, pad)}
                shape = world.latents_shape
                made.append(sample(ursa.transformer, ursa.path, ids, shape, steps, generator=generator, **guide))
                bar.update(len(ids) * steps * (1 + (guidance > 1)))
            scores = score(world, torch.cat(made), prompts)
            shares = scores.valid.float().mean(), scores.adherent.float().mean()
            lines.append(f"{steps:6} {guidance:9g} {shares[0]:9.4f} {shares[1]:10.4f}")
    return "\n".join(lines)


def _require_sense(world: World, recipe: TeacherRecipe) -> None:
    for name, value in dataclasses.asdict(recipe).items():
        if name == "seed" and not 0 <= value < 2**63:
            raise DimoError(f"seed must lie in [0, 2^63), got {value}")
        if isinstance(value, int) and name != "seed" and value < 1:
            raise DimoError(f"{name} must be at least 1, got {value}")
        least, most = LIMITS.get(name, (None, None))
        if least is not None and not least <= value <= most:
            raise DimoError(f"{name} must lie in [{least:g}, {most:g}], got {value}")
        if least is None and isinstance(value, float) and not 0 < value < math.inf:
            raise DimoError(f"{name} must be positive and finite, got {value}")
    if recipe.t_per not in T_PER:
        raise DimoError(f"t_per must be one of {', '.join(T_PER)}, got {recipe.t_per!r}")
    if recipe.device not in ("cpu", "cuda"):
        raise DimoError(f"device must be cpu or cuda, got {recipe.device!r}")
    if recipe.device == "cuda" and not torch.cuda.is_available():
        raise DimoError("device is cuda, but PyTorch sees no GPU")
    ursa_config(world, recipe)


def encode(world: World, prompts: list[str]) -> torch.Tensor:
    """Ids (B, L) of the world's prompts, as the checkpoint's tokenizer gives them; padded on the left.

    L is `prompt_length`.
    """
    prompt_index(world, prompts)
    index, length = {word: i for i, word in enumerate(words(world))}, prompt_length(world)
    rows = [[index[word] for word in prompt.split()] for prompt in prompts]
    return torch.tensor([[index[PAD]] * (length - len(row)) + row for row in rows])


def write_checkpoint(folder: Path, world: World, transformer: UrsaTransformer, alpha: float, c: float) -> Path:
    """Write a checkpoint folder in URSA's layout atomically, with the world's name and sizes in world.json."""
    with whole_folder(folder) as beside:
        save_student(beside / "transformer", transformer)
        (beside / "scheduler").mkdir()
        scheduler = {"_class_name": "KineticOptimalScheduler", "alpha": alpha, "c": c, "eps": 1e-5, "shift": 1.0}
        (beside / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler, indent=2) + "\n")
        save_torch({"path.emb": world.codebook()}, beside / "scheduler" / "scheduler_model.pth")
        _write_tokenizer(beside / "tokenizer", world)
        index = {
            "_class_name": "URSAPipeline",
            "transformer": ["diffnext.models.transformers.transformer_ursa", "URSATransformer3DModel"],
            "scheduler": ["diffnext.schedulers.scheduling_dfm", "KineticOptimalScheduler"],
            "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        }
        decoder = world.decoder()
        if decoder is not None:
            decoder.save(beside / "vae")
            index["vae"] = [type(decoder).__module__, type(decoder).__name__]
        (beside / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
        sizes = {"world": world.name, **dataclasses.asdict(world)}
        (beside / WORLD_FILE).write_text(json.dumps(sizes, indent=2) + "\n")
    return Path(folder)


def _write_tokenizer(folder: Path, world: World) -> None:
    """Write a tokenizer with one token per word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(words(world))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, unk_token=UNKNOWN, eos_token=PAD, padding_side="left"
    ).save_pretrained(folder)
    written = folder / "tokenizer_config.json"
    values = json.loads(written.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    written.write_text(json.dumps(values, indent=2) + "\n")  # transformers 4 does not know the class that 5 writes
