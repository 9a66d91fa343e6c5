"""Train VRT from a legacy option file.

torchrun --nproc_per_node=N main_train_vrt.py --opt options/vrt/demo_bigbuckbunny_x4.json
python main_train_vrt.py --opt options/vrt/demo_bigbuckbunny_x4.json
"""

import sys

from everyrank.apps.video_restoration.entry import main

if __name__ == "__main__":
    sys.exit(main())
