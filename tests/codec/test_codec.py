"""Lossless codes: exact return, the length of the bound, and what their parts promise."""

import math

import numpy as np
import pytest
import torch
from support import known_models
from support.codes import changed, many_dims, settings, skewed
from torch.distributions import Normal

from nelbo._utils.numerics import seeded
from nelbo.codec.api import compress, decompress, describe
from nelbo.codec.coding import blocks
from nelbo.codec.coding.blocks import EVEN, MODEL, PACKED, Codes, decode, encode, nothing
from nelbo.codec.coding.codec import Codec
from nelbo.codec.coding.direct import shown_at
from nelbo.codec.coding.search import WAYS, best_ways, push_way
from nelbo.codec.entropy.lanes import joined, narrowed, parted, widened
from nelbo.codec.entropy.laws import law
from nelbo.codec.entropy.stack import Bottom, SideBySide, Stack
from nelbo.codec.errors import CorruptFileError, ModelMismatchError, NotReproducibleError
from nelbo.codec.format import container, pictures
from nelbo.codec.format.header import pack_times, unpack_times
from nelbo.data import Schema
from nelbo.data.columns import Column
from nelbo.diffusion.decoder import DiscretisedGaussian
from nelbo.diffusion.distributions import Discrete, LevelMixture
from nelbo.diffusion.gaussian import Levels
from nelbo.diffusion.model import measuring
from nelbo.diffusion.reverse import Beta, Optimal, Posterior
from nelbo.diffusion.times import TimeGrid
from nelbo.models.build import build
from nelbo.sampling.samplers import ancestral
from nelbo.training.presets import configure

pytest.importorskip("constriction")
BITS = math.log(2)


def there_and_back(model, x, how, **options):
    """The file of x, which came back exactly."""
    data = compress(model, x, how, verify=False, **options)
    shown = []
    back = decompress(data, model, done=shown.append).x
    assert sum(shown) == len(x)
    assert torch.equal(back.long(), x.long()) and back.shape == x.shape
    return data


# ---- laws on a stack


def laws():
    g = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64)

    mean, k = 3 * normal(2, 3, 5), normal(2, 3, 5, 7)
    scale = torch.full((2, 3, 5), 0.7, dtype=torch.float64)
    width = torch.tensor(0.1, dtype=torch.float64)
    one = torch.ones((), dtype=torch.float64)
    mixture = LevelMixture(k.log_softmax(-1), 2 * normal(2, 3, 5, 7), scale[..., None])
    return {
        "normal": law(Normal(mean, scale), width),
        "mixture": law(mixture, width),
        "discrete": law(Discrete(k.log_softmax(-1)), one),
    }


@pytest.mark.parametrize("name", ["normal", "mixture", "discrete"])
def test_a_law_undoes_itself_and_costs_its_density(name):
    """Popping from random bits draws from the law, so its mean cost is the entropy; pushing gives
    back the very same bits."""
    of, stack = laws()[name], Stack(Bottom("random").words(4000))
    before, drawn = stack.words(), []
    start = stack.bits
    for _ in range(40):
        drawn.append(of.pop(stack))
    taken, ideal = start - stack.bits, -stack.ideal / BITS
    assert taken == pytest.approx(ideal, rel=2e-3)
    for n in reversed(drawn):
        of.push(stack, n)
    assert np.array_equal(stack.words(), before) and stack.ideal == pytest.approx(0, abs=1e-6)


def test_what_is_far_away_comes_back():
    of, stack = laws()["normal"], Stack(Bottom("random").words(100))
    before, n = stack.words(), np.full((2, 3, 5), -70_000)
    n[0, 1, 2] = 5
    of.push(stack, n)
    assert np.array_equal(of.pop(stack), n) and np.array_equal(stack.words(), before)
    with pytest.raises(CorruptFileError, match="refuses"):
        of.push(stack, np.full((2, 3, 5), 10**9))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_refused(value):
    mean = torch.tensor([[0.0, value]], dtype=torch.float64)
    with pytest.raises(ValueError, match="not finite"):
        law(
            Normal(mean, torch.ones_like(mean), validate_args=False),
            torch.ones((), dtype=torch.float64),
        )
    with pytest.raises(ValueError, match="not finite"):
        law(Discrete(mean), torch.ones((), dtype=torch.float64))


