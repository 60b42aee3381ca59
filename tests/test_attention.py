"""model.attention: which kernel is chosen, that it is the one that runs, and that all of them compute attention.

There is no GPU here. FlashAttention 4 is a package that the test writes into a folder, of the version and with the
fault that a user may have; torch's own hook for it is the real one, and gets tensors on the CPU.
"""

import importlib
import math
import sys
import textwrap
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend, current_flash_attention_impl
from torch.utils._python_dispatch import TorchDispatchMode

from dimo.commands.sample import Request, open_sampler
from dimo.config import load_config
from dimo.errors import DimoError
from dimo.evaluation.evaluate import open_comparison
from dimo.ursa import UrsaConfig, attention
from dimo.ursa.attention import choose
from dimo.ursa.transformer import Attention, rope_table, rotate
from dimo.worlds import SHIPPED_STUDENT

fa4 = importlib.import_module("torch.nn.attention._fa4")
CUDA, CPU = torch.device("cuda"), torch.device("cpu")
HEADS = UrsaConfig(hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
INTERFACE = """
    import torch

    def attend(q, k, v):  # (B, S, H, D)
        k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
        return torch.einsum("bhst,bthd->bshd", (torch.einsum("bshd,bthd->bhst", q, k) / 4).softmax(-1), v)

    def _flash_attn_fwd(q, k, v, out=None, **_):
        out, lse = attend(q.float(), k.float(), v.float()).to(q.dtype), q.new_zeros(1).float()
        return {returns}

    def _flash_attn_bwd(q, k, v, out, grad, lse, **_):
        leaves = [x.float().detach().requires_grad_() for x in (q, k, v)]
        with torch.enable_grad():
            found = torch.autograd.grad(attend(*leaves), leaves, grad.float())
        dq, dk, dv = (x.to(q.dtype) for x in found)
        return dq, {dk}, dv
"""


class ThroughTheHook(torch.autograd.Function):
    """What torch's overridden flash kernel does, without its check that tensors are on a GPU."""

    @staticmethod
    def forward(ctx, q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out, lse = fa4._fa4_run_forward(q, k, v, None, None, 0, 0, None, False, None, None, None)
        ctx.save_for_backward(q, k, v, out, lse)
        return out.transpose(1, 2)

    @staticmethod
    def backward(ctx, grad):
        q, k, v, out, lse = ctx.saved_tensors
        found = fa4._fa4_run_backward(grad.transpose(1, 2), q, k, v, out, lse, None, None, None, False, None, None)
        return tuple(x.transpose(1, 2) for x in found)


@pytest.fixture
def gpu(monkeypatch):
    """A Hopper GPU, as far as the choice looks at it; trials run on the CPU."""
    tried, attend = attention.trial_errors, attention._attend

    def trial(kernel, device, *rest, **how):
        return tried(kernel, CPU, *rest, **how)

    def hooked(kernel, q, k, v):
        if kernel == SDPBackend.FLASH_ATTENTION and current_flash_attention_impl() == "FA4":
            return ThroughTheHook.apply(q, k, v)
        return attend(kernel, q, k, v)

    monkeypatch.setattr(attention, "trial_errors", trial)
    monkeypatch.setattr(attention, "_attend", hooked)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    yield monkeypatch
    attention.deactivate_fa4()
    fa4._fa4_import_module.cache_clear()
    for name in [name for name in sys.modules if name.split(".")[0] == "flash_attn"]:
        del sys.modules[name]


def install(monkeypatch, folder, version="4.0.0b15", returns="out, lse", dk="dk", first=""):
    package = folder / "flash_attn" / "cute"
    package.mkdir(parents=True)
    text = textwrap.dedent(INTERFACE).replace("{returns}", returns).replace("{dk}", dk)
    (package / "interface.py").write_text(first + text)
    about = folder / f"flash_attn_4-{version}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: flash-attn-4\nVersion: {version}\n")
    monkeypatch.syspath_prepend(folder)


def test_without_the_package_auto_is_what_it_was_and_fa4_says_what_to_install(gpu):
    found = choose("auto", CUDA, torch.bfloat16, HEADS)
    assert found.name == "auto" and not found.surprises
    assert "cuDNN" in found.about and "flash-attn-4 is not installed" in found.about
    with pytest.raises(
        DimoError, match=r"model.attention=fa4 cannot be used: flash-attn-4 is not installed; pip .*fa4"
    ):
        choose("fa4", CUDA, torch.bfloat16, HEADS)


def test_a_package_that_fits_is_used_until_another_kernel_is_asked_for(gpu, tmp_path):
    install(gpu, tmp_path)
    for name in ("auto", "fa4"):
        found = choose(name, CUDA, torch.bfloat16, HEADS)
        assert found.name == "fa4" and current_flash_attention_impl() == "FA4"
    assert choose("auto", CUDA, torch.bfloat16, HEADS).about == "attention: FlashAttention 4 (flash-attn-4 4.0.0b15)"
    assert attention.KERNELS["fa4"][0] == SDPBackend.FLASH_ATTENTION
    assert choose("flash", CPU, torch.bfloat16, HEADS).name == "flash"
    assert current_flash_attention_impl() is None


@pytest.mark.parametrize(
    "fault, said",
    [
        ({"version": "4.0.0b20", "returns": "out, lse, None, None"}, "4.0.0b20 does not fit torch .*too many values"),
        ({"returns": "out * 1.1, lse"}, "output is off by 0.1"),
        ({"dk": "dk * float('nan')"}, "gradient of k is off by nan"),
        ({"first": "import cutlass_that_is_missing\n"}, "needs cutlass_that_is_missing, which is not installed"),
        ({"first": "raise RuntimeError('libcuda.so.1 is too old')\n"}, "cannot be imported: .*libcuda.so.1 is too old"),
    ],
)
def test_a_package_that_is_wrong_is_left_alone_and_the_reason_is_told(gpu, tmp_path, fault, said):
    install(gpu, tmp_path, **fault)
    found = choose("auto", CUDA, torch.bfloat16, HEADS)
    assert found.name == "auto" and found.surprises and current_flash_attention_impl() is None
    with pytest.raises(DimoError, match=f"model.attention=fa4 cannot be used: .*{said}.*model.attention=auto"):
        choose("fa4", CUDA, torch.bfloat16, HEADS)
    assert current_flash_attention_impl() is None


def test_what_is_only_sampled_needs_no_gradients_of_its_kernel(gpu, tmp_path):
    install(gpu, tmp_path, dk="dk * float('nan')")
    assert choose("auto", CUDA, torch.bfloat16, HEADS).name == "auto"
    assert choose("auto", CUDA, torch.bfloat16, HEADS, gradients=False).name == "fa4"


@pytest.mark.parametrize(
    ("device", "tokens", "name", "runs_with"),
    [
        ("cuda", 33_280, "auto", "fa4"),
        ("cuda", 5_120, "auto", None),  # the trial takes longer than it would save
        ("cuda", 5_120, "fa4", "fa4"),
        ("cuda", 33_280, "math", "math"),
        ("cpu", 33_280, "fa4", None),  # of a run on a GPU
    ],
)
def test_what_is_sampled_takes_the_kernel_that_training_takes(gpu, tmp_path, device, tokens, name, runs_with):
    install(gpu, tmp_path, dk="dk * float('nan')")  # its gradients do not count
    weight, chosen = SimpleNamespace(device=torch.device(device), dtype=torch.bfloat16), []
    network = SimpleNamespace(
        lm_head=SimpleNamespace(weight=weight), config=HEADS, run_with=lambda attention: chosen.append(attention)
    )
    attention.use_for_sampling(network, tokens, name)
    assert chosen == ([runs_with] if runs_with else [])


def test_samples_and_evaluations_ask_for_it_before_they_copy_the_network(monkeypatch):
    asked = []

    def use(network, tokens, name="auto"):
        asked.append((tokens, name))
        network.run_with(attention="math")

    monkeypatch.setattr("dimo.evaluation.evaluate.use_for_sampling", use)
    monkeypatch.setattr("dimo.commands.sample.use_for_sampling", use)
    config = load_config("smoke", ["model.device=cpu", "model.attention=cudnn"])
    comparison, _ = open_comparison(config, SHIPPED_STUDENT)
    sampler = open_sampler(Request(student_ckpt=str(SHIPPED_STUDENT), device="cpu"), [])
    assert asked == [(48, "cudnn"), (48, "auto")]
    for network in (*comparison.networks.values(), sampler.network):
        assert {layer.self_attn.kernels for layer in network.model.layers} == {"math"}


def test_other_gpus_and_float32_do_without(gpu, tmp_path):
    install(gpu, tmp_path)
    assert choose("auto", CUDA, torch.float32, HEADS).name == "auto"
    gpu.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert choose("auto", CUDA, torch.bfloat16, HEADS).name == "auto"
    with pytest.raises(DimoError, match="compute capability 9.x or 10.x, this one has 8.0"):
        choose("fa4", CUDA, torch.bfloat16, HEADS)


def test_a_kernel_that_a_cpu_lacks_is_refused_before_training():
    for name, said in (("fa4", "needs a GPU"), ("cudnn", "RuntimeError"), ("cudn", "must be one of auto, fa4, cudnn")):
        with pytest.raises(DimoError, match=said):
            choose(name, CPU, torch.float32, HEADS)
    assert [choose(name, CPU, torch.float32, HEADS).name for name in ("auto", "flash", "math")] == [
        "auto", "flash", "math"
    ]  # fmt: skip


class Called(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.overloadpacket.__name__)
        return function(*args, **kwargs or {})


def by_hand(layer, x, cos, sin):
    """Grouped-query attention in float64, head by head."""
    d = layer.head_dim

    def heads(projection, norm=None):
        z = (x.double() @ projection.weight.double().T).unflatten(-1, (-1, d)).transpose(1, 2)
        if norm is None:
            return z
        z = z / (z.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight.double()
        return rotate(z, cos.double(), sin.double())

    q, k, v = heads(layer.q_proj, layer.q_norm), heads(layer.k_proj, layer.k_norm), heads(layer.v_proj)
    out = []
    for i in range(layer.heads):
        j = i * layer.kv_heads // layer.heads
        weights = (q[:, i] @ k[:, j].mT / math.sqrt(d)).exp()
        out.append(weights / weights.sum(-1, keepdim=True) @ v[:, j])
    return torch.cat(out, -1) @ layer.o_proj.weight.double().T


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("name", ["auto", "flash", "math"])
def test_the_kernel_asked_for_is_the_one_that_runs_and_computes_attention(name, dtype, tolerance):
    torch.manual_seed(0)
    layer = Attention(HEADS)
    layer.kernels = name
    positions = torch.randint(8, (53, 3)).float()
    cos, sin = rope_table(positions, HEADS.rope_theta, HEADS.head_dim)
    x = torch.randn(2, 53, 32, requires_grad=True)
    with Called() as called, torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        got = layer(x, cos, sin)
    own = name == "auto" and dtype == torch.float32  # dimo.ursa.cpu
    assert ("_scaled_dot_product_flash_attention_for_cpu" in called.names) == (name != "math" and not own)
    assert ("baddbmm" in called.names) == own
    leaves = [x, *layer.parameters()]
    want = by_hand(layer, x, cos, sin)
    grad = torch.randn_like(want)
    pairs = zip([got, *torch.autograd.grad(got, leaves, grad.to(got.dtype))],
                [want, *torch.autograd.grad(want, leaves, grad)])  # fmt: skip
    for a, b in pairs:
        assert (a.double() - b).norm() < tolerance * b.norm()
