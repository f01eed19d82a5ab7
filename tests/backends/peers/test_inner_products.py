"""Inner products between replicas are the same whether they are taken at once or a piece at a time."""

from __future__ import annotations

import pytest
import torch

from elastic_lsopt.backends.peers.peers import PIECE, products

pytestmark = pytest.mark.fast


@pytest.mark.parametrize("count", [1, PIECE, 2 * PIECE + 7])
@pytest.mark.parametrize("kind", ["of a row", "of each number", "as they are"])
def test_pieces_are_the_whole(count: int, kind: str) -> None:
    draw = torch.Generator().manual_seed(0)
    told = torch.randn(3, count, generator=draw)
    shares = {"of a row": torch.rand(3, 1, generator=draw) + 0.1, "of each number": torch.rand(3, count) + 0.1}.get(
        kind
    )
    points = told.double() if shares is None else told.double() / shares.double()
    apart = points if shares is None else points - points.mean(0)
    wanted = torch.tensor([[(a * b).sum() for b in apart] for a in apart])
    found = products(told, None if shares is None else shares.double())
    assert found.dtype == torch.float64 and torch.allclose(found, wanted, rtol=1e-12, atol=1e-12 * count)
