"""out = A B with A [m, k] 2:4 sparse along k."""

from pallas_kernels.sparse24.api import dense_wins as dense_wins
from pallas_kernels.sparse24.api import sparse24 as sparse24
