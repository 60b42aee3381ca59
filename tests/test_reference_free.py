"""The reference-free metrics, each against a closed form or a plain reference."""

import itertools
import json
import logging
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from dimo.config import load_config
from dimo.errors import DimoError
from dimo.evaluation import reference_free
from dimo.evaluation.comparison import JUDGE_NOISE, OTHER_NOISE, Comparison, Job
from dimo.evaluation.evaluate import evaluate_to_folder, format_table, rows_of
from dimo.evaluation.metrics import columns_of, legend
from dimo.ursa import chunks, load_ursa, sample, save_student, visual_logits
from dimo.worlds import checkpoint_folder
from dimo.worlds.teacher import TeacherRecipe, make_teacher
from dimo.worlds.tiles import TilesWorld

TINY = Path(__file__).parent / "data" / "tiny-ursa"
GRID = (2, 4, 8)
COLUMNS = ["seconds_per_video", "spread", "distinct", "codes_used", "diversity", "token_entropy", "teacher_nll"]
COLUMNS += ["nll_difference", "guided_nll", "guided_nll_difference", "recovered", "prompt_gain", "retrieval"]
COLUMNS += ["frechet", "feature_coverage", "spread_ratio", "motion", "flicker", "sharpness"]
DETAILS = {"nll_by_t", "retrieval_prompts", "frechet_dimension", "intervals"}
PROMPTS = ["a red ball", "a dog that jumps over the wall", "rain"]
SIZES = ["distill.num_frames=1", "distill.height=8", "distill.width=16", "distill.max_prompt_length=9"]


@pytest.fixture
def videos(tiny):
    """(txt_ids (3, 9), codes (3, 64))."""
    g = torch.Generator().manual_seed(3)
    return tiny.tokenize(PROMPTS, 9), torch.randint(tiny.path.codebook_size, (3, math.prod(GRID)), generator=g)


@pytest.fixture
def indifferent(tiny):
    """The same folder with a transformer that finds all codes as likely."""
    other = load_ursa(TINY)
    torch.nn.init.zeros_(other.transformer.lm_head.weight)
    return other


@pytest.fixture
def passes(tiny, monkeypatch):
    """Leave room for one video at a time, and note how many each pass had."""
    monkeypatch.setitem(chunks.ENTRIES, "cpu", 5 * 240)
    seen = []
    hook = tiny.transformer.model.layers[0].register_forward_hook(lambda module, args, out: seen.append(len(args[0])))
    yield seen
    hook.remove()


def test_diversity():
    codes = torch.tensor([[[0, 0, 0, 0], [0, 0, 0, 1], [1, 1, 1, 1]], [[5, 5, 5, 5]] * 3])
    assert reference_free.diversity(codes) == pytest.approx(
        (0.25 + 1.0 + 0.75) / 3 / 2
    )  # the second prompt's are one video
    g = torch.Generator().manual_seed(0)
    codes = torch.randint(3, (4, 5, 7), generator=g)
    shares = [
        sum(a != b for a, b in zip(one.tolist(), two.tolist())) / 7
        for prompt in codes
        for one, two in itertools.combinations(prompt, 2)
    ]
    assert reference_free.diversity(codes) == pytest.approx(sum(shares) / len(shares))
    assert reference_free.diversity(codes[:, :1]) is None
    with pytest.raises(DimoError, match="codes must have shape"):
        reference_free.diversity(codes[0])


def test_entropy_of_an_indifferent_transformer_is_log_k(indifferent, videos):
    entropy = reference_free.pass_entropy(indifferent.transformer, *videos, GRID)
    assert entropy.shape == (3, 64) and torch.allclose(entropy, torch.tensor(math.log(240.0)))


def test_entropy_of_one_pass(tiny, videos, passes):
    txt_ids, x = videos
    got = reference_free.pass_entropy(tiny.transformer, txt_ids, x, GRID)
    assert passes == [1, 1, 1]
    p = visual_logits(tiny.transformer, txt_ids, x, GRID).double().softmax(-1)
    assert torch.allclose(got.double(), -(p * p.log()).sum(-1), atol=1e-5)


