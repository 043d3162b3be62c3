"""Latency and throughput of `mmrl serve`'s embeddings API compared with a bare ONNX session:

    python tests/benchmarks/serve.py [--model open_clip:ViT-B-32:random] [--dim 128] [--requests 200] [--folder DIR]
                                     [--slow]

Exports MODEL once as ONNX graphs (into DIR, which is reused), serves it in a process of its own, and times over
kept-alive connections, in rounds that alternate:
- one text at a time by POST /v1/embeddings: tokenise, encode and answer; and the same token ids through the text graph
  in onnxruntime alone, with the same number of threads;
- the same number of texts by 64 clients at once, and by one client.
Each round is a ratio; the last lines are their medians. Run it on an idle machine: both sides need all cores.

With --slow instead: the time of a text of 20 good clients, alone and beside 200 slow ones (idle connections, headers
and bodies of a byte at a time, answers that are not read), and the server's memory, also with 60 large uploads at once.
"""

import argparse
import asyncio
import contextlib
import http.client
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import onnxruntime

from mmrl.export import bundles
from mmrl.inference.standalone import Encoder
from mmrl.search.serve import open_listener

CLIENTS, ROUNDS = 64, 5
SLOW, GOOD, UPLOADS = 200, 20, 60
WORDS = ("red", "blue", "running", "shoes", "cotton", "dress", "of", "a", "large", "photo", "with", "stripes")


class Client:
    """A kept-alive connection to the server."""

    def __init__(self, port: int) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)

    def embed(self, text: str) -> None:
        """Sends one text and reads its embedding."""
        body = json.dumps({"input": text, "encoding_format": "base64"})
        self._connection.request("POST", "/v1/embeddings", body, {"Content-Type": "application/json"})
        response = self._connection.getresponse()
        data = response.read()
        assert response.status == 200, data

    def close(self) -> None:
        """Closes the connection; the next text opens one."""
        self._connection.close()


def text(number: int) -> str:
    """A text of 3 to 10 words."""
    return " ".join(WORDS[number * step % len(WORDS)] for step in range(1, 4 + number % 8))


def median_ms(call: object, arguments: list[object]) -> float:
    """The median time of a call, in milliseconds."""
    assert callable(call)
    times = []
    for argument in arguments:
        began = time.perf_counter()
        call(argument)
        times.append((time.perf_counter() - began) * 1e3)
    return statistics.median(times)


def wait_until_ready(port: int) -> None:
    for _ in range(600):
        try:
            Client(port).embed("ready")
            return
        except OSError:
            time.sleep(0.2)
    raise RuntimeError("the server did not start within two minutes")


def measure(folder: Path, port: int, requests: int) -> None:
    encoder = Encoder(folder, towers="text")
    session = onnxruntime.InferenceSession(folder / encoder.graphs["text"][encoder.variant])
    name, texts = session.get_inputs()[0].name, [text(number) for number in range(requests)]
    tokens: list[object] = [encoder.tokenise([one]) for one in texts]
    alone, clients = Client(port), [Client(port) for _ in range(CLIENTS)]
    latencies, gains = [], []

    def share(number: int) -> None:
        for one in texts[number::CLIENTS]:
            clients[number].embed(one)
        clients[number].close()  # before the server does, which keeps an idle connection for some seconds

    with ThreadPoolExecutor(CLIENTS) as pool:
        for number in range(ROUNDS):
            bare = median_ms(lambda tokens_NL: session.run(None, {name: tokens_NL}), tokens)
            alone.close()
            time.sleep(0.2)  # onnxruntime's threads spin for a while after a run
            served = median_ms(alone.embed, [*texts])
            latencies.append(served / bare)
            began = time.perf_counter()
            for one in texts:
                alone.embed(one)
            sequential = time.perf_counter() - began
            began = time.perf_counter()
            list(pool.map(share, range(CLIENTS)))
            gains.append(sequential / (time.perf_counter() - began))
            print(
                f"round {number}: bare session {bare:6.2f} ms   /v1/embeddings {served:6.2f} ms "
                f"({latencies[-1]:.2f} x)   1 client {requests / sequential:6.1f} texts/s   {CLIENTS} clients "
                f"{requests / sequential * gains[-1]:6.1f} texts/s ({gains[-1]:.2f} x)",
                flush=True,
            )
    print(f"p50 of one text: {statistics.median(latencies):.2f} x the bare session (target: at most 1.3)")
    print(f"{CLIENTS} clients: {statistics.median(gains):.2f} x the throughput of one (target: at least 3)")


