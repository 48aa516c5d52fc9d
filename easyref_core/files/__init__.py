"""Files: safetensors and pickles as tensors, images that Pillow can read, atomic writes."""
