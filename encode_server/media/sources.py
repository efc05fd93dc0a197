"""Where media come from: data URIs, bare base64, http(s) URLs, files."""

from __future__ import annotations

import asyncio
import re
import ssl
from collections.abc import Sequence
from concurrent.futures import Executor
from pathlib import Path

from encode_server.errors import BadMedia
from encode_server.media.files import FileRoots
from encode_server.media.inline import decode_inline
from encode_server.media.limits import MediaLimits
from encode_server.media.policy import UrlPolicy
from encode_server.media.web import Resolver, WebFetcher
from encode_server.runtime.charge import Charge, free
from encode_server.runtime.pools import Pace, run_sized


class MediaSource:
    """Turns the `url` of a media item into the bytes it stands for.

    `allow`: which http(s) hosts may be reached, in the grammar of `UrlPolicy`. `file_roots`: directories below which
    files may be read, by file:// URL or by a plain absolute path that begins with one of them; none by default.
    `executor` runs what would block the loop. `resolve` and `ssl_context` replace the system's name resolution and
    the certificates trusted.
    """

    def __init__(
        self,
        allow: Sequence[str],
        file_roots: Sequence[str | Path],
        limits: MediaLimits,
        executor: Executor,
        *,
        resolve: Resolver | None = None,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        """Raises `ValueError` for an entry of `allow` that means nothing, or a root that is no directory."""
        self._files = FileRoots(file_roots)
        self._web = WebFetcher(UrlPolicy(allow), limits, executor, resolve=resolve, ssl_context=ssl_context)
        self._limits = limits
        self._executor = executor

    async def fetch(self, source: str | tuple[str, ...], charge: Charge = free, client: str = "") -> bytes:
        """The compressed bytes of the media that `source` names, at least one; each piece is charged before it is
        kept. `source`: a text, or the pieces of a long one. `client`: who asks, for fairness.

        Raises `Forbidden` for a source that the options do not allow, `TooLarge` beyond a limit, and `BadMedia` for a
        source that is malformed, cannot be reached, or doesn't arrive in time. Raises what `charge` raises.
        """
        pieces = (source,) if isinstance(source, str) else source
        url = pieces[0]  # a text in pieces is longer than any URL may be: what is refused is its beginning
        loop = asyncio.get_running_loop()
        scheme = re.match(r"\s*([a-zA-Z][a-zA-Z0-9+.-]{0,30}):", url)
        name = scheme[1].lower() if scheme else ""
        if name in ("http", "https"):
            body = await self._web.get(url.strip(), charge, client)
            return await loop.run_in_executor(self._executor, body.take)
        if name == "file" or self._files.is_path(url):
            media = await loop.run_in_executor(self._executor, self._files.read, url, self._limits)
            await charge(len(media))
            return media
        if name not in ("", "data"):
            raise BadMedia(f"the scheme {name}: is not supported, expected http, https, data or file")
        return await self._inline(pieces, charge)

    async def _inline(self, pieces: tuple[str, ...], charge: Charge) -> bytes:
        size = sum(map(len, pieces))
        await charge(size // 4 * 3)  # beside the text, which the request keeps
        # Percent signs are decoded eight times as slowly.
        weight = size * (8 if any("%" in piece for piece in pieces) else 1)
        return await run_sized(self._executor, Pace.BASE64, weight, decode_inline, pieces, self._limits)

    async def aclose(self) -> None:
        """Close the connections. The executor stays its owner's."""
        await self._web.aclose()
