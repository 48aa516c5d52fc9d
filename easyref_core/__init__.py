"""EasyRef (arXiv 2412.09618): SDXL guided by a group of reference images.

The flow, in reading order (K references, S about 145 K + 60 tokens of context, D = 1536):

    preprocess.py        images, any sizes        -> patches (sum, 1176), grid (K, 3)
    instructions.py      instruction and prompt   -> input_ids (1, S)
    qwen2_vl.py          the vision tower and the decoder layer
    group_encoder.py     patches and ids          -> context states (1, S, D)         the MLLM body
    group_reader.py      runs it: what two groups have in common once (kept.py), in pieces where memory is short (pieces.py);
                         sums in the memory of a term (in_place.py)
    reference_tokens.py  64 learned tokens appended, last layer, projector -> reference tokens (1, 64, 2048)
    attention.py         K, V (1, 64, C) for each of the 70 cross-attentions, computed once; the reference term
    unet_layout.py       where those 70 are in a UNet

    layer_weights.py     in which layers the term acts, schedule.py in which steps, masks.py in which part of the picture
    term_share.py        how large the term is beside the text's attention

    model.py             load() and EasyRef: encode, aggregate, unconditional
    combine.py           sets of reference tokens made into one; token_frames.py makes one row a picture or frame
    token_files.py       reference tokens as files; whole_files.py writes them, and all others, whole or not at all
    negative.py          what the unconditional side reads in place of references
    formats.py           checkpoint formats as data; checkpoint.py opens one, from tensor_files.py, with the sizes of config.py
    image_files.py       image files that Pillow can read here
    presets.py           instructions to choose from; budget.py what a group will take; duplicates.py, crop.py for references
    aggregation_attention.py, influence.py, where_it_acts.py, consistency.py  what is read, by whom, where it acts; how near
    diffusers_unet.py    the same attention on a diffusers UNet
"""

from . import diffusers_unet
from .combine import combine
from .instructions import INSTRUCTION
from .model import EasyRef, load
from .preprocess import SIZE
from .reference_tokens import ContextStates, ReferenceTokens
from .token_files import load_tokens, save_tokens
from .token_frames import batch, over_frames

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
