"""The ComfyUI side: five nodes from files to a conditioned MODEL, and the nodes around them.

load.py        Load EasyRef               files -> EASYREF_MODEL
group/         Reference Group            images -> EASYREF_GROUP, and nodes that prepare one
encode.py      Encode Reference Group     group + prompt -> EASYREF_CONTEXT
aggregate.py   Aggregate Reference Tokens context -> EASYREF_TOKENS
tokens/        nodes that combine, batch, save and load tokens
apply.py       Apply EasyRef              MODEL + tokens -> MODEL
unet_patch/    the patch that Apply attaches
inspect/       nodes that show the effect of the references
demo/          Tiny Demo Model            models to try the five nodes with, without a download
host/          interface to ComfyUI: hosted model, folders, images, previews, socket types, validation
"""

from comfy_api.latest import ComfyExtension, io

from .aggregate import EasyRefAggregate
from .apply import EasyRefApply
from .demo.demo import EasyRefDemo
from .encode import EasyRefEncodeGroup
from .group.budget import EasyRefGroupBudget
from .group.crop import EasyRefCropReference
from .group.from_folder import EasyRefGroupFromFolder
from .group.instruction import EasyRefInstruction
from .group.reference_group import EasyRefGroup, EasyRefSelectReferences
from .group.weigh import EasyRefWeighReferences
from .host.folders import make_checkpoint_folder, register_folders
from .inspect.attention import EasyRefReferenceAttention
from .inspect.consistency import EasyRefConsistency
from .inspect.influence import EasyRefReferenceInfluence
from .inspect.weight_sheet import EasyRefSheet, EasyRefWeightSheet
from .inspect.where_it_acts import EasyRefRecord, EasyRefWhereItActs
from .load import EasyRefLoader
from .tokens.combine import EasyRefBatchTokens, EasyRefCombineTokens, EasyRefTokensOverFrames
from .tokens.files import EasyRefLoadTokens, EasyRefSaveTokens

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


class EasyRefExtension(ComfyExtension):
    async def on_load(self) -> None:
        register_folders()
        make_checkpoint_folder()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES


async def comfy_entrypoint() -> EasyRefExtension:
    return EasyRefExtension()
