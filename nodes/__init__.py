"""The ComfyUI side: five nodes from files to a conditioned MODEL, and what stands between, beside and after them.

    load.py        Load EasyRef               files -> EASYREF_MODEL
    references.py  Reference Group            images -> EASYREF_GROUP
    encode.py      Encode Reference Group     group + prompt -> EASYREF_CONTEXT
    aggregate.py   Aggregate Reference Tokens context -> EASYREF_TOKENS
    apply.py       Apply EasyRef              MODEL + tokens -> MODEL
    demo.py        Tiny Demo Model            everything the five need to be tried, without a download
    reference_attention.py, influence.py      what the tokens read, and what each reference does to them
    record.py, where_it_acts.py               how strongly the references act, by block, step and place
    consistency.py                            how close pictures are to the references
    weight_sheet.py                           weights and ends to compare, and their pictures on one sheet

    folder.py, crop.py                        a group from a folder; square crops
    instruction.py, group_budget.py, weigh.py what the MLLM is told; what it takes; a weight for each reference
    save_tokens.py, load_tokens.py            tokens as files
    combine_tokens.py                         tokens of several groups made into one set
    batch_tokens.py, tokens_over_frames.py    one set for each picture or frame

files.py finds checkpoints and MLLM folders, file_changes.py notices replaced ones, mllm_patcher.py gives the
weights to the host, unet_patch.py patches the UNet: injection.py is what one Apply node adds, site_patch.py
adds it at one attention, step_wrapper.py tells each UNet call what acts. batch_layout.py knows whose each row
of a UNet batch is, guidance.py what the guider does, sub_batch.py which part of a batch is sampled;
key_values.py holds or projects K and V, memory.py tells the host their size; compiled.py is for
torch.compile, replaced_forward.py for packs that replace an attention. tiny_sdxl.py, tiny_text.py and
tiny_vae.py are the demo's model. token_pairs.py is what the nodes that take several tokens share, inputs.py
inputs that several have, pictures.py what is between IMAGE and PIL, shown.py what nodes show, notes.py their
warnings, log.py what they log, declared.py that inputs are what their nodes declare.
"""

from comfy_api.latest import ComfyExtension, io

from .aggregate import EasyRefAggregate
from .apply import EasyRefApply
from .batch_tokens import EasyRefBatchTokens
from .combine_tokens import EasyRefCombineTokens
from .consistency import EasyRefConsistency
from .crop import EasyRefCropReference
from .declared import keep_to_schema
from .demo import EasyRefDemo
from .encode import EasyRefEncodeGroup
from .files import make_checkpoint_folder, register_folders
from .folder import EasyRefGroupFromFolder
from .group_budget import EasyRefGroupBudget
from .influence import EasyRefReferenceInfluence
from .instruction import EasyRefInstruction
from .load import EasyRefLoader
from .load_tokens import EasyRefLoadTokens
from .record import EasyRefRecord
from .reference_attention import EasyRefReferenceAttention
from .references import EasyRefGroup, EasyRefSelectReferences
from .save_tokens import EasyRefSaveTokens
from .tokens_over_frames import EasyRefTokensOverFrames
from .weigh import EasyRefWeighReferences
from .weight_sheet import EasyRefSheet, EasyRefWeightSheet
from .where_it_acts import EasyRefWhereItActs

NODES = [
    EasyRefLoader,
    EasyRefGroup,
    EasyRefEncodeGroup,
    EasyRefAggregate,
    EasyRefApply,
    EasyRefDemo,
    EasyRefSaveTokens,
    EasyRefLoadTokens,
    EasyRefCombineTokens,
    EasyRefBatchTokens,
    EasyRefTokensOverFrames,
    EasyRefGroupFromFolder,
    EasyRefCropReference,
    EasyRefSelectReferences,
    EasyRefInstruction,
    EasyRefGroupBudget,
    EasyRefWeighReferences,
    EasyRefReferenceAttention,
    EasyRefReferenceInfluence,
    EasyRefRecord,
    EasyRefWhereItActs,
    EasyRefConsistency,
    EasyRefWeightSheet,
    EasyRefSheet,
]
for node in NODES:
    keep_to_schema(node)


class EasyRefExtension(ComfyExtension):
    async def on_load(self) -> None:
        register_folders()
        make_checkpoint_folder()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES


async def comfy_entrypoint() -> EasyRefExtension:
    return EasyRefExtension()
