"""The page about a toy: one number x, of which all quantities of the derivation are known."""

from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from nelbo._utils.numerics import LOG_2, seeded
from nelbo._utils.progress import Track
from nelbo.diffusion.distributions import draw
from nelbo.diffusion.model import measuring
from nelbo.evaluation.toy import Toy, ideal_f, toy
from nelbo.explain.panels import Panel, body, fraction, sub
from nelbo.explain.values import Choice, Values, bell

DATA = (-1.3, -0.5, 0.3, 1.5)  # mean 0, mean square 1.07
STEPS = (2, 4, 8, 16)
DRAWS = 3
FIRST, LAST = 0.95, 0.02  # α_1 and α_T
LEFT = 0.3  # α_T of the schedule that ends early
CURVE = torch.linspace(-3, 3, 81, dtype=torch.float64)  # x at which P(x) is drawn


def even_log_snr(steps: int, last: float = LAST) -> Tensor:
    """Return β_1..β_T of log-SNRs that are evenly spaced from α_1 to α_T."""
    ends = torch.tensor([FIRST, last], dtype=torch.float64).logit()
    alpha = torch.linspace(ends[0].item(), ends[1].item(), steps, dtype=torch.float64).sigmoid()
    return 1 - alpha / torch.cat([alpha.new_ones(1), alpha[:-1]])


def constant(steps: int) -> Tensor:
    """Return equal β_1..β_T with the same α_T."""
    return torch.full((steps,), 1 - LAST ** (1 / steps), dtype=torch.float64)


SCHEDULES: dict[str, Callable[[int], Tensor]] = {
    "even in log SNR": even_log_snr,
    "all equal": constant,
    f"ending early, α<sub>T</sub> = {LEFT}": partial(even_log_snr, last=LEFT),
}
VARIANCES = {"β<sub>t</sub>": "beta", "β̃<sub>t</sub>": "beta_tilde"}


def linear_f(betas: Tensor) -> Callable[[Tensor, int], Tensor]:
    """Return the best f that is a straight line in z, for the mean and variance of the data."""
    x = torch.tensor(DATA, dtype=torch.float64)
    mean, variance = x.mean(), x.var(correction=0)
    alpha = (1 - betas).cumprod(0)
    before = torch.cat([alpha.new_ones(1), alpha[:-1]])

    def f(z: Tensor, t: int) -> Tensor:
        a, b, beta = alpha[t - 1], before[t - 1], betas[t - 1]
        gain = a.sqrt() * variance / (a * variance + 1 - a)
        x_hat = mean + gain * (z - a.sqrt() * mean)
        return ((1 - b) * (1 - beta).sqrt() * z + b.sqrt() * beta * x_hat) / (1 - a)

    return f


def zero(z: Tensor, t: int) -> Tensor:
    """Return what a network says before it is trained: nothing."""
    return torch.zeros_like(z)


#: what f is: a name, and the toy of betas and a variance
PREDICTIONS: dict[str, Callable[..., Toy]] = {
    "the ideal one, m<sub>t</sub>(z<sub>t</sub>, E[x|z<sub>t</sub>])": lambda betas, **how: toy(
        betas, ideal_f(DATA, betas), **how
    ),
    "the best straight line": lambda betas, **how: toy(betas, linear_f(betas), **how),
    "a network that predicts x̂ = 0": lambda betas, **how: toy(betas, zero, predicts="data", **how),
    "a network that predicts ε̂ = 0": lambda betas, **how: toy(
        betas, zero, predicts="noise", **how
    ),
}


