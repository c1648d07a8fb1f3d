"""Whatever happens to a file, the outcome is the exact data or an error that says so."""

import random
import struct
from dataclasses import replace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from support.codes import (
    assert_exact_or_refused,
    changed,
    damaged,
    files,
    settings,
    trial,
)

from nelbo.codec.api import decompress, describe
from nelbo.codec.coding.blocks import EVEN, PACKED
from nelbo.codec.coding.codec import Codec
from nelbo.codec.errors import CodecError, CorruptFileError
from nelbo.codec.format import container

pytest.importorskip("constriction")


@pytest.fixture(scope="module")
def coded():
    return files()


def test_ten_thousand_damaged_files(coded):
    r = random.Random(0)
    assert not any(trial(coded, i, r) for i in range(10_000))


@pytest.mark.parametrize("times", [60, pytest.param(300, marks=pytest.mark.slow)])
def test_damage_whose_checksums_were_mended(coded, times):
    """The words alone are changed and every checksum of the container is right: the end of the
    stack or the checksum of the data tells. (Some bits of xz mean nothing.)"""
    r = random.Random(1)
    for i in range(times):
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
