"""Models, files and damage that the tests of the codec share."""

from unittest.mock import patch

import torch
from support import known_models
from support.closed_forms import Formula

from nelbo._utils.numerics import seeded
from nelbo.codec.api import compress, decompress, describe
from nelbo.codec.coding import blocks
from nelbo.codec.coding.blocks import EVEN, MODEL, PACKED
from nelbo.codec.errors import CodecError
from nelbo.codec.format import container
from nelbo.codec.settings import Settings
from nelbo.diffusion.decoder import LevelDecoder
from nelbo.diffusion.gaussian import GaussianDiffusion, Levels
from nelbo.diffusion.model import Model
from nelbo.diffusion.parametrization import LevelLogits
from nelbo.diffusion.reverse import Mixture
from nelbo.diffusion.schedules import Linear
from nelbo.diffusion.times import TimeGrid
from nelbo.sampling.samplers import ancestral


def skewed(step=Mixture):
    """A model of levels of which one is frequent, so that its code is short."""
    known = known_models.levels(step)
    known.model.head.log_prior.data.copy_(torch.tensor([3.0, 0.0, 0.0, -2.0]))
    return known


def settings(steps, **options):
    return Settings(tuple(TimeGrid.uniform(steps).times.tolist()), **options)


def many_dims():
    """A model of 24 dimensions that knows little."""
    levels = Levels(4)
    process = GaussianDiffusion(Linear(-4.0, 0.0), levels)
    quiet = Formula(lambda z, level: torch.zeros(*z.shape, 4, dtype=torch.float64))
    head, step = LevelLogits(levels.values), Mixture(levels.values)
    model = Model(quiet, process, head, step, LevelDecoder(), (24,))
    head.log_prior.data.copy_(torch.tensor([3.0, 0.0, 0.0, -1.0]))
    return model


def changed(data, **values):
    """The file with another header, its checksums right."""
    header, extra, at = container.read_prefix(data)
    blocks = list(container.read_blocks(data, at))
    made = container.write_prefix({**header, **values}, extra)
    made += b"".join(map(container.write_block, blocks))
    return made + container.write_end(made, len(blocks))


def files():
    """A model, examples and their file, for every way in which a block may be coded."""
    levels, symbols = skewed().model, known_models.symbols().model
    with seeded(0):
        noise = torch.randint(4, (90, 2))
        likely = torch.multinomial(torch.tensor([0.96, 0.02, 0.02]), 120, True).view(60, 2)
    again = noise[:30].repeat(30, 1)
    x = ancestral(levels, 150, TimeGrid.uniform(2))
    symbols.head.log_prior.data.copy_(torch.tensor([5.0, 0.0, 0.0]))
    wide = many_dims()
    y = ancestral(wide, 90, TimeGrid.uniform(2))
    with patch.object(blocks, "LANE", 360):
        lanes = compress(wide, y, settings(1, effort=2), block=45)
    assert [max(block.sizes) for block in describe(lanes)[1]] == [4, 2]
    made = [
        (levels, x, compress(levels, x, settings(2, batch=8), block=50)),
        (levels, noise, compress(levels, noise, settings(1), block=30, extra=b"labels")),
        (levels, again, compress(levels, again, settings(1))),
        (symbols, likely, compress(symbols, likely, settings(2), block=20)),
        (wide, y, lanes),
    ]
    modes = [{block.mode for block in describe(data)[1]} for _, _, data in made]
    assert modes == [{MODEL}, {EVEN}, {PACKED}, {MODEL}, {MODEL}]
    return made


def damaged(data, r):
    """A file as a disk, a transfer or a mistake may leave it."""
    bad, n = bytearray(data), len(data)
    a, b = sorted((r.randrange(n), r.randrange(n)))
    kind = r.randrange(8)
    if kind == 0:
        for _ in range(r.choice([1, 1, 1, 2, 5])):
            bad[r.randrange(n)] ^= 1 << r.randrange(8)
    elif kind == 1:
        del bad[a:]
    elif kind == 2:
        del bad[a : min(b, a + r.choice([1, 4, 100])) + 1]
    elif kind == 3:
        bad[a:a] = r.randbytes(r.choice([1, 4, 50]))
    elif kind == 4:
        bad[a : a + 4] = r.randbytes(4)
    elif kind == 5:
        bad = bad[:a] + bad[b:] + bad[a:b]
    elif kind == 6:
        bad += r.randbytes(r.choice([1, 12, 40]))
    else:
        bad = bad[:b] + bad[a:]
    return bytes(bad)


def assert_exact_or_refused(data, model, x):
    try:
        found = decompress(data, model)
    except CodecError as error:
        assert str(error) and error.exit_code in (3, 4, 5)
        return False
    assert torch.equal(found.x.long(), x.long())
    return True


def trial(coded, i, r):
    """Damage a file, or give it another model; whether its data came back all the same."""
    model, x, data = coded[i % len(coded)]
    bad = damaged(data, r)
    if i % 50 == 0:
        model, bad = coded[(i + 2 + r.randrange(2)) % len(coded)][0], data
        if model is coded[i % len(coded)][0]:
            return False
    elif bad == data:
        return False
    return assert_exact_or_refused(bad, model, x)
