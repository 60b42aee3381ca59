"""The explorer's numbers against full logits in float64, and that it never holds full logits itself."""

import copy
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dimo.config import load_config
from dimo.errors import DimoError
from dimo.train.trainer import Trainer
from dimo.ursa import Chunked, Dense, MetricPath, MixturePath, chunks, predict, visual_logits
from dimo.views import models as opening
from dimo.views.explorer_data import STATISTICS, Setting, ask, offered, one_pass, token_at, token_maps, top_codes
from dimo.views.models import checkpoints_of, open_models
from dimo.views.noise_maps import entropies_over, noises_of
from dimo.worlds import SHIPPED_STUDENT
from dimo.worlds.exact import ExactTeacher
from dimo.worlds.tiles import TilesWorld

TINY = Path(__file__).parent / "data" / "tiny-ursa"
SETTING = Setting("a red ball", 3, 0.4, guidance_scale=2.5, temperature=0.7)


def token_map(models, answer, setting, statistic, of):
    return token_maps(models, answer, setting, statistic, of)[statistic]


def moved(network, by, seed):
    """A copy whose weights are a little different."""
    other, g = copy.deepcopy(network), torch.Generator().manual_seed(seed)
    for weight in other.parameters():
        weight.data += by * weight.std(correction=0) * torch.randn(weight.shape, generator=g)
    return other


@pytest.fixture(scope="module")
def models():
    """A folder of URSA's layout with an auxiliary and a student that differ from the teacher and know what they say."""
    opened = open_models(TINY, size=(2, 8, 12))
    teacher = opened.ursa.transformer
    teacher.lm_head.weight.data *= 8
    opened.beta = 0.3
    opened.networks |= {"auxiliary": moved(teacher, 0.2, 0), "student": moved(teacher, 0.4, 1)}
    return opened


@pytest.fixture(autouse=True)
def few_at_once(monkeypatch):
    monkeypatch.setitem(chunks.ENTRIES, "cpu", 7 * 240)


@torch.no_grad()
def full_logits(models, answer, setting):
    """{name: (N, K) float64}, all at once."""
    n, w = models.networks, setting.guidance_scale

    def logits(network, ids, x):
        return visual_logits(network, ids, x, models.grid)[0].double()

    c, u = (logits(n["teacher"], ids, answer.x_t) for ids in (answer.txt_ids, answer.uncond_ids))
    at = {"conditional": c, "unconditional": u, "guided": u + w * (c - u)}
    at |= {name: logits(n[name], answer.txt_ids, answer.x_t) for name in ("auxiliary", "student")}
    at["one_pass"] = logits(n["student"], answer.txt_ids, answer.x_init)
    return {name: z / setting.temperature for name, z in at.items()}


@torch.no_grad()
def over_noises(models, answer, setting, of):
    """log-probabilities (n, N, K) of one pass from every noise, all at once."""
    n, g = noises_of(models.grid, models.device), torch.Generator().manual_seed(0)
    x_init = torch.randint(models.ursa.path.codebook_size, (n, math.prod(models.grid)), generator=g)
    network = models.networks["teacher" if of == "conditional" else "student"]
    z = visual_logits(network, answer.txt_ids.expand(n, -1), x_init, models.grid).double()
    return (z / setting.temperature).log_softmax(-1)


def naive(models, answer, setting, statistic, z, of):
    if statistic in ("mean_entropy", "information"):
        log_p = over_noises(models, answer, setting, of)
        left_open = -(log_p.exp() * log_p).sum(-1).mean(0)
        mean = log_p.exp().mean(0)
        return left_open if statistic == "mean_entropy" else -(mean * mean.log()).sum(-1) - left_open
    x, rows = answer.x_hat[0], range(answer.x_hat.shape[1])
    log_p, log_t = z[of].log_softmax(-1), z["guided"].log_softmax(-1)
    p, t = log_p.exp(), log_t.exp()
    if statistic == "entropy":
        return -(p * log_p).sum(-1)
    if statistic == "kl_from_teacher":
        return (t * (log_t - log_p)).sum(-1)
    if statistic == "kl_to_teacher":
        return (p * (log_p - log_t)).sum(-1)
    if statistic == "tv":
        return (t - p).abs().sum(-1) / 2
    if statistic == "rank":
        order = [z[of][i].argsort(descending=True).tolist() for i in rows]
        return torch.tensor([1.0 + order[i].index(x[i]) for i in rows], dtype=torch.float64)
    if statistic == "distance":
        e = models.ursa.path.codebook.double()
        return torch.stack([(p[i] * (e - e[x[i]]).square().sum(-1)).sum() for i in rows])
    leaf = z[of].clone().requires_grad_(True)  # the gradient of D_beta as autograd has it
    log_q, beta = leaf.log_softmax(-1), models.beta
    d = (1 - beta) * (t * (log_t - log_q)).sum() + beta * (log_q.exp() * (log_q - log_t)).sum()
    return torch.autograd.grad(d, leaf)[0].norm(dim=-1)


