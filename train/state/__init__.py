"""What a run carries from step to step and keeps on disk: parameters, optimizer, checkpoints, its workdir."""
