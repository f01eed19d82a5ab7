"""From YAML and the command line to settings: the numbers, the lines, the paths and the way back."""

import re
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from elastic_lsopt.config.load import ConfigFile, dump_config, load_config
from elastic_lsopt.config.settings import SettingError, TrainConfig
from elastic_lsopt.errors import UserError

pytestmark = pytest.mark.fast

LEAST = """\
dataset: python-stdlib
output_dir: runs/a
model:
  model_type: llama
  hidden_size: 64
max_steps: 10
"""


@pytest.fixture
def write(tmp_path):
    def write(text: str, name: str = "job.yaml") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return write


def refusal(path, overrides=()) -> str:
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_file_is_its_settings(write):
    assert load_config(write(LEAST)) == TrainConfig(
        dataset="python-stdlib", output_dir="runs/a", model={"model_type": "llama", "hidden_size": 64}, max_steps=10
    )


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-3", 1e-3), ("1E-3", 1e-3), ("1.5e3", 1500.0), ("+2e+1", 20.0), (".5e-3", 5e-4), ("1_0.0", 10.0), ("3", 3.0)],
)
def test_numbers_in_every_usual_form(write, text, value):
    assert load_config(write(f"{LEAST}learning_rate: {text}\n")).learning_rate == value
    assert load_config(write(LEAST), [f"learning_rate={text}"]).learning_rate == value
    assert load_config(write(f"{LEAST}landscape: {{method: sam, rho: {text}}}\n")).landscape["rho"] == value


@pytest.mark.parametrize("text", ["1e", "e5", "1e-3x", "abc1e5", "1.2.3e4"])
def test_what_only_looks_like_a_number_stays_text(write, text):
    assert load_config(write(LEAST), [f"output_dir={text}"]).output_dir == text


def test_a_mistyped_key_names_its_line_and_the_nearest_key(write):
    path = write(f"{LEAST}learning_rte: 1.0\n")
    assert refusal(path) == f"{path}:7: unknown key 'learning_rte'; did you mean 'learning_rate'?"


def test_a_wrong_value_names_line_value_and_range(write):
    path = write(f"# a comment\n\n{LEAST}learning_rate: -0.5\n")
    assert refusal(path) == f"{path}:9: learning_rate=-0.5 must be a number >= 0."
    path = write(LEAST.replace("10", "many"))
    assert refusal(path) == f"{path}:6: max_steps='many' must be an integer >= 1 or null."
    path = write(f"{LEAST}task: lion\n")
    assert refusal(path) == f"{path}:7: task='lion' must be one of causal_lm, sequence_classification, classification."
    path = write(f"{LEAST}report_to:\n- tensorboard\n- comet\n")
    assert refusal(path).startswith(f"{path}:7: report_to=['tensorboard', 'comet'] must be a list of")


def test_a_contradiction_names_a_line(write):
    path = write(f"{LEAST}per_device_train_batch_size: 64\nglobal_batch_size: 32\n")
    assert refusal(path).startswith(f"{path}:8: global_batch_size=32 must be at least")
    path = write(LEAST.replace("model_type: llama", "import: nothing"))
    assert refusal(path).startswith(f"{path}:4: model.import='nothing' must read")


def test_a_missing_key_is_named_with_its_meaning(write):
    path = write(LEAST.replace("dataset: python-stdlib\n", ""))
    assert refusal(path).startswith(f"{path}: dataset is missing: A text, jsonl or parquet file")


@pytest.mark.parametrize("key", ["fp16", "gradient_accumulation_steps"])
def test_a_refused_key_names_its_line(write, key):
    path = write(f"{LEAST}{key}: {{a: 1}}\n")
    assert refusal(path).startswith(f"{path}:7: {key}: ")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("min_node: 3", "unknown key 'elastic.min_node'; did you mean 'min_nodes'?"),
        ("min_nodes: 0", "elastic.min_nodes=0 must be an integer >= 1."),
        ("min_nodes: 65", "min_nodes=65 is above max_nodes=64; raise max_nodes or lower it."),
        ("endpoint: here", "elastic.endpoint='here' must be host:port or null."),
        ("lr_rule: cubic", "elastic.lr_rule='cubic' must be one of linear, sqrt, adascale, none or null."),
    ],
)
def test_a_mistake_inside_a_block_names_its_own_line(write, line, says):
    path = write(f"{LEAST}elastic:\n  max_nodes: 64\n  {line}\n")
    assert refusal(path) == f"{path}:9: {says}"


def test_a_block_that_is_none_and_its_file_beside_the_yaml(write):
    path = write(f"{LEAST}elastic: 3\n")
    assert refusal(path) == f"{path}:7: elastic=3 must be a mapping or null."
    path = write(f"{LEAST}elastic: {{secret_file: secret}}\n")
    write("x", "secret")
    assert load_config(path).elastic.secret_file == str(path.parent / "secret")
    assert load_config(path, ["elastic.copies=2"]).elastic.copies == 2


@pytest.mark.long
@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "must hold a mapping"),
        ("- a\n- b\n", "must hold a mapping"),
        ("a: [1\nb: 2\n", r":2: broken YAML"),
        ("a: 1\n\tb: 2\n", r":2: broken YAML"),
        ("a: !!python/object/apply:os.system [x]\n", "broken YAML"),
        ("a: 1\n---\nb: 2\n", "broken YAML"),
        ("a: 2001-99-99\n", "broken YAML"),
        ("a: \0\n", "broken YAML"),
        ("[" * 5000, "broken YAML"),
        ("seed: 1\nmax_steps: 2\nseed: 3\n", r":3: key 'seed' stands twice, first in line 1"),
        ("model:\n  a: 1\n  a: 2\n", r":3: key 'model.a' stands twice, first in line 2"),
        ("1: 2\n", "unknown key '1'"),
        ("model: &a {b: *a}\n", "dataset is missing"),
    ],
)
def test_broken_files_are_one_line(write, text, says):
    path = write(text)
    assert re.search(f"^{re.escape(str(path))}.*{says}", refusal(path))


