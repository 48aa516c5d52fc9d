"""The ComfyUI side: five nodes, from files to a conditioned MODEL, one to try them, and some to look at what they do.

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

files.py finds checkpoints and MLLM folders, mllm_patcher.py gives the weights to the host, unet_patch.py patches the
UNet, guidance.py tells its patches what the guider is doing. tiny_sdxl.py, tiny_text.py and tiny_vae.py
are the demo's model.
"""

from comfy_api.latest import ComfyExtension, io

from .aggregate import EasyRefAggregate
from .apply import EasyRefApply
from .consistency import EasyRefConsistency
from .demo import EasyRefDemo
from .encode import EasyRefEncodeGroup
from .files import register_folders
from .influence import EasyRefReferenceInfluence
from .load import EasyRefLoader
from .record import EasyRefRecord
from .reference_attention import EasyRefReferenceAttention
from .references import EasyRefGroup
from .weight_sheet import EasyRefSheet, EasyRefWeightSheet
from .where_it_acts import EasyRefWhereItActs


class EasyRefExtension(ComfyExtension):
    async def on_load(self) -> None:
        register_folders()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            EasyRefLoader,
            EasyRefGroup,
            EasyRefEncodeGroup,
            EasyRefAggregate,
            EasyRefApply,
            EasyRefDemo,
            EasyRefReferenceAttention,
            EasyRefReferenceInfluence,
            EasyRefRecord,
            EasyRefWhereItActs,
            EasyRefConsistency,
            EasyRefWeightSheet,
            EasyRefSheet,
        ]


async def comfy_entrypoint() -> EasyRefExtension:
    return EasyRefExtension()