def values(track: Track = iter) -> Values:
    """Return all numbers of the page."""
    found = Values(
        (
            Choice("x", "The example <i>x</i>", [f"{x:+.1f}".replace("-", "−") for x in DATA]),
            Choice("steps", "Number of steps <i>T</i>", [str(n) for n in STEPS], len(STEPS) // 2),
            Choice("betas", "The <i>β</i>’s", list(SCHEDULES)),
            Choice("variance", "Variance <i>σ</i>² of a reverse step", list(VARIANCES)),
            Choice("predicts", "The prediction <i>f</i>", list(PREDICTIONS)),
            Choice(
                "draw", "The draw of the noise", [str(d + 1) for d in range(DRAWS)], priced=False
            ),
        ),
        {
            "bell": bell(),
            "x": DATA,
            "curve": [CURVE[0].item(), (CURVE[1] - CURVE[0]).item()],
            "unit": "bits",
        },
    )
    models = [(n, s) for n in range(len(STEPS)) for s in range(len(SCHEDULES))]
    for i in track(range(len(models))):
        n, s = models[i]
        _encoder(found, list(SCHEDULES.values())[s](STEPS[n]), n, s)
    return found


def _encoder(found: Values, betas: Tensor, n: int, s: int) -> None:
    """Add the values of one schedule: those without a model, then those of each model."""
    x = torch.tensor(DATA, dtype=torch.float64)[:, None]
    first = toy(betas, zero)
    process, times = first.model.process, first.times.times[:, None]
    alpha = process.alpha(times[:, 0])
    found.put("beta", betas, steps=n, betas=s)
    found.put("alpha", alpha, steps=n, betas=s)
    with measuring(first.model):
        for b in range(len(x)):
            q = [process.marginal(x[b : b + 1], t) for t in times]
            q_all = [[v.mean.item(), v.stddev.item()] for v in q]
            found.put("marginal", q_all, x=b, steps=n, betas=s)
        paths = []
        for d in range(DRAWS):
            with seeded(d):  # the noise is that of the draw, whatever the other choices
                z = [draw(process.marginal(x, times[0]))]
                for before, t in pairwise(times):
                    z.append(draw(process.transition(z[-1], before, t)))
            paths.append(z)
            for b in range(len(x)):
                each = [v[b, 0].item() for v in z]
                found.put("z", each, x=b, steps=n, betas=s, draw=d)
                back = [
                    process.posterior(z[t][b : b + 1], x[b : b + 1], times[t - 1], times[t])
                    for t in range(1, len(times))
                ]
                both = [[v.mean.item(), v.stddev.item()] for v in back]
                found.put("back", both, x=b, steps=n, betas=s, draw=d)
    for p, make in enumerate(PREDICTIONS.values()):
        for v, variance in enumerate(VARIANCES.values()):
            made = make(betas, variance=variance)
            _model(found, made, paths, {"steps": n, "betas": s, "variance": v, "predicts": p})


def _model(found: Values, made: Toy, paths: list[list[Tensor]], chosen: dict[str, int]) -> None:
    model, times = made.model, made.times.times[:, None]
    x = torch.tensor(DATA, dtype=torch.float64)
    at = made.bound(torch.cat([x, CURVE]))
    for b in range(len(x)):
        each = [at.prior[b], *at.diffusion[b].flip(0), at.reconstruction[b]]
        terms = [v.item() / LOG_2 for v in each]
        found.put("terms", terms, x=b, **chosen)
        found.put("total", -at.elbo[b].item() / LOG_2, x=b, **chosen)
        found.put("evidence", -at.log_p[b].item() / LOG_2, x=b, **chosen)
        found.put("gap", at.gap[b].item() / LOG_2, x=b, **chosen)
    for name, values in (("density", at.log_p), ("below", at.elbo)):
        found.put(name, [round(v, 3) for v in values[len(x) :].exp().tolist()], **chosen)
    process = model.process
    of_schedule = {name: chosen[name] for name in ("steps", "betas", "variance")}
    with measuring(model):
        for d, z in enumerate(paths):
            p = [model.likelihood(z[0], times[0])]
            here = [-p[0].log_prob(x[:, None])]
            for i in range(1, len(times)):
                q = process.posterior(z[i], x[:, None], times[i - 1], times[i])
                p.append(model.reverse(z[i], times[i - 1], times[i]))
                here.append(kl_divergence(q, p[i]))
            for b in range(len(x)):
                f = [[k.mean[b, 0].item(), k.stddev.flatten()[-1].item()] for k in p]
                found.put("f", f, x=b, **chosen, draw=d)
                found.put("here", [v[b].item() / LOG_2 for v in here], x=b, **chosen, draw=d)
        # the KL of two normals with equal means
        zero_mean = torch.zeros(1, 1, dtype=torch.float64)
        fixed = []
        for i, (before, t) in enumerate(pairwise(times), 1):
            q = process.posterior(zero_mean, zero_mean, before, t)
            sd = p[i].stddev[:1]
            fixed.append(kl_divergence(q.base_dist, Normal(zero_mean, sd)).item() / LOG_2)
    found.put("constant", fixed, **of_schedule)


_Z, _Z_BEFORE, _X, _ALPHA = sub("z", "t"), sub("z", "t−1"), "<i>x</i>", sub("α", "t")
#: panels of all pages
MARGINAL = Panel(
    "marginal",
    "Where the latent can be",
    f"<i>q</i>({_Z}|{_X}) = N(√{_ALPHA} {_X}, 1−{_ALPHA})",
    "3",
    ("diffusion/gaussian.py:GaussianDiffusion.marginal",),
)
SUM = Panel(
    "sum",
    "The running sum becomes −ELBO",
    f"−ELBO = KL(<i>q</i>({sub('z', 'T')}|{_X}) ‖ <i>P</i>({sub('z', 'T')}))"
    f" + Σ<sub>t=2..T</sub> E<sub><i>q</i></sub> KL(<i>q</i>({_Z_BEFORE}|{_Z},{_X}) ‖"
    f" <i>P</i>({_Z_BEFORE}|{_Z})) + E<sub><i>q</i></sub>[−log"
    f" <i>P</i>({_X}|{sub('z', '1')})]",
    "5",
    (
        "diffusion/elbo.py:prior_term",
        "diffusion/elbo.py:diffusion_term",
        "diffusion/elbo.py:reconstruction_term",
    ),
    wide=True,
)


def panels() -> list[Panel]:
    """Return the panels of the page."""
    z, z_before, x = sub("z", "t"), sub("z", "t−1"), "<i>x</i>"
    alpha, beta, tilde = sub("α", "t"), sub("β", "t"), sub("β̃", "t")
    return [
        Panel(
            "path",
            "Noise, step by step",
            f"<i>q</i>({z}|{z_before}) = N(√(1−{beta}) {z_before}, {beta})",
            "2",
            ("diffusion/gaussian.py:GaussianDiffusion.transition",),
            wide=True,
        ),
        MARGINAL,
        Panel(
            "back",
            "One reverse step, with and without x",
            f'<span class="q"><i>q</i>({z_before}|{z},{x}) = N({sub("m", "t")}, {tilde})</span>'
            f' <span class="p"><i>P</i>({z_before}|{z}) = N(<i>f</i>({z}, t), <i>σ</i>²)</span>',
            "6 and 7",
            (
                "diffusion/gaussian.py:GaussianDiffusion.posterior",
                "diffusion/gaussian.py:GaussianDiffusion.m_t",
                "diffusion/model.py:Model.reverse",
            ),
        ),
        Panel(
            "cost",
            "What this step costs",
            f"KL = {fraction(f'({sub(chr(109), chr(116))} − <i>f</i>)²', '2<i>σ</i>²')} + "
            f"½[{fraction(tilde, '<i>σ</i>²')} − 1 − log {fraction(tilde, '<i>σ</i>²')}]",
            "7",
            ("diffusion/elbo.py:diffusion_term", "diffusion/reverse.py:Beta"),
        ),
        Panel(
            "schedule",
            "How fast the signal fades",
            f"{alpha} = ∏<sub>s≤t</sub> (1 − {sub('β', 's')})",
            "2",
            ("diffusion/schedules.py:Schedule.from_betas",),
        ),
        SUM,
        Panel(
            "evidence",
            "The density that the model has learned, and its bound",
            f"log <i>P</i>({x}) = ELBO + KL[<i>q</i>(<i>z</i>|{x}) ‖ <i>P</i>(<i>z</i>|{x})]",
            "1",
            ("evaluation/toy.py:Toy.bound", "evaluation/toy.py:Toy.kl"),
            wide=True,
        ),
    ]


HEAD = """<h1>The bound of one number <span class="muted">· nelbo explain toy</span></h1>
<p class="lead">A diffusion model of a single number <i>x</i>, small enough that everything in
<b>log <i>P</i>(<i>x</i>) = ELBO + KL</b> is known. Move <i>t</i> with the arrow keys, from the
noise on the right to the data on the left, and watch what each step costs.</p>"""
FOOT = """<p>Blue is what the encoder <i>q</i> knows, orange what the model <i>P</i> says, green
the data, and purple what their difference costs. All numbers were computed by the library,
integrals by quadrature on two grids, and are in bits. <i>P</i>(<i>x</i>) is a density in the units
of <i>x</i>: its −log may be below zero. In Python:
<code>nelbo.toy(betas, f).bound(x)</code>.</p>"""


def page(track: Track = iter) -> str:
    """Return the body of the page."""
    return body(HEAD, values(track), panels(), FOOT)
