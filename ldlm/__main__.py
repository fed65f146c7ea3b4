"""``python -m ldlm`` is the ``ldlm`` command."""

from ldlm.cli import main

if __name__ == "__main__":
    main()
