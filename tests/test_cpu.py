"""The CPU's own attention and norms against PyTorch's, in values and gradients."""

import pytest
import torch
from torch.nn import functional as F

from dimo.ursa import UrsaConfig, UrsaTransformer, cpu
from dimo.ursa.inputs import rope_positions
from dimo.ursa.transformer import rope_table, rotate


def gradients(function, inputs, out_grad):
    inputs = [x.clone().requires_grad_(True) for x in inputs]
    out = function(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, out_grad.to(out.dtype))]


def assert_close(got, want):
    for a, b in zip(got, want, strict=True):
        assert torch.allclose(a.double(), b, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("shape", [(2, 7, 64), (3, 5, 4, 16)])
def test_norm_is_rms_norm(generator, shape):
    x, weight, grad = (torch.randn(s, generator=generator) for s in (shape, shape[-1:], shape))
    want = gradients(lambda x, w: F.rms_norm(x, w.shape, w, 1e-6), [x.double(), weight.double()], grad)
    assert_close(gradients(lambda x, w: cpu.Norm.apply(x, w, 1e-6), [x, weight], grad), want)


def test_norm_rotate_is_the_norm_then_rope(generator):
    cos, sin = rope_table(rope_positions(3, (2, 2, 2)), 10.0, 16)
    x, weight, grad = (torch.randn(s, generator=generator) for s in ((2, 12, 4, 16), (16,), (2, 4, 12, 16)))

    def plain(x, w):
        return rotate(F.rms_norm(x, (16,), w, 1e-6).transpose(1, 2), cos.double(), sin.double())

    want = gradients(plain, [x.double(), weight.double()], grad)
    assert_close(gradients(lambda x, w: cpu.NormRotate.apply(x, w, cos, sin, 1e-6), [x, weight], grad), want)


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("cached", [1, 100, 10**6])  # a head at a time, some, all
def test_attend_is_attention(generator, monkeypatch, groups, cached):
    monkeypatch.setattr(cpu, "CACHED", cached)
    q, grad = (torch.randn(3, 4, 6, 16, generator=generator) for _ in range(2))
    k, v = (torch.randn(3, groups, 6, 16, generator=generator) for _ in range(2))

    def plain(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    want = gradients(plain, [x.double() for x in (q, k, v)], grad)
    assert_close(gradients(cpu.Attend.apply, [q, k, v], grad), want)


def test_the_transformer_gives_the_same_either_way(monkeypatch, generator):
    config = UrsaConfig(64, 128, 4, 2, 2, 10.0, 25, 15, 10, 2, 16)
    model = UrsaTransformer(config)
    ids, pos = torch.randint(25, (2, 12), generator=generator), rope_positions(3, (2, 2, 2))

    def run():
        model.zero_grad()
        logits = model(ids, pos)
        logits.square().sum().backward()
        return [logits.detach(), *(p.grad.clone() for p in model.parameters())]

    used = run()
    monkeypatch.setattr(cpu, "serves", lambda *_, **__: False)
    for a, b in zip(used, run(), strict=True):
        assert torch.allclose(a, b, atol=1e-5, rtol=1e-4)


def test_what_it_does_not_serve():
    x = torch.zeros(1, 4)
    assert cpu.serves(x) and not cpu.serves(x.bfloat16()) and not cpu.serves(x.to("meta"))
    with torch.autocast("cpu", torch.bfloat16):
        assert not cpu.serves(x) and not cpu.attends(torch.zeros(1, 2, 3, 4))
    short, long = (torch.zeros(1, length, 4, 1) for length in (64, cpu.LONG))  # 2^14 scores a video of 64
    assert cpu.attends(short) and not cpu.attends(long)
    assert cpu.attends(short.expand(2**10, -1, -1, -1)) and not cpu.attends(short.expand(2**10 + 1, -1, -1, -1))