@pytest.mark.parametrize("statistic", STATISTICS)
def test_maps_are_those_of_full_logits(models, statistic):
    answer = ask(models, SETTING.prompt, SETTING.seed, SETTING.t)
    z, spread = full_logits(models, answer, SETTING), []
    for of in offered(models)[statistic]:
        got, want = token_map(models, answer, SETTING, statistic, of), naive(models, answer, SETTING, statistic, z, of)
        assert got.shape == models.grid and got.dtype == torch.float32
        assert torch.allclose(got.flatten().double(), want, atol=1e-4, rtol=5e-4), of
        spread.append(want.std().item())
    assert min(spread) > 1e-3 and offered(models)[statistic] == list(STATISTICS[statistic].of)


def test_what_the_noise_decides_has_its_closed_form(monkeypatch):
    """Of a code that is the noise's but for a share e of errors, log 2 - h(e) is decided; of one that is deaf, 0."""
    monkeypatch.setitem(chunks.ENTRIES, "cpu", 3 * 4)
    e = 0.1
    clean = torch.tensor([[1 - e, e, 0, 0], [e, 1 - e, 0, 0]]).repeat(4, 1)  # of 8 noises, half of each kind
    deaf = torch.tensor([0.5, 0.25, 0.25, 0]).expand(8, 4)
    p = torch.stack([clean, deaf, torch.eye(4).repeat(2, 1), clean, deaf], 1)  # (8, 5, 4)
    found = entropies_over([Dense(part.clamp(min=1e-38).log()) for part in p.split(3)])
    h = -e * math.log(e) - (1 - e) * math.log(1 - e)
    assert found["mean_entropy"].tolist() == pytest.approx([h, 1.5 * math.log(2), 0, h, 1.5 * math.log(2)], abs=1e-5)
    decided = [math.log(2) - h, 0, math.log(4), math.log(2) - h, 0]
    assert found["information"].tolist() == pytest.approx(decided, abs=1e-5)
    colder = entropies_over([Dense(p.clamp(min=1e-38).log())], temperature=0.5)
    q = e**2 / (e**2 + (1 - e) ** 2)
    h = -q * math.log(q) - (1 - q) * math.log(1 - q)
    assert colder["information"][0].item() == pytest.approx(math.log(2) - h, abs=1e-5)
    with pytest.raises(DimoError, match="at least one batch of noises"):
        entropies_over([])
    gpu = torch.device("cuda")
    assert [noises_of(grid, gpu) for grid in ((3, 4, 4), (5, 32, 32), (13, 40, 64))] == [64, 25, 8]


def test_the_first_passes_are_those_that_a_view_needs_and_change_no_draw(models, monkeypatch):
    asked = []
    monkeypatch.setattr(opening, "predict", lambda net, *args, **how: asked.append(net) or predict(net, *args, **how))
    before = torch.get_rng_state()
    opening.first_passes(models)
    assert asked == [models.networks["student"]] and torch.equal(before, torch.get_rng_state())


def test_the_shipped_student_is_decided_by_its_noise_and_the_teacher_is_not():
    shipped = open_models("shapes", student=SHIPPED_STUDENT)
    setting = Setting(shipped.prompts[0])
    answer = ask(shipped, setting.prompt)
    decided, left = (
        {of: token_map(shipped, answer, setting, statistic, of).mean() for of in ("conditional", "one_pass")}
        for statistic in ("information", "mean_entropy")
    )
    assert decided["one_pass"] > 1 > 0.5 > decided["conditional"] and left["one_pass"] < 0.1 < 1 < left["conditional"]


def test_nothing_is_compiled_while_somebody_waits(models, monkeypatch):
    compiles = []

    def on_device(function, x):
        compiles.append(chunks._compiles.get())
        return function

    monkeypatch.setattr("dimo.ursa.prediction.on_device", on_device)
    monkeypatch.setattr("dimo.ursa.probability_path.on_device", on_device)
    monkeypatch.setattr(models.ursa.path, "_table", None)  # as of many codes
    answer = ask(models, SETTING.prompt)
    for statistic in offered(models):
        token_map(models, answer, SETTING, statistic, offered(models)[statistic][0])
    top_codes(answer, SETTING, 3)
    assert len(compiles) >= 2 and not any(compiles)


