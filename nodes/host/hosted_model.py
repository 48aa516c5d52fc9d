"""HostedEasyRef: facade of a model with host-managed weights: encode, aggregate, K/V, precision."""

from __future__ import annotations

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
from ...easyref_core.files.tensor_files import copy_to_pages
from ...easyref_core.inspect.attention_maps import AttentionShares, attention_shares
from ...easyref_core.inspect.influence import pooled_features
from ...easyref_core.mllm.budget import MemoryOptions, activation_bytes, flops
from ...easyref_core.model import EasyRef, build
from ...easyref_core.tokens.reference_tokens import ReferenceTokens
from ...easyref_core.utils.images import black_image
from .attach import CopyByReference, attach
from .drives import may_stay_mapped
from .key_values import MAX_TABLE_BYTES, KeyValueProjector, KeyValueTable, project_rows
from .socket_types import HostedContext, TokenPair

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ...easyref_core.mllm.context import ContextStates
    from ...easyref_core.mllm.prefix_cache import PreparedGroup
    from ...easyref_core.unet.reference_attention import KeyValue
    from .key_values import KeyValueRows

PRECISIONS = ("auto", "bf16", "fp32", "fp8_e4m3fn")


class HostedEasyRef(CopyByReference):
    """Value of EASYREF_MODEL. The host finds the weights that it may evict by `patcher` and `get_models`.

    Contexts and tokens refer to it. It must not refer to them, or a cycle would keep the weights in memory.
    """

    def __init__(self, model: EasyRef) -> None:
        self.model = model
        self.patcher = _hosted(model.mllm, model.device)
        self._kv_patcher = _hosted(model.kv, model.device)
        for patcher in self.get_models():
            self.clear_caches_on_detach(patcher)
        self._key_values: WeakKeyDictionary[TokenPair, list[KeyValue]] = WeakKeyDictionary()
        self.rate: float | None = None  # FLOPs per second of the last encoding, for estimates

    def __reduce__(self) -> str:
        raise TypeError(
            "An EasyRef model cannot be pickled, because ComfyUI manages its weights. Run Load EasyRef in "
            "each process that needs it; contexts and reference tokens can be pickled, without their model."
        )

    def get_models(self) -> list[ModelPatcher]:
        return [self.patcher, self._kv_patcher]

    def clear_caches_on_detach(self, patcher: ModelPatcher) -> None:
        """Clear the caches of the MLLM when the user unloads this patcher's model.

        The MLLM itself may have been evicted before, so its own patchers are not enough.
        """
        callbacks = {CallbacksMP.ON_DETACH: partial(_forget, ref(self.model))}
        attach(patcher, f"easyref {id(self.model)}", callbacks=callbacks)

    def encode(
        self,
        images: Sequence[Tensor],
        prompt: str,
        instruction: str,
        size: int,
        progress: Callable[[float], None] | None = None,
    ) -> HostedContext:
        """Context states of a group, on the host's intermediate device.

        progress: called with the fraction done (0..1) after each block of the MLLM body. By default it
        advances a progress bar of one step per reference and raises if the user has cancelled.
        """
        return self.encode_prepared(self.model.prepare(images, prompt, instruction, size), progress)

    def encode_prepared(
        self, group: PreparedGroup, progress: Callable[[float], None] | None = None
    ) -> HostedContext:
        """Context states of a prepared group; see encode."""
        plan = self.model.plan(group)
        self._load_for(plan.patches, plan.new_tokens, plan.cached_tokens)
        start = time.monotonic()
        context = self.model.encode_plan(plan, progress or progress_callback(len(group.images)))
        # a short continuation is bound by reading the weights, not by FLOPs: not used for the estimate
        if not plan.cached_tokens:
            done = flops(self.model.config, plan.patches, plan.new_tokens)
            self.rate = done / max(time.monotonic() - start, 1e-3)
        return HostedContext(**vars(context), easyref=self)

    def aggregate(
        self,
        context: ContextStates,
        negative: ContextStates | None = None,
        noise_seed: int = 0,
        noise_strength: float = 0.0,
    ) -> TokenPair:
        """Tokens for both sides.

        The unconditional ones are of the negative context. Without one they are of a black image with the
        same instruction and size, or of a noise image if noise_strength is not 0.
        """
        self.model.require_same_checkpoint(context, "context")
        if negative is not None:
            self.model.require_same_checkpoint(negative, "negative context")
            self._load_for((), max(context.states.shape[1], negative.states.shape[1]))
            tokens = self.model.aggregate(context), self.model.aggregate(negative)
        else:
            provenance = context.provenance
            black = self.model.budget([black_image().size], "", provenance.instruction, provenance.size)
            self._load_for((), context.states.shape[1], at_least=black.activation_bytes)
            tokens = (
                self.model.aggregate(context),
                self.model.unconditional(provenance.instruction, provenance.size, noise_seed, noise_strength),
            )
        sides = (ReferenceTokens.of(t.to(mm.intermediate_device()), t.provenance) for t in tokens)
        return TokenPair(*sides, easyref=self)

    def attention(self, context: ContextStates, token: int) -> AttentionShares:
        """Attention of the reference tokens to a context; see attention_shares."""
        self.model.require_same_checkpoint(context, "context")
        self._load_for((), context.states.shape[1])
        return attention_shares(self.model, context, token)

    def vision_features(
        self, images: Sequence[Tensor], size: int, progress: Callable[[float], None]
    ) -> Tensor:
        """Pooled features of the vision tower for each image, (K, D); see pooled_features."""
        plan = self.model.plan(self.model.prepare(images, "", "", size), use_prefix=False)
        self._load_for(plan.patches, 0)
        return pooled_features(self.model, plan, progress)

    def key_values(self, tokens: TokenPair) -> list[KeyValue]:
        """K and V per site, rows [unconditional, conditional], float32 on the intermediate device.

        Computed once per tokens.
        """
        if tokens not in self._key_values:
            self.model.checkpoint.require_not_cut()
            mm.load_models_gpu([self._kv_patcher])
            project = partial(self.model.key_values, dtype=torch.float32, device=mm.intermediate_device())
            rows = torch.cat([tokens.unconditional, tokens.conditional])
            self._key_values[tokens] = project_rows(rows, project)
        return self._key_values[tokens]

    def key_value_rows(self, tokens: TokenPair) -> KeyValueRows:
        """K and V of these tokens: a table, or a projector where the table would exceed MAX_TABLE_BYTES."""
        rows = torch.cat([tokens.unconditional, tokens.conditional])
        row_numel = 2 * rows.shape[1] * sum(self.model.checkpoint.widths.values())
        if len(rows) * row_numel * torch.float32.itemsize <= MAX_TABLE_BYTES:
            return KeyValueTable(self.key_values(tokens), len(tokens.unconditional))
        project = partial(self.model.key_values, dtype=torch.float32)
        return KeyValueProjector(rows, len(tokens.unconditional), row_numel, project, self._kv_patcher)

    def require_same_checkpoint(self, tokens: TokenPair) -> None:
        """Raise ValueError for tokens of another checkpoint."""
        for side in (tokens.unconditional, tokens.conditional):
            self.model.require_same_checkpoint(side, "set of reference tokens")

    def _load_for(
        self, patches: Sequence[int], tokens: int, cached_tokens: int = 0, at_least: int = 0
    ) -> None:
        """Load the MLLM with memory for its activations: at_least in bytes, the rest as activation_bytes."""
        self.model.checkpoint.require_not_cut()
        config = self.model.config
        tokens += config.num_tokens
        needed = activation_bytes(config, patches, tokens, self.model.dtype.itemsize, cached_tokens)
        mm.load_models_gpu([self.patcher], max(needed, at_least))


