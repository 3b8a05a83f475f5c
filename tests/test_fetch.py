"""Downloads over bad lines, on a server of our own on loopback."""

import gzip
import hashlib
import http.server
import io
import json
import random
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from contextlib import contextmanager

import pytest

from neo_nb.base.core import InputError
from neo_nb.data.download import download, fetch, unpack

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


def left(folder):
    return sorted(p.name for p in folder.iterdir())


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


def zip_of(files):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, content in files.items():
            file.writestr(name, content)
    return buffer.getvalue()


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


def test_unpack_refuses_links_and_cut_archives(tmp_path):
    link = zipfile.ZipInfo("link")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "l.zip", "w") as file:
        file.writestr(link, "/etc/passwd")
    with pytest.raises(InputError, match="holds 'link', a symbolic link; files alone"):
        unpack(tmp_path / "l.zip", tmp_path / "out")
    content = zip_of({"a": "b" * 1000})
    (tmp_path / "cut.zip").write_bytes(content[:200])
    with pytest.raises(InputError, match="neither zip nor tar"):
        unpack(tmp_path / "cut.zip", tmp_path / "out")
    damaged = bytearray(content)
    damaged[60] ^= 0xFF
    (tmp_path / "bad.zip").write_bytes(bytes(damaged))
    with pytest.raises(InputError, match="cannot be unpacked"):
        unpack(tmp_path / "bad.zip", tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def tar_of(*members, mode="w"):
    """A tar of (name, type, what it is: a link's goal, or a file's bytes)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:
        for name, kind, goal in members:
            info = tarfile.TarInfo(name)
            info.type, info.mode = kind, 0o755
            data = goal if isinstance(goal, bytes) else b""
            info.linkname, info.size = "" if isinstance(goal, bytes) else goal, len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def escape():
    """Folders behind short links whose true path is longer than PATH_MAX: no check of it sees where `out` leads."""
    long, at, members = "d" * 240, "", []
    for step in "abcdefghijklmnopq":
        members += [(f"{at}{long}", tarfile.DIRTYPE, ""), (f"{at}{step}", tarfile.SYMTYPE, long)]
        at += f"{step}/"
    members += [(f"{at}top", tarfile.SYMTYPE, "../" * 17), ("out", tarfile.SYMTYPE, f"{at}top/..")]
    return tar_of(*members, ("out/evil.txt", tarfile.REGTYPE, b"written outside"))


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


HOSTILE = {
    "absolute": [("/evil.txt", tarfile.REGTYPE, b"x")],
    "parent": [("a/../../evil.txt", tarfile.REGTYPE, b"x")],
    "backslash": [("..\\evil.txt", tarfile.REGTYPE, b"x")],
    "drive": [("C:\\evil.txt", tarfile.REGTYPE, b"x")],
    "folder": [("../evil", tarfile.DIRTYPE, "")],
    "symlink": [("a", tarfile.SYMTYPE, ".."), ("a/evil.txt", tarfile.REGTYPE, b"x")],
    "hardlink": [("evil.txt", tarfile.LNKTYPE, "/etc/hostname")],
    "fifo": [("evil", tarfile.FIFOTYPE, "")],
    "device": [("evil", tarfile.CHRTYPE, "")],
    "unknown": [("evil", b"Z", "")],
    "twice": [("evil.txt", tarfile.REGTYPE, b"one"), ("./evil.txt", tarfile.REGTYPE, b"two")],
    "through a file": [("evil", tarfile.REGTYPE, b"one"), ("evil/a", tarfile.REGTYPE, b"two")],
    "nameless": [(".", tarfile.REGTYPE, b"x")],
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_is_no_plain_file_below_the_folder_is_refused(tmp_path, kind):
    (tmp_path / "x.tar").write_bytes(tar_of(("fine.txt", tarfile.REGTYPE, b"fine"), *HOSTILE[kind]))
    with pytest.raises(InputError, match="holds ") as predicted:
        unpack(tmp_path / "x.tar", tmp_path / "in/out")
    assert "\n" not in str(predicted.value) and str(tmp_path / "x.tar") in str(predicted.value)
    assert list((tmp_path / "in").iterdir()) == [tmp_path / "in/out"] and not left(tmp_path / "in/out")


def test_a_name_with_a_nul_and_a_negative_size(tmp_path):
    """In a PAX header a name can hold anything; a size below 0 sends Python's reader back, round and round."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("a")
        info.pax_headers = {"path": "b\0../evil"}
        tar.addfile(info)
    (tmp_path / "nul.tar").write_bytes(buffer.getvalue())
    with pytest.raises(InputError, match="leads out"):
        unpack(tmp_path / "nul.tar", tmp_path / "out")
    whole = bytearray(tar_of(("first", tarfile.REGTYPE, b"x"), ("second", tarfile.REGTYPE, b"x")))
    whole[1024 + 124 : 1024 + 136] = b"\xff" * 10 + (-1024 & 0xFFFF).to_bytes(2, "big")
    header = bytes(whole[1024:1536])
    whole[1024 + 148 : 1024 + 156] = b"%06o\0 " % (sum(header[:148]) + 8 * 32 + sum(header[156:]))
    (tmp_path / "negative.tar").write_bytes(bytes(whole))
    code = f"from neo_nb.data.download import unpack; unpack({str(tmp_path / 'negative.tar')!r}, {str(tmp_path / 'out')!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "holds 'second', a file of a negative size" in done.stderr
    assert not left(tmp_path / "out")


def test_a_tar_is_unpacked_as_it_was_packed(tmp_path):
    """Long names, a sparse file, an empty folder, names that differ in case, backslashes; modes are those of new files."""
    (tmp_path / "from").mkdir()
    with (tmp_path / "from/sparse.bin").open("wb") as file:
        file.seek(3_000_000)
        file.write(b"end")
    subprocess.run(["tar", "-S", "-cf", tmp_path / "s.tar", "-C", tmp_path / "from", "sparse.bin"], check=True)
    unpack(tmp_path / "s.tar", tmp_path / "out")
    assert (tmp_path / "out/sparse.bin").read_bytes() == (tmp_path / "from/sparse.bin").read_bytes()
    long = "/".join(["folder" * 20] * 4) + "/a.txt"
    files = {long: b"1", "A.txt": b"2", "a.txt": b"3", "images\\b.txt": b"4", "./c.txt": b"5"}
    members = [(name, tarfile.REGTYPE, data) for name, data in files.items()]
    for mode in ("w", "w:gz", "w:bz2", "w:xz"):
        (tmp_path / "x.tar").write_bytes(tar_of(("labels/", tarfile.DIRTYPE, ""), *members, mode=mode))
        out = unpack(tmp_path / "x.tar", tmp_path / mode.replace(":", ""))
        found = {p.relative_to(out).as_posix(): p.read_bytes() for p in out.rglob("*") if p.is_file()}
        assert found == {name.replace("\\", "/").removeprefix("./"): data for name, data in files.items()}
        assert (out / "labels").is_dir() and not (out / "A.txt").stat().st_mode & 0o111


def test_a_tar_larger_than_the_disk_is_refused_before_it_is_unpacked(tmp_path):
    """Eight terabytes of nothing in a sparse file of a few bytes."""
    with (tmp_path / "sparse.bin").open("wb") as file:
        file.truncate(2**43)
    subprocess.run(["tar", "-S", "-cf", tmp_path / "s.tar", "-C", tmp_path, "sparse.bin"], check=True)
    with pytest.raises(InputError, match="MiB to come"):
        unpack(tmp_path / "s.tar", tmp_path / "out")


def test_nothing_is_written_through_a_link_that_is_there(tmp_path):
    """Nor half: that a link or a folder is in the way is seen before the first file is moved."""
    (tmp_path / "x.tar").write_bytes(
        tar_of(("a.txt", tarfile.REGTYPE, b"new"), ("images/1.txt", tarfile.REGTYPE, b"new"))
    )
    (tmp_path / "else").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out/images").symlink_to(tmp_path / "else")
    with pytest.raises(InputError, match="out/images: a link, where a folder"):
        unpack(tmp_path / "x.tar", tmp_path / "out")
    assert left(tmp_path / "else") == [] and left(tmp_path / "out") == ["images"]
    (tmp_path / "out/images").unlink()
    (tmp_path / "out/images").write_text("a file")
    with pytest.raises(InputError, match="out/images: a file, where a folder"):
        unpack(tmp_path / "x.tar", tmp_path / "out")
    (tmp_path / "out/images").unlink()
    (tmp_path / "out/a.txt").mkdir()
    with pytest.raises(InputError, match=r"out/a.txt: a folder, where a file"):
        unpack(tmp_path / "x.tar", tmp_path / "out")
    assert left(tmp_path / "out") == ["a.txt"]
    (tmp_path / "out/a.txt").rmdir()
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "out/a.txt").symlink_to(tmp_path / "precious")  # a file's link is replaced, what it names is not
    unpack(tmp_path / "x.tar", tmp_path / "out")
    assert (tmp_path / "precious").read_text() == "precious" and (tmp_path / "out/a.txt").read_text() == "new"


