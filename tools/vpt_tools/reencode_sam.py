"""Re-encode with the SAM encoder."""

from vpt_tools._reencode import Reencode

reencode_sam = Reencode("sam", "the SAM encoder (outlines and segments)")
