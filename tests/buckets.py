"""A server of Google's storage protocol on this machine: python tests/buckets.py PORT."""

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from http import HTTPStatus

BUCKET = "bucket"


def serve(port: int) -> None:
    """Serve one empty bucket, which lives in memory."""
    from gcp_storage_emulator.handlers import objects

    plain = objects.download

    def download(request, response, storage, *args, **kwargs):
        """The emulator leaves out the generation, which TensorStore needs to write a manifest."""
        plain(request, response, storage, *args, **kwargs)
        if response.status != HTTPStatus.NOT_FOUND:
            found = storage.get_file_obj(request.params["bucket_name"], request.params["object_id"])
            response["x-goog-generation"] = found["generation"]

    objects.download = download
    from gcp_storage_emulator import server  # which makes a table of such functions

    server.create_server("127.0.0.1", port, in_memory=True, default_bucket=BUCKET).run()


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
def running(port: int) -> Iterator[subprocess.Popen]:
    """A server in a process of its own."""
    process = subprocess.Popen(
        [sys.executable, __file__, str(port)],
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
    serve(int(sys.argv[1]))
