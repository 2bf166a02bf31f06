"""Types, meshes and processes, logs, timing and files, without models or data."""
