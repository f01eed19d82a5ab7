"""The tokens of a large corpus lie in files: written once, whole or not at all, and memory does not grow with them."""

from __future__ import annotations

import gc
import itertools
import json
import multiprocessing
import os
import resource
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from elastic_lsopt.config.settings import SettingError, TrainConfig
from elastic_lsopt.training.datasets import encoded, token_cache
from elastic_lsopt.training.datasets.records import Source
from elastic_lsopt.training.datasets.samples import Data, build_data
from elastic_lsopt.training.datasets.token_cache import key_of
from tests.processes.ranks import rank_environment
from tests.processes.warm import run

fast = pytest.mark.fast
MIB = 1 << 20


def settings(dataset: Path, **given: Any) -> TrainConfig:
    fixed = {"output_dir": "out", "max_steps": 1, "model": {"model_type": "llama"}, "block_size": 64}
    return TrainConfig(dataset=str(dataset), **(fixed | given))


def jsonl(path: Path, records: int, size: int = 100) -> Path:
    with path.open("w") as out:
        for i in range(records):
            out.write(json.dumps({"text": f"{i} " + "lorem " * (size // 6)}) + "\n")
    return path


def tokens_in(samples: Any) -> list[int]:
    return [int(t) for i in range(len(samples)) for t in samples[i]]


class Peak:
    """The most anonymous memory of this process in the block, above that at its beginning."""

    def __enter__(self) -> Peak:
        self.mib, self._before, self._going = 0.0, self._now(), True
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._going = False
        self._thread.join()

    def _watch(self) -> None:
        while self._going:
            self.mib = max(self.mib, self._now() - self._before)
            time.sleep(0.002)

    @staticmethod
    def _now() -> float:
        [line] = [x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("RssAnon")]
        return int(line.split()[1]) / 1024


@pytest.mark.parametrize(
    "packing, size", [("concatenate", 4000), pytest.param("documents", 400, marks=pytest.mark.full)]
)
def test_memory_does_not_grow_with_the_corpus(tmp_path: Path, packing: str, size: int) -> None:
    """Tokens of 8 and 32 MiB are written, and all samples read once: in a process of its own, because memory that other
    tests have given back would hide a growth here."""
    code = "import sys; from tests.training.datasets.test_token_cache import say_peaks; say_peaks(*sys.argv[1:])"
    arguments = [sys.executable, "-c", code, str(tmp_path), packing, str(size)]
    done = run(arguments, env=rank_environment(), timeout=120)
    assert done.returncode == 0, done.stderr
    peaks = json.loads(done.stdout.splitlines()[-1])
    assert peaks[2] < peaks[1] + 1, peaks


def say_peaks(folder: str, packing: str, size: str) -> None:
    """Print the peak of each corpus, in MiB."""
    encoded.PACKED_AT_ONCE = 2048
    peaks = []
    for mib in (1, 8, 32):  # the first warms up what is imported
        path = jsonl(Path(folder) / f"{mib}.jsonl", mib * MIB // 2 // int(size), int(size))
        gc.collect()
        with Peak() as peak:
            config = settings(path, dataset_cache_dir=f"{folder}/cache", packing=packing, block_size=1024)
            data = build_data(config)
            tokens = sum(_tokens_of(data.train[i]) for i in range(len(data.train)))
        peaks.append(peak.mib)
        assert 0.8 < 2 * tokens / (mib * MIB) < 1.1
    print(json.dumps(peaks))


def _tokens_of(sample: Any) -> int:
    return sum(len(ids) for ids, _ in sample) if isinstance(sample, list) else len(sample)


@fast
def test_from_memory_and_from_disk_are_the_same(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "d.jsonl", 300)
    where = {"dataset_cache_dir": str(tmp_path / "cache")}
    kept, written, found = (build_data(settings(path, **given)) for given in ({}, where, where))
    assert kept.identity == written.identity == found.identity and len(kept.eval)
    for data in (written, found):
        assert tokens_in(data.train) == tokens_in(kept.train) and tokens_in(data.eval) == tokens_in(kept.eval)
        assert (data.bigram_entropy, data.bytes_per_token) == (kept.bigram_entropy, kept.bytes_per_token)
    [entry] = [p for p in (tmp_path / "cache").iterdir() if p.is_dir()]
    assert len(list((tmp_path / "cache").iterdir())) == 2  # and its lock
    # Nobody reads the source again: the tokens are what the entry says.
    changed = (entry / "training.tokens").read_bytes()
    (entry / "training.tokens").write_bytes(changed[2:4] + changed[2:])
    assert tokens_in(build_data(settings(path, **where)).train) != tokens_in(kept.train)
    # An entry that was cut short is made anew.
    (entry / "training.tokens").write_bytes(changed[:-2])
    assert tokens_in(build_data(settings(path, **where)).train) == tokens_in(kept.train)


@fast
def test_a_corpus_beyond_the_limit_goes_to_hugging_faces_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    small = build_data(settings(jsonl(tmp_path / "s.jsonl", 100)))
    assert not (tmp_path / "home").exists() and len(small.train)
    monkeypatch.setattr(token_cache, "IN_MEMORY_BYTES", 1000)
    large = build_data(settings(tmp_path / "s.jsonl"))
    assert tokens_in(large.train) == tokens_in(small.train)
    assert [p for p in (tmp_path / "home/elastic_lsopt").iterdir() if p.is_dir()]


@fast
def test_a_key_is_of_content_tokenizer_and_settings(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "d.jsonl", 3000)

    def key(tokenizer: str = "bytes", **given: Any) -> str:
        return key_of(Source.of(str(path)), tokenizer, {"fraction": 0.1} | given)

    keys = [key(), key("words"), key(fraction=0.2)]
    assert key() == keys[0]
    text, at = path.read_bytes(), path.stat().st_mtime_ns
    for changed in (b"X" + text[1:], text[:-1] + b"X", text + b" "):  # of one size and time too
        path.write_bytes(changed)
        os.utime(path, ns=(at, at))
        keys.append(key())
    path.write_bytes(text)
    os.utime(path, ns=(at + 1, at + 1))
    keys.append(key())
    assert len(set(keys)) == 7


def _build(dataset: Path, cache: Path, results: Any) -> None:
    data = build_data(settings(dataset, dataset_cache_dir=str(cache)))
    results.put((data.identity["digest of the training part"], len(data.train)))


def _killed_at(record: int, dataset: Path, cache: Path, results: Any) -> None:
    """Build in a process that the kernel ends at that record."""
    loads, count = json.loads, itertools.count(1)

    def deadly(text: Any, *given: Any, **how: Any) -> Any:
        if next(count) == record:
            os.kill(os.getpid(), signal.SIGKILL)
        return loads(text, *given, **how)

    json.loads = deadly
    _build(dataset, cache, results)


def test_jobs_that_start_at_once_write_once_and_outlive_one_that_is_killed(tmp_path: Path) -> None:
    """Three processes at once; one of them, which writes, is killed in the middle of it."""
    fork = multiprocessing.get_context("fork")
    path, cache, results = jsonl(tmp_path / "d.jsonl", 20_000, size=400), tmp_path / "cache", fork.Queue()
    writer = fork.Process(target=_killed_at, args=(10_000, path, cache, results))
    writer.start()
    writer.join(60)
    assert writer.exitcode == -signal.SIGKILL
    assert list(cache.glob("*.unfinished/training.tokens")) and not list(cache.glob("*/facts.json"))
    others = [fork.Process(target=_build, args=(path, cache, results)) for _ in range(3)]
    for process in others:
        process.start()
    got = [results.get(timeout=120) for _ in others]
    for process in others:
        process.join(60)
        assert process.exitcode == 0
    assert len(set(got)) == 1
    [entry] = [p for p in cache.iterdir() if p.is_dir()]
    assert {p.name for p in entry.iterdir()} == {"facts.json", "training.tokens", "held_out.tokens"}


def test_one_writes_while_the_others_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The source is read once by the one who writes; the others only look at its first record."""
    fork = multiprocessing.get_context("fork")
    path, cache = jsonl(tmp_path / "d.jsonl", 5_000), tmp_path / "cache"
    results, lines, begin = fork.Queue(), fork.Value("i", 0), fork.Barrier(3)
    loads = json.loads

    def counted(text: Any, *given: Any, **how: Any) -> Any:
        with lines.get_lock():
            lines.value += 1
        return loads(text, *given, **how)

    def start() -> None:
        begin.wait()
        _build(path, cache, results)

    monkeypatch.setattr("elastic_lsopt.training.datasets.records.json.loads", counted)
    others = [fork.Process(target=start) for _ in range(3)]
    for process in others:
        process.start()
    assert len({results.get(timeout=120) for _ in others}) == 1
    for process in others:
        process.join(60)
    assert 5_000 <= lines.value <= 5_000 + 20  # and facts.json, and the first record, of each


def _said(dataset: Path, cache: Path, results: Any) -> None:
    """What a user is told on a disk that takes 64 KiB a file: the kernel's own limit, as a quota has one."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65_536, 65_536))
    try:
        build_data(settings(dataset, dataset_cache_dir=str(cache)))
    except SettingError as error:
        results.put((error.key, str(error)))
    except BaseException as error:
        results.put(("", repr(error)))


@fast
def test_a_disk_that_takes_no_more_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    path, cache, results = jsonl(tmp_path / "d.jsonl", 2_000), tmp_path / "cache", fork.Queue()
    process = fork.Process(target=_said, args=(path, cache, results))
    process.start()
    key, said = results.get(timeout=60)
    process.join(60)
    assert key == "dataset_cache_dir" and "\n" not in said
    assert f"dataset_cache_dir={cache} cannot be written: File too large; " in said
    assert not [p for p in cache.iterdir() if p.is_dir()]


@fast
def test_a_folder_that_cannot_be_made_is_one_line_but_one_that_can_be_read_is_enough(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    path = jsonl(tmp_path / "d.jsonl", 100)
    for where in (tmp_path / "file", tmp_path / "file/below"):
        with pytest.raises(SettingError, match=f"dataset_cache_dir={where} cannot be written: .*give a folder") as said:
            build_data(settings(path, dataset_cache_dir=str(where)))
        assert "\n" not in str(said.value)
    cache = tmp_path / "cache"
    first = build_data(settings(path, dataset_cache_dir=str(cache)))
    for lock in cache.glob("*.lock"):
        lock.unlink()
        lock.mkdir()  # whoever would write must fail here, root too
    again: Data = build_data(settings(path, dataset_cache_dir=str(cache)))
    assert again.identity == first.identity
