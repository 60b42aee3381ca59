"""A dry run: a training step with the real shapes and number of ranks, without weights, GPUs or other processes.

Tensors are fake: they have a shape, a dtype and a size, but no values. The process group is fake as well, and its
collectives return at once. The configuration runs through the real `Trainer.step`, and the memory that this allocates
is counted. Not covered are values (every number that is read back is 1), speed, workspaces of GPU kernels, allocator
fragmentation, NCCL buffers, and whether all ranks call their collectives in the same order.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import os
import types
import weakref
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from dimo.bench.sizes import SIZES, require_size, strides_for
from dimo.config import Config
from dimo.config.schema import Distill
from dimo.errors import DimoError
from dimo.run.launch import engine_kind
from dimo.train.prompts import WorldPrompts
from dimo.ursa import MetricPath, Ursa, UrsaConfig, UrsaTransformer, chunks, cpu
from dimo.ursa.layout import read_config, vae_strides
from dimo.worlds import checkpoint_folder


@dataclasses.dataclass
class DryRun:
    """Memory and communication of rank 0, in bytes.

    Attributes:
        weights: of each network; weights that networks share are counted once.
        trained: trainable weights of each network that has some.
        copies: what holds the bf16 copies of trainable weights (`dimo.train.masters`).
        kept: optimizer states and everything else that is kept between steps, except weights and copies.
        gradients: of the larger trained network.
        peak: highest memory use within a step, beyond what is kept between steps.
        collectives: data sent in a step, by collective.
    """

    weights: dict[str, int]
    trained: dict[str, int]
    copies: int
    kept: int
    gradients: int
    peak: int
    collectives: dict[str, int]
    num_visual_tokens: int


def empty_ursa(size: str | None, d: Distill, device: str | torch.device = "cpu") -> Ursa:
    """A model with random (or fake) weights.

    Args:
        size: one of URSA's sizes, an image model if one frame is asked for; None takes the sizes from the config.json
            of the folder distill.teacher_ckpt.

    Raises:
        DimoError: unknown size, or no such folder.
    """
    folder, strides = Path(f"URSA-{size}"), strides_for(d.num_frames)
    if size is not None:
        require_size(size)
        config = UrsaConfig.from_dict(SIZES[size])
    else:
        folder = checkpoint_folder(d.teacher_ckpt)
        config, strides = read_config(folder / "transformer"), vae_strides(folder)
    with torch.device(device):
        transformer, codebook = UrsaTransformer(config), torch.rand(config.codebook_size, 6)

    def tokenizer(prompts, max_length, **_):
        return types.SimpleNamespace(input_ids=torch.ones(len(prompts), max_length, dtype=torch.long))

    path = MetricPath(codebook, 1.0, 5.0)
    return Ursa(transformer, path, tokenizer, None, 1.0, folder, "a dry run decodes nothing", strides)


def dry_run(config: Config, size: str | None = None, num_processes: int = 1) -> DryRun:
    """Run two steps as rank 0 of `num_processes`, and count the second one, when optimizer states exist.

    Under fsdp2 everything is actually sharded. DeepSpeed cannot run on fake tensors, so deepspeed_zero2 runs as ddp.

    Args:
        size: see `empty_ursa`.

    Raises:
        DimoError: an invalid configuration, an unknown size or folder, or a process group is already initialised.
    """
    from dimo.train.masters import copies_of
    from dimo.train.trainer import Trainer

    if config.distill.teacher == "exact":
        raise DimoError("memory is counted for networks; to plan for the others, use distill.teacher=network")
    on_gpu = config.model.device != "cpu"
    model = dataclasses.replace(config.model, device="cpu", backend="native", compile=False, attention="auto")
    training = dataclasses.replace(config.training, cuda_graph=False)
    config = dataclasses.replace(config, model=model, training=training)
    engine, meter = engine_kind(config.training.engine), _Meter()
    processes = _fake_processes(num_processes, engine)
    holds: contextlib.AbstractContextManager = contextlib.nullcontext()
    if engine == "deepspeed_zero2" and num_processes > 1:  # it casts in every pass
        holds = mock.patch.object(UrsaTransformer, "hold", lambda network, _: network)
    with (
        processes,
        holds,
        _without_values(),
        _as_on_a_gpu(on_gpu),
        _Fake(allow_non_fake_inputs=True),
        meter.with_resizing(),
    ):
        ursa = empty_ursa(size, config.distill)
        prompts = WorldPrompts(["a red ball"], ursa, config.distill.max_prompt_length)
        trainer = Trainer(config, ursa, prompts)
        trainer.step(0)
        before = meter.bytes
        meter.peak, meter.collectives = before, collections.Counter()
        trainer.step(1)
        weights, trained = {}, {}
        seen: set[int] = set()
        for name, network in vars(trainer.networks).items():
            weights[name] = _bytes(network.parameters(), seen)
            trained[name] = _bytes((p for p in network.parameters() if p.requires_grad), set())
        learners = trainer.student, trainer.aux
        copies = _bytes((held for one in learners for held, _ in copies_of(one.model).values()), set())
        return DryRun(
            weights, {name: n for name, n in trained.items() if n}, copies, before - sum(weights.values()) - copies,
            max(_bytes(one.learning, set()) for one in learners), meter.peak - before, dict(meter.collectives),
            trainer.num_visual_tokens,
        )  # fmt: skip


def _bytes(tensors, seen: set[int]) -> int:
    """Total size of the tensors whose storage is not in `seen`; adds their storages to it."""
    size = 0
    for storage in (_own(tensor).untyped_storage() for tensor in tensors):
        if storage._cdata not in seen:
            seen.add(storage._cdata)
            size += storage.nbytes()
    return size


def _own(tensor: torch.Tensor) -> torch.Tensor:
    """The local shard of a sharded tensor; any other tensor unchanged."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def _gather_object(values: list, value, group=None) -> None:
    values[:] = [value] * len(values)  # every rank has the same value


