"""out = A B with A [m, k] V:N:M sparse: four of each m columns a block of v rows, two of those four a row."""

from pallas_kernels.vnm.api import best_form as best_form
from pallas_kernels.vnm.api import vnm as vnm
from pallas_kernels.vnm.api import vnm_transposed as vnm_transposed
