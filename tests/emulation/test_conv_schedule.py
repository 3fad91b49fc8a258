"""Which block does what, in the launches of the convolutions for sm_90a: CUTLASS's schedulers, asked on the host
(tests/emulation/native/conv_launch.cpp) for every block of a grid.
"""

from __future__ import annotations

import itertools

import pytest

import hopper
from hopper import Conv

pytestmark = [pytest.mark.xdist_group("conv_launch"), pytest.mark.full]  # the library is compiled once

MULTIPROCESSORS = 132
SCHEDULED = [
    Conv(256, 56, 56, 64, 64, 3, 3, (1, 1), (1, 1)),
    Conv(256, 7, 7, 512, 512, 3, 3, (1, 1), (1, 1)),
    Conv(32, 14, 14, 1024, 256),
    Conv(1, 7, 7, 512, 2048),
    Conv(1, 14, 14, 256, 256, 3, 3, (1, 1), (1, 1)),
    Conv(3, 29, 31, 72, 1000, 3, 3, (2, 2), (1, 1)),
    Conv(1, 1, 1, 8, 8),
    Conv(8, 56, 56, 256, 8),
    Conv(16, 7, 7, 2048, 4096),
]


def covered(tile, conv, multiprocessors, clusters=0):
    """The work of a launch, checked: every step of every tile once, by one block, the last of which writes."""
    launch = tile.launch(conv, multiprocessors=multiprocessors, clusters=clusters)
    row_tiles, column_tiles = -(-conv.pixels // tile.rows), -(-conv.k // tile.columns)
    steps = conv.r * conv.s * -(-conv.c // tile.depth)
    blocks = launch.grid[0] * launch.grid[1] * launch.grid[2]
    assert (
        blocks <= (clusters * tile.cluster or multiprocessors)
        and blocks % tile.cluster == 0
        and launch.grid[0] % tile.cluster == 0
    )
    tiles, pieces = {}, tile.work()
    for work in pieces:
        assert work.batch == 0 and 0 <= work.block < blocks and work.steps > 0
        tiles.setdefault((work.row_tile, work.column_tile), []).append(work)
    for parts in tiles.values():
        parts.sort(key=lambda work: work.step)
        assert parts[0].step == 0 and parts[-1].step + parts[-1].steps == steps
        assert all(a.step + a.steps == b.step for a, b in itertools.pairwise(parts))
        assert [work.last for work in parts] == [0] * (len(parts) - 1) + [1]
    rounded = -(-row_tiles // tile.cluster) * tile.cluster  # a cluster's last block may have no pixels
    assert set(tiles) == set(itertools.product(range(rounded), range(column_tiles)))
    return tiles, pieces


@pytest.mark.parametrize(
    "multiprocessors,clusters", [(MULTIPROCESSORS, 0), (MULTIPROCESSORS, 60), (114, 0), (78, 33), (2, 1)]
)
def test_every_tile_is_somebody_s_work_once(multiprocessors, clusters):
    """`clusters`: that the device says fit at once; blocks that stand alone are not asked about."""
    for tile, conv in itertools.product(hopper.tiles(), SCHEDULED):
        tiles, pieces = covered(tile, conv, multiprocessors, clusters if tile.cluster > 1 else 0)
        if not tile.splits_depth:
            assert len(pieces) == len(tiles)
        if tile.cluster == 1:
            continue
        blocks = {}
        for work in pieces:
            blocks.setdefault(work.block, []).append(work)
        for block, own in blocks.items():  # neighbours go together: they wait for each other's halves
            first = blocks[block - block % tile.cluster]
            assert len(own) == len(first)
            for a, b in zip(first, own, strict=True):
                assert (b.row_tile, b.column_tile) == (a.row_tile + block % tile.cluster, a.column_tile)
                assert a.row_tile % tile.cluster == 0


def test_stream_k_shares_depth_where_tiles_are_few_and_its_workspace_holds_the_parts():
    shared = 0
    for tile, conv in itertools.product(hopper.tiles(), SCHEDULED):
        space = tile.workspace(conv)
        if not tile.splits_depth:
            assert space == 0
            continue
        tiles, pieces = covered(tile, conv, MULTIPROCESSORS)
        split = sum(len(parts) > 1 for parts in tiles.values())
        shared += split > 0
        part = tile.rows * tile.columns * 4
        assert space >= split * part and (space == 0) == (split == 0)
        assert space <= 2 * MULTIPROCESSORS * (part + 64)
        done = set()  # a part waits for the one before it: never for a block that may not have started
        for work in sorted(pieces, key=lambda work: work.block):
            parts = tiles[work.row_tile, work.column_tile]
            before = parts[: parts.index(work)]
            assert done.issuperset(before), (tile.name, conv, work)
            done.add(work)
    assert shared >= 6
