"""`dimo sample --suite`: what is found by the scorers' own rules, resumed, shared, refused."""

import json
import os
import re
import shutil
import time
from pathlib import Path

import imageio.v3 as iio
import pytest
import torch
from forks import python
from processes import BY_CHILDREN

from dimo.commands import suite as suites
from dimo.commands.cli import main
from dimo.commands.sample import Request, sample_to_folder
from dimo.commands.suite import sample_suite
from dimo.commands.suite_files import LONGEST_NAME, SUITES, SuiteRequest, read_entries
from dimo.errors import DimoError
from dimo.ursa import load_ursa, save_student
from dimo.ursa.palette import PaletteDecoder

TINY = Path(__file__).parent / "data" / "tiny-ursa"
SIZE = {"num_frames": 5, "height": 64, "width": 64, "max_prompt_length": 12}
METADATA = [
    {"tag": "single_object", "include": [{"class": "cow", "count": 1}], "prompt": "a photo of a cow"},
    {"tag": "colors", "include": [{"class": "bus", "count": 1, "color": "red"}], "prompt": "a photo of a red bus"},
]
PROMPTS = ["a red ball. It's 100%", "a dog, running: fast"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A teacher whose codes become frames without diffnext, a student, and the suites' files."""
    folder = tmp_path_factory.mktemp("place")
    shutil.copytree(TINY, folder / "teacher", ignore=shutil.ignore_patterns("vae"))
    PaletteDecoder(torch.rand(240, 3, generator=torch.Generator().manual_seed(0))).save(folder / "teacher" / "vae")
    network = load_ursa(TINY).transformer
    with torch.no_grad():
        network.lm_head.weight.mul_(1.5)
    save_student(folder / "student", network)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in METADATA))
    return folder


def student(place, **more):
    return Request(**{"teacher_ckpt": str(place / "teacher"), "student_ckpt": str(place / "student"), **SIZE, **more})


def vbench(place, **more):
    return SuiteRequest(**{"suite": "vbench", "prompts": str(place / "prompts.txt"), **more})


def geneval(place, **more):
    return SuiteRequest(**{"suite": "geneval", "prompts": str(place / "metadata.jsonl"), **more})


def sampling(request, suite):
    """The words of `dimo sample` that stand for both."""
    flags = [f"--{key}={value}" for key, value in vars(request).items() if value is not None]
    return ["sample", *flags, "--suite", suite.suite, "--prompts", suite.prompts]


def content(folder):
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def videos(place, tmp_path_factory):
    """VBench's videos of the student, made in one go."""
    out = tmp_path_factory.mktemp("videos")
    said = sample_suite(student(place, seed=3), vbench(place), out)
    return out, said


def test_vbench_finds_five_videos_of_each_prompt_by_its_name(videos):
    """As `VBench.build_full_info_json` looks for them: the suffix is that of whatever is listed first."""
    folder = videos[0] / "videos"
    names = os.listdir(folder)
    suffix = {Path(name).suffix for name in names}
    assert suffix == {".mp4"} and len(names) == 10
    found = [[f"{prompt}-{i}.mp4" for i in range(5) if f"{prompt}-{i}.mp4" in names] for prompt in PROMPTS]
    assert [len(files) for files in found] == [5, 5]
    frames = [iio.imread(folder / name, plugin="FFMPEG") for name in found[0]]
    assert all(video.shape == (5, 64, 64, 3) for video in frames)
    assert len({video.tobytes() for video in frames}) == 5  # each from its own noise
    assert f"vbench evaluate --videos_path {folder}" in videos[1]
    assert "the whole suite has 944 prompts, these are 2" in videos[1]


def test_each_video_is_the_one_that_dimo_sample_makes_with_its_seed(place, videos, tmp_path):
    out = videos[0]
    settings = json.loads((out / "settings.json").read_text())
    entry = settings["prompts"][1]
    assert entry["caption"] == "motion=9.0, a dog, running: fast" and len(set(entry["seeds"])) == 5
    (file,) = sample_to_folder(student(place, seed=entry["seeds"][2]), [entry["caption"]], tmp_path)
    assert file.read_bytes() == (out / "videos" / "a dog, running: fast-2.mp4").read_bytes()
    assert (settings["steps"], settings["guidance_scale"], settings["samples"]) == (1, 1.0, 5)
    assert "student/config.json" in settings["sha256"] and "teacher/scheduler/scheduler_model.pth" in settings["sha256"]


def test_a_seed_follows_from_prompt_and_index_wherever_the_prompt_stands(place):
    entries = read_entries("vbench", place / "prompts.txt", None, None)
    (place / "other.txt").write_text(f"something else\n{PROMPTS[1]}\n")
    (again,) = [e for e in read_entries("vbench", place / "other.txt", None, 9.0) if e.prompt == PROMPTS[1]]
    assert entries[1].seed(0, 3) == again.seed(0, 3)
    seeds = {entry.seed(seed, i) for entry in entries for seed in (0, 1) for i in range(5)}
    assert len(seeds) == 20 and all(0 <= seed < 2**63 for seed in seeds)


