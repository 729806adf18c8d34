"""`python -m slotmemory.cli`: the same as `slotmemory`."""

from slotmemory.cli import main

if __name__ == "__main__":  # training starts processes that import this file
    main()
