"""Nodes that show what the references do."""
