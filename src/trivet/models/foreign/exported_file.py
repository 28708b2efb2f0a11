"""Reading a torch.export archive (`.pt2`) that somebody else made, without `torch.export.load`.

`torch.export.load` runs code from the file: it unpickles the sample inputs (falling back to the unrestricted
unpickler), tensors and objects marked as pickled, evaluates symbolic expressions and guards as Python, resolves
operators anywhere under `torch`, and opens compiled libraries. Here the archive is data: the graph is JSON, weights
are raw bytes, operators come from a closed list. Whatever could only be read by unpickling or linking is refused.
"""

from __future__ import annotations

import json
import math
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from trivet.errors import TrivetError
from trivet.models.foreign.assembly import Assembly, Unsupported, Value, refuse_unless
from trivet.models.foreign.exported_graph import OPERATORS, VIEWS, Call, Operator
from trivet.models.foreign.exported_quantized import QUANTIZED

DTYPES = {
    1: torch.uint8,
    2: torch.int8,
    4: torch.int32,
    5: torch.int64,
    7: torch.float32,
    8: torch.float64,
    12: torch.bool,
}
MAX_JSON = 256 << 20
MAJOR = 8
"""The version of the graph's schema that is read here."""


def import_exported(path: Path, max_bytes: int) -> fx.GraphModule:
    """The network in the torch.export archive at `path`, as PyTorch layers with the file's weights.

    Raises:
        TrivetError: not such an archive, members that would have to be unpickled or linked (named), an operator or a
            type that is not supported (named), or weights of more than `max_bytes`.
    """
    with opened(path, max_bytes) as program:
        return _Import(program).run()


@contextmanager
def opened(path: Path, max_bytes: int) -> Iterator[Program]:
    """The program in an archive; what goes wrong while it is read becomes one sentence."""
    try:
        with zipfile.ZipFile(path) as archive:
            yield Program(_Archive(archive, max_bytes))
    except zipfile.BadZipFile:
        raise TrivetError(f"{path} is not a torch.export archive or is damaged; export it again.") from None
    except Unsupported as error:
        raise TrivetError(f"{path} cannot be rebuilt: {error}.") from None
    except (KeyError, TypeError, AttributeError, ValueError, IndexError, EOFError, OSError, RuntimeError) as error:
        raise TrivetError(
            f"{path} is not laid out as PyTorch {torch.__version__} does ({type(error).__name__}: {error}); "
            "export it again with this version."
        ) from error


