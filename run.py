"""python run.py driver=torchrun env=local app=hello_dist driver.nproc_per_node=4"""

import sys

from everyrank.cli.main import run_main

if __name__ == "__main__":
    sys.exit(run_main())
