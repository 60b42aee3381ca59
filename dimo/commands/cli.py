"""The `dimo` command: parses the command line and calls the subcommand."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
import textwrap
from pathlib import Path

from dimo.commands.check_alignment import check_alignment
from dimo.commands.parser import CONFIGURABLE, make_parser
from dimo.commands.sample import Request, read_prompts, sample_to_folder
from dimo.commands.suite_files import SuiteRequest
from dimo.commands.world_train import world_train
from dimo.config.flags import split_flags
from dimo.config.values import read_value
from dimo.errors import DimoError, nearest, out_of_memory, reason, similar
from dimo.output import lasting_output
from dimo.paths import quoted, user_path
from dimo.run.overview import existing_run
from dimo.run.signals import PREEMPTED, Preempted
from dimo.worlds import DEFAULT_WORLD, SHIPPED_STUDENT, checkpoint_folder, is_world, student_of, video_size, world_of
from dimo.worlds.registry import WORLDS

NAMES = (
    "captions", "config", "file", "folder", "grid", "out", "out_dir", "prompt_file", "prompts", "run", "student",
    "student_ckpt", "teacher_ckpt",
)  # fmt: skip
RESUMING = ("train", "run", "ablate")
GOES_ON = dict.fromkeys(RESUMING, "; the same command resumes from the last checkpoint")
GOES_ON |= {"evaluate": "; the same command resumes: what is finished is kept"}


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0; 2 for bad input, with a one-sentence message; 75 for a stopped run; 130 for Ctrl-C.

    Those of `check-alignment` are in its help.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    with lasting_output() as lost:
        code = _main(argv)
    if lost and code == 0 and argv[0] not in RESUMING:  # commands in RESUMING write their results to files
        print(f"dimo: the output could not be written: {lost[0].strerror}", file=sys.stderr)
        return 2
    return code


def _main(argv: list[str]) -> int:
    try:
        args = parse(argv)
        return COMMANDS[args.command](args) or 0
    except DimoError as error:
        print(f"dimo: {error}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        print(f"dimo: {out_of_memory(error)}", file=sys.stderr)
        return 2
    except OSError as error:  # a read-only folder, a full disk
        print(f"dimo: {reason(error)}", file=sys.stderr)
        return 2
    except Preempted as stopped:
        print(f"dimo: {stopped}", file=sys.stderr)
        return PREEMPTED
    except KeyboardInterrupt:
        print(f"dimo: interrupted{GOES_ON.get(argv[0], '') if argv else ''}", file=sys.stderr)
        return 130


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse the command line. `key=value` words and flags of keys, in any position, are collected in `overrides`.

    Raises:
        DimoError: an unknown flag or word, an empty path, or an argument that is not UTF-8.
    """
    for argument in argv:
        if any("\ud800" <= letter <= "\udfff" for letter in argument):  # surrogates: bytes that Python could not decode
            raise DimoError(f"the argument {argument!r} is not UTF-8; was it copied from a file in another encoding?")
    parser, commands = make_parser()
    if not argv or argv[0] == "help":
        argv = [*argv[1:2], "--help"]
    if not argv[0].startswith("-") and argv[0] not in commands:
        raise DimoError(f"there is no command {argv[0]!r}{nearest(argv[0], commands)}")
    argv = [_underscored(argument) for argument in argv]
    flagged: list[str] = []
    if argv and argv[0] in CONFIGURABLE:
        argv, flagged = split_flags(argv, own=set(commands[argv[0]]._option_string_actions))
    args, left = parser.parse_known_args(argv)  # it leaves positional words that follow an option
    if "overrides" in args:
        args.overrides = [*args.overrides, *(word for word in left if _is_override(word)), *flagged]
        left = [word for word in left if not _is_override(word)]
    if left:
        command = " ".join(argv[:3] if argv[0] == "world" else argv[:1])
        raise DimoError(f"dimo {command} does not take {' '.join(left)}; see dimo {command} --help")
    for name in NAMES:
        value = getattr(args, name, None)
        if value == "":  # from an unset shell variable; the default would not be what was meant
            raise DimoError(f"{name} must not be empty")
        if value is not None:
            setattr(args, name, user_path(value))
    return args


def _underscored(argument: str) -> str:
    """Spell a flag with underscores: --batch-size becomes --batch_size."""
    name, equals, value = argument.partition("=")
    return f"--{name[2:].replace('-', '_')}{equals}{value}" if name.startswith("--") else argument


def _is_override(word: str) -> bool:
    return "=" in word and not word.startswith("-")


