"""A slice misread by whatever function, planted as a user would: command, notebooks and training name it."""

import dataclasses
import json

import misalignments
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dimo.commands.check_alignment import load_slice
from dimo.commands.cli import main
from dimo.commands.notebooks import notebook_folder
from dimo.config import load_config
from dimo.errors import DimoError
from dimo.train.trainer import Trainer
from dimo.ursa import MetricPath, UrsaConfig, UrsaTransformer, chunks, inputs, load_ursa
from dimo.views import clean_tokens
from dimo.views.clean_tokens import clips_for, known_clean_tokens, sampled_clean_tokens
from dimo.views.reading import check_slice, slice_as_written
from dimo.worlds import checkpoint_folder
from dimo.worlds.fsq import LEVELS, fsq_codebook
from dimo.worlds.teacher import TeacherRecipe, train_teacher, write_checkpoint
from dimo.worlds.tiles import TilesWorld

TINY = notebook_folder().parent / "tests" / "data" / "tiny-ursa"
SIZE = ["--num_frames", "5", "--height", "8", "--width", "16", "--max_prompt_length", "9"]
T, H, W = 3, 4, 8


def of_video(change, grid=(T, H, W)):
    """A misreading of the slice as a video (B, T, H, W, K)."""
    return lambda z, n, k: change(slice_as_written(z, n, k).unflatten(1, grid)).flatten(1, 3)


PLANTED = {
    "is read one position late": lambda z, n, k: z[:, z.shape[1] - n :, -k:],
    "has height and width exchanged": of_video(lambda z: z.transpose(2, 3)),
    "takes height for width": of_video(lambda z: z.reshape(-1, T, W, H, z.shape[-1]).transpose(2, 3)),
}  # fmt: skip


def shifted_ids(z, n, k):
    return slice_as_written(z, n, k).roll(1, -1)


def trained(folder, world, **recipe):
    """The checkpoint folder of a world with a teacher that knows a little near the data."""
    recipe = TeacherRecipe(layers=1, hidden=32, intermediate=32, heads=2, **recipe)
    return write_checkpoint(folder, world, train_teacher(world, recipe, progress=False), recipe.alpha, recipe.c)


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A world whose height is not its width."""
    folder = tmp_path_factory.mktemp("wide") / "wide"
    return trained(folder, TilesWorld(T, H, W, shades=3), batch_size=32, steps=150, lr=5e-3)


def keys(folder, out, *more):
    size = ["distill.num_frames=9", f"distill.height={8 * H}", f"distill.width={8 * W}", "model.device=cpu"]
    run = ["training.max_train_steps=1", "distill.batch_size_per_gpu=2", f"experiment.output_dir={out}"]
    return [f"distill.teacher_ckpt={folder}", *size, *run, *more]


def run_cells(name, overrides, planted="", only=None):
    """The code of a notebook up to the table of checks, with a cell of the user's after the first imports."""
    code = [
        c for c in json.loads((notebook_folder() / f"{name}.ipynb").read_text())["cells"] if c["cell_type"] == "code"
    ]
    chosen, names = [c for c in code if not only or c["id"] in only], {}
    for cell in chosen:
        exec("".join(cell["source"]), names)
        if "parameters" in cell["metadata"].get("tags", []):
            names |= {"config": "smoke", "overrides": overrides}
        elif planted:
            exec(planted, names)
            planted = ""
    return names


def test_long_videos_are_sampled_as_few_as_have_enough_tokens():
    sizes = {96: 64, 1_280: 64, 5_120: 64, 33_280: 9, 10**6: 8}
    assert {n: clips_for(n) for n in sizes} == sizes


def test_of_the_videos_of_a_world_as_many_are_read_as_have_32768_tokens(tmp_path):
    few = known_clean_tokens(load_ursa(checkpoint_folder("sprites")), (5, 16, 16), tmp_path)
    assert few.codes.shape == (25, 1_280) and len(few.prompts) == 25
    many = known_clean_tokens(load_ursa(checkpoint_folder("shapes")), (3, 4, 4), tmp_path)
    assert many.codes.shape == (64, 48)