def test_files_that_are_none(tmp_path):
    assert "does not exist" in refusal(tmp_path / "no.yaml")
    assert "Is a directory" in refusal(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert "UTF-8" in refusal(tmp_path / "binary.yaml")


def test_overrides_lie_over_the_file(write):
    path = write(f"{LEAST}landscape: {{method: sam, rho: 0.05}}\n")
    config = load_config(
        path, ["landscape.rho=0.1", "max_steps=20", "model.num_layers=2", "eval_steps=", "max_steps=30"]
    )
    assert config.landscape == {"method": "sam", "rho": 0.1}
    assert config.model == {"model_type": "llama", "hidden_size": 64, "num_layers": 2}
    assert (config.max_steps, config.eval_steps) == (30, None)
    assert load_config(path, ["landscape={method: none}"]).landscape == {"method": "none"}


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("max_stps=3", "unknown key 'max_stps'; did you mean 'max_steps'?"),
        ("tokenizer=x", "unknown key 'tokenizer'; did you mean 'tokenizer_name_or_path'?"),
        ("max_steps=-3", "max_steps=-3 must be an integer >= 1"),
        ("max_steps", "key=value"),
        ("=3", "key=value"),
        ("model..a=3", "key=value"),
        ("max_steps.a=3", "max_steps is not a block"),
        ("model={", "broken YAML"),
    ],
)
def test_a_wrong_override_is_named(write, override, says):
    message = refusal(write(LEAST), [override])
    assert message.startswith(f"command line, {override!r}: ")
    assert says in message


def test_a_replaced_block_forgets_the_lines_of_the_old_one(write):
    file = ConfigFile.read(write(f"{LEAST}landscape:\n  method: sam\n  rho: 1\n"), ["landscape={method: sam}"])
    assert file.place("landscape.rho").startswith("command line")


def test_a_later_check_gets_the_place_of_its_key(write):
    file = ConfigFile.read(write(f"{LEAST}landscape:\n  method: sam\n  rho: 1\n"))
    for key, line in (("landscape.rho", 9), ("landscape.every", 7), ("seed", None)):
        with pytest.raises(UserError) as caught, file.located():
            raise SettingError(key, "no.")
        assert str(caught.value) == f"{file.path}{f':{line}' if line else ''}: no."


def test_paths_are_sought_here_first_and_then_beside_the_file(write, tmp_path, monkeypatch):
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    path = write(LEAST.replace("python-stdlib", "texts"), "elsewhere/job.yaml")
    assert load_config(path).dataset == "texts"  # nowhere: whoever reads the data says so
    (path.parent / "texts").mkdir()
    assert load_config(path).dataset == str(path.parent / "texts")
    (here / "texts").mkdir()
    assert load_config(path).dataset == "texts"


def test_names_are_never_taken_for_paths(write):
    path = write(LEAST)
    for name in ("python-stdlib", "auto"):
        (path.parent / name).mkdir()
    config = load_config(path)
    assert (config.dataset, config.resume_from_checkpoint) == ("python-stdlib", "auto")


def test_the_home_folder_is_written_out(write, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_config(write(LEAST), ["output_dir=~/runs"]).output_dir == str(tmp_path / "runs")


def test_the_deepspeed_json_is_checked_with_the_file(write):
    path = write(f"{LEAST}backend: deepspeed\ndeepspeed: zero.json\n")
    assert refusal(path) == f"{path}:8: the DeepSpeed JSON zero.json does not exist."
    write('{"elasticity": {"enabled": true}}', "zero.json")
    assert re.search(r"job.yaml:8: .*zero.json: elasticity is refused", refusal(path))
    write('{"train_batch_size": 7}', "zero.json")
    assert "train_batch_size=7 is refused: the YAML says global_batch_size=32" in refusal(path)
    write('{"zero_optimization": {"stage": 3}}', "zero.json")
    assert load_config(path).deepspeed == str(path.parent / "zero.json")


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@pytest.mark.long
@settings(max_examples=40)
@example(rate=1e-5, own={"1e5": "0E0", "\x85": "null"}, reports=(), elastic=None)  # a text that looks like a number
@given(
    rate=st.floats(min_value=0, allow_nan=False, allow_infinity=False),
    own=st.dictionaries(st.text(max_size=6).filter(lambda key: key != "import"), plain, max_size=3),
    reports=st.sampled_from([(), ("tensorboard",)]),
    elastic=st.sampled_from([None, {}, {"min_nodes": 2, "endpoint": "a:1", "lease_s": 1, "hang_timeout_s": 1.5}]),
)
def test_what_is_dumped_loads_back_equal(tmp_path_factory, rate, own, reports, elastic):
    config = TrainConfig(
        dataset="python-stdlib", output_dir="runs/ä", model={"model_type": "llama"}, num_train_epochs=0.5,
        learning_rate=rate, landscape={**own, "method": "sam"}, report_to=reports, elastic=elastic,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("dump") / "config.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    assert load_config(path) == config
