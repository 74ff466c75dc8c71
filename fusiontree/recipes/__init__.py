"""Whole roads, composed of the rooms below."""
