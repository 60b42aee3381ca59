"""How far the metrics of `dimo evaluate` can be trusted: their rank correlation with a world's oracle.

`python scripts/trust.py OUT` trains students in several ways, keeps each at several steps, damages the videos of the
student that ships, measures all of them by the metrics and by the oracle, and writes OUT/trust.json and OUT/trust.md.
The same command goes on where it was stopped. What ships is copied: `cp OUT/trust.json dimo/evaluation/trust.json`.
It keeps the other worlds of that file: `python scripts/trust.py OUT --preset tiles distill.teacher_ckpt=FOLDER`.
Of a world without a student that ships, the videos of its teacher are damaged; its few-pass videos are students, too.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from dimo.config import Config, device_of, load_config
from dimo.errors import DimoError
from dimo.evaluation import judging, trust
from dimo.evaluation.decoding import in_pixels
from dimo.evaluation.metrics import JUDGED, REFERENCE_FREE, measure
from dimo.evaluation.reference_free import pass_entropy
from dimo.evaluation.videos import Videos
from dimo.files import write_text
from dimo.run.signals import PREEMPTED, Preempted
from dimo.train.together import train_and_compare
from dimo.train.trainer import Trainer
from dimo.ursa import load_ursa, sample
from dimo.ursa.loading import load_student
from dimo.ursa.sampler import videos_at_once
from dimo.worlds import SHIPPED_STUDENT, checkpoint_folder, load_world
from dimo.worlds.exact import exact_teacher
from dimo.worlds.oracle import coverage, score
from dimo.worlds.protocol import Scores, prompt_index, prompt_length, prompts_to_score, title_of

ARMS = {  # good ones, and what is known to be slow, blurred or to collapse
    "recipe": [],
    "fast auxiliary": ["optim.lr=2e-4"],  # whose rate in Muon is muon_lr * aux_lr / lr
    "high rate": ["optim.lr=1e-2", "optim.muon_lr=5e-2"],
    "gain 1": ["model.logit_gain=1", "model.final_logit_gain=1"],
    "reinforce": ["distill.estimator=reinforce"],
}
ORACLE = ("token_accuracy", "right_prompt", "coverage", trust.BOTH)
HEALTHY = 0.5  # the oracle's coverage of a student that has not collapsed
KNOWN = REFERENCE_FREE | JUDGED
STEPS = 25  # of the teacher
FEWER = (2, 4, 8)  # passes of the teacher where no student ships


def runs_of(args) -> dict[str, Config]:
    """{family: the configuration of its run}."""
    words = [
        "experiment.sample_every=1000000", "experiment.save_every=1000000", f"training.max_train_steps={args.steps}",
        f"experiment.keep_every={args.steps // args.kept}", f"distill.batch_size_per_gpu={args.batch}", *args.overrides,
    ]  # fmt: skip
    return {
        f"{arm}, seed {seed}": load_config(
            args.preset,
            [*words, *more, f"experiment.seed={seed}", f"experiment.output_dir={args.out / slug(arm, seed)}"],
        )
        for arm, more in ARMS.items()
        for seed in range(1, args.seeds + 1)
    }


def slug(arm: str, seed: int) -> str:
    return f"{arm.replace(' ', '-')}-{seed}"


class Bench:
    """The prompts and the teacher of a world, beside which students are measured."""

    def __init__(self, args):
        config = load_config(args.preset, args.overrides)
        folder, device = checkpoint_folder(config.distill.teacher_ckpt), device_of(config)
        self.world, self.ursa, self.judged = load_world(folder), load_ursa(folder, device), args.judged
        self.prompts, self.grid, self.device = prompts_to_score(self.world), self.world.latents_shape, device
        d, exact = config.distill, config.distill.teacher == "exact"
        self.network = exact_teacher(folder, self.ursa.path) if exact else self.ursa.transformer
        self.batch = config.evaluation.batch_size or videos_at_once(math.prod(self.grid), device)
        self.guidance = {"guidance_scale": d.guidance_scale, "guidance_trunc": d.guidance_trunc}
        ships = folder / SHIPPED_STUDENT.name
        self.ships = ships if ships.is_dir() else None
        length = prompt_length(self.world)
        self.ids, self.empty = self.ursa.tokenize(self.prompts, length), self.ursa.tokenize([""], length)
        self.choices = self.ids[judging.choices(len(self.prompts))]
        self.teacher = self.videos(self.draw(None, STEPS, 1, self.judged), self.judged, None)

    def draw(self, network, steps: int, seed: int, copies: int) -> torch.Tensor:
        """Codes (P, V, N) of a student, or of the teacher, None."""
        guide = self.guidance if network is None else {}
        g, made = torch.Generator(self.device).manual_seed(seed), []
        for ids in self.ids.repeat_interleave(copies, 0).split(self.batch):
            how = {"generator": g, "uncond_ids": self.empty.expand_as(ids), **guide}
            made.append(sample(network or self.network, self.ursa.path, ids, self.grid, steps, **how).cpu())
        return torch.cat(made).view(len(self.prompts), copies, -1)

    def videos(self, codes: torch.Tensor, copies: int, network) -> Videos:
        """Codes (P, V, N), judged by the teacher as in an evaluation, of which the first few of each prompt."""
        some = codes[:, : self.judged].flatten(0, 1).to(self.device)
        choice_ids, noise = self.choices.repeat_interleave(self.judged, 0), torch.Generator(self.device).manual_seed(9)
        judged = judging.judge(self.ursa, some, choice_ids, self.empty, self.grid, noise, **self.guidance)
        judged |= in_pixels(self.ursa, some.view(-1, *self.grid))
        if network is not None:
            x_init = torch.randint(
                self.ursa.path.codebook_size, some.shape, device=self.device, generator=noise.manual_seed(3)
            )
            judged["entropy"] = pass_entropy(network, choice_ids[:, 0], x_init, self.grid).mean(1)
        asked = [prompt for prompt in self.prompts for _ in range(copies)]
        decoding = judged.pop("decode_seconds").item()
        judged = {name: value.cpu() for name, value in judged.items()}
        return Videos(codes.reshape(-1, *self.grid), asked, copies, 1.0, None, self.ursa.path, judged,
                      decode_seconds=decoding)  # fmt: skip

    def measure(self, codes: torch.Tensor, network=None) -> dict:
        """The metrics of a student's codes (P, V, N), and what the oracle says of them."""
        videos = self.videos(codes, codes.shape[1], network)
        videos.reference = self.teacher
        scores = score(self.world, codes.flatten(0, 1).to(self.device), videos.prompts)
        return {"metrics": measure(videos), "oracle": self.oracle(scores, codes.shape[1])}

    def oracle(self, scores: Scores, copies: int) -> dict[str, float]:
        """Figures that bad students have as well, all about the nearest valid video of any prompt.

        token_accuracy: the share of equal tokens. right_prompt: how often it is of the prompt asked for; unlike
        adherence, which a plain video has for many prompts, ties count for one of them. coverage: that of its free
        factors within a prompt, whatever the video's quality.
        """
        right = scores.prompt.view(len(self.prompts), copies) == prompt_index(self.world, self.prompts)[:, None]
        found = {"token_accuracy": scores.accuracy.mean().item(), "right_prompt": right.float().mean().item()}
        free = {name: some for name, some in scores.free.items() if some[1] > 1}
        most = max(bins for _, bins in free.values())
        if copies < most:
            raise DimoError(f"--videos must be at least {most}, as many as a free factor has values, got {copies}")
        covered = [
            sum(coverage(one, bins) or 0.0 for one in labels.view(-1, copies)) / len(self.prompts)
            for labels, bins in free.values()
        ]
        found["coverage"] = max(0.0, min(covered))  # the estimate of an entropy of 0 may be below it
        return found | {trust.BOTH: found["token_accuracy"] * found["coverage"]}