class _Archive:
    """The members of the zip file by their path below its one folder; sizes are checked before content is read."""

    def __init__(self, archive: zipfile.ZipFile, max_bytes: int) -> None:
        self.archive = archive
        self.members = {info.filename.partition("/")[2]: info for info in archive.infolist() if not info.is_dir()}
        total = sum(info.file_size for info in self.members.values())
        refuse_unless(total <= max_bytes, f"it holds {total} bytes, more than the ceiling of {max_bytes}")
        self.left = max_bytes
        graphs = [name for name in self.members if name.startswith("models/")]
        refuse_unless(
            graphs == ["models/model.json"], f"it holds {len(graphs)} exported models called 'model', not one"
        )
        for name, info in self.members.items():
            refuse_unless(
                info.compress_type == zipfile.ZIP_STORED and not info.flag_bits & 1,
                f"{name} is compressed or encrypted",
            )
            refuse_unless(not name.startswith("data/aotinductor/"), f"{name} is compiled code, which is never loaded")
            last = name.rpartition("/")[2]
            pickled = name.startswith("data/constants/") and last.startswith(("custom_obj", "opaque_obj"))
            legacy = name in ("data/weights/model.pt", "data/constants/model.pt")
            refuse_unless(not (pickled or legacy), f"{name} is a pickle, which can run code, and is never loaded")

        order = archive.read(self.members["byteorder"]).decode()
        refuse_unless(order == sys.byteorder, f"its numbers are {order}-endian, and this machine's are not")

    def json(self, name: str) -> Any:
        refuse_unless(name in self.members, f"{name} is missing")
        refuse_unless(self.members[name].file_size <= MAX_JSON, f"{name} is longer than {MAX_JSON} bytes")
        return json.loads(self.archive.read(self.members[name]))

    def tensors(self, folder: str) -> dict[str, Tensor]:
        """The tensors of `folder`, from raw bytes in the order of this machine."""
        config = self.json(f"{folder}/model_{folder.rpartition('/')[2]}_config.json")["config"]
        return {name: self._tensor(folder, name, entry) for name, entry in config.items()}

    def _tensor(self, folder: str, name: str, entry: Mapping[str, Any]) -> Tensor:
        member = f"{folder}/{entry['path_name']}"
        refuse_unless(
            entry["use_pickle"] is False, f"{member} ({name}) is a pickle, which can run code, and is never loaded"
        )
        refuse_unless(member in self.members, f"{member} ({name}) is missing")
        meta = entry["tensor_meta"]
        sizes, strides = ([_int(size) for size in meta[key]] for key in ("sizes", "strides"))
        refuse_unless(meta["dtype"] in DTYPES, f"{name} has a type (number {meta['dtype']}) that is not supported")
        dtype = DTYPES[meta["dtype"]]
        self.left -= math.prod(sizes) * dtype.itemsize
        refuse_unless(
            min(sizes, default=0) >= 0 <= self.left, f"{name} of shape {sizes} exceeds the ceiling on all tensors"
        )
        content = bytearray(self.archive.read(self.members[member]))
        if not content or not math.prod(sizes):
            return torch.zeros(sizes, dtype=dtype)
        flat = torch.frombuffer(content, dtype=dtype)
        last = _int(meta["storage_offset"]) + sum((n - 1) * s for n, s in zip(sizes, strides, strict=True))
        refuse_unless(
            min(strides, default=0) >= 0 <= _int(meta["storage_offset"]) and last < len(flat),
            f"{name} reaches beyond {member}",
        )
        return flat.as_strided(sizes, strides, _int(meta["storage_offset"])).clone()


class Program:
    """What an archive says of a classifier in eval mode, checked as far as that goes without its operators.

    Attributes:
        input, output: names of the only ones.
        shape, batch: of one record, and the batch size the file was written with (None: free).
        tensors: parameters, buffers and constants, by the names the nodes have for them.
        nodes: in their order.
    """

    def __init__(self, archive: _Archive) -> None:
        program = archive.json("models/model.json")
        major = program["schema_version"]["major"]
        refuse_unless(major == MAJOR, f"its schema has version {major}, and {MAJOR} can be read")
        graph, signature = program["graph_module"]["graph"], program["graph_module"]["signature"]
        stored = {**archive.tensors("data/constants"), **archive.tensors("data/weights")}
        inputs = []
        self.tensors: dict[str, Tensor] = {}
        for spec in signature["input_specs"]:
            ((kind, content),) = spec.items()
            if kind == "user_input":
                inputs.append(content["arg"]["as_tensor"]["name"])
            elif kind in ("parameter", "buffer", "tensor_constant"):
                name = content[f"{kind}_name"]
                refuse_unless(name in stored, f"the {kind} {name!r} has no tensor")
                self.tensors[content["arg"]["name"]] = stored[name]
            else:
                raise Unsupported(f"it takes an input of kind {kind!r}")
        outputs = signature["output_specs"]
        refuse_unless(len(inputs) == 1, f"it has {len(inputs)} inputs, and a classifier has one")
        refuse_unless(
            len(outputs) == 1 and "user_output" in outputs[0],
            f"it has {len(outputs)} outputs (buffers it changes count), and a classifier in eval mode has one",
        )
        self.input, self.output = inputs[0], outputs[0]["user_output"]["arg"]["as_tensor"]["name"]
        self.shape, self.batch = _input_shape(graph["tensor_values"][self.input])
        self.nodes = graph["nodes"]


def is_check(target: str) -> bool:
    """Whether a node only holds values against what the exporter knew of them."""
    return target.removeprefix("torch.ops.aten.").startswith("_assert_")


