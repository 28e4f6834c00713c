"""What adapters compute. `reference` is the definition; faster kernels replace the inside of its functions."""
