"""Cold encoding of groups against the device's roofline, and against transformers on the same weights.

The roofline is the larger of two times: the operations of the encoding at the speed of a large matrix
product, and the bytes that it has to move at least, at the speed of a large copy. The floor of the single
operations is the sum of each one's own roofline: the least time of this sequence of operations without
fusing any. Each causal attention counts there as a full square.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from easyref_core.mllm.budget import VISION_CHUNK_PATCHES, flops
from easyref_core.mllm.prefix_cache import PreparedGroup
from tools.bench.encoding import Encoder, cold
from tools.bench.gpu_parts.options import GpuOptions
from tools.bench.report import Limit, Row
from tools.bench.roofline import OperationFloor, device_peak
from tools.bench.timing import Say

MAX_OF_ROOFLINE = Limit("<=", 2.0)


def measure(options: GpuOptions, say: Say) -> Iterator[Row]:
    """Rows of the device's peaks, then of each group size."""
    encoder = Encoder.of(options.load_easyref())
    peak = device_peak(encoder.dtype, encoder.device)
    yield from peak.rows()
    for count in options.references:
        first, *others = cold(encoder, count, options, say)
        yield from (first, *others)
        group = encoder.group(list(range(count)))
        floor = peak.seconds(least_flops(encoder, group), least_bytes(encoder, group))
        name = f"{count} references ({group.input_ids.shape[1]} tokens)"
        ratio, wanted = first.value / floor, None if options.quick else MAX_OF_ROOFLINE
        yield Row(f"{name}, cold; to the roofline", first.value, "s", ratio, wanted=wanted)
        yield Row(f"{name}, roofline of counted operations and bytes", floor, "s")
        with OperationFloor(peak) as counted:
            encoder.cold_states(group)
        label = f"{name}, floor of its {counted.launches} single operations; the cold time to it"
        yield Row(label, counted.seconds, "s", first.value / counted.seconds)
        encoder.encoder.caches.clear()


def least_flops(encoder: Encoder, group: PreparedGroup) -> int:
    """Operations of encoding a group, without the masked half of the decoder's attention."""
    config, tokens = encoder.config, group.input_ids.shape[1]
    hidden = 2 * config.body_layers * config.hidden_size * tokens * tokens
    return flops(config, group.patches, tokens) - hidden


def least_bytes(encoder: Encoder, group: PreparedGroup) -> int:
    """Bytes that encoding a group has to move: its input, the weights, its states, keys and values.

    The decoder's weights are read once, those of the vision tower once for each chunk of images.
    """
    config, itemsize = encoder.config, encoder.dtype.itemsize
    chunks = -(-sum(group.patches) // VISION_CHUNK_PATCHES)
    body = encoder.mllm.encoder
    weights = chunks * nbytes(body.visual) + nbytes(body.layers)
    patches = sum(group.patches) * config.patch_values
    tokens = group.input_ids.shape[1]
    states = 2 * tokens * config.hidden_size  # the embeddings, read, and the states, written
    key_values = 2 * config.body_layers * tokens * config.kv_heads * config.head_dim
    return weights + (patches + states + key_values) * itemsize


def nbytes(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())
