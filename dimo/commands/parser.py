"""The command line's grammar: subcommands, their flags and what --help says of them."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

from dimo.commands.examples import EXAMPLES, examples
from dimo.commands.sample import Request
from dimo.commands.world_train import add_world
from dimo.config.flags import RENAMED
from dimo.config.values import read_value
from dimo.errors import DimoError

CONFIGURABLE = ("train", "run", "plan", "evaluate", "ablate", "bench", "config")
RENAMED_HELP = "\n".join(f"  --{flag:12}  {key}" for flag, key in RENAMED.items())
FLAGS_HELP = f"""\
flags: every configuration key is also a flag by its last part (`--lr 5e-4` is optim.lr=5e-4); besides,
{RENAMED_HELP}
`dimo config` lists all keys with their meaning."""


def make_parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The parser, and its subcommands' by name. What is parsed holds the subcommand's name as `command`."""
    parser = argparse.ArgumentParser(
        prog="dimo",
        description="Distil a discrete video diffusion model into a one-step generator.",
        epilog=examples([name for name in EXAMPLES if " " not in name], most=1)
        + "\n\nThe same command again resumes a run. Run folders: runs/<name>/.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(metavar="command", dest="command", required=True)
    command = partial(_command, commands)
    _add_training(command)
    _add_results(command)
    _add_looking(command)
    add_world(commands, {int: _whole, float: _number})
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
    sub.add_argument("overrides", nargs="*", metavar="key=value", help="configuration, such as optim.lr=3e-4")


def _add_training(command: Callable) -> None:
    """Commands that train, or say what training would take."""
    sub = command("train", "distil a student into a run folder; the same command again resumes")
    _overrides(sub)

    sub = command("run", "execute the five notebooks headless, in order, and write report.html")
    sub.add_argument("-p", "--parameter", action="append", default=[], metavar="NAME=VALUE", dest="parameters",
                     help="a notebook's own parameter (or a configuration key); may be repeated")  # fmt: skip
    sub.add_argument("--only", action="append", default=[], metavar="NOTEBOOK",
                     help="only this notebook, such as 02_losses; may be repeated")  # fmt: skip
    sub.add_argument("--from", metavar="NOTEBOOK", dest="start", help="leave out the notebooks before this one")
    sub.add_argument("--force", action="store_true", help="execute again what was executed with the same parameters")
    _overrides(sub)

    sub = command("plan", "memory per GPU, time and tokens of a configuration, before the days are spent",
                  "Go through one step without weights or values, and print what each GPU needs, how long the run "
                  "takes where a GPU is there to try, and what to change if it does not fit.")  # fmt: skip
    sub.add_argument("--size", help="0.6B or 1.7B, in place of a folder in distill.teacher_ckpt")
    sub.add_argument("--memory", type=_number, metavar="GIB", help="of one GPU (default: of the GPU here, else 80)")
    sub.add_argument("--dry_run", action="store_true", help="only say whether the step goes through, on all ranks")
    _overrides(sub)

    sub = command("ablate", "the recipe against literal, reinforce and KD alone",
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
    _overrides(sub)


def _add_results(command: Callable) -> None:
    """Commands about what training made."""
    sub = command("evaluate", "score a student at one step beside its teacher, on the same noise",
                  "Score a student at one step beside its teacher at 1..25, same prompts, noise and scorer; writes "
                  "report.json and sheet.png.")  # fmt: skip
    sub.add_argument("student", nargs="?",
                     help="a run folder, student.pt, a .safetensors file, or a folder that holds one "
                     "(default: the student that ships with dimo)")  # fmt: skip
    sub.add_argument("--student_ckpt", help="the same, as a flag")
    sub.add_argument("-o", "--out", "--out_dir", help="folder for report.json and sheet.png (default: the run folder, "
                     "if it is one, else runs/evaluation)")  # fmt: skip
    sub.add_argument("--set", action="append", default=[], help=argparse.SUPPRESS)  # key=value, in its older spelling
    _overrides(sub)

    sub = command("sample", "make videos of prompts with a student or a teacher",
                  "Write 0000.mp4 (png for one frame) per prompt and 0000.json beside it: prompt, seed, settings. "
                  "Without a decoder for the VAE, its codes as safetensors.", configurable=False)  # fmt: skip
    sub.add_argument("--prompt", action="append", default=[], help="may be repeated")
    sub.add_argument("--prompt_file", help="a txt, jsonl, csv or parquet file of captions, or a folder of them")
    sub.add_argument("--out_dir", default="runs/samples", help="default: %(default)s")
    for field in dataclasses.fields(Request):
        kind = {"int": _whole, "float": _number}.get(field.type.split(" ")[0], str)
        sub.add_argument(f"--{field.name}", type=kind, default=field.default, help=field.metadata["help"])

    sub = command("runs", "the runs of a folder: state, steps, speed, age",
                  "One line per run; `dead` is one whose status says running and that no process works on.",
                  configurable=False)  # fmt: skip
    sub.add_argument("folder", nargs="?", default="runs", help="default: %(default)s")


def _add_looking(command: Callable) -> None:
    """Commands that look at checkpoints, speed and configuration."""
    sub = command("inspect", "what a checkpoint folder in URSA's layout holds, and what is missing",
                  "Print sizes, codebook, path, token counts and memory at a resolution; exit code 2 where something "
                  "is missing or damaged.", configurable=False)  # fmt: skip
    sub.add_argument("folder", help="a checkpoint folder, or a built-in world's name")
    for name in ("num_frames", "height", "width"):
        sub.add_argument(f"--{name}", type=_whole, help="default: the world's, else 17x256x256 or an image")
    sub.add_argument(
        "--max_prompt_length", type=_whole, help="text tokens (default: the world's longest prompt's, else 320)"
    )

    sub = command("bench", "time a training step and its stages, generation, path sampling and losses",
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
    _overrides(sub)

    sub = command("config", "every configuration key, or a preset resolved")
    sub.add_argument("--presets", action="store_true", help="list the presets")
    _overrides(sub)


def _read(kind: str, text: str) -> Any:
    """As a configuration's numbers are read: Python's own int makes 10 of 1_0."""
    try:
        return read_value("it", kind, text)
    except DimoError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("it").lstrip(": ")) from error


_whole, _number = partial(_read, "int"), partial(_read, "float")
