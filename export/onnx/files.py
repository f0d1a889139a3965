"""Writes the graphs of an artifact: ``prefill.onnx``, ``decode.onnx``, one file of weights for both, and a manifest."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, BinaryIO, Literal

from sparsec.export.onnx.divided import divide
from sparsec.export.onnx.functions import DOMAIN, IR, OPSET, VERSION, with_functions

Kind = Literal["prefill", "decode"]
KINDS: tuple[Kind, ...] = ("prefill", "decode")
WEIGHTS = "weights.data"
SMALL = 1024  # bytes: what is smaller stays in the graph, where shape inference reads it
FOLDED = 64  # elements: constants up to here are folded, so that shapes are known; weights keep their names and layout
IN_PLACE = ("CacheUpdate", "RingWrite")  # operators that write a few slots of a store, by TensorScatter
ALIGNED = 4096  # a page: runtimes map the file


class Weights:
    """The file of weights while it is written; equal tensors are stored once, whichever graph they are in."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.places = file, dict[bytes, int]()

    def place(self, data: bytes) -> int:
        """Offset of these bytes in the file."""
        key = hashlib.sha256(data).digest()
        if key not in self.places:
            self.file.write(b"\0" * (-self.file.tell() % ALIGNED))
            self.places[key] = self.file.tell()
            self.file.write(data)
        return self.places[key]


def write_graph(
    program: Any, path: Path, weights: Weights, facts: dict[str, str], plugin_slots: int | None = None
) -> Any:
    """One traced graph, with the bodies of our operators; checked.

    Args:
        program: of :func:`~sparsec.export.onnx.graph.trace`; its weights are let go.
        path: the file; the weights lie beside it as :data:`WEIGHTS`.
        facts: go into ``metadata_props``.
        plugin_slots: divide decode attention into the operators that are plugins, for so many slots.

    Returns:
        the ``onnx.ModelProto`` without weights.
    """
    import onnx_ir as ir
    from onnxscript.optimizer import optimize_ir

    optimize_ir(program.model, input_size_limit=FOLDED, output_size_limit=SMALL)
    graph = program.model.graph
    for name, value in list(graph.initializers.items()):
        tensor = value.const_value
        value.name = name.removeprefix("model.")  # of the tracing module
        if tensor.nbytes >= SMALL:
            data = tensor.tobytes()
            offset = weights.place(data)
            value.const_value = ir.ExternalTensor(
                WEIGHTS, offset, len(data), tensor.dtype, shape=tensor.shape, name=value.name, base_dir=""
            )
    proto = ir.to_proto(program.model)
    proto.ir_version = IR
    read = {name for node in proto.graph.node for name in node.input}
    kept = [value for value in proto.graph.input if value.name in read]  # a decode step has no use for ``added``
    del proto.graph.input[:]
    proto.graph.input.extend(kept)
    # The tracer knows the operators of other opsets too; it wrote none of them.
    del proto.opset_import[:]
    for domain, version in (("", OPSET), (DOMAIN, VERSION)):
        proto.opset_import.add(domain=domain, version=version)
    for node in proto.graph.node:
        del node.metadata_props[:]  # where in PyTorch's code a node comes from
    del proto.metadata_props[:]
    for key, text in facts.items():
        proto.metadata_props.add(key=key, value=text)
    with_functions(proto)
    if plugin_slots is not None:
        divide(proto, plugin_slots)
    weights.file.flush()
    path.write_bytes(proto.SerializeToString())
    return proto


def aliased(proto: Any) -> dict[str, str]:
    """Outputs of a graph that are one of its inputs, written in place: one buffer is for both, by output.

    ONNX Runtime copies where two buffers are bound; TensorRT's cache update takes one only.
    """
    ends = [{value.name for value in side} for side in (proto.graph.input, proto.graph.output)]
    updates = [node for node in proto.graph.node if node.domain == DOMAIN and node.op_type in IN_PLACE]
    pairs = [(node.input[0], node.output[0]) for node in updates]
    return {after: before for before, after in pairs if before in ends[0] and after in ends[1]}


def check(path: Path) -> None:
    """onnx's checker and strict shape inference accept the file."""
    import onnx

    onnx.checker.check_model(str(path), full_check=True)
