"""Formats of records and preferences, and of the files that contain them.

`row_files` reads the rows of a file. `conversations`, `preferences`, `media` and
`fields` read the parts of a row, in any of the formats of docs/data_formats.md.
"""
