"""What a study remembers: whole lines, the last of each network, one writer."""

import json

import pytest

from elastic_lsopt.config.ranges import SettingError
from elastic_lsopt.study.cells_file import CELLS, Record

pytestmark = pytest.mark.fast


def line(cell_id, measures=("trace",), failure=None):
    result = None if failure else {"measures": dict.fromkeys(measures, 1.0)}
    return {"id": cell_id, "settings": {}, "failure": failure, "seconds": 1.0, "result": result}


def test_lines_survive_and_the_last_counts(tmp_path):
    with Record(str(tmp_path)) as record:
        record.add(line("a", failure="it died"))
        record.add(line("b"))
        assert not record.done("a", ["trace"])
        record.add(line("a"))
    with Record(str(tmp_path)) as record:
        assert record.done("a", ["trace"]) and record.done("b", ["trace"])
        assert not record.done("a", ["trace", "lpf"])  # a measure that was not asked for then
        assert not record.done("c", [])


@pytest.mark.parametrize("torn", ['{"id": "b", "sett', "\x00\x00", "[1]\n", '"id"\n'])
def test_a_line_that_a_crash_cut_short_is_passed_over_and_harms_no_later_one(tmp_path, torn):
    with Record(str(tmp_path)) as record:
        record.add(line("a"))
    with (tmp_path / CELLS).open("a") as file:
        file.write(torn)
    with Record(str(tmp_path)) as record:
        assert set(record.lines) == {"a"}
        record.add(line("c"))
    with Record(str(tmp_path)) as record:
        assert set(record.lines) == {"a", "c"}


def test_a_number_that_json_lacks_is_not_written(tmp_path):
    with Record(str(tmp_path)) as record, pytest.raises(ValueError, match="JSON"):
        record.add(line("a") | {"seconds": float("nan")})
    assert [json.loads(text) for text in (tmp_path / CELLS).read_text().splitlines()] == []


def test_one_study_at_a_time_in_a_folder(tmp_path):
    with Record(str(tmp_path)), pytest.raises(SettingError, match="another study is writing there"):
        Record(str(tmp_path))
    with Record(str(tmp_path)):
        pass


def test_a_folder_that_cannot_be_is_told(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SettingError, match="cannot be written"):
        Record(str(tmp_path / "file" / "run"))