@pytest.mark.parametrize("name", ["normal", "mixture", "discrete"])
def test_rows_side_by_side_are_those_of_each_stack(name):
    """A law of two rows on two stacks, what is far away included, leaves each as a law of its
    own row does."""
    of, seeds = laws()[name], ("a", "b")
    alone = [Stack(Bottom(seed).words(300)) for seed in seeds]
    rows = SideBySide([stack.copy() for stack in alone])
    n = of.take(rows)
    if name == "normal":
        n[0, 1, 2], n[1] = 70_000, -70_000
    of.put(rows, n)
    after = [stack.words() for stack in rows.stacks]
    assert np.array_equal(of.take(rows), n)
    of.put(rows, n)
    assert all(map(np.array_equal, after, [stack.words() for stack in rows.stacks]))
    if name != "normal":  # nothing was changed between
        assert all(map(np.array_equal, after, [stack.words() for stack in alone]))


def test_a_search_keeps_what_one_choice_at_a_time_would_not():
    """The beam is shorter than the best of each example by itself; and the stack on which it
    begins, and how many ways are in a batch, do not matter to it."""
    known = skewed()
    x = ancestral(known.model, 60, TimeGrid.uniform(2)).numpy()
    codec, lengths = Codec(known.model, settings(1)), []
    code = codec.codes.model(0)
    with measuring(codec.model):
        for kept in (1, 8):
            stack, seen = Stack(Bottom("random").words(200)), []
            before = stack.words()
            ways, sizes = best_ways(code, stack, x, 1.0, 1, kept, 5, seen.append)
            assert len(ways) == sum(seen) == len(x) and set(ways) <= set(range(WAYS))
            assert sizes == [1] * len(x)
            assert np.array_equal(stack.words(), before)
            for i, way in enumerate(ways):
                push_way(stack, np.array([way]))
                code.push(stack, x[i : i + 1])
            lengths.append(stack.bits)
    assert lengths[1] < lengths[0] - 5


def test_an_encoder_borrows_known_words_only_when_it_must():
    of, stack = laws()["normal"], Stack(bottom=Bottom("here"))
    n = of.pop(stack)
    assert stack.borrowed > 2
    of.push(stack, n)
    assert np.array_equal(stack.words(), Bottom("here").words(stack.borrowed))
    with pytest.raises(CorruptFileError, match="end before the data"):
        of.pop(Stack(Bottom("here").words(2)))


# ---- lanes


@pytest.mark.parametrize("count", [1, 2, 8])
def test_a_stack_that_was_cut_is_whole_again(count):
    """A zero where the cut would be moves it, for no stack ends in one; and words that were
    borrowed are no part of what is halved."""
    stack = Stack(bottom=Bottom("here"))
    stack._borrow()
    words = np.concatenate([stack.words(), Bottom("there").words(200)])
    words[[50, 51, 52, 53, 100, 101, 102, 103, 150, 151, 152, 153]] = 0
    stack.coder = stack.coder_type(words)
    lanes = widened([stack], count)
    assert [lane.borrowed for lane in lanes] == [stack.borrowed] + [0] * (count - 1)
    assert np.ptp([lane.bits for lane in lanes]) <= 32 * 9
    (whole,) = narrowed(lanes, 1)
    assert np.array_equal(whole.words(), words) and whole.borrowed == stack.borrowed


def test_lanes_of_any_lengths_become_one_number_at_a_few_bits_each():
    r = np.random.default_rng(0)
    for count in (1, 2, 4, 8, 256):
        for spread in (0, 3, 60):
            lanes = [Bottom(f"{i}").words(70 + r.integers(spread + 1)) for i in range(count)]
            lanes[0][-1], lanes[-1][-1] = 1, 7
            data, bits = joined(lanes), sum(words.size for words in lanes) * 32
            assert all(map(np.array_equal, parted(data, count), lanes))
            assert 8 * len(data) < bits + count * 14 + 8


@pytest.mark.parametrize("seed", range(40))
def test_what_is_no_lanes_is_refused_or_some_words(seed):
    r = np.random.default_rng(seed)
    data = r.bytes(int(r.integers(1, 60))) + b"\1"
    for count in (2, 8, 256):
        try:
            found = parted(data, count)
        except CorruptFileError:
            continue
        assert len(found) == count and sum(words.nbytes for words in found) < len(data) + 4 * count
    with pytest.raises(CorruptFileError, match="end in a zero"):
        parted(data + b"\0", 2)
    with pytest.raises(CorruptFileError, match="not those of 8 lanes"):
        parted(b"", 8)


