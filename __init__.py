"""ComfyUI-EasyRef: SDXL guided by a group of reference images (EasyRef, arXiv 2412.09618)."""

if __package__:  # set by ComfyUI's loader; empty where a tool imports this file on its own
    from .nodes import comfy_entrypoint

    WEB_DIRECTORY = "./web"

    __all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
