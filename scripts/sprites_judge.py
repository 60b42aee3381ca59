"""What a teacher of the sprites world, or a student, has learnt.

python scripts/sprites_judge.py videos sprites                                              # the teacher that ships
python scripts/sprites_judge.py videos sprites --student sprites --passes 1 --guidance 1    # the student that ships
python scripts/sprites_judge.py videos FOLDER --student RUN --passes 1 --guidance 1         # those of your own
python scripts/sprites_judge.py words sprites                                               # what a word is worth
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from pathlib import Path

import torch

from dimo.evaluation.scored import coverage_detail
from dimo.ursa import load_ursa, predict, sample
from dimo.ursa.loading import load_student
from dimo.ursa.sampler import student_times
from dimo.views.sheets import video_sheet
from dimo.worlds import checkpoint_folder, load_world, student_of
from dimo.worlds.exact import exact_teacher
from dimo.worlds.oracle import score
from dimo.worlds.protocol import prompt_index, prompt_length
from dimo.worlds.sprite_frames import TIMES
from dimo.worlds.sprite_reader import agreement
from dimo.worlds.sprites import KINDS
from dimo.worlds.teacher import PAD, words

BACKWARDS = (1, 0, 3, 2, 4, 6, 5, 8, 7)  # the motion that each of MOTIONS is when its clips are played backwards
SHEET = Path("runs/sprites-judged.png")


@torch.no_grad()
def judge_videos(
    folder: str, weights: Path | None, passes: list[int], guidance: list[float], videos: int, exact: bool
) -> None:
    """Print what oracle and reader say of a teacher's, or a student's, videos of held-out prompts; write a sheet."""
    device, teacher = "cuda" if torch.cuda.is_available() else "cpu", checkpoint_folder(folder)
    ursa, world = load_ursa(teacher, device, torch.bfloat16 if device == "cuda" else torch.float32), load_world(teacher)
    network = load_student(ursa, weights) if weights else ursa.transformer
    network = exact_teacher(teacher, ursa.path) if exact else network
    asked = [prompt for prompt in world.held_out for _ in range(videos)]
    index, ids = prompt_index(world, asked), ursa.tokenize(asked, prompt_length(world)).to(device)
    print(f"{len(asked)} videos of {len(world.held_out)} held-out prompts by {'exact' if exact else weights or folder}")
    print(
        "passes guidance | valid adherent tokens | read as the prompt: sprite, motion, strength, texture, time, sure | "
        "coverage of places, phases | seconds"
    )
    shown = {}
    for steps, scale in itertools.product(passes, guidance):
        generator, begin = torch.Generator(device).manual_seed(0), time.perf_counter()
        made = [
            sample(
                network, ursa.path, part, world.latents_shape, student_times(ursa.path, steps) if weights else steps,
                generator=generator, guidance_scale=scale,
                uncond_ids=torch.full_like(part, words(world).index(PAD)),
            )
            for part in ids.split(256)
        ]  # fmt: skip
        codes = torch.cat(made)
        seconds, scores, right = time.perf_counter() - begin, score(world, codes, asked), agreement(world, codes, index)
        seen = torch.stack(list(right.values())).all(0)
        parts = " ".join(f"{x.float().mean():.3f}" for x in right.values())
        shares = [x.float().mean().item() for x in (scores.valid, scores.adherent, scores.accuracy)]
        detail = coverage_detail(scores, near=True)
        covered = [f"{detail[name]:.3f}" if detail[name] is not None else "none" for name in ("places", "phases")]
        print(
            f"{steps:6} {scale:8g} | {shares[0]:.3f} {shares[1]:8.3f} {shares[2]:6.3f} | "
            f"{seen.float().mean():18.3f}: {parts} | {covered[0]:>20}, {covered[1]} | {seconds:.1f}", flush=True,
        )  # fmt: skip
        few = codes[:: 5 * videos].cpu().view(-1, *world.latents_shape)
        shown[f"{steps} passes, guidance {scale:g}"] = world.decoder().decode(few)
    SHEET.parent.mkdir(exist_ok=True)
    video_sheet(shown, asked[:: 5 * videos]).savefig(SHEET, dpi=100)
    print(SHEET)


@torch.no_grad()
def judge_words(folder: str, clips: int, at: list[float], exact: bool) -> None:
    """Print by t how many nats of a clip are lost with one word of its prompt changed, and so what the word is worth.

    A motion is changed to the same one backwards; in the last row the first frame is clean but for t = .7.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ursa, world = load_ursa(checkpoint_folder(folder), device), load_world(checkpoint_folder(folder))
    network = exact_teacher(checkpoint_folder(folder), ursa.path) if exact else ursa.transformer
    ids, generator = ursa.tokenize(world.prompts, prompt_length(world)).to(device), torch.Generator(device)
    directed = torch.tensor([i for i, p in enumerate(world.prompts) if "bouncing" not in p], device=device)
    index = directed[torch.randint(len(directed), (clips,), generator=generator.manual_seed(1), device=device)]
    prompt, start, phase = world.choose(clips, generator, index)
    x_1, (emoji, kind, behind) = world.render(prompt, start, phase), world.attributes(prompt)
    backwards = torch.tensor(BACKWARDS, device=device)[kind // 2] * 2 + kind % 2

    def changed(emoji=emoji, kind=kind, behind=behind):
        return (emoji * KINDS + kind) * world.backgrounds + behind

    times = behind // len(TIMES) * len(TIMES) + (behind + 1) % len(TIMES)
    asked = {
        "": prompt,
        "sprite": changed(emoji=(emoji + 1) % world.sprites),
        "direction": changed(kind=backwards),
        "strength": changed(kind=kind ^ 1),
        "texture": changed(behind=(behind + len(TIMES)) % world.backgrounds),
        "time": changed(behind=times),
    }
    print(f"{clips} clips; nats of a clip by {'exact' if exact else folder}, and more of them with a word changed")
    print("t            right" + "".join(f"{word:>10}" for word in list(asked)[1:]))
    first = math.prod(world.latents_shape[1:])
    for t, clean in [*((t, False) for t in at), (at[0], True)]:
        noised = torch.full(x_1.shape, t, device=device)
        noised[:, : first * clean] = 0.7
        x_t, nats = ursa.path.sample(x_1, noised, generator.manual_seed(2)), []
        for prompts in asked.values():
            parts = zip(*(x.split(16) for x in (ids[prompts], x_t, noised, x_1)))
            log_p = [predict(network, i, x, world.latents_shape, t=s).log_prob(y) for i, x, s, y in parts]
            nats.append(-torch.cat(log_p)[:, first * clean :].sum(1).mean().item())
        shown = "".join(f"{value - nats[0]:10.1f}" for value in nats[1:])
        print(f"{t:4}{'+ frame' if clean else '':8} {nats[0]:7.1f}{shown}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)
    videos, words_ = actions.add_parser("videos"), actions.add_parser("words")
    for one in (videos, words_):
        one.add_argument("folder", help="a teacher: a folder, or sprites for the one that ships")
        one.add_argument("--exact", action="store_true", help="the exact posterior in place of its transformer")
    videos.add_argument("--student", help="a run, a student's folder, or sprites for the one that ships")
    videos.add_argument("--passes", type=int, nargs="+", default=[25])
    videos.add_argument("--guidance", type=float, nargs="+", default=[1.0, 2.0, 3.0])
    videos.add_argument("--videos", type=int, default=16, help="of every held-out prompt")
    words_.add_argument("--clips", type=int, default=64)
    words_.add_argument("--at", type=float, nargs="+", default=[0.3, 0.4, 0.5, 0.6], help="times t")
    args = parser.parse_args()
    if args.action == "words":
        judge_words(args.folder, args.clips, args.at, args.exact)
    else:
        student = student_of(args.student) or Path(args.student) if args.student else None
        judge_videos(args.folder, student, args.passes, args.guidance, args.videos, args.exact)


if __name__ == "__main__":
    main()
