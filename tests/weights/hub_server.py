"""A small Hugging Face hub on loopback, with mistakes on request."""

import hashlib
import http.server
import threading
import urllib.parse

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """Serves /OWNER/NAME/resolve/REVISION/FILE as the real one does.

    Attributes:
      files: bytes by repository and name.
      revisions: the revisions that every repository has.
      answers: for (repository, name), what to do instead: a function of the handler.
      requests: (method, path, headers) of each request.
    """

    def __init__(self):
        self.files, self.answers, self.requests = {}, {}, []
        self.revisions = {"main", COMMIT}

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(handler):  # noqa: N805
                self._answer(handler)

            def do_HEAD(handler):  # noqa: N805
                self._answer(handler)

            def log_message(self, *args):
                del args

        self._http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,))
        self._thread.start()

    @property
    def port(self):
        return self._http.server_port

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def close(self):
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()

    def put(self, repository, folder):
        for path in folder.iterdir():
            self.files[repository, path.name] = path.read_bytes()

    def names(self, method):
        """The names of the files that were asked for so."""
        return [x[1].rpartition("/")[2] for x in self.requests if x[0] == method]

    def redirect(self, repository, file):
        """Serves a large file from another host, as the real one does."""
        content = self.files[repository, file]
        where = f"http://localhost:{self.port}/{repository}/cdn/{COMMIT}/{file}?Key=s3"
        headers = {
            "Location": where,
            "X-Linked-Size": str(len(content)),
            "X-Linked-Etag": f'"{hashlib.sha256(content).hexdigest()}"',
        }
        self.answers[repository, file] = lambda handler: reply(
            handler, b"", status=302, etag="of-the-pointer", **headers
        )

    def _answer(self, handler):
        path = urllib.parse.urlsplit(handler.path).path
        if path.startswith("/api/"):  # which huggingface_hub asks for its user agent
            return fail(handler, 404, "EntryNotFound")
        self.requests.append((handler.command, handler.path, dict(handler.headers)))
        owner, name, kind, revision, file = path.strip("/").split("/", 4)
        repository, revision = f"{owner}/{name}", urllib.parse.unquote(revision)
        if kind == "cdn":
            return reply(handler, self.files[repository, file])
        if answer := self.answers.get((repository, file)):
            return answer(handler)
        if repository not in {x[0] for x in self.files}:
            return fail(handler, 401, "RepoNotFound")
        if revision not in self.revisions:
            return fail(handler, 404, "RevisionNotFound")
        if (repository, file) not in self.files:
            return fail(handler, 404, "EntryNotFound")
        return reply(handler, self.files[repository, file])


def fail(handler, status, code):
    reply(handler, b"", status=status, **{"X-Error-Code": code})


def reply(handler, content, *, status=200, sent=None, etag=None, **headers):
    """Answers with a file; `sent` is what arrives of it, where the line is cut."""
    sha = hashlib.sha256(content).hexdigest()
    handler.send_response(status)
    headers = {
        "ETag": f'"{etag or sha}"',
        "X-Repo-Commit": COMMIT,
        "Content-Length": str(len(content)),
        **headers,
    }
    for name, value in headers.items():
        handler.send_header(name, value)
    handler.end_headers()
    if handler.command == "GET":
        handler.wfile.write(content if sent is None else sent)
