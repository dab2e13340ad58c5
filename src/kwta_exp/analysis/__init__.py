"""What a network is like along lines and planes: its pieces, its jumps, its loss."""
