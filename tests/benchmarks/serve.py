"""Latency and throughput of `mmrl serve`'s embeddings API compared with a bare ONNX session:

    python tests/benchmarks/serve.py [--model open_clip:ViT-B-32:random] [--dim 128] [--requests 200] [--folder DIR]

Exports MODEL once as ONNX graphs (into DIR, which is reused), serves it in a process of its own, and times over
kept-alive connections, in rounds that alternate:
- one text at a time by POST /v1/embeddings: tokenise, encode and answer; and the same token ids through the text graph
  in onnxruntime alone, with the same number of threads;
- the same number of texts by 64 clients at once, and by one client.
Each round is a ratio; the last lines are their medians. Run it on an idle machine: both sides need all cores.
"""

import argparse
import http.client
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import onnxruntime

from mmrl.export import bundles
from mmrl.inference.standalone import Encoder
from mmrl.search.serve import open_listener

CLIENTS, ROUNDS = 64, 5
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

    with ThreadPoolExecutor(CLIENTS) as pool:
        for number in range(ROUNDS):
            bare = median_ms(lambda tokens_NL: session.run(None, {name: tokens_NL}), tokens)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="open_clip:ViT-B-32:random")
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--folder", type=Path, default=None)
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
        measure(folder, port, options.requests)
    finally:
        server.terminate()
        server.wait()
    print(json.dumps({"load": os.getloadavg()}))


if __name__ == "__main__":
    main()
