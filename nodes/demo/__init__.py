"""The demo node and its tiny SDXL."""
