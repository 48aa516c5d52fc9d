"""What the MLLM can be told to look for: instructions by name, in English and Chinese.

`general` in English is the one the released model was trained with; the others keep its form, and are used as prompts are:
the model was not trained with them, but it reads them with the language it knows. The prompt follows directly.
"""

from __future__ import annotations

from .instructions import INSTRUCTION

LANGUAGES = ("en", "zh")
CUSTOM = "custom"  # a text of the user's own

INSTRUCTIONS: dict[str, dict[str, str]] = {
    "general": {
        "en": INSTRUCTION,
        "zh": "请设想一个与所给图像十分相似的场景，抓住下面提示词所描述的要点与细节：\n",
    },
    "identity": {
        "en": "Visualize a scene with the same person as in the provided images, keeping the face and its features "
        "and leaving clothes, pose and background to this prompt:\n",
        "zh": "请设想一个场景，其中的人物与所给图像中的是同一个人，保留面部及其特征，服装、姿势和背景按下面的提示词：\n",
    },
    "style": {
        "en": "Visualize a scene in the same artistic style as the provided images, keeping their technique, colours "
        "and light but not their subjects, as described in this prompt:\n",
        "zh": "请设想一个与所给图像艺术风格相同的场景，保留其技法、色彩和光线而不保留其主题，内容按下面的提示词：\n",
    },
    "character": {
        "en": "Visualize a scene with the same character as in the provided images, keeping its looks, clothes and "
        "proportions and leaving pose and surroundings to this prompt:\n",
        "zh": "请设想一个场景，其中的角色与所给图像中的相同，保留其外貌、服装和比例，姿势和环境按下面的提示词：\n",
    },
    "object": {
        "en": "Visualize a scene with the same object as in the provided images, keeping its form, material and "
        "markings and leaving the surroundings to this prompt:\n",
        "zh": "请设想一个场景，其中的物体与所给图像中的相同，保留其形状、材质和标记，环境按下面的提示词：\n",
    },
    "palette": {
        "en": "Visualize a scene in the same colours and light as the provided images, keeping nothing else of them, "
        "as described in this prompt:\n",
        "zh": "请设想一个色彩和光线与所给图像相同的场景，其余一概不保留，内容按下面的提示词：\n",
    },
    "composition": {
        "en": "Visualize a scene composed like the provided images, keeping the layout, the point of view and the "
        "proportions but neither subjects nor colours, as described in this prompt:\n",
        "zh": "请设想一个构图与所给图像相同的场景，保留布局、视角和比例，不保留主题和色彩，内容按下面的提示词：\n",
    },
}


def instruction(preset: str, language: str = "en", text: str = "") -> str:
    """The instruction of a preset; `text`, where there is any, is used in its place, with a line break at its end.

    Raises ValueError for a name that is not known, and for `custom` without a text.
    """
    if text.strip():
        return text if text.endswith("\n") else text + "\n"
    if preset == CUSTOM:
        raise ValueError("The instruction is custom, but its text is empty. Write one, or choose a preset.")
    if preset not in INSTRUCTIONS:
        raise ValueError(
            f"There is no instruction {preset!r}; there are {', '.join((*INSTRUCTIONS, CUSTOM))}."
        )
    if language not in LANGUAGES:
        raise ValueError(
            f"There are no instructions in {language!r}; there are some in {', '.join(LANGUAGES)}."
        )
    return INSTRUCTIONS[preset][language]