def _train(args) -> None:
    from dimo.commands.ending import finished
    from dimo.commands.train import train, train_seeds
    from dimo.config import load_config

    # argparse takes every word after --seeds for one, up to the next flag
    words = [word for given in args.seeds for word in given.split(",") if word and "=" not in given]
    keys = [word for word in args.seeds if "=" in word]
    config = load_config(args.config, [*args.overrides, *keys])
    seeds = [read_value("--seeds", "int", word) for word in words]
    for run in train_seeds(config, seeds) if seeds else [train(config)]:
        print(finished(run, config.distill.teacher_ckpt))


def _run(args) -> None:
    from dimo.commands.notebooks import run_notebooks

    run_notebooks(args.config, args.overrides, args.parameters, args.only, args.start, args.force)


def _plan(args) -> None:
    from dimo.commands.plan import plan_report

    print(plan_report(args.config, args.overrides, args.size, args.memory, args.dry_run))


def _evaluate(args) -> None:
    from dimo.commands.ending import ending, sampling
    from dimo.config import load_config
    from dimo.evaluation.evaluate import evaluate_to_folder, format_table
    from dimo.evaluation.metrics import columns_of, world_title
    from dimo.evaluation.summary import format_summary
    from dimo.evaluation.trust import weak_ones
    from dimo.run.origin import run_config, run_of

    if args.student and _is_override(args.student) and not Path(args.student).exists():  # it is an override
        args.student, args.overrides = None, [args.student, *args.overrides]
    if args.student_ckpt and args.student:
        raise DimoError(f"two students were given, {args.student_ckpt} and {args.student}; give one")
    source = _student(args.student_ckpt or args.student)
    run, overrides = run_of(source), [*args.set, *args.overrides]
    ships = world_of(source)
    preset = args.config or (ships if ships != DEFAULT_WORLD else None)  # other worlds have presets of their own
    config = load_config(preset, overrides) if preset or not run else run_config(run, overrides)
    is_run = run is not None and source.is_dir() and source.samefile(run)
    weights = source / "checkpoints" / "final" if is_run else source
    out = Path(args.out) if args.out else (source if is_run else Path("runs/evaluation"))
    rows = evaluate_to_folder(config, weights, out)
    weak = [weak_ones(columns_of(rows), world_title(rows))] if args.all else []
    print(format_table(rows) if args.all else format_summary(rows), *filter(None, weak), "", sep="\n")
    named = None if source == SHIPPED_STUDENT else Path(ships) if ships else source
    after = {sampling(named, config.distill.teacher_ckpt): "a video of it"}
    report = f"report {quoted(source)}"
    again = {f"run -c {ships or DEFAULT_WORLD}": "distil a student yourself"}
    after |= {report: "the run as one page"} if is_run else again
    print(ending(out, ["report.json", "sheet.png", "clips.mp4", "codes.safetensors"], after))


def _student(given: str | None) -> Path:
    """Path of a student: of a run, of the one that ships with a world, by default the built-in one.

    Raises:
        DimoError: a run that is not there, of which the message names others; a world without a student.
    """
    source = Path(given or SHIPPED_STUDENT)
    if not source.exists() and str(source) in WORLDS:
        shipped = student_of(str(source))
        if shipped is None:
            raise DimoError(f"the world {source} ships without a student: `dimo train -c {source}` distils one")
        source = shipped
    if not source.exists() and not source.suffix:
        if hint := similar(str(source), filter(student_of, WORLDS)):
            raise DimoError(f"{source} is neither a run nor a world whose student ships{hint}")
        existing_run(source)
    return source


def _ablate(args) -> None:
    from dimo.evaluation.ablate import ablate
    from dimo.evaluation.grid import read_grid
    from dimo.evaluation.jobs import visible_gpus

    try:
        lrs = [float(lr) for lr in args.lrs.split(",")] if args.lrs else None
    except ValueError:
        raise DimoError(f"--lrs must be numbers separated by commas, got {args.lrs!r}") from None
    grid = read_grid(args.grid, args.config, args.overrides, args.arms, lrs, args.seeds, args.worlds)
    out = Path(args.out or f"runs/{grid.name}")
    jobs = max(1, len(visible_gpus())) if args.jobs is None else args.jobs
    print(ablate(grid, out, jobs, args.together, args.minutes))
    print(f"written: {out / 'grid.md'}, {out / 'grid.json'}")


