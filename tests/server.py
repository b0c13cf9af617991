"""A server on loopback that plays the public ones, and misbehaves in the ways they do.

`server.put("https://host/path", data)` lays a file down as that url's; `server.mirrors` is then the config's `mirrors`. Folders
answer with a listing as ftp.ncbi.nlm.nih.gov writes it. `server.script[path]` is a list of acts used up first, one a request;
`server.always[path]` is an act for each further one. An act is a dict with any of:

status, headers     answer this, without the file (a redirect is {"status": 302, "headers": {"Location": ...}})
cut                 close the connection after so many bytes
hold                after the cut, keep the connection open until the test ends
drip                (bytes, seconds): send so much at a time, with a pause between
anonymous           no ETag
ignore_range        answer 200 with the whole file
content_range       a false Content-Range
no_length           no Content-Length: the end of the file is the end of the connection
lie                 (offset, bytes): bytes sent in place of the file's own
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, quote, urlsplit

Content = bytes | Callable[[dict[str, list[str]]], bytes]  # a function gets the query, each key with its values


@dataclass
class Request:
    """One request as the server saw it: times from `time.monotonic`, `ended` None while it is answered."""

    path: str
    query: str
    headers: dict[str, str]
    began: float
    ended: float | None = None
    status: int = 0
    sent: int = 0


@dataclass
class Server:
    """What a test sees of the server.

    Attributes
    ----------
    base
        ``http://127.0.0.1:{port}``.
    files
        Path, with query or without -> content.
    script, always
        Path -> acts (see above).
    requests
        Every request in order of arrival; `seen` and `sent` are excerpts of it.
    """

    base: str
    files: dict[str, Content] = field(default_factory=dict)
    script: dict[str, list[dict]] = field(default_factory=dict)
    always: dict[str, dict] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    mirrors: dict[str, str] = field(default_factory=dict)

    def put(self, url: str, data: Content | dict | list) -> str:
        """Serve `data` (JSON, if it is a dict or a list) as what lies at a public url; returns its path here."""
        path = self.path(url)
        self.files[path] = json.dumps(data).encode() if isinstance(data, dict | list) else data
        return path

    def path(self, url: str) -> str:
        """Path under which a public url is served, once its host is mirrored."""
        parts = urlsplit(url)
        self.mirrors[f"{parts.scheme}://{parts.netloc}"] = f"{self.base}/{parts.netloc}"
        return f"/{parts.netloc}{parts.path}" + (f"?{parts.query}" if parts.query else "")

    @property
    def seen(self) -> list[tuple[str, str | None]]:
        """(path, Range header) of every request."""
        return [(request.path, request.headers.get("range")) for request in self.requests]

    @property
    def sent(self) -> list[int]:
        """Bytes of body sent for every request that is answered."""
        return [request.sent for request in self.requests if request.ended is not None]

    def most_at_once(self, prefix: str = "/") -> int:
        """Greatest number of requests below a path that were answered at the same time."""
        spans = [(r.began, r.ended) for r in self.requests if r.path.startswith(prefix) and r.ended is not None]
        return max((sum(a <= began < b for a, b in spans) for began, _ in spans), default=0)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        at = urlsplit(self.path)
        self.record = Request(at.path, at.query, {k.lower(): v for k, v in self.headers.items()}, time.monotonic())
        served = self.server.served
        served.requests.append(self.record)
        acts = served.script.get(at.path)
        act = acts.pop(0) if acts else served.always.get(at.path, {})
        try:
            self.serve(served, at, act)
        finally:
            self.record.ended = time.monotonic()

    def serve(self, served: Server, at, act: dict) -> None:
        if "status" in act:
            self.answer(act["status"], act.get("headers", {}), b"", {})
            return
        body = served.files.get(self.path, served.files.get(at.path))
        if callable(body):
            body = body(parse_qs(at.query))
        if body is None and at.path.endswith("/"):
            body = listing(at.path, served.files)
        if body is None:
            self.answer(404, {}, b"", {})
            return
        headers = {} if act.get("anonymous") else {"ETag": f'"{hashlib.sha256(body).hexdigest()[:16]}"'}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        fresh = self.headers.get("If-Range") in (None, headers.get("ETag"))
        status, start, stop = 200, 0, len(body)
        if wanted and fresh and not act.get("ignore_range"):
            start, stop = int(wanted[1]), min(int(wanted[2] or len(body)) + bool(wanted[2]), len(body))
            if start >= len(body):
                self.answer(416, {"Content-Range": f"bytes */{len(body)}"}, b"", {})
                return
            status = 206
            headers["Content-Range"] = act.get("content_range", f"bytes {start}-{stop - 1}/{len(body)}")
        if "lie" in act:
            offset, lie = act["lie"]
            body = body[:offset] + lie + body[offset + len(lie) :]
        self.answer(status, headers, body[start:stop], act)

    def answer(self, status: int, headers: dict, body: bytes, act: dict) -> None:
        self.record.status = status
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if "no_length" not in act:
            self.send_header("Content-Length", str(len(body)))
        if "cut" in act or "no_length" in act:
            self.send_header("Connection", "close")
        self.end_headers()
        body = body[: act["cut"]] if "cut" in act else body
        size, pause = act.get("drip", (len(body) or 1, 0))
        for begin in range(0, len(body), size):
            self.wfile.write(body[begin : begin + size])
            self.record.sent += len(body[begin : begin + size])
            if begin + size < len(body) and pause and self.server.released.wait(pause):
                break
        if "hold" in act:
            self.wfile.flush()
            self.server.released.wait(20)


def listing(path: str, files: dict[str, Content]) -> bytes | None:
    """A folder as ftp.ncbi.nlm.nih.gov shows it: relative links, sizes rounded, a parent and a foreign link besides."""
    names = sorted({name[len(path) :].split("/")[0] for name in files if name.startswith(path)})
    if not names:
        return None
    lines = []
    for name in names:
        content = files.get(path + name)
        size = len(content) if isinstance(content, bytes) else 0
        shown = f"{size / 1e6:.1f}M" if size >= 1e6 else f"{size / 1e3:.1f}K" if size >= 1e3 else str(size)
        href = name if path + name in files else name + "/"
        gap = " " * max(1, 60 - len(name))
        lines.append(f'<a href="{quote(href)}">{href}</a>{gap}2024-02-01 10:00  {shown:>5}  ')
    folder = path.rstrip("/")
    return (
        '<!DOCTYPE HTML PUBLIC "-//W3C//DTD HTML 3.2 Final//EN">\n'
        f"<html>\n <head>\n  <title>Index of {folder}</title>\n </head>\n <body>\n<h1>Index of {folder}</h1>\n"
        f'<pre>Name{" " * 57}Last modified      Size  <hr><a href="{folder.rsplit("/", 1)[0]}/">Parent Directory</a>'
        f"{' ' * 61}-   \n" + "\n".join(lines) + "\n<hr></pre>\n"
        '<a href="https://www.hhs.gov/vulnerability-disclosure-policy/index.html">HHS Vulnerability Disclosure</a>\n'
        "</body></html>\n"
    ).encode()


class _HTTPServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request, client_address):
        """A client that was killed, or refused what it saw, is no news."""


@contextmanager
def serving() -> Iterator[Server]:
    """A running server, stopped at the end. Tests make a fixture of it."""
    httpd = _HTTPServer(("127.0.0.1", 0), _Handler)
    httpd.released = threading.Event()
    httpd.served = Server(base=f"http://127.0.0.1:{httpd.server_port}")
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield httpd.served
    finally:
        httpd.released.set()
        httpd.shutdown()
        thread.join()
        httpd.server_close()
