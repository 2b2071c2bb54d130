"""A server of Google's storage protocol on this machine."""

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from http import HTTPStatus
from threading import Lock

BUCKET = "bucket"


def serve(port: int, folder: str | None = None, delay: float = 0.0) -> None:
    """Serve one bucket.

    Args:
      port: of this machine.
      folder: where objects are kept, for another server to go on with; None: in memory.
      delay: seconds that each request waits, beside others.
    """
    from gcp_storage_emulator.handlers import objects

    plain = objects.download

    def download(request, response, storage, *args, **kwargs):
        """The emulator leaves out the generation, which TensorStore needs to write a manifest."""
        plain(request, response, storage, *args, **kwargs)
        if response.status != HTTPStatus.NOT_FOUND:
            found = storage.get_file_obj(request.params["bucket_name"], request.params["object_id"])
            response["x-goog-generation"] = found["generation"]

    def conditional(change):
        """The emulator ignores the precondition of a write, which Google's service keeps."""

        def checked(request, response, storage, *args, **kwargs):
            bucket, name = request.params["bucket_name"], request.params.get("object_id")
            name = name or (request.query.get("name") or [(request.data or {})["meta"]["name"]])[0]
            has = storage.objects.get(bucket, {}).get(name, {"generation": "0"})["generation"]
            if request.query.get("ifGenerationMatch", [has]) == [has]:
                return change(request, response, storage, *args, **kwargs)
            response.status = HTTPStatus.PRECONDITION_FAILED
            request.data  # noqa: B018, which has to be read before the connection is closed

        return checked

    objects.download = download
    objects.insert, objects.delete = conditional(objects.insert), conditional(objects.delete)
    from gcp_storage_emulator import server, storage  # which has a table of such functions

    write, handle, one_at_a_time = storage._FileStore.write_bytes, server.Router.handle, Lock()

    def whole(self, name, content):
        """The emulator's list of objects would be cut off by a kill."""
        if folder is None:
            return write(self, name, content)
        write(self, f"{name}.new", content)
        self._disk_path(f"{name}.new").replace(self._disk_path(name))

    def late(self, method):
        time.sleep(delay)
        with one_at_a_time:
            handle(self, method)

    storage._FileStore.write_bytes, server.Router.handle = whole, late
    server.server.HTTPServer = server.server.ThreadingHTTPServer
    options = {"in_memory": folder is None, "data_dir": folder, "default_bucket": BUCKET}
    server.create_server("127.0.0.1", port, **options).run()


def environment(port: int) -> dict[str, str]:
    """The variables by which gcsfs and TensorStore find the server."""
    url = f"http://127.0.0.1:{port}"
    return {
        "STORAGE_EMULATOR_HOST": url,
        "TENSORSTORE_GCS_HTTP_URL": url,
        "CLOUD_STORAGE_EMULATOR_ENDPOINT": url,
        "GOOGLE_CLOUD_PROJECT": "test",
    }


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextlib.contextmanager
def running(port: int, folder: object = "", delay: float = 0.0) -> Iterator[subprocess.Popen]:
    """A server in a process of its own; the arguments are those of `serve`."""
    process = subprocess.Popen(
        [sys.executable, __file__, str(port), str(folder), str(delay)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={k: v for k, v in os.environ.items() if k not in environment(port)},
    )
    try:
        for _ in range(300):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/storage/v1/b/{BUCKET}", timeout=5)
                break
            time.sleep(0.1)
        yield process
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    serve(int(sys.argv[1]), sys.argv[2] or None, float(sys.argv[3]))
