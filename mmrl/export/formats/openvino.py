"""`openvino`: OpenVINO IR of both towers (image.xml, text.xml, weights in .bin), and otherwise the folder of `onnx`."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmrl.export import tokenizer_json
from mmrl.export.formats import onnx
from mmrl.export.formats.base import Format, Truncated


def _write(truncated: Truncated, folder: Path, variants: Sequence[str]) -> dict[str, Any]:
    import openvino

    onnx.write_encoder(folder)
    names = {modality: {"fp32": f"{modality}.onnx"} for modality in truncated.bundle.model.sides}
    with tempfile.TemporaryDirectory() as scratch:
        graphs = onnx.write_graphs(truncated, Path(scratch), names, raw=True)
        if "tokenizer" in graphs:
            (Path(scratch) / tokenizer_json.FILE).rename(folder / tokenizer_json.FILE)
        for modality in names:
            graph = openvino.convert_model(Path(scratch) / f"{modality}.onnx")
            graphs[modality] = {"fp32": f"{modality}.xml", **{name: f"{modality}.{name}.xml" for name in variants}}
            for variant, name in graphs[modality].items():
                openvino.save_model(graph, folder / name, compress_to_fp16=variant == "fp16")
    return graphs


FORMAT = Format(
    name="openvino",
    one_tower=True,
    check=lambda full: tokenizer_json.check(full, "openvino"),
    write=_write,
    reopen=onnx.reopen,
    tolerance=1e-5,
    library="openvino",
    needs=("onnx", "onnxscript", "openvino"),
    variants=("fp16",),
)
