"""Write the emoji of a font as a folder of images, for studies of colour at 32 and 64 pixels.

    python studies/emoji.py runs/emoji                  # of Debian's fonts-noto-color-emoji
    python studies/emoji.py runs/emoji --font=MINE.ttf

An image is the bitmap of a single code point, 136x128 pixels on a transparent ground. The folder
has no labels.
"""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro
from fontTools.ttLib import TTFont


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Where emoji come from, and where they go."""

    out: Annotated[Path, tyro.conf.Positional]
    """The folder, which is made if it does not exist."""
    font: Path = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
    """A font whose colour bitmaps are in a table CBDT."""


def main(args: Arguments) -> None:
    """Write each bitmap under its code point."""
    font = TTFont(args.font)
    bitmaps = font["CBDT"].strikeData[0]
    args.out.mkdir(parents=True, exist_ok=True)
    names = {name: code for code, name in font.getBestCmap().items() if name in bitmaps}
    for name, code in names.items():
        (args.out / f"{code:05x}.png").write_bytes(bitmaps[name].imageData)
    print(f"{len(names)} images in {args.out}")


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__, use_underscores=True))
