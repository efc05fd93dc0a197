"""The certificate a server is started with."""

from __future__ import annotations

import ssl

from encode_server.errors import StartupError


def check_tls(certfile: str | None, keyfile: str | None) -> None:
    """Raises StartupError, one line, where uvicorn would show a traceback."""
    if (certfile is None) != (keyfile is None):
        raise StartupError("--ssl-certfile and --ssl-keyfile go together: one is missing")
    if certfile is not None:
        try:
            ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(certfile, keyfile)
        except (OSError, ssl.SSLError) as error:
            raise StartupError(f"--ssl-certfile, --ssl-keyfile: {error.strerror or error}") from None
