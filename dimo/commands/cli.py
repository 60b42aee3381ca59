"""The `dimo` command. Every subcommand takes a preset and `key=value` overrides, and says what it does with --help."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from functools import partial
from pathlib import Path
from typing import Any

from dimo.commands.examples import EXAMPLES, examples
from dimo.commands.sample import Request, read_prompts, sample_to_folder
from dimo.commands.world_train import add_world
from dimo.config.flags import RENAMED, split_flags
from dimo.config.values import read_value
from dimo.errors import DimoError, reason
from dimo.output import lasting_output
from dimo.paths import user_path
from dimo.run.signals import PREEMPTED, Preempted
from dimo.worlds import SHIPPED_STUDENT, checkpoint_folder

CONFIGURABLE = ("train", "run", "plan", "evaluate", "ablate", "bench", "config")
NAMES = ("config", "folder", "out", "out_dir", "prompt_file", "student", "student_ckpt", "teacher_ckpt")
RENAMED_HELP = "\n".join(f"  --{flag:12}  {key}" for flag, key in RENAMED.items())
FLAGS_HELP = f"""\
flags: every configuration key is also a flag by its last part (`--lr 5e-4` is optim.lr=5e-4); besides,
{RENAMED_HELP}
`dimo config` lists all keys with their meaning."""
RESUMING = ("train", "run", "ablate")


def main(argv: list[str] | None = None) -> int:
    """Exit code 0; 2 for bad input, said in a sentence; 75 for a run that was asked to stop; 130 for Ctrl-C."""
    argv = list(sys.argv[1:] if argv is None else argv)
    with lasting_output() as lost:
        code = _main(argv)
    if lost and code == 0 and argv[0] not in RESUMING:  # of which what is printed is no result
        print(f"dimo: what was printed could not be written: {lost[0].strerror}", file=sys.stderr)
        return 2
    return code


def _main(argv: list[str]) -> int:
    try:
        args = parse(argv)
        args.function(args)
    except DimoError as error:
        print(f"dimo: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a read-only folder, a full disk
        print(f"dimo: {reason(error)}", file=sys.stderr)
        return 2
    except Preempted as stopped:
        print(f"dimo: {stopped}", file=sys.stderr)
        return PREEMPTED
    except KeyboardInterrupt:
        again = "; the same command resumes from the last checkpoint" if argv and argv[0] in RESUMING else ""
        print(f"dimo: interrupted{again}", file=sys.stderr)
        return 130
    return 0


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line, where every `key=value` and every flag of a key, wherever it stands, is in `overrides`.

    Raises:
        DimoError: a flag or word that the command does not take, an empty name, or bytes that are no UTF-8.
    """
    for argument in argv:
        if any("\ud800" <= letter <= "\udfff" for letter in argument):  # as Python keeps bytes that it cannot read
            raise DimoError(f"the argument {argument!r} is not UTF-8; does it come from a file in another encoding?")
    parser, commands = _parser()
    argv, flagged = [_underscored(argument) for argument in argv], []
    if argv and argv[0] in CONFIGURABLE:
        argv, flagged = split_flags(argv, own=set(commands[argv[0]]._option_string_actions))
    args, left = parser.parse_known_args(argv)  # leaves the words that stand after an option
    if "overrides" in args:
        args.overrides = [*args.overrides, *(word for word in left if _is_override(word)), *flagged]
        left = [word for word in left if not _is_override(word)]
    if left:
        raise DimoError(f"dimo {argv[0]} does not take {' '.join(left)}; see dimo {argv[0]} --help")
    for name in NAMES:
        value = getattr(args, name, None)
        if value == "":  # of a shell variable that is not set; the default is not what was meant
            raise DimoError(f"{name} must not be empty")
        if value is not None:
            setattr(args, name, user_path(value))
    return args


def _underscored(argument: str) -> str:
    """--batch-size as --batch_size, as all flags are spelled."""
    name, equals, value = argument.partition("=")
    return f"--{name[2:].replace('-', '_')}{equals}{value}" if name.startswith("--") else argument


