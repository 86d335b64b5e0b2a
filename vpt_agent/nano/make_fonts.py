"""Cut the nano fonts out of full font files: `python -m vpt_agent.nano.make_fonts SOURCE_DIR`.

SOURCE_DIR holds the unpacked font packages named in `fonts/NOTICE.md`; needs `fonttools`.
Each subset keeps only the symbols that scenes use and gets a neutral name, because several
licences reserve the original one for unmodified files.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

from vpt_agent.nano.alphabet import SYMBOLS

SOURCES: Final[dict[str, str]] = {
    "train00": "DejaVuSans-Bold.ttf",
    "train01": "DejaVuSerif.ttf",
    "train02": "LiberationSans-Bold.ttf",
    "train03": "LiberationSerif-Bold.ttf",
    "train04": "LiberationMono-Bold.ttf",
    "train05": "Lato-Semibold.ttf",
    "train06": "Roboto-Medium.ttf",
    "train07": "RobotoSlab-Bold.otf",
    "train08": "OpenSans-Semibold.ttf",
    "train09": "Cabin-SemiBold.otf",
    "train10": "Comfortaa-Bold.ttf",
    "train11": "Inconsolata.otf",
    "train12": "Go-Medium.ttf",
    "train13": "Quicksand-Bold.ttf",
    "train14": "Caladea-Bold.ttf",
    "train15": "FiraCode-SemiBold.ttf",
    "train16": "Play-Bold.ttf",
    "train17": "Dosis-Bold.otf",
    "train18": "Courier Prime Bold.otf",
    "train19": "Karla-Bold.otf",
    "train20": "B612-Bold.otf",
    "train21": "mononoki-Bold.ttf",
    "unseen00": "ClearSans-Bold.ttf",
    "unseen01": "Vollkorn-Bold.ttf",
    "unseen02": "Cantarell-Bold.otf",
    "unseen03": "JetBrainsMono-Bold.ttf",
    "unseen04": "Anonymous Pro B.ttf",
    "unseen05": "allerta_medium.otf",
}


def make_font(source: Path, target: Path) -> None:
    """Write the subset of `source` with the scene symbols to `target` (TrueType or CFF)."""
    from fontTools import subset
    from fontTools.ttLib import TTFont

    options = subset.Options()
    options.hinting = False
    options.layout_features = []
    options.name_IDs = [0, 1, 2, 4, 6]
    options.notdef_outline = False
    font = TTFont(source)
    cutter = subset.Subsetter(options)
    cutter.populate(text=SYMBOLS + " ")
    cutter.subset(font)
    name = "VptNano" + target.stem.capitalize()
    for record in list(font["name"].names):
        if record.nameID == 0:
            continue
        text = "Regular" if record.nameID == 2 else name
        font["name"].setName(
            text, record.nameID, record.platformID, record.platEncID, record.langID
        )
    # The name in a CFF table is separate from the name table.
    if "CFF " in font:
        cff = font["CFF "].cff
        cff.fontNames = [name]
        for key in ("FullName", "FamilyName", "Notice", "Copyright", "Weight"):
            cff.topDictIndex[0].rawDict.pop(key, None)
    for tag in ("FFTM", "DSIG", "GPOS", "GSUB", "GDEF", "kern"):
        if tag in font:
            del font[tag]
    font.save(target)


def main() -> None:
    """Write every subset beside this file."""
    root = Path(sys.argv[1])
    target = Path(__file__).parent / "fonts"
    target.mkdir(exist_ok=True)
    for stem, name in SOURCES.items():
        found = sorted(root.rglob(name))
        if not found:
            raise FileNotFoundError(f"{name} is not under {root}; install its package first")
        make_font(found[0], target / f"{stem}.ttf")


if __name__ == "__main__":
    main()
