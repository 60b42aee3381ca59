"""What is measured of frames, against plain loops; what it costs; and where the time of an evaluation goes."""

import itertools
import math
import re

import pytest
import torch

from dimo.errors import DimoError
from dimo.evaluation import decoding, videos
from dimo.evaluation.comparison import Comparison
from dimo.evaluation.differences import MEASURES, flicker, motion, of_colours, sharpness
from dimo.evaluation.evaluate import rows_of, videos_of
from dimo.evaluation.spent import format_spent, seconds_of_jobs

F, H, W = 4, 3, 5


def plain(frames):
    """Motion, flicker and sharpness of one video's frames (F, h, w, 3), a nested list."""

    def apart(a, b):
        return sum((x - y) ** 2 for x, y in zip(a, b)) / 3

    place = list(itertools.product(range(H), range(W)))
    motion = [apart(frames[t][y][x], frames[t - 1][y][x]) for t in range(1, F) for y, x in place]
    flicker = [
        min(apart(frames[t][y][x], frames[t - 1][y][x]), apart(frames[t][y][x], frames[t + 1][y][x]))
        for t in range(1, F - 1)
        for y, x in place
    ]
    sharp = [apart(frames[t][y][x], frames[t][y - 1][x]) for t in range(F) for y, x in place if y]
    sharp += [apart(frames[t][y][x], frames[t][y][x - 1]) for t in range(F) for y, x in place if x]
    return [sum(values) / len(values) for values in (motion, flicker, sharp)]


def test_pixels_are_what_plain_loops_say(generator):
    frames = torch.rand(2, F, H, W, 3, generator=generator, dtype=torch.float64)
    got = torch.stack([function(frames, of_colours) for function in MEASURES.values()], 1)
    assert torch.allclose(got, torch.tensor([plain(one.tolist()) for one in frames], dtype=torch.float64))
    held = frames.repeat_interleave(2, 1)
    assert (flicker(held, of_colours) == 0).all() and (motion(held, of_colours) > 0).all()
    assert motion(frames[:, :1], of_colours) is None and flicker(frames[:, :2], of_colours) is None
    assert sharpness(frames[:, :, :1, :1], of_colours) is None and sharpness(frames[:, :, :1], of_colours) is not None
    for function in MEASURES.values():
        with pytest.raises(DimoError, match=r"video must have shape \(B, T, H, W\)"):
            function(frames[0, 0], of_colours)


@pytest.fixture(scope="module")
def compared(ursa, world):
    """A comparison of the teacher with itself, some videos of which are judged: (comparison, {job: what it gave})."""
    comparison = Comparison(
        ursa, ursa.transformer, world.prompts[:4], world.latents_shape, videos_per_prompt=2, max_prompt_length=4,
        seed=5, batch_size=3, judged=4, teacher_steps=(2,),
    )  # fmt: skip
    return comparison, {job: comparison.run(job) for job in comparison.jobs()}


def test_judged_videos_are_decoded_and_compared_with_the_teachers(ursa, compared, monkeypatch):
    comparison, made = compared
    gathered = comparison.gather(made)
    rows = rows_of(comparison, gathered, None)
    for name, row in gathered.items():
        codes = row["codes"].view(4, -1, *comparison.grid)[:, 0]  # the first of the two of a prompt is judged
        frames = ursa.decode(codes)
        assert torch.allclose(row["pixel_sharpness"], sharpness(frames, of_colours))
        assert torch.allclose(row["pixel_motion"], motion(frames, of_colours))
        video = videos_of(comparison, row)
        seconds = row["seconds"].sum() / len(row["codes"]) + row["decode_seconds"].sum() / 4
        assert rows[name]["seconds_to_frames"] == pytest.approx(seconds.item()) and video.peak_bytes == 0
        assert rows[name]["seconds_to_frames"] > rows[name]["seconds_per_video"]
        assert rows[name]["pixel_flicker"] is None and "memory_gib" not in rows[name]
    own, floor = (gathered[name]["pixel_motion"].mean() for name in ("student_1", "teacher_2"))
    assert rows["student_1"]["pixel_motion"] == pytest.approx((own / floor).item(), rel=1e-5)
    low, high = rows["student_1"]["intervals"]["pixel_motion"]
    assert low < rows["student_1"]["pixel_motion"] < high
    assert rows["teacher_2"]["pixel_motion"] == pytest.approx(1 / rows["teacher_2_again"]["pixel_motion"])
    # one video at a time gives the same
    whole = decoding.in_pixels(ursa, gathered["student_1"]["codes"].view(-1, *comparison.grid))
    monkeypatch.setattr(decoding, "NUMBERS", 1)
    one_by_one = decoding.in_pixels(ursa, gathered["student_1"]["codes"].view(-1, *comparison.grid))
    assert all(torch.allclose(whole[name], one_by_one[name]) for name in whole.keys() - {"decode_seconds"})


def test_the_teachers_spread_and_motion_are_measured_once(compared, monkeypatch):
    comparison, made = compared
    seen = []

    def counted(name, inner):
        return lambda *a: seen.append(name) or inner(*a)

    monkeypatch.setattr(videos, "spread", counted("spread", videos.spread))
    monkeypatch.setitem(MEASURES, "motion", counted("motion", motion))
    rows = rows_of(comparison, comparison.gather(made), None)
    assert len(rows) == seen.count("motion") == 6  # the row from other noise has single videos: no spread
    assert seen.count("spread") == 5 * 4  # of each of 4 prompts


def test_the_table_of_time_adds_up(compared):
    comparison, made = compared
    spent = seconds_of_jobs(comparison, made, list(made))
    assert min(spent.values()) > 0
    sampling = sum(part["seconds"].item() for job, part in made.items() if job.row.startswith("teacher"))
    assert spent["the teacher's passes"] == pytest.approx(sampling)
    everything = sum(v.item() for part in made.values() for name, v in part.items() if name.endswith("seconds"))
    assert sum(spent.values()) == pytest.approx(everything)
    fixed = {"the student's passes": 10.0, "the teacher as a judge": 30.0, "first passes": 0.0}
    lines = format_spent(fixed, 25.0, {"scoring": 5.0}, 2).splitlines()
    assert lines[0] == "time: 30.0 s in 2 processes, each line a mean over them"
    table = {words: float(n) for words, n in (re.match(r"  (.+?)  +([\d.]+) s", line).groups() for line in lines[1:])}
    assert table == {
        "the teacher as a judge": 15.0, "the student's passes": 5.0, "scoring": 5.0,
        "starting, loading and waiting for the last job": 5.0,
    }  # fmt: skip
    assert math.fsum(table.values()) == 30 and lines[1].endswith(" 50%")
    assert format_spent({}, 0.0, {}, 1) == "time: 0.0 s"
