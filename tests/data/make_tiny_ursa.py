"""Write a small checkpoint with URSA's own classes, and what they make of it: `python make_tiny_ursa.py FOLDER`.

Needs diffnext. tests/data/tiny-ursa was written by it; tests/test_upstream.py writes one with 64,000 codes and a video
VAE.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

TEXT, BOV, VIDEO_CODES = 272, 3, 64_000
PROMPTS = ["a red ball", "Überraschung: 猫, 2 dogs & a cat that jump over the wall"]


def tokenizer():
    """Byte-level BPE of 272 entries whose first four are special; BOV is <|vision_start|>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=TEXT, special_tokens=special, initial_alphabet=alphabet)
    bpe.train_from_iterator(["a red ball and a dog that jump over the wall"] * 9, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=special[0], pad_token=special[0], padding_side="left"
    )  # fmt: skip


def make(folder: Path, codes: int = 240) -> Path:
    """A whole folder in float16: video VAE where codes is 64,000, else an image VAE (strides 1 and 2)."""
    from diffnext.models.autoencoders.autoencoder_vq import AutoencoderVQ
    from diffnext.models.autoencoders.autoencoder_vq_cosmos3d import AutoencoderVQCosmos3D
    from diffnext.models.transformers.transformer_ursa import URSATransformer3DModel
    from diffnext.pipelines import URSAPipeline
    from diffnext.schedulers.scheduling_dfm import KineticOptimalScheduler

    torch.manual_seed(0)
    transformer = URSATransformer3DModel(
        hidden_size=16, intermediate_size=32, num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=2,
        max_window_layers=2, vocab_size=TEXT + codes, lm_vocab_size=TEXT, lm_head_size=codes, bov_token_id=BOV,
    )  # fmt: skip
    with torch.no_grad():  # as they start, small and norms at one, weights would hide a wrong order of norm and matrix
        for name, p in transformer.named_parameters():
            p.normal_(1.0, 0.2) if "norm" in name else p.normal_(std=0.5 * p.shape[-1] ** -0.5)
    transformer.lm_head.weight.data *= 8
    if codes == VIDEO_CODES:
        vae = AutoencoderVQCosmos3D(
            block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, num_vq_embeddings=codes
        )  # fmt: skip
    else:
        vae = AutoencoderVQ(
            block_out_channels=(32, 32), latent_channels=4, layers_per_block=1, num_vq_embeddings=codes,
            vq_embed_dim=4, temporal_stride=1, spatial_stride=2,
        )  # fmt: skip
    scheduler = KineticOptimalScheduler(alpha=0.9, c=3.0)
    pipeline = URSAPipeline(transformer, scheduler, vae, tokenizer()).to(dtype=torch.float16)
    pipeline.save_pretrained(folder)
    index = {"_class_name": "URSAPipeline"}
    for name in ("transformer", "scheduler", "vae"):
        part = type(getattr(pipeline, name))
        index[name] = [part.__module__, part.__name__]
    index["tokenizer"] = ["transformers", "PreTrainedTokenizerFast"]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    torch.save({"path.emb": torch.randn(codes, 6).half()}, folder / "scheduler" / "scheduler_model.pth")
    return folder


def record(folder: Path) -> dict[str, torch.Tensor]:
    """What URSA's pipeline makes of the folder in float32: first and last call of 3 guided steps, and the frames."""
    from dimo.ursa.upstream import load_pipeline, record_calls

    pipeline = load_pipeline(folder)
    calls, latents = record_calls(
        pipeline, prompt=PROMPTS, num_frames=1, height=12, width=16, num_inference_steps=3, guidance_scale=3.0,
        max_prompt_length=24,
    )  # fmt: skip
    frames = pipeline.vae.decode(latents).sample
    recorded = {"latents": latents, "frames": frames.unsqueeze(2) if frames.dim() == 4 else frames}
    for i in (0, 2):
        call = calls[i]
        recorded |= {f"{i}.input_ids": call.input_ids, f"{i}.rope_pos": call.rope_pos, f"{i}.logits": call.logits}
    return {key: value.contiguous() for key, value in recorded.items()}


if __name__ == "__main__":
    target = make(Path(sys.argv[1]))
    save_file(record(target), target / "recorded.safetensors")
    (target / "README.md").write_text(
        "Random weights, written by URSA's own classes (baaivision/URSA at 29284bb) with `../make_tiny_ursa.py`.\n"
        f"`recorded.safetensors`: its pipeline's calls for the prompts {json.dumps(PROMPTS, ensure_ascii=False)}.\n"
    )
