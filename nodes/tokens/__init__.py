"""Nodes that combine, batch, save and load reference tokens."""
