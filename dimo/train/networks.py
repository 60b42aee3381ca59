"""The networks of a run: all start from the teacher."""

from __future__ import annotations

import torch

from dimo.config import Config
from dimo.distill.step import Networks
from dimo.errors import DimoError
from dimo.train.engine import Engine
from dimo.ursa import Ursa, UrsaTransformer
from dimo.ursa.attention import Choice, choose
from dimo.worlds.exact import exact_teacher


def make_networks(config: Config, ursa: Ursa, engine: Engine) -> tuple[Networks, Choice]:
    """Teacher, student, auxiliary and the student's moving average, as the configuration wants them.

    Args:
        ursa: the teacher's checkpoint, whose transformer becomes the frozen teacher.

    Returns:
        (the networks, the attention kernel that they run with).

    Raises:
        DimoError: an exact teacher that the checkpoint has not, or an attention kernel that cannot be used.
    """
    teacher = ursa.transformer.requires_grad_(False).eval()
    learning = ((teacher.model.embed_tokens, config.model.train_embeddings), (teacher.lm_head, config.model.train_head))
    shared = [part for part, learns in learning if not learns]
    engine.require_heads(teacher.config.num_key_value_heads)
    lower = _lower(teacher, config.model.aux_shared_layers)
    student, ema = (engine.copy_of(teacher, learns, shared) for learns in (True, False))
    aux = engine.copy_of(teacher, True, list(dict.fromkeys([*shared, *lower])))
    if config.training.mixed_precision == "bf16":
        teacher.bfloat16()  # frozen, so it needs no float32 master weights
    asked = exact_teacher(ursa.folder, ursa.path) if config.distill.teacher == "exact" else teacher
    networks = Networks(asked, student, aux, ema)
    for network in (student, aux, ema) if not config.model.train_head else ():
        network.model.norm.requires_grad_(False)  # small, so each network keeps its own, in its own precision
    for network in (student, ema):
        network.model.norm.weight.data.mul_(config.model.logit_gain)
    attention = choose(config.model.attention, engine.device, teacher.lm_head.weight.dtype, teacher.config)
    for network in (teacher, student, aux, ema) if config.model.backend == "native" else ():
        compiled = config.model.compile and engine.device.type == "cuda"
        network.run_with(compiled, config.model.activation_checkpointing, attention.name)
    if config.model.backend == "native":
        teacher.hold(teacher.lm_head.weight.dtype)
    return networks, attention


def lower_weights(aux: UrsaTransformer, layers: int) -> dict[str, torch.Tensor]:
    """The weights of an auxiliary that are the teacher's too, which checkpoints leave out, {name: parameter}."""
    lower = {p for part in _lower(aux, layers) for p in part.parameters()}
    return {name: p for name, p in aux.named_parameters() if p in lower}


def _lower(teacher: UrsaTransformer, layers: int) -> list[torch.nn.Module]:
    """The teacher's embeddings and first layers, as far as they are the auxiliary's too (model.aux_shared_layers)."""
    most = teacher.config.num_hidden_layers - 1
    if layers > most:
        raise DimoError(
            f"model.aux_shared_layers must be at most {most}, so that one of the teacher's {most + 1} layers learns, "
            f"got {layers}"
        )
    return [teacher.model.embed_tokens, *list(teacher.model.layers)[:layers]] if layers else []
