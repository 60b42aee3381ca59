"""Measure the effect of guiding a student a second time, after the teacher's guidance was distilled into it.

`python scripts/guidance.py` samples the shipped student on 48 prompts x 64 videos, with the noise of `dimo evaluate`.
"""

import argparse

import torch

from dimo.evaluation.evaluate import format_cell
from dimo.evaluation.metrics import measure
from dimo.evaluation.videos import Videos
from dimo.ursa import load_ursa, sample
from dimo.ursa.loading import load_student
from dimo.worlds import DEFAULT_WORLD, SHIPPED_STUDENT, checkpoint_folder, load_world
from dimo.worlds.oracle import score

VIDEOS, SEED, BATCH = 64, 1234, 512
SCALES = (1.0, 1.5, 2.0, 3.0, 7.0)


def one_pass(ursa, network, grid, ids, **guidance) -> torch.Tensor:
    """Codes (B, N) for prompts ids (B, L), with the same noise and random draws in every call."""
    parts = []
    for i, some in enumerate(ids.split(BATCH)):
        g = torch.Generator().manual_seed(SEED * 1_000_003 + i)
        parts.append(sample(network, ursa.path, some, grid, 1, shift=ursa.shift, generator=g, **guidance))
    return torch.cat(parts)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    folder = checkpoint_folder(DEFAULT_WORLD)
    world, ursa = load_world(folder), load_ursa(folder)
    student, grid = load_student(ursa, SHIPPED_STUDENT), world.latents_shape
    prompts = [prompt for prompt in world.prompts for _ in range(VIDEOS)]
    ids = ursa.tokenize(prompts, 4)
    empty = ursa.tokenize([""], 4).expand(BATCH, -1)
    made = {f"guidance {w:g}": one_pass(ursa, student, grid, ids, guidance_scale=w, uncond_ids=empty) for w in SCALES}
    made["at the empty prompt"] = one_pass(ursa, student, grid, empty.repeat(len(ids) // BATCH, 1))
    print(f"{'student, 1 pass':24}{'validity':>12}{'adherence':>12}{'coverage':>12}")
    for name, codes in made.items():
        videos = Videos(codes.view(-1, *grid), prompts, VIDEOS, seconds=0.0, scores=score(world, codes, prompts))
        row = measure(videos) | {"intervals": {}}
        print(f"{name:24}" + "".join(f"{format_cell(row, key):>12}" for key in ("validity", "adherence", "coverage")))


if __name__ == "__main__":
    main()
