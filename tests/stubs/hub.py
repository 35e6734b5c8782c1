"""A stand-in for the Hugging Face hub: the HTTP calls that huggingface_hub makes to push a folder and to read it."""

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "hf_of_the_test"


class Hub(ThreadingHTTPServer):
    """Repositories of models in memory.

    Attributes:
        commits: by repository, in their order: (SHA-1 of the commit, files by name).
        made: what was asked for of the repositories that were made.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Calls)
        self.commits: dict[str, list[tuple[str, dict[str, bytes]]]] = {}
        self.made: list[dict] = []
        self.blobs: dict[str, bytes] = {}

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def find(self, repository: str, revision: str | None) -> tuple[str, dict[str, bytes]] | None:
        known = self.commits.get(repository, [])
        found = known[-1:] if revision in (None, "main") else [one for one in known if one[0] == revision]
        return found[0] if found else None


class Calls(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_):
        pass

    def answer(self, body: object = b"", status: int = 200, **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_POST(self):
        body, path = self.body(), self.path.partition("?")[0]
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer({"error": "Invalid username or password."}, 401)
        if path == "/api/repos/create":
            told = json.loads(body)
            self.server.made.append(told)
            name = f"{told['organization']}/{told['name']}"
            if self.server.commits.get(name) is not None:
                return self.answer({"url": f"{self.server.address}/{name}"}, 409)
            self.server.commits[name] = []
            return self.answer({"url": f"{self.server.address}/{name}"})
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if found := re.fullmatch(r"/api/models/(\S+/\S+)/preupload/main", path):
            files = [
                {"path": file["path"], "shouldIgnore": False, "oid": None,
                 "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular"}
                for file in json.loads(body)["files"]
            ]  # fmt: skip
            return self.answer({"files": files})
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                {**one, "actions": {"upload": {"href": f"{self.server.address}/blobs/{one['oid']}"}}}
                for one in json.loads(body)["objects"]
            ]
            return self.answer({"transfer": "basic", "objects": objects})
        if found := re.fullmatch(r"/api/models/(\S+/\S+)/commit/main", path):
            return self.commit(found[1], body)
        return self.answer({"error": f"the stand-in has no {path}"}, 404)

    def commit(self, repository: str, body: bytes) -> None:
        before = self.server.find(repository, None)
        files = dict(before[1]) if before else {}
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            if line["key"] == "lfsFile":
                files[value["path"]] = self.server.blobs[value["oid"]]
        sha = hashlib.sha1(body).hexdigest()
        self.server.commits[repository].append((sha, files))
        url = f"{self.server.address}/{repository}/commit/{sha}"
        self.answer({"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""})

    def do_PUT(self):
        body = self.body()
        self.server.blobs[hashlib.sha256(body).hexdigest()] = body
        self.answer()

    def do_GET(self):
        path = self.path.partition("?")[0]
        if found := re.fullmatch(r"/(\w+/\w+)/resolve/(\w+)/(.+)", path):
            commit = self.server.find(found[1], found[2])
            if commit is None or found[3] not in commit[1]:
                return self.answer({}, 404, X_Error_Code="EntryNotFound")
            data = commit[1][found[3]]
            return self.answer(data, ETag=f'"{hashlib.sha1(data).hexdigest()}"', X_Repo_Commit=commit[0])
        if found := re.fullmatch(r"/api/models/(\w+/\w+)(?:/(revision|tree)/(\w+))?", path):
            commit = self.server.find(found[1], found[3])
            if commit is None:
                known = found[1] in self.server.commits
                code = "RevisionNotFound" if known else "RepoNotFound"
                return self.answer({"error": "there is none"}, 404, X_Error_Code=code)
            if found[2] == "tree":
                tree = [
                    {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for name, data in commit[1].items()
                ]
                return self.answer(tree)
            siblings = [{"rfilename": name} for name in commit[1]]
            return self.answer({"id": found[1], "sha": commit[0], "siblings": siblings, "tags": [], "private": False})
        return self.answer({"error": f"the stand-in has no {path}"}, 404)

    do_HEAD = do_GET


@contextlib.contextmanager
def serving() -> Iterator[Hub]:
    """The stand-in, at work while this is open."""
    hub = Hub()
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