def failures(good: torch.Tensor, grid: tuple[int, int, int], codes: int) -> dict[str, dict[str, torch.Tensor]]:
    """{family: {name: codes}} made of a good student's codes (P, V, N), each in several degrees."""
    p, v, n = good.shape
    g = torch.Generator().manual_seed(0)
    frames = good.view(p, v, *grid)

    def some(share: float, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.rand(shape, generator=g) < share

    def mixed(share: float, bad: torch.Tensor, by: tuple[int, ...] = (p, v, 1)) -> torch.Tensor:
        return torch.where(some(share, by), bad, good)

    shares = (0.25, 0.5, 1.0)
    late = frames[:, :, [0, *range(grid[0] - 1)]].reshape(p, v, n)
    kinds = {
        "collapsed": (good[:, :1].expand_as(good), shares),
        "ignores the prompt": (good.roll(5, 0), shares),
        "static": (frames[:, :, :1].expand_as(frames).reshape(p, v, n), shares),
        "off by a frame": (late, shares),
        "one video for all": (good[:1, :1].expand_as(good), (0.5, 1.0)),
    }
    made = {
        name: {f"{name}, {share:.0%}": mixed(share, bad) for share in degrees} for name, (bad, degrees) in kinds.items()
    }
    noise = torch.randint(codes, good.shape, generator=g)
    made["noisy"] = {f"noisy, {share:.0%}": mixed(share, noise, (p, v, n)) for share in (0.02, 0.1, 0.3)}
    return made


def measure_all(args, runs: dict[str, Config]) -> list[dict]:
    """A row for every student; those in OUT/rows.json are not measured again."""
    file, rows = args.out / "rows.json", dict[str, dict]()
    if file.exists():
        rows = json.loads(file.read_text(encoding="utf-8"))
    networks: dict[str, tuple[str, Path | None]] = {}
    for family, config in runs.items():
        for folder in sorted(Path(config.experiment.output_dir, "checkpoints").glob("milestone-*")):
            networks[f"{family}, step {int(folder.name.split('-')[1])}"] = family, folder
    bench, found = Bench(args), list[dict]()
    networks |= ({"ships": ("ships", bench.ships)} if bench.ships else {}) | {"untrained": ("untrained", None)}

    def add(name: str, family: str, codes: Callable[[], torch.Tensor], network=None) -> None:
        if name not in rows:
            about = {"family": family, "one_pass": network is not None}
            rows[name] = about | bench.measure(codes(), network)
            write_text(file, json.dumps(rows))
            print(name, {k: round(v, 3) for k, v in rows[name]["oracle"].items()}, file=sys.stderr, flush=True)
        found.append(rows[name])

    for name, (family, folder) in networks.items():
        network = load_student(bench.ursa, folder) if folder else bench.ursa.transformer
        try:
            add(name, family, lambda: bench.draw(network, 1, 1, args.videos), network)  # noqa: B023
        except DimoError as error:  # a rate that is too high may end in logits that are not finite
            print(f"{name} is left out: {error}", file=sys.stderr)
    if bench.ships:
        good = bench.draw(load_student(bench.ursa, bench.ships), 1, 1, args.videos)
    else:
        good = bench.draw(None, STEPS, 3, args.videos)
        add(f"teacher, {STEPS} passes", "teacher", lambda: good)
        for passes in FEWER:
            add(f"teacher, {passes} passes", "teacher", lambda: bench.draw(None, passes, 3, args.videos))  # noqa: B023
    for family, made in failures(good, bench.grid, bench.world.codebook_size).items():
        for name, codes in made.items():
            add(name, family, lambda: codes)  # noqa: B023
    return found


def correlations(rows: list[dict]) -> dict[str, dict]:
    """{metric: its correlation with the figure that it stands for, and with each of the oracle's}.

    "healthy": that of trained students which have not collapsed, among which checkpoints are chosen.
    """
    found = {}
    for name, oracle in trust.STANDS_FOR.items():
        some = [row for row in rows if row["metrics"].get(name) is not None]
        by = {figure: _correlation(some, name, figure) for figure in ORACLE}
        own = by[oracle]
        if own:
            healthy = [row for row in some if row["one_pass"] and row["oracle"]["coverage"] >= HEALTHY]
            found[name] = {"oracle": oracle} | own | {
                "healthy": _correlation(healthy, name, oracle), "with": {f: c and c["rho"] for f, c in by.items()},
            }  # fmt: skip
    return found


def _correlation(rows: list[dict], name: str, figure: str) -> dict | None:
    values = [trust.goodness(KNOWN[name].better, row["metrics"][name]) for row in rows]
    return trust.correlation(values, [row["oracle"][figure] for row in rows], [row["family"] for row in rows])


def table(found: dict[str, dict]) -> str:
    heads = ["metric", "stands for", "rank correlation", "healthy students", *(f"with {figure}" for figure in ORACLE)]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for name, row in sorted(found.items(), key=lambda item: -item[1]["rho"]):
        weak = "weak: " if round(row["rho"], 2) < trust.WEAK else ""
        others = ["-" if rho is None else f"{rho:.2f}" for rho in row["with"].values()]
        cells = [f"`{name}`", row["oracle"], weak + _cell(row), _cell(row["healthy"]), *others]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(row: dict | None) -> str:
    return f"{row['rho']:.2f} [{row['interval'][0]:.2f}, {row['interval'][1]:.2f}]" if row else "-"


def command(args) -> str:
    """What was typed, with names in place of this machine's paths."""
    words, teacher = ["OUT" if Path(word) == args.out else word for word in sys.argv[1:]], "distill.teacher_ckpt="
    return " ".join(["python scripts/trust.py"] + [f"{teacher}FOLDER" if teacher in word else word for word in words])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--preset", default="shapes", help="of all trainings; it names the world")
    parser.add_argument("--steps", type=int, default=280, help="of each training")
    parser.add_argument("--kept", type=int, default=7, help="students kept of each training")
    parser.add_argument("--batch", type=int, default=16, help="samples of a step")
    parser.add_argument("--seeds", type=int, default=1, help="trainings of each arm")
    parser.add_argument("--videos", type=int, default=32, help="videos of each prompt")
    parser.add_argument("--judged", type=int, default=4, help="of them, and as many of the teacher's beside them")
    parser.add_argument("--together", type=int, default=1, help="trainings side by side")
    parser.add_argument("overrides", nargs="*", help="key=value of all trainings, such as training.cuda_graph=true")
    args = parser.parse_intermixed_args()
    runs = runs_of(args)
    left = [c for c in runs.values() if not Path(c.experiment.output_dir, "checkpoints", "final").is_dir()]
    for i in range(0, len(left), args.together):
        train_and_compare([Trainer(config) for config in left[i : i + args.together]])
    rows = measure_all(args, runs)
    found = correlations(rows)
    world = load_world(checkpoint_folder(load_config(args.preset, args.overrides).distill.teacher_ckpt))
    about = {"command": command(args), "students": len(rows), "families": len({row["family"] for row in rows})}
    worlds = trust.worlds() | {title_of(world): about | {"metrics": found}}
    write_text(args.out / "trust.json", json.dumps({"worlds": worlds}, indent=1) + "\n")
    write_text(args.out / "trust.md", table(found))
    print(
        table(found) + f"{about['students']} students of {about['families']} families; written: {args.out}/trust.json"
    )


if __name__ == "__main__":
    try:
        main()
    except Preempted as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(PREEMPTED)
