"""``python -m sparsec``: the command, also for what starts modules, such as torchrun and accelerate launch."""

from sparsec.compiler.cli import main

if __name__ == "__main__":
    main()
