"""The laboratory: comparing models, and reports that a person likes to read."""
