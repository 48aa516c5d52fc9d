"""ComfyUI's side of the pack: hosted model, folders, images, previews, socket types, validation."""
