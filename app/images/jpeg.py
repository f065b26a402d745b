"""The header of a JPEG of the usual kind, read without libvips.

Almost every upload is one, and for its header libvips is called some twenty times: each time this
thread gives the interpreter up and waits for it again. Sources: ITU-T T.81, B.2.2; Exif 2.3, 4.6.
"""

import struct

_BASELINE, _PROGRESSIVE, _EXIF, _ADOBE, _SCAN = 0xC0, 0xC2, 0xE1, 0xEE, 0xDA
_MAX_SIDE_PX = 65_500  # libjpeg's own
_SAMPLINGS = frozenset(h << 4 | v for h in (1, 2, 4) for v in (1, 2, 4))
_ORIENTATION, _SHORT = 0x0112, 3
_ENTRY_BYTES = 12


def read_usual_jpeg(head: bytes) -> tuple[int, int, int] | None:
    """Width and height in pixels, as stored, and the orientation (1-8).

    head: a JPEG's segments up to its scan. None when anything about it is unusual or broken.
    """
    frame = b""
    orientation: int | None = 1
    at, seen = 2, set()
    while at + 4 <= len(head) and head[at + 1] != _SCAN:
        marker, end = head[at + 1], at + 2 + int.from_bytes(head[at + 2 : at + 4])
        body = head[at + 4 : end]
        if marker in seen:
            return None
        seen.add(marker)
        if marker in (_BASELINE, _PROGRESSIVE):
            seen |= {_BASELINE, _PROGRESSIVE}
            frame = body
        elif marker == _EXIF:
            orientation = _exif_orientation(body)
        elif marker != _ADOBE:
            return None
        at = end
    if orientation is None or not (_is_usual_frame(frame) and _is_scan_of(frame, head[at:])):
        return None
    height_px, width_px = int.from_bytes(frame[1:3]), int.from_bytes(frame[3:5])
    is_usual = 0 < width_px <= _MAX_SIDE_PX and 0 < height_px <= _MAX_SIDE_PX
    return (width_px, height_px, orientation) if is_usual else None


def _is_usual_frame(frame: bytes) -> bool:
    """Of a grey or three-coloured picture, eight bits deep."""
    if len(frame) < 6 or frame[0] != 8 or frame[5] not in (1, 3):
        return False
    return len(frame) == 6 + 3 * frame[5] and _SAMPLINGS.issuperset(frame[7::3])


def _is_scan_of(frame: bytes, scan: bytes) -> bool:
    """Whether it is the scan of all of the frame's components, in their order."""
    count = frame[5]
    size = 6 + 2 * count
    start = bytes((0xFF, _SCAN, 0, size, count))
    return scan.startswith(start) and scan[5 : 2 + size - 3 : 2] == frame[6::3]


def _exif_orientation(exif: bytes) -> int | None:
    """1 when nothing is said of it."""
    tiff = exif[6:]
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if exif[:6] != b"Exif\0\0" or order is None:
        return None
    try:
        (directory,) = struct.unpack_from(order + "I", tiff, 4)
        (count,) = struct.unpack_from(order + "H", tiff, directory)
        entries = [
            struct.unpack_from(order + "HHIH", tiff, directory + 2 + _ENTRY_BYTES * number)
            for number in range(count)
        ]
    except struct.error:
        return None
    said = [entry[1:] for entry in entries if entry[0] == _ORIENTATION]
    if not said:
        return 1
    (kind, values, value), *more = said
    is_usual = (kind, values) == (_SHORT, 1) and 1 <= value <= 8 and not more
    return value if is_usual else None
