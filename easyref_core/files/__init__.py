"""Files: tensors, images, and atomic writes."""
