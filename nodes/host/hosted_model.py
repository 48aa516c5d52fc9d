"""An EasyRef model whose weights belong to the host: it streams, pages, counts and evicts them like any model."""

from __future__ import annotations

import mmap
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary, ref

import comfy.model_management as mm
import comfy.ops
import comfy.utils
import torch
from comfy.model_patcher import CoreModelPatcher, ModelPatcher
from comfy.patcher_extension import CallbacksMP
from comfy_execution.utils import get_executing_context

from ...easyref_core.checkpoint.checkpoint import Cast, may_be_fp8, open_checkpoint
from ...easyref_core.inspect.attention_maps import AttentionShares, attention_shares
from ...easyref_core.inspect.influence import pooled_features
from ...easyref_core.mllm.budget import MemoryOptions, activation_bytes, flops
from ...easyref_core.model import EasyRef, build
from ...easyref_core.tokens.reference_tokens import ReferenceTokens
from ...easyref_core.utils.images import black_image
from .key_values import MAX_TABLE_BYTES, KeyValueProjector, KeyValueTable, project_rows
from .socket_types import TokenPair

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ...easyref_core.mllm.context import ContextStates
    from ...easyref_core.mllm.prefix_cache import PreparedGroup
    from ...easyref_core.unet.reference_attention import KeyValue
    from .key_values import KeyValueRows

PRECISIONS = ("auto", "bf16", "fp32", "fp8_e4m3fn")


class HostedEasyRef:
    """What EASYREF_MODEL carries. `patcher` and `get_models` are how the host finds the weights it may evict."""

    def __init__(self, model: EasyRef) -> None:
        self.model = model
        self.patcher = _hosted(model.mllm, model.device)
        self._kv_patcher = _hosted(model.kv, model.device)
        for patcher in self.get_models():
            self.forget_with(patcher)
        self._key_values: WeakKeyDictionary[TokenPair, list[KeyValue]] = WeakKeyDictionary()
        self.rate: float | None = None  # operations a second of the last encoding, for estimates

    def get_models(self) -> list[ModelPatcher]:
        return [self.patcher, self._kv_patcher]

    def forget_with(self, patcher: ModelPatcher) -> None:
        """What was read goes when the user unloads this model; the MLLM may have had to make room before that."""
        key = f"easyref {id(self.model)}"
        patcher.remove_callbacks_with_key(CallbacksMP.ON_DETACH, key)
        patcher.add_callback_with_key(CallbacksMP.ON_DETACH, key, partial(_forget, ref(self.model)))

    def encode(
        self,
        images: Sequence[Tensor],
        prompt: str,
        instruction: str,
        size: int,
        progress: Callable[[float], None] | None = None,
    ) -> ContextStates:
        """Context states of a group, on the host's intermediate device. Counts one step per reference; can be
        stopped.

        progress: told the part that is done after each of the MLLM body's blocks, in place of counting.
        """
        return self.encode_prepared(self.model.prepare(images, prompt, instruction, size), progress)

    def encode_prepared(
        self, group: PreparedGroup, progress: Callable[[float], None] | None = None
    ) -> ContextStates:
        """Context states of a prepared group; see encode."""
        plan = self.model.plan(group)
        self._load_for(plan.patches, plan.new_tokens, plan.cached_tokens)
        start = time.monotonic()
        context = self.model.encode_plan(plan, progress or counted(len(group.images)))
        if (
            not plan.cached_tokens
        ):  # a few tokens read on take the time of the weights, not of their operations
            done = flops(self.model.config, plan.patches, plan.new_tokens)
            self.rate = done / max(time.monotonic() - start, 1e-3)
        return context

    def aggregate(
        self,
        context: ContextStates,
        negative: ContextStates | None = None,
        noise_seed: int = 0,
        noise_strength: float = 0.0,
    ) -> TokenPair:
        """Tokens for both sides. The unconditional ones are of the negative context, or else read the same
        instruction, at the same size, of a black image, or of noise where that has a strength."""
        self.model.require_same_checkpoint(context, "context")
        if negative is not None:
            self.model.require_same_checkpoint(negative, "negative context")
            self._load_for((), max(context.states.shape[1], negative.states.shape[1]))
            tokens = self.model.aggregate(context), self.model.aggregate(negative)
        else:
            made = context.provenance
            black = self.model.budget([black_image().size], "", made.instruction, made.size)
            self._load_for((), context.states.shape[1], at_least=black.activation_bytes)
            tokens = (
                self.model.aggregate(context),
                self.model.unconditional(made.instruction, made.size, noise_seed, noise_strength),
            )
        return TokenPair(*(ReferenceTokens.of(t.to(mm.intermediate_device()), t.provenance) for t in tokens))

    def attention(self, context: ContextStates, token: int) -> AttentionShares:
        """What the reference tokens read of a context; see attention_shares."""
        self.model.require_same_checkpoint(context, "context")
        self._load_for((), context.states.shape[1])
        return attention_shares(self.model, context, token)

    def vision_features(
        self, images: Sequence[Tensor], size: int, progress: Callable[[float], None]
    ) -> Tensor:
        """What the vision tower sees in each image (K, D); see pooled_features."""
        plan = self.model.plan(self.model.prepare(images, "", "", size), use_prefix=False)
        self._load_for(plan.patches, 0)
        return pooled_features(self.model, plan, progress)

    def key_values(self, tokens: TokenPair) -> list[KeyValue]:
        """K and V per site, rows [unconditional, conditional], float32 on the intermediate device; once per tokens."""
        if tokens not in self._key_values:
            mm.load_models_gpu([self._kv_patcher])
            project = partial(self.model.key_values, dtype=torch.float32, device=mm.intermediate_device())
            rows = torch.cat([tokens.unconditional, tokens.conditional])
            self._key_values[tokens] = project_rows(rows, project)
        return self._key_values[tokens]

    def key_value_rows(self, tokens: TokenPair) -> KeyValueRows:
        """K and V of these tokens: a table, or projected while sampling where that is larger than
        MAX_TABLE_BYTES.
        """
        rows = torch.cat([tokens.unconditional, tokens.conditional])
        row_numel = 2 * rows.shape[1] * sum(self.model.checkpoint.widths.values())
        if len(rows) * row_numel * torch.float32.itemsize <= MAX_TABLE_BYTES:
            return KeyValueTable(self.key_values(tokens), len(tokens.unconditional))
        project = partial(self.model.key_values, dtype=torch.float32)
        return KeyValueProjector(rows, len(tokens.unconditional), row_numel, project, self._kv_patcher)

    def require_same_checkpoint(self, tokens: TokenPair) -> None:
        """Raises ValueError for tokens of another checkpoint."""
        for side in (tokens.unconditional, tokens.conditional):
            self.model.require_same_checkpoint(side, "set of reference tokens")

    def _load_for(
        self, patches: Sequence[int], tokens: int, cached_tokens: int = 0, at_least: int = 0
    ) -> None:
        """Load the MLLM with memory for its activations, at_least in bytes; the rest as for activation_bytes."""
        config = self.model.config
        tokens += config.num_tokens
        needed = activation_bytes(config, patches, tokens, self.model.dtype.itemsize, cached_tokens)
        mm.load_models_gpu([self.patcher], max(needed, at_least))