def listed(target: str) -> tuple[str, Operator]:
    """The name and the meaning of an operator, which must be on the list.

    Of one that changes its argument in place the name is that of its twin that does not.
    """
    namespace, _, name = target.removeprefix("torch.ops.").partition(".")
    if target.startswith("torch.ops.aten."):
        if name not in VIEWS and name not in OPERATORS:
            name = name.replace("_.", ".", 1)
        found = OPERATORS.get(name) or VIEWS.get(name)
    else:
        found = QUANTIZED.get(target.removeprefix("torch.ops."))
    if found is None:
        raise Unsupported(
            f"operator {target} is not supported; exported to ONNX, OnnxRuntimeModel runs it without gradients"
        )
    return f"{namespace}.{name}", found


def argument(given: Mapping[str, Any], read: Callable[[str], Any]) -> Any:
    """An argument of a node, which may be what `read` finds under the name of a value."""
    ((kind, content),) = given.items()
    if kind == "as_tensor":
        return read(content["name"])
    if kind == "as_tensors":
        return [read(each["name"]) for each in content]
    if kind == "as_sym_int":
        return _size(content, read)
    if kind == "as_sym_ints":
        return [_size(each, read) for each in content]
    return None if kind == "as_none" else content


def _size(content: Mapping[str, Any], read: Callable[[str], Any]) -> Any:
    if "as_int" in content:
        return content["as_int"]
    size = read(content["as_name"])
    entries = getattr(size, "entries", (None,))
    return size if entries == (None,) else entries[0]


def result_of(node: Mapping[str, Any]) -> str:
    """The name of a node's first result."""
    ((kind, out),) = node["outputs"][0].items()
    return str(out["name"] if kind == "as_tensor" else out["as_name"])


class _Import:
    """One pass over the nodes of the graph, in their order."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.assembly = Assembly(program.shape)
        self.values: dict[str, Value] = {**program.tensors, program.input: self.assembly.input}
        self.viewed: set[str] = set()  # names whose memory another value may share

    def run(self) -> fx.GraphModule:
        for node in self.program.nodes:
            self._node(node)
        return self.assembly.finish(self._read(self.program.output))

    def _node(self, node: Mapping[str, Any]) -> None:
        target = str(node["target"])
        if is_check(target):
            return
        name, make = listed(target)
        arguments = {each["name"]: argument(each["arg"], self._read) for each in node["inputs"]}
        read = [each["arg"]["as_tensor"]["name"] for each in node["inputs"] if "as_tensor" in each["arg"]]
        result = result_of(node)
        try:
            self.values[result] = make(Call(self.assembly, arguments, self.program.batch))
        except Unsupported as error:
            raise Unsupported(f"node {result!r} ({target}) {error}") from None
        if target != f"torch.ops.{name}":
            refuse_unless(
                read[0] not in self.viewed,
                f"node {result!r} ({target}) changes a value in place that has other names; call "
                "run_decompositions() on the exported program before saving it",
            )
            del self.values[read[0]]  # the exporter goes on with the new name; the old value is gone
        if name.removeprefix("aten.") in VIEWS:
            self.viewed |= {*read, result}

    def _read(self, name: str) -> Value:
        refuse_unless(name in self.values, f"{name!r} is read, and nothing computes it before")
        return self.values[name]


def _int(entry: Mapping[str, Any]) -> int:
    refuse_unless(isinstance(entry, dict) and type(entry.get("as_int")) is int, f"a stored tensor has the size {entry}")
    return int(entry["as_int"])


def _input_shape(meta: Mapping[str, Any]) -> tuple[list[int], int | None]:
    """The shape of one record, and the batch size the file was written with (None: free)."""
    refuse_unless(meta["dtype"] == 7, "its input is not float32")
    sizes = [each.get("as_int") for each in meta["sizes"]]
    refuse_unless(
        len(sizes) >= 2 and None not in sizes[1:],
        f"its input has the shape {sizes} with free axes (None) besides the batch; export it with fixed ones",
    )
    return sizes[1:], sizes[0]
