"""VBench and GenEval: their prompt files, and the files and names that their scorers look for.

VBench (Vchitect/VBench, prompts/README.md and `VBench.build_full_info_json`): 5 videos per prompt, each with a seed of
its own, in one folder as `{prompt}-{index}.mp4`. Its scorer takes the suffix of any entry of that folder for the
suffix of all videos, so nothing else may lie in it. GenEval (djghosh13/geneval, README.md and evaluate_images.py): 4
images per prompt, as `00000/samples/0000.png` beside `00000/metadata.jsonl`, which is the prompt's line of
evaluation_metadata.jsonl.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from pathlib import Path

from dimo.config.served import NEGATIVE_PROMPT
from dimo.data.lines import read_lines
from dimo.errors import DimoError, reason
from dimo.files import write_text

log = logging.getLogger(__name__)
LONGEST_NAME = 255 - len(f".{2**22}.partial")  # bytes; a file is written under a longer name first


def _flag(help: str):
    return dataclasses.field(default=None, metadata={"help": help})


@dataclasses.dataclass
class SuiteRequest:
    """The flags of `dimo sample` that belong to a suite."""

    suite: str | None = _flag("vbench or geneval: sample its prompts, in the files and folders that its scorer reads")
    prompts: str | None = _flag("the suite's prompts: VBench's all_dimension.txt, GenEval's evaluation_metadata.jsonl")
    captions: str | None = _flag(
        "what the model is given in the place of the prompts, line by line; or URSA's evaluations/geneval/prompts.json"
    )
    motion: str | None = _flag("motion prefix of the captions, a number or none; default: 9 for vbench, else none")
    samples: int | None = _flag("videos or images per prompt; default: as the suite asks, 5 or 4")
    num_processes: int | None = _flag("number of processes, at most one per GPU; default: 1")


@dataclasses.dataclass(frozen=True)
class Suite:
    """What a suite asks for, and how URSA's results on it were made (baaivision/URSA at 29284bb, docs/evaluation.md).

    Attributes:
        prompts: different prompts in the official file.
        samples: videos or images per prompt.
        size: (num_frames, height, width).
        protocol: settings of the teacher, fields of `dimo.commands.sample.Request`.
        motion: motion prefix of the captions; None: none.
        folder: name of the folder that the scorer is given.
        scorer: its command line.
    """

    prompts: int
    samples: int
    size: tuple[int, int, int]
    protocol: dict[str, int | float | str]
    motion: float | None
    folder: str
    scorer: str


SUITES = {
    "vbench": Suite(
        944, 5, (49, 320, 512), {"steps": 50, "guidance_scale": 7.0, "negative_prompt": NEGATIVE_PROMPT}, 9.0, "videos",
        "vbench evaluate --videos_path {folder} --dimension DIMENSION",
    ),
    "geneval": Suite(
        553, 4, (1, 1024, 1024), {"steps": 25, "guidance_scale": 7.0}, None, "images",
        "python evaluation/evaluate_images.py {folder} --outfile RESULTS.jsonl --model-path DETECTOR",
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Entry:
    """A prompt of a suite: its line in the file from 0, what the scorer knows it by, and what the model is given."""

    line: int
    prompt: str
    caption: str
    metadata: str | None = None

    def file(self, index: int) -> str:
        """Path of sample `index` without suffix, below the scorer's folder."""
        return f"{self.prompt}-{index}" if self.metadata is None else f"{self.line:05d}/samples/{index:04d}"

    def seed(self, seed: int, index: int) -> int:
        """Seed of sample `index`: it depends on the prompt and not on its line, so a part of a suite gives the same."""
        text = json.dumps([seed, self.prompt, index])
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def read_entries(suite: str, prompts: str | Path, captions: str | Path | None, motion: float | None) -> list[Entry]:
    """Read the prompts of a suite.

    Args:
        prompts: VBench's all_dimension.txt or one of its dimensions, or GenEval's evaluation_metadata.jsonl.
        captions: what the model is given in the place of the prompts: a text file with as many lines, or URSA's
            evaluations/geneval/prompts.json, a list of {prompt, dense_prompt}. None: the prompts themselves.
        motion: put `motion=x.x, ` before each.

    Returns:
        The prompts, each once. VBench's own file has two prompts twice: its scorer reads the same videos for both.

    Raises:
        DimoError: no prompts, a line that is no prompt of the suite, a prompt twice in GenEval's file, captions that
            do not belong to the prompts, or a prompt that cannot be a file's name.
    """
    lines = _lines(Path(prompts))
    metadata = [_metadata(Path(prompts), n, line) for n, line in enumerate(lines)] if suite == "geneval" else None
    texts = [json.loads(line)["prompt"] for line in metadata] if metadata else lines
    given = _captions(Path(captions), texts) if captions else texts
    prefix = "" if motion is None else f"motion={motion:.1f}, "
    first: dict[str, Entry] = {}
    for n, prompt in enumerate(texts):
        if prompt in first and metadata:
            raise DimoError(
                f"{prompts} has the prompt {prompt!r} twice, in lines {first[prompt].line + 1} and {n + 1}: GenEval "
                "would count it twice"
            )
        entry = Entry(n, prompt, prefix + given[n], metadata[n] if metadata else None)
        if not metadata:
            _require_name(Path(prompts), entry)
        first.setdefault(prompt, entry)
    again = len(texts) - len(first)
    if again:
        log.warning(
            "%d of %d lines of %s repeat a prompt; VBench reads the same videos for both, so they are sampled once, "
            "with the first of their captions", again, len(texts), prompts,
        )  # fmt: skip
    return list(first.values())


