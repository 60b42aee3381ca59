"""Checkpoint folders in URSA's layout: loaded without executing pickled code, written atomically."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from dimo.errors import DimoError, nearest, reason
from dimo.files import save_file, whole_folder
from dimo.ursa.inputs import SPATIAL_STRIDE, TEMPORAL_STRIDE, latents_shape_for
from dimo.ursa.layout import read_config, require_checkpoint, student_file, vae_config, vae_strides
from dimo.ursa.probability_path import MetricPath, MixturePath
from dimo.ursa.transformer import UrsaConfig, UrsaTransformer
from dimo.ursa.weights import (
    WEIGHTS,
    load_weights,
    read_json,
    read_pickle,
    read_weights,
    refuse_what_is_none,
    require_file,
    require_numbers,
)

SCHEDULER = "KineticOptimalScheduler"
BACKENDS = ("native", "upstream")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt")  # one of which a tokenizer has, or a *.model
INSTALL = (
    "pip install 'transformers>=4.57.1,<5' 'diffusers>=0.36,<0.40' scipy einops "
    "git+https://github.com/baaivision/URSA.git@29284bb"
)


@dataclasses.dataclass
class Ursa:
    """A loaded checkpoint folder.

    `vae` decodes codes (B, T, H, W) to frames (B, F, height, width, 3) in [0, 1]; it is None if there is no usable
    decoder, and `no_vae` then says why. `shift` is the scheduler's time shift, 1 if it names none, `strides` the VAE's
    (temporal, spatial).
    """

    transformer: UrsaTransformer
    path: MetricPath | MixturePath
    tokenizer: Any
    vae: Any
    shift: float
    folder: Path
    no_vae: str = ""
    strides: tuple[int, int] = (TEMPORAL_STRIDE, SPATIAL_STRIDE)

    @property
    def own_shift(self) -> float | None:
        """The time shift that the folder's scheduler names; None if it names none."""
        file = self.folder / "scheduler" / "scheduler_config.json"
        return self.shift if file.exists() and read_json(file).get("shift") is not None else None

    def tokenize(self, prompts: list[str], max_prompt_length: int, device=None) -> torch.Tensor:
        """Token ids (B, max_prompt_length) int64, left-padded and truncated like in URSA's pipeline."""
        return self._encode(prompts, max_prompt_length).input_ids.to(device or self.path.device)

    def tokenize_and_count(self, prompts: list[str], max_prompt_length: int) -> tuple[torch.Tensor, int]:
        """Like `tokenize`, plus the number of prompts that were truncated."""
        encoded = self._encode(prompts, max_prompt_length)
        if encoded.encodings is None:  # a pure Python tokenizer does not report overflow
            cut = sum(len(ids) > max_prompt_length for ids in self.tokenizer(prompts).input_ids)
        else:
            cut = sum(bool(one.overflowing) for one in encoded.encodings)
        return encoded.input_ids.to(self.path.device), cut

    def _encode(self, prompts: list[str], max_prompt_length: int):
        return self.tokenizer(
            prompts, max_length=max_prompt_length, padding="max_length", truncation=True, return_tensors="pt"
        )

    def latents_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int]:
        """latents_shape (T, H, W) of a video of this size (frames, pixels) for this checkpoint's VAE."""
        return latents_shape_for(num_frames, height, width, *self.strides)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Decode codes (B, T, H, W) to frames (B, F, height, width, 3) in [0, 1].

        Raises:
            DimoError: there is no usable decoder; the message says what to install.
        """
        if self.vae is None:
            raise DimoError(f"these codes cannot be turned into frames: {self.no_vae}")
        return self.vae.decode(codes)


def load_ursa(
    folder: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    backend: str = "native",
    weights: bool = True,
) -> Ursa:
    """Load transformer, probability path, tokenizer and, if it can be run here, the VAE of a checkpoint folder.

    Args:
        folder: contains `transformer/`, `scheduler/`, `tokenizer/` and `vae/`, like URSA-1.7B.
        device: device of everything loaded.
        dtype: dtype of the transformer; path and VAE stay in float32.
        backend: "native" (this package's transformer) or "upstream" (diffnext's class with the same weights).
        weights: False leaves the transformer without its weights, on the meta device: for a process that only needs to
            know its sizes, since others run it.

    Raises:
        DimoError: a part is missing or damaged; the message names it.
    """
    folder = require_checkpoint(folder)
    transformer = load_transformer(folder / "transformer", device, dtype, backend, weights)
    config = transformer.config
    path, shift = load_path(folder, config.codebook_size, device)
    tokenizer = load_tokenizer(folder, config)
    vae, no_vae = load_vae(folder, config.codebook_size, device)
    return Ursa(transformer, path, tokenizer, vae, shift, folder, no_vae, vae_strides(folder))


def load_transformer(
    folder: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    backend: str = "native",
    weights: bool = True,
) -> UrsaTransformer:
    """Load a transformer from config.json and weights (.safetensors or .bin, sharded or not), as in `load_ursa`."""
    folder = Path(folder)
    if backend not in BACKENDS:
        raise DimoError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}{nearest(backend, BACKENDS)}")
    if dtype not in DTYPES.values():
        raise DimoError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype}")
    config = read_config(folder)
    if backend == "upstream":
        transformer = import_upstream().empty_transformer(config)
    else:
        with torch.device("meta"), _NoFirstValues():
            transformer = UrsaTransformer(config)
    if not weights:
        return transformer
    load_weights(transformer, read_weights(folder, device), where=str(folder), assign=True)
    return transformer.to(device).to(dtype)  # cast on the device: from bfloat16 to float32 half as much is sent there


class _NoFirstValues(TorchFunctionMode):
    """Skips weight initialisation in this context, which on the meta device would import torch._dynamo (slow)."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"]
        return function(*args, **(kwargs or {}))


