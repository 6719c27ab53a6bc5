"""A stand-in for Google Cloud Storage: what TensorStore asks of its JSON API, and fsspec's part.

Objects are in fsspec's memory file system. The path gs://BUCKET/NAME that epath hands to fsspec
goes straight there; TensorStore comes through HTTP.
"""

import contextlib
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

from etils import epath
from fsspec.implementations.memory import MemoryFileSystem


class Buckets(MemoryFileSystem):
    """Addresses gs://BUCKET/NAME, in memory; folders are there while something is in them."""

    protocol = ("gs", "gcs")
    store, pseudo_dirs = {}, [""]

    def __init__(self, **_):
        super().__init__()

    @classmethod
    def _strip_protocol(cls, path):
        return MemoryFileSystem._strip_protocol(str(path).replace("gs://", "memory://"))

    def mkdir(self, path, create_parents=True, **_):
        """An object store has no folders."""

    def makedirs(self, path, exist_ok=False):
        """An object store has no folders."""


class Handler(BaseHTTPRequestHandler):
    """Reading, writing, deleting and listing of objects."""

    lock = threading.Lock()
    generation = 1

    def log_message(self, *_):
        pass

    def _reply(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _object(self):
        """The bucket, the name of the object if there is one, and the parameters."""
        url = urlsplit(self.path)
        query = {key: value[0] for key, value in parse_qs(url.query).items()}
        parts = url.path.split("/b/", 1)[-1].split("/o", 1)
        name = query.get("name") or unquote(parts[1].strip("/")) if len(parts) > 1 else ""
        return parts[0], name, query

    def _described(self, bucket, name):
        file = Buckets.store[f"/{bucket}/{name}"]
        return {
            "name": name,
            "bucket": bucket,
            "generation": str(getattr(file, "generation", 1)),
            "size": str(len(file.getvalue())),
            "updated": "2026-11-28T00:00:00Z",
            "timeCreated": "2026-11-28T00:00:00Z",
        }

    def do_GET(self):
        bucket, name, query = self._object()
        with self.lock:
            if "/b/" not in self.path:
                self._reply(404)
            elif not name:
                start = f"/{bucket}/{query.get('prefix', '')}"
                names = sorted(n[len(bucket) + 2 :] for n in Buckets.store if n.startswith(start))
                body = {"items": [self._described(bucket, n) for n in names]}
                self._reply(200, json.dumps(body).encode())
            elif f"/{bucket}/{name}" not in Buckets.store:
                self._reply(404)
            elif query.get("alt") == "media":
                file = Buckets.store[f"/{bucket}/{name}"]
                data, generation = file.getvalue(), str(getattr(file, "generation", 1))
                if query.get("ifGenerationNotMatch") == generation:
                    self._reply(304)
                elif "Range" in self.headers:
                    first, last = self.headers["Range"].removeprefix("bytes=").split("-")
                    end = int(last) + 1 if last else len(data)
                    self._reply(
                        206,
                        data[int(first) : end],
                        x_goog_generation=generation,
                        Content_Range=f"bytes {first}-{min(end, len(data)) - 1}/{len(data)}",
                    )
                else:
                    self._reply(200, data, x_goog_generation=generation)
            else:
                self._reply(200, json.dumps(self._described(bucket, name)).encode())

    def do_POST(self):
        bucket, name, query = self._object()
        data = self.rfile.read(int(self.headers["Content-Length"]))
        with self.lock:
            there = Buckets.store.get(f"/{bucket}/{name}")
            generation = getattr(there, "generation", 1) if there is not None else 0
            if query.get("ifGenerationMatch") not in (None, str(generation)):
                self._reply(412)
                return
            with Buckets().open(f"gs://{bucket}/{name}", "wb") as file:
                file.write(data)
            Handler.generation += 1
            Buckets.store[f"/{bucket}/{name}"].generation = Handler.generation
            self._reply(200, json.dumps(self._described(bucket, name)).encode())

    def do_DELETE(self):
        bucket, name, _ = self._object()
        with self.lock:
            found = Buckets.store.pop(f"/{bucket}/{name}", None)
            self._reply(204 if found is not None else 404)


@contextlib.contextmanager
def serving(environment):
    """Serves the buckets; yields the fsspec file system. `environment` is pytest's monkeypatch."""
    server = ThreadingHTTPServer(("localhost", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"localhost:{server.server_port}"
    environment.setenv("TENSORSTORE_GCS_HTTP_URL", f"http://{address}")
    environment.setenv("GCE_METADATA_ROOT", address)
    for name in Buckets.protocol:
        environment.setitem(sys.modules["fsspec.registry"]._registry, name, Buckets)
    Buckets.store.clear()
    try:
        yield Buckets()
    finally:
        epath.backend.fsspec_backend._get_filesystem.cache_clear()
        server.shutdown()
        server.server_close()
