"""The command `python -m pallas_kernels.roofline`; what it does and takes is in `pallas_kernels.measure.roofline`."""

from pallas_kernels.measure.roofline import main

if __name__ == "__main__":
    main()
