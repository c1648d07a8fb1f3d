"""Variance per text of mask estimators of a text model, at equal numbers of network calls.

    python benchmarks/evaluation/masks.py TINYSHAKESPEARE.txt [--network bert] [--seconds 240]
        [--tokenizer bpe:512] [--keep FOLDER] [--calls 1 2 4 8 16 32 128] [--ways mdlm costs]
        [--json out.json]

A masked transformer of 48 characters, or tokens, is trained first (or a BERT of transformers), for
so many seconds of processor time; and two surrogates: on the texts, and then on the model's own
costs. Each recipe, as its paper describes it, estimates the bound of the same held-out texts again
and again; the variance is over repetitions, in nats², mean over the texts. `mean` is that of the
estimates, in nats, with two standard errors: recipes that are biased differ in it.

    llada     counts by rounding linspace, batches of 16 (Nie et al. 2025, their script)
    mdlm      one time per text and pass, low-discrepancy over the batch (Sahoo et al. 2024)
    vrpo      independent times, one mask each (Zhu et al. 2025)
    coupled   pairs of complementary masks (Gong et al. 2025)
    gdpo      Gauss-Legendre times, up to 4, and masks at each (Rojas et al. 2025)
    ours      exact counts in strata, windows of permutations, frequencies of tokens
    draws     the same, and how hard each token was in earlier masks of the text
    texts     two levels, a surrogate trained on texts, as if a mask cost it 1/1000 of a call
    costs     the same, a surrogate trained on the model's costs
    both      `costs` and `draws`
    priced    `costs` at its price here, by floating-point operations, with its calls counted in

Coefficients of ours come from a pilot of 1024 calls on other texts, not counted, as of a run that
keeps its pilot.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from nelbo.data.tokenizer import make
from nelbo.diffusion.model import measuring
from nelbo.evaluation.mask_estimator import MaskEstimator, Plan
from nelbo.evaluation.mask_regression import Coefficients
from nelbo.evaluation.mask_sampling import Texts
from nelbo.evaluation.masks import masks_alone
from nelbo.evaluation.price import LEAST, price_of
from nelbo.integrations import TokenModel, wrap_tokens
from nelbo.training.surrogate import train_surrogate

LENGTH, WIDTH, LAYERS = 48, 96, 3
ROWS = 4096  # masks per network call


class Transformer(nn.Module):
    """A transformer over characters with a convolution in front."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(vocabulary, WIDTH), nn.Embedding(LENGTH, WIDTH)
        for each in (self.embed, self.place):
            nn.init.normal_(each.weight, 0, 0.2)
        self.stem = nn.Conv1d(WIDTH, WIDTH, 7, padding=3)
        layer = nn.TransformerEncoderLayer(
            WIDTH, 4, 4 * WIDTH, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.body = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        self.norm, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, vocabulary)

    def forward(self, ids: Tensor) -> Tensor:
        """Return logits (B, L, V) of ids (B, L)."""
        h = self.embed(ids) + self.place.weight[: ids.shape[1]]
        h = h + nn.functional.gelu(self.stem(h.movedim(1, 2))).movedim(1, 2)
        logits: Tensor = self.out(self.norm(self.body(h)))
        return logits


def bert(vocabulary: int) -> nn.Module:
    """Return a small BERT of transformers."""
    from transformers import BertConfig, BertForMaskedLM

    sizes = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
    more = {"intermediate_size": 4 * WIDTH, "max_position_embeddings": LENGTH}
    model: nn.Module = BertForMaskedLM(BertConfig(vocab_size=vocabulary, **sizes, **more))
    return model


