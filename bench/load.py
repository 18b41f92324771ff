"""A load generator in a separate process: each connection sends its next request as soon as it has an answer."""

import asyncio
import json
import sys
import time
from itertools import count

import uvloop

WARM = 1.0  # Seconds at the start that are not counted


def request(path: str, body: str) -> bytes:
    "A request as bytes"
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    return f"{head}\r\n\r\n{body}".encode()


async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, asked: bytes) -> bytes:
    "Send a request and read the answer, which must be a success"
    writer.write(asked)
    head = await reader.readuntil(b"\r\n\r\n")
    lines = head.lower().split(b"\r\n")
    length = next(int(line[15:]) for line in lines if line.startswith(b"content-length:"))
    body = await reader.readexactly(length)
    if not lines[0].startswith(b"http/1.1 200"):
        raise RuntimeError(f"{lines[0].decode()}: {body.decode()[:500]}")
    return body


async def connection(port: int, asked: list[bytes], turn: count, end: float, taken: list[tuple[float, float]]) -> None:
    "One client"
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    while (begin := time.perf_counter()) < end:
        await ask(reader, writer, asked[next(turn) % len(asked)])
        taken.append((begin, time.perf_counter() - begin))
    writer.close()


async def load(port: int, path: str, bodies: list[str], connections: int, seconds: float) -> dict[str, float]:
    "Send requests for some time and return the figures of those after the warm-up"
    asked, taken, turn = [request(path, body) for body in bodies], [], count()
    start = time.perf_counter()
    end = start + WARM + seconds
    await asyncio.gather(*(connection(port, asked, turn, end, taken) for _ in range(connections)))
    times = sorted(took for begin, took in taken if begin >= start + WARM)
    at = {name: times[min(len(times) - 1, int(len(times) * share))] * 1000 for name, share in SHARES.items()}
    return {"requests": len(times), "per_second": len(times) / seconds, **at, "client_cpu": time.process_time()}


SHARES = {"p50": 0.5, "p99": 0.99, "worst": 1.0}

if __name__ == "__main__":
    job = json.load(sys.stdin)
    print(json.dumps(uvloop.run(load(**job))))