def test_entropy_of_a_guided_pass(tiny, videos, passes):
    txt_ids, x = videos
    empty = tiny.tokenize([""], 9)
    cond = visual_logits(tiny.transformer, txt_ids, x, GRID).double()
    uncond = visual_logits(tiny.transformer, empty.expand(3, -1), x, GRID).double()
    p = (uncond + 3 * (cond - uncond)).softmax(-1)
    got = reference_free.pass_entropy(tiny.transformer, txt_ids, x, GRID, 3.0, empty)
    assert torch.allclose(got.double(), -(p * p.log()).sum(-1), atol=1e-4)
    assert passes == [3, 3] + 6 * [1]
    with pytest.raises(DimoError, match="uncond_ids is needed when guidance_scale is above 1"):
        reference_free.pass_entropy(tiny.transformer, txt_ids, x, GRID, 3.0)


def noise(seed):
    return torch.Generator().manual_seed(seed)


def compared(tiny, prompts=PROMPTS, copies=2, **options):
    comparison = Comparison(
        tiny, tiny.transformer, prompts, GRID, videos_per_prompt=copies, max_prompt_length=9, seed=5, batch_size=1,
        judged=99, **options,
    )  # fmt: skip
    made = comparison.gather({job: comparison.run(job) for job in comparison.jobs()})
    return rows_of(comparison, made, None), {name: row["codes"] for name, row in made.items()}


def test_rows(tiny):
    rows, codes = compared(tiny, teacher_steps=(1, 3), guidance_scale=4.0, negative_prompt="x")
    names = ["student_1", "student_1_argmax", "untrained_1", "untrained_1_argmax", "teacher_1", "teacher_3"]
    assert list(rows) == [*names, "teacher_3_again"]
    assert all(set(row) == {*COLUMNS, *DETAILS} for row in rows.values())
    assert all(row["seconds_per_video"] > 0 for row in rows.values())
    assert rows["teacher_3"]["token_entropy"] is None and rows["teacher_1"]["token_entropy"] is not None
    assert columns_of(rows) == COLUMNS and [line.split(" (")[0] for line in legend(rows)[:-3]] == COLUMNS
    assert legend(rows)[-3].startswith("Rank correlations: measured on students of shapes")
    assert legend(rows)[-3].endswith("not of the teacher of this report.")
    assert legend(rows)[-2] == "In brackets: the 95% interval over prompts."
    assert legend(rows)[-1].startswith("teacher_3_again: the teacher from other noise, which differs from teacher_3 by")
    said = {line.split(" (")[0]: line for line in legend(rows)}
    assert "two videos of a prompt differ; undefined of a single one." in said["diversity"]
    assert rows["student_1"]["retrieval_prompts"] == 3 and "fewer); 1/3 by chance, among 3" in said["retrieval"]
    assert rows["student_1"]["frechet"] is None and "undefined below 16 videos, where chance" in said["frechet"]
    lines = format_table(rows).splitlines()
    assert max(len(line) for line in lines) <= 140 and " ".join(lines).split().count("teacher_3") > 2
    assert sorted({word for line in lines for word in line.split()} & {*COLUMNS}) == sorted(COLUMNS)

    # the same noise and draws in every row: the student is the teacher here
    assert torch.equal(codes["student_1"], codes["untrained_1"])
    assert rows["student_1"]["teacher_nll"] == rows["untrained_1"]["teacher_nll"]
    txt_ids = tiny.tokenize([p for p in PROMPTS for _ in range(2)], 9)
    x_init = torch.cat([torch.randint(240, (1, 64), generator=noise(5 * 1_000_003 + i)) for i in range(6)])
    arg_max = visual_logits(tiny.transformer, txt_ids, x_init, GRID).argmax(-1)
    assert torch.equal(codes["student_1_argmax"], arg_max)
    assert rows["student_1_argmax"]["codes_used"] == len(set(arg_max.flatten().tolist()))
    assert rows["student_1_argmax"]["diversity"] == pytest.approx(reference_free.diversity(arg_max.view(3, 2, 64)))
    of_each = [reference_free.diversity(arg_max.view(3, 2, 64)[i : i + 1]) for i in range(3)]
    low, high = rows["student_1_argmax"]["intervals"]["diversity"]
    assert (low, high) == (pytest.approx(min(of_each)), pytest.approx(max(of_each)))  # of three prompts, 1/27 are one
    entropy = reference_free.pass_entropy(tiny.transformer, txt_ids, x_init, GRID).mean().item()
    assert rows["student_1"]["token_entropy"] == pytest.approx(entropy, abs=1e-6)
    assert rows["student_1"]["token_entropy"] == rows["student_1_argmax"]["token_entropy"]

    # the teacher is guided away from the negative prompt
    for steps, name in ((1, "teacher_1"), (3, "teacher_3")):
        again = sample(
            tiny.transformer, tiny.path, txt_ids[4:5], GRID, steps, guidance_scale=4.0,
            uncond_ids=tiny.tokenize(["x"], 9), shift=tiny.shift, generator=noise(5 * 1_000_003 + 4),
        )  # fmt: skip
        assert torch.equal(codes[name][4:5], again)
    # but for the teacher's other videos
    assert not (codes["teacher_3_again"] == codes["teacher_3"]).all(1).any()
    assert rows["teacher_3_again"]["nll_difference"] == pytest.approx(-rows["teacher_3"]["nll_difference"]) != 0
    unguided, _ = compared(tiny, teacher_steps=(1,))
    assert unguided["teacher_1"]["token_entropy"] == unguided["untrained_1"]["token_entropy"]
    assert unguided["teacher_1"]["token_entropy"] > rows["teacher_1"]["token_entropy"]