def load_path(folder: Path, codebook_size: int, device="cpu") -> tuple[MetricPath | MixturePath, float]:
    """Load (path, time shift of sampling) from `scheduler/`; `alpha: null` in its config means the mixture path.

    Raises:
        DimoError: a value is out of range, or the codebook does not match the transformer.
    """
    file = folder / "scheduler" / "scheduler_config.json"
    scheduler = read_json(file)
    if scheduler.get("_class_name", SCHEDULER) != SCHEDULER:
        raise DimoError(f"{file} is of class {scheduler['_class_name']!r}, but dimo only reads {SCHEDULER}")
    pickled = folder / "scheduler" / "scheduler_model.pth"
    codebook = read_pickle(pickled).get("path.emb")
    if codebook is None or codebook.dim() != 2:
        raise DimoError(f"{pickled} must contain a matrix 'path.emb'")
    if codebook.shape[0] != codebook_size:
        raise DimoError(
            f"the scheduler's codebook in {folder} has {codebook.shape[0]} codes, "
            f"the transformer's config.json says {codebook_size}"
        )
    require_numbers(codebook, f"'path.emb' in {pickled}")
    codebook = codebook.to(device).float()
    if scheduler.get("alpha") is not None and bool((codebook == codebook[:1]).all()):
        raise DimoError(f"all rows of 'path.emb' in {pickled} are equal, so all distances between codes are zero")
    values = {"shift": 1.0, "eps": 1e-5} | {k: scheduler[k] for k in ("shift", "eps") if scheduler.get(k) is not None}
    mixture = scheduler.get("alpha") is None
    if not mixture:
        values |= {key: scheduler.get(key) for key in ("alpha", "c")}
    for key, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise DimoError(f"{key} in {file} must be a positive number, got {value!r}")
    path = MixturePath(codebook) if mixture else MetricPath(codebook, values["alpha"], values["c"], values["eps"])
    return path, float(values["shift"])


def load_tokenizer(folder: Path, config: UrsaConfig):
    """Load the tokenizer, set to pad on the left.

    Raises:
        DimoError: it cannot be read, has no padding token, has ids in the range of visual codes, or lacks BOV.
    """
    from transformers import AutoTokenizer  # slow import, only needed here

    where = folder / "tokenizer"
    require_file(where)
    for file in where.iterdir():  # transformers does not report empty files and LFS pointers as such
        if file.suffix in (".json", ".txt", ".model"):
            require_file(file)
            refuse_what_is_none(file)
        if file.suffix == ".json" and file.name != "tokenizer.json":
            read_json(file)  # transformers silently ignores some damaged files
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            where, padding_side="left", local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # transformers and tokenizers raise many types for a damaged file
        is_there = any((where / name).exists() for name in VOCABULARIES) or any(where.glob("*.model"))
        why = reason(error) if is_there else "there is no tokenizer.json"
        raise DimoError(f"the tokenizer in {where} could not be read: {why}") from error
    if tokenizer.pad_token_id is None:
        raise DimoError(f"the tokenizer in {where} has no padding token, but prompts are padded on the left")
    ids = set(tokenizer.get_vocab().values())
    largest = max(ids)
    if largest >= config.lm_vocab_size:
        raise DimoError(
            f"the tokenizer in {where} has ids up to {largest}, but ids from lm_vocab_size = {config.lm_vocab_size} on "
            "are visual codes: it belongs to a different checkpoint"
        )
    if config.bov_token_id not in ids:
        raise DimoError(
            f"the tokenizer in {where} has no token {config.bov_token_id}, which config.json gives as bov_token_id "
            f"(its ids go up to {largest})"
        )
    return tokenizer


