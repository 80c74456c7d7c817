"""`python -m fedpeer.cli`"""

import sys

from fedpeer.cli import main

sys.exit(main())
