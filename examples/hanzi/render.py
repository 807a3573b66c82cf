# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Renders hanzi.npz, the images of the demo, from fonts under the SIL Open Font License (OFL.txt).

On Debian 12: apt-get install fonts-noto-cjk fonts-lxgw-wenkai fonts-seto
              pip install numpy pillow fonttools
              python examples/hanzi/render.py

The whole CJK block is rendered and cleaned, because fonts claim characters that they draw blank,
and some characters share a glyph. The rest is reduced to JIS X 0208, the characters in everyday
use.
"""

from collections import defaultdict
from pathlib import Path

import numpy as np
from fontTools.ttLib import TTFont
from PIL import Image, ImageDraw, ImageFont, features

FONTS = Path("/usr/share/fonts")
FACES = {  # name: file; the first font of a collection is the Japanese one
    "Noto Sans Regular": "opentype/noto/NotoSansCJK-Regular.ttc",
    "Noto Sans Bold": "opentype/noto/NotoSansCJK-Bold.ttc",
    "Noto Serif Regular": "opentype/noto/NotoSerifCJK-Regular.ttc",
    "Noto Serif Bold": "opentype/noto/NotoSerifCJK-Bold.ttc",
    "WenKai Light": "truetype/lxgw-wenkai/LXGWWenKai-Light.ttf",
    "WenKai Regular": "truetype/lxgw-wenkai/LXGWWenKai-Regular.ttf",
    "WenKai Bold": "truetype/lxgw-wenkai/LXGWWenKai-Bold.ttf",
    "Seto": "truetype/seto/setofont.ttf",
}
CJK_BLOCK = range(0x4E00, 0xA000)
SIZE = 32
SUPERSAMPLING = 4
EM = 28  # pixels of the em square, so that no stroke is cut off
INK = 90  # of 255: low enough for the thinnest strokes to survive

OUTPUT = Path(__file__).parent / "hanzi.npz"


def claimed(path: Path) -> set[int]:
    """Returns the code points of the CJK block that a font claims to have."""
    return set(TTFont(path, fontNumber=0).getBestCmap()) & set(CJK_BLOCK)


def render(path: Path, code_points: list[int]) -> np.ndarray:
    """Renders characters as (characters, 128) uint8, 32 x 32 bits each."""
    font = ImageFont.truetype(path, EM * SUPERSAMPLING, layout_engine=ImageFont.Layout.BASIC)
    side = SIZE * SUPERSAMPLING
    bitmaps = []
    for code_point in code_points:
        image = Image.new("L", (side, side))
        ImageDraw.Draw(image).text((side / 2, side / 2), chr(code_point), 255, font, anchor="mm")
        small = image.resize((SIZE, SIZE), Image.Resampling.BOX)
        bitmaps.append(np.packbits(np.asarray(small) > INK))
    return np.stack(bitmaps)


def unusable(bitmaps: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the reasons to drop characters of (characters, faces, 128), each with its mask."""
    owners = defaultdict(list)
    for character, face in np.ndindex(bitmaps.shape[:2]):
        owners[bitmaps[character, face].tobytes()].append(character)
    blank = np.asarray(~bitmaps.any(-1))
    shared, repeated = np.zeros(len(bitmaps), bool), np.zeros(len(bitmaps), bool)
    for bits, characters in owners.items():
        if any(bits):
            shared[characters] |= len(set(characters)) > 1
            for character in characters:
                repeated[character] |= characters.count(character) > 1
    return {
        "blank in some face": np.asarray(blank.any(1)),
        "a bitmap shared with another character": shared,
        "the same bitmap in two faces": repeated,
    }


def in_jis_x_0208(code_point: int) -> bool:
    """Says whether a character is in everyday use."""
    return len(chr(code_point).encode("euc_jp", errors="ignore")) == 2


def main() -> None:
    print(f"FreeType {features.version('freetype2')}, Pillow {features.version('pil')}")
    paths = [FONTS / file for file in FACES.values()]
    has = [claimed(path) for path in paths]
    code_points = sorted(set.intersection(*has))
    print(f"{len(set.union(*has))} characters claimed by some face, {len(code_points)} by all")

    columns = []
    for name, path, owned in zip(FACES, paths, has, strict=True):
        columns.append(render(path, code_points))
        print(f"{name}: {len(owned)} claimed, {(~columns[-1].any(1)).sum()} of the common blank")
    bitmaps = np.stack(columns, 1)

    keep = np.ones(len(bitmaps), bool)
    for reason, mask in unusable(bitmaps).items():
        examples = "".join(chr(code_points[i]) for i in np.flatnonzero(mask)[:10])
        print(f"dropped {mask.sum()} characters: {reason} ({examples})")
        keep &= ~mask
    common = np.array([in_jis_x_0208(code_point) for code_point in code_points])
    print(f"{keep.sum()} are usable, {(keep & common).sum()} of the {common.sum()} of JIS X 0208")
    keep &= common

    np.savez_compressed(
        OUTPUT,
        bitmaps=bitmaps[keep],
        characters=np.array([chr(c) for c, kept in zip(code_points, keep, strict=True) if kept]),
        faces=np.array(list(FACES)),
    )
    print(f"{OUTPUT.name}: {OUTPUT.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
