"""The MLLM: preprocessing, instructions, the Qwen2-VL body, prefix caching and its memory budget."""