def good_clients(port: int, requests: int) -> float:
    """The 95th percentile of the time of one text, in milliseconds, of GOOD clients at once."""

    def times(number: int) -> list[float]:
        client, found = Client(port), []
        for one in range(requests // GOOD):
            began = time.perf_counter()
            client.embed(text(number + one))
            found.append((time.perf_counter() - began) * 1e3)
        client.close()
        return found

    with ThreadPoolExecutor(GOOD) as pool:
        return statistics.quantiles([one for some in pool.map(times, range(GOOD)) for one in some], n=20)[-1]


async def slow_client(port: int, number: int) -> None:
    """Connects again and again; it sends nothing, or a header, a body or a large body of a byte per second, or it does
    not read the answer."""
    head = b"POST /v1/embeddings HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: "
    texts = json.dumps({"input": [text(number) for number in range(64)]}).encode()
    kinds = [(b"", b""), (b"", head), (head + b"2000\r\n\r\n", b" " * 9), (head + b"16000000\r\n\r\n", b" " * 9)]
    sent, rest = (head + b"%d\r\n\r\n" % len(texts) + texts, b"") if number < 4 else kinds[number % 4]
    while True:
        with contextlib.suppress(OSError):
            _, writer = await asyncio.open_connection("127.0.0.1", port, limit=1)
            with contextlib.closing(writer):
                writer.write(sent)
                for byte in rest.ljust(9):
                    writer.write(bytes([byte]) if rest else b"")
                    await asyncio.sleep(1)
                    if writer.is_closing():
                        break


async def slow_clients(port: int) -> None:
    await asyncio.gather(*(slow_client(port, number) for number in range(SLOW)))


def upload(port: int) -> int | str:
    """The status of the answer to an image of 15 MB in base64, which is damaged."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    body = json.dumps({"input": "data:image/png;base64," + "A" * (15 << 20), "modality": "image"})
    with contextlib.closing(connection):
        try:
            connection.request("POST", "/v1/embeddings", body, {"Content-Type": "application/json"})
            return connection.getresponse().status
        except ConnectionError:  # the answer came before the body was sent
            return "refused"


def resident_mb(process: int, key: str = "VmRSS") -> float:
    """The memory of a process now, or with VmHWM its peak."""
    line = next(one for one in Path(f"/proc/{process}/status").read_text().splitlines() if one.startswith(key))
    return int(line.split()[1]) / 1e3


def measure_slow(port: int, requests: int, server: int) -> None:
    good_clients(port, requests)  # warms up
    quiet, before = good_clients(port, requests), resident_mb(server)
    slow = multiprocessing.get_context("spawn").Process(target=run_slow_clients, args=(port,), daemon=True)
    slow.start()
    time.sleep(5)
    rounds = []
    for number in range(ROUNDS):
        rounds.append(good_clients(port, requests))
        print(f"round {number}: p95 {rounds[-1]:6.1f} ms   memory {resident_mb(server):6.0f} MB", flush=True)
    slow.terminate()
    slow.join()
    p95, calm = statistics.median(rounds), resident_mb(server)
    with ThreadPoolExecutor(UPLOADS) as pool:
        answers = Counter(pool.map(upload, [port] * UPLOADS))
    time.sleep(3)
    print(f"p95 of {GOOD} good clients: {quiet:.1f} ms, beside {SLOW} slow ones {p95:.1f} ms: {p95 / quiet:.2f} x")
    peak, after = resident_mb(server, "VmHWM"), resident_mb(server)
    print(f"(target: at most 2 x); memory {before:.0f} MB before, {calm:.0f} MB after them")
    print(f"{UPLOADS} uploads of 15 MB at once: {dict(answers)}; memory {peak:.0f} MB at most, {after:.0f} MB after")


def run_slow_clients(port: int) -> None:
    asyncio.run(slow_clients(port))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="open_clip:ViT-B-32:random")
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--slow", action="store_true")
    options = parser.parse_args()
    kept = options.folder or Path(tempfile.mkdtemp(prefix="mmrl-serve-"))
    folder = kept / f"{options.model.replace(':', '-').replace('/', '-')}-{options.dim}"
    if not folder.exists():
        bundles.export(options.model, folder, [options.dim], "onnx")
    with open_listener("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
    print(json.dumps({"cores": len(os.sched_getaffinity(0)), "load": os.getloadavg()}), flush=True)
    server = subprocess.Popen([sys.executable, "-m", "mmrl.cli", "serve", str(folder), "--port", str(port)])
    try:
        wait_until_ready(port)
        if options.slow:
            measure_slow(port, options.requests, server.pid)
        else:
            measure(folder, port, options.requests)
    finally:
        server.terminate()
        server.wait()
    print(json.dumps({"load": os.getloadavg()}))


if __name__ == "__main__":
    main()
