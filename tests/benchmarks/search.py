"""Search with an `mmrl index` compared with exact search. About 10 GB of disk:

    python tests/benchmarks/search.py [funnel] [codes] [page] [--rows 1000000] [--spectrum RUN] [--folder DIR]

funnel    an index of 1,000,000 generated 512-d vectors, single queries: the index compared with faiss's exact search
          over all vectors (IndexFlatIP) on the same threads, alternating; recall@10 relative to it for image and text
          queries; memory. Also the usual alternative: a float prefix with reranking.
codes     share of the 10 nearest that is in the shortlists of the first stage: pairs of neighbouring dims compared with
          the folded order.
page      latency of the API over HTTP without encoding, for an index of 100,000: median and 95th percentile.

The vectors are clusters. The standard deviations of the dims fall by a power law such that the first 64 dims hold 74 %
of the energy (--spectrum RUN uses those of a trained run's embeddings). A point is as far from the centre of its
cluster as the centres are from each other. A text is an image's vector plus noise and a gap that all texts share. Seeds
are fixed.
"""

import argparse
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow
import pyarrow.parquet
import torch

from mmrl.data.samples import group_id
from mmrl.search.build import write_index
from mmrl.search.calibrate import Queries, exact_neighbours
from mmrl.search.embed import EMBEDDINGS, TEXTS
from mmrl.search.funnel import Funnel, unit_prefix
from mmrl.search.index import Index, open_index
from mmrl.search.table import columns_of, image_schema, text_schema, vector_array

DIM, HEAD, ENERGY = 512, 64, 0.74
PER_CLUSTER, CHUNK, TEXTS_GIVEN, QUERIES = 250, 50_000, 4_000, 64


