"""Nodes that prepare a group of references, its instruction and its size."""
