"`python -m finessl`, which is also what `torchrun` starts. Written by hand: nbdev makes modules, this is a program."
import sys
from finessl.cli import main

if __name__ == "__main__": sys.exit(main())
