"""A cluster of our own takes work from its own command alone."""

import http.client
import os
import socket
import ssl
import stat
from dataclasses import replace
from pathlib import Path

import dask
import distributed
import psutil
import pytest

from s4v.errors import ConfigError
from s4v.extract.extraction import extract_dataset
from s4v.extract.pipeline import dask_cluster as workers


@pytest.fixture
def scheduler(video_folder, make_config, tmp_path, monkeypatch):
    """A client of a cluster as `--workers` makes it, which starts no worker: its scheduler alone can run code."""
    start = distributed.LocalCluster
    monkeypatch.setattr(distributed, "LocalCluster", lambda **options: start(**{**options, "n_workers": 0}))
    with workers._connect(make_config(video_folder, tmp_path / "private.zarr", num_workers=1)) as client:
        yield client


def run_code(address, security=None):
    """What a stranger's code brings back; None where it is not run."""
    try:
        with distributed.Client(address, security=security, timeout=1) as stranger:
            return stranger.run_on_scheduler(os.getpid)
    except (OSError, TimeoutError, RuntimeError):
        return None


def ports_of(process):
    found = [process, *process.children(recursive=True)]
    return {(one.pid, c.laddr.ip, c.laddr.port) for one in found for c in one.net_connections() if c.status == "LISTEN"}


def asks_in_plain(ip, port):
    """What a port answers to somebody who just asks for a page: the status, or None where it does not speak HTTP."""
    connection = http.client.HTTPConnection(ip, port, timeout=2)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def refuses_handshake(ip, port):
    """Whether a port speaks TLS, and ends it with somebody who shows no certificate."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        with socket.create_connection((ip, port), timeout=5) as plain, context.wrap_socket(plain) as wrapped:
            return not wrapped.recv(1)
    except ssl.SSLError as error:
        return error.reason == "TLSV13_ALERT_CERTIFICATE_REQUIRED"


def test_a_stranger_cannot_run_code_on_a_cluster_of_our_own(scheduler):  # C5
    _, _, place = scheduler.scheduler.address.partition("://")
    assert scheduler.run_on_scheduler(os.getpid) == os.getpid(), "the command can"
    assert run_code(f"tcp://{place}") is None, "plainly"


def test_a_certificate_of_another_cluster_does_not_open_ours(scheduler):  # C5
    _, _, place = scheduler.scheduler.address.partition("://")
    assert run_code(f"tls://{place}", distributed.Security.temporary()) is None
    assert scheduler.scheduler.address.startswith("tls://") and scheduler.run_on_scheduler(os.getpid) == os.getpid()


def test_without_a_certificate_the_handshake_fails(scheduler):  # C5
    host, _, port = scheduler.scheduler.address.partition("://")[2].partition(":")
    assert refuses_handshake(host, int(port))


def test_two_clusters_have_two_certificates(video_folder, make_config, tmp_path, monkeypatch):  # C5
    start, seen = distributed.LocalCluster, []

    def keep(**options):
        seen.append(options.get("security"))
        return start(**{**options, "n_workers": 0})

    monkeypatch.setattr(distributed, "LocalCluster", keep)
    for _ in range(2):
        with workers._connect(make_config(video_folder, tmp_path / "private.zarr", num_workers=1)):
            pass
    keys = [security.tls_scheduler_key for security in seen if security is not None]
    assert len(set(keys)) == 2 and "PRIVATE KEY" in keys[0]


@pytest.mark.slow
def test_no_process_of_the_cluster_answers_a_stranger(video_folder, make_config, tmp_path):  # C5
    """Scheduler, nannies, workers: nothing listens beyond this machine, no page is served, every other port is TLS."""
    me = psutil.Process()
    before = ports_of(me)
    with workers._connect(make_config(video_folder, tmp_path / "private.zarr", num_workers=1)) as client:
        opened = ports_of(me) - before
        assert len(opened) >= 4 and {ip for _, ip, _ in opened} == {"127.0.0.1"}
        pages = [place for place in opened if asks_in_plain(*place[1:]) is not None]
        assert [asks_in_plain(*place[1:]) for place in pages] == [404] * len(pages)
        assert [place for place in opened if place not in pages and not refuses_handshake(*place[1:])] == []
        (folder,) = {
            Path(told).parents[1] for told in client.run(lambda dask_worker: dask_worker.local_directory).values()
        }
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700, folder
        arguments = [word for one in me.children(recursive=True) for word in [*one.cmdline(), *one.environ().values()]]
        assert not [word for word in arguments if "PRIVATE KEY" in word]
    assert not folder.exists()


@pytest.mark.slow
def test_a_scheduler_with_certificates_is_joined_by_dasks_configuration(
    video_folder, make_config, float_store, tmp_path, contents
):  # C5
    """As docs/scale.md has it: one certificate, named in Dask's configuration."""
    security = distributed.Security.temporary()
    (tmp_path / "cert.pem").write_text(security.tls_ca_file)
    (tmp_path / "key.pem").write_text(security.tls_client_key)
    pair = {"cert": str(tmp_path / "cert.pem"), "key": str(tmp_path / "key.pem")}
    named = {
        "distributed.comm.require-encryption": True,
        "distributed.comm.tls.ca-file": pair["cert"],
        **{f"distributed.comm.tls.{role}": pair for role in ("client", "scheduler", "worker")},
    }
    config = make_config(video_folder, tmp_path / "tls.zarr", num_decoders=1)
    with (
        dask.config.set(named),
        distributed.LocalCluster(
            n_workers=1, threads_per_worker=1, dashboard_address=None, memory_limit=0, protocol="tls://"
        ) as cluster,
    ):
        extract_dataset(replace(config, scheduler=cluster.scheduler_address))
    assert contents(config.out, "zarr.json") == contents(float_store, "zarr.json")


def test_tls_without_certificates_is_told_in_one_line(video_folder, make_config, tmp_path):  # C5
    config = make_config(video_folder, tmp_path / "none.zarr", scheduler="tls://127.0.0.1:9")
    with pytest.raises(ConfigError, match=r"answers at tls://127\.0\.0\.1:9 .*names the certificates"):
        extract_dataset(config)
