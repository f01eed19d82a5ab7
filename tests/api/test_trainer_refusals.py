"""What a LandscapeTrainer does not do is refused when it is made, in one line with the fix."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import elastic_lsopt as lso
from elastic_lsopt.api.trainer.refusals import method_of
from tests.cases import trainer as cases
from tests.cases.trainer_checkpoints import Lagging

SAM = lso.SAM(rho=0.1)


@pytest.fixture(autouse=True)
def afresh() -> Iterator[None]:
    with cases.fresh():
        yield


def frozen() -> Any:
    return cases.llama().requires_grad_(False)


def halves() -> Any:
    return cases.llama().half()


def wrapped() -> Any:
    model = cases.llama()
    return model, (lso.LandscapeOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), SAM), None)


@pytest.mark.fast
@pytest.mark.parametrize(
    "landscape,more,model,says",
    [
        (SAM, {}, halves, "fp16 needs loss scaling, which is refused"),
        (SAM, {}, frozen, "the model has no trainable parameter"),
        (SAM, {"optim": "lomo"}, cases.llama, "optim=lomo steps inside of backward"),
        (lso.LPFSGD(parts=4, alpha=1.0), {}, cases.llama, "parts=4, and there are gradient_accumulation_steps=3"),
        ("bi_lora", {}, cases.llama, "bi_lora: the Trainer evaluates and saves the weights as they are, and the model"),
        ("sma", {}, cases.llama, "unknown method 'sma'; did you mean 'sam'?"),
        ({"rho": 0.1}, {}, cases.llama, 'names no method; write {"method": "sam", "rho": 0.05}'),
        ({"method": "sam", "roh": 0.1}, {}, cases.llama, "no hyper-parameter 'roh'; did you mean 'rho'?"),
        (lso.SAM, {}, cases.llama, "landscape=SAM is no method"),
        (0.05, {}, cases.llama, "landscape=float is no method"),
    ],
)
def test_refused(tmp_path: Path, landscape: Any, more: dict[str, Any], model: Any, says: str) -> None:
    with pytest.raises(lso.UserError) as caught:
        lso.LandscapeTrainer(
            model=model(), args=cases.arguments("plain", str(tmp_path), **more), train_dataset=cases.rows(),
            landscape=landscape,
        )  # fmt: skip
    assert says in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.fast
@pytest.mark.parametrize(
    "update,says",
    [
        ("adahessian", "update adahessian looks at the curvature of the loss, and a closure gives gradients only"),
        ("schedule_free", "update schedule_free: the Trainer evaluates and saves the weights"),
    ],
)
def test_an_update_that_the_trainer_cannot_serve_is_refused(tmp_path: Path, update: str, says: str) -> None:
    model = cases.llama()
    base = lso.UpdateOptimizer(model.parameters(), update, lr=0.1)
    with pytest.raises(lso.UserError) as caught:
        lso.LandscapeTrainer(
            model=model, args=cases.arguments("plain", str(tmp_path)), train_dataset=cases.rows(),
            optimizers=(base, None), landscape=SAM,
        )  # fmt: skip
    assert says in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.fast
def test_a_wrapped_optimizer_is_refused(tmp_path: Path) -> None:
    model, optimizers = wrapped()
    args = cases.arguments("plain", str(tmp_path))
    with pytest.raises(lso.UserError, match="give its base there, and the method as landscape"):
        lso.LandscapeTrainer(model=model, args=args, train_dataset=cases.rows(), landscape=SAM, optimizers=optimizers)


@pytest.mark.fast
def test_data_parallel_is_refused(tmp_path: Path) -> None:
    args = cases.arguments("plain", str(tmp_path))
    args._n_gpu = 2  # what two GPUs in one process would make it
    with pytest.raises(lso.Unsupported, match=r"DataParallel on 2 GPUs of one process .* --nproc-per-node 2"):
        lso.LandscapeTrainer(model=cases.llama(), args=args, train_dataset=cases.rows(), landscape=SAM)


@pytest.mark.fast
def test_a_trainer_that_samples_in_its_own_way_is_refused(tmp_path: Path) -> None:
    class Sampling(lso.LandscapeTrainer):
        def _prepare_inputs(self, inputs: Any) -> Any:
            return super()._prepare_inputs(inputs)

    args = cases.arguments("plain", str(tmp_path))
    with pytest.raises(lso.Unsupported, match="Sampling makes its batches in _prepare_inputs"):
        Sampling(model=cases.llama(), args=args, train_dataset=cases.rows(), landscape=SAM)


def test_on_several_ranks(ranks: Any) -> None:
    for told in ranks(2).run("tests.cases.trainer_laws:refusals"):
        assert told == [
            "DDP for FSDP", "no gradient_clipping", "an optimizer of the JSON", "auto_find_batch_size", "torch_compile",
            "fp16 in the JSON", "a base of whole matrices",
        ], told  # fmt: skip


@pytest.mark.fast
def test_a_method_by_name_or_as_in_a_yaml() -> None:
    assert method_of(None) == lso.Plain() and method_of("asam") == lso.ASAM()
    assert method_of({"method": "sam", "rho": 0.2}) == lso.SAM(rho=0.2)
    assert method_of({"import": "tests.cases.trainer_checkpoints:Lagging"}) == Lagging()
