"""`Policy`: where the parts of a model wait, and how many tokens pass through a layer at once. residency.py carries it out.

`fewest` layer inputs: of L layers, P inputs with P (P + 1) / 2 >= L are kept, in segments that get shorter by one; the others are computed
again from the nearest kept one. That is one more forward pass in all, and never more than P inputs in memory.
"""

from dataclasses import dataclass, replace
from typing import Literal

from qlora_lite.model.host_tensors import Home

LayerInputs = Literal["device", "fewest", "host", "host_fewest"]


@dataclass(frozen=True)
class Policy:
    """Where the parts of a model wait. The defaults keep everything on the device and whole."""

    chunk_tokens: int = 0  # tokens of a sequence that pass through a layer at once; 0: all
    layer_inputs: LayerInputs = "device"
    resident_layers: int | None = None  # None: all; n: the first n, the others are streamed
    stream_from: Literal["host", "disk"] = "host"
    embeddings: Home = "device"
    head: Literal["resident", "streamed"] = "resident"
    keys_values: Home = "device"

    @property
    def inputs_home(self) -> Home:
        return "host" if self.layer_inputs in ("host", "host_fewest") else "device"

    @property
    def keeps_fewest(self) -> bool:
        return self.layer_inputs in ("fewest", "host_fewest")

    @property
    def uses_host(self) -> bool:
        """Whether anything waits in host memory."""
        streams = self.resident_layers is not None and self.stream_from == "host"
        ends = self.embeddings == "host" or self.head == "streamed"
        return streams or ends or self.inputs_home == "host" or self.keys_values == "host"

    @property
    def is_plain(self) -> bool:
        """Whether nothing waits elsewhere and nothing is chunked: ordinary checkpointing computes the step."""
        return replace(self, stream_from="host") == Policy()

    def __str__(self) -> str:
        parts = [
            f"layers in chunks of {self.chunk_tokens} tokens" if self.chunk_tokens else "",
            {
                "fewest": "the fewest layer inputs kept",
                "host": "layer inputs on the host",
                "host_fewest": "the fewest layer inputs kept, on the host",
            }.get(self.layer_inputs, ""),
            ""
            if self.resident_layers is None
            else f"{self.resident_layers} layers resident, others from {self.stream_from}",
            "embeddings on the host" if self.embeddings == "host" else "",
            "head streamed" if self.head == "streamed" else "",
            "keys and values on the host" if self.keys_values == "host" else "",
        ]
        return ", ".join(part for part in parts if part) or "everything on the device"


PLAIN = Policy()


def kept_inputs(num_layers: int) -> tuple[int, ...]:
    """Layers whose inputs `fewest` keeps: the first of segments that get shorter by one."""
    size = 1
    while size * (size + 1) // 2 < num_layers:
        size += 1
    kept, first = [], 0
    while first < num_layers:
        kept.append(first)
        first, size = first + size, max(1, size - 1)
    return tuple(kept)


@dataclass(frozen=True)
class MostKept:
    """The most layer inputs in memory at once with `fewest`, and how many of them have been recomputed by then."""

    num_inputs: int
    num_recomputed: int


def most_kept(num_layers: int) -> MostKept:
    """The backward pass holds the most at the last layer of a segment; of several such moments, the first."""
    kept = kept_inputs(num_layers)
    inside = [end - first for first, end in zip(kept, (*kept[1:], num_layers), strict=True)]
    return max((MostKept(number + size, size - 1) for number, size in reversed(list(enumerate(inside)))),
               key=lambda most: most.num_inputs)  # fmt: skip
