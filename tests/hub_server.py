"""A small Hub in memory: the protocol that huggingface_hub speaks, over real HTTP on the loopback interface."""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml
from huggingface_hub.utils import reset_sessions

USERS = {"hf_me": "me", "hf_other": "other"}
LARGE = (".bin", ".safetensors", ".png", ".pt", ".pth")


@dataclass
class Repo:
    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)  # {commit: {path: content}}
    refs: dict[str, str] = field(default_factory=dict)  # {branch, tag or refs/pr/n: commit}
    messages: list[str] = field(default_factory=list)  # of all commits, the oldest first

    def commit(self, ref, files, message):
        oid = hashlib.sha1(f"{len(self.commits)} {message}".encode()).hexdigest()
        self.commits[oid] = files
        self.refs[ref] = oid
        self.messages.append(message)
        return oid

    def resolve(self, revision):
        oid = self.refs.get(revision, revision)
        if oid not in self.commits:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return oid

    @property
    def files(self):
        return self.commits[self.refs["main"]]


class Refused(Exception):
    """An answer that is an error: status, X-Error-Code, message, more of the body."""

    def __init__(self, status, code, message, **body):
        self.status, self.code, self.body = status, code, {"error": message, **body}


class Cut(Exception):
    """The connection breaks here."""


class Hub:
    """The server, to be used in a `with` statement.

    `requests` lists what came in; `fail("PUT /lfs", 500, times=1)` makes requests fail whose first line begins so,
    by a status, or by a connection that breaks: `"cut"` after half of the body, `"lost"` before the answer.
    """

    def __init__(self):
        self.repos, self.large, self.requests, self.faults = {}, {}, [], []
        self.lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *exc):
        self.stop()

    def stop(self):
        self.server.shutdown()
        self.server.server_close()
        reset_sessions()  # or open connections would go on

    def create(self, repo_id, files=(), **kwargs):
        repo = self.repos[repo_id] = Repo(**kwargs)
        repo.commit("main", {".gitattributes": b"", **dict(files)}, "initial commit")
        return repo

    def fail(self, request, status, times=1000):
        self.faults.append([request, status, times])

    def fault(self, line):
        with self.lock:
            for fault in self.faults:
                if line.startswith(fault[0]) and fault[2] > 0:
                    fault[2] -= 1
                    return fault[1]
        return None

    @contextmanager
    def quiet(self):
        """Fails the test if anything is asked for."""
        before = list(self.requests)
        yield
        assert self.requests == before


def _etag(path, content):
    if path.endswith(LARGE):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


def check_card(content):
    """Return the errors that the Hub's validator finds in a card's metadata."""
    match = re.match(r"---\n(.*?)\n---\n", content, flags=re.S)
    if match is None:
        return ["the card has no metadata"]
    try:
        data = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        return [f"the metadata is no YAML: {error}"]
    errors = []
    lists = {"tags": r".+", "datasets": r"[\w.-]+(/[\w.-]+)?", "metrics": r"\w+", "language": r"[a-z]{2,3}"}
    for key, pattern in lists.items():
        if key in data and not (isinstance(data[key], list) and all(re.fullmatch(pattern, v) for v in data[key])):
            errors.append(f'"{key}" is not valid: {data[key]}')
    for key, pattern in {"license": r"[a-z0-9.-]+", "base_model": r"[\w.-]+(/[\w.-]+)?"}.items():
        if key in data and not re.fullmatch(pattern, str(data[key])):
            errors.append(f'"{key}" is not valid: {data[key]}')
    return errors + [error for model in data.get("model-index", []) for error in check_results(model)]


