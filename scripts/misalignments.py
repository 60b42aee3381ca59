"""Does the finder of misread logits slices name what is planted? `python scripts/misalignments.py [shapes] [tiles]`.

Misreadings are planted where training reads its logits, on batches of 64 clips that are drawn anew: on `shapes` with
its teacher, and on `tiles` videos of 1,280 tokens with a network of one layer that has seen 80 of them (forty steps,
seconds on a CPU). A line for each misreading says on how many batches it is named; the right slice may not be blamed.
The exit code is 1 if any verdict was wrong.
"""

from __future__ import annotations

import argparse
import collections
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from dimo.ursa import Ursa, inputs, load_ursa, predict
from dimo.views.alignment import find_misalignment
from dimo.views.reading import NEAR_DATA, slice_as_written
from dimo.worlds import checkpoint_folder, load_world
from dimo.worlds.teacher import TeacherRecipe, train_teacher, write_checkpoint
from dimo.worlds.tiles import TilesWorld

LONG = (5, 8, 32)  # 1,280 tokens, and height is not width
RECIPE = TeacherRecipe(layers=1, hidden=32, intermediate=32, heads=2, batch_size=2, steps=40, lr=1e-2)
PROMPT = 4  # text tokens
Slice = Callable[[torch.Tensor, int, int], torch.Tensor]


def planted(grid: tuple[int, int, int]) -> dict[str, Slice]:
    """{name that the finder should give it: a misread slice} for videos of this size; "right" is the right one.

    A pass gives logits from BOV on, so what is early is wrapped around.
    """

    def rolled(by: int, dim: int = 1) -> Slice:
        return lambda z, n, k: slice_as_written(z, n, k).roll(by, dim)

    def of_video(change: Callable[[torch.Tensor], torch.Tensor]) -> Slice:
        return lambda z, n, k: change(slice_as_written(z, n, k).unflatten(1, grid)).flatten(1, 3)

    _, height, width = grid
    return {
        "right": slice_as_written,
        "position late": lambda z, n, k: z[:, z.shape[1] - n :, -k:],
        "position early": rolled(1),
        "two positions early": rolled(2),
        "row late": rolled(-width),
        "frame early": rolled(height * width),
        "height and width exchanged": of_video(lambda z: z.transpose(2, 3)),
        "frames last": of_video(lambda z: z.permute(0, 2, 3, 1, 4)),
        "frames reversed": of_video(lambda z: z.flip(1)),
        "rows reversed": of_video(lambda z: z.flip(2)),
        "columns reversed": of_video(lambda z: z.flip(3)),
        "samples shifted": rolled(-1, 0),
        "ids +1": rolled(1, 2),
        "ids -1": rolled(-1, 2),
    }


class Remembered:
    """A network that is asked once for each input: what is planted comes after its pass."""

    def __init__(self, network):
        self.network, self.config, self.lm_head, self.known = network, network.config, network.lm_head, {}

    def _ask(self, function, input_ids: torch.Tensor, *more, **named):
        key = function, input_ids.numpy().tobytes()
        if key not in self.known:
            self.known[key] = function(input_ids, *more, **named)
        return self.known[key]

    def __call__(self, *given, **named):
        return self._ask(self.network.__call__, *given, **named)

    def hidden(self, *given):
        return self._ask(self.network.hidden, *given)


@torch.no_grad()
def found_in(ursa: Ursa, network, seed: int, t: float = NEAR_DATA, clips: int = 64, dense: bool = True) -> str | None:
    """What the finder finds through the slice that training reads through, on new clips."""
    world, g = load_world(ursa.folder), torch.Generator().manual_seed(seed)
    prompt, codes = world.draw(clips, g)
    txt_ids, x_t = ursa.tokenize([world.prompts[i] for i in prompt], PROMPT), ursa.path.sample(codes, t, g)
    one = predict(network, txt_ids, x_t, world.latents_shape, dense)
    return find_misalignment(one, codes, world.latents_shape).found


def verdicts(ursa: Ursa, seed: int) -> Iterator[tuple[str, str | None]]:
    """(what was planted, what was found) of every misreading on one batch."""
    network, right = Remembered(ursa.transformer), inputs.extract_visual_logits
    for name, slice_ in planted(load_world(ursa.folder).latents_shape).items():
        inputs.extract_visual_logits = slice_
        try:
            yield name, found_in(ursa, network, seed)
        finally:
            inputs.extract_visual_logits = right


def opened(name: str, folder: Path) -> Ursa:
    if name == "tiles":
        world = TilesWorld(*LONG, shades=3)
        write_checkpoint(folder, world, train_teacher(world, RECIPE, progress=False), RECIPE.alpha, RECIPE.c)
    ursa = load_ursa(folder if name == "tiles" else checkpoint_folder(name))
    ursa.transformer.requires_grad_(False)
    return ursa


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("worlds", nargs="*", metavar="WORLD", help="shapes or tiles (default: both)")
    parser.add_argument("--batches", type=int, default=20)
    parser.add_argument("--first", type=int, default=0, help="seed of the first batch")
    args = parser.parse_args()
    wrong = 0
    for name in args.worlds or ("shapes", "tiles"):
        with tempfile.TemporaryDirectory() as folder:
            ursa, found = opened(name, Path(folder) / name), collections.defaultdict(list)
            print(f"{name}: {args.batches} batches of 64 clips at t = {NEAR_DATA}", flush=True)
            for seed in range(args.first, args.first + args.batches):
                for what, verdict in verdicts(ursa, seed):
                    found[what].append(verdict or "undecided")
                named = sum(what == verdicts_of[-1] for what, verdicts_of in found.items())
                print(f"  batch {seed}: {named} of {len(found)} named", file=sys.stderr, flush=True)
        for what, named in found.items():
            counts = collections.Counter(named)
            others = "".join(f", {other} {n}" for other, n in counts.items() if other != what)
            print(f"  {what:28} named on {counts[what]} of {args.batches}{others}", flush=True)
            fine = counts[what] + (counts["undecided"] if what == "right" else 0)
            wrong += fine < args.batches
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