def test_the_command_says_what_the_slice_reads(wide, tmp_path, capsys):
    (tmp_path / "mine.py").write_text(
        "def right(logits, num_visual_tokens, codebook_size):\n"
        "    return logits[:, -(num_visual_tokens + 1) : -1, -codebook_size:]\n\n\n"
        "def late(z, n, k):\n    return z[:, -n:, -k:]\n\n\n"
        "def ids(z, n, k):\n    return z[:, -(n + 1) : -1, -k:].roll(1, -1)\n\n\n"
        "def short(z, n, k):\n    return z[:, -n:-1, -k:]\n\n\n"
        "def fails(z, n, k):\n    return z.view(7)\n"
    )
    for function, code, sentence in [
        ("right", 0, "the slice is right"), ("late", 1, "the slice is read one position late: it fits"),
        ("ids", 1, "the slice has its ids shifted by +1"), ("short", 2, "must have shape (64, 96, 256), got (64, 95"),
        ("fails", 2, "RuntimeError: shape '[7]' is invalid"),
        ("lat", 2, "has no function lat; did you mean 'late'"),
    ]:  # fmt: skip
        assert main(["check-alignment", str(wide), "--slice", f"{tmp_path / 'mine.py'}:{function}"]) == code
        printed = capsys.readouterr()
        assert sentence in printed.out + printed.err, function
        assert "Traceback" not in printed.err
    assert main(["check-alignment", str(wide)]) == 0
    table = capsys.readouterr().out
    assert "is read one position late" in table and "+-" in table and "64 clips of 96 tokens at t = 0.9" in table


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("mine", "module:function or file.py:function"), ("/no/such.py:f", "there is no file"),
        ("no_such_module:f", "cannot be imported: ModuleNotFoundError"), ("math:pi", "has no function pi"),
    ],
)  # fmt: skip
def test_a_slice_that_is_not_there_is_told(name, sentence):
    with pytest.raises(DimoError, match=sentence):
        load_slice(name)


