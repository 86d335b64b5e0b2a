"""Re-encode with the model's own vision encoder."""

from vpt_tools._reencode import Reencode

reencode_clip = Reencode("clip", "the model's own vision encoder")
