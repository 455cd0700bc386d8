"""Lists of runs for `python -m train.sweep`; TOML, as a run is gin and a sweep is not."""