@pytest.mark.parametrize(
    ("flag", "sentence"),
    [
        ("--clips=7", "--clips must be at least 8"), ("--t=1", "--t must lie in [0, 1)"),
        ("--max_prompt_length=-1", "must not be negative"), ("--passes=0", "--passes must lie in [1, 1000]"),
        ("--passes=100000000", "--passes must lie in [1, 1000]"),
        ("--height=5", "height must be a multiple of"), ("--backend=other", "backend must be one of"),
    ],
)  # fmt: skip
def test_bad_flags_are_refused_before_anything_is_sampled(flag, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(clean_tokens, "sample", None)
    assert main(["check-alignment", str(TINY), *SIZE, "--runs", str(tmp_path), flag]) == 2
    assert sentence in capsys.readouterr().err


def test_a_checkpoint_without_truth_is_read_by_its_own_samples_which_are_kept(tmp_path, monkeypatch, capsys):
    words = ["check-alignment", str(TINY), *SIZE, "--clips", "16", "--passes", "2", "--runs", str(tmp_path)]
    assert main(words) == 3
    assert "undecided between" in capsys.readouterr().out  # its weights are random
    monkeypatch.setattr(clean_tokens, "sample", None)  # no second time
    assert main([*words, "--t", "0.95"]) == 3
    assert "the teacher's own samples in" in capsys.readouterr().out
    (file,) = (tmp_path / "clean_tokens").iterdir()
    ursa = load_ursa(TINY)
    assert known_clean_tokens(ursa, (5, 4, 8), tmp_path).codes.shape == (16, 160)
    assert known_clean_tokens(ursa, (5, 4, 4), tmp_path) is None
    file.write_bytes(file.read_bytes()[:99])
    with pytest.raises(DimoError, match="is damaged .*; delete it"):
        known_clean_tokens(ursa, (5, 4, 8), tmp_path)


def test_training_on_such_a_checkpoint_checks_by_kept_samples_and_never_makes_them(tmp_path, monkeypatch):
    captions = tmp_path / "captions.txt"
    captions.write_text("a red ball\na blue ball\n")
    sizes = ["distill.num_frames=5", "distill.height=8", "distill.width=16", "distill.max_prompt_length=9"]
    out = [f"experiment.output_dir={tmp_path / 'runs' / 'one'}", f"distill.prompt_source={captions}"]
    trainer = Trainer(load_config("smoke", [f"distill.teacher_ckpt={TINY}", "model.device=cpu", *sizes, *out]))
    monkeypatch.setattr(clean_tokens, "sample", None)
    said, is_right = trainer.require_aligned()
    assert f"dimo check-alignment {TINY} --num_frames 5 --height 8 --width 16 --runs {tmp_path}/runs" in said
    assert not is_right
    monkeypatch.undo()
    sampled_clean_tokens(trainer.ursa, trainer.grid, tmp_path / "runs", 9, 8, 1, progress=False)
    said, is_right = trainer.require_aligned()
    assert said.startswith("undecided between") and not is_right


class Largest(TorchDispatchMode):
    """Entries of the largest tensor that ends in K columns."""

    def __init__(self, codes):
        super().__init__()
        self.codes, self.entries = codes, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for x in made if isinstance(made, tuple | list) else [made]:
            if isinstance(x, torch.Tensor) and x.shape[-1:] == (self.codes,):
                self.entries = max(self.entries, x.numel())
        return made


def test_logits_are_never_whole_where_they_are_large(tmp_path, monkeypatch):
    ursa, grid = load_ursa(TINY), (5, 4, 8)
    ursa.transformer.requires_grad_(False)
    clean = sampled_clean_tokens(ursa, grid, tmp_path, 9, 8, 1, progress=False)
    monkeypatch.setitem(chunks.ENTRIES, "cpu", 16 * 240)
    with Largest(240) as seen:
        check_slice(ursa, clean, 9, dense=False, slice_=slice_as_written)
    assert 0 < seen.entries <= 16 * 240


def test_each_misreading_of_1280_tokens_is_named(tmp_path):
    """By `check_slice`, of half as many clips; `scripts/misalignments.py` takes twenty batches of 64."""
    ursa = misalignments.opened("tiles", tmp_path / "long")
    clean = known_clean_tokens(ursa, misalignments.LONG, tmp_path, 32)
    planted = misalignments.planted(misalignments.LONG)
    del planted["samples shifted"]  # clips are asked a few at a time
    found = {name: check_slice(ursa, clean, 4, True, slice_).found for name, slice_ in planted.items()}
    assert found == {name: name for name in planted}


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_random_weights_of_64000_codes_are_undecided(scale, tmp_path):
    tiny, grid, g = load_ursa(TINY), (2, 4, 4), torch.Generator().manual_seed(0)
    sizes = tiny.transformer.config.to_dict() | {"vocab_size": 64_272, "lm_head_size": 64_000}
    network = UrsaTransformer(UrsaConfig.from_dict(sizes)).requires_grad_(False)
    for weight in network.parameters():
        if weight.dim() == 2:
            weight.copy_(torch.randn(weight.shape, generator=g) * scale * weight.shape[1] ** -0.5)
    path = MetricPath(fsq_codebook(LEVELS[64_000]), 0.9, 3.0)
    fresh = dataclasses.replace(tiny, transformer=network, path=path)
    clean = sampled_clean_tokens(fresh, grid, tmp_path, 9, 16, 1, progress=False)
    assert check_slice(fresh, clean, 9, dense=False).found is None


@pytest.mark.parametrize("says", PLANTED)
@pytest.mark.parametrize("precision", ["no", "bf16"])  # training reads logits, or hidden states
def test_training_refuses_a_slice_that_is_misread_in_either_way(says, precision, wide, tmp_path, monkeypatch):
    trainer = Trainer(load_config("smoke", keys(wide, tmp_path, f"training.mixed_precision={precision}")))
    assert trainer.require_aligned()[1]
    monkeypatch.setattr(inputs, "extract_visual_logits", PLANTED[says])
    with pytest.raises(DimoError, match=f"the slice {says}: .*look at extract_visual_logits"):
        trainer.require_aligned()


@pytest.mark.parametrize(
    ("precision", "says"), [("no", "ids shifted by .1"), ("bf16", "wrong in a way that has no name here")]
)
def test_shifted_ids_stop_training_too(precision, says, wide, tmp_path, monkeypatch):
    """Of hidden states it is columns that are shifted: nothing fits then, though the pass itself is fine."""
    monkeypatch.setattr(inputs, "extract_visual_logits", shifted_ids)
    trainer = Trainer(load_config("smoke", keys(wide, tmp_path, f"training.mixed_precision={precision}")))
    with pytest.raises(DimoError, match=says):
        trainer.train(progress=False)
    assert not (tmp_path / "checkpoints").exists()


PATCH = "import dimo.ursa.inputs as inputs\ninputs.extract_visual_logits = planted\n"


@pytest.mark.parametrize("says", [*PLANTED, "has its ids shifted by +1"])
def test_notebooks_01_and_02_turn_red_with_its_name(says, wide, tmp_path, monkeypatch):
    planted = PLANTED.get(says, shifted_ids)
    monkeypatch.setattr(inputs, "extract_visual_logits", inputs.extract_visual_logits)  # restored at the end
    here, finder = keys(wide, tmp_path), ["01-01", "01-02", "01-04", "01-14", "01-11"]
    named = says.replace("+", r"\+")
    monkeypatch.setattr("builtins.planted", planted, raising=False)
    with pytest.raises(DimoError, match=f"1 of .* checks failed: this notebook's slice .*the slice {named}"):
        run_cells("01_inputs", here, "extract_visual_logits = planted", finder)
    with pytest.raises(DimoError, match=f"checks failed: .*training's slice, of logits .*the slice {named}"):
        run_cells("01_inputs", here, PATCH, finder)
    inputs.extract_visual_logits = planted
    with pytest.raises(DimoError, match=f"^the slice {named}"):
        run_cells("02_losses", here, PATCH, ["02-01", "02-02", "02-04"])