def test_no_noise_is_drawn_twice_for_different_ends():
    """Generators on a CPU look at the low 32 bits of their seed only."""
    drawn = [torch.rand(4, generator=noise(offset + 5 * 1_000_003)) for offset in (0, JUDGE_NOISE, OTHER_NOISE)]
    assert len(torch.stack(drawn).unique(dim=0)) == 3


def test_the_cost_of_a_job_is_the_passes_that_it_makes(tiny):
    passes = []
    hook = tiny.transformer.model.layers[0].register_forward_hook(lambda module, args, out: passes.append(len(args[0])))
    try:
        for guidance_scale in (1.0, 3.0):
            comparison = Comparison(
                tiny, tiny.transformer, PROMPTS, GRID, videos_per_prompt=1, max_prompt_length=9, seed=5, batch_size=1,
                judged=99, teacher_steps=(1, 6), guidance_scale=guidance_scale, guidance_trunc=0.6,
            )  # fmt: skip
            for job in comparison.jobs():
                if job.index == 0:
                    comparison.run(job)  # the warm-up, which is none of its cost
                    comparison.run(Job(job.row, 1, 0))
                passes.clear()
                comparison.run(job)
                assert sum(passes) == job.cost
    finally:
        hook.remove()


def test_one_video_per_prompt_has_no_diversity_and_no_prompt_is_refused(tiny):
    rows, _ = compared(tiny, PROMPTS[:1], 1, teacher_steps=())
    assert [rows["student_1"][name] for name in ("diversity", "spread", "distinct")] == [None] * 3
    for prompts, copies in (([], 1), (PROMPTS, 0)):
        with pytest.raises(DimoError, match="at least one prompt and one video per prompt are needed"):
            compared(tiny, prompts, copies, teacher_steps=())


def config_for(folder, tmp_path, *more, prompts=PROMPTS):
    (tmp_path / "prompts.txt").write_text("\n".join(prompts) + "\n")
    source = [f"distill.teacher_ckpt={folder}", f"distill.prompt_source={tmp_path / 'prompts.txt'}", "model.device=cpu"]
    return load_config("smoke", [*source, *more])