def _real_mesh(*arguments, **options):
    with _disable_current_modes():  # it reads back the values of its rank tensor
        return init_device_mesh(*arguments, **options)


def _part_of_mesh(mesh: DeviceMesh, name: str, get=DeviceMesh.__getitem__):
    with _disable_current_modes():
        return get(mesh, name)


def _apply(module: torch.nn.Module, function, recurse: bool = True) -> torch.nn.Module:
    """Replaces `Module._apply`, used to move and cast networks, which cannot swap the contents of fake tensors."""
    for part in module.modules():
        for name, p in part._parameters.items():
            if p is not None:
                part._parameters[name] = torch.nn.Parameter(function(p), p.requires_grad)
    return module


@contextlib.contextmanager
def _without_values():
    """Patch the functions of torch that access values in ways that fake tensors do not support."""
    with (
        mock.patch.object(torch.nn.Module, "_apply", _apply),
        mock.patch.object(
            FakeTensor, "data_ptr", lambda _: 0
        ),  # its actual value; the original warns when a tensor is copied
        mock.patch.object(dist, "all_gather_object", _gather_object),
        mock.patch.object(dist, "init_device_mesh", _real_mesh),
        mock.patch.object(DeviceMesh, "__getitem__", _part_of_mesh),
    ):
        yield


@contextlib.contextmanager
def _as_on_a_gpu(on_gpu: bool):
    """Make dimo take its GPU code paths on a CPU."""
    if not on_gpu:
        yield
        return
    with (
        mock.patch.dict(chunks.ENTRIES, cpu=chunks.ENTRIES["cuda"]),
        mock.patch.object(cpu, "serves", lambda *_, **__: False),
    ):
        yield


class _Fake(FakeTensorMode):
    def __deepcopy__(self, memo) -> _Fake:
        return self  # tensors of a copied network stay in the same mode


class _Meter(TorchDispatchMode):
    """Counts the bytes of live storages and of collectives, and supplies values where Python reads fake tensors."""

    def __init__(self):
        super().__init__()
        self.bytes = self.peak = 0
        self.collectives: collections.Counter[str] = collections.Counter()
        self.known: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # storage: [bytes]

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, kwargs = function.overloadpacket._qualified_op_name, kwargs or {}
        if kwargs.get("device") == torch.device("cpu", 0):  # accelerate's name of the CPU
            kwargs = kwargs | {"device": torch.device("cpu")}
        if name == "aten::_local_scalar_dense":  # .item(), bool(), .tolist(): 1 passes all checks
            known = getattr(args[0], "constant", None)
            with _disable_current_modes():
                return _one(args[0].dtype) if known is None else known.item()
        if name == "aten::nonzero":  # the largest possible number of rows
            result = args[0].new_empty((args[0].numel(), args[0].dim()), dtype=torch.long)
        else:
            constants = [getattr(t, "constant", None) for t in tree_leaves(args) if isinstance(t, torch.Tensor)]
            result = function(*args, **kwargs)
        if name.startswith(("c10d::", "_c10d_functional::")):
            sent = [t for t in tree_leaves(args) if isinstance(t, torch.Tensor)]
            moved = sum(t.numel() * t.element_size() for t in sent)
            for tensor, known in zip(sent, constants):
                tensor.constant = known  # a flag that is not set here is not set on any rank
            self.collectives[name.split("::")[1].strip("_")] += moved
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._count(_own(tensor).untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        held = self.known.get(storage)
        if held is None:
            held = self.known[storage] = [0]
            weakref.finalize(storage, self._set, held, 0).atexit = False
        self._set(held, storage.nbytes())

    def _set(self, held: list[int], size: int) -> None:
        self.bytes += size - held[0]
        held[0] = size
        self.peak = max(self.peak, self.bytes)

    @contextlib.contextmanager
    def with_resizing(self):
        """Also count the resizing of storages, by which FSDP2 frees memory without a dispatched operation."""
        resize = torch.UntypedStorage.resize_

        def resized(storage, size):
            result = resize(storage, size)
            if storage in self.known:
                self._set(self.known[storage], storage.nbytes())
            return result

        with self, mock.patch.object(torch.UntypedStorage, "resize_", resized):
            yield


def _one(dtype: torch.dtype) -> bool | int | float:
    return True if dtype == torch.bool else 1.0 if dtype.is_floating_point else 1


@contextlib.contextmanager
def _fake_processes(number: int, engine: str):
    """Set up a fake process group in which this process is rank 0; collectives return at once."""
    if dist.is_initialized():
        raise DimoError("a dry run needs its own process, but a process group is already initialised in this one")
    variables = {"RANK": "0", "WORLD_SIZE": str(number), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": str(number)}
    variables |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"}  # never contacted
    if engine == "fsdp2":
        variables |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    before = {name: os.environ.get(name) for name in variables}
    _forget_accelerate()
    if number > 1:
        from torch.testing._internal.distributed.fake_pg import FakeStore

        os.environ |= variables
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=number)
    try:
        yield
    finally:
        if number > 1:
            dist.destroy_process_group()
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})
        _forget_accelerate()


def _forget_accelerate() -> None:
    GradientState._reset_state()
    AcceleratorState._reset_state(reset_partial_state=True)
