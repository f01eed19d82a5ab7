"""Shannon entropy against plain loops, for classes and for next tokens with a mask."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import elastic_lsopt as lso
from elastic_lsopt import NonFinite, UserError
from elastic_lsopt.oracle.losses.loss import causal_lm_loss
from elastic_lsopt.probes.flatness.shannon_entropy import shannon_entropy
from tests.cases import engines
from tests.cases.probes.flatness import dense, quadratic, split_loss

pytestmark = pytest.mark.fast


def entropy(z: Tensor) -> float:
    p = torch.softmax(z.detach().double(), -1)
    return float(-(p * p.log()).sum())


def test_of_a_classifier_with_units_of_uneven_size() -> None:
    model, units = engines.net((), torch.float64), engines.batches(1, 3, last=1, dtype=torch.float64)[0]
    space, oracle = lso.attach(model, split_loss(), units)
    each = [entropy(z) for x, _ in units for z in model(x)]
    assert shannon_entropy(space, oracle).value == pytest.approx(sum(each) / len(each), rel=1e-12)


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.table = nn.Embedding(9, 9)

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.table(input_ids))


def test_of_next_tokens_that_count() -> None:
    torch.manual_seed(4)
    model, units, each = Tokens(), [], []
    for n in (2, 3):
        ids = torch.randint(0, 9, (n, 6))
        labels = ids.clone()
        labels[0, 2:5] = -100
        units.append({"input_ids": ids, "labels": labels})
        for row in range(n):
            each += [entropy(model.table(ids[row, t])) for t in range(5) if labels[row, t + 1] != -100]
    space, oracle = lso.attach(model, causal_lm_loss(), units)
    assert shannon_entropy(space, oracle).value == pytest.approx(sum(each) / len(each), rel=1e-6)


def test_bad_input() -> None:
    with pytest.raises(UserError, match=r"^the logits need the loss in two steps; pass lso.Loss.*$"):
        shannon_entropy(*quadratic(*dense(3)))
    model = engines.net((), torch.float64)
    space, oracle = lso.attach(model, split_loss(), engines.batches(1, 1, dtype=torch.float64)[0])
    with torch.no_grad():
        model.tiny.fill_(float("nan"))
    with pytest.raises(NonFinite, match="the Shannon entropy is nan"):
        shannon_entropy(space, oracle)