def test_the_gradient_follows_the_runs_beta_in_time(models):
    answer, in_time = ask(models, SETTING.prompt, SETTING.seed, SETTING.t), copy.copy(models)
    in_time.beta, fixed = "time", copy.copy(models)
    fixed.beta = SETTING.t
    maps = [token_map(m, answer, SETTING, "gradient", "auxiliary") for m in (in_time, fixed, models)]
    assert torch.equal(maps[0], maps[1]) and not torch.allclose(maps[0], maps[2], rtol=1e-2)


def test_a_click_costs_one_row_of_the_head_and_a_map_never_more_than_a_chunk(models, monkeypatch):
    answer, rows = ask(models, SETTING.prompt, SETTING.seed, SETTING.t), []
    logits = Chunked._rows

    def counted(self, some):
        made = logits(self, some)
        rows.append(len(made))
        return made

    monkeypatch.setattr(Chunked, "_rows", counted)
    monkeypatch.setattr("dimo.ursa.prediction.predict", None)  # no pass
    everywhere = top_codes(answer, SETTING)
    assert max(rows) == 7 and sum(rows) == 6 * 48
    token_map(models, answer, SETTING, "tv", "student")
    assert max(rows) == 7
    rows.clear()
    here, z = top_codes(answer, SETTING, token=31), full_logits(models, answer, SETTING)
    assert rows == [1] * 6
    for name, top in here.items():
        log_p = z[name][31].log_softmax(-1)
        assert top.codes[0].tolist() == log_p.argsort(descending=True)[:8].tolist()
        assert torch.allclose(top.log_p[0].double(), log_p.sort(descending=True).values[:8], atol=1e-4)
        assert top.rank[0] == 1 + (log_p > log_p[answer.x_hat[0, 31]]).sum()
        assert torch.equal(top.codes[0], everywhere[name].codes[31])
        assert torch.allclose(top.log_p_x_hat, everywhere[name].log_p_x_hat[31:32], atol=1e-5)


def test_only_prompt_noise_and_t_change_what_is_asked(models):
    a, b = (ask(models, "a red ball", 3, t) for t in (0.1, 0.9))
    assert torch.equal(a.x_hat, b.x_hat) and not torch.equal(a.x_t, b.x_t)
    other = ask(models, "a red ball", 4, 0.1)
    assert not torch.equal(a.x_init, other.x_init)
    assert torch.equal(ask(models, "a red ball", 3, 0.1).x_t, a.x_t)
    assert torch.equal(one_pass(models, "a red ball", 3).x_hat, a.x_hat)  # the clips of a report are made by it
    kept = (b.x_t == b.x_hat).float().mean()
    assert kept > (a.x_t == a.x_hat).float().mean()


def test_a_fresh_checkpoint_is_three_times_the_teacher_in_one_pass(monkeypatch):
    fresh, passes = open_models(TINY, size=(2, 8, 12)), []
    hidden = type(fresh.ursa.transformer).hidden
    monkeypatch.setattr(
        type(fresh.ursa.transformer), "hidden", lambda self, *args: passes.append(1) or hidden(self, *args)
    )
    answer = ask(fresh, "a red ball", 0, 0.5)
    assert len(passes) == 3  # x_init, with and without the prompt
    assert set(fresh.networks.values()) == {fresh.ursa.transformer}
    for of in ("auxiliary", "student"):
        for statistic in ("tv", "kl_from_teacher"):
            assert token_map(fresh, answer, Setting("a red ball"), statistic, of).abs().max() < 1e-6
    assert fresh.prompts and "as training starts" in fresh.label


def test_without_an_auxiliary_or_a_codebook_less_is_offered():
    shipped = open_models("shapes", student=SHIPPED_STUDENT)
    assert "gradient" not in offered(shipped) and offered(shipped)["tv"] == ["student"]
    assert isinstance(shipped.ursa.path, MetricPath) and "distance" in offered(shipped)
    shipped.ursa.path = MixturePath(torch.zeros(10, 2))
    assert "distance" not in offered(shipped)
    answer = ask(shipped, shipped.prompts[0])
    with pytest.raises(DimoError, match="statistic 'distance' is not one of those here"):
        token_map(shipped, answer, Setting("p"), "distance", "student")