def load_hosted(checkpoint: Path, mllm: Path | None, precision: str, causal: bool | None) -> HostedEasyRef:
    """Load a checkpoint for the host. precision: of the MLLM's stored weights, one of PRECISIONS."""
    device = mm.get_torch_device()
    compute = compute_dtype(device, precision)
    mapped = all(may_stay_mapped(path) for path in (checkpoint, mllm) if path)
    opened = open_checkpoint(checkpoint, mllm, causal, mapped)
    memory = MemoryOptions(mm.intermediate_device(), on_out_of_memory=_free)
    cast = storage(precision, compute, device)
    operations = comfy.ops.manual_cast
    return HostedEasyRef(
        build(opened, mllm, device, compute, cast=cast, operations=operations, memory=memory)
    )


def compute_dtype(device: torch.device, precision: str) -> torch.dtype:
    """bfloat16 where the device supports it, else float32; Qwen2's activations overflow float16."""
    return torch.bfloat16 if precision != "fp32" and mm.should_use_bf16(device) else torch.float32


def storage(precision: str, compute: torch.dtype, device: torch.device) -> Cast:
    """Cast of each weight to its stored dtype.

    `auto` leaves the file's bytes as they are, unless they are wider than the compute dtype.
    """
    embeddings = precision == "fp8_e4m3fn" and looks_up_fp8(device)

    def stored_dtype(name: str, tensor: Tensor) -> torch.dtype:
        if precision == "bf16":
            return torch.bfloat16
        if precision == "fp32":
            return torch.float32
        if precision == "fp8_e4m3fn" and may_be_fp8(name, tensor, embeddings):
            return torch.float8_e4m3fn
        return compute if tensor.dtype.itemsize > compute.itemsize else tensor.dtype

    def cast(name: str, tensor: Tensor) -> Tensor:
        dtype = stored_dtype(name, tensor)
        if not mm.supports_cast(device, dtype):  # fp8 on MPS, bf16 on DirectML
            dtype = compute
        return tensor if tensor.dtype == dtype else copy_to_pages(tensor, dtype)

    return cast


def looks_up_fp8(device: torch.device) -> bool:
    """True if the device supports embedding lookup in fp8."""
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
    """Release cached memory after a failed allocation.

    On a GPU the same error may be raised again by the next operation, so it is discarded first.
    """
    mm.discard_cuda_async_error()
    mm.soft_empty_cache()


def _forget(model: ref[EasyRef], _: ModelPatcher, unpatch_all: bool) -> None:
    """ON_DETACH callback: clear the MLLM's caches, unless a prompt runs or a load follows.

    While a prompt runs, SDXL needs the memory on the device, and the caches are elsewhere. Otherwise the user
    unloads the models, or the host does: after a node ran out of memory, or after each prompt with
    --disable-smart-memory. Without unpatch_all the model is about to be loaded again.
    """
    if unpatch_all and get_executing_context() is None and (unloaded := model()):
        unloaded.clear_cache()


def progress_callback(references: int) -> Callable[[float], None]:
    """A callback that advances a progress bar of `references` steps, and raises if the user has cancelled."""
    bar = comfy.utils.ProgressBar(references)

    def progress(done: float) -> None:
        mm.throw_exception_if_processing_interrupted()
        bar.update_absolute(references * done, references)

    return progress
