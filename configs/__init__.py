"""gin files of the trainer: one axis a folder (size, recipe, data, options). Text only; nothing here is imported."""