def _inspect(args) -> None:
    from dimo.commands.ending import next_commands
    from dimo.commands.inspect_folder import format_rows, inspect_folder

    folder = checkpoint_folder(args.folder)
    rows, missing = inspect_folder(folder, args.num_frames, args.height, args.width, args.max_prompt_length)
    print(format_rows(rows, missing))
    if missing:
        raise DimoError(f"{len(missing)} part(s) of {folder} are missing or damaged")
    named = quoted(args.folder)
    asked = zip(("num_frames", "height", "width"), video_size(folder))
    size = " ".join(f"--{name} {getattr(args, name) or default}" for name, default in asked)
    plan = f"plan --teacher_ckpt {named}" if is_world(folder) else f"plan -c distill_dimo --teacher_ckpt {named}"
    after = {f"check-alignment {named}": "is the logits slice read right"}
    after |= {f"{plan} {size} --num_processes 8": "memory per GPU and time"}
    print(next_commands(after))


def _sample(args) -> None:
    if args.student_ckpt or not (args.teacher_ckpt or args.suite):
        args.student_ckpt = str(_student(args.student_ckpt))
    request = Request(**{f.name: getattr(args, f.name) for f in dataclasses.fields(Request)})
    asked = SuiteRequest(**{f.name: getattr(args, f.name) for f in dataclasses.fields(SuiteRequest)})
    if asked.suite is not None:
        if args.prompt or args.prompt_file:
            raise DimoError("a suite's prompts are given by --prompts, without --prompt and --prompt_file")
        from dimo.commands.suite import sample_suite

        print(sample_suite(request, asked, args.out_dir))
        return
    for name, value in vars(asked).items():
        if value is not None:
            raise DimoError(f"--{name} is a flag of --suite vbench or geneval")
    from dimo.commands.ending import sampled

    prompts = args.prompt + (read_prompts(args.prompt_file) if args.prompt_file else [])
    for file in sample_to_folder(request, prompts, args.out_dir):
        print(f"written: {file}, {sampled(file.with_suffix('.json'))}")


def _export(args) -> None:
    from dimo.commands.export import export

    print(export(args.run, args.out, args.step, args.teacher_ckpt, args.overwrite))
    print(f"written: {args.out}")


def _report(args) -> None:
    from dimo.commands.report import write_run_report

    print(f"written: {write_run_report(existing_run(args.folder))}, one file to open in a browser or to send")


def _replay(args) -> None:
    from dimo.views.slices import replay

    outcome = replay(args.file, device=args.device, backend=args.backend, dtype=args.dtype)
    for name, off in outcome.differences.items():
        print(f"{name:36}{off:.3g}")
    if not outcome.agrees:
        raise DimoError(outcome.sentence)
    print(outcome.sentence)


def _runs(args) -> None:
    from dimo.run.overview import format_runs, list_runs

    print(format_runs(list_runs(args.folder)))


def _bench(args) -> None:
    from dimo.bench import bench, bench_config, require_file, write_report

    try:
        passes = tuple(int(n) for n in args.generate.split(",") if n)
    except ValueError:
        raise DimoError(f"--generate must be numbers separated by commas, got {args.generate!r}") from None
    parts, against = (tuple(n for n in names.split(",") if n) for names in (args.parts, args.against))
    config = bench_config(args.config, args.size, args.overrides)
    require_file(args.out)
    write_report(bench(config, args.size, parts, against, args.repeats, args.warmup, passes), args.out)
    print(f"written: {args.out}")


def _config(args) -> None:
    from dimo.config import PRESETS, load_config, to_yaml
    from dimo.config.flags import describe

    if args.presets:
        for file in sorted(PRESETS.glob("*.yaml")):
            lines = file.read_text().splitlines()
            about = " ".join(line[2:] for line in itertools.takewhile(lambda line: line.startswith("# "), lines))
            indent = f"{'':20}"
            print(textwrap.fill(f"{file.stem:20}{about}", 100, subsequent_indent=indent, break_on_hyphens=False))
    elif args.config or args.overrides:
        print(to_yaml(load_config(args.config, args.overrides)), end="")
    else:
        print(describe())


COMMANDS = {
    "train": _train,
    "run": _run,
    "plan": _plan,
    "evaluate": _evaluate,
    "ablate": _ablate,
    "inspect": _inspect,
    "check-alignment": check_alignment,
    "sample": _sample,
    "export": _export,
    "report": _report,
    "replay": _replay,
    "runs": _runs,
    "bench": _bench,
    "config": _config,
    "world": world_train,
}


if __name__ == "__main__":
    sys.exit(main())
