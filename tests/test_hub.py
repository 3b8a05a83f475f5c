"""A detector goes to a hub and comes back. The hub is a small one on this machine that speaks the protocol of
huggingface_hub's client: create, preupload, LFS, commit, info, resolve. Our code and the client run as they are."""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

import huggingface_hub.constants as hub_constants
import pytest
import torch
from huggingface_hub import close_session

from neo_nb.base.core import InputError
from neo_nb.models.hub import CARD, CONFIG, WEIGHTS, YOURS, from_pretrained, is_ours, push_to_hub, save_pretrained
from neo_nb.models.zoo import create_model

TOKEN = "hf_for_this_test_only"
METRICS = {"AP": 0.47, "AP50": 0.8, "APs": -1, "max_dets": 300, "iou_threshold": 0.5}


class SmallHub(ThreadingHTTPServer):
    """Repositories in memory; a private one answers only to the token."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, dict] = {}  # name: {"private", "commits": [{path: bytes}, …]}
        self.blobs: dict[str, bytes] = {}  # LFS objects by sha256
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def files(self, name: str, revision: str = "main") -> dict[str, bytes] | None:
        commits = self.repos[name]["commits"]
        if revision == "main":
            return commits[-1]
        ids = {sha(name, i): files for i, files in enumerate(commits)}
        return ids.get(revision)


def sha(name: str, number: int) -> str:
    return hashlib.sha1(f"{name}/{number}".encode()).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: SmallHub

    def log_message(self, *args):
        pass

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            data = b""
            while size := int(self.rfile.readline(), 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return data
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def answer(self, value: object = b"", status: int = 200, **headers: str) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for key, text in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(key.replace("_", "-"), text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def refuse(self, status: int, code: str) -> None:
        self.answer({"error": code}, status, X_Error_Code=code, X_Error_Message=code)

    def allowed(self, name: str, write: bool = False) -> bool:
        known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if write and not known:
            self.refuse(401, "Unauthorized")
            return False
        if name not in self.server.repos or (self.server.repos[name]["private"] and not known):
            self.refuse(404, "RepoNotFound")
            return False
        return True

    def do_POST(self):  # noqa: N802
        path, body, hub = unquote(urlparse(self.path).path), self.body(), self.server
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                return self.refuse(401, "Unauthorized")
            if name in hub.repos:
                return self.answer({"error": "exists", "url": f"{hub.url}/{name}"}, 409)
            private = asked.get("visibility") == "private" or bool(asked.get("private"))
            hub.repos[name] = {"private": private, "commits": [{".gitattributes": b"*.safetensors filter=lfs\n"}]}
            return self.answer({"url": f"{hub.url}/{name}", "name": name})
        if found := re.fullmatch(r"/(.+)\.git/info/lfs/objects/batch", path):
            if self.allowed(found[1], write=True):
                upload = [
                    {**o, "actions": {"upload": {"href": f"{hub.url}/lfs/{o['oid']}"}}}
                    for o in json.loads(body)["objects"]
                ]
                self.answer({"transfer": "basic", "objects": upload}, Content_Type="application/vnd.git-lfs+json")
            return None
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main", path)
        if not found or not self.allowed(found[1], write=True):
            return None if found else self.answer({}, 404)
        name = found[1]
        if found[2] == "preupload":
            modes = [
                {
                    "path": f["path"],
                    "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for f in json.loads(body)["files"]
            ]
            return self.answer({"files": modes})
        files = dict(hub.files(name))
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = hub.blobs[value["oid"]]
        hub.repos[name]["commits"].append(files)
        oid = sha(name, len(hub.repos[name]["commits"]) - 1)
        return self.answer({"success": True, "commitOid": oid, "commitUrl": f"{hub.url}/{name}/commit/{oid}"})

    def do_PUT(self):  # noqa: N802
        data = self.body()
        if hashlib.sha256(data).hexdigest() != self.path.removeprefix("/lfs/"):
            return self.answer({}, 400)
        self.server.blobs[self.path.removeprefix("/lfs/")] = data
        return self.answer()

    def do_GET(self):  # noqa: N802
        path, hub = unquote(urlparse(self.path).path), self.server
        info = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path)
        resolve = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        name = (info or resolve)[1] if info or resolve else ""
        if not self.allowed(name):
            return None
        revision = (info[3] if info else resolve[2]) or "main"
        files = hub.files(name, revision)
        if files is None:
            return self.refuse(404, "RevisionNotFound")
        commit = sha(name, len(hub.repos[name]["commits"]) - 1) if revision == "main" else revision
        if info and info[2] == "tree":
            return self.answer([self.entry(p, data) for p, data in files.items()])
        if info:
            return self.answer({"id": name, "sha": commit, "siblings": [{"rfilename": p} for p in files], "tags": []})
        if resolve[3] not in files:
            return self.refuse(404, "EntryNotFound")
        data = files[resolve[3]]
        etag = f'"{hashlib.sha256(data).hexdigest()}"'
        return self.answer(data, X_Repo_Commit=commit, ETag=etag, X_Linked_Etag=etag, X_Linked_Size=str(len(data)))

    do_HEAD = do_GET

    @staticmethod
    def entry(path: str, data: bytes) -> dict:
        oid = hashlib.sha1(data).hexdigest()
        lfs = {"lfs": {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}}
        return {"type": "file", "path": path, "size": len(data), "oid": oid} | (
            lfs if path.endswith(".safetensors") else {}
        )


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub of its own, and the client's settings as a user's environment would set them."""
    server = SmallHub()
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", False)  # the suite runs with HF_HUB_OFFLINE=1
    monkeypatch.setattr(hub_constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(hub_constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub_constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    made = create_model("rtdetr_nano", class_names=("person", "a|b"), category_ids=(3, 8), num_queries=40).eval()
    made.size = (288, 512)
    return made


def same(a, b) -> bool:
    state = a.state_dict()
    return state.keys() == b.state_dict().keys() and all(torch.equal(v, state[k]) for k, v in b.state_dict().items())


def test_there_and_back(hub, model):
    url = push_to_hub(
        model, "me/cells", metrics=METRICS, data="bccd", fingerprint="4f1d", token=TOKEN, endpoint=hub.url
    )
    assert url.startswith(hub.url) and hub.repos["me/cells"]["private"]
    files = hub.files("me/cells")
    assert {WEIGHTS, CONFIG, CARD} < files.keys()
    card = files[CARD].decode()
    assert all(
        s in card
        for s in ("300 detections", "288 x 512", "`4f1d`", r"| 1 | a\|b | 8 |", "from_pretrained('me/cells')")
    )
    again, record = from_pretrained("me/cells", token=TOKEN, endpoint=hub.url)
    assert same(model, again) and not again.training
    assert (again.size, again.class_names, again.category_ids) == ((288, 512), ("person", "a|b"), (3, 8))
    assert record["metrics"] == METRICS and record["data"] == "bccd"


def test_a_second_push_keeps_the_owners_words_and_the_first_commit(hub, model):
    first = push_to_hub(model, "me/cells", token=TOKEN, endpoint=hub.url, private=False).split("/")[-1]
    assert not hub.repos["me/cells"]["private"]
    files = hub.files("me/cells")
    text = (
        files[CARD].decode().replace("library_name", "license: cc-by-4.0\nlibrary_name") + "\nThanks to the nurses.\n"
    )
    hub.repos["me/cells"]["commits"].append(files | {CARD: text.encode(), "photo.png": b"1"})
    push_to_hub(model, "me/cells", metrics=METRICS, token=TOKEN, endpoint=hub.url)
    now = hub.files("me/cells")
    card = now[CARD].decode()
    assert "license: cc-by-4.0" in card and card.endswith("Thanks to the nurses.\n") and "photo.png" in now
    assert "300 detections" in card and "The owner says: cc-by-4.0" in card
    assert from_pretrained("me/cells", endpoint=hub.url)[1]["metrics"] == METRICS
    assert "metrics" not in from_pretrained("me/cells", first, endpoint=hub.url)[1]  # that commit as it was


def test_what_the_hub_refuses_is_said_in_one_line(hub, model):
    push_to_hub(model, "me/cells", token=TOKEN, endpoint=hub.url)
    cases = {
        "a private one that this login may not see": lambda: from_pretrained("me/cells", endpoint=hub.url),
        "no such repository": lambda: from_pretrained("me/none", token=TOKEN, endpoint=hub.url),
        "has no such revision": lambda: from_pretrained("me/cells", "v9", TOKEN, endpoint=hub.url),
        "the hub answered 401": lambda: push_to_hub(model, "me/cells", token="hf_wrong", endpoint=hub.url),
        "is no name": lambda: push_to_hub(model, "me/..", token=TOKEN, endpoint=hub.url),
        "max_dets": lambda: push_to_hub(model, "me/new", metrics={"AP": 1.0}, token=TOKEN, endpoint=hub.url),
    }
    for words, call in cases.items():
        with pytest.raises(InputError, match=words) as caught:
            call()
        assert "\n" not in str(caught.value) and TOKEN not in str(caught.value)
    assert "me/new" not in hub.repos  # refused before anything was made


def test_without_a_network_the_kept_copy_serves(hub, model):
    push_to_hub(model, "me/cells", token=TOKEN, endpoint=hub.url)
    from_pretrained("me/cells", token=TOKEN, endpoint=hub.url)
    hub.shutdown()
    hub.server_close()
    close_session()  # connections kept open would still be answered
    assert same(model, from_pretrained("me/cells", token=TOKEN, endpoint=hub.url)[0])
    with pytest.raises(InputError, match="cannot be reached and no copy of it is kept here; check the network"):
        from_pretrained("me/other", endpoint=hub.url)


def test_a_users_environment_is_enough(hub, model, tmp_path):
    """HF_ENDPOINT and HF_TOKEN, as in a shell; another process, nothing set from inside."""
    save_pretrained(model, tmp_path / "cells")
    code = (
        "import sys; from neo_nb.models.hub import from_pretrained, push_to_hub\n"
        "model, _ = from_pretrained(sys.argv[1]); push_to_hub(model, 'me/cells', data='bccd')\n"
        "again, record = from_pretrained('me/cells'); print(again.class_names, record['data'])"
    )
    settings = {
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": TOKEN,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
    }
    run = [sys.executable, "-c", code, str(tmp_path / "cells")]
    done = subprocess.run(run, env=os.environ | settings, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "('person', 'a|b') bccd"


def test_saving_is_all_or_nothing(model, tmp_path):
    folder = save_pretrained(model, tmp_path / "cells", licence="mit")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    broken = create_model("rtdetr_nano", class_names=("x",))
    with pytest.raises(InputError, match="cannot be written"):
        save_pretrained(broken, folder, metrics={"AP": float("inf"), "max_dets": 100})
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    with pytest.raises(InputError):
        save_pretrained(broken, tmp_path / "new", metrics={"AP": 0.1})
    assert [p.name for p in tmp_path.iterdir()] == ["cells"]
    assert (folder.stat().st_mode & 0o777) == (0o777 & ~umask())


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("content", ["", "{", "[]", '{"library": "other"}', '{"library": ["neo_nb"]}'])
def test_folders_of_others_are_left_alone(model, tmp_path, content):
    (tmp_path / CONFIG).write_text(content)
    assert not is_ours(tmp_path)
    with pytest.raises(InputError, match="holds other things"):
        save_pretrained(model, tmp_path)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [(CONFIG, content)]


def test_a_folder_with_a_part_missing_says_which(model, tmp_path):
    folder = save_pretrained(model, tmp_path / "cells")
    (folder / WEIGHTS).unlink()
    with pytest.raises(InputError, match="model.safetensors: no such file of weights"):
        from_pretrained(folder)
    folder = save_pretrained(model, folder)  # ours still: written again
    (folder / CARD).write_text("no header, no line of ours")
    save_pretrained(model, folder)
    card = (folder / CARD).read_text()
    assert YOURS in card and "no header, no line of ours" in card.split(YOURS)[1]  # nobody's words are lost
    (folder / CARD).write_text("---\nlicense: [\n---\n")
    with pytest.raises(InputError, match="README.md: its header cannot be read"):
        save_pretrained(model, folder)
    (folder / CARD).write_text(card)
    assert same(model, from_pretrained(folder)[0])


def test_class_names_of_any_kind(tmp_path):
    names = ("naïve café", "人", "a|b|c", "two\nlines", "`code`", "---", "<b>")
    model = create_model("rtdetr_nano", class_names=names)
    model.size = (96, 160)
    again, _ = from_pretrained(save_pretrained(model, tmp_path / "odd"), class_names=names)
    assert again.class_names == names
    table = [line for line in (tmp_path / "odd" / CARD).read_text().splitlines() if re.match(r"\| \d+ \|", line)]
    assert len(table) == len(names) and all(len(re.findall(r"(?<!\\)\|", line)) == 4 for line in table)


def test_a_path_is_never_taken_for_a_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("./runs/best", "runs/2026/best", str(Path("/tmp/no/such")), "best"):
        with pytest.raises(InputError, match="no such folder, and no name of a repository"):
            from_pretrained(name)
