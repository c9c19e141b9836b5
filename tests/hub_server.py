"""A stand-in for the hub: the few answers that `datasets` needs to read a data set from a folder."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

COMMIT = "1" * 40


@contextmanager
def hub_of(name: str, folder: Path) -> Iterator[str]:
    """Serve a folder as the data set `name`; gives the address."""
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def answer(self, body: bytes, status: int = 200, **headers: str) -> None:
            self.send_response(status)
            for key, value in {**headers, "Content_Length": str(len(body))}.items():
                self.send_header(key.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def do_GET(self) -> None:
            path = unquote(urlparse(self.path).path)
            if path.startswith(f"/api/datasets/{name}/tree/{COMMIT}"):
                self.answer(json.dumps(entries(files, path.partition(COMMIT)[2].strip("/"))).encode())
            elif path.startswith(f"/api/datasets/{name}"):
                self.answer(json.dumps({"id": name, "sha": COMMIT}).encode())
            elif (body := files.get(path.removeprefix(f"/datasets/{name}/resolve/").partition("/")[2])) is not None:
                headers = {"X_Repo_Commit": COMMIT, "ETag": f'"{hashlib.sha1(body).hexdigest()}"'}
                start = (self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")[0]
                self.answer(body[int(start) :], 206 if "Range" in self.headers else 200, **headers)
            else:
                self.answer(b"{}", 404, X_Error_Code="EntryNotFound" if name in path else "RepoNotFound")

        do_HEAD = do_GET  # noqa: N815  # the name that the server looks for

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def entries(files: dict[str, bytes], folder: str) -> list[dict[str, Any]]:
    """What the tree of a folder holds: files, and folders without what is in them."""
    prefix = f"{folder}/" if folder else ""
    rest = [file.removeprefix(prefix) for file in files if file.startswith(prefix)]
    folders = dict.fromkeys(file.partition("/")[0] for file in rest if "/" in file)
    found = [{"type": "directory", "path": prefix + name, "oid": "0"} for name in folders]
    sizes = {prefix + file: len(files[prefix + file]) for file in rest if "/" not in file}
    return found + [{"type": "file", "path": file, "size": size, "oid": "0"} for file, size in sizes.items()]
