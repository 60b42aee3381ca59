"""A student of several passes (`distill.student_steps`): it is trained on what the sampler will give it in each.

The sampler makes of uniform noise x_1, for s = 1 ... S - 1 and the fixed times tau_1 < ... < tau_S of `student_times`,

    a draft y_s ~ softmax(g z_S(x_s)),      x_(s+1) ~ J(. | y_s, x_s; tau_s, tau_(s+1)),

and at last the video x_hat ~ softmax(g z_S(x_S)), with z_S the student's logits, the same network in every pass and
told neither s nor tau, g its gain, and J the jump of URSA's scheduler (`_Path.jump`): a token of x_s stays with
probability exp(-(tau_(s+1) - tau_s) sum_x r(x)) and else takes the code x with probability proportional to the rate
r(x) = p_tau(x | y_s) beta'_tau [d(x_s, y_s) - d(x, y_s)]_+ at tau = tau_s (arXiv 2412.03487). This is not the path's
own p_tau(. | y_s): J keeps tokens of x_s and takes the rate at the beginning of a step for all of it, which in a few
long steps is another distribution. A student that is to be sampled by URSA's pipeline has to learn from J.

On the metric path the rates are zero at tau = 0, where the derivative of beta is taken as zero as upstream does. The
pipeline's first jump then moves nothing, and its second pass sees the noise again. So S passes take S + 1 steps of the
pipeline, the first of which is idle (`pipeline_steps`); dimo's sampler leaves it out.

In training stage 2 draws s for every row and makes x_init = x_s by s - 1 passes without gradient, of the student as it
is now and for the row's own prompt. The memory of earlier samples would save these passes, but it is late by hundreds
of updates, has other prompts, and lacks the x_s that J starts from. Their cost is S - 1 forward passes of the batch,
beside the student's own forward and backward pass. Stages 3 to 9 take x_init as it is: x_hat is to be a video of the
teacher's whatever s is, a draft included, and the auxiliary fits the mixture of all s. Rows of the x_init mix stand for
s = 1, so that no draft begins with a corrupted sample.

The gain g of the drafts is `model.final_logit_gain`, with which the student will be sampled, and not the lower
`model.logit_gain` of its training pass: nothing in the pipeline could change the gain between passes, and the passes
after a draft should learn to go on from drafts as sharp as they will be.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dimo.distill.stages import Grid, Step
from dimo.errors import DimoError
from dimo.ursa import MetricPath, MixturePath, UrsaTransformer
from dimo.ursa.sampler import inputs_of_passes


@torch.no_grad()
def draft_x_init(
    step: Step,
    student: UrsaTransformer,
    path: MetricPath | MixturePath,
    grid: Grid,
    times: Sequence[float],
    gain: float = 1.0,
    generator: torch.Generator | None = None,
) -> None:
    """End of stage 2: draw the pass s of every row, and make x_init what the student sees in it.

    The rows of a batch take the S passes in turn, beginning with one drawn at random: each is equally likely for a row,
    and as even as can be in a batch. All S - 1 passes run for all rows, so that nothing depends on what was drawn: a
    CUDA graph stays the same, and so do the passes of processes that share a sharded student.

    Args:
        step: with `txt_ids`, `x_init` (B, N) and `corrupted`; gets `x_init` and `student_step` (B,), from 1 to S.
        times: of the S passes, as from `dimo.ursa.sampler.student_times`.
        gain: multiplies the logits of the drafts.
    """
    if not times or list(times) != sorted(set(times)):
        raise DimoError(f"times must be ascending and at least one, got {list(times)}")
    batch, device = len(step.x_init), step.x_init.device
    first = torch.randint(len(times), (1,), generator=generator, device=device)
    drawn = 1 + (first + torch.arange(batch, device=device)) % len(times)
    step.student_step = torch.where(step.corrupted, 1, drawn)
    seen = inputs_of_passes(student, path, step.txt_ids, step.x_init, grid, times, gain, step.dense, generator)
    for number, x_t in enumerate(seen, 1):
        step.x_init = torch.where((step.student_step == number)[:, None], x_t, step.x_init)
