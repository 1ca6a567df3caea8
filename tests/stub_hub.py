"""The part of the Hugging Face hub that publishing and loading need, over plain HTTP and in memory: repositories with branches and
commits, uploads as one commit of NDJSON with large files by LFS, listings by hash, downloads."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_" + "a" * 24


def sha(number):
    return hashlib.sha1(str(number).encode()).hexdigest()


class StubHub(ThreadingHTTPServer):
    """A hub that answers until `close`.

    Attributes:
        repositories: {"models/org/name": {"private": ..., "branches": {name: [commits, newest first]}}}; a commit is
            {"id", "title", "files": {path: (content, whether by LFS)}}.
        writes: (method, path) of every request that would change something.
        hook: called with (method, path, payload) before a request is answered. It may return a status to answer with instead, or
            "drop" to close the connection without an answer, or "drop after" to do what was asked and then close it.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories, self.objects, self.writes, self.hook, self.lock = {}, {}, [], None, threading.RLock()
        self.commits = 0
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def close(self):
        self.shutdown()
        self.server_close()

    def commit(self, key, branch, title, files):
        """Put a commit on a branch, as anyone with a browser could."""
        self.commits += 1
        made = {"id": sha(self.commits), "title": title, "files": files}
        self.repositories[key]["branches"].setdefault(branch, []).insert(0, made)
        return made

    def create(self, key, private=False):
        self.repositories[key] = {"private": private, "branches": {}}
        self.commit(key, "main", "initial commit", {".gitattributes": (b"*.safetensors filter=lfs\n", False)})

    def files(self, key, branch):
        """{path: content} of the newest commit, without what the hub put there itself."""
        return {path: content for path, (content, _) in self.repositories[key]["branches"][branch][0]["files"].items()
                if path != ".gitattributes"}


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        self.answer("GET")

    def do_HEAD(self):
        self.answer("HEAD")

    def do_POST(self):
        self.answer("POST")

    def do_PUT(self):
        self.answer("PUT")

    def answer(self, method):
        parts = urlsplit(self.path)
        path, body = unquote(parts.path), self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = self.chunks()
        hub = self.server
        changing = method == "PUT" or bool(re.search(r"/(create|branch/[^/]+|commit/[^/]+)$", path))
        with hub.lock:
            if changing:
                hub.writes.append((method, path))
            told = hub.hook(method, path, body) if hub.hook else None
            if isinstance(told, int):
                return self.reply({"error": f"told to say {told}"}, told)
            if told == "drop":
                self.close_connection = True
                return None
            if told == "drop after":
                self.close_connection, self.wfile = True, open("/dev/null", "wb")  # noqa: SIM115
            token = self.headers.get("Authorization", "").removeprefix("Bearer ")
            if token and token != TOKEN:
                return self.reply({"error": "Invalid credentials in Authorization header"}, 401)
            if (changing and method != "PUT" or path == "/api/whoami-v2") and not token:
                return self.reply({"error": "log in first"}, 401)
            return self.route(method, path, parse_qs(parts.query), body, token)

    def chunks(self):
        found = b""
        while size := int(self.rfile.readline(), 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return found

    def route(self, method, path, query, body, token):
        hub = self.server
        if path == "/api/whoami-v2":
            return self.reply({"type": "user", "name": "tester", "orgs": []})
        if path == "/api/validate-yaml":
            bad = re.search(r"^license: nonsense$", json.loads(body)["content"], re.M)
            return self.reply({"errors": [{"message": '"license" must be one of [mit, ...]'}] if bad else [], "warnings": []},
                              400 if bad else 200)
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            key = f"{asked.get('type', 'model')}s/{name}"
            if asked["organization"] == "others":
                return self.reply({"error": "You don't have the rights to create a repository under this namespace"}, 403)
            if key in hub.repositories:
                return self.reply({"error": "You already created this repo"}, 409)
            hub.create(key, asked.get("visibility") == "private" or bool(asked.get("private")))
            return self.reply({"url": f"{hub.url}/{'' if key.startswith('models') else 'spaces/'}{name}", "name": name})
        if match := re.fullmatch(r"/lfs/(\w+)", path):
            if hashlib.sha256(body).hexdigest() != match[1]:
                return self.reply({"error": "other content than announced"}, 400)
            hub.objects[match[1]] = body
            return self.reply({})
        if match := re.fullmatch(r"/(spaces/)?([\w-]+/[\w.-]+)\.git/info/lfs/objects/batch", path):
            return self.reply({"transfer": "basic", "objects": [
                {**one, **({} if one["oid"] in hub.objects else {"actions": {"upload": {"href": f"{hub.url}/lfs/{one['oid']}"}}})}
                for one in json.loads(body)["objects"]]})
        if match := re.fullmatch(r"/api/((?:models|spaces|datasets)/[\w-]+/[\w.-]+)"
                                 r"(?:/(refs|commits|tree|branch|preupload|commit|revision)(?:/(.*))?)?", path):
            return self.repository(match[1], match[2] or "revision", match[3] or "main", body, token)
        if match := re.fullmatch(r"/(?!api/)([\w-]+/[\w.-]+)/resolve/([^/]+)/(.+)", path):
            return self.download(f"models/{match[1]}", match[2], match[3], method, token)
        return self.reply({"error": f"the stub has no {method} {path}"}, 501)

    def repository(self, key, what, rest, body, token):
        hub = self.server
        found = hub.repositories.get(key)
        if found is None or (found["private"] and not token):
            return self.reply({"error": "Repository not found"}, 401 if not token else 404, {"X-Error-Code": "RepoNotFound"})
        branches = found["branches"]
        if what == "refs":
            return self.reply({"branches": [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": commits[0]["id"]}
                                            for name, commits in branches.items()], "converts": [], "tags": []})
        if what == "branch":
            start = json.loads(body).get("startingPoint") or branches["main"][0]["id"]
            if rest in branches:
                return self.reply({"error": "Reference already exists"}, 409)
            origin = next(commits for commits in branches.values() if any(one["id"] == start for one in commits))
            branches[rest] = origin[[one["id"] for one in origin].index(start):]
            return self.reply({})
        revision = rest.split("/")[0]
        commits = branches.get(revision) or next((many[place:] for many in branches.values() for place, one in enumerate(many)
                                                  if one["id"] == revision), None)
        if commits is None:
            return self.reply({"error": f"Invalid rev id: {revision}"}, 404, {"X-Error-Code": "RevisionNotFound"})
        files = commits[0]["files"]
        if what == "revision":
            return self.reply({"id": key.split("/", 1)[1], "sha": commits[0]["id"], "private": found["private"], "tags": [],
                               "downloads": 0, "likes": 0, "siblings": [{"rfilename": name} for name in files]})
        if what == "commits":
            return self.reply([{"id": one["id"], "title": one["title"], "message": "", "authors": [{"user": "tester"}],
                                "date": "2026-01-01T00:00:00.000Z"} for one in commits])
        if what == "tree":
            return self.reply([self.entry(name, *file) for name, file in files.items()])
        if what == "preupload":
            return self.reply({"files": [{"path": one["path"], "shouldIgnore": False,
                                          "uploadMode": "lfs" if one["path"].endswith((".safetensors", ".gguf")) else "regular",
                                          **({"oid": self.entry("", *files[one["path"]])["oid"]} if one["path"] in files else {})}
                                         for one in json.loads(body)["files"]]})
        lines = [json.loads(line) for line in body.splitlines()]
        files = dict(files)
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = (base64.b64decode(value["content"]), False)
            elif line["key"] == "lfsFile":
                files[value["path"]] = (hub.objects[value["oid"]], True)
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        made = hub.commit(key, rest, next(line["value"]["summary"] for line in lines if line["key"] == "header"), files)
        return self.reply({"commitUrl": f"{hub.url}/{key}/commit/{made['id']}", "commitOid": made["id"], "success": True})

    def entry(self, name, content, large):
        blob = content
        lfs = {}
        if large:
            oid = hashlib.sha256(content).hexdigest()
            blob = f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {len(content)}\n".encode()
            lfs = {"lfs": {"oid": oid, "size": len(content), "pointerSize": len(blob)}}
        return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest(), **lfs}

    def download(self, key, revision, name, method, token):
        found = self.server.repositories.get(key)
        if found is None or (found["private"] and not token):
            return self.reply({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        commits = found["branches"].get(revision) or [one for many in found["branches"].values() for one in many if one["id"] == revision]
        if not commits:
            return self.reply({"error": "no such revision"}, 404, {"X-Error-Code": "RevisionNotFound"})
        known = {"X-Repo-Commit": commits[0]["id"]}
        if name not in commits[0]["files"]:
            return self.reply({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound", **known})
        content, large = commits[0]["files"][name]
        entry = self.entry(name, content, large)
        etag = entry["lfs"]["oid"] if large else entry["oid"]
        return self.reply(content, 200, {"ETag": f'"{etag}"', **known}, body=method != "HEAD")

    def reply(self, content, status=200, headers=None, body=True):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": len(data), **(headers or {})}.items():
            self.send_header(name, str(value))
        if isinstance(content, dict) and "error" in content:
            self.send_header("X-Error-Message", content["error"])
        self.end_headers()
        if body:
            self.wfile.write(data)
