"""Whatever happens to a file, the outcome is the exact data or an error that says so."""

import random
import struct
from dataclasses import replace
from unittest.mock import patch

import known_models
import numpy as np
import pytest
import torch
from test_codec import changed, many_dims, settings, skewed

from nelbo._utils.numerics import seeded
from nelbo.codec.api import compress, decompress, describe
from nelbo.codec.coding import blocks
from nelbo.codec.coding.blocks import EVEN, MODEL, PACKED
from nelbo.codec.coding.codec import Codec
from nelbo.codec.errors import CodecError, CorruptFileError
from nelbo.codec.format import container
from nelbo.diffusion.times import TimeGrid
from nelbo.sampling.samplers import ancestral

pytest.importorskip("constriction")


@pytest.fixture(scope="module")
def coded():
    return files()


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
    with patch.object(blocks, "LANE", 300):
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


def test_ten_thousand_damaged_files(coded):
    r = random.Random(0)
    assert not any(trial(coded, i, r) for i in range(10_000))


def test_damage_whose_checksums_were_mended(coded):
    """The words alone are changed and every checksum of the container is right: the end of the
    stack or the checksum of the data tells. (Some bits of xz mean nothing.)"""
    r = random.Random(1)
    for i in range(300):
        model, x, data = coded[i % len(coded)]
        packed = describe(data)[1][0].mode == PACKED
        header, extra, at = container.read_prefix(data)
        blocks = list(container.read_blocks(data, at))
        place = r.randrange(len(blocks))
        payload = bytearray(blocks[place].payload)
        if i % 3:
            payload[r.randrange(len(payload))] ^= 1 << r.randrange(8)
        else:
            payload = payload[: 4 * r.randrange(len(payload) // 4)]
        blocks[place] = replace(blocks[place], payload=bytes(payload))
        bad = container.write_prefix(header, extra)
        bad += b"".join(map(container.write_block, blocks))
        bad += container.write_end(bad, len(blocks))
        assert not assert_exact_or_refused(bad, model, x) or packed


def test_packed_data_are_checked_as_well(coded):
    """A block of xz whose frame was mended, each bit flipped in turn."""
    model, x, data = coded[2]
    (block,), codec, silent = describe(data)[1], Codec(model, settings(1)), 0
    for bit in range(8 * len(block.payload)):
        bad = bytearray(block.payload)
        bad[bit // 8] ^= 1 << bit % 8
        try:
            found = codec.decode_block(replace(block, payload=bytes(bad)))
        except CorruptFileError:
            continue
        assert np.array_equal(found, x.numpy())
        silent += 1
    assert silent < 30
    for size in (0, 3, 4):
        with pytest.raises(CorruptFileError):
            codec.decode_block(replace(block, payload=block.payload[:size]))


def test_what_is_saved_of_damaged_files_is_right(coded):
    r = random.Random(2)
    saved = 0
    for i in range(200):
        model, x, data = coded[i % len(coded)]
        try:
            found = decompress(damaged(data, r), model, salvage=True)
        except CodecError:
            continue
        assert torch.equal(found.x.long(), x[found.kept].long())
        saved += bool(found.lost) and len(found.x) > 0
    assert saved > 20


@pytest.mark.parametrize("which", [0, 4])
def test_blocks_that_lie_are_refused_before_they_cost_memory(coded, which):
    model, _, data = coded[which]
    header, extra, at = container.read_prefix(data)
    first, *rest = container.read_blocks(data, at)
    for lie in (
        replace(first, count=10**6),
        replace(first, seeds=first.seeds + 1),
        replace(first, sizes=(*first.sizes[:-1], 256)),
        replace(first, borrowed=10**9),
        replace(first, borrowed=first.borrowed + 1),
        replace(first, borrowed=0),
        replace(first, borrowed=1),
        replace(first, mode=EVEN),
        replace(first, mode=PACKED),
        replace(first, mode=3),
        replace(first, first=1),
        replace(first, sizes=(256,) * 200, count=256 * 200 + first.seeds),
        replace(first, sizes=(1,) * 256 + (256,), count=512 + first.seeds),
        replace(first, payload=b""),
        replace(first, payload=first.payload[:-1] + b"\0"),
        replace(first, payload=b"\0\0\0\0"),
    ):
        bad = container.write_prefix({**header, "examples": lie.count + 100}, extra)
        bad += b"".join(map(container.write_block, (lie, *rest)))
        bad += container.write_end(bad, len(rest) + 1)
        with pytest.raises(CorruptFileError):
            decompress(bad, model)


@pytest.mark.parametrize(
    "text", ['{"effort": NaN}', '{"effort": 1e999}', "[1", "[" * 10_000, "[1]"]
)
def test_a_header_that_is_no_json_object_is_damaged(text):
    with patch.object(container.json, "dumps", lambda *_, **__: text):
        bad = container.write_prefix({}, b"")
    with pytest.raises(CorruptFileError, match=r"the header is not (JSON: |one of this format)"):
        container.read_prefix(bad)


def test_batches_that_lie_of_the_lanes_are_refused(coded):
    """Cut earlier, later, not at all or into more lanes than there are."""
    model, _, data = coded[4]
    (first, _), codec = describe(data)[1], Codec(model, settings(1, effort=2))
    n = sum(first.sizes)
    once = first.sizes.index(4)
    for sizes in (
        (1,) * n,
        first.sizes[::-1],
        (1, *first.sizes[1:once], *[1] * 4, *first.sizes[once + 1 :]),
        (*first.sizes[:once], 2, 2, *first.sizes[once + 1 :]),
        (*[1] * (n - 32), 32),
        (*first.sizes[:once], *[1] * 4, *first.sizes[once + 1 :]),
    ):
        assert sum(sizes) == n and sizes != first.sizes
        with pytest.raises(CorruptFileError):
            codec.decode_block(replace(first, sizes=sizes))


def test_one_damaged_block_costs_its_examples_alone(coded):
    model, x, data = coded[0]
    _, _, at = container.read_prefix(data)
    second = data.index(container.BLOCK, at + 4)
    for place in (second, second + 6, second + 40):
        bad = bytearray(data)
        bad[place] ^= 4
        with pytest.raises(CorruptFileError):
            decompress(bytes(bad), model)
        found = decompress(bytes(bad), model, salvage=True)
        assert found.lost == ((50, 50),)
        assert torch.equal(found.kept, torch.cat([torch.arange(50), torch.arange(100, 150)]))
        assert torch.equal(found.x.long(), x[found.kept].long())


def test_a_cut_file_is_saved_up_to_there(coded):
    model, x, data = coded[0]
    found = decompress(data[: len(data) - 20], model, salvage=True)
    assert found.lost == ((100, 50),) and torch.equal(found.x.long(), x[:100].long())
    whole = decompress(data, model, salvage=True)
    assert whole.lost == () and torch.equal(whole.x.long(), x.long())


def test_a_newer_version_and_what_is_no_file_of_ours(coded):
    model, _, data = coded[0]
    newer = bytearray(data)
    newer[8] = 99
    with pytest.raises(CodecError, match="version 99 and this nelbo reads 4; try: pip"):
        decompress(bytes(newer), model)
    for older in (1, 2, 3):
        newer[8] = older
        with pytest.raises(CodecError, match=f"version {older} and this nelbo reads 4; restore"):
            decompress(bytes(newer), model)
    for other in (
        b"",
        b"\x93NLB",
        b"\x89PNG\r\n\x1a\n" + bytes(100),
        data.replace(b"\r\n", b"\n"),
    ):
        with pytest.raises(CorruptFileError, match="not a compressed file of nelbo"):
            decompress(other, model)


def test_a_header_of_many_megabytes_in_few_is_refused(coded):
    model, _, data = coded[0]
    with pytest.raises(CorruptFileError, match="header"):
        decompress(changed(data, weights=" " * 10**7), model)
    huge = bytearray(data)
    struct.pack_into("<II", huge, 9, 2**32 - 1, 2**32 - 1)
    with pytest.raises(CorruptFileError, match="ends within its header"):
        decompress(bytes(huge), model)
