"""Broken and odd inputs for the real code, and what may come of them: a right result or one clear error.

cases.py        what a kind of input is: it makes cases, and one good input whose result must never change
judge.py        whether a result is right and an error clear
watch.py        what a case opens, starts and connects to; what it leaves behind in its folders
worker.py       runs the cases of one kind in a process that may die; pool.py starts it, again where it did
mutations.py    bytes and JSON values, broken

checkpoint.py   checkpoint files, safetensors and PyTorch's     mllm_folder.py  config.json, tokenizer, index of weights
safetensors_files.py  headers and bodies, for both              token_files.py  files of reference tokens
images.py       references                                      text.py         instructions and prompts
numerics.py     inputs of the nodes                             paths.py        what becomes a path
host.py         the ComfyUI that the last two run in
"""
