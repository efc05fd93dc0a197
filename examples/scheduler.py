"""A prefill scheduler in 30 lines: every step runs the requests whose embeddings are here, and waits for none.

usage: scheduler.py PICTURE ENCODER_URL [ENCODER_URL …]
"""

import asyncio
import sys
from pathlib import Path

from encode_server.client import EmbeddingReceiver, EncoderPool


async def schedule(requests: dict[str, list[Path]], encoders: list[str]) -> dict[str, tuple[int, int]]:
    """Prefill each request once its images are encoded; the shapes that were prefilled, by request."""
    prefilled = {}
    async with EmbeddingReceiver() as receiver, EncoderPool(encoders, receiver=receiver) as pool:
        encodings = {
            req_id: asyncio.create_task(pool.encode(images, "image", req_id=req_id, timeout=30))
            for req_id, images in requests.items()
        }
        while encodings:  # a cancelled request: encodings.pop(req_id).cancel()
            for req_id in [req_id for req_id, encoding in encodings.items() if encoding.done()]:
                try:
                    embedding = encodings.pop(req_id).result()
                    prefilled[req_id] = embedding.shape  # here the model would run, on embedding.torch()
                except Exception as error:
                    print(f"{req_id} failed: {error}")
            await asyncio.sleep(0.001)  # the step of a batch that decodes meanwhile
    return prefilled


if __name__ == "__main__":
    picture, *urls = sys.argv[1:]
    print(asyncio.run(schedule({f"request-{i}": [Path(picture)] * (i + 1) for i in range(3)}, urls)))
