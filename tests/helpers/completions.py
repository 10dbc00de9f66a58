"""A small OpenAI-compatible server in threads, whose replies a test decides."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

DROP = "<drop>"  # instead of a reply: close the connection in the middle of one


def text_of(body: dict[str, Any]) -> str:
    """The whole prompt of a request, of a chat or a text."""
    return body["prompt"] if "prompt" in body else "\n".join(turn["content"] for turn in body["messages"])


def completion(
    text: str, finish: str | None = "stop", usage: tuple[int, int] | None = (100, 10), **message: Any
) -> Any:
    """The JSON of a reply, for chats and texts alike."""
    choice = {"text": text, "message": {"role": "assistant", "content": text} | message, "finish_reason": finish}
    if message:
        del choice["text"]
    found: dict[str, Any] = {"choices": [choice]}
    if usage is not None:
        found["usage"] = {"prompt_tokens": usage[0], "completion_tokens": usage[1]}
    return found


class Server:
    """Counts requests and answers them.

    Args:
        reply: from the body of a request and its number, from 0, to a text, to JSON, to ``(status, headers, content)``
            or to `DROP`.
        seconds: how long each reply takes.
    """

    def __init__(self, reply: Callable[[dict[str, Any], int], Any], seconds: float = 0.0):
        self.reply, self.seconds = reply, seconds
        self.bodies: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.keys: list[str | None] = []
        self.times: list[float] = []
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()
        self.url = ""

    def answer(self, handler: BaseHTTPRequestHandler) -> tuple[int, dict[str, str], bytes] | None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self.lock:
            number = len(self.bodies)
            self.bodies.append(body)
            self.paths.append(handler.path)
            self.keys.append(handler.headers["Authorization"])
            self.times.append(time.monotonic())
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        time.sleep(self.seconds)
        found = self.reply(body, number)
        with self.lock:
            self.at_once -= 1
        if found == DROP:
            return None
        if isinstance(found, str):
            found = completion(found)
        status, headers, content = found if isinstance(found, tuple) else (200, {}, found)
        return status, headers, content if isinstance(content, bytes) else json.dumps(content).encode()


@contextmanager
def serving(server: Server, port: int = 0) -> Iterator[Server]:
    """Run a server on this machine; its ``url`` is the base URL."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = 1 << 16
        disable_nagle_algorithm = True

        def do_POST(self) -> None:
            found = server.answer(self)
            if found is None:
                self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{")
                self.close_connection = True
                return
            status, headers, content = found
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args: Any) -> None:
            pass

    class Threads(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128

        def handle_error(self, *args: Any) -> None:  # a client that has gone away
            pass

    with Threads(("127.0.0.1", port), Handler) as http:
        server.url = f"http://127.0.0.1:{http.server_port}/v1"
        threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        try:
            yield server
        finally:
            http.shutdown()
