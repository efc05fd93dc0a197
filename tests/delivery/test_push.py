"""The PUSH sockets: order, memory, slow and dead destinations."""

import asyncio
import contextlib
import gc
import socket
import threading
import time
import weakref

import numpy as np
import pytest
import zmq
import zmq.asyncio

from encode_server.delivery import push as push_module
from encode_server.delivery.push import Pusher
from encode_server.errors import DeliveryFailed


@contextlib.contextmanager
def puller(context: zmq.asyncio.Context, port: int | None = None, **options: int):
    with context.socket(zmq.PULL) as receiver:
        for name, value in options.items():
            receiver.setsockopt(getattr(zmq, name), value)
        if port is None:
            port = receiver.bind_to_random_port("tcp://127.0.0.1")
        else:
            receiver.bind(f"tcp://127.0.0.1:{port}")
        yield receiver, f"tcp://127.0.0.1:{port}"


def run(scenario, timeout_s: float = 15.0):
    async def main():
        pusher = Pusher(timeout_s)
        context = zmq.asyncio.Context()
        try:
            return await asyncio.wait_for(scenario(pusher, context), 40)
        finally:
            pusher.close()
            context.destroy(linger=0)

    return asyncio.run(main())


async def until(condition):
    while not condition():  # noqa: ASYNC110 - libzmq's threads tell nobody
        await asyncio.sleep(0.02)


def free(port: int) -> bool:
    try:
        with socket.create_server(("127.0.0.1", port)):
            return True
    except OSError:
        return False


def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_messages_arrive_in_the_order_of_the_calls():
    async def scenario(pusher, context):
        with puller(context) as (receiver, endpoint):
            pushes = [
                asyncio.create_task(pusher.push(endpoint, [b"%d" % i, bytes((i % 3) * 300_000)])) for i in range(60)
            ]
            got = [int((await receiver.recv_multipart())[0]) for _ in range(60)]
            await asyncio.gather(*pushes)
            assert got == list(range(60))
            assert len(pusher._destinations) == 1

    run(scenario)


def test_frames_are_not_copied_and_let_go_of_when_sent():
    async def scenario(pusher, context):
        with puller(context) as (receiver, endpoint):
            array = np.arange(5_000_000, dtype=np.uint8)
            gone = weakref.ref(array)
            view = memoryview(array)
            sending = asyncio.create_task(pusher.push(endpoint, [b"h", view]))
            assert bytes((await receiver.recv_multipart())[1]) == array.tobytes()
            await sending
            del array, view
            gc.collect()
            await until(lambda: gone() is None)

    run(scenario)


def test_a_destination_that_comes_late_is_waited_for():
    async def scenario(pusher, context):
        port = unused_port()
        sending = asyncio.create_task(pusher.push(f"tcp://127.0.0.1:{port}", [b"late"]))
        await asyncio.sleep(0.4)
        with puller(context, port) as (receiver, _):
            assert await receiver.recv_multipart() == [b"late"]
            await sending

    run(scenario)


def test_one_that_never_comes_fails_in_time_and_holds_back_nobody():
    async def scenario(pusher, context):
        with puller(context) as (receiver, endpoint):
            dead = [
                asyncio.create_task(pusher.push(f"tcp://127.0.0.1:{unused_port()}", [bytes(100_000)])) for _ in range(3)
            ]
            for _ in range(20):
                await pusher.push(endpoint, [b"live"])
                await receiver.recv_multipart()
            assert not any(one.done() for one in dead)
            for outcome in await asyncio.gather(*dead, return_exceptions=True):
                assert isinstance(outcome, DeliveryFailed)

    run(scenario, timeout_s=3.0)


