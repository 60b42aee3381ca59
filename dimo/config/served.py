"""`distill.protocol`: the settings of the teacher under which URSA's own results were made, by name."""

from __future__ import annotations

from typing import Any

from dimo.config.schema import Distill
from dimo.errors import DimoError, nearest

NEGATIVE_PROMPT = "worst quality, low quality, inconsistent motion, static, still, blurry, jittery, distorted, ugly"
PROTOCOLS = {  # {name: keys as written}; baaivision/URSA, docs/evaluation.md
    "none": {},
    "vbench": {
        "distill.guidance_scale": "7",
        "distill.negative_prompt": NEGATIVE_PROMPT,
        "distill.motion_prefix": "9",
        "distill.motion_share": "1",
    },
}


def with_protocol(file: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """{key: value as written}: overrides win over a file, and either over the protocol that it names itself."""
    return _protocol(file) | file | _protocol(overrides) | overrides


def _protocol(written: dict[str, Any]) -> dict[str, str]:
    name = written.get("distill.protocol", "none")
    if name not in PROTOCOLS:
        known = " or ".join(PROTOCOLS)
        raise DimoError(f"distill.protocol must be {known}, got {name!r}{nearest(str(name), PROTOCOLS)}")
    return PROTOCOLS[name]


def require_captioned_video(d: Distill, of_world: bool) -> None:
    """Raise DimoError if the protocol cannot be followed: a world has no captions, and an image no motion."""
    if d.protocol == "none":
        return
    if of_world or d.prompt_source == "world":
        raise DimoError(
            f"distill.protocol={d.protocol} puts words before captions, so it needs a URSA checkpoint and a file of "
            f"captions, but distill.teacher_ckpt is {d.teacher_ckpt} and distill.prompt_source {d.prompt_source}; for "
            "a world, set distill.guidance_scale alone"
        )
    if d.num_frames == 1:
        raise DimoError(
            f"distill.protocol={d.protocol} is how videos are made, with a motion prefix, but distill.num_frames is 1; "
            "for images, set distill.guidance_scale=7 alone"
        )
