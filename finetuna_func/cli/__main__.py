"""`python -m finetuna_func.cli` is `finetuna`."""

from finetuna_func.cli import main

if __name__ == "__main__":
    main()
