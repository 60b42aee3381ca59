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
GUIDANCE, STEPS, SEED = (1, 3, 7), 12, 4
MARGIN = 4e-6  # between a number and the border of two codes: float32 moves the borders by 1e-6
README = """\
A student that dimo trained for two steps on `../tiny-ursa`, with the default gains, and what URSA's own classes
(baaivision/URSA at 29284bb, transformers 4.57.6, diffusers 0.39.0, CPU, float32) make of it: `../record_student.py`.

- `student.pt`: as `checkpoints/final` holds it; URSA's transformer loads it with `strict=True`.
- `recorded.safetensors`, of URSA's pipeline for two prompts of 12 tokens and 2x3x4 codes, in one step but for `steps`:
  - `x_init (B,N)`: its noise; `u (B,N)`: the uniform numbers that draw the codes, as inverse of the cumulated
    probabilities in float64 where URSA calls `multinomial`.
  - `input_ids (2B,S)`, `rope_pos (S,3)`, `visual_logits (2B,N,K)`: its transformer's call under guidance, conditional
    rows first.
  - `codes.W (B,N)` for guidance W = 1, 3, 7: what it returned.
  - `steps.codes (13,B,N)`: of the folder's own transformer, before each of 12 steps under guidance 3 and at the end,
    with its codebook in float32; `steps.u`, `steps.whether`, `steps.where`: the numbers that draw x_1, whether a token
    jumps, and where to (0 where it does not).
  - `levels.decoded`, `levels.bytes`: values from -1.2 to 1.2, and their 8 bits by URSA's image processor.
  - `frames.bytes (B,F,height,width,3)`: the same of `frames` in `../tiny-ursa/recorded.safetensors`.
"""


def train(folder: Path) -> None:
    """`student.pt` of two steps of training."""
    from dimo.config import load_config
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


class Draws:
    """In the place of the `multinomial` of a pipeline's scheduler, whose numbers only its own code could use."""

    def __init__(self, pipeline, seed: int):
        self.generator, self.used = torch.Generator().manual_seed(seed), []
        pipeline.scheduler.path.categorical = self

    def __call__(self, prob: torch.Tensor) -> torch.Tensor:
        u = torch.rand(prob.shape[:-1], dtype=torch.float64, generator=self.generator)
        self.used.append(u)
        below = prob.double().cumsum(-1)
        below, u = below / below[..., -1:], u.unsqueeze(-1)
        if ((below - u).abs() < MARGIN).any():
            raise SystemExit("a number lies on the border between two codes: take another seed")
        return (below < u).sum(-1)


def record_steps(pipeline) -> dict[str, torch.Tensor]:
    """The teacher's codes on its way through `STEPS` steps, the last of them unguided, and what decided there."""
    from diffnext.schedulers.scheduling_dfm import MetricDiscreteProbPath

    from dimo.ursa.upstream import record_calls

    own, config = pipeline.scheduler.path, pipeline.transformer.config
    pipeline.scheduler.path = MetricDiscreteProbPath(own.emb.float(), own.alpha, own.c, own.eps)  # not its float16
    draws = Draws(pipeline, seed=SEED)
    calls, last = record_calls(
        pipeline, seed=3, prompt=PROMPTS, num_inference_steps=STEPS, guidance_scale=3, **SETTINGS
    )  # fmt: skip
    n = last[0].numel()
    codes = [call.input_ids[: len(PROMPTS), -n:] - config.lm_vocab_size for call in calls] + [last.flatten(1)]
    same = torch.Generator().manual_seed(3)  # as its own, whose first numbers are the noise
    torch.empty_like(last).random_(to=pipeline.scheduler.codebook_size, generator=same)
    recorded = {"steps.codes": torch.stack(codes), "steps.u": torch.stack(draws.used[::2])}
    recorded["steps.whether"] = torch.stack([torch.empty(codes[0].shape).uniform_(generator=same) for _ in calls[1:]])
    where = recorded["steps.whether"].double() * 0
    for row, now, then, used in zip(where, codes, codes[1:], draws.used[1::2]):
        row[now != then] = used  # it draws for those alone that jump, always to another code
    return recorded | {"steps.where": where}


def record(student: Path) -> dict[str, torch.Tensor]:
    """Everything in recorded.safetensors, by URSA's classes."""
    from diffnext.image_processor import VaeImageProcessor
    from diffnext.pipelines import URSAPipeline

    from dimo.ursa.upstream import bridge, record_calls

    bridge()
    pipeline = URSAPipeline.from_pretrained(str(TINY), torch_dtype=torch.float32)
    recorded = record_steps(pipeline)
    pipeline.transformer.load_state_dict(torch.load(student, weights_only=True), strict=True)
    for scale in GUIDANCE:
        draws = Draws(pipeline, seed=1)
        calls, codes = record_calls(pipeline, prompt=PROMPTS, num_inference_steps=1, guidance_scale=scale, **SETTINGS)
        recorded |= {f"codes.{scale}": codes.flatten(1), "u": draws.used[0]}
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
