"""The argument parser: subcommands, their flags and help texts."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

from dimo import __version__
from dimo.commands.check_alignment import SIZE, add_check_alignment
from dimo.commands.examples import EXAMPLES, examples
from dimo.commands.sample import Request
from dimo.commands.suite_files import SuiteRequest
from dimo.commands.world_train import add_world
from dimo.config.flags import RENAMED
from dimo.config.load import shipped_grids
from dimo.config.values import read_value
from dimo.errors import DimoError

CONFIGURABLE = ("train", "run", "plan", "evaluate", "ablate", "bench", "config")
RENAMED_HELP = "\n".join(f"  --{flag:12}  {key}" for flag, key in RENAMED.items())
FLAGS_HELP = f"""\
flags: the last part of every configuration key is also a flag (`--lr 5e-4` is optim.lr=5e-4); in addition,
{RENAMED_HELP}
`dimo config` lists all keys with their meanings."""


class Parser(argparse.ArgumentParser):
    """Tells a slip in one sentence; what is left out, with an example of how the command is called."""

    def error(self, message: str) -> NoReturn:
        left_out = message.partition("the following arguments are required: ")[2]
        name = self.prog.removeprefix("dimo ")
        known = next((some for some in EXAMPLES if name.startswith(some)), "")
        example = f", as in `dimo {known} {next(iter(EXAMPLES[known]))}`" if known and left_out else ""
        what = f"needs {left_out.upper().replace('-O/--OUT', '-o FOLDER')}{example}" if left_out else message
        self.exit(2, f"dimo: {name}{' ' if left_out else ': '}{what}; see {self.prog} --help\n")


def make_parser() -> tuple[Parser, dict[str, Parser]]:
    """The parser, and those of its subcommands by name. The parsed arguments have the subcommand as `command`."""
    parser = Parser(
        prog="dimo",
        description="Distil a discrete video diffusion model into a one-step generator.",
        epilog=examples([name for name in EXAMPLES if " " not in name], most=1)
        + "\n\nRepeating a command resumes its run. Run folders are runs/<name>/.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"dimo {__version__}", help="show the version")
    commands = parser.add_subparsers(metavar="command", dest="command")
    command = partial(_command, commands)
    _add_training(command)
    _add_results(command)
    _add_looking(command)
    add_world(commands, {int: _integer, float: _number})
    return parser, commands.choices


def _command(commands, name: str, help: str, description: str = "", configurable: bool = True):
    epilog = examples([name]) + (f"\n\n{FLAGS_HELP}" if name in CONFIGURABLE else "")
    sub = commands.add_parser(
        name, help=help, description=description or help, epilog=epilog, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    if configurable:
        sub.add_argument("-c", "--config", help="a preset (see `dimo config --presets`) or a YAML file")
    return sub


def _overrides(sub) -> None:
    sub.add_argument("overrides", nargs="*", metavar="key=value", help="configuration keys, such as optim.lr=3e-4")


def _add_training(command: Callable) -> None:
    """Commands that train, or plan training."""
    sub = command("train", "distil a student into a run folder; repeating the command resumes the run")
    sub.add_argument("--seeds", nargs="+", default=[], metavar="SEED",
                     help="a run per seed, in <output_dir>-<seed>, in one process, a step of each in turn")  # fmt: skip
    _overrides(sub)

    sub = command("run", "execute the five notebooks headless, in order, and write report.html")
    sub.add_argument("-p", "--parameter", action="append", default=[], metavar="NAME=VALUE", dest="parameters",
                     help="a notebook parameter or a configuration key; may be repeated")  # fmt: skip
    sub.add_argument("--only", action="append", default=[], metavar="NOTEBOOK",
                     help="only this notebook, such as 02_losses; may be repeated")  # fmt: skip
    sub.add_argument("--from", metavar="NOTEBOOK", dest="start", help="start with this notebook")
    sub.add_argument("--force", action="store_true", help="also execute notebooks that are already done")
    _overrides(sub)

    sub = command("plan", "memory per GPU, training time and tokens of a configuration, without training",
                  "Run a training step on tensors without values, and print the memory that each GPU needs, the "
                  "training time if there is a GPU to measure it, and what to change if it does not fit.")  # fmt: skip
    sub.add_argument("--size", help="0.6B or 1.7B, instead of a folder in distill.teacher_ckpt")
    sub.add_argument("--memory", type=_number, metavar="GIB",
                     help="memory of one GPU (default: that of the GPU here, else 80)")  # fmt: skip
    sub.add_argument("--dry_run", action="store_true", help="only check that the step runs, and print its peak memory")
    _overrides(sub)

    sub = command("ablate", "compare arms (sets of keys) on worlds and seeds, as a grid file says",
                  "Train and score every student of a grid file: for each world and arm the best learning rate on the "
                  "tuning seeds, then the reported seeds; writes grid.md, a table with 95% intervals, and grid.json. "
                  "The best learning rate has the highest validity among those with a coverage of at least 0.8, so "
                  "that no collapsed student wins; if there is none, the highest validity times coverage. Finished "
                  "runs are not repeated, and a run that was stopped goes on.")  # fmt: skip
    sub.add_argument("--grid", default="methods",
                     help=f"{', '.join(shipped_grids())}, or a YAML file (default: %(default)s)")  # fmt: skip
    sub.add_argument("-o", "--out", help="folder of all runs (default: runs/GRID)")
    sub.add_argument("--seeds", type=_integer, help="report seeds 0 to this - 1, instead of the grid's")
    sub.add_argument("--lrs", help="the student's learning rates to choose from, instead of the grid's")
    sub.add_argument("--arm", "--method", action="append", dest="arms", metavar="NAME",
                     help="only this arm, such as reinforce; may be repeated")  # fmt: skip
    sub.add_argument("--world", action="append", dest="worlds", metavar="NAME",
                     help="only this world, such as 'N = 48'; may be repeated")  # fmt: skip
    sub.add_argument("--jobs", type=_integer,
                     help="number of processes, which share the GPUs there are (default: one per GPU)")  # fmt: skip
    sub.add_argument("--together", type=_integer, default=1,
                     help="number of runs that a process trains at a time (default: %(default)s)")  # fmt: skip
    sub.add_argument("--minutes", type=_number, help="stop after so long; the same command goes on")
    _overrides(sub)


def _add_results(command: Callable) -> None:
    """Commands that use the results of training."""
    sub = command("evaluate", "compare a student with its teacher on the same noise",
                  "Compare a student with its teacher in 1 to 25 steps, on the same prompts and noise and "
                  "with the same metrics; writes report.json, sheet.png and clips.mp4.")  # fmt: skip
    sub.add_argument("student", nargs="?",
                     help="a run folder, student.pt, a .safetensors file, a folder with one of them, or a world whose "
                     "student ships (default: the built-in world's)")  # fmt: skip
    sub.add_argument("--student_ckpt", help="the same, as a flag")
    sub.add_argument("-o", "--out", "--out_dir", help="folder for report.json and pictures (default: the run folder "
                     "if one was given, else runs/evaluation)")  # fmt: skip
    sub.add_argument("--all", action="store_true", help="print every metric with its interval, in a wide table")
    sub.add_argument("--set", action="append", default=[], help=argparse.SUPPRESS)  # key=value, in its older spelling
    _overrides(sub)

    sub = command("sample", "generate videos with a student or a teacher",
                  "Write 0000.mp4 (.png for one frame) per prompt, and 0000.json with prompt, seed and settings. If "
                  "the VAE cannot be run, the codes are written as safetensors. With --suite: what VBench or GenEval "
                  "scores, in its folders and names; the same command goes on after a kill.",
                  configurable=False)  # fmt: skip
    sub.add_argument("--prompt", action="append", default=[], help="a prompt; may be repeated")
    sub.add_argument("--prompt_file", help="a txt, jsonl, csv or parquet file of captions, or a folder of them")
    sub.add_argument("-o", "--out_dir", "--out", default="runs/samples", help="default: %(default)s")
    for field in (*dataclasses.fields(Request), *dataclasses.fields(SuiteRequest)):
        kind = {"int": _integer, "float": _number}.get(field.type.split(" ")[0], str)
        sub.add_argument(f"--{field.name}", type=kind, default=field.default, help=field.metadata["help"])

    sub = command("export", "write a run's student as a checkpoint folder that URSA's own pipeline loads",
                  "Write the teacher's folder with the student's weights in the place of the teacher's, a README that "
                  "says how upstream's pipeline is called, and dimo_export.json with run, step and configuration. "
                  "Everything but the weights is a copy: nothing is linked to the teacher.",
                  configurable=False)  # fmt: skip
    sub.add_argument("run", help="a run folder")
    sub.add_argument("out", help="the folder to write")
    sub.add_argument("--step", help="a checkpoint's or milestone's step, or newest, for the moving average in "
                     "it (default: checkpoints/final)")  # fmt: skip
    sub.add_argument("--teacher_ckpt", help="where the run's teacher is now, if it has moved")
    sub.add_argument("--overwrite", action="store_true", help="replace an older export in OUT")

    sub = command("runs", "list the runs in a folder: state, steps, speed, age",
                  "Print one line per run; `dead` is a run whose status is running but which has no process.",
                  configurable=False)  # fmt: skip
    sub.add_argument("folder", nargs="?", default="runs", help="default: %(default)s")


def _add_looking(command: Callable) -> None:
    """Commands that look at checkpoints, speed and configuration."""
    sub = command("inspect", "show what a checkpoint folder in URSA's layout contains and lacks",
                  "Print sizes, codebook, path, token counts and memory at a resolution; exit code 2 if something is "
                  "missing or damaged.", configurable=False)  # fmt: skip
    sub.add_argument("folder", help="a checkpoint folder, or a built-in world's name")
    for name, default in SIZE.items():
        sub.add_argument(f"--{name}", type=_integer, help=f"default: the world's, else {default}")
    sub.add_argument(
        "--max_prompt_length", type=_integer, help="number of text tokens (default: a world's longest prompt, else 320)"
    )

    sub = command("report", "a run as one page, which works by click and key without a kernel or network",
                  "Write report.html into the run folder: metrics, the explorer over stored values, curves, alarms, "
                  "clips, settings and environment.", configurable=False)  # fmt: skip
    sub.add_argument("folder", help="a run folder")

    sub = command("replay", "ask the networks of a saved slice again, and compare",
                  "Recompute what the explorer saved by `save slice`: hidden states after every layer, and "
                  "log-probabilities. Prints the largest difference of each; exit code 2, and where it first "
                  "differs, if one is larger than rounding explains.", configurable=False)  # fmt: skip
    sub.add_argument("file", help="the slice's .json or .safetensors, in slices/ of a run folder")
    sub.add_argument("--device", help="auto, cpu or cuda (default: auto)")
    sub.add_argument("--dtype", help="auto, float32, bfloat16 or float16 (default: the run's)")
    sub.add_argument("--backend", help="native or upstream (default: the run's)")

    add_check_alignment(command, _integer, _number)

    sub = command("bench", "time a training step and its stages, generation, path sampling and losses",
                  "Measure the median of several calls after a warm-up, peak memory, and TFLOP/s compared with a "
                  "matrix product; writes JSON. -c shapes is small enough for a CPU.")  # fmt: skip
    sub.add_argument("--size", help="use random weights of size 0.6B, 1.7B or tiny instead of a checkpoint")
    sub.add_argument(
        "--parts",
        default="step,generate,path,losses",
        help="some of step, generate, path, losses, save, attention, kernels (default: %(default)s)",
    )
    sub.add_argument("--against", default="", help="also measure naive, upstream, or naive,upstream")
    sub.add_argument("--repeats", type=_integer, default=5, help="number of timed calls (default: %(default)s)")
    sub.add_argument("--warmup", type=_integer, default=2, help="number of calls before them (default: %(default)s)")
    sub.add_argument("--generate", default="1,25", help="numbers of sampling steps (default: %(default)s)")
    sub.add_argument("-o", "--out", default="runs/bench.json", help="default: %(default)s")
    _overrides(sub)

    sub = command("config", "list all configuration keys, or all values of a preset")
    sub.add_argument("--presets", action="store_true", help="list the presets")
    _overrides(sub)


def _read(kind: str, text: str) -> Any:
    """Parse a number as in a configuration; Python's int would accept 1_0 as 10."""
    try:
        return read_value("it", kind, text)
    except DimoError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("it").lstrip(": ")) from error


_integer, _number = partial(_read, "int"), partial(_read, "float")