def test_a_slow_one_holds_back_nobody():
    async def scenario(pusher, context):
        with (
            puller(context, RCVHWM=1, RCVBUF=4096) as (slow, slow_endpoint),
            puller(context) as (receiver, endpoint),
        ):
            stuck = [asyncio.create_task(pusher.push(slow_endpoint, [bytes(20_000_000)])) for _ in range(3)]
            await asyncio.sleep(0.1)
            started = time.monotonic()
            for _ in range(20):
                await pusher.push(endpoint, [b"live"])
                await receiver.recv_multipart()
            assert time.monotonic() - started < 5
            for _ in range(3):
                await slow.recv_multipart()
            await asyncio.gather(*stuck)

    run(scenario, timeout_s=10)


def test_one_that_goes_away_while_it_receives_is_no_success():
    """libzmq drops the message and lets go of its memory, which looks like having sent it."""
    listener = socket.create_server(("127.0.0.1", 0))
    behind = zmq.Context()
    receiver = behind.socket(zmq.PULL)
    behind_port = receiver.bind_to_random_port("tcp://127.0.0.1")

    def forward():
        front, _ = listener.accept()
        with front, socket.create_connection(("127.0.0.1", behind_port)) as back:

            def answers():
                with contextlib.suppress(OSError):
                    while data := back.recv(4096):
                        front.sendall(data)

            threading.Thread(target=answers, daemon=True).start()
            passed = 0
            while passed < 1_000_000:
                data = front.recv(65536)
                back.sendall(data)
                passed += len(data)
            time.sleep(0.2)

    thread = threading.Thread(target=forward, daemon=True)
    thread.start()

    async def scenario(pusher, _):
        started = time.monotonic()
        with pytest.raises(DeliveryFailed, match="went away"):
            await pusher.push(f"tcp://127.0.0.1:{listener.getsockname()[1]}", [b"h", bytes(50_000_000)])
        assert time.monotonic() - started < 5

    run(scenario, timeout_s=10)
    thread.join(5)
    listener.close()
    behind.destroy(linger=0)


def test_one_that_restarts_on_its_port_is_found_again():
    async def scenario(pusher, context):
        with puller(context) as (receiver, endpoint):
            await pusher.push(endpoint, [b"1"])
            await receiver.recv_multipart()
        port = int(endpoint.rpartition(":")[2])
        # libzmq closes the listener, and notices the break, in its own time.
        (destination,) = pusher._destinations.values()
        await until(lambda: not push_module._writable(destination._socket))
        await until(lambda: free(port))
        with puller(context, port) as (receiver, _):
            await pusher.push(endpoint, [b"2"])
            assert await receiver.recv_multipart() == [b"2"]

    run(scenario)


def test_a_cancelled_one_is_not_sent_and_the_others_are():
    async def scenario(pusher, context):
        port = unused_port()
        endpoint = f"tcp://127.0.0.1:{port}"
        pushes = [asyncio.create_task(pusher.push(endpoint, [b"%d" % i])) for i in range(4)]
        await asyncio.sleep(0.05)
        pushes[0].cancel()
        pushes[2].cancel()
        with puller(context, port) as (receiver, _):
            assert [await receiver.recv(), await receiver.recv()] == [b"1", b"3"]
            await asyncio.gather(pushes[1], pushes[3])
            assert not await receiver.poll(100)

    run(scenario)


def test_idle_destinations_are_closed(monkeypatch):
    monkeypatch.setattr(push_module, "IDLE_S", 0.1)
    monkeypatch.setattr(push_module, "MAX_IDLE", 5)

    async def scenario(pusher, context):
        for _ in range(12):
            with puller(context) as (receiver, endpoint):
                await pusher.push(endpoint, [b"x"])
                await receiver.recv_multipart()
        assert len(pusher._destinations) <= 7
        await asyncio.sleep(0.3)
        assert not pusher._destinations

    run(scenario)


def test_notices_go_without_waiting():
    async def scenario(pusher, context):
        pusher.notify(f"tcp://127.0.0.1:{unused_port()}", [b"nobody"])
        with puller(context) as (receiver, endpoint):
            pusher.notify(endpoint, [b"error"])
            assert await receiver.recv_multipart() == [b"error"]

    run(scenario)
