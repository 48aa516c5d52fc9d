"""EasyRef (arXiv 2412.09618): SDXL guided by a group of reference images.

The flow, in reading order (K references, S about 145 K + 60 tokens of context, D = 1536):

    mllm/        images and prompt          -> context states (1, S, D)         MLLM body, prefix caching
    tokens/      64 learned tokens appended -> reference tokens (1, 64, 2048)   last layer and projector
    unet/        reference tokens           -> K, V (rows, 64, inner) at 70 sites, and their term
    checkpoint/  a file                     -> the modules of all three
    model.py     load() and EasyRef: encode, aggregate, unconditional, key_values, save
    inspect/     what the tokens read and where they act, as numbers and drawings

    utils/ and files/ are below these; training/, mrbench/ and tiny/ above.
"""

from .mllm.context import ContextStates
from .mllm.instructions import INSTRUCTION
from .mllm.preprocess import SIZE
from .model import EasyRef, load
from .tokens.combine import combine
from .tokens.files import load_tokens, save_tokens
from .tokens.frames import batch, over_frames
from .tokens.reference_tokens import ReferenceTokens
from .unet import diffusers_unet

__all__ = [
    "INSTRUCTION",
    "SIZE",
    "ContextStates",
    "EasyRef",
    "ReferenceTokens",
    "batch",
    "combine",
    "diffusers_unet",
    "load",
    "load_tokens",
    "over_frames",
    "save_tokens",
]
