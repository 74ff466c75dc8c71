"""A small Hugging Face hub on this machine, and what `datasets` and `transformers` make of it through the network.

`python -m tests.data.hub FOLDER` prints the outcomes as JSON; it is a process of its own because the address of the hub
is read once, when `huggingface_hub` is imported.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import sys
import threading
import urllib.parse
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path
from typing import Any

COMMIT = "a" * 40
TEXTS = [f"document {index} é中\nsecond line" for index in range(40)]
CONFIGS = """---
configs:
- config_name: 20231101.zh
  data_files: 20231101.zh/*
- config_name: 20231101.en
  data_files: 20231101.en/*
---
"""
LAST = "20231101.zh/train-00001-of-00002.parquet"


class Hub(ThreadingHTTPServer):
    """Serves `repositories`: path on the hub (datasets/owner/name, or owner/name of a model) → file → bytes."""

    def __init__(self, repositories: dict[str, dict[str, bytes]]) -> None:
        super().__init__(("127.0.0.1", 0), Requests)
        self.repositories = repositories
        self.broken: set[str] = set()
        """Files that cannot be read just now."""
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Requests(BaseHTTPRequestHandler):
    """The few requests of the hub's interface that the two libraries make."""

    protocol_version = "HTTP/1.1"
    server: Hub

    def do_GET(self) -> None:
        path = urllib.parse.unquote(self.path.partition("?")[0]).strip("/")
        if path.startswith("api/"):
            path = path.removeprefix("api/").removeprefix("models/")
        for name, files in self.server.repositories.items():
            if name.startswith("datasets/gated/") and path.startswith(name):
                return self.answer(401, b"{}", {"X-Error-Code": "GatedRepo"})
            if path == name or path.startswith(f"{name}/"):
                verb, _, rest = path.removeprefix(name).strip("/").partition("/")
                return self.about(name, files, verb, rest.partition("/")[2])
        return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def about(self, name: str, files: dict[str, bytes], verb: str, path: str) -> None:
        if verb in ("", "revision"):
            listing = [{"rfilename": file} for file in files]
            about = {"id": name.removeprefix("datasets/"), "sha": COMMIT, "siblings": listing, "tags": []}
            return self.answer(200, json.dumps(about).encode(), {})
        if verb == "tree":
            return self.answer(200, json.dumps(entries(files, f"{path}/" if path else "")).encode(), {})
        if path not in files:
            return self.answer(404, b"{}", {"X-Error-Code": "EntryNotFound"})
        if path in self.server.broken:
            return self.answer(403, b"{}", {})
        data, headers = files[path], {"X-Repo-Commit": COMMIT, "ETag": f'"{facts(files[path])["oid"]}"'}
        if wanted := self.headers.get("Range"):
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            begin, end = int(first), min(int(last or len(data)), len(data) - 1) + 1
            headers["Content-Range"] = f"bytes {begin}-{end - 1}/{len(data)}"
            return self.answer(206, data[begin:end], headers)
        return self.answer(200, data, headers)

    def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        """Quiet."""


def entries(files: dict[str, bytes], folder: str) -> list[dict[str, Any]]:
    """What is directly in a folder (empty, or with a slash at its end)."""
    inside = [file.removeprefix(folder) for file in files if file.startswith(folder)]
    names = [name for name in inside if "/" not in name]
    plain = [{"type": "file", "path": folder + name, **facts(files[folder + name])} for name in names]
    folders = sorted({name.partition("/")[0] for name in inside if "/" in name})
    return plain + [{"type": "directory", "path": folder + name, "oid": "0" * 40, "size": 0} for name in folders]


def facts(data: bytes) -> dict[str, Any]:
    return {"oid": hashlib.sha1(data).hexdigest(), "size": len(data)}


def parquet(texts: list[str]) -> bytes:
    import pyarrow
    from pyarrow import parquet

    file = io.BytesIO()
    table = pyarrow.table({"id": [str(number) for number in range(len(texts))], "text": texts})
    parquet.write_table(table, file, row_group_size=10)
    return file.getvalue()


def repositories(folder: Path) -> dict[str, dict[str, bytes]]:
    """A corpus of two languages, one behind a gate, and a tokenizer."""
    from fusiontree.data import byte_tokenizer

    wikipedia = {
        "README.md": CONFIGS.encode(),
        "20231101.zh/train-00000-of-00002.parquet": parquet(TEXTS[:25]),
        LAST: parquet(TEXTS[25:]),
        "20231101.en/train-00000-of-00001.parquet": parquet(["English"]),
    }
    byte_tokenizer().save_pretrained(folder / "tokenizer")
    tokenizer = {path.name: path.read_bytes() for path in (folder / "tokenizer").iterdir()}
    return {"datasets/wikimedia/wikipedia": wikipedia, "datasets/gated/corpus": {}, "someone/tokenizer": tokenizer}


def said(action: Callable[[], object]) -> str:
    from fusiontree.errors import FusionTreeError

    try:
        action()
    except FusionTreeError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def outcomes(hub: Hub, folder: Path) -> dict[str, Any]:
    from fusiontree.data import (
        DataConfig,
        build_loader,
        byte_tokenizer,
        corpus_source,
        download,
        load_tokenizer,
        tokenizer_hash,
    )

    chinese = corpus_source("wikipedia", "zh")
    found: dict[str, Any] = {"documents": download(chinese, folder / "all.jsonl").documents}
    download(chinese, folder / "some.jsonl", limit=7)
    found["no language"] = said(lambda: download(corpus_source("wikipedia", "xx"), folder / "x.jsonl"))
    found["no corpus"] = said(lambda: download(corpus_source("nobody/nothing"), folder / "x.jsonl"))
    found["gated"] = said(lambda: download(corpus_source("gated/corpus"), folder / "x.jsonl"))
    hub.broken.add(LAST)
    found["broken"] = said(lambda: download(chinese, folder / "broken.jsonl"))
    found["part"] = (folder / "broken.jsonl.part").read_text(encoding="utf-8").count("\n")
    hub.broken.clear()
    download(chinese, folder / "broken.jsonl")
    config = DataConfig(train=[chinese])
    loaders = [build_loader(config, byte_tokenizer(), "train", 32, 2) for _ in range(2)]
    stream = iter(loaders[0])
    list(islice(stream, 20))
    loaders[1].load_state_dict(json.loads(json.dumps(loaders[0].state_dict())))
    rows = [next(batches)["input_ids"].tolist() for batches in (stream, iter(loaders[1]))]
    found["goes on"] = rows[0] == rows[1]
    found["tokenizer not asked for"] = said(lambda: load_tokenizer("someone/tokenizer"))
    found["tokenizer"] = tokenizer_hash(load_tokenizer("someone/tokenizer", download=True)) == tokenizer_hash(
        byte_tokenizer()
    )
    return found


def main() -> None:
    folder = Path(sys.argv[1])
    hub = Hub({})
    os.environ.update(HF_ENDPOINT=hub.address, HF_HOME=str(folder / "home"), HF_HUB_OFFLINE="0", no_proxy="*")
    os.environ.update(HF_HUB_DISABLE_TELEMETRY="1", HF_HUB_DISABLE_PROGRESS_BARS="1")
    hub.repositories.update(repositories(folder))
    import datasets

    from fusiontree.data import streaming

    datasets.config.STREAMING_READ_MAX_RETRIES, datasets.config.STREAMING_READ_RETRY_INTERVAL = 1, 0
    streaming.BATCH_DOCUMENTS = 10
    print(json.dumps(outcomes(hub, folder)))


if __name__ == "__main__":
    main()
