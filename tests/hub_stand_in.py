"""A stand-in for the Hugging Face hub: the part of its HTTP interface that an upload by huggingface_hub goes through.

Repositories are made and listed, branches made, cards validated, small files committed inline and weights sent by LFS,
as the hub answers with `xet` turned off in the client (HF_HUB_DISABLE_XET).
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_stand_in"
REPOSITORY = r"(?P<name>[\w.-]+/[\w.-]+)"


@dataclass
class Repository:
    private: bool = False
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})


class Failure(Exception):
    """An answer that is an error, with the code that the hub gives in a header, if it does."""

    def __init__(self, status: int, message: str, code: str = "", url: str = ""):
        super().__init__(message)
        self.status, self.code, self.url = status, code, url


class Hub:
    """`repositories` by name, LFS `objects` by sha256, requests `seen` and `messages` of commits in order. `failures`
    are answers to give instead, by a pattern of "METHOD path"."""

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.seen: list[str] = []
        self.messages: list[str] = []
        self.failures: dict[str, Failure] = {}
        self.endpoint = ""

    def answer(self, request: str, path: str, body: bytes, token: str) -> dict | list:
        self.seen.append(request)
        for pattern, failure in self.failures.items():
            if re.search(pattern, request):
                raise failure
        if token != f"Bearer {TOKEN}" and not path.startswith("/storage/"):
            raise Failure(401, "Invalid credentials in Authorization header")
        for pattern, method in ROUTES.items():
            if match := re.fullmatch(pattern, request):
                return method(self, body, **{key: unquote(value) for key, value in match.groupdict().items()})
        raise Failure(404, f"the stand-in knows no {request}")

    def files(self, name: str, revision: str) -> dict[str, bytes]:
        if name not in self.repositories:
            raise Failure(404, "Repository not found", "RepoNotFound")
        if revision not in self.repositories[name].branches:
            raise Failure(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.repositories[name].branches[revision]

    def create(self, body: bytes) -> dict:
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        url = f"{self.endpoint}/{name}"
        if name in self.repositories:
            raise Failure(409, "You already created this model repo", url=url)
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.repositories[name] = Repository(private)
        return {"url": url, "name": name}

    def validate(self, body: bytes) -> dict:
        match = re.match(r"---\n(.*?)\n---\n", json.loads(body)["content"], re.DOTALL)
        stated = yaml.safe_load(match[1]) if match else {}
        bases = stated.get("base_model", [])
        for base in [bases] if isinstance(bases, str) else bases:
            if not re.fullmatch(r"[\w.-]+/[\w.-]+", base):
                raise Failure(400, f'"base_model" {base} is not a valid model id')
        return {"errors": [], "warnings": []}

    def info(self, body: bytes, name: str, revision: str = "main") -> dict:
        files = self.files(name, revision)
        siblings = [{"rfilename": path} for path in files]
        return {"id": name, "sha": "0" * 40, "private": self.repositories[name].private, "siblings": siblings}

    def branch(self, body: bytes, name: str, revision: str) -> dict:
        branches = self.repositories[name].branches
        if revision in branches:
            raise Failure(409, "Reference already exists")
        branches[revision] = dict(branches["main"])
        return {}

    def tree(self, body: bytes, name: str, revision: str) -> list:
        files = self.files(name, revision)
        return [{"type": "file", "path": path, "size": len(data), "oid": _oid(data)} for path, data in files.items()]

    def preupload(self, body: bytes, name: str, revision: str) -> dict:
        there, told = self.files(name, revision), []
        for file in json.loads(body)["files"]:
            large = file["path"].endswith(".safetensors")
            data = there.get(file["path"])
            oid = None if data is None else hashlib.sha256(data).hexdigest() if large else _oid(data)
            mode = "lfs" if large else "regular"
            told.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": told}

    def batch(self, body: bytes, name: str) -> dict:
        objects = []
        for wanted in json.loads(body)["objects"]:
            actions = {
                "upload": {"href": f"{self.endpoint}/storage/{wanted['oid']}", "header": {}},
                "verify": {"href": f"{self.endpoint}/{name}.git/info/lfs/verify"},
            }
            objects.append(wanted if wanted["oid"] in self.objects else wanted | {"actions": actions})
        return {"transfer": "basic", "objects": objects}

    def store(self, body: bytes, oid: str) -> dict:
        if hashlib.sha256(body).hexdigest() != oid:
            raise Failure(400, "the content is not what was announced")
        self.objects[oid] = body
        return {}

    def verify(self, body: bytes, name: str) -> dict:
        stated = json.loads(body)
        if len(self.objects.get(stated["oid"], b"")) != stated["size"]:
            raise Failure(404, "no such object")
        return {}

    def commit(self, body: bytes, name: str, revision: str) -> dict:
        files = dict(self.files(name, revision))
        for line in body.splitlines():
            operation = json.loads(line)
            kind, value = operation["key"], operation["value"]
            if kind == "header":
                self.messages.append(value["summary"])
            elif kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                files[value["path"]] = self.objects[value["oid"]]
            elif kind == "deletedFile":
                del files[value["path"]]
            else:
                raise Failure(400, f"unknown operation {kind}")
        self.repositories[name].branches[revision] = files
        oid = hashlib.sha1(body).hexdigest()
        return {"commitUrl": f"{self.endpoint}/{name}/commit/{oid}", "commitOid": oid, "success": True}


ROUTES = {
    r"POST /api/repos/create": Hub.create,
    r"POST /api/validate-yaml": Hub.validate,
    rf"GET /api/models/{REPOSITORY}": Hub.info,
    rf"GET /api/models/{REPOSITORY}/revision/(?P<revision>[^/]+)": Hub.info,
    rf"GET /api/models/{REPOSITORY}/tree/(?P<revision>[^/]+)": Hub.tree,
    rf"POST /api/models/{REPOSITORY}/branch/(?P<revision>[^/]+)": Hub.branch,
    rf"POST /api/models/{REPOSITORY}/preupload/(?P<revision>[^/]+)": Hub.preupload,
    rf"POST /api/models/{REPOSITORY}/commit/(?P<revision>[^/]+)": Hub.commit,
    rf"POST /{REPOSITORY}\.git/info/lfs/objects/batch": Hub.batch,
    rf"POST /{REPOSITORY}\.git/info/lfs/verify": Hub.verify,
    r"PUT /storage/(?P<oid>\w+)": Hub.store,
}


@contextmanager
def running() -> Iterator[Hub]:
    """A hub at `endpoint`, a port of this machine."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def _handle(self):
            path = urlsplit(self.path).path
            status, code = 200, ""
            try:
                body = self._body()
                told = hub.answer(f"{self.command} {path}", path, body, self.headers.get("Authorization", ""))
            except Failure as failure:
                status, code = failure.status, failure.code
                told = {"error": str(failure), "errors": [{"message": str(failure)}], "url": failure.url}
            data = json.dumps(told).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            if code:
                self.send_header("X-Error-Code", code)
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PUT = _handle

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def _oid(data: bytes) -> str:
    """What git calls a file of this content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
