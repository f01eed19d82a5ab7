"""`elastic-lsopt doctor`: what it looks at, what it says of a host that is not there, and how it ends."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path

import pytest

from elastic_lsopt.cli.doctor.files import look_at_files
from elastic_lsopt.cli.doctor.network import hosts_of, judged, look_at_ports
from elastic_lsopt.cli.doctor.software import _holds
from elastic_lsopt.cli.main import main
from elastic_lsopt.errors import UserError

fast = pytest.mark.fast


def told(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> dict[str, dict[str, str]]:
    assert main(["doctor", *arguments, "--json"]) == code
    out = json.loads(capsys.readouterr().out)
    assert out["ready"] == (code == 0)
    return {finding["what"]: finding for finding in out["findings"]}


def test_this_machine_is_ready(capsys, tmp_path):
    found = told(capsys, "--output-dir", str(tmp_path / "runs/new"))
    import torch

    assert found["torch"]["state"] == "ok" and found["torch"]["found"].startswith(torch.__version__)
    for what in ("launchers", "cores", "host memory", "open files", f"files in {tmp_path}", "GPU", "port 29400"):
        assert what in found
    assert "torchrun" in found["launchers"]["found"]
    assert list(tmp_path.iterdir()) == []  # it leaves nothing
    assert main(["doctor", "--output-dir", str(tmp_path)]) == 0
    assert capsys.readouterr().out.endswith(" 0 to fix.\n")


def test_an_unreachable_host_is_named_in_time(capsys, tmp_path):
    hosts = tmp_path / "hosts"
    hosts.write_text("# two that are not there\nno-such-host.invalid slots=1\n192.0.2.1 slots=1\n")
    begin = time.monotonic()
    found = told(capsys, "--hostfile", str(hosts), code=1)
    assert time.monotonic() - begin < 20
    assert found["host no-such-host.invalid"]["state"] == "fail"
    assert found["host 192.0.2.1"]["state"] == "fail" and "22" in found["host 192.0.2.1"]["found"]
    assert all(found[f"host {name}"]["fix"] for name in ("no-such-host.invalid", "192.0.2.1"))


@pytest.mark.skipif("__import__('torch').cuda.is_available()")
def test_a_gpu_that_is_asked_for_and_not_there(capsys):
    found = told(capsys, "--gpu", code=1)
    assert found["GPU"]["state"] == "fail" and "one is asked for" in found["GPU"]["found"] and found["GPU"]["fix"]


@fast
def test_the_store(capsys):
    with socket.create_server(("127.0.0.1", 0)) as here:
        address = f"127.0.0.1:{here.getsockname()[1]}"
        assert told(capsys, "--store", address)[f"store {address}"]["state"] == "ok"
        assert told(capsys, "--store", f"etcd://{address}")[f"store etcd://{address}"]["state"] == "ok"
    with socket.socket() as held:  # so that nobody else listens there
        held.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{held.getsockname()[1]}"
        assert told(capsys, "--store", address, code=1)[f"store {address}"]["state"] == "fail"


@fast
def test_a_taken_port():
    with socket.create_server(("", 29400)):
        found = {finding.what: finding for finding in look_at_ports()}
    assert found["port 29400"].state == "warn" and "in use" in found["port 29400"].found


@fast
@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written(tmp_path):
    tmp_path.chmod(0o500)
    assert [finding.state for finding in look_at_files(tmp_path)] == ["fail"]


@fast
def test_a_file_system_without_files():
    [finding] = look_at_files(Path("/proc/self"))
    assert finding.state == "fail" and "output_dir" in finding.fix


@fast
def test_clocks():
    assert judged("host a", "10.0.0.1", 0.2).state == "ok"
    assert judged("host a", "10.0.0.1", -20.0).state == "warn"
    late = judged("host a", "10.0.0.1", -400.0)
    assert late.state == "fail" and "400.0 s behind, the limit is 300 s" in late.found and "NTP" in late.fix


@fast
def test_versions():
    assert _holds("2.13.0+cpu", ">=", "2.11") and not _holds("2.9.1", ">=", "2.11")
    assert _holds("0.19.8", "==", "0.19.8") and not _holds("0.19.80", "==", "0.19.8")


@fast
def test_a_hostfile(tmp_path):
    path = tmp_path / "hosts"
    path.write_text("node-1 slots=1\n\n# no\nnode-2\nnode-1 slots=4  # again\n")
    assert hosts_of(path) == ["node-1", "node-2"]
    for text, says in (("", "names no host"), ("node-1 4\n", ":1: 'node-1 4' must read"), ("a;b slots=1", "must read")):
        path.write_text(text)
        with pytest.raises(UserError, match=says):
            hosts_of(path)
    with pytest.raises(UserError, match="cannot be read"):
        hosts_of(tmp_path / "none")


@fast
@pytest.mark.parametrize("store", ["nowhere", "etcd://host", "host:port"])
def test_a_store_that_is_no_address(capsys, store):
    assert main(["doctor", "--store", store]) == 2
    assert "must read host:port or etcd://host:port" in capsys.readouterr().err