def _lines(file: Path) -> list[str]:
    """The lines of a text file, stripped as VBench does; an empty one is refused, since captions are paired by line."""
    if not file.is_file():
        raise DimoError(f"{file} must be a file of prompts" if file.exists() else f"{file} does not exist")
    try:
        lines = [line.strip() for line in read_lines(file)]
    except (OSError, ValueError) as error:
        raise DimoError(f"{file} cannot be read: {reason(error)}") from error
    while lines and not lines[-1]:
        lines.pop()
    if "" in lines:
        raise DimoError(f"line {lines.index('') + 1} of {file} is empty")
    if not lines:
        raise DimoError(f"{file} holds no prompt")
    return lines


def _metadata(file: Path, number: int, line: str) -> str:
    try:
        content = json.loads(line)
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict) or not all(isinstance(content.get(key), str) for key in ("prompt", "tag")):
        raise DimoError(
            f"line {number + 1} of {file} is none of GenEval's evaluation_metadata.jsonl, an object with tag and prompt"
        )
    return line


def _captions(file: Path, prompts: list[str]) -> list[str]:
    if file.suffix == ".json":
        return _dense_prompts(file, prompts)
    captions = _lines(file)
    if len(captions) != len(prompts):
        raise DimoError(f"{file} has {len(captions)} captions for {len(prompts)} prompts; they are paired by line")
    return captions


def _dense_prompts(file: Path, prompts: list[str]) -> list[str]:
    try:
        dense = {row["prompt"]: row["dense_prompt"] for row in json.loads(file.read_text(encoding="utf-8"))}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DimoError(f"{file} cannot be read as a list of objects with prompt and dense_prompt") from error
    missing = [prompt for prompt in prompts if not isinstance(dense.get(prompt), str)]
    if missing:
        raise DimoError(f"{file} has no dense_prompt for {len(missing)} prompts, such as {missing[0]!r}")
    return [dense[prompt] for prompt in prompts]


def _require_name(file: Path, entry: Entry) -> None:
    """Raise DimoError unless VBench can find the videos of a prompt, by its name alone."""
    if entry.prompt[:1] in "{[":
        raise DimoError(f"{file} is JSON, but VBench's prompts are a text file, such as all_dimension.txt: one a line")
    size, where = len(f"{entry.file(99)}.mp4".encode()), f"line {entry.line + 1} of {file}"
    if "/" in entry.prompt or entry.prompt.startswith("."):
        what = "has a slash" if "/" in entry.prompt else "begins with a dot"
        raise DimoError(f"{where} {what}: VBench finds videos by their prompt, and this one cannot be a file's name")
    if size > LONGEST_NAME:
        raise DimoError(
            f"{where} gives a file's name of {size} bytes, {LONGEST_NAME} at most can be written: VBench finds videos "
            "by their prompt, so give the short one in --prompts and the long one in --captions"
        )


def write_metadata(entries: list[Entry], folder: Path) -> None:
    """Write GenEval's metadata.jsonl beside the samples of each prompt, where it is not there yet."""
    for entry in entries:
        file = folder / f"{entry.line:05d}" / "metadata.jsonl"
        if entry.metadata is not None and not (file.is_file() and file.read_text(encoding="utf-8") == entry.metadata):
            write_text(file, entry.metadata)
