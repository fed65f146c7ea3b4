"""``python -m ldlm`` is the ``ldlm`` command."""

import os
import sys

if __name__ == "__main__" and not sys.flags.safe_path and sys.path[0] == os.getcwd():
    del sys.path[0]  # -m puts the current folder before the standard library, and it may be a downloaded one

from ldlm.cli.main import main

if __name__ == "__main__":
    main()
