"""The ComfyUI side: five nodes, from files to a conditioned MODEL, and one to try them.

    load.py        Load EasyRef               files -> EASYREF_MODEL
    references.py  Reference Group            images -> EASYREF_GROUP
    encode.py      Encode Reference Group     group + prompt -> EASYREF_CONTEXT
    aggregate.py   Aggregate Reference Tokens context -> EASYREF_TOKENS
    apply.py       Apply EasyRef              MODEL + tokens -> MODEL
    demo.py        Tiny Demo Model            everything the five need to be tried, without a download

files.py finds checkpoints and MLLM folders, mllm_patcher.py gives the weights to the host, unet_patch.py patches the
UNet: injection.py is what one Apply node adds, site_patch.py adds it at one attention, handout.py tells each UNet call what
acts, guidance.py what the guider is doing. tiny_sdxl.py, tiny_text.py and tiny_vae.py
are the demo's model.
"""

from comfy_api.latest import ComfyExtension, io

from .aggregate import EasyRefAggregate
from .apply import EasyRefApply
from .demo import EasyRefDemo
from .encode import EasyRefEncodeGroup
from .files import register_folders
from .load import EasyRefLoader
from .references import EasyRefGroup


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
        ]


async def comfy_entrypoint() -> EasyRefExtension:
    return EasyRefExtension()
