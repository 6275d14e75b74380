"""Block files: what they say about themselves, and that nothing damaged is ever taken for right."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from kvpool.tiers import blockfile
from kvpool.tiers.dram import SlotHeader, header_area, pack_header
from kvpool.tiers.opening import open_store
from kvpool.tiers.store import FileName, StoreBrokenError, StoreMissingError, StoreSizeError

SHAPES = [(4, 4 * 1000), (1, 512), (1, 1), (61, 61 * 64), (52, 52 * 10), (53, 53 * 10), (2, 2 << 15)]
"""(layers, shard_bytes): headers of one unit and of two, payloads that end in a unit and at its edge."""


def name_of(number: int, shard: int = 0) -> FileName:
    source = random.Random(number)
    return FileName(source.randbytes(16), source.randbytes(16), shard)


def block(number: int, layers: int, shard_bytes: int, generation: int = 0) -> tuple[FileName, bytearray]:
    name = name_of(number)
    return name, blockfile.build(name, random.Random(number).randbytes(shard_bytes), layers, generation)


@pytest.mark.parametrize(("layers", "shard_bytes"), SHAPES)
def test_a_block_says_itself_whose_it_is(layers, shard_bytes):
    """Parsing finds the header without knowing the layers; verifying gives the checksums."""
    name, extent = block(1, layers, shard_bytes, generation=7)
    view = memoryview(extent)
    assert len(extent) == blockfile.extent_bytes(shard_bytes, layers)
    header = blockfile.parse(view)
    assert (header.namespace, header.key, header.shard) == name
    assert (header.layers, header.shard_bytes, header.generation) == (layers, shard_bytes, 7)
    assert blockfile.verify(view, name, shard_bytes, layers) == header.checksums
    assert len(header.checksums) == 8 * layers
    assert blockfile.payload(view, header) == random.Random(1).randbytes(shard_bytes)


@pytest.mark.parametrize(
    ("other", "shard_bytes", "layers", "reason"),
    [
        (lambda n: n._replace(namespace=bytes(16)), 4000, 4, "namespace"),
        (lambda n: n._replace(key=bytes(16)), 4000, 4, "key"),
        (lambda n: n._replace(shard=3), 4000, 4, "shard is 0"),
        (lambda n: n, 3996, 4, "shard_bytes is 4000"),
        (lambda n: n, 4000, 5, "layers is 4"),
        (lambda n: n, 3000, 4, "4608 bytes instead of 3584"),
        (lambda n: n, 4000, 53, "bytes instead of"),
    ],
)
def test_what_was_expected_must_be_there(other, shard_bytes, layers, reason):
    """A right block under another name, or of another shape, is broken, and the reason says so."""
    name, extent = block(1, 4, 4000)
    with pytest.raises(StoreBrokenError, match=reason):
        blockfile.verify(memoryview(extent), other(name), shard_bytes, layers)


def test_the_changed_layer_is_named():
    """People who look into broken files learn where to look."""
    name, extent = block(1, 4, 4000)
    extent[512 + 1500] ^= 1
    with pytest.raises(StoreBrokenError, match="layer 1 is changed"):
        blockfile.verify(memoryview(extent), name, 4000, 4)


@pytest.mark.parametrize("length", [0, 1, 96, 511, 512, 513, 4096, 1 << 16])
@pytest.mark.parametrize("fill", [b"\0", b"\xff", b"KVPSLOT1"])
def test_what_is_no_block_has_no_header(length, fill):
    """Empty, short, and full of anything else: broken, no other error."""
    view = memoryview((fill * length)[:length])
    with pytest.raises(StoreBrokenError):
        blockfile.parse(view)
    for layers in (1, 4096):
        with pytest.raises(StoreBrokenError):
            blockfile.verify(view, name_of(1), 512, layers)


class Damage:
    """Ways in which a file can come to hold something else; each returns its new bytes, None for no file."""

    def __init__(self, source: random.Random, extents: list[bytearray]) -> None:
        self.source = source
        self.extents = extents

    def bit_flip(self, data: bytearray) -> bytearray:
        at = self.source.randrange(len(data) * 8)
        data[at // 8] ^= 1 << at % 8
        return data

    def many_flips(self, data: bytearray) -> bytearray:
        for _ in range(self.source.randrange(2, 20)):
            self.bit_flip(data)
        return data

    def truncated(self, data: bytearray) -> bytearray:
        return data[: self.source.choice([self.source.randrange(len(data)), len(data) - 512, 512, 0])]

    def extended(self, data: bytearray) -> bytearray:
        return data + self.source.choice([bytes(512), bytes(1), data, self.source.randbytes(4096)])

    def zeroed_pages(self, data: bytearray) -> bytearray:
        page = self.source.choice([512, 4096])
        at = self.source.randrange(0, len(data), page)
        end = min(len(data), at + page * self.source.randrange(1, 4))
        data[at:end] = bytes(end - at)
        return data

    def torn(self, data: bytearray) -> bytearray:
        """The length is there, the rest of the bytes is not: as after a power cut."""
        at = self.source.randrange(0, len(data), 512)
        data[at:] = bytes(len(data) - at)
        return data

    def swapped(self, data: bytearray) -> bytearray:
        return bytearray(self.source.choice([other for other in self.extents if other != data]))

    def header_of_another(self, data: bytearray) -> bytearray:
        other = self.source.choice([other for other in self.extents if other != data])
        data[:512] = other[:512]
        return data

    def payload_of_another(self, data: bytearray) -> bytearray:
        other = self.source.choice([other for other in self.extents if other != data])
        return data[:512] + other[512:]

    def wrong_namespace(self, data: bytearray) -> bytearray:
        return self._signed_anew(data, namespace=self.source.randbytes(16))

    def wrong_key(self, data: bytearray) -> bytearray:
        return self._signed_anew(data, key=self.source.randbytes(16))

    def wrong_shard(self, data: bytearray) -> bytearray:
        return self._signed_anew(data, shard=self.source.randrange(1, 256))

    def wrong_checksums(self, data: bytearray) -> bytearray:
        header = blockfile.parse(memoryview(data))
        return self._signed_anew(data, checksums=self.source.randbytes(8 * header.layers))

    def foreign(self, data: bytearray) -> bytearray:
        return bytearray(self.source.randbytes(len(data)))

    def moved(self, data: bytearray) -> bytearray:
        by = self.source.choice([1, 512, 4096])
        return data[by:] + data[:by]

    def piece_moved(self, data: bytearray) -> bytearray:
        size = self.source.randrange(1, 2048)
        there, here = (self.source.randrange(len(data) - size) for _ in range(2))
        data[there : there + size] = data[here : here + size]
        return data

    def _signed_anew(self, data: bytearray, **changes: object) -> bytearray:
        header = blockfile.parse(memoryview(data))
        fields = {name: getattr(header, name) for name in SlotHeader.__slots__} | changes
        pack_header(memoryview(data), header_area(header.layers), SlotHeader(**fields))
        return data


KINDS = [name for name in vars(Damage) if not name.startswith("_")]


@pytest.mark.parametrize("kind", KINDS)
def test_no_damaged_file_is_taken_for_right(kind, tmp_path):
    """Hundreds of damages a kind, at random places of real files: found, or else every payload byte is right."""
    source = random.Random(kind)
    blocks = [
        (*block(number, layers, shard_bytes), layers, shard_bytes)
        for number, (layers, shard_bytes) in enumerate([(4, 4000), (4, 4000), (61, 61 * 64), (1, 9000), (4, 4 << 12)])
    ]
    damage = Damage(source, [extent for _, extent, _, _ in blocks])
    store = open_store(str(tmp_path), owner="tester", capacity_bytes=1 << 30, direct=False)
    outcomes: Counter[str] = Counter()
    for _ in range(400):
        name, extent, layers, shard_bytes = source.choice(blocks)
        store.write(name, memoryview(extent))
        path = tmp_path / "blocks" / str(name)
        path.write_bytes(getattr(damage, kind)(bytearray(extent)))
        changed = path.read_bytes()
        target = memoryview(bytearray(len(extent)))
        try:
            store.read_into(name, target)
            blockfile.verify(target, name, shard_bytes, layers)
        except (StoreBrokenError, StoreSizeError) as found:
            outcomes["found"] += 1
            assert str(found)
            assert changed != extent, "what is right is not called broken"
            store.set_aside(name)
            with pytest.raises(StoreMissingError):
                store.read_into(name, target)
        else:
            outcomes["harmless"] += 1
            start = header_area(layers)
            assert target[start : start + shard_bytes] == extent[start : start + shard_bytes]
            header = blockfile.parse(target)
            assert (header.namespace, header.key, header.shard, header.shard_bytes) == (*name, shard_bytes)
        # Whoever does not know the shape finds the same, or a right block of another name.
        try:
            header = blockfile.parse(memoryview(changed))
            blockfile.verify(memoryview(changed), name, header.shard_bytes, header.layers)
        except StoreBrokenError:
            continue
        assert outcomes["harmless"]
        assert blockfile.payload(memoryview(changed), header) == extent[header_area(layers) :][:shard_bytes]
    assert outcomes["found"] > 100, "the damage is done where it matters"
