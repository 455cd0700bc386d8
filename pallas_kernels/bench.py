"""The command `python -m pallas_kernels.bench`; what it does and takes is in `pallas_kernels.measure.bench`."""

from pallas_kernels.measure.bench import main

if __name__ == "__main__":
    main()
