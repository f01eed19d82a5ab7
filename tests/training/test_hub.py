"""Names of the hub without a network: one line within moments, and the cache is read without asking."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from elastic_lsopt.config.settings import SettingError, TrainConfig
from elastic_lsopt.training.building import hub
from elastic_lsopt.training.building.models import build_model
from elastic_lsopt.training.datasets.records import Source
from elastic_lsopt.training.datasets.tokens import tokens_of


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A hub at a port where nobody listens, held so that nobody else does; an empty cache, no proxy."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{held.getsockname()[1]}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        hub.reachable.cache_clear()
        yield
    hub.reachable.cache_clear()


def config(**more: object) -> TrainConfig:
    given = {"model_name_or_path": "no-such/model", "task": "causal_lm", "dataset": "python-stdlib", "max_steps": 1}
    return TrainConfig(**(given | {"output_dir": "run"} | more))  # type: ignore[arg-type]


@pytest.mark.parametrize("what", ["model", "tokenizer", "model's tokenizer", "dataset"])
def test_an_unknown_name_is_one_line_at_once(what: str) -> None:
    import datasets  # noqa: F401  (seconds that are not the network's)
    import transformers

    models = ("AutoModelForCausalLM", "AutoModelForSequenceClassification")
    for name in ("AutoConfig", *models, "AutoTokenizer", "GenerationConfig"):
        getattr(transformers, name)  # which imports it
    begin = time.monotonic()
    with pytest.raises(SettingError) as refused:
        if what == "model":
            build_model(config(), device="meta")
        elif what == "tokenizer":
            tokens_of(config(tokenizer_name_or_path="no-such/model"))
        elif what == "model's tokenizer":
            tokens_of(config())
        else:
            Source.of("no-such/model")
    assert time.monotonic() - begin < hub.REACH_S + 3, "it waited for a network that is not there"
    key = {"tokenizer": "tokenizer_name_or_path", "dataset": "dataset"}.get(what, "model_name_or_path")
    assert refused.value.key == key
    said = f"{key}=no-such/model is no folder here and not in the local cache, and {constants.ENDPOINT} cannot be reach"
    assert str(refused.value).startswith(said) and "\n" not in str(refused.value)


def test_what_is_in_the_cache_is_read_from_there_alone(tmp_path: Path) -> None:
    (tmp_path / "cache" / "models--some--model").mkdir(parents=True)
    (tmp_path / "datasets" / "some___data").mkdir(parents=True)
    assert hub.local_only("model_name_or_path", "some/model") and hub.local_only("dataset", "some/Data", "datasets")


def test_a_folder_and_a_hub_that_answers_are_not_asked_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not hub.local_only("model_name_or_path", str(tmp_path))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        hub.reachable.cache_clear()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{listener.getsockname()[1]}")
        assert not hub.local_only("model_name_or_path", "no-such/model")


def test_a_hub_behind_a_proxy_is_as_reachable_as_the_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        monkeypatch.setattr(constants, "ENDPOINT", "http://hub.invalid")
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.getsockname()[1]}")
        assert hub.reachable()