def train(module: nn.Module, ids: Tensor, mask: int, seconds: float) -> None:
    """Minimise the bound of random pieces of a text for some seconds of processor time."""
    optim, begun, done = torch.optim.AdamW(module.parameters(), 1.5e-3), time.process_time(), 0.0
    module.train()
    while done < 1:
        optim.param_groups[0]["lr"] = 1.5e-3 * min(1, 20 * done + 0.01) * (1 - done)
        x = ids[torch.randint(len(ids) - LENGTH, (48, 1)) + torch.arange(LENGTH)]
        count = torch.randint(1, LENGTH + 1, (48, 1))
        hidden = torch.rand(x.shape).argsort(1) < count
        found = module(torch.where(hidden, mask, x))
        logits = getattr(found, "logits", found)[..., :mask]
        costs = nn.functional.cross_entropy(logits[hidden], x[hidden], reduction="none")
        optim.zero_grad()
        ((costs / count.expand_as(x)[hidden]).sum() / 48).backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optim.step()
        done = (time.process_time() - begun) / seconds
    module.eval()


# ---- the recipes: from costs of masks, (n, N, L) -> (n, N), and calls, to an estimate, (N,)

Costs = Callable[[Tensor], Tensor]


def exact(count: Tensor) -> Tensor:
    """Return masks of exactly `count`, (n, N), of all places, (n, N, L)."""
    return torch.rand(*count.shape, LENGTH).argsort(-1) < count[..., None]


def bernoulli(share: Tensor) -> Tensor:
    """Return masks that hide each place with probability `share`, (n, N)."""
    return torch.rand(*share.shape, LENGTH, dtype=share.dtype) < share[..., None]


def rounded_counts(length: int, batch: int, texts: int = 1) -> Tensor:
    """Return LLaDA's counts of a batch: rounded, evenly spaced, from a random one, (b, N)."""
    first = torch.randint(1, length + 1, (1, texts)).double()
    steps = torch.arange(batch)[:, None] * (length / batch)
    return ((first + steps).round().long() - 1) % length + 1


