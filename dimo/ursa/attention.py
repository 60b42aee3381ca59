"""Which kernel computes attention: `model.attention`, tried out on the device before it is used.

FlashAttention 4 (flash-attn-4, an optional package) takes the place of torch's own flash kernel in the whole process:
two trainers of one process cannot use one each.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.metadata
import logging
from typing import Any

import torch
from torch.nn import attention
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from dimo.errors import DimoError, reason
from dimo.ursa.config import UrsaConfig

log = logging.getLogger(__name__)
# fastest first: attention dominates at URSA's sizes, and cuDNN makes the best use of Hopper's tensor cores
ORDER = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
KERNELS = {  # {model.attention: torch's kernels, the first that supports the input is used}
    "auto": ORDER,
    "fa4": [SDPBackend.FLASH_ATTENTION, *(kernel for kernel in ORDER if kernel != SDPBackend.FLASH_ATTENTION)],
    "cudnn": [SDPBackend.CUDNN_ATTENTION],
    "flash": [SDPBackend.FLASH_ATTENTION],
    "math": [SDPBackend.MATH],
}
CAPABILITIES = (9, 10)  # of the GPUs for which FlashAttention 4 has kernels: Hopper, Blackwell
PACKAGE = "flash-attn-4"
INSTALL = "pip install -e '.[fa4]', which fits torch 2.11"
LENGTH = 200  # positions of the trial, not a multiple of any kernel's tile
LONG = 10_000  # tokens; a pass of 1.7B at 5,120 is faster by about a millisecond with FlashAttention 4
TOLERANCE = {torch.float32: 1e-3}  # relative errors of the trial
HALF_TOLERANCE = 0.02


@dataclasses.dataclass(frozen=True)
class Choice:
    """What `choose` found: a key of `KERNELS`, a sentence for the log, and whether it is a surprise."""

    name: str
    about: str
    surprises: bool = False


def choose(name: str, device: torch.device, dtype: torch.dtype, config: UrsaConfig, gradients: bool = True) -> Choice:
    """Resolve `model.attention`; "auto" is FlashAttention 4 where it is installed and right, else `ORDER`.

    Args:
        name: a key of `KERNELS`.
        device, dtype: of queries, keys and values.
        config: of the network, for the number and the size of heads.
        gradients: whether they are needed; FlashAttention 4 compiles kernels for them, which takes seconds.

    Raises:
        DimoError: unknown name, or the kernel that it asks for cannot be used here.
    """
    if name not in KERNELS:
        raise DimoError(f"model.attention must be one of {', '.join(KERNELS)}, got {name!r}")
    if name == "auto":
        if device.type != "cuda" or dtype == torch.float32:
            return Choice("auto", f"attention: the first kernel of torch that supports {_spelled(dtype)} on {device}")
        if not (why := fa4_problem(device, dtype, config, gradients)):
            return Choice("fa4", f"attention: FlashAttention 4 ({PACKAGE} {fa4_version()})")
        surprises = fa4_version() != ""
        return Choice("auto", f"attention: cuDNN, since FlashAttention 4 cannot be used: {why}", surprises)
    if name == "fa4":
        why = fa4_problem(device, dtype, config, gradients)
        hint = "" if fa4_version() else f"; {INSTALL}"
    else:
        deactivate_fa4()
        why, hint = trial_problem(name, device, dtype, config, gradients), ""
    if why:
        raise DimoError(f"model.attention={name} cannot be used: {why}{hint}; model.attention=auto takes what works")
    return Choice(name, f"attention: {name}")


def use_for_sampling(network: Any, tokens: int, name: str = "auto") -> None:
    """Let a network that is only sampled run with the kernel that it would be trained with, on its device.

    Args:
        network: an `UrsaTransformer`.
        tokens: of a video. "auto" tries FlashAttention 4 from LONG tokens on: below, it takes longer to compile than it
            saves.
        name: `model.attention`; on a CPU it does not count, since a run may have been trained on a GPU.

    Raises:
        DimoError: see `choose`.
    """
    weight = network.lm_head.weight
    if weight.device.type != "cuda" or (name == "auto" and tokens < LONG):
        return
    choice = choose(name, weight.device, weight.dtype, network.config, gradients=False)
    network.run_with(attention=choice.name)
    if choice.surprises:
        log.warning("%s", choice.about)


def fa4_problem(device: torch.device, dtype: torch.dtype, config: UrsaConfig, gradients: bool = True) -> str:
    """Activate FlashAttention 4 in this process and try it; returns "", or why it cannot be used and is not active."""
    if device.type != "cuda":
        return f"FlashAttention 4 needs a GPU, the device is {device}"
    if not hasattr(attention, "activate_flash_attention_impl"):
        return f"torch {torch.__version__} cannot take it in, 2.11 can"
    major, minor = torch.cuda.get_device_capability(device)
    if major not in CAPABILITIES:
        return f"it needs a GPU of compute capability 9.x or 10.x, this one has {major}.{minor}"
    try:
        importlib.import_module("flash_attn.cute.interface")
        attention.activate_flash_attention_impl("FA4")
    except ModuleNotFoundError as error:
        if error.name in ("flash_attn", "flash_attn.cute"):
            return f"{PACKAGE} is not installed"
        return f"{PACKAGE} {fa4_version()} needs {error.name}, which is not installed"
    except Exception as error:  # a broken installation fails in many ways
        return f"{PACKAGE} {fa4_version()} cannot be imported: {reason(error)}"
    why = trial_problem("fa4", device, dtype, config, gradients)
    if why:
        deactivate_fa4()
        return f"{PACKAGE} {fa4_version()} does not fit torch {torch.__version__}: {why}"
    return ""


def deactivate_fa4() -> None:
    """Give torch its own flash kernel back."""
    restore = getattr(attention, "restore_flash_attention_impl", None)
    if restore is not None and attention.current_flash_attention_impl() is not None:
        restore()


def trial_problem(
    name: str, device: torch.device, dtype: torch.dtype, config: UrsaConfig, gradients: bool = True
) -> str:
    """Try the first kernel of `KERNELS[name]`, alone; returns "", or what is wrong with it."""
    try:
        off = trial_errors(KERNELS[name][0], device, dtype, config, gradients=gradients)
    except Exception as error:  # the compiler of FlashAttention 4 has types of its own
        return f"{type(error).__name__}: {reason(error)}"
    tolerance = TOLERANCE.get(dtype, HALF_TOLERANCE)
    wrong = [f"{part} is off by {error:.3g}" for part, error in off.items() if not error < tolerance]  # NaN is wrong
    return f"{wrong[0]}, relative to float32, where at most {tolerance:g} is rounding" if wrong else ""


def trial_errors(
    kernel: SDPBackend, device: torch.device, dtype: torch.dtype, config: UrsaConfig, length: int = LENGTH,
    gradients: bool = True,
) -> dict[str, float]:  # fmt: skip
    """Compare a kernel with attention written out in float32, on random input with the heads of a network.

    Returns:
        {"output" or "gradient of q", "k", "v": norm of the difference relative to the norm of the float32 one}.

    Raises:
        RuntimeError: the kernel does not support this; an unfit FlashAttention 4 raises other errors, too.
    """
    heads, kv_heads, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    g = torch.Generator(device).manual_seed(0)

    def draw(heads: int) -> torch.Tensor:  # laid out as in the transformer, heads after positions
        return torch.randn(1, length, heads, size, device=device, generator=g).to(dtype).transpose(1, 2)

    q, k, v, grad = draw(heads), draw(kv_heads), draw(kv_heads), draw(heads)
    exact = [x.float() for x in (q, k, v, grad)]
    with torch.set_grad_enabled(gradients), torch.autocast(device.type, enabled=False):
        if gradients:
            got = _with_gradients(lambda q, k, v: _attend(kernel, q, k, v), q, k, v, grad)
            want = _with_gradients(written_out, *exact)
        else:
            got, want = [_attend(kernel, q, k, v)], [written_out(*exact[:3])]
    names = ("output", "gradient of q", "gradient of k", "gradient of v")
    return {name: float((a.float() - b).norm() / b.norm()) for name, a, b in zip(names, got, want)}


def _attend(kernel: SDPBackend, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    with sdpa_kernel(kernel):
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])


def written_out(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """softmax(q k^T / sqrt(D)) v of q (B, H, S, D) and k, v (B, G, S, D), H a multiple of G, without any kernel."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v


def _with_gradients(attend, q, k, v, grad) -> list[torch.Tensor]:
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out = attend(q, k, v)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), grad)]


def version_of(package: str) -> str:
    """Version of a package; empty if it is not installed."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return ""


def fa4_version() -> str:
    """Version of flash-attn-4; empty if it is not installed."""
    return version_of(PACKAGE)


def _spelled(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
