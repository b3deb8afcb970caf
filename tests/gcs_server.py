"""The emulator of Google Cloud Storage, as a process: python gcs_server.py PORT BUCKET.

gcp-storage-emulator alone answers one connection at a time, refuses some when many come at once,
and knows no generations. TensorStore needs them: it writes an object only if no other process has
written it since it was read.
"""

import http.server
import sys
import threading

from gcp_storage_emulator import server as emulator

_one_request = threading.Lock()


class Threads(http.server.ThreadingHTTPServer):
    request_queue_size = 512
    daemon_threads = True


def generation(request, storage) -> str:
    """Returns the generation of the object that a request names; "0" if there is none."""
    meta = request.data.get("meta", {}) if isinstance(request.data, dict) else {}
    named = request.params.get("object_id") or request.query.get("name", [meta.get("name")])[0]
    found = storage.objects.get(request.params.get("bucket_name"), {}).get(named, {})
    return str(found.get("generation", 0))


def knowing_generations(handler):
    def handle(request, response, storage, *args, **kwargs):
        request.data  # noqa: B018  # read from the network before other requests have to wait
        with _one_request:
            now = generation(request, storage)
            if request.query.get("ifGenerationMatch", [now])[0] != now:
                response.status = http.HTTPStatus.PRECONDITION_FAILED
            elif request.query.get("ifGenerationNotMatch", [""])[0] == now:
                response.status = http.HTTPStatus.NOT_MODIFIED
            else:
                response["x-goog-generation"] = now
                handler(request, response, storage, *args, **kwargs)

    return handle


if __name__ == "__main__":
    http.server.HTTPServer = Threads
    for _, handlers in emulator.HANDLERS:
        for method, handler in handlers.items():
            handlers[method] = knowing_generations(handler)
    emulator.create_server(
        "127.0.0.1", int(sys.argv[1]), in_memory=True, default_bucket=sys.argv[2]
    ).run()
