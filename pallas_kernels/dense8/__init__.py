"""out = A B^T with dense operands of 8 bits, and scales in the epilogue."""

from pallas_kernels.dense8.api import dense8 as dense8
