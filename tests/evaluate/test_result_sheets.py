"""The pictures of first results: their order, and which of them are marked as matches."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import drawing, encoded

from mmrl.data.index import Problem
from mmrl.data.samples import BadSample
from mmrl.evaluate.result_sheets import QUERIES, RESULTS, result_sheets
from mmrl.evaluate.sets import Embedded
from mmrl.images import contact_sheet

COUNT, DIM = 12, 4


def test_results_are_in_the_order_of_their_similarity_at_the_dim(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(3)
    image_ND, text_MD = (torch.randn(COUNT, 8, generator=generator) for _ in range(2))
    group_N = torch.arange(COUNT) // 2
    embedded = Embedded(
        keys=[f"key {row}" for row in range(COUNT)],
        captions=[f"caption {row}" for row in range(COUNT)],
        image_ND=image_ND,
        text_MD=text_MD,
        image_of_text_M=torch.arange(COUNT),
        image_group_N=group_N,
        bad=[],
        sample_indices=[row + 100 for row in range(COUNT)],
    )

    def read_image(index: int) -> tuple[Any, torch.Tensor]:
        if index == 105:
            raise BadSample(Problem("shard", "key 5", "shard out of reach"))
        return SimpleNamespace(image=encoded(drawing(index)[0])), torch.zeros(3, 8, 8)

    drawn: list[tuple[str, list[Any]]] = []
    monkeypatch.setattr(
        "mmrl.images.contact_sheet.draw", lambda title, _note, tiles: drawn.append((title, tiles)) or len(drawn)
    )
    reader: Any = SimpleNamespace(read_image=read_image)
    assert result_sheets("val", embedded, reader, DIM) == {f"val/query-{i}": i for i in range(1, QUERIES + 1)}
    for row, (title, tiles) in zip((0, 4, 8), drawn, strict=True):
        assert title == f"caption {row}"
        similarity_N = F.cosine_similarity(text_MD[row, :DIM], image_ND[:, :DIM])
        best = similarity_N.argsort(descending=True)[:RESULTS].tolist()
        expected = [
            (f"{rank}{' match' if group_N[i] == group_N[row] else ''}", f"{similarity_N[i]:.2f}", f"key {i}")
            for rank, i in enumerate(best, 1)
            if i != 5
        ]
        assert [(tile.left, tile.right, tile.caption) for tile in tiles] == expected


def test_a_sheet_without_images_has_its_title_only() -> None:
    """Of a set whose shards have gone."""
    assert contact_sheet.draw("a title", "text→image", []).height < 200
