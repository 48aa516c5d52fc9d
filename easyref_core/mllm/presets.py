"""Instructions to choose from: what the MLLM is told to look for, in English and in Chinese.

Only `general` in English is the text the released model was trained with. The others ask the same kind of question
about one thing; how far the released model follows them is for the pictures to show.
"""

from __future__ import annotations

from .instructions import INSTRUCTION

LANGUAGES = ("English", "中文")

# The prompt follows an instruction directly, so each ends in a line break.
PRESETS: dict[str, dict[str, str]] = {
    "general": {
        "English": INSTRUCTION,
        "中文": "请构想一个与所提供图像高度相似的场景，体现以下提示所描述的精髓与细节：\n",
    },
    "identity": {
        "English": "Visualize the same person who appears in all of the provided images, keeping the face and identity, "
        "in the scene described in this prompt:\n",
        "中文": "请构想所提供图像中共同出现的同一个人，保持其面容与身份，置于以下提示所描述的场景中：\n",
    },
    "style": {
        "English": "Visualize a scene in the artistic style that the provided images share, their technique, texture "
        "and mood but not their subjects, as described in this prompt:\n",
        "中文": "请以所提供图像共有的艺术风格（技法、质感与氛围，而非其内容）构想以下提示所描述的场景：\n",
    },
    "character": {
        "English": "Visualize the same character who appears in all of the provided images, keeping the design, outfit "
        "and proportions, in the scene described in this prompt:\n",
        "中文": "请构想所提供图像中共同出现的同一角色，保持其造型、服装与比例，置于以下提示所描述的场景中：\n",
    },
    "object": {
        "English": "Visualize the same object that appears in all of the provided images, keeping its shape, material "
        "and details, in the scene described in this prompt:\n",
        "中文": "请构想所提供图像中共同出现的同一物体，保持其形状、材质与细节，置于以下提示所描述的场景中：\n",
    },
    "palette": {
        "English": "Visualize a scene in the colours and the light that the provided images share, as described in this "
        "prompt:\n",
        "中文": "请以所提供图像共有的色彩与光线构想以下提示所描述的场景：\n",
    },
    "composition": {
        "English": "Visualize a scene arranged like the provided images, with the layout, framing and viewpoint that "
        "they share, as described in this prompt:\n",
        "中文": "请以所提供图像共有的布局、取景与视角构想以下提示所描述的场景：\n",
    },
}
