"""`dimo sample --suite`: what VBench or GenEval scores, made by one or several processes, each on its own GPU.

OUT/videos or OUT/images   what the scorer is given
OUT/settings.json          how they were made, with the seed of each
OUT/records/               one JSON file per finished sample, with its size and checksum
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

import torch

import dimo
from dimo.commands.sample import Request, Sampler, open_sampler, teacher_of
from dimo.commands.suite_files import SUITES, Entry, Suite, SuiteRequest, read_entries, write_metadata
from dimo.config.values import read_value
from dimo.errors import DimoError, nearest
from dimo.evaluation.comparison import Job
from dimo.evaluation.jobs import alone_in, run_in_processes
from dimo.files import PARTIALS, remove, side_by_side, write_text
from dimo.run.checkpoints import describe
from dimo.run.progress import CostBar
from dimo.run.sources import teacher_files
from dimo.ursa.layout import student_file
from dimo.ursa.weights import read_json, weight_files
from dimo.views.clips import write_frames
from dimo.worlds import checkpoint_folder, is_world

log = logging.getLogger(__name__)
SETTINGS, RECORDS = "settings.json", "records"
MOST_SAMPLES = 100  # per prompt
# settings that may differ when a suite goes on: files are compared by content
PLACES = {"prompts_file", "captions_file", "teacher_ckpt", "student_ckpt", "device", "dimo", "torch"}


class Samples:
    """The samples of a suite in `out`: job `index` is a sample of entry `index // per_prompt`."""

    def __init__(self, out: Path, suite: str, entries: list[Entry], per_prompt: int):
        self.out, self.suite, self.entries, self.per_prompt = out, suite, entries, per_prompt
        self.folder, self.scored = out / RECORDS, out / SUITES[suite].folder

    def jobs(self) -> list[Job]:
        return [Job(self.suite, i, 1) for i in range(len(self.entries) * self.per_prompt)]

    def record(self, job: Job) -> Path:
        return self.folder / f"{job.name}.json"

    def missing(self, jobs: list[Job]) -> list[Job]:
        there = set(os.listdir(self.folder))  # one look at the folder, and not one at each of thousands of files
        return [job for job in jobs if self.record(job).name not in there]

    def make(self, sampler: Sampler, job: Job) -> None:
        """Sample, write the video or image, then its record."""
        entry, index = self.entries[job.index // self.per_prompt], job.index % self.per_prompt
        seed = entry.seed(sampler.request.seed, index)
        frames = sampler.ursa.decode(sampler.codes(entry.caption, seed))[0].cpu()
        file = write_frames(self.scored / entry.file(index), frames)
        made = {"file": file.relative_to(self.scored).as_posix(), "seed": seed, **describe(file)}
        write_text(self.record(job), json.dumps(made, ensure_ascii=False) + "\n")

    def forget_damaged(self) -> int:
        """Delete the records of samples that are not as they were written; returns how many."""
        done = [job for job in self.jobs() if self.record(job).exists()]
        wrong = [job for job, whole in zip(done, side_by_side(self._is_whole, done)) if not whole]
        for job in wrong:
            self.record(job).unlink()
        return len(wrong)

    def _is_whole(self, job: Job) -> bool:
        try:
            made = read_json(self.record(job))
            return describe(self.scored / str(made["file"])) == {key: made[key] for key in ("bytes", "sha256")}
        except (DimoError, OSError, KeyError):
            return False

    def clear_partials(self) -> None:
        """Delete what a killed process was writing."""
        for folder in (self.scored, self.folder):
            for partial in list(folder.rglob(PARTIALS)):
                remove(partial)


def sample_suite(request: Request, asked: SuiteRequest, out: str | Path) -> str:
    """Sample a suite into `out`; the same call goes on where a killed one ended, and makes damaged samples again.

    A teacher is sampled as URSA's results on the suite were made, a student in its own passes without guidance at its
    run's size, but for what `request` says.

    Returns:
        What there is, and the scorer's command.

    Raises:
        DimoError: see `read_entries` and `open_sampler`; a checkpoint or size that does not give the frames that are
            scored; `out` holds samples of other settings; or a process failed.
    """
    if asked.suite not in SUITES:
        raise DimoError(
            f"suite must be one of {', '.join(SUITES)}, got {asked.suite!r}{nearest(str(asked.suite), SUITES)}"
        )
    suite, out = SUITES[asked.suite], Path(out)
    per_prompt = suite.samples if asked.samples is None else asked.samples
    if not 1 <= per_prompt <= MOST_SAMPLES:
        raise DimoError(f"samples must lie in [1, {MOST_SAMPLES}], got {per_prompt}")
    if asked.prompts is None:
        raise DimoError(f"--suite {asked.suite} needs --prompts, its file of prompts")
    if asked.num_processes is not None and asked.num_processes < 1:
        raise DimoError(f"num_processes must be at least 1, got {asked.num_processes}")
    entries = read_entries(asked.suite, asked.prompts, asked.captions, _motion(asked, suite, request))
    several = (asked.num_processes or 1) > 1
    sampler = _open(request, asked.suite, entries, weights=not several)
    settings = _settings(sampler, asked, per_prompt, entries)
    samples = Samples(out, asked.suite, entries, per_prompt)
    with alone_in(out):
        _settle(out / SETTINGS, settings)
        samples.clear_partials()
        write_metadata(entries, samples.scored)
        samples.folder.mkdir(exist_ok=True)
        damaged, jobs = samples.forget_damaged(), samples.jobs()
        _run(samples, sampler, asked.num_processes if several else None, damaged)
        samples.clear_partials()  # an ffmpeg outlives its killed process for a moment
    lines = [f"written: {len(jobs)} files in {samples.scored}, {out / SETTINGS}"]
    if len(entries) < suite.prompts:
        lines.append(f"note: the whole suite has {suite.prompts} prompts, these are {len(entries)}")
    return "\n".join([*lines, f"next: {suite.scorer.format(folder=samples.scored)}"])


def _motion(asked: SuiteRequest, suite: Suite, request: Request) -> float | None:
    if asked.motion is None:
        return None if is_world(checkpoint_folder(teacher_of(request))) else suite.motion
    if asked.motion == "none":
        return None
    try:
        return read_value("motion", "float", asked.motion)
    except DimoError as error:
        raise DimoError(f"{error}, or none") from error


def _open(request: Request, name: str, entries: list[Entry], weights: bool = True) -> Sampler:
    """Load what is sampled, with the suite's settings where the request leaves them open, and check what it makes."""
    suite, captions = SUITES[name], [entry.caption for entry in entries]
    if request.student_ckpt is None:
        left = {key: value for key, value in suite.protocol.items() if getattr(request, key) is None}
        request = dataclasses.replace(request, **left)  # type: ignore[arg-type]
    sampler = open_sampler(request, captions, suite.size, weights)
    r, ursa = sampler.request, sampler.ursa
    if ursa.vae is None:
        raise DimoError(f"{name} scores frames, and there would be none: {ursa.no_vae}")
    if (r.num_frames == 1) != (suite.size[0] == 1):
        what = "images: num_frames must be 1" if suite.size[0] == 1 else "videos: num_frames must be above 1"
        raise DimoError(f"{name} scores {what}, got {r.num_frames}")
    size, asked = (r.num_frames, r.height, r.width), suite.size
    if size != asked:
        log.warning("URSA's results on %s are at %sx%sx%s, these samples are %sx%sx%s", name, *asked, *size)
    cut = ursa.tokenize_and_count(captions, sampler.max_prompt_length)[1]
    if cut:
        log.warning("%d of %d captions have more than max_prompt_length = %d tokens: their ends are cut off", cut,
                    len(captions), sampler.max_prompt_length)  # fmt: skip
    return sampler


