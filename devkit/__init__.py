"""Development helpers that tests and tools share: ComfyUI checkouts, golden data, a CPU-only torch."""
