"""Inspection: attention maps, influence, reference share, duplicates, and their drawings."""
