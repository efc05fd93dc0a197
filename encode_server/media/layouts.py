"""Channel layouts that PyAV releases twice.

FFmpeg describes most layouts by a bit mask or a count. A few are a list of channels on the heap, such as that of a MOV
whose `chan` box names every channel. PyAV copies a layout without copying its list, so that both the copy and its
origin release the list, and the process crashes sometime later. These functions keep such files from doing so.
"""

from __future__ import annotations

import ctypes
import re
from typing import Any

from encode_server.errors import BadMedia

# How FFmpeg describes a list of channels. Masks without a name of their own are described alike.
_LISTED = re.compile(r"\d+ channels \(")


def replace_listed(context: Any) -> None:
    """Give a decoder that has not been opened a count of channels in place of a list.

    Decoders that know nothing else about their channels, such as PCM, then set the count on their frames. The order of
    the channels is lost, which a mean of all channels does not need.
    """
    layout = context.layout
    # A list of ambisonic channels reads like an ambisonic layout.
    if _LISTED.match(layout.name) or layout.name.startswith("ambisonic"):
        # PyAV overwrites the context's copy without releasing it, so `layout` alone releases the list.
        context.layout = f"{layout.nb_channels}C"


def refuse_listed(frame: Any) -> None:
    """Raise `BadMedia` if the layout of this decoded audio frame is a list of channels.

    Few decoders make such a list themselves: AAC's successor USAC does.
    """
    layout = frame.layout
    if _LISTED.match(layout.name):
        # A reference that is never given back: the frame alone then releases the list. It costs some 100 bytes.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(layout))
        raise BadMedia("the audio lists its channels one by one, expected a standard layout such as 5.1 or 7.1")
