"""k-Winners-Take-All networks: train them, attack them, and say whether the robustness is real."""

__version__ = "0.1.0"
