"""gin files of the trainer: one axis a folder (size, recipe, data, options). Text only.

The folders are packages so that gin finds an included file in an installed wheel too.
"""
