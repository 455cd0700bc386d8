"""The command `python -m pallas_kernels.bandwidth`; what it does and takes is in `pallas_kernels.measure.bandwidth`."""

from pallas_kernels.measure.bandwidth import main

if __name__ == "__main__":
    main()
