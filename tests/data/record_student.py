"""Record what URSA's own classes make of a student of dimo's: `python record_student.py FOLDER`.

Needs diffnext. tests/data/tiny-student was written by it: student.pt by `dimo train` on tests/data/tiny-ursa, and
recorded.safetensors by URSA's transformer, pipeline and image processor with that student (its README.md tells the
keys). tests/test_golden.py holds dimo against the recorded values, tests/test_upstream.py the recorded against URSA.
"""

import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

TINY = Path(__file__).parent / "tiny-ursa"
PROMPTS = ["a red ball", "two dogs jump over a wall"]
SETTINGS = {"num_frames": 2, "height": 6, "width": 8, "max_prompt_length": 12}
GUIDANCE = (1, 3, 7)
README = """\
A student that dimo trained for two steps on `../tiny-ursa`, with the default gains, and what URSA's own classes
(baaivision/URSA at 29284bb, transformers 4.57.6, diffusers 0.39.0, CPU, float32) make of it: `../record_student.py`.

- `student.pt`: as `checkpoints/final` holds it; URSA's transformer loads it with `strict=True`.
- `recorded.safetensors`, of one step of URSA's pipeline for two prompts of 12 tokens and 2x3x4 codes:
  - `x_init (B,N)`: its noise; `u (B,N)`: the uniform numbers that draw the codes, as inverse of the cumulated
    probabilities in float64 where URSA calls `multinomial`.
  - `input_ids (2B,S)`, `rope_pos (S,3)`, `visual_logits (2B,N,K)`: its transformer's call under guidance, conditional
    rows first.
  - `codes.W (B,N)` for guidance W = 1, 3, 7: what it returned.
  - `levels.decoded`, `levels.bytes`: values from -1.2 to 1.2, and their 8 bits by URSA's image processor.
  - `frames.bytes (B,F,height,width,3)`: the same of `frames` in `../tiny-ursa/recorded.safetensors`.
"""


def train(folder: Path) -> None:
    """`student.pt` of two steps of training."""
    from dimo.train.config import load_config
    from dimo.train.trainer import Trainer

    with tempfile.TemporaryDirectory() as scratch:
        captions = Path(scratch) / "captions.txt"
        captions.write_text("\n".join(PROMPTS))
        sizes = {"num_frames": 5, "height": 8, "width": 8, "max_prompt_length": 12}  # multiples of URSA's strides
        Trainer(load_config("smoke", [
            *(f"distill.{key}={value}" for key, value in sizes.items()),
            f"distill.teacher_ckpt={TINY}", f"distill.prompt_source={captions}", "model.device=cpu",
            f"experiment.output_dir={scratch}/run", "training.max_train_steps=2", "distill.batch_size_per_gpu=2",
            "optim.lr=0.01", "experiment.student_dtype=float16",
        ])).train(progress=False)  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "student.pt").write_bytes((Path(scratch) / "run/checkpoints/final/student.pt").read_bytes())


def record(student: Path) -> dict[str, torch.Tensor]:
    """Everything in recorded.safetensors, by URSA's classes."""
    from diffnext.image_processor import VaeImageProcessor
    from diffnext.pipelines import URSAPipeline

    from dimo.ursa.upstream import bridge, record_calls

    bridge()
    pipeline = URSAPipeline.from_pretrained(str(TINY), torch_dtype=torch.float32)
    pipeline.transformer.load_state_dict(torch.load(student, weights_only=True), strict=True)
    recorded = {"u": torch.rand(len(PROMPTS), 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1))}

    def inverse(prob: torch.Tensor) -> torch.Tensor:
        """In the place of its `multinomial`, whose numbers only its own code could use."""
        below, u = prob.double().cumsum(-1), recorded["u"][..., None]
        if (below / below[..., -1:] - u).abs().min() < 1e-6:
            raise SystemExit("a number lies on the border between two codes: take another seed")
        return (below / below[..., -1:] < u).sum(-1)

    pipeline.scheduler.path.categorical = inverse
    for scale in GUIDANCE:
        calls, codes = record_calls(
            pipeline, prompt=PROMPTS, num_inference_steps=1, guidance_scale=scale, **SETTINGS
        )  # fmt: skip
        recorded[f"codes.{scale}"] = codes.flatten(1)
    ids, n = calls[0].input_ids, codes[0].numel()
    recorded |= {"input_ids": ids, "rope_pos": calls[0].rope_pos, "visual_logits": calls[0].logits[:, -(n + 1) : -1]}
    recorded["x_init"] = ids[: len(PROMPTS), -n:] - pipeline.transformer.config.lm_vocab_size

    steps = torch.arange(256) / 127.5 - 1  # every level, and the next numbers on both sides of it
    around = [steps, steps.nextafter(torch.tensor(2.0)), steps.nextafter(torch.tensor(-2.0))]
    levels = torch.cat([*around, torch.linspace(-1.2, 1.2, 768)]).view(1, 3, 1, 16, 32)
    frames = load_file(TINY / "recorded.safetensors")["frames"]
    eight_bits = VaeImageProcessor().postprocess
    recorded |= {"levels.decoded": levels, "levels.bytes": torch.from_numpy(eight_bits(levels, "np"))}
    recorded["frames.bytes"] = torch.from_numpy(eight_bits(frames, "np"))
    return {key: value.contiguous() for key, value in recorded.items()}


if __name__ == "__main__":
    target = Path(sys.argv[1])
    train(target)
    save_file(record(target / "student.pt"), target / "recorded.safetensors")
    (target / "README.md").write_text(README)
