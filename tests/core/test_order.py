"""Blocks by key and by last use, beside a dict and a list."""

from __future__ import annotations

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvpool.core import order as order_module
from kvpool.core.addresses import PARTS, ByAddress
from kvpool.core.order import BlockOrder
from kvpool.core.slots import Block

names = st.integers(0, 9).map(lambda number: number.to_bytes(32))


class OrderModel(RuleBasedStateMachine):
    """A list of blocks, coldest first, and a set of those that are set aside."""

    def __init__(self) -> None:
        super().__init__()
        self.order = BlockOrder()
        self.blocks: dict[bytes, Block] = {}
        self.list: list[Block] = []

    @rule(name=names)
    def add(self, name):
        if name not in self.blocks:
            block = self.blocks[name] = Block(name)
            self.order.add(block)
            self.list.append(block)

    @rule(name=names)
    def remove(self, name):
        if (block := self.blocks.pop(name, None)) is not None:
            self.order.remove(block)
            self.list = [one for one in self.list if one is not block]

    @rule(name=names, other=names)
    def rekey(self, name, other):
        block = self.blocks.get(name)
        if block in self.list and other not in self.blocks:
            self.blocks[other] = self.blocks.pop(name)
            self.order.rekey(block, other)
            self.list = [*(one for one in self.list if one is not block), block]

    @rule(name=names)
    def touch(self, name):
        if (block := self.blocks.get(name)) is not None:
            self.order.touch(block)
            if block in self.list:
                self.list = [*(one for one in self.list if one is not block), block]

    @rule(name=names)
    def aside(self, name):
        if (block := self.blocks.get(name)) is not None:
            self.order.aside(block)
            self.list = [one for one in self.list if one is not block]

    @rule(name=names)
    def back(self, name):
        if (block := self.blocks.get(name)) is not None:
            self.order.back(block)
            self.list += [] if block in self.list else [block]

    @invariant()
    def agrees(self):
        assert list(self.order) == self.list
        assert self.order.coldest is (self.list[0] if self.list else None)
        assert len(self.order) == len(self.blocks)
        assert {block.key: block for block in self.order.values()} == self.blocks
        assert all(self.order.get(number.to_bytes(32)) is self.blocks.get(number.to_bytes(32)) for number in range(10))


OrderModel.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestOrderModel = OrderModel.TestCase


@pytest.mark.parametrize("seed", range(20))
def test_a_walk_passes_all_that_stays(seed, monkeypatch):
    """Whatever comes, goes and is used meanwhile; what nobody uses is passed in the order of its last use."""
    monkeypatch.setattr(order_module, "_STEP", 7)
    monkeypatch.setattr(order_module, "_SAMPLES_A_PART", 2)
    rng = random.Random(seed)
    order, clock = BlockOrder(), 0

    def touch(block: Block) -> None:
        nonlocal clock
        clock += 1
        block.stamp = clock
        order.touch(block)

    def add() -> Block:
        block = Block(rng.randbytes(32))
        order.add(block)
        touch(block)
        return block

    blocks = [add() for _ in range(2000)]
    rng.shuffle(blocks)
    quiet, used, going = blocks[:800], blocks[800:1400], blocks[1400:]
    for block in used[:100]:
        order.aside(block)
    passed: list[Block] = []
    longest = 0
    for some in order.walk():
        passed += some
        longest = max(longest, len(some))
        touch(rng.choice(used))
        add()
        if going and rng.random() < 0.5:
            order.remove(going.pop())
    assert longest <= 7
    assert {*quiet, *used, *going} <= {*passed}
    assert len(passed) == len({*passed})
    stamps = [block.stamp for block in passed if block in set(quiet)]
    assert stamps == sorted(stamps)


@pytest.mark.parametrize("end", [0, 1, PARTS - 1, PARTS, 10 * PARTS + 3])
def test_every_address_of_a_range_has_its_place(end):
    """The first and the last too."""
    found = ByAddress[str](end)
    every = sorted({0, end // 2, end})
    for address in every:
        assert address not in found
        assert found.get(address) is None
        found[address] = str(address)
    assert len(found) == len(every)
    assert dict(found.items()) == {address: str(address) for address in every}
    assert found.pop(end) == str(end)
    with pytest.raises(KeyError):
        found.pop(end)
    with pytest.raises(KeyError):
        del found[end]