class Vectors:
    """The generated vectors, in chunks."""

    def __init__(self, rows: int, deviations_D: np.ndarray) -> None:
        self.rows, self._deviations_D = rows, deviations_D
        rng = np.random.default_rng(0)
        self._centres_CD = self._noise(rng, max(1, rows // PER_CLUSTER))
        self._gap_D = self._noise(rng, 1)[0]

    def _noise(self, rng: np.random.Generator, count: int) -> np.ndarray:
        return rng.standard_normal((count, len(self._deviations_D)), dtype=np.float32) * self._deviations_D

    def images(self, count: int, seed: tuple[int, ...]) -> np.ndarray:
        rng = np.random.default_rng(seed)
        return unit(self._centres_CD[rng.integers(0, len(self._centres_CD), count)] + self._noise(rng, count))

    def texts(self, count: int, seed: tuple[int, ...]) -> np.ndarray:
        length = float(np.linalg.norm(self._deviations_D))
        moved = self.images(count, seed) * length + 0.5 * self._noise(np.random.default_rng((*seed, 1)), count)
        return unit(moved + 0.7 * self._gap_D)

    def chunks(self) -> Iterator[np.ndarray]:
        for start in range(0, self.rows, CHUNK):
            yield self.images(min(CHUNK, self.rows - start), (1, start))


def unit(rows_ND: np.ndarray) -> np.ndarray:
    return rows_ND / np.linalg.norm(rows_ND, axis=1, keepdims=True)


def power_law() -> np.ndarray:
    """Standard deviations of DIM dims whose first HEAD dims hold the share ENERGY of the energy."""
    low, high, power, dim_D = 0.0, 3.0, 1.5, np.arange(1, DIM + 1)
    for _ in range(60):
        power = (low + high) / 2
        energy = dim_D**-power
        low, high = (power, high) if energy[:HEAD].sum() / energy.sum() < ENERGY else (low, power)
    return np.sqrt(dim_D**-power).astype(np.float32)


def spectrum_of(run: str) -> np.ndarray:
    """Standard deviations of the dims of a trained model's image vectors, interpolated to DIM dims."""
    from mmrl.search.embed import embed_images

    with tempfile.TemporaryDirectory() as folder:
        embed_images(run, "starter:test-artist", Path(folder, "e"), quiet=True)
        table = pyarrow.parquet.read_table(Path(folder, "e", EMBEDDINGS))
    rows = table["embedding"].combine_chunks().flatten().to_numpy().reshape(len(table), -1)
    deviations = rows.std(axis=0)
    position_D = np.linspace(0, len(deviations) - 1, DIM)
    return np.interp(position_D, np.arange(len(deviations)), deviations).astype(np.float32)


def write_embeddings(vectors: Vectors, folder: Path) -> Path:
    """Write these vectors as `mmrl embed` does, with placeholder thumbnails."""
    folder.mkdir(parents=True)
    columns = columns_of([DIM], ["fp32"])
    facts = {
        "format": "mmrl-embeddings",
        "version": 2,
        "model": "none",
        "origin_sha256": "generated",
        "dim": DIM,
        "nested_dims": [64, 128, 256, 512],
        "columns": [asdict(column) for column in columns],
    }
    schema = image_schema(columns, facts)
    with pyarrow.parquet.ParquetWriter(folder / EMBEDDINGS, schema, compression="none") as writer:
        start = 0
        for rows in vectors.chunks():
            numbers = range(start, start + len(rows))
            data = {
                "key": [f"shard/{n:08}" for n in numbers],
                "captions": [[f"image number {n}"] for n in numbers],
                "group": [group_id(f"group {n % 100}") for n in numbers],
                "group_name": [f"group {n % 100}" for n in numbers],
                "embedding": vector_array(pyarrow, rows),
                "thumbnail": [b"x" * 3000 if vectors.rows <= 100_000 else b"x"] * len(rows),
            }
            arrays = [
                value if name == "embedding" else pyarrow.array(value, schema.field(name).type)
                for name, value in data.items()
            ]
            writer.write_table(pyarrow.Table.from_arrays(arrays, schema=schema))
            start += len(rows)
    text_MD = vectors.texts(TEXTS_GIVEN, (2,))
    blank, no_group = pyarrow.array([""] * len(text_MD)), pyarrow.array([-1] * len(text_MD))
    arrays = [blank, blank, no_group, blank, vector_array(pyarrow, text_MD)]
    table = pyarrow.Table.from_arrays(arrays, schema=text_schema(columns, facts))
    pyarrow.parquet.write_table(table, folder / TEXTS)
    return folder


def built_index(work: Path, vectors: Vectors, name: str) -> Index:
    """The index of the vectors, built once per folder."""
    folder = work / f"{name}-{vectors.rows}"
    if not (folder / "index" / "manifest.json").exists():
        embeddings = folder / "embeddings"
        if not embeddings.exists():
            write_embeddings(vectors, embeddings)
        began = time.perf_counter()
        write_index(embeddings, folder / "index", code="pq")
        print(f"mmrl index: {time.perf_counter() - began:.0f} s", flush=True)
    return open_index(folder / "index")


@dataclass(frozen=True)
class Latency:
    """Median time of a query in ms."""

    wall: float
    cpu: float
    """CPU time of all threads of this process; other work on the machine hardly changes it."""


def latencies(searches: dict[str, Callable[[int], Any]], count: int) -> dict[str, Latency]:
    """The latency of each search. They alternate: every query is sent to all of them."""
    took: dict[str, list[tuple[float, float]]] = {name: [] for name in searches}
    for number in range(count):
        for name, search in searches.items():
            wall, cpu = time.perf_counter(), time.process_time()
            search(number)
            took[name].append(((time.perf_counter() - wall) * 1e3, (time.process_time() - cpu) * 1e3))
    return {name: Latency(*np.median(times, axis=0).tolist()) for name, times in took.items()}


def recall(found: list[np.ndarray], truth: np.ndarray) -> float:
    return float(np.mean([len(set(a[:10].tolist()) & set(b.tolist())) / 10 for a, b in zip(found, truth, strict=True)]))


def funnel(index: Index, vectors: Vectors) -> None:
    both = np.concatenate([vectors.images(QUERIES, (3,)), vectors.texts(QUERIES, (4,))])
    exact = faiss.IndexFlatIP(DIM)
    short = faiss.IndexFlatIP(HEAD)
    for start in range(0, vectors.rows, CHUNK):
        rows = np.array(index.vectors_ND[start : start + CHUNK])
        exact.add(rows)
        short.add(unit_prefix(rows, HEAD))

    def reranked(number: int, count: int) -> np.ndarray:
        rows = short.search(unit_prefix(both[number : number + 1], HEAD), count)[1][0]
        return rows[np.argsort(-(index.vectors_ND[rows] @ both[number]))[:10]]

    searches: dict[str, Callable[[int], np.ndarray]] = {
        "exact, 512-d (faiss flat)": lambda number: exact.search(both[number : number + 1], 10)[1][0],
        "64-d float -> 200 -> 512-d": lambda number: reranked(number, 200),
        "64-d float -> 1000 -> 512-d": lambda number: reranked(number, 1000),
        "mmrl index": lambda number: index.nearest(both[number], DIM, 10)[0],
    }
    truth = np.stack([searches["exact, 512-d (faiss flat)"](number) for number in range(len(both))])
    times = latencies(searches, len(both))
    exact_bytes = 4 * DIM * vectors.rows
    assert index.funnel is not None
    memory = {"mmrl index": index.funnel.resident_bytes, "exact, 512-d (faiss flat)": exact_bytes}
    slowest = times["exact, 512-d (faiss flat)"]
    print(f"{vectors.rows:,} x {DIM}, {faiss.omp_get_max_threads()} thread(s); {index.manifest['search']}")
    for name, search in searches.items():
        found = [search(number) for number in range(len(both))]
        share = memory.get(name, 4 * HEAD * vectors.rows) / exact_bytes
        by = [recall(found[:QUERIES], truth[:QUERIES]), recall(found[QUERIES:], truth[QUERIES:])]
        took = times[name]
        print(
            f"{name:28} {took.wall:8.2f} ms {slowest.wall / took.wall:6.1f} x   CPU {took.cpu:7.2f} ms "
            f"{slowest.cpu / took.cpu:6.1f} x   memory 1/{1 / share:4.1f}   recall@10 images {by[0]:.4f} "
            f"texts {by[1]:.4f}",
            flush=True,
        )


def codes(index: Index, vectors: Vectors) -> None:
    queries_QD = vectors.images(QUERIES, (3,))
    count = min(200_000, vectors.rows)
    rows_ND = np.array(index.vectors_ND[:count])
    truth = exact_neighbours(rows_ND, Queries(queries_QD, np.full(QUERIES, -1)))
    assert index.funnel is not None
    dim = index.funnel.dim
    plain = faiss.index_factory(dim, f"PQ{dim // 2}x4fs", faiss.METRIC_INNER_PRODUCT)
    sample = unit_prefix(rows_ND[:20_000], dim)
    plain.train(sample)
    plain.add(unit_prefix(rows_ND, dim))
    with tempfile.TemporaryDirectory() as folder:
        folded = Funnel.build(Path(folder), rows_ND, "pq", dim, rows_ND[:20_000])
        binary = Funnel.build(Path(folder), rows_ND, "binary", dim, rows_ND[:20_000])
    for name, found in (
        ("pq, pairs of neighbours", plain.search(unit_prefix(queries_QD, dim), 4000)[1]),
        ("pq, folded", folded.first(queries_QD, 4000)),
        ("binary", binary.first(queries_QD, 4000)),
    ):
        shares = {
            n: np.mean([np.isin(t, f[:n]).mean() for t, f in zip(truth, found, strict=True)]) for n in (100, 1000, 4000)
        }
        print(f"{count:,} rows, first stage of {dim}-d: {name:24}", {n: round(float(s), 4) for n, s in shares.items()})


class _NoEncoder:
    """Returns generated query N for the text "N", so that encoding is not timed."""

    towers, dim, nested_dims = ("image", "text"), DIM, (64, 128, 256, 512)

    def __init__(self, queries_QD: np.ndarray) -> None:
        self._queries_QD = queries_QD

    def encode_texts(self, texts: list[str]) -> np.ndarray:
        return self._queries_QD[[int(text) for text in texts]]


def page(index: Index, vectors: Vectors) -> None:
    import httpx2 as httpx
    import uvicorn

    from mmrl.search.app import create_app
    from mmrl.search.query import Searcher
    from mmrl.search.serve import open_listener

    encoder: Any = _NoEncoder(vectors.texts(QUERIES, (4,)))
    listening = open_listener("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(create_app(Searcher(index, encoder), ["*"]), log_level="warning"))
    threading.Thread(target=server.run, args=([listening],), daemon=True).start()
    address = f"http://127.0.0.1:{listening.getsockname()[1]}/api/search/text"
    with httpx.Client(timeout=60) as client:
        for kind, common in (
            ("512-d, by codes", {}), ("64-d, by codes", {"dim": 64}), ("512-d, one group of 100", {"group": "group 7"}),
            ("512-d, exact", {"exact": True}), ("64-d, exact", {"dim": 64, "exact": True}),
        ):  # fmt: skip
            took = []
            for number in range(-10, QUERIES):
                began = time.perf_counter()
                answer = client.post(address, json={"text": str(abs(number)), "k": 24, **common})
                took.append((time.perf_counter() - began) * 1e3)
                assert len(answer.raise_for_status().json()["results"]) == 24
            median, late = np.percentile(took[10:], [50, 95])
            print(f"page, {len(index):,} images, {kind:24} median {median:6.1f} ms  p95 {late:6.1f} ms", flush=True)
    server.should_exit = True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["funnel", "codes", "page"])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--spectrum", help="a run folder")
    parser.add_argument("--folder", type=Path, help="keep the generated index here and reuse it")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    faiss.omp_set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    deviations = spectrum_of(options.spectrum) if options.spectrum else power_law()
    name = "trained" if options.spectrum else "generated"
    share = float((deviations[:HEAD] ** 2).sum() / (deviations**2).sum())
    print(
        json.dumps({"share of the energy in the first 64 dims": round(share, 3), "load": os.getloadavg()}), flush=True
    )
    with tempfile.TemporaryDirectory() as temporary:
        work = options.folder or Path(temporary)
        vectors = Vectors(options.rows, deviations)
        if {"funnel", "codes"} & set(options.parts):
            index = built_index(work, vectors, name)
            for part in (funnel, codes):
                if part.__name__ in options.parts:
                    part(index, vectors)
        if "page" in options.parts:
            small = Vectors(min(options.rows, 100_000), deviations)
            page(built_index(work, small, name), small)
    print(json.dumps({"load": os.getloadavg()}))


if __name__ == "__main__":
    main()
