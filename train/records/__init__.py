"""What a run tells of itself: metrics, log, traces, plots, the report; and the benchmark of its steps."""
