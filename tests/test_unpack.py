"""Archives that are damaged, cut off or hostile: what is unpacked is all of them, or nothing."""

import io
import random
import subprocess
import sys
import tarfile
import zipfile

import pytest
from archives import left, tar_of, zip_of

from neo_nb.base.core import InputError
from neo_nb.data.download import unpack


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
