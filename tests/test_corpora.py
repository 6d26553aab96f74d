"""A remote corpus becomes the shards of a local copy, and what can go wrong on the way is one line.

A server in this process speaks as much of the Hugging Face hub's protocol as its client asks for. The hub itself is
never reached.
"""

import hashlib
import io
import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from conftest import story_of
from omegaconf import OmegaConf
from requests.adapters import HTTPAdapter

from src import prepare as door
from src.cli.overrides import CONF, compose
from src.data import hub, shard_writer
from src.data.config import DataConfig, PrepareConfig
from src.data.manifest import MANIFEST
from src.data.prepare import FETCHED, prepare_shards
from src.data.remote import RemoteFile
from src.data.shards import HEADER, header
from src.data.tokens import read_split
from src.tokenizer import encode, gpt2_tokenizer

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TEXTS = [story_of(200 + number) for number in range(8)]
CORPORA = [file.stem for file in sorted((CONF / "data").glob("*.yaml")) if "\nprepare:" in file.read_text()]


class Hub(BaseHTTPRequestHandler):
    """The hub at ``/api`` and ``/resolve``, which redirects to ``/store`` on another host, where the content is."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        server = self.server
        path = unquote(self.path.split("?")[0])
        server.asked.append((self.command, path, self.headers.get("Range")))
        for part, (status, headers) in server.refused.items():
            if re.search(part, path):
                return self.answer(status, b"refused", headers)
        if path.startswith("/api/"):
            owner, name, *rest = path.removeprefix("/api/datasets/").split("/")
            return self.tree(rest) if "tree" in rest else self.answer(200, {"id": f"{owner}/{name}", "sha": COMMIT})
        file = re.sub("^/store/|^.*/resolve/[^/]+/", "", path)
        if file not in server.files:
            return self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        content = server.files[file]
        if path.startswith("/store/") or path.startswith("/web/"):
            return self.content(file, content)
        place = f"http://localhost:{server.server_port}/store/{file}"
        linked = {"X-Linked-Etag": f'"{digest(content)}"', "X-Linked-Size": str(len(content)), "X-Repo-Commit": COMMIT}
        return self.answer(302, b"", {"Location": place, **linked})

    do_HEAD = do_GET

    def tree(self, rest: list[str]):
        """The files of a folder, two to a page."""
        folder = "/".join(rest[rest.index("tree") + 2 :])
        names = sorted(file for file in self.server.files if file.startswith(folder and f"{folder}/"))
        if not names:
            return self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        first = int((re.search(r"cursor=(\d+)", self.path) or [0, 0])[1])
        entries = [
            {"type": "file", "path": name, "size": len(self.server.files[name]), "oid": "0" * 40,
             "lfs": {"oid": digest(self.server.files[name]), "size": len(self.server.files[name]), "pointerSize": 1}}
            for name in names[first : first + 2]
        ]  # fmt: skip
        place = f"http://127.0.0.1:{self.server.server_port}{self.path.split('&cursor')[0]}&cursor={first + 2}"
        more = {"Link": f'<{place}>; rel="next"'} if first + 2 < len(names) else {}
        return self.answer(200, entries, more)

    def content(self, file: str, content: bytes):
        """All of ``content``, or that from a Range on. It is another one or ends too early where the test says so."""
        first = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
        content = self.server.sent.get(file, content)
        self.send_response(206 if first else 200)
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - first))
        self.send_header("ETag", '"tag of the web"')
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.server.broken.get(file, 0) > 0:
            self.server.broken[file] -= 1
            content = content[: first + (len(content) - first) // 2] if self.server.broken[file] < 99 else b""
            self.close_connection = True
        self.wfile.write(content[first:])

    def answer(self, status: int, content: bytes | dict | list, headers: dict[str, str] | None = None):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_):
        pass


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def served(tmp_path, monkeypatch):
    """The server. ``files``: what it has; ``sent``: what it sends instead; ``broken``: how often a transfer breaks;
    ``refused``: statuses and headers for paths; ``asked``: the requests so far."""
    import huggingface_hub.constants as constants
    import pooch

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files, server.sent, server.broken, server.refused, server.asked = {}, {}, {}, {}, []
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + template[template.index("/{repo_id}") :])
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(pooch, "os_cache", lambda name: tmp_path / "cache")
    monkeypatch.setattr("time.sleep", lambda _: None)  # the client waits between its attempts
    hub.find.cache_clear()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def web(served, monkeypatch):
    """https addresses of the host example.org lead to the server."""
    send = HTTPAdapter.send

    def rerouted(self, request, **options):
        request.url = request.url.replace("https://example.org", f"http://127.0.0.1:{served.server_port}/web")
        return send(self, request, **options)

    monkeypatch.setattr(HTTPAdapter, "send", rerouted)
    return served


def content_of(name: str, texts: list[str | None]) -> bytes:
    if name.endswith(".parquet"):
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        stream = io.BytesIO()
        parquet.write_table(pyarrow.table({"text": texts}), stream)
        return stream.getvalue()
    if name.endswith(".jsonl"):
        return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    return "\n".join(filter(None, texts)).encode()


def files_of(names: list[str]) -> dict[str, bytes]:
    return {name: content_of(name, TEXTS[number : number + 3]) for number, name in enumerate(names)}


def config(source, output: Path, **options) -> PrepareConfig:
    return PrepareConfig(
        source=source, output=str(output), **{"name": "s", "shard_tokens": 500, "val_tokens": 50, **options}
    )


def shards_in(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.bin"))}


def manifest_in(folder: Path) -> dict:
    return json.loads((folder / MANIFEST).read_text())


def fetched(served) -> list[str]:
    return [path.removeprefix("/store/") for method, path, _ in served.asked if method == "GET" and "/store/" in path]


def test_addresses_that_differ_in_their_query_have_places_of_their_own(tmp_path):
    queries = ["", "?part=1", "?part=2"]
    places = {RemoteFile(f"https://example.org/a/b.txt{query}", 3).place(tmp_path) for query in queries}
    assert len(places) == 3
    assert {place.name for place in places} == {"b.txt"}


@pytest.mark.parametrize("ending", ["parquet", "jsonl", "txt"])
@pytest.mark.parametrize("revision", ["", "@main", "@refs%2Fpr%2F1", f"@{COMMIT}"])
def test_shards_are_those_of_a_local_copy(tmp_path, served, ending, revision):
    served.files = files_of([f"data/{part}.{ending}" for part in "abc"]) | {"data/deep/d.txt": b"not", "README.md": b""}
    for name, content in served.files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    prepare_shards(config(f"{tmp_path}/data/*.{ending}", tmp_path / "local"))
    prepare_shards(config(f"hf://datasets/some/texts{revision}/data/*.{ending}", tmp_path / "remote"))
    assert shards_in(tmp_path / "local") == shards_in(tmp_path / "remote")
    local, remote = manifest_in(tmp_path / "local"), manifest_in(tmp_path / "remote")
    assert {**local, "sources": 0} == {**remote, "sources": 0}
    assert remote["sources"] == [
        {"file": f"hf://datasets/some/texts@{COMMIT}/{name}", "bytes": len(content), "sha256": digest(content)}
        for name, content in served.files.items()
        if re.fullmatch(rf"data/[abc]\.{ending}", name)
    ]
    assert not (tmp_path / "remote" / FETCHED).exists()


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [("*/a.txt", ["one/a.txt"]), ("**/*.txt", ["b.txt", "one/a.txt", "one/two/a.txt"]), ("one", ["one/a.txt",
      "one/two/a.txt"]), ("one/two/a.txt", ["one/two/a.txt"]), ("[ab].txt", ["b.txt"])],
)  # fmt: skip
def test_patterns(served, pattern, expected):
    served.files = dict.fromkeys(["b.txt", "one/a.txt", "one/two/a.txt", "one/x.csv"], b"text")
    found = hub.find(f"hf://datasets/some/texts/{pattern}", "source", (".txt",))
    assert [file.address.split(f"{COMMIT}/")[1] for file in found] == expected


def test_an_https_address(tmp_path, web):
    web.files = files_of(["a.jsonl"])
    (tmp_path / "a.jsonl").write_bytes(web.files["a.jsonl"])
    prepare_shards(config(str(tmp_path / "a.jsonl"), tmp_path / "local"))
    prepare_shards(config("https://example.org/resolve/1/a.jsonl", tmp_path / "whole"))
    web.files = {"web/a.jsonl": b""}
    assert shards_in(tmp_path / "local") == shards_in(tmp_path / "whole")


def test_a_connection_that_breaks_is_continued(tmp_path, served, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 100)  # bytes; the client writes whole chunks
    served.files = files_of(["a.jsonl", "b.jsonl"])
    served.broken = {"a.jsonl": 2}
    manifest = prepare_shards(config("hf://datasets/some/texts/*.jsonl", tmp_path / "out"))
    assert manifest["documents"] == 6
    ranges = [asked[2] for asked in served.asked if asked[:2] == ("GET", "/store/a.jsonl")]
    assert ranges == [None, "bytes=1500-", "bytes=2200-"]


class Killed(BaseException):
    pass


def test_after_a_kill_or_a_dead_connection_no_finished_file_is_fetched_again(tmp_path, served):
    served.files = files_of([f"{part}.jsonl" for part in "abcd"])
    source, most = "hf://datasets/some/texts/*.jsonl", 0
    whole = prepare_shards(config(source, tmp_path / "whole"))
    assert fetched(served) == ["a.jsonl", "b.jsonl", "c.jsonl", "d.jsonl"]

    def watched(size: float) -> None:
        nonlocal most
        there = [file.name for file in (tmp_path / "cut" / FETCHED).rglob("*.jsonl")]
        most = max(most, len(there))
        if there == ["c.jsonl"] or ("c.jsonl" in there and kills):
            kills.clear()
            raise Killed

    kills = [1]
    options = {"chunk": 100, "save_every": 0}
    served.asked.clear()
    with pytest.raises(Killed):
        prepare_shards(config(source, tmp_path / "cut", workers=1), advance=watched, **options)
    assert fetched(served) == ["a.jsonl", "b.jsonl", "c.jsonl"]
    served.asked.clear()
    served.broken = {"d.jsonl": 10**6}  # not a byte arrives
    with pytest.raises(ValueError, match=r"d\.jsonl could not be fetched .*; repeat the command, which continues"):
        prepare_shards(config(source, tmp_path / "cut", workers=1), advance=lambda size: None, **options)
    assert set(fetched(served)) == {"d.jsonl"}
    served.asked.clear()
    served.broken = {}
    assert prepare_shards(config(source, tmp_path / "cut", workers=1), **options) == whole
    assert fetched(served) == ["d.jsonl"]
    assert shards_in(tmp_path / "cut") == shards_in(tmp_path / "whole")
    assert most <= 2


def test_parts_at_once_fetch_each_file_once(tmp_path, served):
    served.files = files_of([f"{part}.jsonl" for part in "abcd"])
    source = "hf://datasets/some/texts/*.jsonl"
    for part in "1/2", "2/2":
        prepare_shards(config(source, tmp_path / "in_turns", part=part))
    served.asked.clear()
    with ThreadPoolExecutor(2) as pool:
        parts = [config(source, tmp_path / "at_once", part=part) for part in ("1/2", "2/2")]
        assert [manifest["documents"] for manifest in pool.map(prepare_shards, parts)] == [6, 6]
    assert sorted(fetched(served)) == ["a.jsonl", "b.jsonl", "c.jsonl", "d.jsonl"]
    assert shards_in(tmp_path / "at_once") == shards_in(tmp_path / "in_turns")
    assert manifest_in(tmp_path / "at_once") == manifest_in(tmp_path / "in_turns")
    assert not list((tmp_path / "at_once").glob(".*"))


GATED = {"X-Error-Code": "GatedRepo"}
FAILURES = {
    "no repository": ({"/api/": (404, {"X-Error-Code": "RepoNotFound"})}, "does not exist or is private (404); use "),
    "private": ({"/api/": (401, {})}, "does not exist or is private (401); use a dataset on https://huggingface.co"),
    "no revision": ({"/api/": (404, {"X-Error-Code": "RevisionNotFound"})}, "names no revision of this dataset; use"),
    "gated": (
        {"/resolve/": (403, GATED)},
        "is gated; accept its conditions on https://huggingface.co/datasets/some/te",
    ),
    "gated, logged out": ({"/resolve/": (401, GATED)}, "use hf auth login, and repeat the command"),
    "too many requests": ({"/api/": (429, {})}, "too many requests (429); use hf auth login for a higher limit"),
    "too many downloads": ({"/store/": (429, {})}, "too many requests (429); use hf auth login for a higher limit"),
    "server": ({"/api/": (500, {})}, "could not be fetched (Server error '500"),
}


@pytest.mark.parametrize("what", FAILURES)
def test_a_refusal_is_one_line_and_leaves_nothing(tmp_path, served, what):
    served.files = files_of(["a.jsonl"])
    served.refused, expected = FAILURES[what]
    refused(config("hf://datasets/some/texts/*.jsonl", tmp_path / "out" / "deeper"), expected)
    assert not (tmp_path / "out").exists()


def refused(asked: PrepareConfig, expected: str) -> None:
    with pytest.raises(ValueError) as error:
        prepare_shards(asked)
    assert expected in str(error.value)
    assert str(error.value).startswith(f"source={asked.source}"[:30])
    assert "\n" not in str(error.value)


def test_other_failures_are_one_line_and_leave_nothing(tmp_path, served, monkeypatch):
    import huggingface_hub.constants as constants

    served.files = files_of(["a.jsonl", "b.jsonl"])
    output = tmp_path / "out"
    refused(config("hf://datasets/some/texts/*.parquet", output), "matches no file of commit 0123456789ab; use source=")
    refused(config("hf://datasets/some/texts/gone/a.jsonl", output), "matches no file of commit")
    refused(
        config("hf://some/texts", output), "does not name files on the hub; use source=hf://datasets/<owner>/<name>"
    )
    served.sent = {"a.jsonl": bytes(len(served.files["a.jsonl"]))}
    refused(
        config("hf://datasets/some/texts/*.jsonl", output), "arrived damaged, it has a wrong SHA-256; repeat the co"
    )
    hub.find.cache_clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused(config("hf://datasets/some/texts/*.jsonl", output), "HF_HUB_OFFLINE=1 is set; use HF_HUB_OFFLINE=0, or sou")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    refused(config("hf://datasets/some/texts/*.jsonl", output), "could not be fetched ([Errno 111] Connection refused)")
    refused(config("http://example.org/a.jsonl", output), "is not https; repeat the command, or use source=<a copy")
    assert not output.exists()


@pytest.mark.parametrize("status", [401, 403, 404, 429])
def test_an_https_address_that_is_refused(tmp_path, web, status):
    web.refused = {"/web/": (status, {})}
    refused(config("https://example.org/a.jsonl", tmp_path / "out"), f"could not be fetched ({status} Client Error: ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("limit", [1, 120, 300, 301, 700, 10**6])
def test_max_tokens_ends_with_a_document_whatever_the_chunks_and_kills(tmp_path, monkeypatch, limit):
    texts = [TEXTS[0], None, "", None, None, TEXTS[1], None, TEXTS[2], TEXTS[3], None]
    (tmp_path / "a.jsonl").write_bytes(content_of("a.jsonl", texts[:4]))
    (tmp_path / "b.jsonl").write_bytes(content_of("b.jsonl", texts[4:]))
    expected: list[int] = []
    for text in filter(lambda text: text is not None, texts):
        if len(expected) >= limit:
            break
        expected += [50256, *encode(text).tolist()]
    made = []
    for chunk, workers in (2**20, 1), (300, 2), (40, 3), (1000, 1):
        output = tmp_path / f"{chunk}"
        asked = config(str(tmp_path / "*.jsonl"), output, max_tokens=limit, workers=workers, val_tokens=0)
        if chunk == 1000:
            with monkeypatch.context() as patched, pytest.raises(Killed):
                patched.setattr(shard_writer.os, "fsync", killed_at(7))
                prepare_shards(asked, chunk=50, save_every=0)
        prepare_shards(asked, chunk=chunk)
        made.append((shards_in(output), {**manifest_in(output), "settings": {}}))
        tokens = [np.fromfile(file, "<u2", offset=HEADER) for file in sorted(output.glob("*.bin"))]
        assert np.concatenate(tokens).tolist() == expected
        assert manifest_in(output)["settings"]["max_tokens"] == limit
    assert all(other == made[0] for other in made)


def killed_at(number: int):
    """A function that raises when it is called for this time."""
    calls = iter(range(number - 1))

    def call(*_) -> None:
        if next(calls, None) is None:
            raise Killed

    return call


@pytest.mark.parametrize("name", CORPORA)
def test_a_named_corpus_is_fetched_and_prepared(tmp_path, served, name):
    """Its first two files, as its YAML names them."""
    asked = door._config(compose("prepare", [f"source={name}", f"output={tmp_path / 'out'}", "shard_tokens=500"]))
    patterns = [re.fullmatch(r"hf://datasets/[^@]+@[0-9a-f]{40}/(.+)", source)[1] for source in asked.paths]
    names = [pattern.replace("*", f"0000{number}") for pattern in patterns for number in range(1 + ("*" in pattern))][
        :2
    ]
    served.files = files_of(names)
    reached = [pattern for pattern in patterns if any(hub_matches(pattern, file) for file in names)]
    sources = [source for source, pattern in zip(asked.paths, patterns, strict=True) if pattern in reached]
    manifest = prepare_shards(asked.changed(source=sources, val_tokens=50, max_tokens=10**6))
    assert manifest["documents"] == 3 * len(names)
    assert manifest["settings"]["name"] == name
    data = DataConfig(
        **OmegaConf.to_container(compose("train", [f"data={name}", f"data.path={tmp_path / 'out'}"]).data)
    )
    train, val, *_ = read_split(data, gpt2_tokenizer(), data.train_ratio)
    assert (len(train), len(val)) == (manifest["tokens"] - 50, 50)


def hub_matches(pattern: str, name: str) -> bool:
    return re.fullmatch(re.escape(pattern).replace(r"\*", ".*"), name) is not None


@pytest.mark.parametrize("name", CORPORA)
def test_without_shards_the_error_names_the_command(command, name, tmp_path):
    for path, folder in (None, name), (f"{tmp_path}/none", f"{tmp_path}/none"):
        status, *printed = command("train", f"data={name}", *([f"data.path={path}"] if path else []), "dry_run=true")
        told = f"make them with python -m src.prepare source={name} output={folder}, then use data.path={folder}"
        errors = [line for line in "".join(printed).splitlines() if line.startswith("error: ")]
        assert status == 1
        assert len(errors) == 1
        assert errors[0].endswith(told)


def test_ready_made_shards_are_fetched_once(tmp_path, served):
    names = ["fineweb_val_000000.bin", *(f"fineweb_train_{number:06d}.bin" for number in range(1, 5))]
    tokens = {name: np.arange(100 * at, 100 * at + 60, dtype="<u2") for at, name in enumerate(names)}
    served.files = {name: header(60) + part.tobytes() for name, part in tokens.items()}
    data = dict(OmegaConf.to_container(compose("train", ["data=fineweb_10b_shards", "data.train_shards=3"]).data))
    served.broken = {names[1]: 1}
    for _ in range(2):
        train, val, *_ = read_split(DataConfig(**data), gpt2_tokenizer(), 0.9)
        assert val[:].tolist() == tokens[names[0]].tolist()
        assert train[:].tolist() == np.concatenate([tokens[name] for name in names[1:4]]).tolist()
        assert sorted(set(fetched(served))) == sorted(names[:4])
        served.refused = {"/": (500, {})}  # a second time needs no network
    served.refused = {}
    with pytest.raises(ValueError, match=r"data\.train_shards=9: .* has no fineweb_train_000005\.bin; use .*shards=4$"):
        read_split(DataConfig(**{**data, "train_shards": 9}), gpt2_tokenizer(), 0.9)
    served.files[names[4]] = served.files[names[4]][:-7]
    hub.find.cache_clear()
    with pytest.raises(ValueError, match=r"fineweb_train_000004\.bin has 60 tokens by its header"):
        read_split(DataConfig(**{**data, "train_shards": 4}), gpt2_tokenizer(), 0.9)
