"""Trains a ConViT, or evaluates one: `convit train` and `convit eval` from a checkout.

python main.py --config=configs/digits.py --workdir=runs/digits
python main.py --mode=eval --workdir=runs/digits
python main.py --help
python main.py --mode=eval --help
"""

import argparse

from convit_jax.cli.main import run, start


def main() -> None:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--mode", choices=("train", "eval"), default="train")
    args, rest = parser.parse_known_args()
    run(args.mode, rest, f"python main.py --mode={args.mode}")


if __name__ == "__main__":
    start(main)
