"""Downloads over bad lines, on a server of our own on loopback."""

import gzip
import hashlib
import http.server
import json
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pytest
from archives import escape, left, zip_of

from neo_nb.base.core import InputError
from neo_nb.data.download import download, fetch

DATA = bytes(range(256)) * 2000  # 512,000 bytes


SHA = f"sha256:{hashlib.sha256(DATA).hexdigest()}"


QUICK = {"progress": False, "pause": 0.01, "attempts": 3}


@contextmanager
def serve(content=DATA, breaks=None, ranges=True, tag='"one"', statuses=(), slow=0.0):
    """A server that sends at most `breaks` bytes a connection; yields its address and what it was asked."""
    asked, statuses = [], list(statuses)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            span = self.headers.get("Range")
            asked.append(span)
            if statuses:
                self.send_response(statuses.pop(0))
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            state = box["tag"]
            fits = self.headers.get("If-Range") in (None, state)
            start = int(span[6:-1]) if span and ranges and fits else 0
            if start >= len(box["content"]):
                self.send_response(416)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(206 if start else 200)
            if state:
                self.send_header("ETag", state)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(box['content']) - 1}/{len(box['content'])}")
            self.send_header("Content-Length", str(len(box["content"]) - start))
            self.end_headers()
            block = box["content"][start : start + breaks] if breaks else box["content"][start:]
            for i in range(0, len(block), 16384):
                self.wfile.write(block[i : i + 16384])
                time.sleep(slow)

        def log_message(self, *args):
            pass

    box = {"content": content, "tag": tag}
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/file.bin", asked, box
    finally:
        server.shutdown()
        server.server_close()


def test_goes_on_where_the_line_broke(tmp_path):
    with serve(breaks=200_000) as (url, asked, _):
        download(url, tmp_path / "f", SHA, **QUICK)
    assert (tmp_path / "f").read_bytes() == DATA
    assert asked == [None, "bytes=200000-", "bytes=400000-"]
    assert left(tmp_path) == ["f"]


def test_a_second_call_goes_on_after_the_first_gave_up(tmp_path):
    with serve(breaks=100_000, statuses=()) as (url, _, box):
        (tmp_path / "f.part").write_bytes(DATA[:300_000])
        (tmp_path / "f.part.tag").write_text(box["tag"])
        download(url, tmp_path / "f", SHA, **QUICK)
    assert (tmp_path / "f").read_bytes() == DATA


def test_more_breaks_than_attempts_are_fine_while_bytes_come(tmp_path):
    with serve(breaks=40_000) as (url, asked, _):
        download(url, tmp_path / "f", SHA, **QUICK)
    assert len(asked) == 13 > QUICK["attempts"]


def test_a_server_without_range_sends_all_again(tmp_path):
    (tmp_path / "f.part").write_bytes(b"x" * 1000)
    (tmp_path / "f.part.tag").write_text('"one"')
    with serve(ranges=False) as (url, asked, _):
        download(url, tmp_path / "f", SHA, **QUICK)
    assert asked == ["bytes=1000-"]
    assert (tmp_path / "f").read_bytes() == DATA


def test_a_server_without_range_that_breaks_is_given_up(tmp_path):
    with serve(ranges=False, breaks=1000) as (url, asked, _), pytest.raises(InputError, match="gave up after 3"):
        download(url, tmp_path / "f", SHA, **QUICK)
    assert not (tmp_path / "f").exists()


def test_a_file_that_changed_meanwhile_is_begun_anew(tmp_path):
    (tmp_path / "f.part").write_bytes(b"old" * 100)
    (tmp_path / "f.part.tag").write_text('"before"')
    with serve() as (url, _, _):
        download(url, tmp_path / "f", **QUICK)
    assert (tmp_path / "f").read_bytes() == DATA


def test_without_a_mark_only_a_checksum_allows_going_on(tmp_path):
    for checksum, wanted in ((SHA, "bytes=1000-"), (None, None)):
        (tmp_path / "f.part").write_bytes(DATA[:1000])
        with serve(tag="") as (url, asked, _):
            download(url, tmp_path / "f", checksum, **QUICK)
        assert asked == [wanted]
        assert (tmp_path / "f").read_bytes() == DATA


def test_a_part_longer_than_the_file_is_begun_anew(tmp_path):
    (tmp_path / "f.part").write_bytes(DATA + b"more")
    (tmp_path / "f.part.tag").write_text('"one"')
    with serve() as (url, asked, _):
        download(url, tmp_path / "f", SHA, **QUICK)
    assert (tmp_path / "f").read_bytes() == DATA
    assert len(asked) == 2