def test_an_exact_teacher_is_asked_with_its_t():
    """Closed form: uniform over the free factors at t = 0, whatever x_t."""
    world = TilesWorld()
    path = MetricPath(world.codebook(), 0.9, 2.0)
    exact = ExactTeacher(world, path)
    models = open_models("shapes")
    models.ursa.path, models.grid, models.prompts = path, world.latents_shape, world.prompts
    models.ursa.tokenize = lambda prompts, length: exact._txt_ids[
        [world.prompts.index(p) if p else -1 for p in prompts]
    ]
    models.networks = dict.fromkeys(("teacher", "student"), exact)
    answer, setting = ask(models, world.prompts[0], 0, 0.6), Setting(world.prompts[0], 0, 0.6, 1.5, 2.0)
    top = top_codes(answer, setting, token=5, k=3)["conditional"]
    (z,) = exact.predict(answer.txt_ids, answer.x_t, models.grid, 0.6).logits(slice(5, 6))
    want = (z / 2).log_softmax(-1).sort(descending=True)
    assert torch.allclose(top.log_p[0], want.values[:3], atol=1e-4)
    assert token_map(models, answer, setting, "entropy", "guided").min() >= 0


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "mine"
    keys = ["training.max_train_steps=4", "experiment.save_every=2", "distill.batch_size_per_gpu=2", "optim.lr=1e-2"]
    Trainer(load_config("smoke", ["model.device=cpu", f"experiment.output_dir={folder}", *keys])).train(progress=False)
    return folder


def test_any_step_of_a_run_has_its_own_networks(run):
    assert checkpoints_of(run) == [2, 4, "final"]
    for step, name in ((2, "student"), (4, "auxiliary")):
        models = open_models(run, step)
        file = run / "checkpoints" / f"step-0000000{step}" / f"{name[:3] if name[0] == 'a' else name}.safetensors"
        saved, key = load_file(file), "model.layers.0.mlp.up_proj.weight"
        assert torch.equal(models.networks[name].state_dict()[key], saved[key])
        assert models.label == f"mine, step {step}" and models.folder == run
    first, newest, final = open_models(run, 2), open_models(run), open_models(run, "final")
    assert newest.label == final.label == "mine, final" and len(final.networks) == 3
    maps = [token_map(m, ask(m, m.prompts[0]), Setting(m.prompts[0]), "tv", "auxiliary") for m in (first, final)]
    assert not torch.allclose(*maps) and min(maps[0].max(), maps[1].max()) > 0
    assert len(set(open_models(run, 0).networks.values())) == 1
    assert first.origin == {"source": str(run), "step": 2}


def test_what_is_not_there_is_a_sentence(run, tmp_path):
    with pytest.raises(DimoError, match="mine has no checkpoint of step 3; there are 2, 4, final, and 0"):
        open_models(run, 3)
    with pytest.raises(DimoError, match="student and size must be left out"):
        open_models(run, student="x")
    with pytest.raises(DimoError, match="step must be left out"):
        open_models("shapes", 5)
    with pytest.raises(DimoError, match="neither a folder nor a built-in world"):
        open_models(tmp_path / "none")
    models = open_models(run, 0)
    answer = ask(models, models.prompts[0])
    with pytest.raises(DimoError, match=r"token must lie in \[0, 48\), got 48"):
        top_codes(answer, Setting("p"), token=48)
    with pytest.raises(DimoError, match=r"token must lie in latents_shape \(3, 4, 4\) .*got \(3, 0, 0\)"):
        token_at(models.grid, (3, 0, 0))
    with pytest.raises(DimoError, match="entropy is not defined for 'students'; did you mean 'student'"):
        token_map(models, answer, Setting("p"), "entropy", "students")
    for bad in ({"t": 1.0}, {"temperature": 0.0}, {"guidance_scale": math.nan}, {"seed": -1}):
        with pytest.raises(DimoError, match=next(iter(bad))):
            Setting("p", **bad)
    unfinished = tmp_path / "young"
    unfinished.mkdir()
    (unfinished / "config.yaml").write_text((run / "config.yaml").read_text())
    (unfinished / "status.json").write_text('{"state": "running", "step": 1, "max_steps": 9, "pid": 1, "host": "h"}')
    with pytest.raises(DimoError, match=r"young has no checkpoint yet \(step 1 of 9\)"):
        open_models(unfinished)
    assert open_models(unfinished, 0).label == "young, as training starts"
