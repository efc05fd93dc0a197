"""`encode-server support-bundle URL`: one file with what a report of a fault needs.

All of it is what the server shows anyway: settings without keys, no media, no queries of URLs. The end of a log is
taken as it is, and the server's log holds none of these either.
"""

from __future__ import annotations

import io
import json
import platform
import tarfile
import time
from pathlib import Path
from typing import Any

import httpx

from encode_server import __version__
from encode_server.errors import StartupError
from encode_server.telemetry.history import without_queries

PATHS = ("server_info", "status", "health", "readyz", "metrics")
TIMEOUT_S = 10.0
LOG_BYTES = 4 << 20  # of the log's end


def run(options: dict[str, Any]) -> int:
    """Write the bundle and say what is in it; 1 when the server gave nothing, else 0. Raises StartupError."""
    target = options["output"] or Path(time.strftime("encode-server-%Y%m%d-%H%M%S.tar.gz"))
    files = collect(options["url"], options["api_key"])
    given = sum(name != "bundle.json" and not name.endswith(".error") for name in files)
    if options["log"] is not None:
        files["log-tail.txt"] = _tail(options["log"])
    try:
        write(target, files)
    except OSError as error:
        raise StartupError(f"{target}: {error.strerror}") from None
    print(f"wrote {target}: {', '.join(sorted(files))}")
    return 0 if given else 1


def collect(url: str, api_key: str | None) -> dict[str, bytes]:
    """What the server says, by file name; `NAME.error` where it says nothing, and why."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    about = {
        "bundle_of": __version__,
        "python": platform.python_version(),
        "at": time.time(),
        "url": without_queries(url),
    }
    files = {"bundle.json": json.dumps(about, indent=1).encode()}
    with httpx.Client(headers=headers, timeout=TIMEOUT_S) as client:
        for path in PATHS:
            ending = "txt" if path == "metrics" else "json"
            try:
                answer = client.get(f"{url.rstrip('/')}/{path}")
            except httpx.InvalidURL as error:
                raise StartupError(f"{url!r} is not the URL of a server: {error}") from None
            except httpx.HTTPError as error:
                files[f"{path}.error"] = f"{type(error).__name__}: {error}".encode()
                continue
            if answer.status_code in (200, 503):  # 503 says why the server is not well
                files[f"{path}.{ending}"] = answer.content
            else:
                files[f"{path}.error"] = f"{answer.status_code}: {answer.text[:1000]}".encode()
    return files


def write(target: Path, files: dict[str, bytes]) -> None:
    """A tar.gz of the files. Raises OSError."""
    with tarfile.open(target, "w:gz") as archive:
        for name, content in sorted(files.items()):
            entry = tarfile.TarInfo(f"encode-server/{name}")
            entry.size, entry.mtime, entry.mode = len(content), int(time.time()), 0o644
            archive.addfile(entry, io.BytesIO(content))


def _tail(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - LOG_BYTES))
            return file.read()
    except OSError as error:
        raise StartupError(f"--log: {path}: {error.strerror}") from None
