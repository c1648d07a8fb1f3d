"""A masked language model of six ids, small enough that all its texts and masks are enumerated."""

import itertools

import torch
from torch import nn

from nelbo._utils.numerics import seeded
from nelbo.integrations import wrap_tokens

V, MASK, PAD = 6, 5, 4
#: options of `wrap_tokens`, and those of a computation by hand
CASES = {
    "plain": ({}, {}),
    "padding": ({"pad_id": PAD}, {"never": (PAD, MASK)}),
    "shift": ({"shift": 1}, {"shift": 1}),
    "never": ({"never": (0, 2)}, {"never": (0, 2, MASK)}),
    "sigma": ({"time": "sigma"}, {"clock": lambda share: -(1 - share).clamp(1e-4).log()}),
    "masked": ({"time": "masked"}, {"clock": lambda share: share}),
    "prompt": ({}, {"shown": (0, 2)}),
}


class Tiny(nn.Module):
    """A module from ids to logits in which each place sees all others, and the time if told."""

    def __init__(self, vocabulary=V, causal=False):
        super().__init__()
        self.embed, self.place = nn.Embedding(vocabulary, 8), nn.Embedding(8, 8)
        self.out, self.causal = nn.Linear(16, vocabulary), causal
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_()

    def forward(self, ids, time=None):
        h = self.embed(ids) + self.place(torch.arange(ids.shape[1]))
        if time is not None:
            h = h + time[:, None, None].to(h)
        others = h.sin().cumsum(1) if self.causal else h.sin().sum(1, keepdim=True).expand_as(h)
        return self.out(torch.cat([h, others], -1))


def seeded_model(seed):
    """A model with the weights of this seed."""
    with seeded(seed):
        return wrap_tokens(Tiny().double(), MASK)


def every_text(module, name, **more):
    """The model of a case; all texts of three scored tokens, as a batch and as lists of ids; and
    the options by hand. In a prompt 3 shows, and 1 between the others."""
    options, given = CASES[name]
    model = wrap_tokens(module, MASK, **options, **more)
    answers = itertools.product(sorted({*range(V)} - {*given.get("never", (MASK,))}), repeat=3)
    texts, shown = [[*answer] for answer in answers], None
    if name == "prompt":
        texts = [[3, first, 1, *others] for first, *others in texts]
        shown = torch.tensor([True, False, True, False, False])
    padded = [[*text, PAD, PAD] for text in texts] if name == "padding" else texts
    return model, model.batch(padded, shown=shown), texts, given
