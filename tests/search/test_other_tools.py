"""The output of `mmrl embed` read by DuckDB, faiss and PostgreSQL; and the snippets of mmrl/search/README.md for vector
databases, which search prefixes and rank by whole vectors."""

import os
import pwd
import re
import subprocess
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
from helpers.indexes import brute_force, clustered, indexed, rows_of

from mmrl import search
from mmrl.search.embed import EMBEDDINGS, embed_images
from mmrl.search.table import columns_of, vector_array

__all__ = ["indexed"]


@pytest.fixture(scope="module")
def folder(indexed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16-d and 8-d embeddings at all precisions."""
    out = tmp_path_factory.mktemp("tools") / "e"
    embed_images(
        *(str(indexed / "model"), str(indexed / "images.tar"), out),
        dims=[16, 8], precisions=["fp32", "fp16", "int8", "binary"], npy=True, quiet=True,
    )  # fmt: skip
    return out


def nearest(folder: Path, row: int, dim: int, k: int = 3) -> list[str]:
    """The keys of the k nearest rows, by brute force."""
    rows = rows_of(folder)
    vectors = np.array([one["embedding"] for one in rows])
    return [rows[i]["key"] for i in np.argsort(-brute_force(vectors[row], vectors, dim), kind="stable")[:k]]


@pytest.mark.parametrize("column", ["embedding_8_fp32", "embedding_8_fp16", "embedding_8_int8"])
def test_duckdb(folder: Path, column: str) -> None:
    duckdb = pytest.importorskip("duckdb", reason="duckdb is not installed")
    as_array = f"{column}::FLOAT[8]"
    found = duckdb.sql(
        f"SELECT key FROM '{folder / EMBEDDINGS}' ORDER BY array_cosine_similarity({as_array}, "  # noqa: S608
        f"(SELECT {as_array} FROM '{folder / EMBEDDINGS}' WHERE key = 'images.tar/00004')) DESC LIMIT 3"
    ).fetchall()
    if column == "embedding_8_int8":  # quantised: the second and third may swap with the next
        assert found[0] == ("images.tar/00004",)
        assert {key for (key,) in found} <= set(nearest(folder, 4, 8, k=6))
    else:
        assert [key for (key,) in found] == nearest(folder, 4, 8)


def test_duckdb_reads_groups_and_bits(folder: Path) -> None:
    duckdb = pytest.importorskip("duckdb", reason="duckdb is not installed")
    rows = rows_of(folder)
    counted = duckdb.sql(f"SELECT group_name, count(*) FROM '{folder / EMBEDDINGS}' GROUP BY 1").fetchall()  # noqa: S608
    assert dict(counted)["green square"] == 2
    bits = duckdb.sql(f"SELECT embedding_16_binary FROM '{folder / EMBEDDINGS}'").fetchall()  # noqa: S608
    assert [list(one) for (one,) in bits] == [row["embedding_16_binary"] for row in rows]


def test_clip_retrieval_layout(folder: Path) -> None:
    """Rows of img_emb/img_emb_0.npy and metadata/metadata_0.parquet correspond."""
    vectors = np.load(folder / "img_emb" / "img_emb_0.npy")
    named = pyarrow.parquet.read_table(folder / "metadata" / "metadata_0.parquet")
    assert vectors.shape == (len(named), 16)
    assert named["image_path"].to_pylist() == [row["key"] for row in rows_of(folder)]


def test_binary_codes_are_readable_by_faiss(folder: Path) -> None:
    faiss = pytest.importorskip("faiss", reason="faiss is not installed")
    codes = np.load(folder / "img_emb_16_binary" / "img_emb_16_binary_0.npy")
    index = faiss.IndexBinaryFlat(16)
    index.add(codes)
    distances, _ = index.search(codes[:5], len(codes))
    signs = np.array([row["embedding"] for row in rows_of(folder)]) > 0
    expected = np.sort((signs[:5, None] != signs[None]).sum(-1), axis=1)
    np.testing.assert_array_equal(distances, expected)


# ------------------------------------------------------------------------------------------------ PostgreSQL

# The package pgserver holds PostgreSQL with pgvector.
INSTALLED = [*Path("/usr/lib/postgresql").glob("*/bin/initdb")]
PACKAGED = Path(sysconfig.get_path("purelib")) / "pgserver/pginstall/bin/initdb"
PROGRAMS = PACKAGED if PACKAGED.exists() else max(INSTALLED, default=None)
Sql = Callable[[str], str]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The socket folder of a temporary PostgreSQL server, run by a user other than root, which PostgreSQL refuses."""
    if PROGRAMS is None:
        pytest.skip("no PostgreSQL server is installed (pip: pgserver; Debian: postgresql)")
    home = tmp_path_factory.mktemp("postgres")
    as_user: list[str] = []
    if os.geteuid() == 0:
        try:
            user = pwd.getpwnam("postgres")
        except KeyError:
            pytest.skip("no user but root to run PostgreSQL as")
        os.chown(home, user.pw_uid, user.pw_gid)
        for parent in [*home.parents][:-2]:
            if parent.stat().st_uid == 0 and parent != Path("/tmp"):  # noqa: S108
                parent.chmod(parent.stat().st_mode | 0o011)
        as_user = ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]
    programs, data = PROGRAMS.parent, home / "data"

    def run(*command: str | Path) -> None:
        done = subprocess.run([*as_user, *command], capture_output=True, text=True, cwd="/")
        assert done.returncode == 0, done.stderr

    run(programs / "initdb", "-D", data, "--auth=trust", "-U", "mmrl", "--no-sync")
    options = f"-k {home} -c listen_addresses='' -c fsync=off"
    run(programs / "pg_ctl", "-D", data, "-o", options, "-l", home / "log", "-w", "start")
    try:
        yield home
    finally:
        run(programs / "pg_ctl", "-D", data, "-m", "immediate", "stop")


