"""The trainer: `python -m train.main`."""