def check_results(model):
    """Return the errors of one model in a card's "model-index"."""
    errors = []
    for result in model["results"]:
        needed = [model["name"], result["task"]["type"], result["dataset"]["type"], result["dataset"]["name"]]
        if not all(isinstance(value, str) and value for value in needed) or not result["metrics"]:
            errors.append(f'"model-index" lacks a name: {needed}')
        for metric in result["metrics"]:
            if not metric["type"] or not isinstance(metric["value"], float | int):
                errors.append(f'"model-index" has no value for {metric["type"]}')
    return errors


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    ROUTES = [
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/repos/create", "create_repo"),
        ("POST", r"/api/validate-yaml", "validate"),
        ("GET", r"/api/models/(?P<repo>[\w.-]+/[\w.-]+)(/revision/(?P<rev>.+))?", "info"),
        ("POST", r"/api/models/(?P<repo>[\w.-]+/[\w.-]+)/preupload/(?P<rev>.+)", "preupload"),
        ("POST", r"/api/models/(?P<repo>[\w.-]+/[\w.-]+)/commit/(?P<rev>.+)", "commit"),
        ("POST", r"/api/models/(?P<repo>[\w.-]+/[\w.-]+)/branch/(?P<rev>.+)", "branch"),
        ("GET", r"/api/models/(?P<repo>[\w.-]+/[\w.-]+)/tree/(?P<rev>.+)", "tree"),
        ("POST", r"/(?P<repo>[\w.-]+/[\w.-]+)\.git/info/lfs/objects/batch", "batch"),
        ("PUT", r"/lfs/(?P<oid>\w+)", "put_large"),
        ("POST", r"/lfs/verify", "verify"),
        ("GET", r"/(?P<repo>[\w.-]+/[\w.-]+)/resolve/(?P<rev>[^/]+)/(?P<path>.+)", "resolve"),
    ]

    def log_message(self, *args):
        pass

    def handle_any(self):
        url = urlsplit(self.path)
        line = f"{self.command} {url.path}"
        self.query = parse_qs(url.query)
        length = int(self.headers.get("Content-Length") or 0)
        with self.hub.lock:
            self.hub.requests.append(line)
        fault = self.hub.fault(line)
        self.body = self.rfile.read(length // 2 if fault == "cut" else length)
        try:
            if fault == "cut":
                raise Cut
            if fault not in (None, "lost"):
                raise Refused(fault, "", "made to fail")
            for method, pattern, name in self.ROUTES:
                if method == self.command.replace("HEAD", "GET") and (match := re.fullmatch(pattern, url.path)):
                    groups = {key: value and unquote(value) for key, value in match.groupdict().items()}
                    with self.hub.lock:
                        answer = getattr(self, name)(**groups)
                    if fault == "lost":
                        raise Cut
                    return self.answer(200, *answer)
            raise Refused(404, "EntryNotFound", f"no such route: {line}")
        except Cut:
            self.close_connection = True
            self.connection.shutdown(2)
        except Refused as error:
            headers = {"X-Error-Message": error.body["error"], **({"X-Error-Code": error.code} if error.code else {})}
            self.answer(error.status, error.body, headers)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def answer(self, status, content, headers=()):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), **dict(headers)}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    # Who asks, and for what

    @property
    def user(self):
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and token not in USERS:
            raise Refused(401, "", "Invalid credentials in Authorization header")
        return USERS.get(token)

    def readable(self, repo_id):
        repo = self.hub.repos.get(repo_id)
        if repo is None or (repo.private and self.user != repo_id.split("/")[0]):
            raise Refused(404 if self.user else 401, "RepoNotFound", "Repository not found")
        return repo

    def writable(self, repo_id):
        repo = self.readable(repo_id)
        if self.user is None:
            raise Refused(401, "", "Invalid username or password.")
        if self.user != repo_id.split("/")[0] and "create_pr" not in self.query:
            raise Refused(403, "", "You don't have the rights to write")
        return repo

    # The routes

    def whoami(self):
        if self.user is None:
            raise Refused(401, "", "Invalid username or password.")
        return ({"type": "user", "name": self.user, "orgs": []},)

    def create_repo(self):
        asked = json.loads(self.body)
        if self.user is None:
            raise Refused(401, "", "Invalid username or password.")
        repo_id = f"{asked['organization'] or self.user}/{asked['name']}"
        if not repo_id.startswith(f"{self.user}/"):
            raise Refused(403, "", "You don't have the rights to create a model under this namespace")
        if repo_id in self.hub.repos:
            raise Refused(409, "", "You already created this model repo", url=f"{self.hub.url}/{repo_id}")
        self.hub.create(repo_id, private=bool(asked.get("private")))
        return ({"url": f"{self.hub.url}/{repo_id}"},)

    def validate(self):
        if errors := check_card(json.loads(self.body)["content"]):
            raise Refused(400, "", "Invalid metadata", errors=[{"message": error} for error in errors], warnings=[])
        return ({"errors": [], "warnings": []},)

    def info(self, repo, rev):
        found = self.readable(repo)
        oid = found.resolve(rev or "main")
        siblings = [{"rfilename": path} for path in found.commits[oid]]
        return ({"id": repo, "sha": oid, "private": found.private, "siblings": siblings, "tags": []},)

    def preupload(self, repo, rev):
        here = self.writable(repo)
        files = here.commits[here.resolve(rev)]
        asked = [file["path"] for file in json.loads(self.body)["files"]]
        modes = {path: "lfs" if path.endswith(LARGE) else "regular" for path in asked}
        answer = [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes.items()]
        for file in answer:
            if file["path"] in files:
                file["oid"] = _etag(file["path"], files[file["path"]])
        return ({"files": answer},)

    def batch(self, repo):
        self.readable(repo)
        objects = json.loads(self.body)["objects"]
        for each in objects:
            if each["oid"] not in self.hub.large:
                href = {"upload": f"{self.hub.url}/lfs/{each['oid']}", "verify": f"{self.hub.url}/lfs/verify"}
                each["actions"] = {name: {"href": address} for name, address in href.items()}
        return {"transfer": "basic", "objects": objects}, {"Content-Type": "application/vnd.git-lfs+json"}

    def put_large(self, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refused(400, "", "the content is not that of the digest")
        self.hub.large[oid] = self.body
        return ({},)

    def verify(self):
        asked = json.loads(self.body)
        if len(self.hub.large.get(asked["oid"], b"")) != asked["size"]:
            raise Refused(404, "", "the object is missing or of another size")
        return ({},)

    def branch(self, repo, rev):
        found = self.writable(repo)
        if rev in found.refs:
            raise Refused(409, "", "Reference already exists")
        found.refs[rev] = found.refs["main"]
        return ({},)

    def tree(self, repo, rev):
        found = self.readable(repo)
        files = found.commits[found.resolve(rev)]
        return ([{"type": "file", "path": path, "size": len(files[path]), "oid": "0" * 40} for path in files],)

    def commit(self, repo, rev):
        found = self.writable(repo)
        files, message = dict(found.commits[found.resolve(rev)]), ""
        for line in self.body.decode().splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "header":
                message = value["summary"]
            elif operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                if value["oid"] not in self.hub.large:
                    raise Refused(400, "", f"{value['path']} was not uploaded")
                files[value["path"]] = self.hub.large[value["oid"]]
            elif operation["key"] == "deletedFile":
                del files[value["path"]]
        answer = {"pullRequestUrl": None}
        if "create_pr" in self.query:
            number = sum(ref.startswith("refs/pr/") for ref in found.refs) + 1
            rev, answer["pullRequestUrl"] = f"refs/pr/{number}", f"{self.hub.url}/{repo}/discussions/{number}"
        oid = found.commit(rev, files, message)
        return ({**answer, "commitOid": oid, "commitUrl": f"{self.hub.url}/{repo}/commit/{oid}"},)

    def resolve(self, repo, rev, path):
        found = self.readable(repo)
        if found.gated and self.user != repo.split("/")[0]:
            raise Refused(403 if self.user else 401, "GatedRepo", "Access to this model is restricted")
        oid = found.resolve(rev)
        if path not in found.commits[oid]:
            raise Refused(404, "EntryNotFound", "Entry not found")
        content = found.commits[oid][path]
        return content, {"ETag": f'"{_etag(path, content)}"', "X-Repo-Commit": oid}