@pytest.fixture
def sql(server: Path) -> Sql:
    """Runs SQL on the server."""
    assert PROGRAMS is not None
    command = [PROGRAMS.parent / "psql", "-h", server, "-U", "mmrl", "-d", "postgres", "-qAtX", "-v", "ON_ERROR_STOP=1"]

    def run(text: str) -> str:
        done = subprocess.run([*command, "-f", "-"], input=text, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return run


def rows_as_copy(folder: Path, written: Callable[[list[float]], str]) -> str:
    """`COPY` lines of key and vector."""
    return "".join(f"{row['key']}\t{written(row['embedding'])}\n" for row in rows_of(folder)) + "\\.\n"


def test_postgresql_reads_floats_and_bits(folder: Path, sql: Sql) -> None:
    """Without an extension: arrays of real, and bit strings compared by Hamming distance."""
    lines = rows_as_copy(folder, lambda vector: "{" + ",".join(map(str, vector)) + "}")
    sql(f"CREATE TABLE plain (key text PRIMARY KEY, embedding real[]);\nCOPY plain FROM STDIN;\n{lines}")
    found = sql(
        "SELECT key FROM plain, LATERAL (SELECT sum(a * b) AS score FROM unnest(embedding, "
        "(SELECT embedding FROM plain WHERE key = 'images.tar/00004')) AS pair(a, b)) AS compared "
        "ORDER BY score DESC LIMIT 3"
    )
    assert found.splitlines() == nearest(folder, 4, 16)
    rows = rows_of(folder)
    bits = ["".join(f"{byte:08b}" for byte in row["embedding_16_binary"]) for row in rows]
    lines = "".join(f"{row['key']}\t{one}\n" for row, one in zip(rows, bits, strict=True)) + "\\.\n"
    sql(f"CREATE TABLE bits (key text, code bit(16));\nCOPY bits FROM STDIN;\n{lines}")
    distances = sql(f"SELECT bit_count(code # B'{bits[4]}') FROM bits ORDER BY key")  # noqa: S608
    by_key = sorted(zip([row["key"] for row in rows], bits, strict=True))
    expected = [sum(a != b for a, b in zip(one, bits[4], strict=True)) for _, one in by_key]
    assert [int(line) for line in distances.split()] == expected


# ------------------------------------------------------------------------------------------------ README's snippets

SNIPPETS = dict(
    re.findall(r"```python\n# (\w+).*\n((?s:.*?))```", (Path(search.__file__).parent / "README.md").read_text())
)
ROWS = 500


@pytest.fixture
def vectors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """Generated vectors (N, 512), which the file in the current folder's embeddings/ holds at 512 and 64 dims."""
    monkeypatch.chdir(tmp_path)
    vectors_ND = clustered(ROWS, 512, 1)
    columns = {"key": pyarrow.array([f"shard/{number:05}" for number in range(ROWS)])}
    for column in columns_of([512, 64], ["fp32"]):
        rows_Nd = vectors_ND[:, : column.dim]
        columns[column.name] = vector_array(pyarrow, rows_Nd / np.linalg.norm(rows_Nd, axis=1, keepdims=True))
    (tmp_path / "embeddings").mkdir()
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "embeddings" / EMBEDDINGS)
    return vectors_ND


