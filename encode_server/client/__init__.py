"""What a prefill scheduler imports: `EncodeClient` asks one encoder for embeddings, `EncoderPool` asks several,
`EmbeddingReceiver` takes the pushed ones.

Importing this package costs no torch, httpx or numpy; each is imported where it is first needed.

    async with EmbeddingReceiver() as receiver, EncodeClient("http://encoder:30000") as client:
        arrival = asyncio.create_task(receiver.receive("r1"))
        await client.push([url], "image", prefill_host=receiver.host, embedding_port=receiver.port, req_id="r1")
        embedding = await arrival
"""

from encode_server.client.embedding import Embedding
from encode_server.client.errors import (
    ClientError,
    EncodeServerError,
    ProtocolError,
    ReceiverClosed,
    ServerUnreachable,
)
from encode_server.client.http import EncodeClient, Health
from encode_server.client.media import Item, Media
from encode_server.client.pool import EncoderPool, EncoderState
from encode_server.client.receiver import EmbeddingReceiver
from encode_server.wire.answers import Delivered
from encode_server.wire.frames import ItemInfo
from encode_server.wire.modality import Modality
from encode_server.wire.pools import Pool

__all__ = [
    "ClientError",
    "Delivered",
    "Embedding",
    "EmbeddingReceiver",
    "EncodeClient",
    "EncodeServerError",
    "EncoderPool",
    "EncoderState",
    "Health",
    "Item",
    "ItemInfo",
    "Media",
    "Modality",
    "Pool",
    "ProtocolError",
    "ReceiverClosed",
    "ServerUnreachable",
]