# ---- the bound


def length_of(codec, x):
    """Return the bits that the stack grows by, and those by the densities of its latents."""
    stack, code = Stack(Bottom("random").words(200)), codec.codes.model(0)
    start = stack.bits
    with measuring(codec.model):
        for i, part in enumerate(x.split(50)):
            code.push(stack, part.long().numpy(), 50 * i)
    return stack.bits - start, stack.ideal / BITS


@pytest.mark.parametrize("steps", [1, 3])
def test_the_length_is_the_bound(steps):
    """As long as the exact bound of these examples, but for what draws of latents vary, and as
    the densities along those say, to 0.2 %."""
    known, grid = known_models.levels(), TimeGrid.uniform(steps)
    x = ancestral(known.model, 1500, grid)
    length, ideal = length_of(Codec(known.model, settings(steps)), x)
    assert length == pytest.approx(ideal, rel=2e-3)
    assert length == pytest.approx(known.bound(x, grid).sum().item() / BITS, rel=0.02)


def test_symbols_cost_the_any_order_bound():
    """A call for each symbol: the mean over both orders of two dimensions, in closed form."""
    known = known_models.symbols()
    model, mask, x = known.model, known.model.process.mask, known.examples(2000).long()
    length, ideal = length_of(Codec(model, settings(8)), x)
    assert length == pytest.approx(ideal, rel=1e-3)
    nats = torch.zeros(len(x), dtype=torch.float64)
    with measuring(model):
        for first in (0, 1):
            z = torch.full_like(x, mask)
            for i in (first, 1 - first):
                e_hat = model.predict(z.clone(), torch.ones(len(x))).e_hat[:, i]
                nats -= e_hat.gather(1, x[:, i : i + 1])[:, 0] / 2
                z[:, i] = x[:, i]
    assert length == pytest.approx(nats.sum().item() / BITS, rel=0.01)


def test_symbols_that_are_revealed_at_once_cost_their_marginals():
    known = known_models.symbols()
    x = known.examples(500)
    length, _ = length_of(Codec(known.model, settings(1)), x)
    bound = known.bound(x, TimeGrid.uniform(1)).sum().item() / BITS
    assert length == pytest.approx(bound, rel=1e-3)


def test_symbols_show_as_the_schedule_says():
    model = known_models.symbols().model
    model.shape = (100,)
    assert shown_at(model, TimeGrid([0.5, 1.0])) == [0, 75]  # α = 1 - t²
    assert shown_at(model, TimeGrid([1.0])) == [0]
    assert shown_at(model, TimeGrid.uniform(100)) == list(range(100))


def test_effort_goes_below_the_bound(monkeypatch):
    """The luckiest of several draws of the latents is kept, where they differ by many bits; and
    lanes cost a few bits each."""
    model, lengths = many_dims(), {}
    x = ancestral(model, 150, TimeGrid.uniform(8))
    for effort, lane in ((1, 8192), (8, 8192), (8, 800)):
        monkeypatch.setattr(blocks, "LANE", lane)
        codec = Codec(model, settings(1, effort=effort))
        ((block, _),) = codec.encode_blocks(x, 1000)
        assert block.mode == MODEL and (max(block.sizes) == 4 or lane > 800)
        lengths[effort, lane] = 8 * len(block.payload)
        assert np.array_equal(codec.decode_block(block), x.numpy())
    assert lengths[8, 8192] < 0.97 * lengths[1, 8192]
    assert lengths[8, 800] < lengths[8, 8192] + 4 * 24


# ---- exact return


@pytest.mark.parametrize("name", ["levels", "symbols"])
@pytest.mark.parametrize("n", [0, 1, 2, 5, 8, 100])
def test_any_number_of_examples_comes_back(name, n):
    known = known_models.MODELS[name]()
    x = ancestral(known.model, n, TimeGrid.uniform(2)) if n else known.examples(1)[:0]
    there_and_back(known.model, x, settings(2))


