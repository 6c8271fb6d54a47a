"""Train skip-gram on Python's own source: nn.Embedding, embed_ext.Embedding and embed_ext.optim.

    python examples/train_skipgram.py            # a few minutes on two cores
    python examples/train_skipgram.py --small    # a short run of the same thing

The exit status is 1 if the two loss curves disagree. See examples/README.md.
"""

from __future__ import annotations

import sys

from skipgram.cli import main

if __name__ == "__main__":
    sys.exit(main())