def load_vae(folder: Path, codebook_size: int, device="cpu") -> tuple[Any, str]:
    """Load the VAE: (decoder, ""), or (None, reason) if the folder has none or it cannot be run here.

    Raises:
        DimoError: its codebook does not match the transformer, or its files are damaged.
    """
    where, config = folder / "vae", vae_config(folder)
    if config is None:
        return None, f"{where} contains no VAE"
    require_codes_of(where, config, codebook_size)
    if config.get("_class_name") == "PaletteDecoder":
        from dimo.ursa.palette import PaletteDecoder

        decoder = PaletteDecoder.load(where).to(device)
        if decoder.palette.shape[0] != codebook_size:
            raise DimoError(f"the palette in {where} has {decoder.palette.shape[0]} codes, not {codebook_size}")
        return decoder, ""
    if config.get("_class_name") == "PatchVae":
        from dimo.ursa.patch_vae import PatchVae

        vae = PatchVae.load(where).to(device)
        if vae.codebook_size != codebook_size:
            raise DimoError(f"the table in {where} has {vae.codebook_size} patches, not {codebook_size}")
        return vae, ""
    try:
        upstream = import_upstream()
    except DimoError as error:
        return None, str(error)
    return upstream.load_vae(where, config, device), ""


def require_codes_of(where: Path, config: dict, codebook_size: int) -> None:
    """Raise DimoError if the codebook size in a VAE's config.json differs from the transformer's."""
    if config.get("num_vq_embeddings", codebook_size) != codebook_size:
        raise DimoError(
            f"the VAE in {where} has {config['num_vq_embeddings']} codes, the transformer's config.json says "
            f"{codebook_size}"
        )


def load_student(ursa: Ursa, weights: str | Path) -> UrsaTransformer:
    """Load a student: the teacher's architecture with the student's weights, on the device of `ursa.path`.

    Args:
        ursa: the teacher.
        weights: student.pt, a .safetensors file, a folder with either, or a run folder.

    Raises:
        DimoError: no weights found, they are those of a checkpoint, or they belong to a different model.
    """
    return load_network(ursa, student_file(weights))


def load_network(ursa: Ursa, source: Path, shares_layers: bool = False) -> UrsaTransformer:
    """`load_student` of any network of a checkpoint; with `shares_layers`, weights that it lacks are the teacher's."""
    network = copy.deepcopy(ursa.transformer)
    rest = network.state_dict() if shares_layers else {}
    load_weights(network, rest | read_weights(source), where=str(source), model=f"the teacher {ursa.folder}")
    _require_same_config(ursa, source)
    return network.to(ursa.path.device)


def _require_same_config(ursa: Ursa, source: Path) -> None:
    """Raise DimoError if the config.json next to a student's weights differs from the teacher's (RoPE base, say)."""
    beside = source if source.is_dir() else source.parent / ("student" if source.name == "student.pt" else "")
    if source.suffix == ".safetensors" and not source.name.startswith(WEIGHTS):
        return  # a config.json next to a renamed file may belong to something else
    if not (beside / "config.json").exists():
        return
    own, teachers = (dataclasses.asdict(c) for c in (read_config(beside), ursa.transformer.config))
    for key, value in teachers.items():
        if own[key] != value:
            raise DimoError(
                f"the student in {source} does not belong to the teacher {ursa.folder}: its config.json has {key} = "
                f"{own[key]}, the teacher's {value}"
            )


def import_upstream():
    """Import `dimo.ursa.upstream`, the only module that imports diffnext.

    Raises:
        DimoError: diffnext is not installed, or fails to import with the installed versions of its dependencies.
    """
    try:
        from dimo.ursa import upstream
    except ModuleNotFoundError as error:
        raise DimoError(f"diffnext cannot be used because {error.name} is not installed: {INSTALL}") from error
    except Exception as error:  # incompatible versions fail in many ways
        raise DimoError(f"diffnext cannot be imported ({reason(error)}); compatible versions: {INSTALL}") from error
    return upstream


def save_student(
    folder: str | Path, transformer: UrsaTransformer, state: dict | None = None, dtype: torch.dtype | None = None
) -> Path:
    """Write config.json and safetensors, readable by `load_transformer` and upstream's `from_pretrained`, atomically.

    Args:
        folder: destination; an existing folder is replaced.
        state: full state dict to write, such as the EMA's; None means the transformer's own.
        dtype: dtype of the written weights; None keeps theirs.
    """
    state = plain_state(state or transformer.state_dict(), dtype)
    config = {"_class_name": "URSATransformer3DModel", **transformer.config.to_dict()}
    with whole_folder(folder) as beside:
        save_file(state, beside / f"{WEIGHTS}.safetensors", metadata={"format": "pt"})
        (beside / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return Path(folder)


def plain_state(state: dict[str, torch.Tensor], dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """A copy of the state dict: on the CPU, detached, contiguous, and in `dtype` unless None."""
    return {key: value.detach().to("cpu", dtype).contiguous() for key, value in state.items()}