@pytest.mark.parametrize("n", [0, 1, 2, 5, 8, 60, 447])
def test_any_number_of_examples_comes_back_by_lanes(n, monkeypatch):
    """Batches of 1, 2, 4 ... lanes, and smaller ones where the examples are too few."""
    monkeypatch.setattr(blocks, "LANE", 300)
    model = many_dims()
    x = ancestral(model, n, TimeGrid.uniform(8)) if n else torch.zeros(0, 24, dtype=torch.long)
    data = there_and_back(model, x, settings(1, effort=2))
    sizes = [size for block in describe(data)[1] for size in block.sizes]
    most = max(sizes, default=1)
    end = len(sizes) - sizes[::-1].index(most) if sizes else 0
    assert sizes == sorted(sizes[:end]) + sorted(sizes[end:], reverse=True)
    assert most == {447: 32, 60: 4}.get(n, 1)


def test_blocks_with_effort_come_back_and_know_nothing_of_each_other(monkeypatch):
    monkeypatch.setattr(blocks, "LANE", 300)
    model = many_dims()
    x = ancestral(model, 150, TimeGrid.uniform(8))
    data = there_and_back(model, x, settings(1, effort=2), block=50)
    assert all(max(block.sizes) > 1 for block in describe(data)[1])
    at = data.index(container.BLOCK)
    cut = data[:at] + data[data.index(container.BLOCK, at + 4) :]
    found = decompress(cut, model, salvage=True)
    assert found.lost == ((0, 50),) and torch.equal(found.x.long(), x[50:])


def test_a_lane_that_runs_out_is_not_cut_off(monkeypatch):
    """Only the lowest may borrow, so that a block of lanes too short for an example has one."""
    monkeypatch.setattr(blocks, "LANE", 1)
    monkeypatch.setattr(blocks, "_need", lambda *_: 1.0)
    model = many_dims()
    x = ancestral(model, 60, TimeGrid.uniform(8))
    ((block, _),) = Codec(model, settings(1, effort=2)).encode_blocks(x, 1000)
    assert set(block.sizes) == {1}
    there_and_back(model, x, settings(1, effort=2))


@pytest.mark.parametrize("step", [Posterior, Beta, Optimal])
def test_every_gaussian_step_comes_back(step):
    known = skewed(step)
    x = ancestral(known.model, 60, TimeGrid.uniform(4))
    data = there_and_back(known.model, x, settings(4))
    assert describe(data)[1][0].mode == MODEL


def test_another_decoder_comes_back():
    known = known_models.levels()
    known.model.decoder = DiscretisedGaussian(Levels(4))
    there_and_back(known.model, known.examples(40), settings(2))


def test_mixed_columns_come_back():
    """Levels by bits-back and symbols with them, in one product."""
    columns = (
        Column("city", "category", categories=("a", "b", "c"), missing=True),
        Column("age", "rounded", 1.0, 0.0, 6.0, missing=True),
        Column("flag", "boolean", categories=("0", "1")),
    )
    schema = Schema.of_table(columns)
    with seeded(0):
        model = build(configure(schema, 100, width=16, depth=1)[0], schema)
        rows = torch.stack([torch.randint(1, n, (300,)) for n in (8, 3, 4)], 1).double()
    model.fit_statistics(rows)
    x = ancestral(model, 200, TimeGrid.uniform(3)).long()
    data = there_and_back(model, x, settings(3))
    (block,) = describe(data)[1]
    assert block.mode == MODEL


def test_unlike_data_come_back_and_cost_no_more_than_themselves():
    known = known_models.levels()
    with seeded(3):
        noise = torch.randint(4, (3000, 2))
    data = there_and_back(known.model, noise, settings(1))
    assert {block.mode for block in describe(data)[1]} == {EVEN}
    assert 8 * sum(len(b.payload) for b in describe(data)[1]) <= 2 * noise.numel() + 3 * 96
    constant = torch.zeros(3000, 2, dtype=torch.long)
    data = there_and_back(known.model, constant, settings(1))
    assert len(data) < 500 and {b.mode for b in describe(data)[1]} == {PACKED}


def test_many_levels_that_are_no_power_of_two_come_back_alike():
    """The coder gives the last of equal levels more than its share, so that it is cheaper."""

    def none(nonce):
        raise CorruptFileError("a model that expects other data")

    with seeded(0):
        x = torch.randint(60_000, (2000, 1)).numpy()
    x[::20] = 59_999
    codes = Codes(none, None, "a name", (1,), 60_000)
    block, _ = encode(codes, x, 0, nothing)
    assert block.mode == EVEN and 8 * len(block.payload) < math.log2(60_000) * x.size
    assert np.array_equal(decode(codes, block, nothing), x)