def test_wrong_checksum_leaves_nothing(tmp_path):
    with serve() as (url, _, _), pytest.raises(InputError, match="checksum md5:.*expected md5:0"):
        download(url, tmp_path / "f", "md5:0", **QUICK)
    assert left(tmp_path) == []


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_server_in_trouble_is_asked_again(tmp_path, status):
    with serve(statuses=[status, status]) as (url, asked, _):
        download(url, tmp_path / "f", SHA, **QUICK)
    assert len(asked) == 3


def test_not_found_is_said_at_once(tmp_path):
    with serve(statuses=[404]) as (url, asked, _), pytest.raises(InputError, match="answers 404"):
        download(url, tmp_path / "f", **QUICK)
    assert len(asked) == 1 and left(tmp_path) == []


def test_a_killed_download_goes_on(tmp_path):
    """SIGKILL in the middle, then a second process: the part is used."""
    with serve(slow=0.02) as (url, asked, _):
        code = f"from neo_nb.data.download import download; download({url!r}, {str(tmp_path / 'f')!r}, {SHA!r})"
        process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
        part = tmp_path / "f.part"
        deadline = time.monotonic() + 60
        while not (part.exists() and part.stat().st_size > 50_000):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.01)
        process.kill()
        process.wait()
        size = part.stat().st_size
        assert not (tmp_path / "f").exists()
        download(url, tmp_path / "f", SHA, **QUICK)
    assert asked == [None, f"bytes={size}-"]
    assert (tmp_path / "f").read_bytes() == DATA


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    (tmp_path / "data_manifests").mkdir()
    (tmp_path / "settings.ini").write_text("[DEFAULT]\n")
    monkeypatch.setenv("NEO_ROOT", str(tmp_path))
    monkeypatch.setenv("NEO_DATA", str(tmp_path / "data"))

    def manifest(url, checksum, **more):
        archive = {"url": url, "checksum": checksum} | more
        content = {"format": "coco", "root": "cells", "splits": {"train": {}}, "archives": [archive]}
        (tmp_path / "data_manifests/cells.yaml").write_text(json.dumps(content))
        return tmp_path / "data/cells"

    return manifest


def test_fetch_downloads_verifies_and_unpacks_once(workspace):
    content = zip_of({"annotations/a.json": "{}", "images/1.txt": "1" * 300_000})
    with serve(content, breaks=100_000) as (url, asked, _):
        root = workspace(url, f"md5:{hashlib.md5(content).hexdigest()}")
        assert fetch("cells", **QUICK) == root
        count = len(asked)
        fetch("cells", **QUICK)
        assert len(asked) == count
        fetch("cells", force=True, **QUICK)
        assert len(asked) > count
    assert (root / "images/1.txt").stat().st_size == 300_000
    assert not list(root.rglob("*.zip"))


def test_fetch_with_a_wrong_checksum_unpacks_nothing(workspace):
    with serve(zip_of({"a": "b"})) as (url, _, _):
        root = workspace(url, "sha256:0")
        with pytest.raises(InputError, match="checksum"):
            fetch("cells", **QUICK)
    assert [p.name for p in root.rglob("*")] == [".archives"]


def test_fetch_refuses_a_manifest_that_leads_out(workspace):
    with serve(zip_of({"a": "b"})) as (url, _, _):
        root = workspace(url, None, to="../..")
        with pytest.raises(InputError, match="leads out of the root"):
            fetch("cells", **QUICK)
    assert not (root.parent.parent / "a").exists()


@pytest.mark.parametrize("name", ["cells.tar", "cells.tar.gz"])
def test_a_tar_cannot_write_outside_through_links_longer_than_a_path(workspace, tmp_path, name, capsys):
    """Through `neo data fetch`, from a server."""
    from neo_nb.cli.main import main

    content = escape()
    if name.endswith("gz"):
        content = gzip.compress(content)
    with serve(content) as (url, _, _):
        root = workspace(url, f"sha256:{hashlib.sha256(content).hexdigest()}")
        status = main(["data", "fetch", "cells"])
    assert not list(tmp_path.rglob("evil.txt")), "written outside of the data set's folder"
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert status == 2 and len(lines) == 1 and "holds 'a', a symbolic link" in lines[0], lines
    assert "unpack it by hand, then: neo data import" in lines[0]
    assert [p.name for p in root.iterdir()] == [".archives"], "nothing half, and the archive is kept for a person"
    assert not (root / ".fetched").exists() and "unpacking" not in str(list(tmp_path.rglob("*")))
