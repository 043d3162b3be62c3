"""Pictures of the first results of some text queries, as a run's boards show them after each evaluation."""

from PIL import Image

from mmrl.data.samples import BadSample
from mmrl.data.sequential import ImageReader
from mmrl.evaluate.ranking.ranks import top_k
from mmrl.evaluate.sets import Embedded
from mmrl.images import contact_sheet
from mmrl.images.contact_sheet import Tile
from mmrl.nesting import truncate

QUERIES, RESULTS = 3, 5


def result_sheets(name: str, embedded: Embedded, reader: ImageReader, dim: int) -> dict[str, Image.Image]:
    """NAME/query-1 … -> a sheet of the first images for a caption of the set; always the same captions, evenly spread.

    Args:
        reader: reads the images of `embedded`.
        dim: of the embeddings that are compared.
    """
    rows = sorted({len(embedded.captions) * i // QUERIES for i in range(QUERIES)})
    image_Nd, text_qd = truncate(embedded.image_ND, dim), truncate(embedded.text_MD[rows], dim)
    found_qk, score_qk = top_k((text_qd @ image_Nd.T).numpy(), RESULTS)
    sheets = {}
    for number, (row, found_k, score_k) in enumerate(zip(rows, found_qk, score_qk, strict=True), 1):
        is_match_k = embedded.image_group_N[found_k] == embedded.text_group_M[row]
        tiles = [
            Tile(data, f"{rank}{' match' if is_match else ''}", f"{score:.2f}", embedded.keys[image])
            for rank, (image, score, is_match) in enumerate(zip(found_k, score_k, is_match_k, strict=True), 1)
            if (data := _image(reader, embedded.sample_indices[image])) is not None
        ]
        sheets[f"{name}/query-{number}"] = contact_sheet.draw(embedded.captions[row], f"text→image, {dim}-d", tiles)
    return sheets


def _image(reader: ImageReader, index: int) -> bytes | None:
    try:
        return reader.read_image(index)[0].image
    except BadSample:  # its shard has gone since it was embedded
        return None