def test_images_of_any_size_are_tiles():
    for shape, height, width in [((1, 8, 8), 8, 8), ((3, 4, 5), 13, 3), ((1, 2, 3), 5, 7)]:
        image = np.random.default_rng(0).integers(0, 256, (shape[0], height, width), np.uint8)
        tiles = pictures.cut(image, shape)
        assert tiles.shape[1:] == shape
        assert np.array_equal(pictures.join(tiles, height, width), image)


# ---- what a file says


def test_times_are_packed_exactly():
    for times in (TimeGrid.uniform(7).times, torch.tensor([0.1234, 1.0]), torch.tensor([1.0])):
        exact = tuple(times.double().tolist())
        assert unpack_times(pack_times(exact)) == exact
    assert pack_times((0.25, 0.5, 1.0)) == [4, 1, 1, 2]


def test_a_file_says_what_it_is():
    known = known_models.levels()
    x = ancestral(known.model, 90, TimeGrid.uniform(2))
    data = there_and_back(known.model, x, settings(2), block=30, extra=b"more")
    header, blocks = describe(data)
    assert header.examples == 90 and header.shape == [2] and header.effort == 1
    assert [block.first for block in blocks] == [0, 30, 60]
    assert decompress(data, known.model).extra == b"more"


def test_another_model_is_refused():
    known = known_models.MODELS["levels"]()
    data = compress(known.model, known.examples(9), settings(2))
    known.model.step.values[0] += 1e-9
    known.model.head.log_prior.data[0] += 1e-7
    with pytest.raises(ModelMismatchError) as refused:
        decompress(data, known.model)
    assert refused.value.exit_code == 4


@pytest.mark.parametrize(
    ("values", "error", "words"),
    [
        ({"answers": {"1": 7}}, NotReproducibleError, "the network computes other numbers here"),
        ({"coder": 7}, NotReproducibleError, "constriction .* codes differently"),
        ({"model": "0" * 16}, ModelMismatchError, "give the run"),
        ({"examples": 10**12}, CorruptFileError, "holds 60 examples"),
        ({"examples": -1}, CorruptFileError, "at least 0; got -1 in the header"),
        ({"shape": [3]}, CorruptFileError, "contradicts the model"),
        ({"levels": 10**9}, CorruptFileError, "contradicts the model"),
        ({"levels": 3}, CorruptFileError, "contradicts the model"),
        ({"steps": [4, 0]}, CorruptFileError, "header"),
        ({"steps": []}, CorruptFileError, "header"),
        ({"steps": ["1"]}, CorruptFileError, "header"),
        ({"precision": "float16"}, CorruptFileError, "precision"),
        ({"effort": 0}, CorruptFileError, "effort"),
        ({"effort": 2}, CorruptFileError, "coded words|stack of bits"),
        ({"batch": 10**9}, CorruptFileError, "batch"),
        ({"answers": {"x": 7}}, CorruptFileError, "header"),
        ({"answers": {"99999999": 7}}, CorruptFileError, "header"),
        ({"examples": "9"}, CorruptFileError, "an integer; got '9' in the header"),
        ({"colour": 1}, CorruptFileError, "unknown key 'colour'"),
    ],
)
def test_a_header_that_lies_is_found_out(values, error, words):
    known = skewed()
    x = ancestral(known.model, 60, TimeGrid.uniform(2))
    data = compress(known.model, x, settings(2))
    with pytest.raises(error, match=words):
        decompress(changed(data, **values), known.model)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (lambda: settings(2, effort=0), "effort must be 1 to 255"),
        (lambda: settings(2, precision="float16"), "precision"),
        (lambda: settings(2, batch=0), "batch"),
    ],
)
def test_settings_that_cannot_be(how, words):
    with pytest.raises(ValueError, match=words):
        how()


def test_a_density_has_no_lossless_code():
    known = known_models.gaussian()
    with pytest.raises(ValueError, match="only discrete data have a lossless code"):
        compress(known.model, known.examples(3), settings(2))
    known = known_models.levels()
    given = known.model.unconditional()
    given.conditioned_on = "class"
    with pytest.raises(ValueError, match="is conditional on class"):
        compress(given, known.examples(3), settings(2))
    with pytest.raises(ValueError, match=r"values must be 0\.\.3"):
        compress(known.model, torch.full((3, 2), 4), settings(2))
    with pytest.raises(ValueError, match="1 to 20000"):
        compress(known.model, known.examples(3), settings(2), block=0)
