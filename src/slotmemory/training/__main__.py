"""Train from the command line: `python -m slotmemory.training RECIPE RUN [key=value ...]`."""

from __future__ import annotations

import argparse
import logging
import sys

from rich.logging import RichHandler

from slotmemory.errors import InputError
from slotmemory.training.loop import TrainingError, train
from slotmemory.training.recipe import load_recipe


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m slotmemory.training", description=__doc__)
    parser.add_argument("recipe", help="a YAML file, e.g. recipes/train/tiny/codec.yaml")
    parser.add_argument("run", help="folder of the run; resumed if it holds a checkpoint")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. steps=100 optimizer.clip=0.5")
    arguments = parser.parse_args()
    if sys.stderr.isatty():
        logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[RichHandler(show_path=False)])
    else:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    try:
        train(load_recipe(arguments.recipe, arguments.overrides), arguments.run)
    except (InputError, TrainingError) as error:
        logging.getLogger(__name__).error("%s", error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
