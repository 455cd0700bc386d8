"""The command `python -m pallas_kernels.tune`; what it does and takes is in `pallas_kernels.measure.tune`."""

from pallas_kernels.measure.tune import main

if __name__ == "__main__":
    main()