def check_snippet(name: str, vectors_ND: np.ndarray, may_miss: int = 0, **variables: Any) -> None:
    """Runs a snippet; its keys are the 10 best of the 200 whose prefixes are nearest, by brute force."""
    vector_D = clustered(1, 512, 2)[0]
    namespace = {"vector": vector_D, **variables}
    exec(SNIPPETS[name], namespace)  # noqa: S102
    near = np.argsort(-brute_force(vector_D, vectors_ND, 64))[:200]
    best = near[np.argsort(-brute_force(vector_D, vectors_ND[near], 512))[:10]]
    # Not the result of the prefix alone: the snippet ranks by whole vectors.
    assert set(best) != set(near[:10])
    expected = [f"shard/{row:05}" for row in best]
    assert len(namespace["keys"]) == 10
    assert [key for key in namespace["keys"] if key in expected] == [
        key for key in expected if key in namespace["keys"]
    ]
    assert len(set(expected) - set(namespace["keys"])) <= may_miss


def test_the_page_has_a_snippet_of_each_database() -> None:
    assert SNIPPETS.keys() == {"OpenAI", "pgvector", "Qdrant", "LanceDB", "DuckDB"}


def test_duckdb_snippet(vectors: np.ndarray) -> None:
    pytest.importorskip("duckdb", reason="duckdb is not installed")
    check_snippet("DuckDB", vectors)


def test_lancedb_snippet(vectors: np.ndarray) -> None:
    pytest.importorskip("lancedb", reason="lancedb is not installed")
    check_snippet("LanceDB", vectors)


# The client's local mode leaves a connection to SQLite open, which Python 3.13 warns of.
@pytest.mark.filterwarnings("ignore:unclosed database:ResourceWarning")
@pytest.mark.filterwarnings("ignore:Exception ignored in. <sqlite3:pytest.PytestUnraisableExceptionWarning")
def test_qdrant_snippet(vectors: np.ndarray) -> None:
    pytest.importorskip("qdrant_client", reason="qdrant-client is not installed")
    check_snippet("Qdrant", vectors)


def test_pgvector_snippet(vectors: np.ndarray, server: Path, sql: Sql) -> None:
    pytest.importorskip("psycopg", reason="psycopg is not installed")
    pytest.importorskip("pgvector", reason="pgvector, the client library, is not installed")
    if sql("SELECT count(*) FROM pg_available_extensions WHERE name = 'vector'") == "0":
        pytest.skip(
            "PostgreSQL is there, but not its extension pgvector (pip: pgserver; Debian: postgresql-17-pgvector)"
        )
    check_snippet("pgvector", vectors, may_miss=1, uri=f"postgresql://mmrl@/postgres?host={server}")
    # The prefix search uses the index wherever a scan of the table would be slower.
    plan = sql(
        "ANALYZE items; SET enable_seqscan = off; EXPLAIN SELECT key FROM items ORDER BY embedding_64 <=> "
        "(SELECT embedding_64 FROM items LIMIT 1) LIMIT 200"
    )
    assert "Index Scan using items_embedding_64_idx" in plan