def test_what_is_missing_or_damaged_is_made_again_and_nothing_else(place, videos, tmp_path, monkeypatch, capsys):
    out = shutil.copytree(videos[0], tmp_path / "out")
    want = content(out)
    gone, cut = (out / "videos" / f"{PROMPTS[0]}-{i}.mp4" for i in (1, 4))
    gone.unlink()
    cut.write_bytes(cut.read_bytes()[:-9])
    (out / "videos" / f".{PROMPTS[1]}-0.77.partial.mp4").write_text("half")
    made, make = [], suites.Samples.make
    monkeypatch.setattr(suites.Samples, "make", lambda s, n, job: (made.append(job.index), make(s, n, job)))
    sample_suite(student(place, seed=3), vbench(place), out)
    assert made == [1, 4] and content(out) == want
    assert "8 are done, 2 were damaged" in capsys.readouterr().err
    for key, changed in (("seed", student(place, seed=4)), ("steps", student(place, seed=3, steps=2))):
        with pytest.raises(DimoError, match=f"made with other settings, the first of which is {key}: . there, . here"):
            sample_suite(changed, vbench(place), out)
    with pytest.raises(DimoError, match="the first of which is sha256; give another --out_dir"):
        sample_suite(student(place, seed=3, student_ckpt=None, steps=1, guidance_scale=1.0, negative_prompt=""),
                     vbench(place), out)  # fmt: skip
    assert content(out) == want


def test_a_killed_suite_goes_on(place, videos, tmp_path):
    words = ["-m", "dimo", *sampling(student(place, seed=3), vbench(place)), "--out_dir", tmp_path]
    process = python.start(words)
    while len(list(tmp_path.glob("records/*.json"))) < 2:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert len(list(tmp_path.glob("records/*.json"))) < 10
    sample_suite(student(place, seed=3), vbench(place), tmp_path)
    assert content(tmp_path / "videos") == content(videos[0] / "videos")
    assert content(tmp_path / "records") == content(videos[0] / "records")


def test_geneval_finds_four_images_beside_the_prompts_line_and_two_processes_make_what_one_makes(place, tmp_path):
    """As evaluate_images.py looks for them."""
    request = student(place, num_frames=1)
    words = ["-c", BY_CHILDREN, *sampling(request, geneval(place)), "--num_processes=2", "--out_dir", tmp_path / "two"]
    done = python.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    sample_suite(request, geneval(place), tmp_path / "one")
    assert content(tmp_path / "two" / "images") == content(tmp_path / "one" / "images")
    found = {}
    for name in os.listdir(tmp_path / "two" / "images"):
        folder = tmp_path / "two" / "images" / name
        assert folder.is_dir() and name.isdigit()
        metadata = json.loads((folder / "metadata.jsonl").read_text())
        images = [i for i in os.listdir(folder / "samples") if re.match(r"\d+\.png", i)]
        found[int(name)] = metadata, sorted(images)
        assert len({iio.imread(folder / "samples" / i).tobytes() for i in images}) == 4
    assert found == {n: (line, [f"{i:04d}.png" for i in range(4)]) for n, line in enumerate(METADATA)}


def test_a_teacher_is_sampled_as_ursas_results_were_made(place):
    entries = read_entries("vbench", place / "prompts.txt", None, None)
    for name, frames, steps, negative in (("vbench", 49, 50, "worst quality"), ("geneval", 1, 25, "")):
        request = Request(teacher_ckpt=str(place / "teacher"), height=64, width=64, max_prompt_length=12)
        r = suites._open(request, name, entries).request
        assert (r.num_frames, r.steps, r.guidance_scale, r.guidance_trunc) == (frames, steps, 7, 0.9)
        assert r.negative_prompt.startswith(negative) and bool(r.negative_prompt) == bool(negative)
        request.steps, request.guidance_scale = 4, 1.0
        r = suites._open(request, name, entries).request
        assert (r.steps, r.guidance_scale) == (4, 1.0)
    assert [SUITES[name].size for name in ("vbench", "geneval")] == [(49, 320, 512), (1, 1024, 1024)]


def test_captions_take_the_place_of_prompts_and_a_doubled_prompt_is_sampled_once(place, tmp_path, caplog):
    """VBench's own all_dimension.txt has two of its 946 lines twice."""
    (tmp_path / "p.txt").write_text("a cow\na bus\na cow\n")
    (tmp_path / "c.txt").write_text("A brown cow grazes.\nA bus stops.\nA white cow lies.\n")
    entries = read_entries("vbench", tmp_path / "p.txt", tmp_path / "c.txt", 9.0)
    assert [(e.line, e.prompt, e.caption) for e in entries] == [
        (0, "a cow", "motion=9.0, A brown cow grazes."), (1, "a bus", "motion=9.0, A bus stops.")
    ]  # fmt: skip
    assert entries[0].file(4) == "a cow-4" and "1 of 3 lines of" in caplog.text
    dense = [{"id": 1, "prompt": "a photo of a red bus", "dense_prompt": "A bus, red."},
             {"id": 0, "prompt": "a photo of a cow", "dense_prompt": "One cow."}]  # fmt: skip
    (tmp_path / "prompts.json").write_text(json.dumps(dense))
    entries = read_entries("geneval", place / "metadata.jsonl", tmp_path / "prompts.json", None)
    assert [(e.caption, e.file(0)) for e in entries] == [("One cow.", "00000/samples/0000"),
                                                         ("A bus, red.", "00001/samples/0000")]  # fmt: skip


