"""The part of Kubernetes' API that scales StatefulSets, over HTTPS, with what its account may do."""

from __future__ import annotations

import json
import re
import ssl
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

_PATH = re.compile(r"/apis/apps/v1/namespaces/([^/]+)/(statefulsets)/([^/]+)(?:/(scale))?")

Rule = Mapping[str, Sequence[str]]


@dataclass(slots=True)
class Api:
    """``sets``: replicas that are wanted, and pods that exist, by namespace and name."""

    token: str
    rules: Sequence[Rule]
    sets: dict[tuple[str, str], list[int]]
    port: int = 0
    delay_s: float = 0.0
    calls: list[tuple[str, str]] = field(default_factory=list)

    def answer(self, method: str, path: str, headers: Mapping[str, str], body: bytes) -> tuple[int, dict[str, Any]]:
        time.sleep(self.delay_s)
        self.calls.append((method, path))
        if headers.get("Authorization") != f"Bearer {self.token}":
            return _status(401, "Unauthorized")
        found = _PATH.fullmatch(path)
        if found is None:
            return _status(404, "the server could not find the requested resource")
        namespace, kind, name, sub = found.groups()
        resource = f"{kind}/{sub}" if sub else kind
        if not self._allows(method.lower(), resource, name):
            return _status(403, f'{resource} "{name}" is forbidden')
        if (pods := self.sets.get((namespace, name))) is None:
            return _status(404, f'statefulsets.apps "{name}" not found')
        if method == "PATCH":
            if headers.get("Content-Type") != "application/merge-patch+json":
                return _status(415, "the body of the request was in an unknown format")
            patch = json.loads(body)
            assert set(patch) == {"spec"}
            assert set(patch["spec"]) == {"replicas"}
            pods[0] = patch["spec"]["replicas"]
        spec = {"replicas": pods[0]} if pods[0] else {}  # as the real one leaves out what is zero
        return 200, {
            "kind": "Scale", "apiVersion": "autoscaling/v1", "metadata": {"name": name, "namespace": namespace},
            "spec": spec, "status": {"replicas": pods[1], "selector": ""},
        }  # fmt: skip

    def _allows(self, verb: str, resource: str, name: str) -> bool:
        return any(
            "apps" in rule["apiGroups"]
            and resource in rule["resources"]
            and verb in rule["verbs"]
            and name in rule["resourceNames"]
            for rule in self.rules
        )


def _status(code: int, message: str) -> tuple[int, dict[str, Any]]:
    return code, {"kind": "Status", "apiVersion": "v1", "status": "Failure", "message": message, "code": code}


@contextmanager
def serving(api: Api, certificate: Path, key: Path) -> Iterator[Api]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer("GET")

        def do_PATCH(self) -> None:
            self._answer("PATCH")

        def _answer(self, method: str) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            code, answer = api.answer(method, self.path, dict(self.headers), body)
            content = json.dumps(answer).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            """Of a client that gave up."""

    with Server(("127.0.0.1", 0), Handler) as server:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
        api.port = server.server_address[1]
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield api
        finally:
            server.shutdown()
            thread.join(timeout=10)
