"""Examples of every command, for --help: the words after its name, and what they do; `dimo --help` has the first."""

from __future__ import annotations

EXAMPLES = {
    "run": {
        "-c shapes": "the five notebooks, headless, into runs/shapes, with report.html",
        "-c shapes --from 04_diagnostics -p min_share=0.9": "the last two, with a parameter of a notebook",
    },
    "train": {
        "-c shapes optim.lr=5e-4 experiment.name=slow": "a preset, with two keys of its own, into runs/slow",
        "--teacher_ckpt FOLDER --prompt_file captions.csv --out_dir runs/ursa": "URSA, with its own defaults",
    },
    "plan": {
        "-c distill_dimo --size 1.7B --num_processes 8": "memory per GPU and time, before anything starts",
    },
    "evaluate": {
        "runs/shapes": "score a run's student beside its teacher",
        "runs/shapes evaluation.seed=1 -o runs/again": "on other noise, into a folder of its own",
        "": "the student that ships with dimo",
    },
    "ablate": {
        "-c shapes --method recipe --method reinforce --lrs 1e-3,2e-3": "two of the methods at two learning rates",
    },
    "runs": {"": "every run under runs/, with state, steps, speed and age"},
    "inspect": {
        "FOLDER": "what a checkpoint folder holds, and what is missing",
        "FOLDER --num_frames 49 --height 320 --width 512": "the same, with tokens and memory at this size",
    },
    "sample": {
        '--teacher_ckpt shapes --prompt "blue bar moving up" --steps 25': "a teacher's video, into runs/samples",
        '--student_ckpt runs/shapes --prompt "blue bar moving up"': "a student's, in one pass",
    },
    "bench": {"-c shapes --against naive": "on a CPU, beside the plain way to compute the same"},
    "config": {
        "": "every key, its default and what it means",
        "-c literal --lr 1e-4": "a preset, resolved, with a key changed",
    },
    "world train": {"shapes -o worlds/small --hidden 32 --steps 2000": "a smaller teacher than the one that ships"},
}


def examples(names: list[str], most: int | None = None) -> str:
    """The `most` first examples of each command (None: all), with what they do, as text for --help."""
    lines = ["examples:"]
    for name in names:
        for words, meaning in list(EXAMPLES[name].items())[:most]:
            line = f"  dimo {name} {words}".rstrip()
            lines.append(f"{line:48}  {meaning}" if len(line) <= 48 else f"{line}\n{'':50}{meaning}")
    return "\n".join(lines)