def _read(kind: str, text: str) -> Any:
    """As a configuration's numbers are read: Python's own int makes 10 of 1_0."""
    try:
        return read_value("it", kind, text)
    except DimoError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("it").lstrip(": ")) from error


_whole, _number = partial(_read, "int"), partial(_read, "float")


def _is_override(word: str) -> bool:
    return "=" in word and not word.startswith("-")


def _parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The parser, and its subcommands' by name."""
    parser = argparse.ArgumentParser(
        prog="dimo",
        description="Distil a discrete video diffusion model into a one-step generator.",
        epilog=examples([name for name in EXAMPLES if " " not in name], most=1)
        + "\n\nThe same command again resumes a run. Run folders: runs/<name>/.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(metavar="command", required=True)

    def command(name: str, function, help: str, description: str = "", configurable: bool = True):
        epilog = examples([name]) + (f"\n\n{FLAGS_HELP}" if name in CONFIGURABLE else "")
        sub = commands.add_parser(
            name, help=help, description=description or help, epilog=epilog, allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        sub.set_defaults(function=function)
        if configurable:
            sub.add_argument("-c", "--config", help="a preset (see `dimo config --presets`) or a YAML file")
        return sub

    def overrides(sub):
        sub.add_argument("overrides", nargs="*", metavar="key=value", help="configuration, such as optim.lr=3e-4")

    sub = command("train", _train, "distil a student into a run folder; the same command again resumes")
    overrides(sub)

    sub = command("run", _run, "execute the five notebooks headless, in order, and write report.html")
    sub.add_argument("-p", "--parameter", action="append", default=[], metavar="NAME=VALUE", dest="parameters",
                     help="a notebook's own parameter (or a configuration key); may be repeated")  # fmt: skip
    sub.add_argument("--only", action="append", default=[], metavar="NOTEBOOK",
                     help="only this notebook, such as 02_losses; may be repeated")  # fmt: skip
    sub.add_argument("--from", metavar="NOTEBOOK", dest="start", help="leave out the notebooks before this one")
    sub.add_argument("--force", action="store_true", help="execute again what was executed with the same parameters")
    overrides(sub)

    sub = command("plan", _plan, "memory per GPU, time and tokens of a configuration, before the days are spent",
                  "Go through one step without weights or values, and print what each GPU needs, how long the run "
                  "takes where a GPU is there to try, and what to change if it does not fit.")  # fmt: skip
    sub.add_argument("--size", help="0.6B or 1.7B, in place of a folder in distill.teacher_ckpt")
    sub.add_argument("--memory", type=_number, metavar="GIB", help="of one GPU (default: of the GPU here, else 80)")
    sub.add_argument("--dry_run", action="store_true", help="only say whether the step goes through, on all ranks")
    overrides(sub)

    sub = command("evaluate", _evaluate, "score a student at one step beside its teacher, on the same noise",
                  "Score a student at one step beside its teacher at 1..25, same prompts, noise and scorer; writes "
                  "report.json and sheet.png.")  # fmt: skip
    sub.add_argument("student", nargs="?",
                     help="a run folder, student.pt, a .safetensors file, or a folder that holds one "
                     "(default: the student that ships with dimo)")  # fmt: skip
    sub.add_argument("--student_ckpt", help="the same, as a flag")
    sub.add_argument("-o", "--out", "--out_dir", help="folder for report.json and sheet.png (default: the run folder, "
                     "if it is one, else runs/evaluation)")  # fmt: skip
    sub.add_argument("--set", action="append", default=[], help=argparse.SUPPRESS)  # key=value, in its older spelling
    overrides(sub)

    sub = command("ablate", _ablate, "the recipe against literal, reinforce and KD alone",
                  "Train every method at every learning rate on the tuning seed, then the best one on the report "
                  "seeds; writes ablation.json and prints the table. The best has the highest validity among the rates "
                  "whose coverage is at least 0.8, so that no collapsed student wins; where none has that, the highest "
                  "validity times coverage. Finished runs are not run again.")  # fmt: skip
    sub.add_argument("-o", "--out", default="runs/ablation", help="folder of all its runs (default: %(default)s)")
    sub.add_argument("--seeds", type=_whole, default=3, help="seeds to report on (default: %(default)s)")
    sub.add_argument("--lrs", default="3e-4,1e-3,2e-3", help="student lrs to tune over (default: %(default)s)")
    sub.add_argument("--method", action="append", dest="methods", metavar="NAME",
                     help="only this method, such as reinforce; may be repeated")  # fmt: skip
    sub.add_argument("--jobs", type=_whole, default=1, help="runs side by side (default: %(default)s)")
    overrides(sub)

    sub = command("inspect", _inspect, "what a checkpoint folder in URSA's layout holds, and what is missing",
                  "Print sizes, codebook, path, token counts and memory at a resolution; exit code 2 where something "
                  "is missing or damaged.", configurable=False)  # fmt: skip
    sub.add_argument("folder", help="a checkpoint folder, or a built-in world's name")
    for name in ("num_frames", "height", "width"):
        sub.add_argument(f"--{name}", type=_whole, help="default: the world's, else 17x256x256 or an image")
    sub.add_argument(
        "--max_prompt_length", type=_whole, help="text tokens (default: the world's longest prompt's, else 320)"
    )

    sub = command("sample", _sample, "make videos of prompts with a student or a teacher",
                  "Write 0000.mp4 (png for one frame) per prompt and 0000.json beside it: prompt, seed, settings. "
                  "Without a decoder for the VAE, its codes as safetensors.", configurable=False)  # fmt: skip
    sub.add_argument("--prompt", action="append", default=[], help="may be repeated")
    sub.add_argument("--prompt_file", help="a txt, jsonl, csv or parquet file of captions, or a folder of them")
    sub.add_argument("--out_dir", default="runs/samples", help="default: %(default)s")
    for field in dataclasses.fields(Request):
        kind = {"int": _whole, "float": _number}.get(field.type.split(" ")[0], str)
        sub.add_argument(f"--{field.name}", type=kind, default=field.default, help=field.metadata["help"])

    sub = command("runs", _runs, "the runs of a folder: state, steps, speed, age",
                  "One line per run; `dead` is one whose status says running and that no process works on.",
                  configurable=False)  # fmt: skip
    sub.add_argument("folder", nargs="?", default="runs", help="default: %(default)s")

    sub = command("bench", _bench, "time a training step and its stages, generation, path sampling and losses",
                  "Median of several runs after a warm-up, peak memory, TFLOP/s beside a matrix product of the same "
                  "machine; writes JSON. -c shapes is for a CPU.")  # fmt: skip
    sub.add_argument("--size", help="random weights of URSA's sizes, 0.6B or 1.7B (or tiny), and no checkpoint")
    sub.add_argument(
        "--parts",
        default="step,generate,path,losses",
        help="of step, generate, path, losses, save, attention, kernels (default: %(default)s)",
    )
    sub.add_argument("--against", default="", help="naive, upstream, or both with a comma: measured in the same run")
    sub.add_argument("--repeats", type=_whole, default=5, help="the median of so many is taken (default: %(default)s)")
    sub.add_argument("--warmup", type=_whole, default=2, help="runs before (default: %(default)s)")
    sub.add_argument("--generate", default="1,25", help="numbers of passes (default: %(default)s)")
    sub.add_argument("-o", "--out", default="runs/bench.json", help="default: %(default)s")
    overrides(sub)

    sub = command("config", _config, "every configuration key, or a preset resolved")
    sub.add_argument("--presets", action="store_true", help="list the presets")
    overrides(sub)

    add_world(commands, {int: _whole, float: _number})
    return parser, commands.choices


def _train(args) -> None:
    from dimo.commands.train import train
    from dimo.config import load_config

    run = train(load_config(args.config, args.overrides))
    print(f"finished: {run.path}/checkpoints/final; next: dimo evaluate {run.path}")


def _run(args) -> None:
    from dimo.commands.notebooks import run_notebooks

    run_notebooks(args.config, args.overrides, args.parameters, args.only, args.start, args.force)


def _plan(args) -> None:
    from dimo.commands.plan import plan_report

    print(plan_report(args.config, args.overrides, args.size, args.memory, args.dry_run))


def _evaluate(args) -> None:
    from dimo.config import load_config
    from dimo.evaluation.evaluate import evaluate_to_folder, format_table
    from dimo.run.origin import run_config, run_of

    if args.student and _is_override(args.student) and not Path(args.student).exists():  # no student was named
        args.student, args.overrides = None, [args.student, *args.overrides]
    if args.student_ckpt and args.student:
        raise DimoError(f"two students are named, {args.student_ckpt} and {args.student}; name one")
    source = Path(args.student_ckpt or args.student or SHIPPED_STUDENT)
    run, overrides = run_of(source), [*args.set, *args.overrides]
    config = load_config(args.config, overrides) if args.config or not run else run_config(run, overrides)
    is_run = run is not None and source.is_dir() and source.samefile(run)
    weights = source / "checkpoints" / "final" if is_run else source
    out = Path(args.out) if args.out else (source if is_run else Path("runs/evaluation"))
    print(format_table(evaluate_to_folder(config, weights, out)))
    names = ("report.json", "sheet.png", "codes.safetensors")
    print("written: " + ", ".join(str(out / name) for name in names if (out / name).exists()))


def _ablate(args) -> None:
    from dimo.evaluation.ablate import ablate

    try:
        lrs = [float(lr) for lr in args.lrs.split(",")]
    except ValueError:
        raise DimoError(f"--lrs must be numbers with commas between them, got {args.lrs!r}") from None
    print(ablate(Path(args.out), args.config, args.overrides, lrs, args.seeds, args.methods, args.jobs))


def _inspect(args) -> None:
    from dimo.commands.inspect_folder import format_rows, inspect_folder

    folder = checkpoint_folder(args.folder)
    rows, missing = inspect_folder(folder, args.num_frames, args.height, args.width, args.max_prompt_length)
    print(format_rows(rows, missing))
    if missing:
        raise DimoError(f"{len(missing)} part(s) of {folder} missing or damaged")


def _sample(args) -> None:
    prompts = args.prompt + (read_prompts(args.prompt_file) if args.prompt_file else [])
    request = Request(**{f.name: getattr(args, f.name) for f in dataclasses.fields(Request)})
    for file in sample_to_folder(request, prompts, args.out_dir):
        print(f"written: {file}, {file.with_suffix('.json').name}")


def _runs(args) -> None:
    from dimo.run.overview import format_runs, list_runs

    print(format_runs(list_runs(args.folder)))


def _bench(args) -> None:
    from dimo.bench import bench, bench_config, require_file, write_report

    try:
        passes = tuple(int(n) for n in args.generate.split(",") if n)
    except ValueError:
        raise DimoError(f"--generate must be numbers with commas between them, got {args.generate!r}") from None
    parts, against = (tuple(n for n in names.split(",") if n) for names in (args.parts, args.against))
    config = bench_config(args.config, args.size, args.overrides)
    require_file(args.out)
    write_report(bench(config, args.size, parts, against, args.repeats, args.warmup, passes), args.out)
    print(f"written: {args.out}")


def _config(args) -> None:
    from dimo.config import PRESETS, describe, load_config, to_yaml

    if args.presets:
        for file in sorted(PRESETS.glob("*.yaml")):
            print(f"{file.stem:10} {file.read_text().splitlines()[0].removeprefix('# ')}")
    elif args.config or args.overrides:
        print(to_yaml(load_config(args.config, args.overrides)), end="")
    else:
        print(describe())


if __name__ == "__main__":
    sys.exit(main())
