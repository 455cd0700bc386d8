"""What a run is: its settings, read from gin files, and the schedule of its phases."""
