"""`python -m convit_jax COMMAND`, the same as the console script `convit`."""

from convit_jax.cli.main import start

if __name__ == "__main__":
    start()