def load_hosted(
    checkpoint: Path, mllm: Path | None, tokenizer: Path, precision: str, causal: bool | None
) -> HostedEasyRef:
    """Load a checkpoint for the host. precision: one of PRECISIONS, how the MLLM's weights are stored."""
    device = mm.get_torch_device()
    compute = compute_dtype(device, precision)
    opened = open_checkpoint(checkpoint, mllm, causal)
    memory = MemoryOptions(mm.intermediate_device(), on_out_of_memory=_free)
    cast = storage(precision, compute, device)
    model = build(
        opened, tokenizer, device, compute, cast=cast, operations=comfy.ops.manual_cast, memory=memory
    )
    return HostedEasyRef(model)


def compute_dtype(device: torch.device, precision: str) -> torch.dtype:
    """bfloat16 where the device does it, else float32. Never float16: Qwen2's activations overflow it."""
    return torch.bfloat16 if precision != "fp32" and mm.should_use_bf16(device) else torch.float32


def storage(precision: str, compute: torch.dtype, device: torch.device) -> Cast:
    """How each weight is kept. `auto` keeps the file's own bytes mapped, unless they are wider than the arithmetic."""
    embeddings = precision == "fp8_e4m3fn" and looks_up_fp8(device)

    def kept_as(name: str, tensor: Tensor) -> torch.dtype:
        if precision == "bf16":
            return torch.bfloat16
        if precision == "fp32":
            return torch.float32
        if precision == "fp8_e4m3fn" and may_be_fp8(name, tensor, embeddings):
            return torch.float8_e4m3fn
        return compute if tensor.dtype.itemsize > compute.itemsize else tensor.dtype

    def cast(name: str, tensor: Tensor) -> Tensor:
        dtype = kept_as(name, tensor)
        if not mm.supports_cast(device, dtype):  # fp8 on MPS, bf16 on DirectML
            dtype = compute
        return tensor if tensor.dtype == dtype else _converted(tensor, dtype)

    return cast


def _converted(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy in pages of its own, which go back to the system with it; freed heap memory would mostly stay."""
    pages = mmap.mmap(-1, tensor.numel() * dtype.itemsize)
    return torch.frombuffer(pages, dtype=dtype).view(tensor.shape).copy_(tensor)


def looks_up_fp8(device: torch.device) -> bool:
    """Whether the device finds rows of an fp8 table, as embeddings are found; not all do."""
    try:
        table = torch.zeros(2, 1, device=device).to(torch.float8_e4m3fn)
        torch.nn.functional.embedding(torch.zeros(1, dtype=torch.long, device=device), table)
    except (RuntimeError, TypeError):  # MPS has no such type: TypeError
        return False
    return True


def _hosted(module: nn.Module, device: torch.device) -> ModelPatcher:
    mm.archive_model_dtypes(module)
    return CoreModelPatcher(module, load_device=device, offload_device=mm.text_encoder_offload_device())


def _free() -> None:
    """Give memory back where an allocation failed; on a GPU the error may be reported a second time, by what comes next."""
    mm.discard_cuda_async_error()
    mm.soft_empty_cache()


def _forget(model: ref[EasyRef], _: ModelPatcher, unpatch_all: bool) -> None:
    """ON_DETACH. Where a prompt runs, SDXL needs the room on the device: what was read is kept elsewhere, and
    worth it.

    Otherwise it is the user who unloads the models, or the host: after a node ran out of memory, after each
    prompt with --disable-smart-memory. Without unpatch_all the model is about to be loaded again.
    """
    if unpatch_all and get_executing_context() is None and (unloaded := model()):
        unloaded.clear_cache()


def counted(references: int) -> Callable[[float], None]:
    """Shows the part that is done as so many references done, in fractions; raises where the user has cancelled."""
    bar = comfy.utils.ProgressBar(references)

    def progress(done: float) -> None:
        mm.throw_exception_if_processing_interrupted()
        bar.update_absolute(references * done, references)

    return progress
