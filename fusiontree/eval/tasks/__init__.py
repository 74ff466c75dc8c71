"""The tasks: one file or folder a family; eval/registry.py lists them. The other files here are what several share."""