@pytest.mark.parametrize("suffix", ["zip", "tar.gz", "tar.xz", "tar.bz2"])
def test_damaged_compression_is_one_line(tmp_path, suffix):
    noise = bytes(random.Random(0).randbytes(40_000))
    if suffix == "zip":
        with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as file:
            file.writestr("a", noise.hex())
        content = bytearray((tmp_path / "x.zip").read_bytes())
    else:
        content = bytearray(tar_of(("a", tarfile.REGTYPE, noise), mode=f"w:{suffix[4:]}"))
    for at in range(len(content) // 2, len(content) // 2 + 64):
        content[at] ^= 0xFF
    (tmp_path / f"x.{suffix}").write_bytes(content)
    with pytest.raises(InputError, match="cannot be unpacked|neither zip nor tar"):
        unpack(tmp_path / f"x.{suffix}", tmp_path / "out")
    assert left(tmp_path / "out") == []


def test_a_tar_that_is_cut_off_or_damaged_is_not_taken_for_whole(tmp_path):
    """Python's reader ends quietly at the first header that it does not understand."""
    whole = tar_of(*((f"{i}.txt", tarfile.REGTYPE, b"x" * 700) for i in range(4)))
    damaged = bytearray(whole)
    damaged[1536 * 2 + 10] ^= 0xFF
    for content in (whole[: 1536 * 2 + 100], whole[: 1536 * 2 + 900], bytes(damaged)):
        (tmp_path / "x.tar").write_bytes(content)
        with pytest.raises(InputError, match="cannot be unpacked"):
            unpack(tmp_path / "x.tar", tmp_path / "out")
        assert left(tmp_path / "out") == []
