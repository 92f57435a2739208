"""What `routing-jax reproduce` runs, one experiment a file."""
