"""Re-encode with the DINOv2 encoder."""

from vpt_tools._reencode import Reencode

reencode_dino = Reencode("dino", "the DINOv2 encoder (objects and parts)")
