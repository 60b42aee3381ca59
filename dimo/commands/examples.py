"""Examples for --help: {command: {arguments: what they do}}. `dimo --help` shows the first example of each command."""

from __future__ import annotations

EXAMPLES = {
    "run": {
        "-c shapes": "the five notebooks, headless, into runs/shapes, with report.html",
        "-c shapes --from 04_diagnostics -p min_share=0.9": "the last two, with a notebook parameter",
    },
    "train": {
        "-c shapes optim.lr=5e-4 experiment.name=slow": "a preset with two keys changed, into runs/slow",
        "-c shapes_long training.cuda_graph=true --seeds 1 2 3": "three seeds side by side on one GPU",
        "--teacher_ckpt FOLDER --prompt_file captions.csv --out_dir runs/ursa": "URSA with default settings",
    },
    "plan": {"-c distill_dimo --size 1.7B --num_processes 8": "memory per GPU and time, without training"},
    "evaluate": {
        "runs/shapes": "compare a run's student with its teacher",
        "runs/shapes evaluation.seed=1 -o runs/again": "the same on other noise, into another folder",
        "": "evaluate the student that ships with dimo",
    },
    "ablate": {
        "-c shapes --arm recipe --arm reinforce --lrs 1e-3,2e-3": "two methods at two learning rates",
        "--grid p1 --jobs 4 --minutes 20": "a grid that ships, on four GPUs, for 20 minutes",
    },
    "report": {"runs/shapes": "runs/shapes/report.html, one file to send to a colleague"},
    "replay": {
        "runs/shapes/slices/NAME.json": "ask the networks of a saved slice again",
        "runs/shapes/slices/NAME.json --dtype bfloat16": "the same in bfloat16, within its rounding",
    },
    "runs": {"": "all runs in runs/, with state, steps, speed and age"},
    "inspect": {
        "FOLDER": "what a checkpoint folder contains and lacks",
        "FOLDER --num_frames 49 --height 320 --width 512": "the same, with tokens and memory at this video size",
    },
    "check-alignment": {
        "shapes": "the function that training reads through, on a built-in world",
        "URSA-1.7B --slice mine.py:my_slice": "a function of yours, on samples of a URSA checkpoint",
    },
    "sample": {
        '--teacher_ckpt shapes --prompt "blue bar moving up" --steps 25': "a teacher's video, into runs/samples",
        '--student_ckpt runs/shapes --prompt "blue bar moving up"': "a student's, in one pass",
        "--student_ckpt runs/ursa --suite vbench --prompts all_dimension.txt": "what VBench scores of a student",
    },
    "export": {
        "runs/ursa exported": "the finished run's student, for URSAPipeline.from_pretrained",
        "runs/ursa exported --step newest": "the moving average in the newest checkpoint",
    },
    "bench": {
        "-c shapes --parts step": "small enough for a CPU",
        "--size 1.7B --parts step --against naive": "URSA's step on one GPU, compared with a naive one",
    },
    "config": {
        "": "all keys with their defaults and meanings",
        "-c literal --lr 1e-4": "all values of a preset, with one key changed",
    },
    "world train": {
        "shapes -o worlds/small --hidden 32 --steps 2000": "a smaller teacher than the built-in one",
        "sprites -o worlds/sprites --device cuda": "emoji over textures: a GPU's work",
    },
}


def examples(names: list[str], most: int | None = None) -> str:
    """The first `most` examples (None: all) of each command, as text for --help."""
    lines = ["examples:"]
    for name in names:
        for words, meaning in list(EXAMPLES[name].items())[:most]:
            line = f"  dimo {name} {words}".rstrip()
            lines.append(f"{line:48}  {meaning}" if len(line) <= 48 else f"{line}\n{'':50}{meaning}")
    return "\n".join(lines)
