"""Parts of the report on a GPU (tools/bench/gpu.py). Each runs in a process of its own, with a time limit.

    golden.py         the golden data in float32 and bfloat16
    weights.py        writes full-size random weights in the released layout, for the parts after it
    encode.py         cold encoding against the roofline and against transformers
    edit.py           another prompt, one reference added
    step.py           a step of SDXL's UNet with references against one without
    compiled.py       the same under torch.compile
    fp8.py            bytes that fp8 storage holds, and its tokens
    host_weights.py   writes SDXL's UNet for ComfyUI
    host_step.py      a step in ComfyUI with the nodes' patches
    host_compiled.py  the same under ComfyUI's torch.compile
    host_modes.py     a workflow in a server with each kind of memory management

A part is a module with one function,

    measure(options: GpuOptions, say: Callable[[str], None]) -> Iterator[Row]

Each row is stored when it is yielded, so that a part that fails or runs out of time leaves those before.
"""
