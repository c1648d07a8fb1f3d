"""The weight that a term states: how an error of the prediction enters its cost."""

import math

import pytest
import torch
from support.known_models import MODELS, gaussian

from nelbo._utils.numerics import seeded
from nelbo.diffusion.batch import Batch
from nelbo.diffusion.decoder import GaussianDensity
from nelbo.diffusion.elbo import diffusion_rate, diffusion_term, reconstruction_term
from nelbo.diffusion.gaussian import Affine
from nelbo.diffusion.terms import DiffusionRate, DiffusionTerm, ReconstructionTerm
from nelbo.testing import orders

S = torch.tensor([0.2, 0.31, 0.5], dtype=torch.float64)
T = torch.tensor([0.25, 0.6, 0.95], dtype=torch.float64)
TERMS = {
    "decode": ReconstructionTerm(t=T),
    "step": DiffusionTerm(t=T, s=S),
    "rate": DiffusionRate(t=T),
}


@pytest.fixture(autouse=True)
def _seed():
    with seeded(41), torch.no_grad():
        yield


@pytest.mark.parametrize("name", MODELS)
def test_terms_are_those_of_the_bound(name):
    """Equation 5 and its limit: a term's cost is the function of `elbo.py` at its times."""
    known = MODELS[name]()
    x = known.examples(3)
    x = x if x.is_floating_point() else x.long()
    for term, function in (
        (TERMS["decode"], lambda: reconstruction_term(known.model, x, T)),
        (TERMS["step"], lambda: diffusion_term(known.model, x, S, T)),
        (TERMS["rate"], lambda: diffusion_rate(known.model, x, T)),
    ):
        with seeded(1):
            cost = term.draw(known.model, Batch(x)).cost
        with seeded(1):
            assert torch.equal(cost, function().cost)


@pytest.mark.parametrize("term", ["step", "rate"])
def test_the_weight_of_an_error(term):
    """Equations 7 and 8: the cost is w ‖e - ê‖², with the ê that the network gave."""
    known = gaussian()
    x = known.examples(3)
    draw = TERMS[term].draw(known.model, Batch(x))
    error = (known.model.embed(x) - draw.prediction.e_hat).square().sum(1)
    weight = TERMS[term].error_weight(known.model.process)
    torch.testing.assert_close(draw.cost, weight * error, rtol=1e-11, atol=0)
    snr = torch.exp(4 - 6 * torch.stack([S, T]))  # γ = -4 + 6 t
    direct = {"step": (snr[0] - snr[1]) / 2, "rate": 3 * snr[1]}[term]
    torch.testing.assert_close(weight, direct, rtol=1e-13, atol=0)


@pytest.mark.parametrize("t", T.tolist())
def test_the_weight_of_an_error_in_decoding(t):
    """A decoder whose spread is the noise of z_1/√α pays w ‖e - ê‖² and its constant."""
    known = gaussian()
    gamma = -4 + 6 * t
    known.model.decoder = GaussianDensity(Affine(), math.exp(gamma / 2))
    known.model.process.embedding = Affine()
    x = known.examples(3)
    times = torch.full((3,), t, dtype=torch.float64)
    draw = ReconstructionTerm(times).draw(known.model, Batch(x))
    error = (x - draw.prediction.e_hat).square().sum(1)
    constant = math.log(2 * math.pi) + gamma
    weight = ReconstructionTerm(times).error_weight(known.model.process)
    torch.testing.assert_close(draw.cost, weight * error + constant, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("term", TERMS)
def test_the_weight_of_a_mask(term):
    """Equation 9 and its steps: the cost is w Σ_masked -log P(x_i|z_t)."""
    known = MODELS["symbols"]()
    x = known.examples(3)
    draw = TERMS[term].draw(known.model, Batch(x))
    surprise = -draw.prediction.e_hat.gather(-1, x[..., None])[..., 0]
    hidden = torch.where(draw.z == known.model.process.mask, surprise, 0.0).sum(1)
    weight = TERMS[term].mask_weight(known.model.process)
    assert hidden.sum() > 0
    torch.testing.assert_close(draw.cost, weight * hidden, rtol=1e-9, atol=1e-12)
    # α = 1 - t²: a hidden symbol shows at s with probability (t² - s²)/t², at rate 2/t
    direct = {"decode": T * 0 + 1, "step": 1 - (S / T).square(), "rate": 2 / T}[term]
    torch.testing.assert_close(weight, direct, rtol=1e-9, atol=0)


@pytest.mark.parametrize(("name", "weight"), [("gaussian", "error"), ("symbols", "mask")])
def test_the_weight_of_a_rate_is_the_limit(name, weight):
    """Step(t-h, t)/h → Rate(t) at first order."""
    process = MODELS[name]().model.process
    rate = getattr(DiffusionRate(t=T), f"{weight}_weight")(process)
    for i in range(3):
        errors = [
            (
                (getattr(DiffusionTerm(t=T, s=T - h), f"{weight}_weight")(process) / h - rate)[i]
            ).item()
            for h in (2.0**-9, 2.0**-10, 2.0**-11, 2.0**-12)
        ]
        assert abs(errors[-1]) < 0.01 * rate[i]
        assert ((orders(errors) - 1).abs() < 0.05).all(), orders(errors)