def _settings(sampler: Sampler, asked: SuiteRequest, per_prompt: int, entries: list[Entry]) -> dict[str, Any]:
    """The content of settings.json."""
    r, folder = sampler.request, sampler.ursa.folder
    files = {f"teacher/{name}": file for name, file in teacher_files(str(folder)).items()}
    files |= {f"teacher/vae/{file.name}": file for file in weight_files(folder / "vae")}
    if r.student_ckpt:
        source = student_file(r.student_ckpt)
        files |= {f"student/{f.name}": f for f in (sorted(source.iterdir()) if source.is_dir() else [source])}
    sums = [about["sha256"] for about in side_by_side(describe, list(files.values()))]
    return {
        **dataclasses.asdict(r), "suite": asked.suite, "prompts_file": asked.prompts, "captions_file": asked.captions,
        "samples": per_prompt, "dimo": dimo.__version__, "torch": torch.__version__,
        "sha256": dict(zip(files, sums)),
        "prompts": [
            {**dataclasses.asdict(e), "seeds": [e.seed(r.seed, i) for i in range(per_prompt)]} for e in entries
        ],
    }  # fmt: skip


def _settle(file: Path, settings: dict[str, Any]) -> None:
    """Write settings.json, or raise DimoError if there is one that would give other samples."""
    if not file.exists():
        return write_text(file, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
    old, new = read_json(file), json.loads(json.dumps(settings))
    differ = [key for key in new if key not in PLACES and old.get(key) != new[key]]
    if not differ:
        return None
    spelled = (
        f": {old.get(differ[0])!r} there, {new[differ[0]]!r} here" if isinstance(new[differ[0]], str | int) else ""
    )
    raise DimoError(
        f"{file.parent} holds samples that were made with other settings, the first of which is {differ[0]}{spelled}; "
        "give another --out_dir"
    )


def _run(samples: Samples, sampler: Sampler, asked: int | None, damaged: int) -> None:
    """Make what is missing, in child processes, at most as many as are asked for, or here, if None."""
    jobs = samples.jobs()
    missing = samples.missing(jobs)
    r, gpus = sampler.request, torch.cuda.device_count() if sampler.request.device == "cuda" else len(jobs)
    processes = max(1, min(asked or 1, gpus, len(missing)))
    text = f"sample: {samples.suite}, {len(samples.entries)} prompts x {samples.per_prompt}, {r.num_frames}x{r.height}x"
    text += f"{r.width}, steps {r.steps}, guidance {r.guidance_scale:g}" + (
        f", {processes} processes" * (processes > 1)
    )
    text += f"; {len(jobs) - len(missing)} are done" + (f", {damaged} were damaged" if damaged else "")
    print(text, file=sys.stderr, flush=True)
    if asked and missing:
        words = [sys.executable, "-m", "dimo.commands.suite_worker", str(os.getpid()), str(samples.out)]
        return run_in_processes(
            lambda rank, of: [*words, str(rank), str(of)], jobs, samples, processes, what=("sample", "samples")
        )
    with CostBar("sample", len(jobs), "samples") as bar:
        for i, job in enumerate(missing):
            bar.show(len(jobs) - len(missing) + i, samples.suite)
            samples.make(sampler, job)
        bar.show(len(jobs), "done")
    return None


def take_share(out: Path, rank: int, of: int) -> None:
    """In child `rank` of `of`: make every `of`-th sample that settings.json names and that is missing."""
    settings = read_json(out / SETTINGS)
    request = Request(**{field.name: settings[field.name] for field in dataclasses.fields(Request)})
    entries = [Entry(**{key: e[key] for key in ("line", "prompt", "caption", "metadata")}) for e in settings["prompts"]]
    samples = Samples(out, settings["suite"], entries, settings["samples"])
    missing = samples.missing(samples.jobs()[rank::of])
    sampler = open_sampler(request, [entry.caption for entry in entries]) if missing else None
    for job in missing:
        samples.make(sampler, job)  # type: ignore[arg-type]
