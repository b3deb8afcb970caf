"""A folder of this machine as a bucket of Google Cloud Storage that answers late.

    python -m benchmarks.slow_bucket FOLDER --port=9023 --delay=0.03

serves the files of FOLDER, for reading, as gs://BUCKET/NAME for any BUCKET, to a process with
STORAGE_EMULATOR_HOST=http://127.0.0.1:9023 and FSSPEC_GCS_TOKEN=anon. Every request is answered
after the delay, and any number of them wait at a time.
"""

import argparse
import asyncio
import datetime
import pathlib
from typing import Any

from aiohttp import web


def serve(root: pathlib.Path, port: int, delay: float) -> None:
    """Serves a folder until the process ends."""

    async def download(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(delay)
        path = root / request.match_info["name"]
        return web.FileResponse(path) if path.is_file() else web.Response(status=404)

    async def information(request: web.Request) -> web.Response:
        await asyncio.sleep(delay)
        path = root / request.match_info["name"]
        return web.json_response(_entry(root, path)) if path.is_file() else web.Response(status=404)

    async def listing(request: web.Request) -> web.Response:
        await asyncio.sleep(delay)
        folder = root / request.query.get("prefix", "")
        deep = not request.query.get("delimiter")
        found = sorted(folder.rglob("*") if deep else folder.iterdir()) if folder.is_dir() else []
        items = [_entry(root, path) for path in found if path.is_file()]
        folders = [] if deep else [path for path in found if path.is_dir()]
        prefixes = [f"{path.relative_to(root)}/" for path in folders]
        return web.json_response({"items": items, "prefixes": prefixes})

    app = web.Application()
    app.router.add_get("/download/storage/v1/b/{bucket}/o/{name:.+}", download)
    app.router.add_get("/storage/v1/b/{bucket}/o/{name:.+}", information)
    app.router.add_get("/storage/v1/b/{bucket}/o", listing)
    web.run_app(app, host="127.0.0.1", port=port, print=None, access_log=None, backlog=1024)


def _entry(root: pathlib.Path, path: pathlib.Path) -> dict[str, Any]:
    """Returns what the service says of an object."""
    stat = path.stat()
    written = datetime.datetime.fromtimestamp(stat.st_mtime, datetime.UTC)
    return {
        "name": str(path.relative_to(root)),
        "size": str(stat.st_size),
        "generation": str(stat.st_mtime_ns),
        "timeCreated": written.strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--port", type=int, default=9023, help="(default: 9023)")
    parser.add_argument("--delay", type=float, default=0.03, help="in seconds (default: 0.03)")
    args = parser.parse_args()
    serve(args.folder, args.port, args.delay)


if __name__ == "__main__":
    main()
