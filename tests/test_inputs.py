"""The splice and the slice against loops written out."""

import pytest
import torch

from dimo.errors import DimoError
from dimo.ursa import UrsaConfig, UrsaTransformer, build_ursa_inputs, extract_visual_logits, latents_shape_for

CONFIG = UrsaConfig(
    hidden_size=16, intermediate_size=16, num_attention_heads=1, num_key_value_heads=1, num_hidden_layers=1,
    vocab_size=12, lm_vocab_size=7, lm_head_size=5, bov_token_id=6, head_dim=16,
)  # fmt: skip


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return UrsaTransformer(CONFIG)


def test_ids_and_positions_by_hand(model):
    shape, txt = (2, 2, 3), torch.tensor([[0, 1, 2], [3, 4, 5]])
    codes = torch.randint(5, (2, *shape), generator=torch.Generator().manual_seed(0))
    inputs = build_ursa_inputs(model, txt, codes, shape)
    for b in range(2):
        assert inputs.input_ids[b].tolist() == [*txt[b].tolist(), 6, *(7 + c for c in codes[b].flatten().tolist())]
    want = [[i] * 3 for i in range(4)] + [[4 + f, y, x] for f in range(2) for y in range(2) for x in range(3)]
    assert inputs.rope_pos.tolist() == want
    assert inputs.num_visual_tokens == 12
    flat = build_ursa_inputs(model, txt, codes.flatten(1), shape)
    assert torch.equal(flat.input_ids, inputs.input_ids)


def test_the_slice_holds_each_tokens_own_logits():
    """Logits that carry their position and column in their value."""
    n, k, length = 6, 4, 3
    logits = (torch.arange(length + 1 + n)[:, None] * 100 + torch.arange(9)[None]).float()[None]
    got = extract_visual_logits(logits, n, k)
    for i in range(n):  # token i sits at length + 1 + i and is predicted one earlier; codes are the last k of 9 columns
        assert got[0, i].tolist() == [100 * (length + i) + 5 + c for c in range(k)]


def test_last_positions_only_are_the_same_logits(model):
    inputs = build_ursa_inputs(model, torch.tensor([[0, 1]]), torch.tensor([[0, 1, 2, 3]]), (1, 2, 2))
    whole, last = model(inputs.input_ids, inputs.rope_pos), model(inputs.input_ids, inputs.rope_pos, last=5)
    assert torch.allclose(whole[:, -5:], last, atol=1e-6)


def test_bad_input_is_refused_in_a_sentence(model):
    txt, codes = torch.zeros(1, 2, dtype=torch.long), torch.zeros(1, 4, dtype=torch.long)
    with pytest.raises(DimoError, match=r"visual_tokens must have shape \(1, 4\), got \(1, 3\)"):
        build_ursa_inputs(model, txt, codes[:, :3], (1, 2, 2))
    with pytest.raises(DimoError, match=r"visual_tokens must lie in \[0, 5\)"):
        build_ursa_inputs(model, txt, codes + 5, (1, 2, 2))
    with pytest.raises(DimoError, match=r"txt_ids must lie in \[0, 7\)"):
        build_ursa_inputs(model, txt - 1, codes, (1, 2, 2))
    with pytest.raises(DimoError, match="txt_ids must have shape"):
        build_ursa_inputs(model, txt[0], codes, (1, 2, 2))
    with pytest.raises(DimoError, match="latents_shape must be three positive numbers"):
        build_ursa_inputs(model, txt, codes, (2, 2))
    with pytest.raises(DimoError, match=r"at least num_visual_tokens \+ 1 = 9 positions"):
        extract_visual_logits(torch.zeros(1, 8, 5), 8, 5)
    with pytest.raises(DimoError, match="at least codebook_size = 6 columns"):
        extract_visual_logits(torch.zeros(1, 8, 5), 4, 6)
    with pytest.raises(DimoError, match=r"rope_pos must have shape \(3, 3\)"):
        model(torch.zeros(1, 3, dtype=torch.long), torch.zeros(4, 3))


@pytest.mark.parametrize(
    ("size", "sentence"),
    [
        ((18, 256, 256), "num_frames .* 17 or 21"),
        ((17, 250, 256), "height .* 248 or 256"),
        ((17, 256, 4), "width .* 8"),
    ],
)
def test_wrong_sizes_name_the_nearest_right_ones(size, sentence):
    with pytest.raises(DimoError, match=sentence):
        latents_shape_for(*size)