@pytest.mark.parametrize(
    ("suite", "prompts", "captions", "sentence"),
    [
        ("vbench", "a\n\nb\n", None, "line 2 of .*p.txt is empty"),
        ("vbench", "\n", None, "p.txt holds no prompt"),
        ("vbench", "a\nb\n", "x\n", "has 1 captions for 2 prompts; they are paired by line"),
        ("vbench", "a\ncats/dogs\n", None, "line 2 of .* has a slash: VBench finds videos by their prompt"),
        ("vbench", ".a\n", None, "line 1 of .* begins with a dot"),
        ("vbench", '{"tag": "x", "prompt": "a"}\n', None, "p.txt is JSON, but VBench's prompts are a text file"),
        ("vbench", "x" * 250, None, "gives a file's name of 257 bytes, .* at most can be written"),
        ("geneval", "a red bus\n", None, "line 1 of .* is none of GenEval's evaluation_metadata.jsonl"),
        (
            "geneval",
            (json.dumps(METADATA[0]) + "\n") * 2,
            None,
            "'a photo of a cow' twice, in lines 1 and 2",
        ),
        ("geneval", json.dumps(METADATA[0]), "a\nb\n", "has 2 captions for 1 prompts"),
    ],
)
def test_a_file_that_is_no_suites_is_a_sentence(suite, prompts, captions, sentence, tmp_path):
    (tmp_path / "p.txt").write_text(prompts)
    (tmp_path / "c.txt").write_text(captions or "")
    with pytest.raises(DimoError, match=sentence):
        read_entries(suite, tmp_path / "p.txt", tmp_path / "c.txt" if captions else None, None)


def test_the_longest_name_that_is_taken_can_be_written(place, tmp_path):
    prompt = "x" * (LONGEST_NAME - len("-99.mp4"))
    (tmp_path / "p.txt").write_text(prompt)
    sample_suite(student(place), vbench(place, prompts=str(tmp_path / "p.txt"), samples=1), tmp_path / "out")
    assert os.listdir(tmp_path / "out" / "videos") == [f"{prompt}-0.mp4"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--suite", "vbensh", "--prompts", "P"], "suite must be one of vbench, geneval, got 'vbensh'; did you mean"),
        (["--suite", "vbench"], "--suite vbench needs --prompts"),
        (["--suite", "vbench", "--prompts", "P", "--prompt", "x"], "given by --prompts, without --prompt"),
        (["--prompt", "x", "--samples", "5"], "--samples is a flag of --suite"),
        (["--suite", "vbench", "--prompts", "P", "--samples", "0"], r"samples must lie in \[1, 100\], got 0"),
        (["--suite", "vbench", "--prompts", "P", "--num_processes", "0"], "num_processes must be at least 1"),
        (["--suite", "vbench", "--prompts", "/nowhere.txt"], "/nowhere.txt does not exist"),
        (["--suite", "vbench", "--prompts", "P", "--motion", "fast"], "'fast' is not a number, .* or none"),
        (["--suite", "vbench", "--prompts", "P", "--num_frames", "1"], "vbench scores videos: num_frames must be"),
        (["--suite", "geneval", "--prompts", "M", "--num_frames", "5"], "geneval scores images: num_frames must be 1"),
        (["--suite", "vbench", "--prompts", "P", "--teacher_ckpt", str(TINY), "--num_frames", "2"],
         "vbench scores frames, and there would be none: diffnext"),
        (["--suite", "vbench", "--prompts", "P", "--teacher_ckpt", "shapes"], "shapes world does not know the prompt"),
    ],
)  # fmt: skip
def test_bad_input_is_a_sentence_and_leaves_no_folder(words, sentence, place, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("dimo.ursa.loading.import_upstream", lambda: (_ for _ in ()).throw(DimoError("diffnext")))
    named = {"P": str(place / "prompts.txt"), "M": str(place / "metadata.jsonl")}
    words = [named.get(word, word) for word in words]
    given = [] if "--teacher_ckpt" in words else ["--teacher_ckpt", str(place / "teacher")]
    sizes = [] if "shapes" in words else ["--height", "64", "--width", "64"]
    assert main(["sample", *words, *given, *sizes, "--out_dir", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert re.search(sentence, error) and "Traceback" not in error and not (tmp_path / "out").exists()
