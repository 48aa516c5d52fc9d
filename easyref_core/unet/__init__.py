"""Reference attention in the UNet: its sites, and its weight by layer, step and mask."""