def test_a_folder_that_is_no_world_is_evaluated_with_a_sheet_where_frames_can_be_made(tmp_path, world):
    folder = tmp_path / "checkpoint"
    shutil.copytree(checkpoint_folder("shapes"), folder)
    (folder / "world.json").unlink()
    some = ["evaluation.teacher_steps=[2]", "distill.max_prompt_length=4", "evaluation.judged_videos=6"]
    config = config_for(folder, tmp_path, *some, prompts=world.prompts[:3])
    rows = evaluate_to_folder(config, folder / "student", tmp_path / "out", progress=False)
    assert list(rows) == [
        "student_1", "student_1_argmax", "untrained_1", "untrained_1_argmax", "teacher_1", "teacher_2",
        "teacher_2_again",
    ]  # fmt: skip
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == rows
    assert (tmp_path / "out" / "sheet.png").read_bytes()[:4] == b"\x89PNG"
    assert rows["student_1"]["token_entropy"] < rows["untrained_1"]["token_entropy"]  # it was distilled
    assert rows["student_1"]["pixel_motion"] > 0 and rows["student_1"]["prompts_held_out"] == 0
    with safe_open(tmp_path / "out" / "codes.safetensors", "pt") as file:
        prompts = json.loads(file.metadata()["prompts"])
        assert sorted(prompts) == sorted(world.prompts[:3] * 2) and prompts[0] == prompts[1]
        codes = {name: file.get_tensor(name) for name in file.keys()}
    assert codes.keys() == rows.keys() and {tuple(c.shape) for c in codes.values()} == {(6, 3, 4, 4)}
    assert {name: c.unique().numel() for name, c in codes.items()} == {n: r["codes_used"] for n, r in rows.items()}


def test_without_a_decoder_the_codes_stay_and_a_sentence_says_what_to_install(tmp_path, monkeypatch, caplog):
    def missing():
        raise DimoError("diffnext cannot be used: pip install it")

    monkeypatch.setattr("dimo.ursa.loading.import_upstream", missing)
    save_student(tmp_path / "student", load_ursa(TINY).transformer)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "sheet.png").write_text("of an earlier student")
    config = config_for(TINY, tmp_path, *SIZES, "evaluation.videos_per_prompt=1", "training.mixed_precision=bf16",
                        "evaluation.judged_videos=1")  # fmt: skip
    with caplog.at_level(logging.WARNING):
        rows = evaluate_to_folder(config, tmp_path / "student", tmp_path / "out", progress=False)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["codes.safetensors", "report.json"]
    assert "sheet.png and clips.mp4 are not written: diffnext cannot be used: pip install it" in caplog.text
    assert rows["student_1"]["diversity"] is None and math.isfinite(rows["teacher_4"]["teacher_nll"])


def test_bad_input_is_refused_before_anything_is_written(tmp_path):
    for more, message in (
        (["distill.prompt_source=world"], "give a caption file"),
        ([f"distill.prompt_source={tmp_path}/none.txt"], "none.txt"),
        ([], "student.pt"),
    ):
        with pytest.raises(DimoError, match=message):
            config = config_for(TINY, tmp_path, *SIZES, *more)
            evaluate_to_folder(config, tmp_path / "student.pt", tmp_path / "out", progress=False)
        assert not (tmp_path / "out").exists()


def test_an_exact_teacher_is_judged_but_has_no_entropy_of_a_pass(tmp_path):
    recipe = TeacherRecipe(layers=1, hidden=32, heads=2, head_dim=16, batch_size=2, steps=1)
    make_teacher(TilesWorld(frames=2, codes=16), recipe, tmp_path / "world", videos_per_prompt=1)
    words = [f"distill.teacher_ckpt={tmp_path / 'world'}", "distill.teacher=exact", "distill.num_frames=5"]
    words += ["distill.height=32", "distill.width=32", "evaluation.judged_videos=1", "evaluation.videos_per_prompt=1"]
    config = load_config("tiles", [*words, "evaluation.teacher_steps=[1]", "model.device=cpu"])
    rows = evaluate_to_folder(config, tmp_path / "world" / "transformer", tmp_path / "out", progress=False)
    assert rows["teacher_1"]["token_entropy"] is None and rows["student_1"]["token_entropy"] > 0
    assert rows["teacher_1"]["validity"] is not None and math.isfinite(rows["teacher_1"]["nll_difference"])