def llada(costs: Costs, texts: int, calls: int) -> Tensor:
    """Return the mean over batches of 16 masks, with rounded counts."""
    batch = min(16, calls)
    count = torch.cat([rounded_counts(LENGTH, batch, texts) for _ in range(calls // batch)])
    return (costs(exact(count)) * LENGTH / count).mean(0)


def mdlm(costs: Costs, texts: int, calls: int) -> Tensor:
    """Return the mean over passes with one time for each text, stratified over the texts."""
    order = torch.rand(calls, texts).argsort(1)
    share = 1e-3 + (1 - 1e-3) * (order + torch.rand(calls, texts).double()) / texts
    return (costs(bernoulli(share)) / share).mean(0)


def vrpo(costs: Costs, texts: int, calls: int) -> Tensor:
    """Return the mean over independent counts."""
    count = torch.randint(1, LENGTH + 1, (calls, texts))
    return (costs(exact(count)) * LENGTH / count).mean(0)


def coupled(costs: Costs, texts: int, calls: int) -> Tensor:
    """Return the mean over masks and their complements."""
    share = torch.rand(max(1, calls // 2), texts).double()
    hidden = bernoulli(share)
    one, other = costs(hidden) / share, costs(~hidden) / (1 - share)
    return ((one + other) / 2).mean(0)


def gdpo(costs: Costs, texts: int, calls: int) -> Tensor:
    """Return the quadrature over times of the mean over masks at each."""
    nodes, weights = np.polynomial.legendre.leggauss(min(4, calls))
    share = torch.from_numpy((nodes + 1) / 2).repeat(calls // len(nodes))[:, None]
    weight = torch.from_numpy(weights / 2).repeat(calls // len(nodes))[:, None]
    hidden = bernoulli(share.expand(-1, texts))
    return (costs(hidden) * weight / share).sum(0) / (calls // len(nodes))


#: the surrogate of each of ours, and whether it uses other draws of the text
OURS = {
    "ours": (None, False),
    "draws": (None, True),
    "texts": ("texts", False),
    "costs": ("costs", False),
    "both": ("costs", True),
    "priced": ("costs", True),
}
RECIPES = {"llada": llada, "mdlm": mdlm, "vrpo": vrpo, "coupled": coupled, "gdpo": gdpo}


def costs_of(model: TokenModel, x: Tensor) -> Costs:
    """Return the function from masks to the sums of the costs of hidden characters."""
    batch = model.batch(x)
    assert batch.condition is not None
    condition = batch.condition

    def costs(hidden: Tensor) -> Tensor:
        rows = hidden.flatten(0, 1)
        text = torch.arange(len(x)).repeat(len(hidden))
        found = []
        for some in torch.arange(len(rows)).split(ROWS):
            here, inside = x[text[some]], rows[some]
            z = torch.where(inside, model.process.codes, here)
            symbols = model.predict(z, torch.ones(len(z)).double(), condition[text[some]]).symbols(
                z, model.process.codes
            )
            found.append(-torch.where(inside, symbols.log_prob(here, inside), 0.0).sum(1))
        return torch.cat(found).view(hidden.shape[:2])

    return costs


# ---- ours


def learned(
    model: TokenModel, surrogate: TokenModel | None, other: Tensor, draws: bool
) -> Coefficients:
    """Return the coefficients of a pilot on other texts."""
    way = MaskEstimator(model, surrogate, Texts(model, model.batch(other)), 99)
    return way.pilot(512).coefficients(surrogate is not None, way.variates, draws)


def ours(
    model: TokenModel,
    surrogate: TokenModel | None,
    coefficients: Coefficients,
    x: Tensor,
    calls: float,
    estimates: int,
    price: float | None = None,
) -> tuple[Tensor, int]:
    """Return independent estimates of each text, (N, R), and masks of a text.

    Each is of a copy of the text, so that none learns from another's draws. The masks are those
    that the surrogate reads for an estimate. With a price they are counted: there are so many
    fewer calls of the model.
    """
    ratio = 0.0 if surrogate is None else masks_alone(coefficients, LENGTH, price or LEAST)
    if price is not None:
        calls = max(1.0, int(calls / (1 + price * (1 + ratio))))
    each = 2 if calls >= 2 else 1
    masks = int(calls) // each
    plan = Plan(each, masks, math.ceil(masks * ratio) if surrogate is not None else 0)
    batch = model.batch(x.repeat(estimates, 1))
    way = MaskEstimator(model, surrogate, Texts(model, batch), 7)
    rows = torch.arange(len(batch)).split(max(1, 2**15 // (each * (plan.alone + masks))))
    found = [way.costs(r.tolist(), batch[r], plan, coefficients)[0].sum(-1) for r in rows]
    whole = torch.cat(found).mean(1).view(estimates, len(x)).T
    return whole, each * (plan.alone + masks)


def ids_of(text: str, tokenizer: str | None) -> tuple[Tensor, int]:
    """Return the ids of a text and the id of the mask, the number of the others."""
    if tokenizer is None:
        characters = sorted(set(text))
        place = {c: i for i, c in enumerate(characters)}
        return torch.tensor([place[c] for c in text]), len(characters)
    made = make(tokenizer, text[: int(0.9 * len(text))])
    return torch.from_numpy(made.encode(text, "the text")).long(), made.count


def main() -> None:
    """Train, measure every recipe, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path)
    parser.add_argument("--network", choices=("transformer", "bert"), default="transformer")
    parser.add_argument("--tokenizer", help="bpe:N; characters where left out")
    parser.add_argument("--seconds", type=float, default=240.0)
    parser.add_argument("--steps", type=int, default=1500, help="of the surrogate on texts")
    parser.add_argument("--learned", type=int, default=32000, help="calls for its costs")
    parser.add_argument("--texts", type=int, default=16)
    parser.add_argument("--draws", type=int, default=1024, help="calls per text and recipe")
    parser.add_argument("--calls", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 128])
    parser.add_argument("--estimates", type=int, help="of ours; by default as many as draws say")
    parser.add_argument("--ways", nargs="+", default=[*RECIPES, *OURS], help="some of the above")
    parser.add_argument("--keep", type=Path, help="folder of weights, made or read")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    ids, mask = ids_of(given.text.read_text(), given.tokenizer)
    split = int(0.9 * len(ids))
    torch.manual_seed(0)

    def kept(name: str, make: Callable[[], nn.Module], into: nn.Module | None = None) -> nn.Module:
        """Return the module of a file of weights, or make it and write the file."""
        kind = given.tokenizer.replace(":", "") if given.tokenizer else "characters"
        file = f"{given.network}-{kind}-{name}.pt"
        path = None if given.keep is None else given.keep / file
        if path is not None and path.exists() and into is not None:
            into.load_state_dict(torch.load(path))
            return into.eval()
        made = make()
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(made.state_dict(), path)
        return made

    module = bert(mask + 1) if given.network == "bert" else Transformer(mask + 1)

    def fitted() -> nn.Module:
        train(module, ids[:split], mask, given.seconds)
        return module

    module = kept("model", fitted, module)
    model = wrap_tokens(module, mask, length=LENGTH)
    training = ids[: split // LENGTH * LENGTH].view(-1, LENGTH)
    test = ids[split:]
    test = test[: len(test) // LENGTH * LENGTH].view(-1, LENGTH)
    spaced = test[:: len(test) // (given.texts + 256)]
    x, other = spaced[: given.texts], spaced[given.texts : given.texts + 256]

    surrogates: dict[str, TokenModel] = {}
    for name, calls in (("texts", 0), ("costs", given.learned)):
        begun = time.process_time()
        found = train_surrogate(model, training, steps=0)
        own = found.network.module

        def fresh(calls: int = calls) -> nn.Module:
            start = surrogates.get("texts")
            steps = 0 if start else given.steps
            made = train_surrogate(model, training, steps=steps, calls=calls, start=start)
            trained: nn.Module = made.network.module
            return trained

        made = kept(name, fresh, own)
        surrogates[name] = wrap_tokens(made, mask, length=LENGTH)
        print(f"surrogate of {name}: {time.process_time() - begun:.0f} s", flush=True)

    rows: dict[str, dict[int, float]] = {}
    with torch.no_grad(), measuring(model):
        for each in surrogates.values():
            each.batch(x)
        costs = costs_of(model, x)
        price = price_of(model, surrogates["costs"], model.batch(x))
        coefficients = {
            name: learned(model, None if kind is None else surrogates[kind], other, draws)
            for name, (kind, draws) in OURS.items()
            if name in given.ways
        }
        print(f"a mask of the surrogate costs {price:.3f} of a call here")
        for calls in given.calls:
            repeats = max(8, given.draws // calls)
            for name in given.ways:
                note = ""
                if name in RECIPES:
                    each = [RECIPES[name](costs, len(x), calls) for _ in range(repeats)]
                    found = torch.stack(each, 1)
                else:
                    kind, _ = OURS[name]
                    surrogate = None if kind is None else surrogates[kind]
                    own_price = price if name == "priced" else None
                    count = given.estimates or repeats
                    found, read = ours(
                        model, surrogate, coefficients[name], x, calls, count, own_price
                    )
                    note = f"{read} masks of the surrogate" if surrogate else ""
                variance = found.var(1).mean().item()
                mean = found.mean().item()
                error = found.mean(0).std().item() / math.sqrt(found.shape[1])
                rows.setdefault(name, {})[calls] = variance
                print(
                    f"{calls:4} {name:8} variance {variance:9.3f}  mean {mean:8.3f} ±"
                    f" {2 * error:.3f}  {note}",
                    flush=True,
                )
    print("| calls |" + "".join(f" {name} |" for name in rows))
    for calls in sorted(given.calls):
        print(f"| {calls} |" + "".join(f" {rows[n][calls]:.3g} |" for n in rows))
    if given.json:
        given.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
