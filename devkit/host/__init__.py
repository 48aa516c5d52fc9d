"""Helpers that run in or beside a real ComfyUI: a server, a browser, graphs, tiny nodes."""
